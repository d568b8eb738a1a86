"""This file makes the embedded task, "labelled recipes": problems, answers, demonstrations and levels.

    python data/make_recipes.py      writes data/recipes/{train,validation,test}.jsonl, always the same bytes
    python data/make_recipes.py --demonstrations slips --out data/recipes-slips      writes them with weaker experts

A recipe starts from a three-digit number and has k instructions labelled A, B, C, ... The instructions are listed in
a shuffled order and must be carried out in the order of their labels, on three-digit numbers modulo 1000:

    +d   add d (2 to 9)        *2   double
    -d   subtract d            r    reverse the three digits (390 -> 093)

For example, `991;C-4;Ar;B*2?` means A: 991 -> 199, B: 199 -> 398, C: 398 -> 394, so the answer is 394. For k > 1, a
recipe is discarded if carrying out the instructions as listed gives the right number, so ignoring the labels is never
rewarded.

The task has three advantages. A guess of the answer is right only once in a thousand times. A solution takes several
skills: finding the next label, copying the instruction with this label, calculating. The number k of instructions
sets the difficulty, from trivial to impossible for the model. Left out are the base model's training text
(make_base.py makes it) and the reading of rows (data/loader.py).
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# without this line a script in a subfolder does not find the modules of the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.command import Parser, command
from support.errors import InputError
from support.files import jsonl_line, make_folder, write_jsonl

LABELS = "ABCDEFGH"
# level -> numbers of instructions k of its recipes
LEVELS = {"easy": (1, 2), "medium": (3, 4), "hard": (5, 6), "ood": (7, 8)}
TRAIN_STEPS = (3, 4, 5, 6)
TRAIN_PROBLEMS = 512
DEMONSTRATED_PROBLEMS = 128  # number of training problems with a demonstration, equally many for each k
PROBLEMS_PER_LEVEL = {"validation": 100, "test": 200}
# kind of expert -> its demonstrations; the kinds serve to measure how much the quality of demonstrations matters
DEMONSTRATIONS = {
    "expert": "every step with its label",
    "short": "steps in the right order, but without labels",
    "slips": "up to two steps are first written with a wrong digit, then repeated correctly",
    "several": "two demonstrations: expert and short",
}
SPLIT_SEEDS = {"train": 1, "validation": 20, "test": 30}

Step = tuple[str, str, int]  # one instruction: (label, operator, operand); the operand of r is 0


@dataclass(frozen=True)
class Recipe:
    """One problem: the start value (0 to 999), the steps in the order of their labels, and the same steps in the
    order in which the problem lists them."""

    start: int
    steps: tuple[Step, ...]
    listed: tuple[Step, ...]

    @property
    def problem(self) -> str:
        """Returns the question as the model reads it, for example `991;C-4;Ar;B*2?`."""
        return f"{self.start:03d};" + ";".join(step[0] + instruction(step) for step in self.listed) + "?"

    @property
    def answer(self) -> str:
        """Returns the answer as three digits, for example `394`."""
        return f"{result(self.start, self.steps):03d}"

    @property
    def demonstration(self) -> str:
        """Returns the expert's solution: `991Ar=199;199B*2=398;398C-4=394;\\boxed{394}`."""
        return write_out(self.start, self.steps)


def apply(value: int, operator: str, operand: int) -> int:
    """Returns the result of one instruction on a value from 0 to 999."""
    if operator == "r":
        return int(f"{value:03d}"[::-1])
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 1000


def result(start: int, steps: tuple[Step, ...]) -> int:
    """Returns the value after all `steps`, carried out in their order in the tuple."""
    for _, operator, operand in steps:
        start = apply(start, operator, operand)
    return start


def instruction(step: Step) -> str:
    """Returns the instruction of a step without its label, such as `-4`, `*2` or `r`."""
    _, operator, operand = step
    return operator if operator == "r" else f"{operator}{operand}"


def write_out(
    start: int,
    steps: tuple[Step, ...],
    labelled: bool = True,
    blunder: Callable[[int], int] = lambda value: value,
    retry: bool = False,
) -> str:
    """Returns a solution text that carries out `steps` in their order in the tuple and ends with the boxed result.

    If `labelled`, each instruction has its label, as in the expert's solutions. `blunder` maps the right result of a
    step to the written result, from which the next step continues; make_base.py uses it for careless writers. With
    `retry` a wrong step is repeated correctly, and the next step continues from the right result.
    """
    text, value = "", start
    for step in steps:
        right = apply(value, step[1], step[2])
        written = f"{value:03d}{step[0] if labelled else ''}{instruction(step)}="
        outcome = blunder(right)
        text += f"{written}{outcome:03d};"
        if retry and outcome != right:
            text, outcome = f"{text}{written}{right:03d};", right
        value = outcome
    return f"{text}\\boxed{{{value:03d}}}"


