"""These tests put faults into a run: kills, full disks, damaged files, a second process, numbers that are not finite.
Other tests check that no file of the project executes text or bytes that it reads."""

import ast
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import lives
import pytest
import torch
from test_step import make_run
from tiny import ALL_WRONG, BY_LENGTH, contents, random_model

import step as steps
import train
from loss import weighted_loss
from step import rl_step, sft_step
from support import checkpoint
from support.config import from_dict
from support.console import figures
from support.record import rl_metrics, sft_metrics
from train import new_optimizer

resource = pytest.importorskip("resource", reason="signals and limits of POSIX")
ROOT = Path(__file__).parents[1]

TINY = lives.RELIFT | {"steps": 2, "eval_every": 0, "rollouts_per_prompt": 2}


# ---- kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a folder with problems and, in its subfolder `whole`, a run that was never killed. Also returns how the
    run in `whole` ended."""
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    # no curves.png is drawn, because it takes a second per run
    patch.setattr(train, "draw_curves", lambda folder: "")
    folder = tmp_path_factory.mktemp("faults")
    life = lives.live(lives.training(folder / "whole", **lives.task(folder), **TINY), folder / "whole")
    assert life.code == 0 and lives.learned(folder / "whole"), life.output
    yield folder, life
    patch.undo()


@pytest.mark.parametrize("first", [2, 5, 8])
def test_killed_at_file_operations_again_and_again(whole, tmp_path, first):
    """Each start of the run is killed before a later file operation than the start before, and its folder is renamed.
    The last start is not killed and ends like a run that was never killed."""
    folder, life = whole
    out, kills = tmp_path / "0", range(first, life.operations, 9)
    for number, kill_at in enumerate(kills, 1):
        killed = lives.live(lives.training(out, **lives.task(folder), **TINY), out, kill_at=kill_at)
        if killed.code == 0:  # the run made fewer than kill_at file operations, so it was not killed
            break
        assert killed.code == -signal.SIGKILL, killed.output
        out = out.rename(tmp_path / str(number)) if out.exists() else out
    last = lives.live(lives.training(out, **lives.task(folder), **TINY), out)
    assert last.code == 0 and lives.differences(folder / "whole", out) == [], last.output
    assert len(kills) >= 3


def test_two_ranks_are_killed_and_go_on(whole, tmp_path):
    folder, life = whole
    work = {name: lives.training(tmp_path / name, **lives.task(folder), **TINY) for name in ("one", "two")}
    assert lives.live(work["one"], tmp_path / "one", ranks=2).code == 0
    killed = lives.live(work["two"], tmp_path / "two", ranks=2, kill_at=life.operations // 2)
    assert killed.code == -signal.SIGKILL and (tmp_path / "two" / "metrics.jsonl").exists()
    assert lives.live(work["two"], tmp_path / "two", ranks=2).code == 0
    assert lives.differences(tmp_path / "one", tmp_path / "two") == []


def test_a_killed_evaluation_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("eval.figure", lambda folder: "")
    words = lives.EVALUATION.split()
    first = lives.live(lives.evaluating(tmp_path / "one", words), tmp_path / "one")
    for kill_at in range(1, first.operations, 3):
        lives.live(lives.evaluating(tmp_path / "two", words), tmp_path / "two", kill_at=kill_at)
    assert lives.live(lives.evaluating(tmp_path / "two", words), tmp_path / "two").code == 0
    assert lives.evaluation_differences(tmp_path / "one", tmp_path / "two") == []
    before = contents(tmp_path / "one")
    with checkpoint.locked(tmp_path / "one"):
        second = lives.live(lives.evaluating(tmp_path / "one", words), tmp_path / "one")
    assert second.code == 2 and "another process is at work in it" in second.output
    assert contents(tmp_path / "one") == before


# ---- the folder


def test_a_second_process_is_kept_out(whole):
    """A second process in a run's folder ends with one line of error and writes nothing. The lock ends with the
    process that holds it, even if that process is killed."""
    folder, _ = whole
    before = contents(folder / "whole")
    with checkpoint.locked(folder / "whole"):
        second = lives.live(lives.training(folder / "whole", **lives.task(folder), **TINY), folder / "whole")
    assert second.code == 2 and second.output.count("\n") == 1
    assert f"{folder / 'whole'}: another process is at work in it" in second.output
    assert contents(folder / "whole") == before


@pytest.mark.parametrize("largest", [1000, 1_000_000], ids=["config.json", "the checkpoint"])
def test_a_full_disk_ends_a_run_in_one_line(whole, tmp_path, largest):
    """The test imitates a full disk: no file can grow beyond `largest` bytes. Resumed without the limit, the run ends
    with the same result as a run that never failed."""
    folder, _ = whole
    out = tmp_path / "run"
    work = lives.training(out, **lives.task(folder), **TINY)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        return work()

    with_limit = lives.live(limited, out)
    line = with_limit.output.splitlines()[-1]
    assert with_limit.code == 1 and "File too large" in line and "Traceback" not in line
    left = {path.name for path in out.rglob("*")}
    assert not any(name.endswith("partial") for name in left) and "final" not in left
    if largest > 1000:
        assert f"writing to {out}/" in line and "--resume auto" in line
    assert lives.live(work, out).code == 0
    assert lives.differences(folder / "whole", out) == []


def test_a_closed_output_is_not_taken_for_a_full_disk(whole, tmp_path):
    folder, _ = whole
    out, other = tmp_path / "run", tmp_path / "eval"
    training = lives.training(out, **lives.task(folder), **TINY)
    for work, place in ((training, out), (lives.evaluating(other, lives.EVALUATION.split()), other)):

        def unread(work=work):
            reader, writer = os.pipe()
            os.close(reader)
            sys.stdout = os.fdopen(writer, "w")
            return work()

        life = lives.live(unread, place)
        # the exit code is 141 (closed output) if the process had something left to print, else 1
        assert life.code in (1, 141) and life.output.count("\n") == 1, life.output
        assert "the output was closed; to go on: python " in life.output and str(place) in life.output
    assert lives.live(training, out).code == 0
    assert lives.differences(folder / "whole", out) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(whole, tmp_path):
    folder, _ = whole
    (tmp_path / "closed").mkdir(mode=0o500)
    out = tmp_path / "closed" / "run"
    life = lives.live(lives.training(out, **lives.task(folder), **TINY), out)
    assert life.code == 2 and "Permission denied" in life.output and life.output.count("\n") == 1


# ---- the checkpoint


def saved(tokenizer, folder: Path, done=(1, 2, 3), **settings) -> steps.Run:
    """Returns a run with a checkpoint at each step of `done`. One weight is the number of the step, to tell the
    checkpoints apart."""
    run = make_run(tokenizer, **settings)
    run.optimizer = new_optimizer(run.model, run.config)
    for number in done:
        run.model.lm_head.weight.data[0, 0] = number
        checkpoint.save(folder, number, run)
    return run


def test_the_last_two_checkpoints_are_kept(tokenizer, tmp_path):
    saved(tokenizer, tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000003.pt", "step-00000002.pt"]


def test_a_copy_of_a_checkpoint_is_neither_used_nor_removed(tokenizer, tmp_path):
    """Copies of checkpoint files do not count among the two checkpoints that a run keeps."""
    run = saved(tokenizer, tmp_path, done=(1, 2))
    newest = checkpoint.checkpoints(tmp_path)[0]
    copies = [newest.with_name(name) for name in ("step-best.pt", "step-00000002-copy.pt", "step-000000009.pt")]
    for copy in copies:
        shutil.copy(newest, copy)
    assert checkpoint.load(tmp_path, run) == 2
    checkpoint.save(tmp_path, 3, run)
    left = {path.name for path in newest.parent.iterdir()} - {copy.name for copy in copies}
    assert left == {"step-00000003.pt", newest.name} and all(copy.exists() for copy in copies)


@pytest.mark.parametrize("damage", [lives.flip, lives.cut, lambda path: path.write_bytes(b"")])
def test_of_a_damaged_checkpoint_the_older_one_is_used(tokenizer, tmp_path, damage):
    """The older checkpoint is kept until a new one is whole, even if the damaged checkpoint has a later step than
    both."""
    run = saved(tokenizer, tmp_path, done=(1, 2, 5))
    newest, older = checkpoint.checkpoints(tmp_path)
    damage(newest)
    assert checkpoint.load(tmp_path, run) == 2 and run.model.lm_head.weight[0, 0] == 2
    assert newest.exists()  # loading does not remove a damaged checkpoint
    checkpoint.save(tmp_path, 3, run)
    newest = checkpoint.checkpoint_file(tmp_path, 3)
    assert checkpoint.checkpoints(tmp_path) == [newest, older]
    damage(newest), damage(older)
    with pytest.raises(ValueError, match=f"{newest} is damaged, and so is every older checkpoint: restore it"):
        checkpoint.load(tmp_path, run)


def test_no_flipped_bit_goes_unseen(tokenizer, tmp_path):
    """Single bits are flipped at random places of a checkpoint. Reading notices each flipped bit, or the bit is in
    padding and has no effect."""
    saved(tokenizer, tmp_path, done=(1,))
    path = checkpoint.checkpoints(tmp_path)[0]
    data, draw, result = path.read_bytes(), random.Random(0), 0
    want = torch.load(path, weights_only=True)
    places = [draw.randrange(len(data)) for _ in range(60)] + [
        len(data) - draw.randrange(3000) - 1 for _ in range(60)
    ]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        got = checkpoint.read_checkpoint(path)
        result += got is None
        assert got is None or lives.equal(got, want)
    assert result > 60


def test_checkpoints_of_others_are_refused(tokenizer, tmp_path):
    saved(tokenizer, tmp_path, done=(1,))
    other = make_run(tokenizer, model=random_model(hidden_size=16))
    with pytest.raises(ValueError, match=r"is the checkpoint of another model: \S+ differs"):
        checkpoint.load(tmp_path, other)
    with pytest.raises(ValueError, match=r"of a run with other settings \(lr, seed\)"):
        checkpoint.load(tmp_path, make_run(tokenizer, lr=1.0, seed=3))
    # the settings micro_batch_tokens and out are allowed to change on resume
    run = make_run(tokenizer, micro_batch_tokens=60, out="moved")
    run.optimizer = new_optimizer(run.model, run.config)
    assert checkpoint.load(tmp_path, run) == 1


def test_logs_that_do_not_fit_the_checkpoint_are_refused(tmp_path):
    rows = [{"step": number} for number in (1, 2, 3)]
    for wrong in ([], rows[1:], rows[:1] + rows, [rows[0], rows[2]]):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        checkpoint.append_rows(tmp_path / "metrics.jsonl", wrong)
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="steps 1 to 3 once each: restore it, or delete"):
            checkpoint.cut_logs(tmp_path, 3)
        assert contents(tmp_path) == before


def test_a_run_killed_before_its_settings_were_written_starts(tmp_path):
    config = from_dict({"out": str(tmp_path), "resume": "auto"})
    (tmp_path / "lock").touch()
    (tmp_path / "config.json.partial").write_text("{")
    checkpoint.check_folder(config)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds no run"):
        checkpoint.check_folder(config)


# ---- numbers


def break_gradients(run: steps.Run, times: int, value: float = torch.nan) -> None:
    """Put `value` into the first column of the output head's gradient, the next `times` times that the gradient is
    computed."""
    left = [times]

    def spoil(gradient):
        left[0] -= 1
        return torch.where(torch.arange(gradient.shape[1]) == 0, value, gradient) if left[0] >= 0 else gradient

    run.model.lm_head.weight.register_hook(spoil)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_update_without_finite_gradient_is_skipped(tokenizer, value):
    """A skipped update changes neither weights nor optimizer, and the next update is made. The metrics count the
    skipped update and are valid JSON."""
    run = make_run(tokenizer, updates_per_step=1, micro_batch_tokens=10**6)
    run.optimizer = new_optimizer(run.model, run.config)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    break_gradients(run, 2, value)
    for number in (0, 1):
        metrics = rl_metrics(run, rl_step(run, number))
        assert metrics["skipped_updates"] == 1 and run.skipped == number + 1
        assert metrics["loss"] is None and metrics["grad_norm"] is None
        assert figures(metrics)["length"]  # train.py can make a step's progress line although the loss is null
        json.dumps(metrics, allow_nan=False)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.model.named_parameters())
    assert not run.optimizer.state
    metrics = rl_metrics(run, rl_step(run, 2))
    assert metrics["skipped_updates"] == 0 and run.skipped == 0 and metrics["grad_norm"] > 0


def test_an_update_with_an_infinite_loss_is_skipped(tokenizer, monkeypatch):
    """The test adds infinity to the loss, which leaves the loss's gradient finite."""
    run = make_run(tokenizer, updates_per_step=1, micro_batch_tokens=10**6)
    run.optimizer = new_optimizer(run.model, run.config)
    monkeypatch.setattr(steps, "weighted_loss", lambda *words: weighted_loss(*words) + torch.inf)
    assert rl_metrics(run, rl_step(run, 0))["skipped_updates"] == 1
    assert not run.optimizer.state


