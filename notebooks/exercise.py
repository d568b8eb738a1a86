"""The check of an exercise in a notebook prints "not yet", "right" or "not right", and never raises."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any


def plain(value: Any) -> Any:
    """Returns tensors, NumPy arrays and NumPy numbers as Python's own lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def unanswered(answer: Any) -> bool:
    """Returns whether the answer, or a part of it, is still None."""
    answer = plain(answer)
    return answer is None or (isinstance(answer, list | tuple) and any(map(unanswered, answer)))


def same_number(answer: float, expected: float) -> bool:
    """Returns whether two numbers agree to three digits. An answer that is `expected` rounded to two digits, with at
    least two decimals as texts print it, agrees too."""
    decimals = max(2, 1 - math.floor(math.log10(abs(expected)))) if expected else 2
    rounded = math.isclose(answer, round(expected, decimals), rel_tol=1e-6)
    return rounded or math.isclose(answer, expected, rel_tol=2e-3, abs_tol=1e-3)


def equal(answer: Any, expected: Any) -> bool:
    """Compares numbers by `same_number`, texts without regard to case and outer spaces, and lists item by item."""
    answer, expected = plain(answer), plain(expected)
    if isinstance(expected, list | tuple):
        same_length = isinstance(answer, list | tuple) and len(answer) == len(expected)
        return same_length and all(map(equal, answer, expected))
    if isinstance(expected, str):
        return isinstance(answer, str) and answer.strip().lower() == expected.strip().lower()
    return isinstance(answer, Real) and same_number(answer, expected)


def check(answer: Any | Callable[[], Any], expected: Any, hint: str = "look at the text above again") -> None:
    """Print what an answer is. A function to be tried is given as `lambda: [mine(1), mine(2)]`."""
    try:
        value = answer() if callable(answer) else answer
        if unanswered(value):
            print("not yet")
        elif equal(value, expected):
            print("right")
        else:
            print(f"not right: {hint}")
    except Exception as error:  # whatever the student's function raised
        print(f"not right: it raised {type(error).__name__}: {error}")
