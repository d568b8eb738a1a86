"""This file reads problems from JSONL files, checks them line by line, and turns them into token ids.

A row of a file is {"id", "problem", "answer", "demonstrations": [str, …] (may be absent), "level", "system" (may be
absent)}. Other fields of a row are ignored. `load_problems` reads and checks the rows. `encode_problems` renders and
encodes each prompt once. Sampling and training use only token ids, never text encoded again, so a run trains exactly
the ids that it sampled.
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

# matches the call by which a chat template asks for the date
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# matches a tag at the end of a prompt: <think> and a line end, <|assistant|>, …
LAST_TAG = re.compile(r"<[^<>\s]+>\s*\Z")
PANDAS = "python -c \"import pandas; pandas.%s('{0}').to_json('{1}', orient='records', lines=True)\""
CONVERTED = {  # first bytes of a file -> the file's format, and the command that converts the file to JSONL
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
# date for templates that ask for today's date: the default date in Llama 3's template
DATE = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True)
class Problem:
    """One problem, read from one line of a data file."""

    id: str
    problem: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    level: str = ""
    system: str = ""


@dataclass(frozen=True)
class Encoded:
    """A problem as token ids: the rendered prompt, and the demonstrations without their end token."""

    id: str
    prompt_ids: list[int]
    demonstrations: list[list[int]]
    end_id: int  # end token, which training appends to a demonstration


@dataclass
class Data:
    """The problems of a run, as text and as token ids."""

    train: list[Problem]
    encoded: list[Encoded]
    supervised: list[Encoded]  # problems with a demonstration, for the SFT stage
    # held-out problems, under the keys "validation" and "test", if the run has such files
    held: dict[str, tuple[list[Problem], list[Encoded]]]


def _check_text(text: str, where: str, field: str) -> None:
    """Raises InputError for a lone surrogate, which is half of a character. JSON can contain a lone surrogate,
    written as \\ud800."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}, half of a pair of surrogates"
        raise InputError(f"{where}: {field} has {half}: write the whole character") from error


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
        raise InputError(f"{where}: level is 'all', the name of the total in reports: give the level another name")
    if "|" in level or not level.isprintable():  # | separates table columns in results.md
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
    except (Exception, SystemExit) as error:  # a user's function `check` can raise any exception
        raise InputError(f"{where}: {raised(error, reward.name.rpartition(':')[0])}") from error
    return problem


def without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a row without missing values. For a missing value `datasets` writes null, pandas null or
    NaN."""
    if len(row := dict(pairs)) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InputError(f"the field {name!r:.80} stands twice in one row: delete one")
    return {name: value for name, value in row.items() if value is not None and value == value}


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=without_nulls)
    # a ValueError means invalid JSON, a field that occurs twice, or an integer with over 4,300 digits
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error!s:.120}") from error


def read_rows(path: str | Path) -> dict[int, Any]:
    """Returns {line number: JSON value} of a JSONL file, without empty lines. Raises InputError if the file is
    missing, is no text, or has a line that is not JSON."""
    path = Path(path)
    if path == Path():
        raise InputError("data is empty or '.': give a JSONL file (its format: data/README.md)")
    with reading(path):
        is_file = path.is_file()
    if not is_file:
        # data/prepare.py writes to data/train and data/benchmarks
        if path.parts[-3:-1] in (("data", "train"), ("data", "benchmarks")):
            fix = f"run  python data/prepare.py {path.stem}  (--help lists all sets)"
            raise InputError(f"{path}: {path.stem} is not here yet: {fix}")
        there = "is a folder" if path.is_dir() else "is not a regular file"
        what = there if path.exists() else "does not exist"
        raise InputError(f"data file {str(path)!r} {what}: give a JSONL file (its format: data/README.md)")
    try:
        with reading(path):
            # the codec utf-8-sig skips a byte order mark, which Windows editors write at the start of a file
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        for begin, (form, fix) in CONVERTED.items():
            if error.object.startswith(begin):
                line = fix.format(path, path.with_suffix(".converted.jsonl"))
                raise InputError(f"{path} is {form}, expected JSONL: convert it with  {line}") from error
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split at U+2028, which JSON allows
    return {number: _parse(line, f"{path}:{number}") for number, line in lines if line.strip()}


def check_rows(path: str | Path, rows: dict[int, Any], reward: Reward = MATH) -> list[Problem]:
    """Returns the problems in the rows of a file. Raises InputError for a row that is no valid problem."""
    problems, seen = [], {}
    for number, row in rows.items():
        where = f"{path}:{number}"
        problem = _read_row(row, where, default_id=f"{Path(path).stem}-{number}", reward=reward)
        if problem.id in seen:
            raise InputError(f"{where}: the id {problem.id!r} stands at line {seen[problem.id]} too: use another id")
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: no problems in it: write one JSON object per line")
    levels = {"all", *(problem.level for problem in problems)}
    # metrics.jsonl has the keys eval_LEVEL, eval_LEVEL_low and eval_LEVEL_high. So if one level were named X_low and
    # another X, both would write the key eval_X_low
    for number, problem in zip(rows, problems):
        if (base := re.sub(r"_(low|high)\Z", "", problem.level)) != problem.level and base in levels:
            level = f"level is {problem.level!r}, the name of a limit of the accuracy of level {base!r}"
            raise InputError(f"{path}:{number}: {level}: give the level another name")
    return problems


def odd_rows(path: str | Path) -> list[str]:
    """Returns a list with one warning if a file that load_problems accepts contains the same problem twice, probably
    by mistake, else an empty list."""
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

    Raises an InputError that names the file, the line, what was found and what was expected.
    """
    return check_rows(path, read_rows(path), reward)


