"""The errors of this project: those of the user, and those of a machine."""


class UserError(ValueError):
    """The user must correct something. The message is one line: what is wrong, where, and what to do."""


class MachineError(RuntimeError):
    """A disk, a network or a process failed. Starting again may help."""


class PeerLostError(MachineError):
    """Another rank, or a decoding process of this one, ended or hangs."""


class NoGpuError(MachineError):
    """A rank that was given a GPU does not see one. Starting again, perhaps on another node, may help."""
