"""The reward: the last boxed answer of a response, graded 1.0 or 0.0 against the gold answer.

What an answer means and when two answers are equal is in answers/. Not here: partial credit, format
rewards, answers outside a box (a policy would learn to shower numbers), time limits (the reader is bounded).
"""

import re
from collections import deque
from collections.abc import Sequence

from tqdm import tqdm

from answers import Unreadable, equal, read

BATCH_WITH_BAR = 4000  # smaller batches are graded before a progress bar could be read
_MARKS = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<open>\{)?|(?:\\[\\{}])+|(?P<in>\{+)|(?P<out>\}+)")
_BARE = re.compile(r"[-+]?[\w.,/:^]{0,99}\w|\\[A-Za-z]+[^$\n]{0,199}?(?=\$|\\\)|\\\]|\n|\Z)")


def extract_boxed(text: str) -> str | None:
    """Content of the last complete ``\\boxed{...}`` or ``\\fbox{...}`` of `text`, None where there is none.

    One pass, so linear in the text. Braces are balanced, escaped ones are not counted; of boxes in a box the
    outer one counts. ``\\boxed 5`` without braces gives "5". A box that never closes (a truncated response)
    is no answer; the last complete box before it is.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    best, depth = (-1, -1), 0
    boxes: list[tuple[int, int]] = []  # the open ones: where the content starts, how deep it is
    bare: deque[int] = deque(maxlen=20)  # ends of the last boxes without a brace
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
        if start > best[1] and (found := _BARE.match(text, start)):
            best = found.span()
            break
    return None if best[1] < 0 else text[slice(*best)]


def is_equivalent(prediction: str, gold: str) -> bool:
    """Whether two final answers mean the same; False where one of them cannot be read. Never raises."""
    if not isinstance(prediction, str) or not isinstance(gold, str):
        return False
    try:
        return equal(read(prediction), read(gold))
    except Unreadable:
        return False
    except Exception:  # a bug of the reader must not end a training run; the tests call the reader directly
        return False


def is_read(response: str | None) -> bool:
    """Whether `response` has a complete box whose content the reader can read."""
    boxed = extract_boxed(response) if isinstance(response, str) else None
    if boxed is None:
        return False
    try:
        read(boxed)
    except Unreadable:
        return False
    return True


def grade(response: str | None, gold: str) -> float:
    """1.0 if the last boxed answer of `response` is equivalent to `gold`, else 0.0.

    A response that is no string is a model's fault and gets 0.0; a gold that is no string raises TypeError.
    """
    if not isinstance(gold, str):
        raise TypeError(f"gold must be a string, got {type(gold).__name__}: {gold!r:.80}; pass the answer as text")
    boxed = extract_boxed(response) if isinstance(response, str) else None
    return 1.0 if boxed is not None and is_equivalent(boxed, gold) else 0.0


def grade_batch(responses: Sequence[str | None], golds: Sequence[str]) -> list[float]:
    """`grade` for each pair; ValueError where the two differ in length. Large batches show a progress bar."""
    if isinstance(responses, str) or isinstance(golds, str):
        raise TypeError("responses and golds must be lists of strings, got one string; wrap it in a list")
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses for {len(golds)} golds; give one gold per response")
    pairs = tqdm(zip(responses, golds), "grading", len(golds), disable=len(golds) < BATCH_WITH_BAR, leave=False)
    return [grade(response, gold) for response, gold in pairs]


def check_gold(gold: str) -> None:
    """Raises ValueError where `gold` is not an answer that can be graded against; the loader calls it."""
    if not isinstance(gold, str):
        raise ValueError(f"answer must be a string, got {type(gold).__name__}: {gold!r:.80}; write it as text")
    try:
        read(gold)
    except Unreadable as error:
        raise ValueError(
            f"answer {gold[:80]!r} cannot be read: {error}; rewrite it as plain LaTeX or leave the problem out"
        ) from None
