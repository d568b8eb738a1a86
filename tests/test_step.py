"""step.py: one training step; the gradient does not depend on how the batch is cut."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import random_model

import step as steps
from data.loader import Encoded, Problem
from loss import METHODS
from step import Data, Run, micro_batches, pick, rl_step, rollout_batch, sft_learning_rate, sft_step, update
from support.config import Config, from_dict


def make_run(tokenizer, method="prefix-rft", model=None, problems=6, demonstrated=5, **settings) -> Run:
    """A run on random problems whose answers the random model sometimes hits: rewards are drawn, not graded."""
    defaults = {
        "prompts_per_step": 4,
        "rollouts_per_prompt": 4,
        "max_response_tokens": 20,
        "sft_batch": 3,
        "steps": 10,
    }
    config = from_dict(defaults | {"method": method} | settings)
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(3, 103, (n,), generator=generator).tolist()

    encoded = [
        Encoded(f"p{i}", ids(2 + 3 * i), [ids(6 + 2 * i)] if i < demonstrated else [], 2) for i in range(problems)
    ]
    train = [Problem(f"p{i}", f"problem {i}", "1") for i in range(problems)]
    model = model or random_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    return Run(
        config, METHODS[method], model, tokenizer, Data(train, encoded, list(range(demonstrated)), {}), optimizer, []
    )


@pytest.fixture(autouse=True)
def drawn_rewards(monkeypatch):
    """Grade by the length of the text: about half right, the same for equal rollouts."""
    monkeypatch.setattr(steps, "grade_batch", lambda texts, golds: [float(len(text) % 2) for text in texts])


def gradients(run: Run, budget: int, second_update: bool) -> list[torch.Tensor]:
    """The gradient `update` leaves, before the optimizer's step, on micro-batches of `budget` tokens."""
    run = dataclasses.replace(
        run, config=dataclasses.replace(run.config, micro_batch_tokens=budget, max_grad_norm=1e9)
    )
    if run.method.stages == ("sft",):
        batch = steps.demonstration_batch(run, [0, 1, 2], 0)
        z = float(batch.rollouts.prefix_mask.sum())
    else:
        batch = rollout_batch(run, [0, 1, 2, 5], 4)
        z = len(batch.rewards) * run.config.max_response_tokens
    if second_update:  # the ratio has moved
        noise = torch.randn(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(0))
        batch = dataclasses.replace(batch, old_log_probs=batch.old_log_probs + 0.3 * noise)
    found: list[torch.Tensor] = []

    class Spy:
        param_groups = ()

        def step(self):
            found.extend(p.grad.clone() for p in run.model.parameters())

        def zero_grad(self):
            run.model.zero_grad()

    update(
        dataclasses.replace(run, optimizer=Spy()), batch, torch.arange(len(batch.rewards)), run.method, z, 1.0, (0, 0)
    )
    return found


