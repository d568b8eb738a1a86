"""What a run warns of, once each, and which settings a method reads."""

import dataclasses
import json

import lives
import pytest
import torch
from conftest import ALL_WRONG
from test_step import make_run

import step as steps
import train
from methods import METHODS, uncertain_means, variant, zero
from step import rl_step, sft_step
from support.config import Config, from_dict, given_settings, unread_settings
from support.record import rl_metrics, sft_metrics
from support.watch import FIRST, LONG, SHORT, Watch


def row(step: int, **changes) -> dict:
    """A step at which there is nothing to warn of."""
    usual = {
        "grad_norm": 0.1,
        "skipped_updates": 0,
        "truncated": 0.1,
        "unread": 0.0,
        "hybrid_rows": 3,
        "entropy": 0.5,
        "reward_on_policy": 0.4 + 0.1 * (-1) ** step,
        "clip_fraction": 0.01,
        "trained_tokens": 500,
    }
    return {"step": step, "reward": 0.5, "surprise": 0.01 * (-1) ** step, "log_prob_gap": 1e-6} | usual | changes


@pytest.mark.parametrize(
    "name, changes, at",
    [
        ("no_gradient", {"grad_norm": 0.0}, SHORT),
        ("entropy_collapse", {"entropy": 0.001}, SHORT),
        ("no_hybrid", {"hybrid_rows": 0}, LONG),
        ("surprise", {"surprise": 0.05}, LONG),
        ("skipped", {"skipped_updates": 1}, 1),
        ("log_prob_gap", {"log_prob_gap": 4e-4}, 1),
        ("clipped", {"clip_fraction": 0.16}, 1),
        ("reward_lost", {"reward_on_policy": 0.01}, SHORT),
        ("truncated", {"truncated": 0.6}, 1),
        ("unread", {"unread": 0.51}, 1),
    ],
)
def test_each_warning_is_said_once_when_it_is_due(name, changes, at):
    watch = Watch(METHODS["prefix-rft"], {})
    for number in range(1, FIRST + 1):
        assert watch.look(row(number)) == {}
    said = [watch.look(row(FIRST + number, **changes)) for number in range(1, 3 * LONG)]
    due = [number for number, new in enumerate(said, 1) if new]
    assert [list(new) for new in said if new] == [[name]] and list(watch.said) == [name]
    assert due == [at] or (name == "surprise" and due[0] <= at), due
    assert watch.said[name].startswith(f"step {FIRST + due[0]}: ")
    again = Watch(METHODS["prefix-rft"], {})  # a run that goes on, shown the rows of the first part
    for number in range(1, FIRST + due[0]):
        again.recall(row(number, **(changes if number > FIRST else {})))
    assert again.look(row(FIRST + due[0], **changes)) == said[due[0] - 1]


def test_a_run_that_goes_on_elsewhere_recalls_what_was_said_and_nothing_else():
    """bf16 rounds more than fp32: what was no fault on a GPU is none on the CPU the run goes on with."""
    rounded = row(1, log_prob_gap=0.01)
    assert list(Watch(METHODS["rft"], {}).look(rounded)) == ["log_prob_gap"]
    assert Watch(METHODS["rft"], {}, torch.bfloat16).look(rounded) == {}
    assert Watch(METHODS["rft"], {}, torch.bfloat16).look(row(1, log_prob_gap=0.1))
    watch = Watch(METHODS["rft"], {})
    watch.recall(rounded)
    watch.recall(row(2, skipped_updates=1, warnings={"skipped": "step 2: as it was said"}))
    assert watch.said == {"skipped": "step 2: as it was said"}


@pytest.mark.parametrize("method", ["sft-rft", "relift"])
@pytest.mark.parametrize("weight", [zero, uncertain_means], ids=["zero", "zero at p = 1, which the batch has"])
def test_updates_on_demonstrations_without_weight_are_told(tokenizer, method, weight):
    """Of the sft stage and of ReLIFT; an update that was skipped is not one of them."""
    for given in (METHODS[method], variant(METHODS[method], demonstration_weight=weight)):
        run, watch = make_run(tokenizer, method, reward=ALL_WRONG, relift_buffer=2, lr=0.0), Watch(given, {})
        run.method = given
        if run.collector:
            metrics = rl_metrics(run, rl_step(run, 0))
            assert metrics["relift_updates"] == 1
        else:
            metrics = sft_metrics(sft_step(run, run.data.supervised[:3], 0, run.optimizer, 0.1), 0.1)
        told = watch.look({"step": 1, **metrics}).get("no_weight", "")
        assert ("demonstration_weight (methods.METHODS) is 0" in told) is (given is not METHODS[method])
    skipped = {"trained_tokens": 0, "skipped_updates": 1}
    assert list(Watch(given, {}).look({"step": 1, "grad_norm": 0.0, "entropy": 0.0} | skipped)) == ["skipped"]


