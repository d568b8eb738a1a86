"""A reward is `math` (1 if the last boxed answer is equivalent to the gold answer), `exact` (1 if the last boxed
answer is the same text as the gold answer), or a function of your own.

The package answers/ reads mathematical answers and decides when two answers are equal. A `Reward` holds the function
with which a run grades, its check and its fingerprint. Answers outside a box get no reward, because a policy would
learn to write many numbers. There is no reward for the format. There is no time limit, because answers/ bounds its
own work.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import Unreadable, equal, read

_MARKS = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<open>\{)?|(?:\\[\\{}])+|(?P<in>\{+)|(?P<out>\}+)")
_BARE = re.compile(r"[-+]?[\w.,/:^]{0,99}\w|\\[A-Za-z]+[^$\n]{0,199}?(?=\$|\\\)|\\\]|\n|\Z)")


def extract_boxed(text: str | None) -> str | None:
    """Returns the content of the last complete ``\\boxed{...}`` or ``\\fbox{...}`` of `text`; None if there is none.

    Returns None also if `text` is not a string. The function reads the text once, so its time grows linearly with the
    text. Braces inside a box must balance; escaped braces are not counted. If a box stands inside another, the outer
    box is taken. ``\\boxed 5`` without braces gives "5". A box that never closes (in a truncated response) is
    ignored, and the last complete box before it is taken.
    """
    if not isinstance(text, str) or ("\\boxed" not in text and "\\fbox" not in text):
        return None
    best, depth = (-1, -1), 0
    boxes: list[tuple[int, int]] = []  # for each open box, where its content starts and its brace depth
    # ends of the words \boxed without a brace; only the last 20 are kept, to bound the time
    bare: deque[int] = deque(maxlen=20)
    for mark in _MARKS.finditer(text):
        if mark["in"]:
            depth += len(mark["in"])
        elif mark["out"]:
            after = depth - len(mark["out"])
            while boxes and after < boxes[-1][1]:
                start, inside = boxes.pop()
                best = (start, mark.start() + depth - inside)
            depth = max(after, 0)
        elif mark["open"]:
            depth += 1
            boxes.append((mark.end(), depth))
        elif mark.group()[1] in "bf":
            bare.append(mark.end())
    for start in reversed(bare):
        match = _BARE.match(text, start)
        if start > best[1] and match:
            best = match.span()
            break
    start, end = best
    if end < 0:
        return None
    return text[start:end]


def is_equivalent(prediction: str, gold: str) -> bool:
    """Returns whether two final answers mean the same; False if one of them cannot be read. Never raises."""
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    try:
        return equal(read(prediction), read(gold))
    except Exception:  # the error is Unreadable, or a bug in answers/, which must not end a run
        return False


def is_read(response: str | None) -> bool:
    """Returns whether `response` has a complete box whose content answers/ can read."""
    boxed = extract_boxed(response)
    if boxed is None:
        return False
    try:
        read(boxed)
    except Exception:  # the error is Unreadable, or a bug in answers/, which must not end a run
        return False
    return True


def grade(response: str | None, gold: str) -> float:
    """Returns 1.0 if the last boxed answer of `response` is equivalent to `gold`, else 0.0.

    A response that is no string gets 0.0. A gold answer that is no string is a fault in the data and raises
    TypeError.
    """
    if not isinstance(gold, str):
        raise TypeError(f"gold must be a string, got {type(gold).__name__}: {gold!r:.80}; pass the answer as text")
    boxed = extract_boxed(response)
    return float(boxed is not None and is_equivalent(boxed, gold))


def check_gold(gold: str) -> None:
    """Raises ValueError if no response can be graded against `gold`, because `gold` cannot be read. The data loader
    calls this function."""
    if not isinstance(gold, str):
        raise ValueError(f"answer must be a string, got {type(gold).__name__}: {gold!r:.80}; write it as text")
    try:
        read(gold)
    except Unreadable as error:
        raise ValueError(
            f"answer {gold[:80]!r} cannot be read: {error}; rewrite it as plain LaTeX or leave the problem out"
        ) from None


# ---- what a run grades with


class RewardError(ValueError):
    """A reward cannot be loaded, or its function failed on a response. Commands show this error as one line."""


@dataclass(frozen=True)
class Reward:
    """A reward, whose `function(response, problem)` returns a number in [0, 1] for a data.loader.Problem. A response
    counts as right if its reward is 1."""

    name: str  # "math", "exact" or "FILE.py:function"
    function: Callable[[str, Any], float]
    check: Callable[[Any], None]  # called for each loaded problem; raises ValueError for one that cannot be graded
    is_read: Callable[[str], bool]  # whether a response states a readable answer, right or wrong
    fingerprint: str  # sha256 of the reward's source files


def _math(response: str, problem: Any) -> float:
    return grade(response, problem.answer)


def _check_math(problem: Any) -> None:
    check_gold(problem.answer)


def _exact(response: str, problem: Any) -> float:
    boxed = extract_boxed(response)
    return float(boxed is not None and boxed.strip() == problem.answer.strip())


def _check_exact(problem: Any) -> None:
    if not problem.answer.strip():
        raise ValueError("answer is empty: write the text that the box must hold")


def _is_boxed(response: str) -> bool:
    return extract_boxed(response) is not None


def _anything(value: Any) -> bool:
    return True


def _sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def raised(error: BaseException, file: str) -> str:
    """Returns the error that a user's code in `file` raised, as one line with file and line number. The name of the
    error's class is left out for a ValueError."""
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).name == Path(file).name:
            place = f" ({file}:{frame.lineno})"
    return " ".join(f"{name}{error}".splitlines()) + place


