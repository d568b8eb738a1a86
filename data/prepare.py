"""Fetches public sets from the Hugging Face hub and writes them as JSONL: python data/prepare.py NAME …

    python data/prepare.py aime24 math500      benchmarks -> data/benchmarks/NAME.jsonl, for eval.py
    python data/prepare.py paper               the paper's nine benchmarks
    python data/prepare.py gsm8k openr1-46k    training sets with demonstrations -> data/train/NAME.jsonl

The script needs the package `datasets` (requirements-dev.txt). Files that exist are kept, so the command can be
repeated if it was stopped; delete a file to fetch its set again. The script checks that each set has the expected
number of rows. Each row has a system message. Rows that cannot be graded (an unreadable gold answer, an empty option)
are counted and written to NAME.left_out.jsonl. The options of each GPQA question are shuffled with the question's id
as the seed. ARC and MMLU-Pro keep the hub's order of options. The licence of a set is on its page,
https://huggingface.co/datasets/PATH with the path from SOURCES.

The demonstrations of openr1-46k are neither filtered by length nor graded here; data/loader.py does both at the start
of a run. OlympiadBench has 674 problems on the hub; the paper's copy has 675.
"""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

# without this line a script in a subfolder does not find the modules of the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.benchmarks import PAPER
from evaluation.multiple_choice import LETTERS, check_options, question
from reward import check_gold
from support.command import Parser, command
from support.errors import Broken, InputError
from support.files import make_folder, write_jsonl

Row = dict[str, Any]
FOLDER = Path("data")
SOLVE = "Please reason step by step, and put your final answer within \\boxed{}."
CHOOSE = "Please reason step by step, and put the letter of the right option within \\boxed{}."


# ---- one function per schema: row of the hub -> fields of a row of this project


def math500(row: Row) -> Row:
    """Converts a row of HuggingFaceH4/MATH-500: problem, solution, answer, subject, level (1 to 5), unique_id."""
    return {"problem": row["problem"], "answer": row["answer"], "level": f"level {row['level']}"}


def aime(row: Row) -> Row:
    """Converts a row of HuggingFaceH4/aime_2024 or math-ai/aime25: problem, answer ("025", "70") and more."""
    return {"problem": row["problem"], "answer": str(row["answer"])}


def amc23(row: Row) -> Row:
    """Converts a row of AI-MO/aimo-validation-amc: id, problem, answer (a float, always whole), url."""
    answer = float(row["answer"])
    return {"problem": row["problem"], "answer": str(int(answer)) if answer.is_integer() else str(answer)}


def minerva(row: Row) -> Row:
    """Converts a row of math-ai/minervamath: question, answer."""
    return {"problem": row["question"], "answer": row["answer"]}


def olympiad(row: Row) -> Row:
    """Converts a row of Hothan/OlympiadBench: question, final_answer (a list with one text, in which commas separate
    the parts), unit, subfield and more."""
    answer = ", ".join(text.strip() for text in row["final_answer"])
    return {"problem": row["question"], "answer": answer, "level": row["subfield"]}


def multiple_choice(stem: str, options: list[str], gold: int, level: str = "") -> Row:
    """Returns the fields of a row for a question whose right option has index `gold`."""
    fields = {"problem": question(stem, options), "answer": LETTERS[gold], "options": options, "system": CHOOSE}
    return fields | ({"level": level} if level else {})


