"""This file reads problems from JSONL files, checks them line by line, and turns them into token ids.

A row is {"id", "problem", "answer", "demonstrations": [str, …] (may be absent), "level", "system" (may be absent)}.
Other fields are ignored. `load_problems` reads and checks the rows; `encode_problems` renders the prompts and encodes
them once. From there on only ids are used, so the ids that are trained are those that were sampled.
"""

import dataclasses
import datetime
import json
import math
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from model import decode
from reward import MATH, Reward, extract_boxed, grade_one, raised
from support.errors import InputError
from support.files import reading

TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # the call by which a chat template asks for the date
LAST_TAG = re.compile(r"<[^<>\s]+>\s*\Z")  # a tag at the end of the prompt: <think> and a line end, <|assistant|>, …
PANDAS = "python -c \"import pandas; pandas.%s('{0}').to_json('{1}', orient='records', lines=True)\""
CONVERTED = {  # the first bytes of a file -> its format, and the command that makes JSONL of it
    b"\x1f\x8b": ("gzip", "gunzip < '{0}' > '{1}'"),
    b"BZh": ("bzip2", "bunzip2 < '{0}' > '{1}'"),
    b"\xfd7zXZ": ("xz", "unxz < '{0}' > '{1}'"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd < '{0}' > '{1}'"),
    b"PK": ("zip or Excel", "unzip '{0}', or  " + PANDAS % "read_excel"),
    b"PAR1": ("Parquet", PANDAS % "read_parquet"),
    b"ARROW1": ("Arrow", PANDAS % "read_feather"),
    b"\xff" * 4: ("Arrow", "python -c \"import datasets; datasets.Dataset.from_file('{0}').to_json('{1}')\""),
    b"\xff\xfe\0\0": ("UTF-32", "iconv -f UTF-32 -t UTF-8 < '{0}' > '{1}'"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 < '{0}' > '{1}'"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 < '{0}' > '{1}'"),
}
DATE = datetime.datetime(2024, 7, 26)  # every template gets this date, which is Llama 3's own default


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
    """A problem as token ids: the rendered prompt, and its demonstrations without an end token."""

    id: str
    prompt_ids: list[int]
    demonstrations: list[list[int]]
    end_id: int  # the token that ends a demonstration


@dataclass
class Data:
    """A run's problems, as text and as ids."""

    train: list[Problem]
    encoded: list[Encoded]
    supervised: list[Encoded]  # problems with a demonstration, for the sft stage
    held: dict[str, tuple[list[Problem], list[Encoded]]]  # keys "validation" and "test", if the run has such problems


def _check_text(text: str, where: str, field: str) -> None:
    """Raises InputError for a lone surrogate, which is no character (JSON can write one as \\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}"
        raise InputError(f"{where}: {field} has {half}, half of a pair: write the character itself") from error


def _read_row(row: object, where: str, default_id: str, reward: Reward) -> Problem:
    if not isinstance(row, dict):
        raise InputError(f"{where}: found {type(row).__name__}, expected a JSON object with problem and answer")
    for field in ("problem", "answer"):
        if field not in row:
            raise InputError(f"{where}: the field {field!r} is missing")
    row = {"id": default_id, **row}
    for field in ("id", "problem", "answer", "level", "system"):
        value = row.get(field, "")
        if not isinstance(value, str):
            raise InputError(f"{where}: {field} is {reprlib.repr(value)}, expected a string: put it in quotes")
        if field in ("id", "problem", "answer") and not value.strip():
            raise InputError(f"{where}: {field} is empty")
        _check_text(value, where, field)
    level = row.get("level", "")
    if level == "all":
        raise InputError(f"{where}: level is 'all', which reports call the total: give it another name")
    if "|" in level or not level.isprintable():  # the level is printed in tables, on the terminal and in results.md
        raise InputError(f"{where}: level is {level!r:.80}, expected printable characters without |")
    demonstrations = row.get("demonstrations", [])
    if not isinstance(demonstrations, list) or not all(isinstance(d, str) and d for d in demonstrations):
        raise InputError(f"{where}: demonstrations must be a list of non-empty strings (or be absent)")
    for text in demonstrations:
        _check_text(text, where, "demonstrations")
    problem = Problem(
        id=row["id"],
        problem=row["problem"],
        answer=row["answer"],
        demonstrations=tuple(demonstrations),
        level=level,
        system=row.get("system", ""),
    )
    try:
        reward.check(problem)
    except (Exception, SystemExit) as error:  # a user's own check can raise anything
        raise InputError(f"{where}: {raised(error, reward.name.rpartition(':')[0])}") from error
    return problem


def without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a row's fields without missing values, for which `datasets` writes null and pandas null or NaN."""
    if len(row := dict(pairs)) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InputError(f"the field {name!r:.80} stands there twice: leave one")
    return {name: value for name, value in row.items() if value is not None and value == value}


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=without_nulls)
    except (ValueError, RecursionError) as error:  # also a field that stands twice, and a number of 5,000 digits
        raise InputError(f"{where}: not valid JSON: {error!s:.120}") from error


