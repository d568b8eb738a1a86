"""This script compares our grader with Math-Verify on the project's own labelled pairs, in agreement and speed.

    python bench/grading.py        writes bench/results/grading.json

The labels are ours (tests/grading_pairs.py), so agreement says how far a grader shares our reading of an answer. Each
pair is graded once, from a cold cache, in one process. Math-Verify has its own time limits, as shipped.
"""

import argparse
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from common import write

from reward import is_equivalent

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from grading_pairs import ALL_PAIRS


def math_verify(prediction: str, gold: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    boxed = [f"\\boxed{{{answer.strip().strip('$').strip()}}}" for answer in (gold, prediction)]
    return bool(verify(*(parse(text, config) for text in boxed)))


def measure(grader: Callable[[str, str], bool]) -> dict:
    wrong, seconds = [], []
    for form, prediction, gold, equal in ALL_PAIRS:
        start = time.perf_counter()
        said = grader(prediction, gold)
        seconds.append(time.perf_counter() - start)
        if said is not equal:
            wrong.append({"form": form, "prediction": prediction, "gold": gold, "equal": equal})
    return {
        "agreement": round(1 - len(wrong) / len(ALL_PAIRS), 4),
        "false_positives": sum(not pair["equal"] for pair in wrong),
        "false_negatives": sum(pair["equal"] for pair in wrong),
        "grades_per_second": round(len(seconds) / sum(seconds), 1),
        "slowest_ms": round(1000 * max(seconds), 1),
        "wrong": wrong,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if importlib.util.find_spec("math_verify") is None:
        sys.exit("grading.py: the package math-verify is missing: pip install -r requirements-dev.txt")
    logging.disable(logging.CRITICAL)
    pairs = {"pairs": len(ALL_PAIRS), "equal": sum(equal for *_, equal in ALL_PAIRS)}
    versions = {name: version(name) for name in ("math-verify", "sympy", "mpmath")}
    graders = {"ours": measure(is_equivalent), "math_verify": measure(math_verify)}
    write("grading", pairs | {"versions": versions} | graders)


if __name__ == "__main__":
    main()
