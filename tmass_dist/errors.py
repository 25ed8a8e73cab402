"""The errors of this project, by whose they are: the user's, or the machine's."""


class UserError(ValueError):
    """A mistake of the user: one line that says what is wrong and what to do. Trying again cannot help."""


class PeerLostError(RuntimeError):
    """Another rank, or a process that works for this one, is gone or hangs. Starting again may help."""
