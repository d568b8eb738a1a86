"""These tests check that commands refuse damaged folders of runs, evaluations and models with exit code 2 and one
line that names the file. A refused command writes nothing.

Each case damages one file of a good folder.
"""

import json
import shutil
import sys
from pathlib import Path

import lives
import pytest
import torch

import plot
import train

ROOT = Path(__file__).parents[1]

# ---- folders of runs and of evaluations

TEXT = {
    "cut": 0.5,
    "empty": b"",
    "binary": bytes(range(256)),
    "list": b"[1]",
    "null": b"null",
    "deep": b"[" * 100_000,
}


def damage(path: Path, how: object) -> None:
    """Damage a file as `how` says: None deletes the file, a number is the share of its bytes that is kept, and bytes
    replace its content. A dict replaces fields of the file's JSON object, and a function is called with the file's
    path."""
    if how is None:
        path.unlink()
    elif isinstance(how, float):
        path.write_bytes(path.read_bytes()[: int(how * path.stat().st_size)])
    elif isinstance(how, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | how))
    elif callable(how):
        how(path)
    else:
        path.write_bytes(how)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without(*names: str):
    """Returns a function that removes the fields `names` from a JSON file."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in content.items() if name not in names}))

    return change


def line(number: int, content: bytes):
    """Returns a function that replaces line `number` of a log by `content`."""

    def change(path: Path) -> None:
        lines = path.read_bytes().splitlines()
        lines[number] = content
        path.write_bytes(b"".join(line + b"\n" for line in lines))

    return change


def pickled(path: Path) -> None:
    """Write a checkpoint that executes code when torch.load reads it, unless torch.load prevents that."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (path.parent.parent / "exploded",)

    torch.save({"step": 1, "model": Bomb()}, path)


