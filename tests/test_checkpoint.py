"""These tests check each promise of support/checkpoint.py by itself: whole files, restored states, settings that may
change on resume, fingerprints, and folders that belong to one run. Whole runs that are killed and resumed are in
test_faults.py."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import torch
from lives import equal
from test_step import make_run
from tiny import contents, random_model

from support import checkpoint
from support.config import Config, from_dict
from support.errors import InputError, Unwritten
from train import new_optimizer

# the settings in MAY_CHANGE are allowed to change on resume, because they choose files or devices, or change results
# only by rounding
MAY_CHANGE = "accept_changed device micro_batch_tokens offload out recompute resume rows_per_call save_dtype"
MAY_CHANGE += " save_every tensorboard"


def with_moments(tokenizer, **settings):
    """Returns a run of ReLIFT with one problem in its buffer of unsolved problems. The run's two optimizers have made
    an update each, on different gradients."""
    run = make_run(tokenizer, "relift", **settings)
    run.optimizer, run.collector.optimizer = (new_optimizer(run.model, run.config) for _ in range(2))
    for scale, optimizer in ((1.0, run.optimizer), (3.0, run.collector.optimizer)):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
        optimizer.zero_grad()
    run.collector.waiting.append("p1")
    return run


def test_every_state_of_a_run_is_restored(tokenizer, tmp_path):
    saved, resumed = with_moments(tokenizer), make_run(tokenizer, "relift", model=random_model(seed=1))
    resumed.optimizer, resumed.collector.optimizer = (new_optimizer(resumed.model, saved.config) for _ in range(2))
    saved.skipped = 2
    checkpoint.save(tmp_path, 7, saved)
    assert checkpoint.load(tmp_path, resumed) == 7
    states = [
        (run.model.state_dict(), run.optimizer.state_dict(), run.collector.optimizer.state_dict(), run.skipped)
        for run in (saved, resumed)
    ]
    assert equal(*states) and resumed.collector.waiting == ["p1"]
    assert not equal(states[1][1]["state"], states[1][2]["state"])  # ReLIFT's second optimizer has a state of its own


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tokenizer, tmp_path, monkeypatch):
    """A new checkpoint, even of the same step, is written beside the old one and renamed when it is whole."""
    run = make_run(tokenizer)
    checkpoint.save(tmp_path, 1, run)
    before = contents(tmp_path)

    def half(state, file):
        file.write(b"half")
        raise OSError(28, "No space left")

    monkeypatch.setattr(torch, "save", half)
    for step in (1, 2):
        with pytest.raises(Unwritten, match="No space left"):
            checkpoint.save(tmp_path, step, run)
        assert contents(tmp_path) == before


def test_the_settings_that_may_change_are_these():
    kept = checkpoint.settings_of(Config())
    assert sorted(set(Config.__dataclass_fields__) - kept.keys()) == MAY_CHANGE.split()


@pytest.mark.parametrize("name", ["temperature", "eval_samples", "seed", "data"])
def test_a_run_goes_on_with_its_own_settings_only(tokenizer, tmp_path, name):
    """A run that resumes compares its settings with those in config.json and with those in the checkpoint."""
    config = from_dict({"out": str(tmp_path), "resume": "auto"})
    checkpoint.write_config(tmp_path, config, {})
    checkpoint.save(tmp_path, 1, make_run(tokenizer))
    other = from_dict(config.__dict__ | {name: "x" if name == "data" else getattr(config, name) + 1})
    checkpoint.check_folder(config)
    with pytest.raises(InputError, match=rf"a run with other settings \({name} "):
        checkpoint.check_folder(other)
    with pytest.raises(InputError, match=rf"a run with other settings \(.*{name}"):
        checkpoint.load(tmp_path, make_run(tokenizer, **{name: getattr(other, name)}))


@pytest.mark.parametrize("missing", ["in the file", "in the model"])
def test_a_checkpoint_without_a_parameter_is_refused(tokenizer, tmp_path, missing):
    run = make_run(tokenizer)
    checkpoint.save(tmp_path, 1, run)
    path = checkpoint.checkpoints(tmp_path)[0]
    state = torch.load(path, weights_only=True)
    if missing == "in the file":
        del state["model"]["model.norm.weight"]
    else:
        state["model"]["another"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(
        InputError, match=r"is the checkpoint of another model: (model\.norm\.weight|another) differs"
    ):
        checkpoint.load(tmp_path, run)


@pytest.mark.parametrize("steps", [[1, 1, 3], [1, 3, 2], [2, 3, 4], [1, 2]])
def test_rows_of_metrics_are_compared_with_the_steps(tmp_path, steps):
    """metrics.jsonl must have each step once, in order. A log with the right number of rows but wrong step numbers is
    refused."""
    checkpoint.append_rows(tmp_path / "metrics.jsonl", [{"step": step} for step in steps])
    with pytest.raises(InputError, match="steps 1 to 3 once each"):
        checkpoint.cut_logs(tmp_path, 3)


def test_a_fingerprint_covers_every_byte_of_every_file(tmp_path):
    """Files are read in blocks of 16 MiB. The test changes the last byte of the second file, which lies behind the
    first block."""
    content = {name: bytes([number]) * (2**24 + 1) for number, name in enumerate(("a", "b"))}
    for name, data in content.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    wanted = hashlib.sha256(b"".join(content.values())).hexdigest()
    assert checkpoint.model_fingerprint(str(tmp_path), None) == wanted
    (tmp_path / "b.safetensors").write_bytes(content["b"][:-1] + b"x")
    assert checkpoint.model_fingerprint(str(tmp_path), None) != wanted


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_fingerprint_covers_how_the_weights_are_used(tmp_path, name):
    for path in Path("data/base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = checkpoint.model_fingerprint(str(tmp_path), None)
    assert before == checkpoint.model_fingerprint("data/base", None)
    settings = json.loads((tmp_path / name).read_bytes())
    (tmp_path / name).write_text(json.dumps(settings | {"rope_theta": 10.0, "eos_token_id": 5}), encoding="utf-8")
    assert checkpoint.model_fingerprint(str(tmp_path), None) != before


def test_a_log_without_rows_is_no_file(tmp_path):
    checkpoint.append_rows(tmp_path / "groups.jsonl", [])
    assert not any(tmp_path.iterdir())


def test_a_noted_system_message_that_is_no_text_is_named(tmp_path):
    (tmp_path / checkpoint.REMEMBERED).write_text('{"system": 3, "reward": "math"}', encoding="utf-8")
    with pytest.raises(InputError, match=f"{checkpoint.REMEMBERED}: system is 3, expected a text or null"):
        checkpoint.trained_with(str(tmp_path))


def test_a_new_run_takes_a_folder_that_nobody_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = from_dict({"method": "rft"})
    taken = [checkpoint.new_folder(config) for _ in range(3)]
    assert [folder.as_posix() for folder in taken] == ["runs/rft-001", "runs/rft-002", "runs/rft-003"]


def test_a_run_that_another_process_began_meanwhile_is_left_alone(tmp_path, monkeypatch):
    """The other process begins its run after this process has checked the folder and before this process locks the
    folder."""
    config, locked = from_dict({"out": str(tmp_path / "run"), "resume": "auto"}), checkpoint.locked

    @contextlib.contextmanager
    def late(folder):
        other = json.dumps(config.__dict__ | {"lr": 0.5, "made_of": {}})
        (folder / "config.json").write_text(other, encoding="utf-8")
        with locked(folder):
            yield

    monkeypatch.setattr(checkpoint, "locked", late)
    with pytest.raises(InputError, match=r"other settings \(lr 0.5\)"), checkpoint.opened(config, {}):
        pass


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, monkeypatch):
    """new_folder raises an error before a model is loaded, even if the folder exists already."""

    def closed(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", closed)
    with pytest.raises(InputError, match=r"cannot be written to \(Read-only file system\): give another --out"):
        checkpoint.new_folder(from_dict({"out": str(tmp_path), "resume": "auto"}))
