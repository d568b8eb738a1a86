"""These tests check the warnings that a run gives, once each."""

import json

import lives
import pytest
import torch
from test_step import make_run
from tiny import ALL_WRONG

import step as steps
import train
from methods import METHODS, uncertain_means, variant, zero
from step import rl_step, sft_step
from support.record import rl_metrics, sft_metrics
from support.watch import FIRST, LONG, SHORT, Watch


def row(step: int, **changes) -> dict:
    """Returns the metrics of a step that gives no warning, updated by `changes`."""
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
        ("copied", {"copied": 0.04}, 1),
    ],
)
def test_each_warning_is_said_once_when_it_is_due(name, changes, at):
    watch = Watch(METHODS["prefix-rft"], {})
    for number in range(1, FIRST + 1):
        assert watch.look(row(number)) == {}
    message = [watch.look(row(FIRST + number, **changes)) for number in range(1, 3 * LONG)]
    due = [number for number, new in enumerate(message, 1) if new]
    assert [list(new) for new in message if new] == [[name]] and list(watch.warnings) == [name]
    assert due == [at] or (name == "surprise" and due[0] <= at), due
    assert watch.warnings[name].startswith(f"step {FIRST + due[0]}: ")
    again = Watch(METHODS["prefix-rft"], {})  # a resumed run gives Watch.recall the rows of metrics.jsonl
    for number in range(1, FIRST + due[0]):
        again.recall(row(number, **(changes if number > FIRST else {})))
    assert again.look(row(FIRST + due[0], **changes)) == message[due[0] - 1]


def test_a_run_that_goes_on_elsewhere_recalls_what_was_said_and_nothing_else():
    """A log_prob_gap that is only rounding in bf16 would give a warning in fp32. If a run continues in fp32 after
    steps in bf16, it does not warn of the bf16 steps."""
    rounded = row(1, log_prob_gap=0.01)
    assert list(Watch(METHODS["rft"], {}).look(rounded)) == ["log_prob_gap"]
    assert Watch(METHODS["rft"], {}, torch.bfloat16).look(rounded) == {}
    assert Watch(METHODS["rft"], {}, torch.bfloat16).look(row(1, log_prob_gap=0.1))
    watch = Watch(METHODS["rft"], {})
    watch.recall(rounded)
    watch.recall(row(2, skipped_updates=1, warnings={"skipped": "step 2: as it was said"}))
    assert watch.warnings == {"skipped": "step 2: as it was said"}


@pytest.mark.parametrize("method", ["sft-rft", "relift"])
@pytest.mark.parametrize("weight", [zero, uncertain_means], ids=["zero", "zero without own tokens, as here"])
def test_updates_on_demonstrations_without_weight_are_told(tokenizer, method, weight):
    """If a method gives demonstrations the weight 0, its updates in the sft stage or in ReLIFT give a warning. A
    skipped update gives only the warning "skipped"."""
    for inputs in (METHODS[method], variant(METHODS[method], demonstration_weight=weight)):
        run, watch = make_run(tokenizer, method, reward=ALL_WRONG, relift_buffer=2, lr=0.0), Watch(inputs, {})
        run.method = inputs
        if run.collector:
            metrics = rl_metrics(run, rl_step(run, 0))
            assert metrics["relift_updates"] == 1
        else:
            metrics = sft_metrics(sft_step(run, run.data.supervised[:3], 0, run.optimizer, 0.1), 0.1)
        text = watch.look({"step": 1, **metrics}).get("no_weight", "")
        assert ("demonstration_weight (methods.METHODS) is 0" in text) is (inputs is not METHODS[method])
    skipped = {"trained_tokens": 0, "skipped_updates": 1}
    assert list(Watch(inputs, {}).look({"step": 1, "grad_norm": 0.0, "entropy": 0.0} | skipped)) == ["skipped"]


def test_nothing_is_said_of_a_run_without_faults():
    """Supervised steps give no warning. RFT has no hybrid rows, so steps without hybrid rows give no warning."""
    watch = Watch(METHODS["rft"], {})
    supervised = {"skipped_updates": 0, "grad_norm": 0.0, "entropy": 0.0, "trained_tokens": 9}
    for number in range(1, 60):
        result = watch.look({"step": number, **supervised} if number < 20 else row(number, hybrid_rows=0))
        assert result == {}


@pytest.mark.parametrize("sampled_at, warned", [(1.0, False), (0.8, True)])
def test_a_sampler_of_another_temperature_is_noticed(tokenizer, monkeypatch, sampled_at, warned):
    """If sampling uses a wrong temperature, its log-probs differ from those of the training pass at once. Later the
    log-probs and entropies of the training pass alone show the wrong temperature."""
    honest, watch = steps.generate, Watch(METHODS["rft"], {})

    def generate(model, tokenizer, rows, budget, temperature, **settings):
        return honest(model, tokenizer, rows, budget, sampled_at, **settings)

    monkeypatch.setattr(steps, "generate", generate)
    run = make_run(tokenizer, "rft", prompts_per_step=2, updates_per_step=1, lr=0.0)
    for number in range(LONG):
        watch.look({"step": number + 1, **rl_metrics(run, rl_step(run, number))})
        assert ("log_prob_gap" in watch.warnings) is warned
    assert ("surprise" in watch.warnings) is warned
    assert not warned or "less surprising than the training pass expects" in watch.warnings["surprise"]


def test_rejected_demonstrations_are_told_at_the_start_and_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(lives.ROOT)
    monkeypatch.setattr(train, "draw_curves", lambda folder: "")
    files = lives.task(tmp_path)
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    rows[0]["demonstrations"] = ["\\boxed{no}"]
    files["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = lives.SETTINGS | {"method": "rft", "steps": 1}
    with pytest.raises(SystemExit) as stop:
        lives.training(tmp_path / "run", **files, **inputs)()
    message = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert stop.value.code == 0
    assert message.count("warning: 1 demonstrations are left out: their own reward says they are not right") == 2