def demonstrations(recipe: Recipe, kind: str) -> list[str]:
    """Returns the demonstrations of a recipe by an expert of `kind` (see DEMONSTRATIONS). Demonstrations always end
    in the right answer, and each call returns the same texts."""
    rng, slips = random.Random(recipe.problem), iter(range(2))

    def slip(value: int) -> int:
        if rng.random() < 0.25 and next(slips, None) is not None:
            place = rng.choice((1, 10, 100))
            digit = value // place % 10
            return value + ((digit + rng.randrange(1, 10)) % 10 - digit) * place
        return value

    short = write_out(recipe.start, recipe.steps, labelled=False)
    if kind == "slips":
        return [write_out(recipe.start, recipe.steps, blunder=slip, retry=True)]
    return {"expert": [recipe.demonstration], "short": [short], "several": [recipe.demonstration, short]}[kind]


def make_recipe(rng: random.Random, k: int, first: int = 0) -> Recipe:
    """Returns a random recipe with k instructions. The labels are consecutive letters from LABELS[first] on."""
    while True:
        start, steps = rng.randrange(1000), []
        for label in LABELS[first : first + k]:
            operator = rng.choice("+-*r")
            operand = {"*": 2, "r": 0}[operator] if operator in "*r" else rng.randint(2, 9)
            steps.append((label, operator, operand))
        listed = rng.sample(steps, k)
        if k == 1 or result(start, listed) != result(start, steps):
            return Recipe(start, tuple(steps), tuple(listed))


def level_of(k: int) -> str:
    """Returns the name of the level of recipes with k instructions."""
    return next(level for level, sizes in LEVELS.items() if k in sizes)


def make_splits(
    kind: str = "expert", demonstrated: int = DEMONSTRATED_PROBLEMS, fresh_seed: int | None = None
) -> dict[str, list[dict]]:
    """Returns {split: rows} of the three files, with demonstrations by an expert of `kind`. No problem occurs twice
    in the splits.

    `demonstrated` is the number of training problems with a demonstration, and must divide TRAIN_PROBLEMS. With
    `fresh_seed` there is a second test split, "fresh". The first level of "fresh" uses the seed `fresh_seed`, and
    each further level the next seed. `fresh_seed` does not change the other splits.
    """
    seen: set[str] = set()

    def draw(rng: random.Random, count: int, sizes: tuple[int, ...]) -> list[Recipe]:
        recipes = []
        while len(recipes) < count:
            recipe = make_recipe(rng, sizes[len(recipes) % len(sizes)])
            if recipe.problem not in seen:
                seen.add(recipe.problem)
                recipes.append(recipe)
        return recipes

    def held_out(split: str, first_seed: int, count: int) -> list[dict]:
        return [
            row(f"{split}-{level}-{i:03d}", recipe)
            for seed, (level, sizes) in enumerate(LEVELS.items(), first_seed)
            for i, recipe in enumerate(draw(random.Random(seed), count, sizes))
        ]

    splits = {}
    # the test split is drawn first, so that it does not depend on the sizes of the other splits
    for split, count in reversed(PROBLEMS_PER_LEVEL.items()):
        splits[split] = held_out(split, SPLIT_SEEDS[split], count)
    recipes = draw(random.Random(SPLIT_SEEDS["train"]), TRAIN_PROBLEMS, TRAIN_STEPS)
    # The number of instructions k of successive training problems cycles through TRAIN_STEPS. All problems of a cycle
    # have demonstrations in one of every `rounds` cycles, and none in the others.
    rounds = TRAIN_PROBLEMS // demonstrated
    splits["train"] = [
        row(f"train-{i:04d}", recipe, [] if i // len(TRAIN_STEPS) % rounds else demonstrations(recipe, kind))
        for i, recipe in enumerate(recipes)
    ]
    if fresh_seed is not None:
        splits["fresh"] = held_out("fresh", fresh_seed, PROBLEMS_PER_LEVEL["test"])
    return splits


def row(identifier: str, recipe: Recipe, texts: list[str] | None = None) -> dict:
    """Returns a recipe as a row of a data file. A row without demonstrations has no key "demonstrations"."""
    fields = {"id": identifier, "problem": recipe.problem, "answer": recipe.answer}
    if texts:
        fields["demonstrations"] = texts
    return fields | {"level": level_of(len(recipe.steps))}


def write_splits(out: Path, splits: dict[str, list[dict]]) -> None:
    """Writes one JSONL file per split into the folder `out`. Raises InputError, before anything is written, if a
    file of that name has another content."""
    for split, rows in splits.items():
        path = out / f"{split}.jsonl"
        if path.exists() and path.read_bytes() != "".join(map(jsonl_line, rows)).encode():
            raise InputError(f"{path} exists with other rows: choose another folder with --out, or delete the file")
    make_folder(out)
    for split, rows in splits.items():
        write_jsonl(out / f"{split}.jsonl", rows)
        print(f"{out / split}.jsonl: {len(rows)} problems")


@command("make_recipes.py")
def main() -> None:
    parser = Parser(description="Writes the problems of the embedded task.")
    default = Path(__file__).parent / "recipes"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSONL files (%(default)s)")
    kinds = "; ".join(f"{kind}: {what}" for kind, what in DEMONSTRATIONS.items())
    parser.add_argument("--demonstrations", choices=DEMONSTRATIONS, default="expert", help=kinds)
    args = parser.parse_args()
    write_splits(args.out, make_splits(args.demonstrations))


if __name__ == "__main__":
    main()
