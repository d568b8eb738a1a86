"""This package reads final answers of mathematical problems. The package decides what an answer means and whether two
answers mean the same.

    tokens.py    text -> tokens, and the vocabulary          tree.py      the tree in normal form, exact arithmetic
    reader.py    tokens -> tree                              values.py    values at random points to 60 digits
    whole.py     text -> answer: `read`                      regions.py   sets of real numbers as intervals
    equality.py  two answers: `equal`

The package needs no time limits, processes or signals: it limits the characters, tokens, digits and depth of an
answer and the random points of a comparison, and the parser does not backtrack. No text is ever evaluated as code.
reward.py finds the boxed answer in a response.
"""

from .equality import equal
from .tree import Unreadable
from .whole import Answer, read

__all__ = ["Answer", "Unreadable", "equal", "read"]
