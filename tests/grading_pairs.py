"""This file has labelled pairs of answers, written for this project, as tuples (form, prediction, gold, equal). Each
form, such as fractions or intervals, also has pairs that look alike and are not equal.

The label `equal` says whether a careful reader would call the two answers equal. Where notations differ between
mathematicians, labels follow the rules in answers/reader.py (how an answer is read) and answers/equality.py
(decimals, parts that an answer can lack).
"""

import json
from pathlib import Path

_LINES = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
ALL_PAIRS: list[tuple[str, str, str, bool]] = [tuple(json.loads(line)) for line in _LINES]
