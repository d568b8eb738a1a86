"""These tests check that every wrong setting gives a clear error of one line. Wrong values are derived from each
setting's type, bounds and choices in support/config.py."""

import dataclasses
import json
import math

import pytest

from support.config import PROJECT, Config, from_dict, new_parser, parse_config

FIELDS = dataclasses.fields(Config)
OPTIONAL = [f for f in FIELDS if f.type == float | None]
KIND = {f.name: float if f in OPTIONAL else f.type for f in FIELDS}
WRONG = [(f.name, value) for f in FIELDS if f.type is not str for value in ("seven", [1])]
WRONG += [(f.name, value) for f in FIELDS if f.type is not str and f not in OPTIONAL for value in ("", None)]
WRONG += [(f.name, 1.5) for f in FIELDS if f.type is int] + [(f.name, 3) for f in FIELDS if f.type in (str, bool)]
WRONG += [(f.name, KIND[f.name](f.metadata["low"] - 1)) for f in FIELDS if f.metadata["low"] is not None]
WRONG += [(f.name, KIND[f.name](f.metadata["high"] + 1)) for f in FIELDS if f.metadata["high"] < math.inf]
WRONG += [(f.name, value) for f in FIELDS if f.type is int for value in (10**9 + 1, 10**400, "1" + "0" * 400)]
WRONG += [(f.name, f.default + "x") for f in FIELDS if f.metadata["choices"]]
WRONG += [(f.name, value) for f in FIELDS if KIND[f.name] is float for value in (math.nan, math.inf)]


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_a_wrong_value_names_its_field(field):
    for value in [value for name, value in WRONG if name == field.name]:
        with pytest.raises(ValueError, match=f"^{field.name} is ") as error:
            from_dict({field.name: value})
        said = str(error.value)
        assert "\n" not in said and len(said) < 300, value
        assert any(word in said for word in ("expected", "did you mean", "choose from")), value


def test_there_are_many_such_cases():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_a_misspelt_field_is_told_its_name(field):
    with pytest.raises(ValueError, match=f"unknown setting.*did you mean {field.name}"):
        from_dict({field.name + "z": field.default})


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_default_is_allowed_and_read_back_from_text(field):
    assert getattr(from_dict({field.name: field.default, "out": "x"}), field.name) in (field.default, "x")
    assert field.metadata["help"] and f"--{field.name}" in new_parser().format_help()
    if field.name not in ("resume",):
        text = "" if field.default is None else str(field.default)
        assert parse_config([f"--{field.name}", text]) == Config()


def test_a_file_names_files_of_the_project_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"data": "data/recipes/train.jsonl", "model": "a/hub-name", "eval_data": "own.jsonl"}
    (tmp_path / "own.jsonl").touch()
    (tmp_path / "c.json").write_text(json.dumps(files))
    config = parse_config(["--config", "c.json"])
    assert config.data == str(PROJECT / files["data"])
    assert (config.model, config.eval_data) == ("a/hub-name", "own.jsonl")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])  # Windows editors may begin a file with this byte order mark
def test_the_command_line_wins_over_the_file(tmp_path, mark):
    path = tmp_path / "c.json"
    path.write_bytes(mark + json.dumps({"steps": 7, "lr": 1}).encode())
    config = parse_config(["--config", str(path), "--lr=2e-6", "--method", "rft"])
    assert (config.steps, config.lr, config.method) == (7, 2e-6, "rft")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps"], "argument --steps: expected one argument"),
        (["steps", "3"], "found 'steps': did you mean --steps"),
        (["--stesp", "3"], "did you mean --steps"),
        (["--method", "prefix-rtf"], "did you mean prefix-rft"),
        (["--config", "no.json"], "cannot be read"),
        (["--resume", "auto"], "give --out"),
        (["--hybrid_per_prompt", "8"], "hybrid_per_prompt is 8 of 8"),
        (
            ["--method", "luffy", "--rollouts_per_prompt", "2", "--hybrid_per_prompt", "2"],
            "hybrid_per_prompt is 2 of 2",
        ),
        (["--updates_per_step", "17"], "updates_per_step is 17"),
        (["--method", "rft", "--rollouts_per_prompt", "1"], "rollouts_per_prompt is 1, expected at least 2"),
        (["--clip_low", "0"], "clip_low is 0.0, expected 0.001 to 1"),
        (["--coefficient", "0.5"], "coefficient is 0.5, but prefix-rft has no coefficient; methods with one: .*luf"),
        (["--method", "hpt", "--gate", "8"], "gate is 8 of 8 rollouts_per_prompt, expected fewer"),
        (["--method", "chord-mu", "--coefficient", "1"], "coefficient is 1.0, expected less than 1: chord-mu gives"),
        (["--steps", "0"], "steps is 0, expected at least 1"),
        (["--scale_by_std", "maybe"], "expected true or false"),
    ],
)
def test_wrong_command_lines(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_config(argv)


def test_settings_that_a_method_does_not_read_contradict_nothing():
    assert parse_config(["--method", "sft", "--prompts_per_step", "1"]).prompts_per_step == 1
    assert parse_config(["--method", "luffy", "--coefficient", "3"]).coefficient == 3
    assert parse_config(["--method", "rft", "--gate", "8"]).gate == 8


def test_a_runs_own_config_can_be_given_back(tmp_path):
    config = parse_config(["--method", "rft", "--steps", "3"])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config) | {"made_of": {"data": "0123"}}))
    assert parse_config(["--config", str(tmp_path / "config.json")]) == config


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[1]", "expected a JSON object")])
def test_wrong_config_files(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*: write the settings as one object"):
        parse_config(["--config", str(tmp_path / "c.json")])