def read_rows(path: str | Path) -> dict[int, Any]:
    """Returns the JSON values of a JSONL file by line number, without empty lines. Raises as `load_problems` does."""
    path = Path(path)
    if path == Path():
        raise InputError("data is empty or '.': give a JSONL file (its format: data/README.md)")
    with reading(path):
        is_file = path.is_file()
    if not is_file:
        # the folders that data/prepare.py writes to
        if path.parts[-3:-1] in (("data", "train"), ("data", "benchmarks")):
            fix = f"run  python data/prepare.py {path.stem}  (--help: the list)"
            raise InputError(f"{path}: {path.stem} is not here yet: {fix}")
        there = "is a folder" if path.is_dir() else "is not a regular file"
        what = there if path.exists() else "does not exist"
        raise InputError(f"data file {str(path)!r} {what}: give a JSONL file (its format: data/README.md)")
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        for begin, (form, fix) in CONVERTED.items():
            if error.object.startswith(begin):
                line = fix.format(path, path.with_suffix(".converted.jsonl"))
                raise InputError(f"{path} is {form}, expected JSONL: convert it with  {line}") from error
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split at U+2028, which JSON allows
    return {number: _parse(line, f"{path}:{number}") for number, line in lines if line.strip()}


def check_rows(path: str | Path, rows: dict[int, Any], reward: Reward = MATH) -> list[Problem]:
    """Returns the problems in the rows of a file. Raises as `load_problems` does."""
    problems, seen = [], {}
    for number, row in rows.items():
        where = f"{path}:{number}"
        problem = _read_row(row, where, default_id=f"{Path(path).stem}-{number}", reward=reward)
        if problem.id in seen:
            raise InputError(f"{where}: the id {problem.id!r} stands at line {seen[problem.id]} too: ids are unique")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: no problems in it: write one JSON object per line")
    levels = {"all", *(problem.level for problem in problems)}
    # metrics.jsonl has the names eval_LEVEL, eval_LEVEL_low, eval_LEVEL_high
    for number, problem in zip(rows, problems):
        if (base := re.sub(r"_(low|high)\Z", "", problem.level)) != problem.level and base in levels:
            level = f"level is {problem.level!r}, as a limit of the accuracy of level {base!r} is called"
            raise InputError(f"{path}:{number}: {level}: give it another name")
    return problems


def odd_rows(path: str | Path) -> list[str]:
    """Returns a warning for a file that has the same problem twice, probably by mistake; else an empty list."""
    seen: set[tuple[str, str]] = set()
    twice = []
    for number, row in read_rows(path).items():
        text = row.get("problem", ""), row.get("system", "")
        twice += [number] * (text in seen)
        seen.add(text)
    if not twice:
        return []
    return [f"{path}: {len(twice)} rows repeat a problem that stands above them (first at line {twice[0]})"]


def load_problems(path: str | Path, reward: Reward = MATH) -> list[Problem]:
    """Returns the problems of a JSONL file, all of which `reward` can grade.

    Raises an InputError that names file and line, what was found and what was expected.
    """
    return check_rows(path, read_rows(path), reward)


def render_prompt(tokenizer: Tokenizer, problem: str, system: str = "") -> str:
    """Returns the prompt as text, rendered by the tokenizer's chat template.

    Without a template it is "system\\n\\nproblem\\n". If the tokenizer puts a token that begins a text, that stands
    first (Llama was trained with it). A template that writes today's date writes DATE, so a run and its evaluation
    have the same prompts on any day. Raises InputError for a template that refuses a message or leaves it out; some
    templates take no system message, or want the content as a list of parts.
    """
    if not tokenizer.chat_template:
        begin = tokenizer.bos_token if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else ""
        return begin + (f"{system}\n\n" if system else "") + f"{problem}\n"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": problem})
    try:
        template = TODAY.sub(lambda call: repr(DATE.strftime(call[2])), tokenizer.get_chat_template())
        if "strftime_now(" in template:
            raise InputError("it asks for today's date in a way that cannot be answered with a fixed one")
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template can raise anything
        roles = "a system and a user message: remove the field system" if system else "a user message"
        message = " ".join(str(error).split())[:200]
        raise InputError(f"the model's chat template refuses {roles} (it says: {message})") from error
    for message in messages:
        if "".join(message["content"].split()) not in "".join(prompt.split()):
            fix = {"system": "remove the field system", "user": "give it one that takes text"}[message["role"]]
            raise InputError(f"the model's chat template leaves out or changes the {message['role']} message: {fix}")
    return prompt


