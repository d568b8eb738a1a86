"""These tests check the embedded task and the base model's folder: answers, splits, tokenizer, chat rendering.

Answers are checked by a solver that works on strings and shares no line with the generator.
"""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent.parent / "data"
SPLITS = ("train", "validation", "test")
PRINTABLE = "".join(chr(code) for code in range(32, 127)) + "\n"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (DATA / "recipes" / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "base")


def work_through(problem: str, in_order: bool) -> list[str]:
    """Returns the value after each instruction, as three digits. Instructions are carried out in the order of their
    labels, or else in the listed order."""
    assert problem.endswith("?")
    value, *instructions = problem[:-1].split(";")
    values = [value]
    for text in sorted(instructions) if in_order else instructions:
        if text[1:] == "r":
            values.append(values[-1][::-1])
        else:
            number = int(values[-1])
            number = eval(f"{number}{text[1:]}")
            values.append(str(number)[-3:].zfill(3) if number >= 0 else str(1000 + number))
    return values


def steps_of(row: dict) -> int:
    return row["problem"].count(";")


def test_answers_are_right_and_the_listed_order_never_is(rows):
    for row in (row for split in rows.values() for row in split):
        assert work_through(row["problem"], in_order=True)[-1] == row["answer"], row
        if steps_of(row) > 1:
            assert work_through(row["problem"], in_order=False)[-1] != row["answer"], row


def test_demonstrations_write_every_step_with_its_label(rows):
    for row in rows["train"]:
        for demonstration in row.get("demonstrations", []):
            values = work_through(row["problem"], in_order=True)
            instructions = sorted(row["problem"][:-1].split(";")[1:])
            lines = [f"{a}{text}={b}" for a, text, b in zip(values, instructions, values[1:], strict=False)]
            assert demonstration == ";".join([*lines, f"\\boxed{{{row['answer']}}}"])


def test_worked_example():
    values = work_through("991;C-4;Ar;D*2;B*2;F*2;E-3?", in_order=True)
    assert values == ["991", "199", "398", "394", "788", "785", "570"]
    assert work_through("003;A-7;Br?", in_order=True) == ["003", "996", "699"]


def test_sizes_levels_and_fields(rows):
    sizes = {"easy": {1, 2}, "medium": {3, 4}, "hard": {5, 6}, "ood": {7, 8}}
    for split in SPLITS:
        for row in rows[split]:
            assert steps_of(row) in sizes[row["level"]]
            assert set(row) - {"demonstrations"} == {"id", "problem", "answer", "level"}
            labels = sorted(text[0] for text in row["problem"][:-1].split(";")[1:])
            assert labels == list("ABCDEFGH"[: steps_of(row)])
    for split, count in (("validation", 100), ("test", 200)):
        assert Counter(row["level"] for row in rows[split]) == dict.fromkeys(sizes, count)
        assert not any("demonstrations" in row for row in rows[split])
    assert Counter(map(steps_of, rows["train"])) == dict.fromkeys((3, 4, 5, 6), 128)
    demonstrated = [row for row in rows["train"] if "demonstrations" in row]
    assert Counter(map(steps_of, demonstrated)) == dict.fromkeys((3, 4, 5, 6), 32)
    assert all(len(row["demonstrations"]) == 1 for row in demonstrated)


def test_no_problem_and_no_id_twice(rows):
    everything = [row for split in rows.values() for row in split]
    assert len({row["problem"] for row in everything}) == len(everything)
    assert len({row["id"] for row in everything}) == len(everything)


def test_generator_writes_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, DATA / "make_recipes.py", "--out", tmp_path], check=True)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / "recipes" / name).read_bytes(), f"{name} is stale"
    assert len(list(tmp_path.iterdir())) == len(SPLITS)


@pytest.mark.parametrize(
    "text",
    [PRINTABLE, *PRINTABLE, "\\boxed{570}", "\\boxed", "\\\\boxed{\\boxed{1}}", "a  b , .\n\n 's ", "don 't", ""],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == len(text) - text.count("\\boxed{") * (len("\\boxed{") - 1)


def test_tokenizer_boundaries_and_special_tokens(tokenizer):
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    pieces = ["7;", "\\boxed{", "57", "0}"]
    assert encode("".join(pieces)) == [i for piece in pieces for i in encode(piece)]
    assert tokenizer.convert_ids_to_tokens(encode("\\boxed{5}")) == ["\\boxed{", "5", "}"]
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 4
    assert None not in special
    assert encode("é\tß") == [tokenizer.unk_token_id] * 3


def test_chat_template(tokenizer):
    user, answer = {"role": "user", "content": "991;C-4;Ar?"}, {"role": "assistant", "content": "\\boxed{1}"}
    render = lambda messages, **options: tokenizer.apply_chat_template(messages, tokenize=False, **options)  # noqa: E731
    assert render([user], add_generation_prompt=True) == render([user]) == "<bos>991;C-4;Ar?"
    assert render([{"role": "system", "content": "Be brief."}, user]) == "<bos>Be brief.\n991;C-4;Ar?"
    assert render([user, answer]) == "<bos>991;C-4;Ar?\\boxed{1}<eos>"
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *tokenizer("991;C-4;Ar?")["input_ids"]]


