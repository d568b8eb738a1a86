"""The exceptions that a command shows as one line. Any other exception is a bug, ours or a student's, and shows its
traceback."""


class InputError(ValueError):
    """A user's input is wrong. The message is one line that names the field or file, what was found, what was
    expected, and the fix. The exit code is 2."""


class Broken(Exception):
    """A fault that is no bug ended a run after its start: a full disk, or numbers that are not finite. The exit code
    is 1."""


class Diverged(Broken):
    """The last updates of a run gave numbers that are not finite."""


class Unwritten(Broken):
    """A file could not be written."""