def render_prompt(tokenizer: Tokenizer, problem: str, system: str = "") -> str:
    """Returns the prompt as text, rendered by the tokenizer's chat template.

    Without a template the prompt is "system\\n\\nproblem\\n". If the tokenizer starts each text with a bos token, the
    prompt starts with the bos token too (Llama was trained that way). A template that asks for today's date gets the
    fixed date DATE, so the prompts of a run and of its evaluation are the same on any day. Raises InputError for a
    template that refuses or leaves out a message, for example because it takes no system message or expects the
    content as a list of parts.
    """
    if not tokenizer.chat_template:
        begin = tokenizer.bos_token if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else ""
        return begin + (f"{system}\n\n" if system else "") + f"{problem}\n"
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": problem})
    try:
        template = TODAY.sub(lambda call: repr(DATE.strftime(call[2])), tokenizer.get_chat_template())
        if "strftime_now(" in template:
            raise InputError("the template asks for today's date in a way that cannot be answered with a fixed date")
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a chat template can raise any exception
        roles = "a system and a user message: remove the field system" if system else "a user message"
        message = " ".join(str(error).split())[:200]
        raise InputError(f"the model's chat template refuses {roles} (it says: {message})") from error
    for message in messages:
        if "".join(message["content"].split()) not in "".join(prompt.split()):
            fix = {"system": "remove the field system", "user": "use a template that takes text"}[message["role"]]
            raise InputError(f"the model's chat template leaves out or changes the {message['role']} message: {fix}")
    return prompt


def encode(tokenizer: Tokenizer, text: str, what: str = "text") -> list[int]:
    """Returns the token ids of `text` without added special tokens. Raises InputError if a character has no token."""

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    _check_text(text, what, "it")
    unknown, ids = tokenizer.unk_token_id, ids_of(text)
    # load_model stores in the tokenizer how many tokens the model's embedding has
    rows = getattr(tokenizer, "embedding_rows", math.inf)
    if beyond := [token for token in ids if token >= rows]:
        token = f"{tokenizer.convert_ids_to_tokens(beyond[0])!r} has the id {beyond[0]}"
        raise InputError(f"{what}: {token}, but the model's embedding has only {rows} rows: use another model")
    if unknown is None or unknown not in ids:
        return ids
    # A text may contain the unknown token's own name, such as <unk>, or <eos> if eos is also the unknown token. So
    # only the parts of the text around this name are checked.
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
    """Returns the problems as token ids, and two counters of demonstrations by reason: of demonstrations that are not
    used, and of demonstrations that are used but reported to the user.

    A demonstration is used only if it fits into max_response_tokens with its end token (else `too long`), its reward
    is 1 (else `not right`) and it contains no end token (else `end token inside`). If the prompt ends with a tag such
    as <think> and the demonstration begins with the same tag, the second tag is removed, because a rollout never
    repeats the tag. Raises InputError for a demonstration that is right as text but wrong after encoding and
    decoding.
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
    """Returns the problems of an evaluation as token ids, without demonstrations."""
    bare = [dataclasses.replace(problem, demonstrations=()) for problem in problems]
    return encode_problems(tokenizer, bare, 0, [])[0]


def without_doubled_tag(prompt: str, text: str, noted: Counter) -> str:
    """Returns a demonstration `text` without the tag, such as <think> and a line end, that ends the prompt and begins
    the text.

    If the blanks around the two tags differ, the text keeps its tag and `noted` counts a warning, because either form
    may be intended.
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
    """Returns whether letters or digits follow the last boxed answer of `text`."""
    boxed = extract_boxed(text)
    return boxed is not None and any(c.isalnum() for c in text[text.rindex(boxed) + len(boxed) :])


def check_same_grade(tokenizer: Tokenizer, problem: Problem, text: str, ids: list[int], reward: Reward) -> None:
    """Raises InputError if a right demonstration is graded wrong after its ids are decoded, as the ids of a response
    are."""
    back = decode(tokenizer, ids)
    if back != text and not _is_right(reward, back, problem):
        same = next((n for n, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
        raise InputError(
            f"demonstration of {problem.id!r}: the tokenizer loses {text[same : same + 20]!r} (character {same}; it "
            f"gives back {back[same : same + 20]!r}), so the demonstration would be graded wrong: use another model"
        )
