"""Reads final answers and compares them (first version: numbers, fractions and equal text)."""

from fractions import Fraction

import regex


class Unreadable(ValueError):
    """The text is not an answer the reader knows."""


def read(text: str) -> tuple:
    """Normal form of an answer; Unreadable with the reason where there is none."""
    text = regex.sub(r"\\(left|right|,|!|;|text|mathrm|displaystyle)|[$\s{}]", "", text[:2000].replace("\\dfrac", "\\frac"))
    text = text.strip(".")
    if not text:
        raise Unreadable("it is empty")
    plain = text.replace(",", "")
    if regex.fullmatch(r"-?\d{1,300}(\.\d{1,300})?(/\d{1,300})?", plain):
        try:
            top, _, bottom = plain.partition("/")
            return ("num", Fraction(top) / Fraction(bottom or 1))
        except ZeroDivisionError:
            raise Unreadable("a division by zero") from None
    return ("text", text)


def equal(a: tuple, b: tuple) -> bool:
    """Whether two answers that were read mean the same."""
    return a == b
