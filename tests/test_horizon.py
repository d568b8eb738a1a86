"""These tests check results/horizon.py: the order of the jobs, and the settings that the trials choose. Each run
trains as train.py does, and a command that was stopped repeats no finished job."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.make_recipes import make_splits
from results import horizon
from results.horizon import CELLS, METHODS, Job
from train import train


def stored_trial(job: Job, settings: dict, score: float) -> dict:
    return {
        "settings": settings,
        "budgets": {str(job.steps): {name: {"all": score} for name in horizon.TEMPERATURES}},
    }


def play(method: str, score) -> tuple[list[dict], dict]:
    """Returns the settings of four trials with the accuracy `score(settings)`, and the settings that runs take over
    from these trials."""
    stored, tried = {}, []
    for number in (1, 2, 3, 4):
        job = Job("habit-512", method, 0, trial=number)
        assert horizon.settings_of(Job("habit-32", method, 2), stored) is None
        tried.append(horizon.settings_of(job, stored))
        stored[job.name] = stored_trial(job, tried[-1], score(tried[-1]))
    return tried, horizon.settings_of(Job("habit-32", method, 2), stored)


def test_the_plan_has_every_run_once_and_the_primary_contrast_first():
    jobs = horizon.plan()
    assert len({job.name for job in jobs}) == len(jobs)
    runs = [job for job in jobs if job.method != "base" and not job.trial]
    expected = {(c, m, b, 480) for c, cell in CELLS.items() for m in METHODS for b in range(cell.bases)}
    expected |= {
        (c, "prefix-rft", b, s) for c, cell in CELLS.items() for b in range(cell.bases) for s in (60, 120, 240)
    }
    assert {(job.cell, job.method, job.base, job.steps) for job in runs} == expected
    assert Counter((job.cell, job.method) for job in jobs if job.trial) == {
        (cell, method): 4 for cell in ("habit-512", "silent-128") for method in METHODS
    }
    assert {job.method for job in jobs[: jobs.index(Job("habit-512", "sft-rft", 5)) + 1]} == {"base", *METHODS[:2]}
    bases = [job.base for job in runs[:12]]
    assert all(first <= second for first, second in pairwise(bases))


def test_trials_walk_to_the_better_rate_and_then_try_the_second_setting():
    tried, best = play("sft-rft", lambda s: -s["lr"] + s.get("sft_lr_end", 0))
    assert (
        tried == [{"lr": 1e-4}, {"lr": 5e-5}, {"lr": 2.5e-5}, {"lr": 2.5e-5, "sft_lr_end": 0.1}] and best == tried[3]
    )
    tried, best = play("prefix-rft", lambda s: -abs(s["lr"] - 1e-4))
    assert tried[2:] == [{"lr": 2e-4}, {"lr": 1e-4, "entropy_keep": 0.5}] and best == {"lr": 1e-4}
    diverged = {"settings": {}, "budgets": {"480": {"diverged": 3}}}
    assert horizon.trial_score(diverged) == 0


def test_each_base_has_test_problems_of_its_own_that_no_run_trains_on(tmp_path, monkeypatch):
    monkeypatch.setattr(horizon, "WORK", tmp_path)
    monkeypatch.setattr(Job, "model", tmp_path)
    tests = []
    for base in range(6):
        horizon.make_files(Job("silent-8", "rft", base))
        tests.append([json.loads(text)["problem"] for text in (tmp_path / f"test{base}.jsonl").open()])
    old = {row["problem"] for rows in make_splits().values() for row in rows}
    assert all(len(set(problems)) == 800 and not old & set(problems) for problems in tests)
    # the test problems of two base models have only a few easy ones in common
    assert sum(len(set(tests[0]) & set(other)) for other in tests[1:]) < 20
    rows = [json.loads(text) for text in (tmp_path / "silent-8.jsonl").open()]
    assert len(rows) == 128 and all("demonstrations" in row and row["problem"].count(";") == 6 for row in rows)


@pytest.mark.parametrize("method", ["sft-rft", "prefix-rft"])
def test_a_run_trains_as_train_py_does_and_again_finds_it_the_same(method, tmp_path, monkeypatch):
    monkeypatch.setattr(horizon, "WORK", tmp_path)
    monkeypatch.setattr(horizon, "BUDGETS", (2, 3))
    monkeypatch.setattr(horizon, "SUPERVISED", 1)
    monkeypatch.setattr(horizon, "accuracy", lambda *_: {"all": {"accuracy": 0.5}})
    job = Job("habit-512", method, 0, 3)
    message = horizon.make(job, {"lr": 1e-4, "prompts_per_step": 2, "sft_steps": 2}, tmp_path)
    line = json.loads((tmp_path / f"{job.name}.json").read_text())
    assert "T = 0.6 0.5" in message and list(line["budgets"]) == (["3"] if method == "prefix-rft" else ["2", "3"])
    last = line["budgets"]["3"]
    assert last["sampled"] > 0 and (last["supervised"] > 0) == (method == "sft-rft")
    assert horizon.again(tmp_path, job.name)

    config = horizon.configuration(job, line["settings"])
    settings = {"out": str(tmp_path / "run"), "eval_data": "", "test_data": ""}
    few = make_splits()["validation"][:1]
    (tmp_path / "few.jsonl").write_text(json.dumps(few[0]) + "\n")
    settings |= {"eval_data": str(tmp_path / "few.jsonl"), "test_data": str(tmp_path / "few.jsonl")}
    assert train(horizon.from_dict(vars(config) | settings)) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype=torch.float32)
    run = type("Run", (), {"model": model})
    assert horizon.measure(run, "test")["weights"] == last["weights"]


def test_a_stopped_command_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    made = []

    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def submit(self, function, job, settings, store):
            made.append(job)
            if len(made) == 3:
                raise KeyboardInterrupt
            (store / f"{job.name}.json").write_text(json.dumps(stored_trial(job, settings, 0.5)))
            future = horizon.Future()
            future.set_result(job.name)
            return future

    jobs = [Job("habit-512", "rft", 0, trial=number) for number in (1, 2, 3, 4)] + [Job("habit-512", "rft", 0)]
    monkeypatch.setattr(horizon, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(horizon, "plan", lambda: jobs)
    with pytest.raises(KeyboardInterrupt):
        horizon.run_all(tmp_path, 2)
    horizon.run_all(tmp_path, 2)
    assert made == [*jobs[:3], *jobs[2:]]
