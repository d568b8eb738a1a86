"""What a command shows as one line. Every other exception is a bug, ours or a student's, and shows its traceback."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """What a user wrote is wrong. One line: field or file, what was found and expected, the fix. Exit code 2."""


class Broken(Exception):
    """A fault, no bug, has ended a run that had begun: a full disk, numbers that are not finite. Exit code 1."""


class Diverged(Broken):
    """The numbers of a run's last updates were not finite."""


class Unwritten(Broken):
    """A file could not be written."""


@contextlib.contextmanager
def as_input() -> Iterator[None]:
    """Turns a ValueError into an InputError: around calls of reward.py, which imports nothing of ours."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