@pytest.mark.parametrize("second_update", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_same_for_any_micro_batches(tokenizer, method, second_update):
    """Rule 5: rows one by one, a few at a time, all at once; lengths differ."""
    run = make_run(tokenizer, method)
    whole = gradients(run, 10**6, second_update)
    assert max(g.abs().max() for g in whole) > 0
    for budget in (1, 60, 120):
        for a, b in zip(gradients(run, budget, second_update), whole):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_micro_batches_hold_every_row_once_within_the_budget(tokenizer):
    batch = rollout_batch(make_run(tokenizer), [0, 1, 2, 3], 0)
    rows = torch.arange(len(batch.rewards))
    for budget in (1, 50, 100, 10**6):
        chunks = micro_batches(batch.rollouts, rows, budget)
        assert sorted(i for c in chunks for i in c.tolist()) == rows.tolist()
        for chunk in chunks:
            columns, _ = batch.rollouts.columns(chunk)
            assert len(chunk) == 1 or len(chunk) * (columns.stop - columns.start) <= budget
    assert len(micro_batches(batch.rollouts, rows, 1)) == len(rows)
    assert len(micro_batches(batch.rollouts, rows, 10**6)) == 1


def test_the_ratio_is_one_to_the_bit_before_the_first_update(tokenizer):
    """Rule 8: the old pass and the first update run the same forward on the same micro-batch."""
    run = make_run(tokenizer)
    batch = rollout_batch(run, [0, 1, 2, 3], 0)
    for rows in micro_batches(batch.rollouts, torch.arange(len(batch.rewards)), run.config.micro_batch_tokens):
        log_probs, _ = steps.forward(run.model, batch.rollouts, rows, 1.0)
        assert (log_probs.detach() == batch.old_log_probs[rows, : log_probs.shape[1]]).all()


def test_sampled_tokens_had_the_log_probs_the_update_sees(tokenizer):
    """Old log-probs against the model run on each row alone, at the sampling temperature (rule 3)."""
    run = make_run(tokenizer, temperature=0.7)
    batch = rollout_batch(run, [0, 1, 2, 3], 0)
    r = batch.rollouts
    for i in range(0, len(batch.rewards), 5):
        ids = r.input_ids[i][r.attention_mask[i].bool()]
        n = int(r.response_tokens[i])
        with torch.no_grad():
            p = (run.model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(
            batch.old_log_probs[i, :n], p.gather(1, ids[-n:, None])[:, 0], atol=1e-4, rtol=1e-4
        )


def test_the_kept_prefix_tokens_do_not_depend_on_micro_batches(tokenizer):
    counts = set()
    for budget in (1, 100, 10**6):
        metrics, _ = rl_step(make_run(tokenizer, micro_batch_tokens=budget), 0)
        counts.add((metrics["prefix_tokens"], metrics["prefix_tokens_kept"]))
        assert metrics["prefix_tokens_kept"] < metrics["prefix_tokens"]
    assert len(counts) == 1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sft"])
@pytest.mark.parametrize("case", ["all wrong", "all truncated", "no demonstrations", "one rollout"])
def test_nothing_is_nan_in_the_corner_cases(tokenizer, monkeypatch, method, case):
    """Rule 9."""
    settings, demonstrated = {}, 5
    if case == "all wrong":
        monkeypatch.setattr(steps, "grade_batch", lambda texts, golds: [0.0] * len(texts))
    if case == "all truncated":
        settings["max_response_tokens"] = 2
    if case == "no demonstrations":
        demonstrated = 0
    if case == "one rollout":
        settings["rollouts_per_prompt"] = 2 if METHODS[method].rows in ("hybrid", "demonstration") else 1
    run = make_run(tokenizer, method, demonstrated=demonstrated, **settings)
    before = [p.clone() for p in run.model.parameters()]
    metrics, _ = rl_step(run, 3)
    for value in metrics.values():
        assert value is None or math.isfinite(value)
    assert all(p.isfinite().all() for p in run.model.parameters())
    if case == "all wrong" and METHODS[method].guided == "ppo" and method != "relift":
        assert all((a == b).all() for a, b in zip(before, run.model.parameters()))  # no signal, no step


def test_metrics_describe_the_whole_batch(tokenizer):
    """Rule 12: against counts over the rollouts themselves, with many micro-batches."""
    run = make_run(tokenizer, micro_batch_tokens=40)
    batch = rollout_batch(run, pick(6, 4, 2, 0, "order"), 2)
    metrics, _ = rl_step(run, 2)
    r = batch.rollouts
    assert metrics["reward"] == pytest.approx(batch.rewards.mean().item())
    assert metrics["reward_on_policy"] == pytest.approx(batch.rewards[~r.hybrid].mean().item())
    assert metrics["reward_hybrid"] == pytest.approx(batch.rewards[r.hybrid].mean().item())
    assert metrics["response_tokens"] == pytest.approx(r.response_mask.sum().item() / len(r.texts))
    assert metrics["truncated"] == pytest.approx(sum(r.truncated.tolist()) / len(r.texts))
    assert metrics["prefix_tokens"] == int(r.prefix_mask.sum())
    own = r.response_mask & ~r.prefix_mask
    assert metrics["entropy"] == pytest.approx(batch.entropy[own].mean().item(), rel=1e-5)
    groups = [set(batch.rewards[r.group == g].tolist()) for g in range(4)]
    assert metrics["equal_reward_groups"] == sum(len(g) == 1 for g in groups) / 4


def test_truncated_responses_get_no_reward(tokenizer):
    batch = rollout_batch(make_run(tokenizer, max_response_tokens=4), [0, 1, 2, 3], 0)
    graded = torch.tensor([float(len(t) % 2) for t in batch.rollouts.texts])
    assert (batch.rewards[batch.rollouts.truncated] == 0).all() and graded[batch.rollouts.truncated].sum() > 0
    assert (batch.rewards == graded * ~batch.rollouts.truncated).all()


def test_an_sft_step_descends_the_token_mean(tokenizer):
    run = make_run(tokenizer, "sft")
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.0)
    losses = [sft_step(run, [0, 1, 2], 0, 0.05)["loss"] for _ in range(5)]
    ids = [run.data.encoded[i] for i in (0, 1, 2)]
    fresh, total, tokens = random_model(), 0.0, 0
    for problem in ids:  # the first loss against plain cross-entropy, row by row
        response = [*problem.demonstrations[0], 2]
        with torch.no_grad():
            logits = fresh(input_ids=torch.tensor([problem.prompt_ids + response])).logits[0, -len(response) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        tokens += len(response)
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_relift_collects_unsolved_problems_and_spends_a_full_buffer(tokenizer, monkeypatch):
    spent = []
    monkeypatch.setattr(steps, "grade_batch", lambda texts, golds: [0.0] * len(texts))
    monkeypatch.setattr(steps, "sft_step", lambda run, picked, step, lr: spent.append(list(picked)))
    run = make_run(tokenizer, "relift", demonstrated=5, sft_batch=4, prompts_per_step=3)
    seen: list[int] = []
    for step in range(2):
        seen += [i for i in pick(6, 3, step, 0, "order") if i < 5]  # problem 5 has no demonstration
        rl_step(run, step)
    assert len(seen) == 5 and spent == [seen[:4]] and run.buffer == seen[4:]


def test_pick_visits_every_problem_once_an_epoch():
    for count, size in ((12, 4), (13, 4), (3, 8)):
        size_used = min(size, count)
        epoch = [i for s in range(count // size_used) for i in pick(count, size, s, 0)]
        assert len(set(epoch)) == len(epoch) == count - count % size_used
    assert pick(12, 4, 0, 0) != pick(12, 4, 3, 0) and pick(12, 4, 0, 0) != pick(12, 4, 0, 1)


def test_sft_learning_rate_warms_up_and_falls_to_zero():
    config = from_dict({"sft_steps": 50, "sft_lr": 1.0})
    rates = [sft_learning_rate(s, config) for s in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.01


def test_every_config_field_is_read_somewhere():
    """Rule 12."""
    read = set()
    root = Path(__file__).parents[1]
    for path in (*root.glob("*.py"), *root.glob("support/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = (
                    owner.id
                    if isinstance(owner, ast.Name)
                    else owner.attr
                    if isinstance(owner, ast.Attribute)
                    else ""
                )
                if name == "config":
                    read.add(node.attr)
    assert {field.name for field in dataclasses.fields(Config)} <= read


def test_weights_that_are_not_finite_stop_the_run(tokenizer):
    """Also where no row has a weight, so that there would be no gradient: all rewards are 0 then."""
    run = make_run(tokenizer, "rft")
    torch.nn.init.constant_(run.model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="the sum of log-probs is nan: the run has diverged"):
        rl_step(run, 0)
