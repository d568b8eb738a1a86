"""This file reads a whole answer: words, a time, the letter of an option, or mathematics, which reader.py parses.

Up to MAX_WORDS words can be an answer, alone or in a list. Words beside mathematics can be a unit, the name of a
value, or a condition at the end. An answer with any more words is unreadable: sentences could only be compared word
by word, and right responses would fail because their words differ. Units are not converted (1 m is not 100 cm), and
matrix algebra has only sums and products.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import lru_cache

from .reader import Reader
from .tokens import MAX_CHARS, clean, tokenize
from .tree import NUMBER_WORDS, REALS, Node, Unreadable, in_base, num, sym
from .vocabulary import FONTS, KNOWN, LISTS, SHORT_WORDS, SPACING, TEXTS

_NO_LETTERS = re.compile(
    # matches LaTeX commands and blanks, which become one space before words are read
    rf"\\(?:{'|'.join(FONTS | TEXTS | SPACING)})(?![A-Za-z])|\\[,;:! ]|[{{}}~\s]+"
)
_CHOICE = re.compile(r"(?:(?i:the |correct |answer|option|choice|is|:| )+[ :])?\(? ?([A-Z]) ?\)?[.:]?")
_OPTION = re.compile(r"(?:\( ?([A-Z]) ?\)[.:]? ?|([A-Z]) ?(?:\)[.:]? ?|[.:] ))(?P<text>[^,/ ].*)")

# The pattern finds the start of a condition, as in f(x) = 2x \text{ for all } x or x = k\pi, k \in \mathbb{Z}.
_CONDITION = re.compile(
    r"(?<![A-Za-z\\])(?:for|where|with|such that|when|if)(?![A-Za-z])|\\forall"
    r"|(?:[,(]|\\quad)(?:[ }]|\\[,;: ]|\\q?quad)*(?P<names>[a-z](?: *, *[a-z])*)"
    r" *(?:\\in|(?:\\text *\{ *)?(?:is|are|an?)\b)"
)
_JOINT = re.compile(r"(?:[ ,(]|\\[,;: ]|\\q?quad|\\(?:text|mathrm|mbox) *\{)+$")
_NAMES = r"[A-Za-z](?:(?:,|and)[A-Za-z])*"
_KIND = (
    r"(?:(?:positive|non-?negative)?integer|(?:real|natural|rational|complex)(?:number|constant)?|number|constant)s?"
)
_SET = r"\\in\\mathbb[ZNQRC](?:.?[+0])?"
_DOMAIN = re.compile(  # matches a condition, stripped of spaces and braces, that states only a domain
    rf"(?:for|\\for)(?:all|any|every|each|some(?=constant|integer))(?:{_KIND})?{_NAMES}(?:{_SET})?"
    rf"|[,(]*(?:for|where|with)?{_NAMES}(?:{_SET}|(?:is|are)?(?:an?|any)?(?:arbitrary)?{_KIND})"
    r"|for(?:all)?[i-n]\\geq?[01]"
)
_DOMAINS = {
    "positive": "N",
    "negative": "N",
    "natural": "N",
    "integer": "Z",
    "real": "R",
    "rational": "Q",
    "complex": "C",
}
MAX_WORDS = 5


@dataclass(frozen=True)
class Answer:
    """A parsed answer: the tree `node`, and a tree `second` if a "1,234" in the answer may also be a list. An answer
    in words also has `words`, and a multiple-choice answer also has the letter `choice`."""

    node: Node
    second: Node | None = None
    words: str | None = None  # the answer as plain words, if the whole answer consists of letters
    choice: str | None = None  # the letter of a multiple-choice answer: B for (B), \\text{B}, B., option B
    # the condition behind the answer: a domain such as Z for "k is an integer", else the text of the condition
    # without spaces
    condition: str = ""
    option: str | None = None  # the letter before the text of an option: B for "(B) 12"


def read(text: str) -> Answer:
    """Returns the answer in `text`. Raises Unreadable with the reason if the parser does not understand the text."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
    return _read(text)