def arc_c(row: Row) -> Row:
    """Converts a row of allenai/ai2_arc: id, question, choices {text: […], label: […]}, answerKey (labels A to E or 1
    to 4)."""
    return multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def gpqa_diamond(row: Row) -> Row:
    """Converts a row of Idavidrein/gpqa: Question, Correct Answer, Incorrect Answer 1 to 3, High-level domain, Record
    ID and more."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = list(range(4))
    random.Random(f"gpqa {row['Record ID']}").shuffle(order)
    options = [options[i].strip() for i in order]
    return multiple_choice(row["Question"], options, order.index(0), row["High-level domain"])


def mmlu_pro(row: Row) -> Row:
    """Converts a row of TIGER-Lab/MMLU-Pro: question, options (up to ten, filled up with "N/A"), answer,
    answer_index, category."""
    options = [text.strip() for text in row["options"] if text != "N/A"]
    gold = row["answer_index"] - row["options"][: row["answer_index"]].count("N/A")
    return multiple_choice(row["question"], options, gold, row["category"])


def gsm8k(row: Row) -> Row:
    """Converts a row of openai/gsm8k: question, answer (a human solution with marks <<48/2=24>> and a last line "####
    72")."""
    solution, _, answer = row["answer"].rpartition("####")
    answer = answer.strip().replace(",", "")
    steps = re.sub(r"<<[^<>]*>>", "", solution).strip()
    return {"problem": row["question"], "answer": answer, "demonstrations": [f"{steps}\n\\boxed{{{answer}}}"]}


def gsm8k_test(row: Row) -> Row:
    return {key: value for key, value in gsm8k(row).items() if key != "demonstrations"}


def openr1_46k(row: Row) -> Row:
    """Converts a row of Elliott/Openr1-Math-46k-8192: prompt [system, user], target [assistant], reward_model
    {ground_truth, style}.

    We assume that Openr1-Math-48k-Complement has the same columns, with or without target. The conversion was never
    tested on the real Openr1-Math-48k-Complement.
    """
    messages = {message["role"]: message["content"] for message in row["prompt"]}
    return {
        "problem": messages["user"],
        "answer": row["reward_model"]["ground_truth"],
        "system": messages.get("system", ""),
        "demonstrations": [message["content"] for message in row.get("target") or []],
    }


@dataclass(frozen=True)
class Source:
    """A public set: where it is on the hub, its number of rows (a range if the number may change), and the function
    that converts its rows."""

    path: str
    config: str | None
    split: str
    rows: tuple[int, int]
    convert: Callable[[Row], Row]
    folder: str = "benchmarks"
    gated: bool = False


SOURCES = {
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", (30, 30), aime),
    "aime25": Source("math-ai/aime25", None, "test", (30, 30), aime),
    "amc23": Source("AI-MO/aimo-validation-amc", None, "train", (83, 83), amc23),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", (500, 500), math500),
    "minerva": Source("math-ai/minervamath", None, "test", (272, 272), minerva),
    "olympiad": Source("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", (674, 675), olympiad),
    "arc_c": Source("allenai/ai2_arc", "ARC-Challenge", "test", (1172, 1172), arc_c),
    "gpqa_diamond": Source("Idavidrein/gpqa", "gpqa_diamond", "train", (198, 198), gpqa_diamond, gated=True),
    "mmlu_pro": Source("TIGER-Lab/MMLU-Pro", None, "test", (12032, 12032), mmlu_pro),
    "gsm8k_test": Source("openai/gsm8k", "main", "test", (1319, 1319), gsm8k_test),
    "gsm8k": Source("openai/gsm8k", "main", "train", (7473, 7473), gsm8k, folder="train"),
    "openr1-46k": Source("Elliott/Openr1-Math-46k-8192", None, "train", (45_000, 47_000), openr1_46k, folder="train"),
    "openr1-48k-complement": Source(  # LUFFY trains on this set in the second stage of SFT→RFT
        "Elliott/Openr1-Math-48k-Complement", None, "train", (1, 100_000), openr1_46k, folder="train"
    ),
}


# ---- fetch and write


def download(name: str, source: Source) -> list[Row]:
    """Returns the rows of a set as the hub has them. If the set cannot be fetched, raises an InputError with the
    fix."""
    # without a network the hub's library would log every retry before our error of one line
    hub_logging.set_verbosity_error()
    try:
        import datasets
    except ImportError:
        raise InputError("the package datasets is missing: pip install -r requirements-dev.txt") from None
    page = f"https://huggingface.co/datasets/{source.path}"
    try:
        return list(datasets.load_dataset(source.path, source.config, split=source.split))
    except Exception as error:  # the libraries of the hub raise errors of many classes
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        if source.gated and re.search(r"gated|cannot be accessed|40[13]", str(error)):
            help = f"it is gated: accept its terms at {page}, then run  hf auth login  with a read token"
        else:
            help = f"check the network and {page}"
        raise InputError(f"{name} could not be fetched ({reason[:200]}): {help}") from error


def convert(name: str, source: Source, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Returns the converted rows, and the rows left out because they cannot be graded."""
    low, high = source.rows
    if not low <= len(rows) <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise InputError(f"{name}: {source.path} has {len(rows)} rows, expected {expected}: has the set changed?")
    ours, left_out = [], []
    for index, row in enumerate(rows):
        try:
            fields = source.convert(row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"{name}: row {index} of {source.path} has not the fields expected ({error!r}): it has {sorted(row)}"
            ) from error
        new = {"id": f"{name}-{index}", **fields}
        new.setdefault("system", SOLVE)
        try:
            check_gold(new["answer"])
            if "options" in new:
                check_options(new["options"], new["answer"])
        except ValueError:
            left_out.append(new)
        else:
            ours.append(new)
    return ours, left_out


def prepare(name: str) -> Path:
    """Fetches the set `name` and writes its JSONL file, unless the file exists. Returns the path of the file. Raises
    InputError if fetching fails."""
    source = SOURCES[name]
    path = FOLDER / source.folder / f"{name}.jsonl"
    if path.exists():
        print(f"{name}: {path} is there already (delete it to fetch it again)")
        return path
    rows, left_out = convert(name, source, download(name, source))
    make_folder(path.parent)
    aside = path.with_suffix(".left_out.jsonl")
    aside.unlink(missing_ok=True)
    if left_out:
        write_jsonl(aside, left_out)
    write_jsonl(path, rows)
    examples = ", ".join(f"{row['id']} {row['answer'][:40]!r}" for row in left_out[:5])
    aside_text = f"; {len(left_out)} left out, they cannot be graded: {examples}" if left_out else ""
    print(f"{name}: {len(rows)} rows of {source.path} -> {path}{aside_text}")
    return path


@command("prepare.py")
def main() -> None:
    parser = Parser(description="Fetches public sets from the Hugging Face hub and writes them as JSONL.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(SOURCES)}, or paper (its nine sets)")
    args = parser.parse_args()
    names = list(dict.fromkeys(n for name in args.names for n in (PAPER if name == "paper" else [name])))
    failed = False
    if unknown := [name for name in names if name not in SOURCES]:
        raise InputError(f"unknown set {unknown[0]!r}: choose from {', '.join(SOURCES)}, or paper")
    for name in names:
        try:
            prepare(name)
        except (InputError, Broken) as error:  # one failed set does not stop the fetching of the others
            print(f"prepare.py: {error}", file=sys.stderr)
            failed = True
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
