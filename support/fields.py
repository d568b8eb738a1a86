"""What stands in a file of ours, checked: a field that is missing, of another type, not finite or out of its range.

For files that are read again after a run or an evaluation has ended, and may have been edited or damaged since. What
a user gives is checked by data/loader.py and support/config.py.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.errors import InputError
from support.files import reading

MOST = sys.float_info.max  # beyond it no figure can be drawn; NaN is not below it either
KINDS: dict[str, tuple] = {  # what is expected: its type, and of numbers the smallest and the largest
    "a text": (str,),
    "true or false": (bool,),
    "a list": (list,),
    "an object": (dict,),
    "a number": (int | float, -MOST, MOST),
    "a number from 0 to 1": (int | float, 0, 1),
    "a whole number": (int, -MOST, MOST),
    "a whole number of at least 0": (int, 0, MOST),
    "a whole number of at least 1": (int, 1, MOST),
}
TEXT, BOOL, LIST, OBJECT, NUMBER, SHARE, INT, COUNT, POSITIVE = KINDS


def check_value(value: Any, expected: str, where: str) -> None:
    """InputError if `value` is not what KINDS says."""
    kind, *bounds = KINDS[expected]
    good = isinstance(value, kind) and (kind is bool or type(value) is not bool)
    if not good or (bounds and not bounds[0] <= value <= bounds[1]):
        raise InputError(f"{where} is {value!r:.40}, expected {expected}")


def check_fields(values: Any, fields: dict[str, str], where: str, optional: dict[str, str] | None = None) -> None:
    """InputError if `values` is not an object with these fields; those of `optional` may be missing or null."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is {type(values).__name__}, expected an object")
    for name, expected in fields.items():
        check_value(values.get(name), expected, f"{where}: {name}")
    for name, expected in (optional or {}).items():
        if values.get(name) is not None:
            check_value(values[name], expected, f"{where}: {name}")


def read_row(line: bytes, check: Callable[[Any], None], place: str, fix: str) -> Any:
    """The JSON value on a line of a log. InputError, one line, where it is none or `check` raises one: the `place`
    (file and line), what was found and expected, and the `fix`."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: found {line[:40]!r}, expected a JSON object: {fix}") from error
    try:
        check(value)
    except ValueError as error:
        raise InputError(f"{place}: {str(error)[:150]}: {fix}") from error
    return value


def read_steps(log: Path, check: Callable[[Any], None]) -> list[dict[str, Any]]:
    """The rows of a run's log, whose steps rise; `check` asks for their step. InputError as read_row."""
    rows: list[dict[str, Any]] = []
    with reading(log):
        content = log.read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        row = read_row(line, check, f"{log}:{number}", "delete the line")
        if rows and row["step"] <= rows[-1]["step"]:
            where = f"{log}:{number}: step {row['step']} stands after step {rows[-1]['step']}"
            raise InputError(f"{where}, expected a later one: delete one of the two lines")
        rows.append(row)
    return rows
