"""Files that are written whole or not at all; what goes wrong with a file, as an error of one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from support.errors import InputError, Unwritten


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around reading a file that a user names or that stands in a folder: an OSError becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a file or folder: an OSError becomes an Unwritten."""
    try:
        yield
    except OSError as error:
        raise Unwritten(f"writing to {path} failed ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to: at the end it takes the place of `path`. Where that fails it is removed."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
