"""Labelled answer pairs, written for this project, are (form, prediction, gold, equal). Each form has its near
misses.

Labels say what a careful reader of a final answer would say. Where usage is divided they follow the rules in
answers/reader.py (how an answer is read) and answers/equality.py (decimals, what may be left out).
"""

import json
from pathlib import Path

_LINES = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
ALL_PAIRS: list[tuple[str, str, str, bool]] = [tuple(json.loads(line)) for line in _LINES]
