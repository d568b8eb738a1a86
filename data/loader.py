"""Problems from JSONL files, checked line by line, and as token ids.

A row: {"id", "problem", "answer", "demonstrations": [str, …] (may be absent), "level", "system" (may be absent)}.
Other fields are ignored. `load_problems` reads and checks, `encode_problems` renders prompts and encodes them once:
from there on only ids are used, so what is trained is what was sampled.
"""

import json
import reprlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from reward import MATH, Reward, grade_one


@dataclass(frozen=True)
class Problem:
    """One line of a data file."""

    id: str
    problem: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    level: str = ""
    system: str = ""


@dataclass(frozen=True)
class Encoded:
    """A problem as ids: the rendered prompt, and its demonstrations without an end token."""

    id: str
    prompt_ids: list[int]
    demonstrations: list[list[int]]
    end_id: int  # the token that ends a demonstration


def _check_text(text: str, where: str, field: str) -> None:
    """ValueError for a lone surrogate (JSON can write one as \\ud800): it is no character, tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at character {error.start}, half of a pair"
        raise ValueError(f"{where}: {field} has {found}: write the character itself") from error


def _read_row(row: object, where: str, default_id: str, reward: Reward) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected a JSON object with problem and answer")
    for field in ("problem", "answer"):
        if field not in row:
            raise ValueError(f"{where}: the field {field!r} is missing")
    row = {"id": default_id, **row}
    for field in ("id", "problem", "answer", "level", "system"):
        value = row.get(field, "")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field} is {reprlib.repr(value)}, expected a string: put it in quotes")
        if field in ("id", "problem", "answer") and not value.strip():
            raise ValueError(f"{where}: {field} is empty")
        _check_text(value, where, field)
    if row.get("level") == "all":
        raise ValueError(f"{where}: level is 'all', which reports call the total: give it another name")
    demonstrations = row.get("demonstrations", [])
    if not isinstance(demonstrations, list) or not all(isinstance(d, str) and d for d in demonstrations):
        raise ValueError(f"{where}: demonstrations must be a list of non-empty strings (or be absent)")
    for text in demonstrations:
        _check_text(text, where, "demonstrations")
    problem = Problem(
        id=row["id"],
        problem=row["problem"],
        answer=row["answer"],
        demonstrations=tuple(demonstrations),
        level=row.get("level", ""),
        system=row.get("system", ""),
    )
    try:
        reward.check(problem)
    except Exception as error:  # a check of the user's own can raise anything
        raise ValueError(f"{where}: {error}") from error
    return problem


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply, expected a flat JSON object with problem and answer") from None
    except ValueError as error:  # Python's limit on the digits of a whole number
        limit = sys.get_int_max_str_digits()
        raise ValueError(f"{where}: a number has more than {limit} digits: put it in quotes") from error


def read_rows(path: str | Path) -> dict[int, Any]:
    """The JSON values of a JSONL file by line number, empty lines left out. ValueError as `load_problems`."""
    path = Path(path)
    if not path.is_file():
        if path.parts[-3:-1] in (("data", "train"), ("data", "benchmarks")):  # where data/prepare.py writes
            fix = f"run  python data/prepare.py {path.stem}  (without a name: the list)"
            raise ValueError(f"{path}: {path.stem} is not here yet: {fix}")
        raise ValueError(f"data file {str(path)!r} does not exist: give a JSONL file (its format: data/README.md)")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = enumerate(text.split("\n"), 1)  # splitlines() also splits at U+2028, which JSON allows
    return {number: _parse(line, f"{path}:{number}") for number, line in lines if line.strip()}


def check_rows(path: str | Path, rows: dict[int, Any], reward: Reward = MATH) -> list[Problem]:
    """The problems in the rows of a file. ValueError as `load_problems`."""
    problems, seen = [], {}
    for number, row in rows.items():
        where = f"{path}:{number}"
        problem = _read_row(row, where, default_id=f"{Path(path).stem}-{number}", reward=reward)
        if problem.id in seen:
            raise ValueError(f"{where}: the id {problem.id!r} stands at line {seen[problem.id]} too: ids are unique")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: no problems in it: write one JSON object per line")
    return problems


def load_problems(path: str | Path, reward: Reward = MATH) -> list[Problem]:
    """The problems of a JSONL file, which `reward` can grade. Raises ValueError naming file and line, what was found
    and what was expected."""
    return check_rows(path, read_rows(path), reward)


def render_prompt(tokenizer: Tokenizer, problem: str, system: str = "") -> str:
    """The prompt as text: the tokenizer's chat template, or "system\\n\\nproblem\\n" where it has none, after the
    token that begins a text if the tokenizer puts one (Llama was trained with it)."""
    if not tokenizer.chat_template:
        begin = tokenizer.bos_token if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else ""
        return begin + (f"{system}\n\n" if system else "") + f"{problem}\n"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": problem})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode(tokenizer: Tokenizer, text: str, what: str = "text") -> list[int]:
    """Ids of `text` exactly as written, no special tokens added. ValueError if a character has no token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        bad = next(c for c in text if tokenizer.unk_token_id in tokenizer(c, add_special_tokens=False)["input_ids"])
        raise ValueError(f"{what}: the tokenizer cannot encode {bad!r}: remove it or use another model")
    return ids


def encode_problems(
    tokenizer: Tokenizer,
    problems: list[Problem],
    max_response_tokens: int,
    end_ids: list[int],
    reward: Reward = MATH,
) -> tuple[list[Encoded], Counter]:
    """Problems as ids, and how many demonstrations were left out for which reason.

    A demonstration is used only if it fits the budget with its end token (`too long`), its reward is 1 (`not right`)
    and no end token stands inside it (`end token inside`).
    """
    encoded, left_out = [], Counter()
    for problem in problems:
        prompt = render_prompt(tokenizer, problem.problem, problem.system)
        demonstrations = []
        for text in problem.demonstrations:
            ids = encode(tokenizer, text, f"demonstration of {problem.id!r}")
            if len(ids) + 1 > max_response_tokens:
                left_out["too long"] += 1
            elif grade_one(reward, text, problem) != 1.0:
                left_out["not right"] += 1
            elif set(ids) & set(end_ids):
                left_out["end token inside"] += 1
            else:
                demonstrations.append(ids)
        prompt_ids = encode(tokenizer, prompt, f"problem {problem.id!r}")
        encoded.append(Encoded(problem.id, prompt_ids, demonstrations, tokenizer.eos_token_id))
    return encoded, left_out
