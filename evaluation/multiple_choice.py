"""This file writes multiple-choice questions with their options, and grades responses to them.

The boxed answer may be the letter ("C", "(C)", "\\text{C.}"), the letter with its option ("C) iron"), or the option's
text ("iron", "\\frac12" for "1/2"). The boxed answer is right if it names the gold option and no other. Answers
outside a box and letters inside a sentence are not read, because a grader could only guess their meaning.
"""

import reprlib
import string
from collections.abc import Sequence

import regex

from data.loader import Problem
from reward import Reward, extract_boxed, grade_one, is_equivalent, is_read
from support.errors import InputError

LETTERS = string.ascii_uppercase
_STYLE = regex.compile(r"\s*\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed)\s*\{([^{}]*)\}\s*")
_LETTER = regex.compile(r"\(?\s*([A-Z])\s*\)?\s*[.:]?")
_LABELLED = regex.compile(r"\(?([A-Z])\s*[).:]\s*(.+)", regex.DOTALL)


def question(stem: str, options: Sequence[str]) -> str:
    """Returns the question followed by its options, each on a line of its own: "A) …"."""
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"a question has {len(options)} options, expected 2 to {len(LETTERS)}: {stem[:60]!r}")
    return stem.strip() + "\n\n" + "\n".join(f"{letter}) {text.strip()}" for letter, text in zip(LETTERS, options))


def check_options(options: object, gold: str) -> None:
    """Raises InputError unless `options` is a list of 2 to 26 texts and `gold` is the letter of one of them.

    Two options may have the same text, as in a few public questions, because the letters differ.
    """
    texts = isinstance(options, list) and all(isinstance(option, str) and option.strip() for option in options)
    if not texts or not 2 <= len(options) <= len(LETTERS):
        expected = f"a list of 2 to {len(LETTERS)} non-empty strings (or no such field)"
        raise InputError(f"options is {reprlib.repr(options)}, expected {expected}")
    letters = list(LETTERS[: len(options)])
    if gold not in letters:
        raise InputError(f"answer is {gold!r}, expected the letter of one of the options, {', '.join(letters)}")


def _bare(text: str) -> str:
    """Returns the text without surrounding dollar signs and wrappers such as \\text{}."""
    text = text.strip().strip("$").strip()
    while styled := _STYLE.fullmatch(text):
        text = styled.group(1).strip()
    return text


def _plain(text: str) -> str:
    """Returns the text normalised for comparison: without wrappers, final full stop and extra blanks, in lower
    case."""
    return " ".join(_bare(text).split()).rstrip(".").casefold()


def named_option(boxed: str, options: Sequence[str]) -> str | None:
    """Returns the letter of the option that `boxed` names, or None if `boxed` names no option or several."""
    letters = LETTERS[: len(options)]
    text = _bare(boxed)
    if (letter := _LETTER.fullmatch(text)) and letter.group(1) in letters:
        return letter.group(1)
    labelled = _LABELLED.fullmatch(text)
    if labelled and labelled.group(1) in letters:
        own = options[letters.index(labelled.group(1))]
        if _plain(labelled.group(2)) == _plain(own):
            return labelled.group(1)
    same = [letter for letter, option in zip(letters, options) if _plain(option) == _plain(text)]
    if not same:
        same = [letter for letter, option in zip(letters, options) if is_equivalent(text, option)]
    return same[0] if len(same) == 1 else None


def grade_response(
    reward: Reward, response: str, problem: Problem, options: Sequence[str] = ()
) -> tuple[float, bool]:
    """Returns the reward of a response and whether its answer could be read. Only the default reward uses
    `options`."""
    if not options or reward.name != "math":
        return grade_one(reward, response, problem), reward.is_read(response)
    boxed = extract_boxed(response)
    letter = None if boxed is None else named_option(boxed, options)
    return float(letter == problem.answer), letter is not None or is_read(response)
