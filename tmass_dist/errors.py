"""The errors of this project: those of the user, and those of a machine."""


class UserError(ValueError):
    """The user must correct something. The message is one line: what is wrong, where, and what to do."""


class PeerLostError(RuntimeError):
    """Another rank, or a decoding process of this one, ended or hangs. Starting again may help."""


class NoGpuError(RuntimeError):
    """A rank that was given a GPU does not see one. Starting again, perhaps on another node, may help."""
