"""This package reads final answers of mathematical problems: what they say, and whether two say the same.

    tokens.py    text -> tokens, and the vocabulary          tree.py      the tree in normal form, exact arithmetic
    reader.py    tokens -> tree                              values.py    values at random points to 60 digits
    whole.py     text -> answer: `read`                      regions.py   sets of real numbers as intervals
    equality.py  two answers: `equal`

No time limits, processes or signals are needed: characters, tokens, depth, digits and points are limited, nothing
backtracks, and no text is ever evaluated. Finding the answer in a response is left to reward.py.
"""

from .equality import equal
from .tree import Unreadable
from .whole import Answer, read

__all__ = ["Answer", "Unreadable", "equal", "read"]
