"""The stored lines of the study, read and checked: results/study/REGIME.jsonl and ceiling.jsonl.

runs.py says what stands in a line of a trial or run, ceiling.py in one of its own.
"""

import json
from pathlib import Path
from typing import Any

from data.make_recipes import LEVELS, PROBLEMS_PER_LEVEL
from results import ceiling, runs
from results.claims import SAMPLES
from results.protocol import Line
from support.errors import InputError
from support.fields import BOOL, COUNT, LIST, NUMBER, OBJECT, SHARE, TEXT, check_fields, check_value, read_row

RUN = {"regime": TEXT, "method": TEXT, "seed": COUNT, "trial": BOOL, "settings": OBJECT, "scores": OBJECT}
RUN |= {"made_of": OBJECT}
MEASURED = {"probe": LIST, "tokens": OBJECT, "curve": OBJECT}  # of all but the base and a trial that diverged
TOKENS = dict.fromkeys(("sampled", "trained", "supervised"), COUNT)


def check_line(line: Any) -> None:
    """InputError where a field of a line is missing, of another type, not finite or out of its range."""
    check_fields(line, RUN, "run", MEASURED | {"diverged": TEXT})
    of_ceiling = line["regime"] == ceiling.NAME
    if not of_ceiling and line["method"] != "base":
        check_fields(line, {"probe": LIST} if line["trial"] else MEASURED, "run")
    check_table(line["made_of"], TEXT, "made_of")
    for name, value in line["settings"].items():
        check_value(value, TEXT if name == "expert" else NUMBER, f"settings: {name}")
    for name, shares in line["scores"].items():
        check_table(shares, SHARE, f"scores: {name}")
    if not of_ceiling and line["scores"]:
        check_fields(line["scores"].get("validation"), {"greedy": SHARE, "sampled": SHARE}, "scores: validation")
    for number, row in enumerate(line.get("probe") or []):
        check_list(row, NUMBER, f"probe[{number}]")
    if line.get("tokens") is not None:
        check_fields(line["tokens"], TOKENS, "tokens")
    if line.get("curve") is not None:
        check_curve(line["curve"])
    if not line["trial"]:
        check_right(line)


def check_table(values: Any, expected: str, where: str) -> None:
    check_value(values, OBJECT, where)
    check_fields(values, dict.fromkeys(values, expected), where)


def check_list(values: Any, expected: str, where: str, length: int | None = None) -> None:
    check_value(values, LIST, where)
    if length not in (None, len(values)):
        raise InputError(f"{where} has {len(values)} values, expected {length}")
    for place, value in enumerate(values):
        check_value(value, expected, f"{where}[{place}]")


def check_curve(curve: dict[str, Any]) -> None:
    """Values at the steps of the curve; null where there was nothing to average, or no evaluation."""
    for name in ("step", "tokens", "validation"):
        check_value(curve.get(name), LIST, f"curve: {name}")
    if not curve["step"]:
        raise InputError("curve: step is empty, expected the evaluated steps")
    for name, values in curve.items():
        check_value(values, LIST, f"curve: {name}")
        known = values if name in ("step", "tokens") else [0 if value is None else value for value in values]
        check_list(known, NUMBER, f"curve: {name}", len(curve["step"]))


def check_right(line: Line) -> None:
    """The right samples of each problem, no more than were drawn."""
    if line["regime"] == ceiling.NAME:
        counts = {"right": (line.get("right"), ceiling.SAMPLES)}
        check_list(line.get("right"), COUNT, "right", ceiling.PROBLEMS * len(ceiling.LEVELS))
    else:
        check_fields(line.get("right"), dict.fromkeys(SAMPLES, TEXT), "right")
        problems, counts = len(LEVELS) * PROBLEMS_PER_LEVEL["test"], {}
        for kind, samples in SAMPLES.items():
            try:
                counts[f"right: {kind}"] = runs.unpack_counts(line["right"][kind], problems), samples
            except ValueError as error:
                raise InputError(f"right: {kind}: {error}") from error
    for where, (found, samples) in counts.items():
        if max(found) > samples:
            raise InputError(f"{where} has {max(found)} right samples of a problem, expected at most {samples}")


def stored_lines(path: Path) -> list[Line]:
    """The lines of a file of results; InputError where one is damaged or there twice."""
    lines, places = [], {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        line = read_row(text, check_line, f"{path}:{number}", "restore or delete the line")
        who = [line[name] for name in ("regime", "method", "seed", "trial", "settings", "made_of")]
        key = json.dumps(who, sort_keys=True)
        if places.setdefault(key, number) != number:
            raise InputError(f"{path}:{number}: the same run as in line {places[key]}: delete one of the two")
        lines.append(line)
    return lines


def check_stored(path: Path, regime: str) -> list[Line]:
    """The same; InputError also where a line is of another regime than the file's name says, base or data; `regime`:
    whose base and data."""
    lines, now = stored_lines(path), runs.made_of(regime)
    for number, line in enumerate(lines, 1):
        if line["regime"] != path.stem:
            raise InputError(f"{path}:{number}: found a run of regime {line['regime']}, expected {path.stem}")
        other = [name for name in now if line["made_of"].get(name) != now[name]]
        if other:
            was = ", ".join(f"{name} {line['made_of'].get(name)}, now {now[name]}" for name in other)
            raise InputError(
                f"{path}:{number}: made of something else ({was}): restore that, or move the file away to begin anew"
            )
    return lines