def encode(tokenizer: Tokenizer, text: str, what: str = "text") -> list[int]:
    """Returns the ids of `text` exactly as written, without special tokens. Raises InputError if a character has no
    token."""

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    _check_text(text, what, "it")
    unknown, ids = tokenizer.unk_token_id, ids_of(text)
    rows = getattr(tokenizer, "embedding_rows", math.inf)  # the number of rows is known once a model was loaded
    if beyond := [token for token in ids if token >= rows]:
        token = f"{tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id {beyond[0]}"
        raise InputError(f"{what}: {token}, the model's embedding {rows} rows: remove it or use another model")
    if unknown is None or unknown not in ids:
        return ids
    # the text itself may write the unknown token, which can be bos, eos or pad too
    for part in text.split(tokenizer.unk_token):
        if unknown in ids_of(part):
            good = max(n for n in range(len(part)) if unknown not in ids_of(part[:n]))
            raise InputError(f"{what}: the tokenizer cannot encode {part[good]!r}: remove it or use another model")
    return ids


def _is_right(reward: Reward, demonstration: str, problem: Problem) -> bool:
    return grade_one(reward, demonstration, problem) == 1.0


def encode_problems(
    tokenizer: Tokenizer,
    problems: list[Problem],
    max_response_tokens: int,
    end_ids: list[int],
    reward: Reward = MATH,
) -> tuple[list[Encoded], Counter, Counter]:
    """Returns the problems as ids, and counts of demonstrations by reason: those left out, and those noted.

    A demonstration is used only if it fits the budget with its end token (else `too long`), its reward is 1 (else
    `not right`) and it contains no end token (else `end token inside`). If it begins with the tag that the prompt
    ends with (<think>), this second tag is removed. Otherwise the policy would be taught a sequence that it never
    samples. Raises InputError for a demonstration that is right as text but wrong when its tokens are read back.
    """
    encoded, left_out, noted = [], Counter(), Counter()
    for problem in problems:
        prompt = render_prompt(tokenizer, problem.problem, problem.system)
        demonstrations = []
        for text in problem.demonstrations:
            text = without_doubled_tag(prompt, text, noted)
            ids = encode(tokenizer, text, f"demonstration of {problem.id!r}")
            if len(ids) + 1 > max_response_tokens:
                left_out["too long"] += 1
            elif not _is_right(reward, text, problem):
                left_out["not right"] += 1
            elif set(ids) & set(end_ids):
                left_out["end token inside"] += 1
            else:
                check_same_grade(tokenizer, problem, text, ids, reward)
                noted["go on after their box"] += has_text_after_box(text)
                demonstrations.append(ids)
        prompt_ids = encode(tokenizer, prompt, f"problem {problem.id!r}")
        encoded.append(Encoded(problem.id, prompt_ids, demonstrations, tokenizer.eos_token_id))
    return encoded, left_out, +noted


def encode_prompts(tokenizer: Tokenizer, problems: list[Problem]) -> list[Encoded]:
    """Returns problems as ids without demonstrations, for evaluation."""
    bare = [dataclasses.replace(problem, demonstrations=()) for problem in problems]
    return encode_problems(tokenizer, bare, 0, [])[0]


def without_doubled_tag(prompt: str, text: str, noted: Counter) -> str:
    """Returns `text` without a first tag, such as <think> and a line end, that the prompt ends with.

    If the same tag has other blanks around it, it stays and is noted, because nobody can tell which of the two is
    meant.
    """
    if not (tag := LAST_TAG.search(prompt)):
        return text
    if text.startswith(tag.group()):
        noted[f"lost the {tag.group().strip()} that their prompt ends with"] += 1
        return text.removeprefix(tag.group())
    if text.lstrip().startswith(tag.group().strip()):
        noted[f"WARNING: repeat the {tag.group().strip()} that their prompt ends with"] += 1
    return text


def has_text_after_box(text: str) -> bool:
    """Returns whether words or numbers follow the last boxed answer."""
    boxed = extract_boxed(text)
    return boxed is not None and any(c.isalnum() for c in text[text.rindex(boxed) + len(boxed) :])


def check_same_grade(tokenizer: Tokenizer, problem: Problem, text: str, ids: list[int], reward: Reward) -> None:
    """Raises InputError if a right demonstration would be graded wrong as a response, which is read back from ids."""
    back = decode(tokenizer, ids)
    if back != text and not _is_right(reward, back, problem):
        same = next((n for n, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
        raise InputError(
            f"demonstration of {problem.id!r}: the tokenizer loses {text[same : same + 20]!r} (character {same}; it "
            f"gives back {back[same : same + 20]!r}), and with it the answer: use another model"
        )