def test_solutions_fit_their_budgets(rows, tokenizer):
    longest = Counter()
    for split in SPLITS:
        for row in rows[split]:
            values = work_through(row["problem"], in_order=True)
            instructions = sorted(row["problem"][:-1].split(";")[1:])
            text = "".join(f"{a}{b}={c};" for a, b, c in zip(values, instructions, values[1:], strict=False))
            tokens = len(tokenizer(f"{text}\\boxed{{{values[-1]}}}")["input_ids"]) + 1  # 1 for the end token
            longest[row["level"]] = max(longest[row["level"]], tokens)
    assert longest["hard"] <= 72
    assert longest["ood"] <= 94


def test_base_folder(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DATA / "base")
    assert model.num_parameters() < 1_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.generation_config, name) == getattr(tokenizer, name)
    size = (DATA / "base" / "model.safetensors").stat().st_size
    assert size < 4_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (["--out", "FILE"], "exists: delete it"),
        (["--out", "FULL"], "exists: delete it"),
        (["--out", "FILE/base"], "cannot be written to"),
        (["--out", "/proc/x"], "/proc cannot be written to"),
    ],
)
def test_make_base_refuses_wrong_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DATA)
    monkeypatch.setattr(sys, "argv", ["make_base.py", *arguments])
    make_base = importlib.import_module("make_base")
    with pytest.raises(SystemExit) as stopped:
        make_base.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"FILE", "FULL", "notes.txt"}


@pytest.mark.parametrize("command", ["make_recipes.py", "make_sums.py"])
def test_other_data_are_not_overwritten(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "test.jsonl").write_text("mine\n")
    monkeypatch.setattr(sys, "argv", [command, "--out", str(tmp_path)])
    make = importlib.import_module(f"data.{command[:-3]}").main
    with pytest.raises(SystemExit) as stopped:
        make()
    assert stopped.value.code == 2
    assert f"{tmp_path}/test.jsonl exists with other rows: choose another folder" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"test.jsonl": "mine\n"}
    (tmp_path / "test.jsonl").unlink()
    make()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make()  # the same rows again
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["make_recipes.py", "make_sums.py"])
@pytest.mark.parametrize("out", ["/proc/x", "FILE", "FILE/recipes"])
def test_a_place_that_cannot_be_written_to_is_one_line(command, out, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, "--out", out])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"data.{command[:-3]}").main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{command}: {out} cannot be written to (") and error.endswith("): give another --out\n")
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.mark.parametrize("kind", ["short", "slips", "several"])
def test_weaker_experts_change_the_demonstrations_only_and_still_reach_the_answer(rows, tmp_path, kind):
    """The test counts slips by its own arithmetic: each slip makes a demonstration one step longer."""
    command = [sys.executable, "data/make_recipes.py", "--demonstrations", kind, "--out", str(tmp_path)]
    subprocess.run(command, cwd=DATA.parent, check=True, capture_output=True)
    made = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert (tmp_path / "test.jsonl").read_bytes() == (DATA / "recipes/test.jsonl").read_bytes()
    slips = 0
    for ours, weaker in zip(rows["train"], made, strict=True):
        assert {**ours, "demonstrations": 0} == {**weaker, "demonstrations": 0} or "demonstrations" not in ours
        texts = weaker.get("demonstrations", [])
        assert len(texts) == (0 if "demonstrations" not in ours else 2 if kind == "several" else 1)
        for text in texts:
            assert text.endswith(f"\\boxed{{{ours['answer']}}}") and len(text) - 6 + 1 <= 96
            values = [step.split("=")[1] for step in text.split(";")[:-1]]
            right = work_through(ours["problem"], in_order=True)[1:]
            extra = len(values) - len(right)
            slips += extra
            assert extra == 0 or kind == "slips"
            assert [v for v in values if v in right][-1] == right[-1]
        if kind == "short":
            assert not any(label in text for text in texts for label in "ABCDEFGH")
    assert (40 < slips < 256) if kind == "slips" else slips == 0