def test_an_update_in_which_no_token_has_a_weight_moves_nothing(tokenizer):
    """The weights stay the same even though AdamW has moments from the step before."""
    run = make_run(tokenizer, updates_per_step=1, micro_batch_tokens=10**6)
    run.optimizer = new_optimizer(run.model, run.config)
    assert rl_metrics(run, rl_step(run, 0))["grad_norm"] > 0
    before, run.reward = [p.clone() for p in run.model.parameters()], ALL_WRONG
    assert rl_metrics(run, rl_step(run, 1))["grad_norm"] == 0
    assert all(map(torch.equal, run.model.parameters(), before))


def test_a_model_that_gives_nan_is_never_updated(tokenizer):
    """If a model gives NaN, its update is skipped even if all rewards are equal and no token has a weight."""
    run = make_run(tokenizer, reward=dataclasses.replace(BY_LENGTH, function=lambda text, problem: 0.0))
    run.model.lm_head.weight.data[0] = torch.nan
    metrics = rl_metrics(run, rl_step(run, 0))
    assert metrics["skipped_updates"] == run.config.updates_per_step
    json.dumps(metrics, allow_nan=False)
    run = make_run(tokenizer, "sft")
    run.model.lm_head.weight.data[0] = torch.nan
    metrics = sft_metrics(sft_step(run, run.data.supervised, 0, run.optimizer, 0.1), 0.1)
    assert metrics["skipped_updates"] == 1 and metrics["loss"] is metrics["grad_norm"] is metrics["entropy"] is None
    assert "loss" not in figures(metrics)


