"""These tests check that every command answers wrong input with exit code 2 and one line on stderr, which names the
file, line or field. A refused command writes nothing.

This file has wrong data files, settings and command lines; test_hostile_folders.py has damaged folders and models.
Most cases are a good file with one fault; others are random. The commands run inside the test's own process
(`refused` in conftest.py).
"""

import bz2
import contextlib
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.loader import load_problems
from support import checkpoint
from support.config import Config, from_dict, parse_config

GOOD = {"id": "a", "problem": "1;A+2?", "answer": "3", "demonstrations": ["1A+2=3;\\boxed{3}"], "level": "easy"}


# ---- data files


def changed(**fields: object) -> str:
    """Returns the row GOOD as JSON, with the values of `fields` in place of GOOD's; the value `...` (Ellipsis)
    removes a field."""
    return json.dumps({name: value for name, value in (GOOD | fields).items() if value is not ...})


LINES = {  # each case has the second line of a data file, and words that must be in the error message
    "not JSON": ("problem: 1+1", "not valid JSON"),
    "cut short": (json.dumps(GOOD)[:-5], "not valid JSON"),
    "two objects": (json.dumps(GOOD) * 2, "not valid JSON"),
    "single quotes": (str(GOOD), "not valid JSON"),
    "comma at the end": (json.dumps(GOOD) + ",", "not valid JSON"),
    "control character": ('{"problem": "a\tb\x01", "answer": "1"}', "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "deep object": ('{"a":' * 100_000, "not valid JSON"),
    "many digits": ('{"answer": ' + "1" * 5000 + "}", "4300 digits"),
    "null byte": ("\0", "not valid JSON"),
    "byte order mark inside": ("\ufeff" + json.dumps(GOOD), "not valid JSON"),
    "list": ("[1, 2]", "found list"),
    "number": ("7", "found int"),
    "string": ('"row"', "found str"),
    "null": ("null", "found NoneType"),
    "true": ("true", "found bool"),
    "NaN": ("NaN", "found float"),
    "empty object": ("{}", "the field 'problem' is missing"),
    "no answer": (changed(id="b", answer=...), "the field 'answer' is missing"),
    "other names": ('{"question": "1+1", "answer": "2"}', "the field 'problem' is missing"),
    "same id": (changed(), "the id 'a' stands at line 1 too"),
    "level all": (changed(id="b", level="all"), "level is 'all'"),
    "level with an escape": (changed(id="b", level="\x1b[2J"), "expected printable characters without |"),
    "level with a bar": (changed(id="b", level="a|b"), "level is 'a|b', expected printable characters without |"),
    "level of two lines": (changed(id="b", level="a\nb"), "level is 'a\\nb', expected printable characters"),
    "a field twice": ('{"problem": "1+1", "answer": "3", "answer": "2"}', "the field 'answer' stands twice"),
    "demonstrations a string": (changed(id="b", demonstrations="x"), "demonstrations must be a list"),
    "problem null": (changed(id="b", problem=None), "the field 'problem' is missing"),
    "demonstrations of numbers": (changed(id="b", demonstrations=[1]), "demonstrations must be a list"),
    "demonstrations empty text": (changed(id="b", demonstrations=[""]), "demonstrations must be a list"),
    "demonstrations nested": (changed(id="b", demonstrations=[["x"]]), "demonstrations must be a list"),
    "demonstrations an object": (changed(id="b", demonstrations={"a": "b"}), "demonstrations must be a list"),
}
for field in ("id", "problem", "answer", "level", "system"):
    for value in (1, 1.5, True, ["x"], {"x": 1}):
        LINES[f"{field} {value!r}"] = (changed(**({"id": "b"} | {field: value})), f"{field} is ")
    LINES[f"{field} half a pair"] = (changed(**({"id": "b"} | {field: "a\ud800"})), "half of a pair")
for field in ("id", "problem", "answer"):
    for value in ("", "  ", "\n\t", "\u3000"):
        LINES[f"{field} {value!r}"] = (changed(**({"id": "b"} | {field: value})), f"{field} is empty")
for value in ("\\frac{1}{", "\\unknown{3}", "{", "((", "\\sqrt", "x^", "\\text{"):
    LINES[f"answer {value!r}"] = (changed(id="b", answer=value), "answer ")


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_of_a_data_file(tmp_path, refused, case):
    line, message = LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8", errors="surrogatepass")
    output = refused("train.py", "--data", path, "--out", tmp_path / "run")
    assert f"{path}:2: " in output and message in output


FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "no problems in it"),
    "blank lines": (b"\n \n\t\n", "no problems in it"),
    "binary": (bytes(range(256)), "not UTF-8 text"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "is UTF-16, expected JSONL: convert it with  iconv -f UTF-16"),
    "UTF-32": (json.dumps(GOOD).encode("utf-32"), "is UTF-32, expected JSONL: convert it with  iconv -f UTF-32"),
    "Latin-1": (b'{"problem": "caf\xe9?", "answer": "1"}', "not UTF-8 text"),
    "gzip": (gzip.compress(b"{}"), "is gzip, expected JSONL: convert it with  gunzip < '"),
    "bzip2": (bz2.compress(b"{}"), "is bzip2, expected JSONL: convert it with  bunzip2 < '"),
    "xz": (lzma.compress(b"{}"), "is xz, expected JSONL: convert it with  unxz < '"),
    "Excel": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00\xa8", "is zip or Excel, expected JSONL: convert it with  unzip '"),
    "Parquet": (b"PAR1\x15\x04\x15\x80", "is Parquet, expected JSONL: convert it with  python -c"),
    "Arrow": (b"ARROW1\0\0\xff\xff", "is Arrow, expected JSONL: convert it with  python -c"),
    "Arrow stream": (b"\xff\xff\xff\xff\x10", "is Arrow, expected JSONL: convert it with  python -c"),
    "an array": (json.dumps([GOOD], indent=1).encode(), ":1: not valid JSON"),
    "csv": (b"problem,answer\n1+1,2\n", ":1: not valid JSON"),
    "a folder": ("folder", "is a folder: give a JSONL file"),
}


