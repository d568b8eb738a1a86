"""This file writes files whole or not at all, and reads JSON that this project wrote. The message of each error is
one line."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.errors import InputError, Unwritten


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Wraps the reading of a file. An OSError becomes an InputError, because the user named the file or its
    folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps the writing of a file or folder. An OSError becomes the error Unwritten."""
    try:
        yield
    except OSError as error:
        raise Unwritten(f"writing to {path} failed ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames that file to `path` at the end. If writing fails, the temporary
    file is removed."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def jsonl_line(row: dict[str, Any]) -> str:
    """Returns `row` as a line of a data file, in ASCII, because some readers take the character U+2028 for the end of
    a line."""
    return json.dumps(row) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(jsonl_line, rows))


def make_folder(folder: Path, exist_ok: bool = True) -> Path:
    """Returns `folder`, and makes it if it does not exist. Raises InputError if nothing can be written to
    `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): give another --out") from error
    return folder


OURS = "restore it, or delete it"  # the advice for a damaged file that this project wrote


def check_object(value: Any, place: str, fields: Sequence[str] = (), advice: str = OURS) -> None:
    """Raises InputError if `value` is no JSON object or lacks one of `fields`. `place` is what the error names: a
    file or file:line."""
    if not isinstance(value, dict) or not value.keys() >= set(fields):
        found = f"found {json.dumps(value)[:40]}, expected a JSON object" + f" with {', '.join(fields)}" * bool(
            fields
        )
        raise InputError(f"{place}: {found}: {advice}")


def parse_object(text: bytes, place: str, fields: Sequence[str] = (), advice: str = OURS) -> dict[str, Any]:
    """Parse a JSON object. Raises InputError if `text` is no JSON object or lacks one of `fields`.

    `place` is what the error names: the file or file:line of `text`. `advice` is what the error says to do.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error}): {advice}") from error
    check_object(value, place, fields, advice)
    return value


def read_json(path: Path, *fields: str, advice: str = OURS) -> dict[str, Any]:
    """Read the JSON object in a file. Raises InputError if the object lacks one of `fields`."""
    with reading(path):
        return parse_object(path.read_bytes(), str(path), fields, advice)


def read_log(path: Path, *fields: str) -> list[dict[str, Any]]:
    """Read the rows of a JSONL log. Raises InputError if a row lacks one of `fields`. A last line without an end of
    line is ignored, because the process was killed while it wrote this line."""
    with reading(path):
        lines = path.read_bytes().split(b"\n")[:-1]  # splitlines() would also split at the character U+2028
    return [parse_object(line, f"{path}:{number}", fields) for number, line in enumerate(lines, 1)]