@contextlib.contextmanager
def same_folder() -> Iterator[None]:
    """Raises ValueError if the user's code in this context changes the working directory, to which the run's paths
    are relative. The old working directory is restored."""
    before = os.getcwd()
    try:
        yield
        changed = os.getcwd() != before
    finally:
        os.chdir(before)
    if changed:
        raise ValueError("the code changes the working directory: name files by Path(__file__).parent instead")


def load_reward(name: str = "math") -> Reward:
    """Returns the built-in reward called `name`, or the reward of FILE.py[:function]. FILE.py is run, and `function`
    (default: reward) is taken from it.

    If FILE.py has a function `check(problem)`, that function is called for every problem when data is loaded. Raises
    RewardError for an unknown name, a missing file or function, or an error while FILE.py runs.
    """
    here = Path(__file__)
    if name == "math":
        code = _sha256(here, *sorted(here.with_name("answers").glob("*.py")))
        return Reward(name, _math, _check_math, is_read, code)
    if name == "exact":
        return Reward(name, _exact, _check_exact, _is_boxed, _sha256(here))
    file, colon, function = name.partition(".py:")
    if not (colon or name.endswith(".py")):
        raise RewardError(f"reward is {name!r}, expected math, exact, or a Python file: FILE.py or FILE.py:function")
    path, function = Path(file.removesuffix(".py") + ".py"), function or "reward"
    if not path.is_file():
        raise RewardError(f"reward {name!r}: the file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward {path.resolve()}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in FILE.py looks its module up in sys.modules
    try:
        with same_folder():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r}: {path} cannot be run: {raised(error, str(path))}") from error
    own = getattr(module, function, None)
    if not callable(own):
        raise RewardError(f"reward {name!r}: {path} has no function {function}(response, problem)")
    return Reward(f"{path}:{function}", own, getattr(module, "check", _anything), _anything, _sha256(path))


MATH = load_reward()


def grade_one(reward: Reward, response: str, problem: Any) -> float:
    """Returns the reward of a response. Raises RewardError, which names the problem, if the reward's function fails
    or returns no number in [0, 1].

    The reward is rounded to six digits, so that 0.7 + 0.2 + 0.1 counts as 1, and sums of the same numbers are equal
    in any order. A function may also return a Fraction, a Decimal, a NumPy number or a tensor without dimensions, but
    no text.
    """
    place = f"on problem {problem.id!r}"
    try:
        with same_folder():
            value = reward.function(response, problem)
        number = float(value) if hasattr(value, "__float__") and not getattr(value, "ndim", 0) else math.nan
    except (Exception, SystemExit) as error:
        what = raised(error, reward.name.rpartition(":")[0])
        raise RewardError(f"reward {reward.name} failed {place}: {what}") from error
    if not 0 <= round(number, 6) <= 1:
        text = " ".join(repr(value).split())
        raise RewardError(f"reward {reward.name} gave {text:.80} {place}, expected a number from 0 to 1")
    return round(number, 6)


def grade_all(reward: Reward, responses: Sequence[str], problems: Sequence[Any]) -> list[float]:
    """Returns the rewards of all responses, each graded by `grade_one` with its problem."""
    return [grade_one(reward, response, problem) for response, problem in zip(responses, problems, strict=True)]