@pytest.mark.parametrize("option", ["data", "eval_data", "test_data", "sft_data"])
@pytest.mark.parametrize("case", FILES)
def test_a_bad_data_file(tmp_path, refused, case, option):
    content, message = FILES[case]
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    output = refused("train.py", f"--{option}", path, "--method", "sft", "--out", tmp_path / "run")
    assert str(path) in output and message in output


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*GOOD, "system", "options"])


ROW = st.dictionaries(NAMES, JSON | st.text(min_size=1) | st.just(["\\boxed{1}"]))


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, max_size=3), tail=st.binary())
def test_any_rows_are_read_or_refused_by_name(tmp_path_factory, rows, tail):
    path = tmp_path_factory.getbasetemp() / "drawn.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + (tail if len(tail) > 20 else b""))
    try:
        problems = load_problems(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert 0 < len(problems) <= len(rows) + 1 and all(p.id and p.problem and p.answer for p in problems)


# ---- settings

CONFIGS = {
    "missing": (None, "cannot be read"),
    "a folder": ("folder", "cannot be read"),
    "empty": (b"", "not valid JSON"),
    "binary": (bytes(range(256)), "config"),
    "cut short": (b'{"steps": 1', "not valid JSON"),
    "yaml": (b"steps: 1\n", "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "list": (b"[1]", "expected a JSON object"),
    "number": (b"1", "expected a JSON object"),
    "unknown": (b'{"learning_rate": 1}', "unknown setting 'learning_rate'"),
    "nested": (b'{"optimizer": {"lr": 1}}', "unknown setting 'optimizer'"),
    "nested value": (b'{"lr": {"value": 1}}', "lr is "),
    "infinite": (b'{"lr": Infinity}', "lr is inf"),
    "too large": (b'{"lr": 1e999}', "lr is inf"),
    "whole number too large": (b'{"lr": 1' + b"0" * 400 + b"}", "lr is "),
    "many digits": (b'{"steps": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "half a step": (b'{"steps": 1.5}', "steps is 1.5"),
    "a text of a number": (b'{"steps": "ten"}', "steps is 'ten'"),
    "null": (b'{"method": null}', "method is None"),
    "null byte": (b'{"data": "a\\u0000b"}', "data"),
    "half of a pair": (b'{"data": "\\ud800"}', "data"),
    "line end in a name": (b'{"a\\nb": 1}', "unknown setting"),
    "line end in a value": (b'{"method": "rft\\nx"}', "method is "),
    "line end in a path": (b'{"data": "a\\nb.jsonl"}', "data"),
    "long": (b'{"method": "' + b"x" * 100_000 + b'"}', "method is "),
}


@pytest.mark.parametrize("command", ["train.py", "plan.py"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_file(tmp_path, refused, case, command):
    content, message = CONFIGS[case]
    if command == "plan.py" and message == "data":
        pytest.skip("plan.py reads no data")
    path = tmp_path / "config.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    out = ["--out", tmp_path / "run"] if command == "train.py" else []
    assert message in refused(command, "--config", path, *out)


NUMBERS = [field.name for field in Config.__dataclass_fields__.values() if field.type in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_bad_number_on_the_command_line(tmp_path, refused, name):
    output = refused("train.py", f"--{name}", "1e999x", "--out", tmp_path / "run")
    assert f"{name} is '1e999x'" in output


LINES_OF_COMMANDS = {
    "train.py": [
        "--",
        "---steps 1",
        "-s 1",
        "--steps",
        "--=3",
        "train",
        "--steps=",
        "--STEPS 1",
        "--resume auto",
        "--resume no --out OUT",
        "--method",
        "--method sfft",
        "--model nowhere --out OUT",
        "--model no/such/model/here --out OUT",
        f"--model {'long' * 100} --out OUT",
        "--reward nothing --out OUT",
        "--reward nothing.py --out OUT",
        "--reward OUT/a.py:f --out OUT",
        "--device tpu --out OUT",
        "--device cuda --out OUT",
        "--updates_per_step 99 --out OUT",
        "--prompts_per_step 99999 --out OUT",
        "--max_response_tokens 99999 --out OUT",
        "--max_response_tokens 2 --out OUT",
        "--out README.md",
        "--out README.md/run",
        "--out README.md --resume auto",
        "--out data --resume auto",
    ],
    "eval.py": [
        "",
        "--model",
        "--model data/base",
        "--model data/base --benchmarks nothing",
        "--model data/base --benchmarks ,",
        "--model data/base --benchmarks embedded,embedded --temperature 0 --samples 2",
        "--model data/base --benchmarks embedded --samples 0",
        "--model data/base --benchmarks embedded --samples many",
        "--model data/base --benchmarks embedded --temperature -1",
        "--model data/base --benchmarks embedded --temperature nan",
        "--model data/base --benchmarks embedded --temperature 0 --samples 2",
        "--model data/base --benchmarks embedded",
        "--model data/base --benchmarks embedded --max_response_tokens 0",
        "--model data/base --benchmarks embedded --max_response_tokens 99999",
        "--model data/base --benchmarks embedded --max_response_tokens 40 --out README.md",
        "--model data/base --benchmarks embedded --max_response_tokens 40 --out data",
        "--model data/base --benchmarks embedded --max_response_tokens 40 --reward nothing",
        "--model data/base --benchmarks embedded --max_response_tokens 40 --decode fast",
        "--model data/base --data nowhere.jsonl",
        "--model nowhere --benchmarks embedded",
        "--model README.md --benchmarks embedded",
        "--regrade nowhere",
        "--regrade data",
        "--unknown 1",
        "--model data/base extra",
        "--model data/base --benchmarks embedded --max_response_tokens 40 --system \udcff",
    ],
    "sample.py": [
        "",
        "--model data/base",
        "1+1",
        "--model nowhere 1+1",
        "--model data/base --samples 0 1+1",
        "--model data/base --samples many 1+1",
        "--model data/base --max_response_tokens 0 1+1",
        "--model data/base --temperature -1 1+1",
        "--model data/base --temperature nan 1+1",
        "--model data/base --temperature inf 1+1",
        "--model data/base --seed -1 1+1",
        "--model data/base --max_response_tokens 512 1+1",
        "--model data/base --unknown 1 1+1",
        "--model data/base \udcff",  # in arguments Python reads the byte 0xff, which is not UTF-8, as \udcff
        "--model data/base --system \udcff 1+1",
    ],
    "plot.py": [
        "",
        "nowhere",
        "data",
        "README.md",
        "data data",
        "--group nowhere",
        "--group data 3",
        "--group data x",
        "--group data 1 2",
        "--group data --compare",
        "--page",
        "--page nowhere",
        "--page data",
        "--page data/base --problem nowhere",
        "--page data/base --out page.png",
        "--problem x data",
        "--compare",
        "--compare nowhere",
        "--compare data",
        "--beside-paper data",
        "--out nowhere/x.png data",
    ],
    "plan.py": [
        "--gpus 0",
        "--prompt -1",
        "--mean_response -1",
        "--model nowhere",
        "--method x",
        "word",
        "--config nowhere.json",
    ],
}


@pytest.mark.parametrize("command, line", [(c, line) for c, lines in LINES_OF_COMMANDS.items() for line in lines])
def test_a_bad_command_line(tmp_path, refused, command, line):
    refused(command, *line.replace("OUT", str(tmp_path / "run")).split())


def test_what_a_model_was_trained_with_is_not_guessed(tmp_path, refused):
    model = shutil.copytree("data/base", tmp_path / "model")
    (model / "trained_with.json").write_text('{"system": 3}')
    assert 'trained_with.json: found {"system": 3}, expected a JSON object with system, reward' in refused(
        "sample.py", "--model", model, "1"
    )


def test_runs_that_cannot_be_made_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("nowhere/at all")
    with pytest.raises(ValueError, match=r"runs cannot be written to .*: give another --out"):
        checkpoint.new_folder(Config())


@pytest.mark.parametrize("out", ["/proc/x", "README.md", "README.md/run"])
@pytest.mark.parametrize("command", ["train.py", "eval.py"])
def test_a_folder_that_cannot_be_made_is_one_line_with_the_fix(refused, command, out):
    words = ["--model", "data/base", "--out", out]
    words += ["--resume", "auto"] if command == "train.py" else ["--benchmarks", "embedded", "--temperature", "0"]
    words += ["--max_response_tokens", "40"]
    output = refused(command, *words)
    assert out in output and ("give another --out" in output or "choose another" in output) and "Errno" not in output


@pytest.mark.parametrize("command", ["sample.py", "eval.py", "plan.py"])
@pytest.mark.parametrize(
    "words, output",
    [
        ("--samples 0", "samples is 0, expected at least 1"),
        ("--samples 10000000000000000000", "samples is 10000000000000000000, expected 1 to 1000000000"),
        ("--max_response_tokens 0", "max_response_tokens is 0, expected at least"),
        ("--temperature nan", "temperature is nan, expected"),
        ("--temperature 1e-9", "temperature is 1e-09, expected 0.01 to 10"),
        ("--max_response_tokens 512", "(512) exceed the model's 512 positions: lower max_response_tokens to "),
    ],
)
def test_a_number_that_cannot_be_is_named(refused, command, words, output):
    if command == "plan.py" and "--samples" in words:
        pytest.skip("plan.py samples nothing")
    rest = {"sample.py": ["1;A+2?"], "eval.py": ["--benchmarks", "embedded"], "plan.py": []}[command]
    assert output in refused(command, "--model", "data/base", *words.split(), *rest)


WORD = st.sampled_from([f"--{name}" for name in Config.__dataclass_fields__]) | st.text()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(WORD | JSON.map(str), max_size=5))
def test_any_words_make_a_config_or_one_line(words):
    with contextlib.suppress(SystemExit):  # --help
        try:
            assert isinstance(parse_config(words), Config)
        except ValueError as error:
            assert "\n" not in str(error) and str(error)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(list(Config.__dataclass_fields__)) | st.text(), JSON, max_size=4))
def test_any_settings_make_a_config_or_one_line(values):
    try:
        assert isinstance(from_dict(values), Config)
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
