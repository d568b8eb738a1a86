"""This file checks the answers to the exercises of the notebooks. `check` prints "not yet", "right" or "not right",
and never raises."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any


def plain(value: Any) -> Any:
    """Converts a tensor, NumPy array or NumPy number to a Python list or number."""
    return value.tolist() if hasattr(value, "tolist") else value


def unanswered(answer: Any) -> bool:
    """Returns whether the answer, or an item of it, is still None."""
    answer = plain(answer)
    return answer is None or (isinstance(answer, list | tuple) and any(map(unanswered, answer)))


def same_number(answer: float, expected: float) -> bool:
    """Returns whether two numbers agree to three digits. An answer that equals `expected` rounded as in the texts of
    the notebooks (two digits, but at least two decimals) agrees too."""
    decimals = max(2, 1 - math.floor(math.log10(abs(expected)))) if expected else 2
    rounded = math.isclose(answer, round(expected, decimals), rel_tol=1e-6)
    return rounded or math.isclose(answer, expected, rel_tol=2e-3, abs_tol=1e-3)


def equal(answer: Any, expected: Any) -> bool:
    """Returns whether an answer is right. Numbers are compared by `same_number`, texts without regard to case and
    outer spaces, and lists item by item."""
    answer, expected = plain(answer), plain(expected)
    if isinstance(expected, list | tuple):
        same_length = isinstance(answer, list | tuple) and len(answer) == len(expected)
        return same_length and all(map(equal, answer, expected))
    if isinstance(expected, str):
        return isinstance(answer, str) and answer.strip().lower() == expected.strip().lower()
    return isinstance(answer, Real) and same_number(answer, expected)


def check(answer: Any | Callable[[], Any], expected: Any, hint: str = "look at the text above again") -> None:
    """Prints whether an answer is right. To check a function `mine`, pass `lambda: [mine(1), mine(2)]` as the
    answer."""
    try:
        value = answer() if callable(answer) else answer
        if unanswered(value):
            print("not yet")
        elif equal(value, expected):
            print("right")
        else:
            print(f"not right: {hint}")
    except Exception as error:  # the student's function can raise any exception
        print(f"not right: it raised {type(error).__name__}: {error}")