def test_nothing_is_said_of_a_run_without_faults():
    """Nor of steps without hybrid rows where the method has none, nor of supervised steps."""
    watch = Watch(METHODS["rft"], {})
    supervised = {"skipped_updates": 0, "grad_norm": 0.0, "entropy": 0.0, "trained_tokens": 9}
    for number in range(1, 60):
        found = watch.look({"step": number, **supervised} if number < 20 else row(number, hybrid_rows=0))
        assert found == {}


@pytest.mark.parametrize("sampled_at, warned", [(1.0, False), (0.8, True)])
def test_a_sampler_of_another_temperature_is_noticed(tokenizer, monkeypatch, sampled_at, warned):
    """At once by the sampler's own log-probs; later also by those and entropies of the training pass alone."""
    honest, watch = steps.generate, Watch(METHODS["rft"], {})

    def generate(model, tokenizer, rows, budget, temperature, **settings):
        return honest(model, tokenizer, rows, budget, sampled_at, **settings)

    monkeypatch.setattr(steps, "generate", generate)
    run = make_run(tokenizer, "rft", prompts_per_step=2, updates_per_step=1, lr=0.0)
    for number in range(LONG):
        watch.look({"step": number + 1, **rl_metrics(run, rl_step(run, number))})
        assert ("log_prob_gap" in watch.said) is warned
    assert ("surprise" in watch.said) is warned
    assert not warned or "less surprising than the training pass expects" in watch.said["surprise"]


def test_settings_not_read_and_rejected_demonstrations_are_told(tmp_path, monkeypatch, capsys):
    """At the start and at the end; only those of the command line."""
    monkeypatch.chdir(lives.ROOT)
    monkeypatch.setattr(train, "draw_curves", lambda folder: "")
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"clip_high": 0.3, "relift_lr": 1e-5}))
    files = lives.task(tmp_path)
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    rows[0]["demonstrations"] = ["\\boxed{no}"]
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = lives.SETTINGS | {"method": "rft", "config": config, "entropy_keep": 0.5, "steps": 1}
    with pytest.raises(SystemExit) as stop:
        lives.training(tmp_path / "run", **files, **given)()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert stop.value.code == 0
    assert said.count("warning: rft does not read entropy_keep") == 2 and not any(
        "clip_high" in line for line in said
    )
    assert said.count("warning: 1 demonstrations are left out: their own reward says they are not right") == 2


OTHER = {  # another value of each setting that only some methods read
    "steps": 12,
    "prompts_per_step": 3,
    "rollouts_per_prompt": 5,
    "hybrid_per_prompt": 2,
    "temperature": 1.3,
    "updates_per_step": 1,
    "coefficient": 0.5,
    "baseline": "group",
    "scale_by_std": True,
    "entropy_keep": 0.7,
    "clip_low": 0.001,
    "clip_high": 0.001,
    "gate": 2,
    "lr": 0.5,
    "sft_lr": 0.5,
    "sft_steps": 9,
    "sft_batch": 2,
    "relift_lr": 0.5,
    "relift_buffer": 1,
    "demonstration_fraction": 0.0,
    "sft_data": "other.jsonl",
}
NOT_IN_A_STEP = {
    "steps",
    "sft_data",
    "sft_steps",
    "sft_batch",
    "sft_lr",
    "demonstration_fraction",
}  # read by train.py


def two_steps(tokenizer, method: str, **settings):
    """Metrics and weights after two steps at a rate at which the second update clips."""
    run = make_run(tokenizer, method, **({"lr": 0.3, "relift_lr": 0.3, "relift_buffer": 2} | settings))
    if run.config.demonstration_fraction == 0:
        run.data.encoded = [dataclasses.replace(problem, demonstrations=[]) for problem in run.data.encoded]
    if run.method.stages == ("sft",):
        steps_of_run = [sft_step(run, run.data.supervised[:3], number, run.optimizer, 0.1) for number in (0, 5)]
        log = [sft_metrics(result, 0.1) for result in steps_of_run]
    else:
        log = [rl_metrics(run, rl_step(run, number)) for number in (0, 5)]
    log = [
        {k: v for k, v in m.items() if not k.startswith(("seconds", "tokens_per", "lr", "relift_lr"))} for m in log
    ]
    return log, [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_counts_as_read_exactly_if_it_changes_something(tokenizer, method):
    """All that a method does not read, changed together: the same to the bit. Same seed, same metrics, too."""
    unread = unread_settings(from_dict({"method": method}))
    assert unread <= OTHER.keys() <= {field.name for field in dataclasses.fields(Config)}
    usual = two_steps(tokenizer, method)
    changed = {name: value for name, value in OTHER.items() if name in unread and name != "coefficient"}
    assert lives.equal(two_steps(tokenizer, method, **changed), usual)
    if method in ("prefix-rft", "rft-entropy-clip", "chord-phi", "relift"):
        for name in OTHER.keys() - unread - NOT_IN_A_STEP:
            assert not lives.equal(two_steps(tokenizer, method, **{name: OTHER[name]}), usual), name


def test_names_of_a_command_line():
    assert given_settings(["--lr", "1", "--entropy_keep=0.5", "--config", "x.json"]) == [
        "lr",
        "entropy_keep",
        "config",
    ]
