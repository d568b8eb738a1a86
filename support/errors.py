"""The exceptions that a command shows as one line. Any other exception is a bug, in this project or in a user's code,
and shows its traceback."""


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the field or file, the value found, the value
    expected, and the fix. The command ends with exit code 2."""


class Broken(Exception):
    """A fault that is no bug ended a run after its start: a full disk, or numbers that are not finite. The command
    ends with exit code 1."""


class Diverged(Broken):
    """The last updates of a run gave numbers that are not finite."""


class Unwritten(Broken):
    """A file could not be written."""