def test_a_skipped_update_is_left_out_of_its_steps_mean_loss(tokenizer, monkeypatch):
    run = make_run(tokenizer, updates_per_step=2, rollouts_per_prompt=8, micro_batch_tokens=10**6)
    run.optimizer = new_optimizer(run.model, run.config)
    sums, made = [], steps.update

    def second_broken(*args):
        if sums:
            break_gradients(run, 1)
        sums.append(made(*args))
        return sums[-1]

    monkeypatch.setattr(steps, "update", second_broken)
    metrics = rl_metrics(run, rl_step(run, 0))
    assert metrics["skipped_updates"] == 1 and sums[0]["grad_norm"] > 0
    assert (metrics["loss"], metrics["grad_norm"]) == (sums[0]["loss"], sums[0]["grad_norm"])


def test_skips_in_a_row_are_remembered_by_the_checkpoint(tokenizer, tmp_path):
    run = make_run(tokenizer)
    run.skipped = 2
    checkpoint.save(tmp_path, 1, run)
    other = make_run(tokenizer)
    assert checkpoint.load(tmp_path, other) == 1 and other.skipped == 2


@pytest.mark.parametrize("module, function", [(train, "load_model"), (steps, "generate"), (steps, "token_weights")])
def test_full_memory_names_the_settings(whole, tmp_path, monkeypatch, capsys, module, function):
    folder, _ = whole

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 24 GiB in all.")

    monkeypatch.setattr(module, function, full)
    monkeypatch.setattr(train, "score", lambda run, who: {"validation": {}, "test": {}, "test_sampled": {}})
    with pytest.raises(SystemExit) as stop:
        lives.training(tmp_path / "run", **lives.task(folder), **TINY)()
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1 and "Tried to allocate 2.00 GiB" in message
    assert "micro_batch_tokens (2048)" in message and "python plan.py" in message


# ---- what the sources never do

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
SOURCES = [path for path in ROOT.rglob("*.py") if not {"runs", "tests", ".venv"} & set(path.relative_to(ROOT).parts)]


def unsafe(tree: ast.AST) -> list[str]:
    """Returns the names of calls and imports that may execute text or bytes which the program reads."""
    result = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            result += [name for name in names if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")]
        if not isinstance(node, ast.Call):
            continue
        called, inputs = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        result += [called] if called in FORBIDDEN | {"os.system", "os.popen"} else []
        result += ["shell=True"] if inputs.get("shell", "False") != "False" else []
        result += ["trust_remote_code"] if inputs.get("trust_remote_code", "False") != "False" else []
        result += ["torch.load"] if called == "torch.load" and inputs.get("weights_only") != "True" else []
        result += ["numpy.load"] if inputs.get("allow_pickle", "False") != "False" else []
    return result


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_run_nothing_they_read(path):
    assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_unsafe_calls_are_seen():
    bad = "eval(x); exec(x); import pickle; run(a, shell=True); load(p, trust_remote_code=True); torch.load(p)"
    assert len(unsafe(ast.parse(bad))) == 6 and len(SOURCES) > 40
