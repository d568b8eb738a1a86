"""This file makes sums for a small pretrained model: problems, answers and step-by-step demonstrations.

    python data/make_sums.py [--out FOLDER]      writes data/sums/{train,validation,test}.jsonl, always the same bytes

    problem          What is 63 - 15 - 43?
    system           Work step by step, one operation per line. Put the final answer within \\boxed{}.
    demonstration    63 - 15 = 48
                     48 - 43 = 5
                     \\boxed{5}

Each problem adds and subtracts two, three or four numbers from 10 to 99, and no partial result is negative. The
number of terms is the level. Every training problem has a demonstration; --demonstration_fraction of train.py takes
some away. SmolLM2's tokenizer makes each digit a token; a demonstration has at most 47 tokens, end token included.

The sums complement the recipes: a pretrained model can do small sums, but does not follow the instruction to write
one operation per line and box the answer. So RFT has no reward at the start. Responses that begin with a
demonstration's prefix have some reward.
"""

import random
import sys
from pathlib import Path

# without this line a script in a subfolder does not find the modules of the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.make_recipes import write_splits
from support.command import Parser, command

SYSTEM = "Work step by step, one operation per line. Put the final answer within \\boxed{}."
TERMS = (2, 3, 4)
# the test split is drawn first, so that it does not depend on the sizes of the other splits
PROBLEMS_PER_LEVEL = {"test": 60, "validation": 30, "train": 200}


def make_sum(rng: random.Random, terms: int) -> tuple[str, str, str]:
    """Returns a random sum with `terms` terms: the expression, its result, and the solution step by step."""
    while True:
        value = rng.randint(10, 99)
        expression, lines = str(value), []
        for _ in range(terms - 1):
            sign, number = rng.choice("+-"), rng.randint(10, 99)
            after = value + number if sign == "+" else value - number
            expression += f" {sign} {number}"
            lines.append(f"{value} {sign} {number} = {after}")
            value = after
            if value < 0:
                break
        else:
            return expression, str(value), "\n".join([*lines, f"\\boxed{{{value}}}"])


def make_splits() -> dict[str, list[dict]]:
    """Returns {split: rows} of the three files, level by level. No expression occurs twice."""
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {split: [] for split in PROBLEMS_PER_LEVEL}
    for split, count in PROBLEMS_PER_LEVEL.items():
        for terms in TERMS:
            rng = random.Random(f"{split} {terms}")
            for i in range(count):
                while (drawn := make_sum(rng, terms))[0] in seen:
                    pass
                expression, answer, solution = drawn
                seen.add(expression)
                row = {"id": f"{split}-{terms}-{i:03d}", "problem": f"What is {expression}?", "answer": answer}
                row |= {"system": SYSTEM, "level": f"{terms} terms"}
                splits[split].append(row | ({"demonstrations": [solution]} if split == "train" else {}))
    return splits


@command("make_sums.py")
def main() -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("data/sums"), help="folder of the JSONL files (%(default)s)")
    out = parser.parse_args().out
    write_splits(out, make_splits())


if __name__ == "__main__":
    main()