@lru_cache(maxsize=8192)
def _read(text: str) -> Answer:
    cleaned = clean(text)
    flat = re.sub(r"\s+", " ", _NO_LETTERS.sub(" ", cleaned)).strip(" .,")
    if not flat:
        raise Unreadable("it is empty")
    choice, words, is_text = _CHOICE.fullmatch(flat), *_words(flat, cleaned)
    letter = choice[1] if choice else None
    option = _OPTION.fullmatch(flat)
    if option and not re.search(r"\b[B-HJ-Z]\b|\([A-Z]\)|\bA[).,:]", option["text"]):
        return Answer(("text", flat), words=flat, option=option[1] or option[2])
    if words and words.lower() in NUMBER_WORDS:
        return Answer(num(NUMBER_WORDS[words.lower()]), words=words)
    if words in ("all real numbers", "all reals", "real numbers", "set of all real numbers", "all real number"):
        return Answer(REALS, words=words)
    if is_text:
        if len(words.split()) > MAX_WORDS:
            raise Unreadable(f"it is a sentence of {len(words.split())} words")
        return Answer(("text", words), words=words, choice=letter)
    special = _time(flat) or _letter_digits(flat)
    if special:
        return Answer(special)
    value, condition = _split(cleaned)
    try:
        node = _tree(value, True)
    except Unreadable:
        if letter:  # the answer is only the letter of an option, as in "B)"
            return Answer(sym(letter), choice=letter)
        if words:
            return Answer(("text", words), words=words)
        if "\\begin" not in cleaned or not _CONDITION.search(cleaned):
            raise
        return Answer(("piecewise", tuple(part for _, part in tokenize(cleaned) if part not in "{}")))
    second = None
    if re.search(r"\d,\d{3}", value):
        with contextlib.suppress(Unreadable):
            second = _tree(value, False)
    return Answer(node, second if second != node else None, words, letter, condition)


def _split(text: str) -> tuple[str, str]:
    """Splits `text` into the answer and the condition behind the answer, which is "" if there is none."""
    match = _CONDITION.search(text)
    value = _JOINT.sub("", text[: match.start()]) if match else ""
    if not value or any(word not in KNOWN for word in re.findall(r"(?<![A-Za-z\\])[A-Za-z]{4,}", value)):
        return text, ""
    condition = re.sub(r"\\(?:text|mathrm|mbox|q?quad|[,;: ])|[ {}]", "", text[match.start() :]).rstrip(")")
    says_domain = _DOMAIN.fullmatch(condition)
    unnamed = set(re.findall("[a-z]", match["names"] or "")).difference(re.sub(r"\\[A-Za-z]+", "", value))
    # in "x = 1, y \in \mathbb{R}" the domain of y is part of the answer
    if unnamed or (match["names"] and not says_domain):
        return text, ""
    if not says_domain:
        return value, condition
    kind = re.search(r"\\mathbb(.)|positive|negative|natural|integer|real|rational|complex", condition)
    return value, "N" if "+" in condition else (kind[1] or _DOMAINS[kind[0]]) if kind else ""


def _tree(text: str, grouped: bool) -> Node:
    tokens = tokenize(text, grouped)
    if not any(kind == "BEGIN" and not re.fullmatch(LISTS, value) for kind, value in tokens):
        tokens = [t for t in tokens if t != ("OP", "&")]  # outside a matrix, & only aligns lines
    return Reader(tokens).whole()


def _words(flat: str, cleaned: str) -> tuple[str | None, bool]:
    """Returns the words of an answer that consists of letters (else None), and whether the answer can only be read as
    words."""
    if not re.fullmatch(r"[A-Za-zÀ-ÿ](?:[A-Za-zÀ-ÿ' .-]|\\ )*", flat):
        return None, False
    runs = re.findall(r"[A-Za-zÀ-ÿ']+", flat)
    if max(map(len, runs)) < 2:
        return None, False
    long = any(len(run) > 3 and run not in KNOWN for run in runs)
    words = " ".join(runs)
    if long or words.lower() in SHORT_WORDS:
        words = re.sub("^dne$", "does not exist", words.lower())
        words = re.sub(r"^(?:the|a|an) |(?<=solution)s$|(?<=real number)s$", "", words)
        listed = {"or", "and"} & set(runs) and not cleaned.startswith("\\")
        return words, not listed
    return words, re.match(rf"\\(?:{'|'.join(TEXTS)})\b", cleaned) is not None and not set(runs) & KNOWN


def _time(flat: str) -> Node | None:
    match = re.fullmatch(r"(\d{1,2})(?: ?: ?(\d\d))? ?([ap])\.? ?m\.?", flat, flags=re.IGNORECASE)
    return ("time", int(match[1]) % 12, int(match[2] or 0), match[3].lower()) if match else None


def _letter_digits(flat: str) -> Node | None:
    """Reads a number in a base above 10 that has a letter among its digits, such as 1A_{16}."""
    match = re.fullmatch(r"\(?([0-9A-F]+)\)?_([1-3][0-9])", flat.replace(" ", ""))
    if not match or match[1].isdigit() or match[1].isalpha() or match[2] == "10":
        return None
    return in_base(match[1], match[2])