ROWS = {"text": b"x", "number": b"7", "null": b"null", "no step": b'{"a": 1}'}
ROWS |= {"deep": b"[" * 100_000, "binary": b"\xff\xfe", "blank": b""}
LAST = "checkpoint/step-00000001.pt"
OF_RUNS = {(file, name): how for file in ("config.json", "eval.json") for name, how in TEXT.items()}
OF_RUNS |= {
    ("config.json", "missing"): None,
    ("config.json", "other settings"): {"lr": 3.0},
    ("config.json", "a wrong type"): {"seed": "zero"},
    ("config.json", "no fingerprints"): without("made_of"),
    ("config.json", "a folder"): as_folder,
    ("eval.json", "missing"): None,
    ("eval.json", "nothing in it"): b"{}",
    ("eval.json", "a folder"): as_folder,
    ("metrics.jsonl", "missing"): None,
    ("metrics.jsonl", "empty"): b"",
    ("metrics.jsonl", "a step twice"): b'{"step": 1}\n{"step": 1}\n',
    ("metrics.jsonl", "a folder"): as_folder,
    (LAST, "cut"): 0.5,
    (LAST, "empty"): b"",
    (LAST, "text"): b"weights",
    (LAST, "a folder"): as_folder,
    (LAST, "code"): pickled,
    ("lock", "a folder"): as_folder,
}
LOGS = ("metrics.jsonl", "samples.jsonl", "groups.jsonl")
OF_RUNS |= {(log, name): line(0, row) for log in LOGS for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a folder with a run of one step and an evaluation, and the command-line arguments of the run."""
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(train, "draw_curves", lambda folder: "")
    folder = tmp_path_factory.mktemp("finished")
    inputs = lives.SETTINGS | {"method": "rft", "steps": 1, **lives.task(folder)}
    words = [word for name, value in inputs.items() for word in (f"--{name}", str(value))]
    for work in (lives.training(folder / "run", **inputs), lives.evaluating(folder / "eval", EVAL)):
        life = lives.live(work, folder)
        assert life.code == 0, life.output
    yield folder, words
    patch.undo()


EVAL = lives.EVALUATION.split()


@pytest.mark.parametrize("file, name", OF_RUNS)
def test_a_damaged_run_does_not_go_on(tmp_path, refused, finished, file, name):
    folder, words = finished
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    damage(out / file, OF_RUNS[file, name])
    message = refused("train.py", *words, "--out", out, "--resume", "auto")
    assert (file == "config.json" and str(out) in message) or str(out / file) in message


DRAWN = [key for key in OF_RUNS if key[0] in ("config.json", "metrics.jsonl")]


@pytest.mark.parametrize("file, name", DRAWN)
def test_a_damaged_run_is_drawn_or_refused(tmp_path, finished, monkeypatch, capsys, file, name):
    folder, _ = finished
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    damage(out / file, OF_RUNS[file, name])
    monkeypatch.setattr(sys, "argv", ["plot.py", str(out), "--out", str(tmp_path / "x.png")])
    try:
        plot.main()
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.count("\n") == 1 and str(out) in message


RESPONSES = ROWS | {"no response": b'{"benchmark": "embedded", "id": "a", "sample": 0}', "another": b'{"id": "x"}'}
OF_EVALUATIONS = {("settings.json", name): how for name, how in TEXT.items()}
OF_EVALUATIONS |= {("generations.jsonl", name): line(0, row) for name, row in RESPONSES.items()}
OF_EVALUATIONS |= {
    ("settings.json", "missing"): None,
    ("settings.json", "other settings"): {"seed": 5},
    ("settings.json", "no benchmarks"): without("benchmarks"),
    ("settings.json", "a folder"): as_folder,
    ("generations.jsonl", "too many"): lambda path: path.write_bytes(path.read_bytes() * 2),
}


@pytest.mark.parametrize("how", ["continue", "regrade"])
@pytest.mark.parametrize("file, name", OF_EVALUATIONS)
def test_a_damaged_evaluation_does_not_go_on(tmp_path, refused, finished, file, name, how):
    folder, _ = finished
    out = tmp_path / "eval"
    shutil.copytree(folder / "eval", out)
    damage(out / file, OF_EVALUATIONS[file, name])
    if (how, name) == ("regrade", "other settings"):
        pytest.skip("grading again does not ask how responses were drawn")
    words = [*EVAL, "--out", out] if how == "continue" else ["--regrade", out]
    assert str(out) in refused("eval.py", *words)


RESULTS = TEXT | {"missing": None, "nothing in it": b"{}", "no settings": without("settings"), "a folder": as_folder}


@pytest.mark.parametrize("name", RESULTS)
def test_damaged_results_are_not_compared(tmp_path, refused, finished, name):
    folder, _ = finished
    out = tmp_path / "eval"
    shutil.copytree(folder / "eval", out)
    damage(out / "results.json", RESULTS[name])
    assert str(out) in refused("plot.py", "--compare", folder / "eval", out, "--out", tmp_path / "x.png")


# ---- models, their tokenizers and chat templates

JINJA = {
    "an open block": "{% if messages %}",
    "an open expression": "{{ messages",
    "an unknown filter": "{{ messages | nothing }}",
    "an unknown tag": "{% nothing %}",
    "a field that is not there": "{{ messages[0].content.nothing.more }}",
    "an index that is not there": "{{ messages[7].content }}",
    "division by zero": "{{ 1 / 0 }}",
    "its own refusal": "{{ raise_exception('only tools\nhere') }}",
    "a way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a call of what is none": "{{ messages() }}",
    "without the problem": "hello",
    "nothing": " ",
    "a character without token": "é{{ messages[0].content }}",
    "too many": "{% for i in range(10 ** 12) %}x{% endfor %}",
}
NO_END_TOKENS = (10**9, -1, 1.5, True, [], [-1], [2, True], "</s>")
OF_MODELS = {
    (file, name): how
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name, how in TEXT.items()
    if name != "deep"
}
OF_MODELS |= {("chat_template.jinja", name): template.encode() for name, template in JINJA.items()}
OF_MODELS |= {
    ("config.json", "missing"): None,
    ("config.json", "an unknown type"): {"model_type": "nothing"},
    ("config.json", "no type"): without("model_type"),
    ("config.json", "code of its own"): {"auto_map": {"AutoConfig": "a.B"}, "model_type": "x"},
    ("config.json", "other shapes"): {"hidden_size": 64},
    ("config.json", "more layers"): {"num_hidden_layers": 9},
    ("config.json", "a wrong type"): {"hidden_size": "large"},
    ("config.json", "few positions"): {"max_position_embeddings": 8},
    ("config.json", "a smaller vocabulary"): {"vocab_size": 7},
    ("tokenizer.json", "missing"): None,
    ("tokenizer_config.json", "no end token"): {"eos_token": None},
    **{("generation_config.json", f"the end token {end!r}"): {"eos_token_id": end} for end in NO_END_TOKENS},
    ("model.safetensors", "missing"): None,
    ("model.safetensors", "cut"): 0.5,
    ("model.safetensors", "empty"): b"",
    ("model.safetensors", "text"): b"weights",
    ("model.safetensors", "a header of any length"): b"\xff" * 64,
}


@pytest.mark.parametrize("file, name", OF_MODELS)
def test_a_damaged_model_is_refused(tmp_path, refused, finished, file, name):
    _, words = finished
    model = tmp_path / "model"
    shutil.copytree(ROOT / "data/base", model)
    damage(model / file, OF_MODELS[file, name])
    message = refused("train.py", *words, "--model", model, "--out", tmp_path / "run")
    assert "model" in message
