"""These tests check one training step (step.py), whose gradient must not depend on how the batch is cut into
micro-batches."""

import ast
import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny import ALL_WRONG, BY_LENGTH, ONE_OF_EACH, random_model, rounding, with_adapters

import step as steps
from data.loader import Data, Encoded, Problem
from loss import Tokens, clipped
from methods import METHODS, Collector, Method, sft_learning_rate, unclipped, unsolved_groups, zero
from sample import Row
from step import Run, mini_batch_tokens, problems_of_step, rl_step, rollout_batch, sft_step, update
from support.config import Config, from_dict
from support.distributed import micro_batches, trained
from support.record import is_copied, record_group, rl_metrics

TEMPERATURE = 0.8


def make_run(
    tokenizer, method="prefix-rft", model=None, problems=6, demonstrated=5, reward=BY_LENGTH, **settings
) -> Run:
    """Returns a run of a random model on random problems. By default the length of a response decides its reward."""
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
    model = model or (with_adapters(random_model(), config) if config.lora_rank else random_model())
    optimizer = torch.optim.SGD(trained(model).values(), lr=config.lr)
    data = Data(train, encoded, encoded[:demonstrated], {})
    run = Run(config, METHODS[method], model, tokenizer, reward, data, optimizer)
    if run.method.unsolved == "collect":
        run.collector = Collector([], torch.optim.SGD(trained(model).values(), lr=config.relift_lr))
    return run


def whole_batch(run: Run, moved: bool) -> tuple[steps.Batch, Tokens]:
    """Returns a batch of the method's rows as one mini-batch. If `moved` is true, the policy has changed since it
    sampled the rows."""
    if run.method.stages == ("sft",):
        batch = steps.demonstration_batch(run, run.data.supervised[:3], 0)
        z = float(batch.rollouts.prefix_mask.sum())
    else:
        batch = rollout_batch(run, [0, 1, 2, 5], 4)
        z = 16.0 * run.config.max_response_tokens
    if moved:
        noise = torch.randn(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(0))
        batch = dataclasses.replace(batch, old_log_probs=batch.old_log_probs + 0.3 * noise)
    return batch, mini_batch_tokens(run, batch, torch.arange(len(batch.rewards)), z, 0.3, (0, 0))


def gradients(run: Run, batch: steps.Batch, tokens: Tokens, budget: int) -> list[torch.Tensor]:
    """Returns the gradient that step.update leaves for the optimizer, with the setting micro_batch_tokens =
    `budget`."""
    config = dataclasses.replace(run.config, micro_batch_tokens=budget, max_grad_norm=1e9)
    actual: list[torch.Tensor] = []

    class Spy:
        param_groups = ()

        def step(self):
            actual.extend(p.grad.clone() for p in trained(run.model).values())

        def zero_grad(self):
            run.model.zero_grad()

    update(dataclasses.replace(run, config=config), batch, tokens, TEMPERATURE, Spy(), 1.0)
    return actual


def exact(run: Run, batch: steps.Batch, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Returns the loss -1/Z sum w log pi, the weights w and the gradient, in float64 with all rows in one forward
    pass."""
    model, r = copy.deepcopy(run.model).double(), batch.rollouts
    positions = (r.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=r.input_ids, attention_mask=r.attention_mask, position_ids=positions).logits
    width = r.response_mask.shape[1]
    log_p = (logits[:, -width - 1 : -1] / TEMPERATURE).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    log_probs = log_p.gather(-1, r.input_ids[:, -width:, None]).squeeze(-1)
    weights = steps.token_weights(run.method, tokens.at(torch.arange(len(log_p)), log_probs, entropy))
    loss = -(weights * log_probs * r.response_mask).sum() / tokens.normalizer
    return loss.detach(), weights, list(torch.autograd.grad(loss, list(trained(model).values())))


def exact_gradients(run: Run, batch: steps.Batch, tokens: Tokens) -> list[torch.Tensor]:
    return exact(run, batch, tokens)[2]


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize(
    ("method", "rank"),
    [
        *(pytest.param(name, 0, id=f"{name}-all weights") for name in METHODS),
        *(pytest.param(name, 3, id=f"{name}-adapters") for name in ONE_OF_EACH),
    ],
)
def test_gradient_is_the_same_for_any_micro_batches(tokenizer, method, rank, moved):
    """The gradient must be the same if the model gets rows one by one, a few at a time, or all at once."""
    run = make_run(tokenizer, method, temperature=TEMPERATURE, lora_rank=rank)
    batch, tokens = whole_batch(run, moved)
    want = exact_gradients(run, batch, tokens)
    close = rounding(run.model, batch.rollouts.input_ids.numel())
    for budget in (1, 60, 120, 10**6):
        for actual, exact in zip(gradients(run, batch, tokens, budget), want, strict=True):
            assert exact.abs().max() > 0
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=close * float(exact.abs().max()))


def passes(monkeypatch) -> list[tuple[bool, list[int]]]:
    """Returns a list to which every later forward pass adds whether gradients are on, and the numbers of its rows."""
    made, plain = [], steps.forward

    def note(model, rollouts, rows, temperature):
        made.append((torch.is_grad_enabled(), rows.tolist()))
        return plain(model, rollouts, rows, temperature)

    monkeypatch.setattr(steps, "forward", note)
    return made


def test_every_row_passes_once_before_the_first_of_two_updates(tokenizer, monkeypatch):
    made = passes(monkeypatch)
    batch = rl_step(make_run(tokenizer), 2).batch
    assert sorted(i for gradient, rows in made if not gradient for i in rows) == list(range(len(batch.rewards)))


@pytest.mark.parametrize("budget", [1, 120, 10**6])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "rl" in method.stages])
def test_with_one_update_a_step_the_update_gives_the_old_log_probs(tokenizer, method, budget):
    """Gradient and old log-probs equal those of a batch whose old log-probs all come from an earlier forward pass.
    The expected gradient is computed in float64."""
    run = make_run(tokenizer, method, temperature=TEMPERATURE)
    want, z = rollout_batch(run, [0, 1, 2, 5], 4), 16.0 * run.config.max_response_tokens
    assert want.old_known.all()
    run.config = dataclasses.replace(run.config, updates_per_step=1)
    batch = rollout_batch(run, [0, 1, 2, 5], 4)
    late = ~batch.old_known
    assert (batch.old_log_probs[late] == 0).all() and not late[want.rollouts.prefix_mask.any(1)].any()
    assert late.any() == (method != "rft-entropy-clip" and bool(want.response_advantage[late].any()))
    rows = torch.arange(len(late))
    exact = exact_gradients(run, want, mini_batch_tokens(run, want, rows, z, 0.3, (0, 0)))
    tokens = mini_batch_tokens(run, batch, rows, z, 0.3, (0, 0))
    close = rounding(run.model, batch.rollouts.input_ids.numel())
    for gradient, wanted in zip(gradients(run, batch, tokens, budget), exact, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=close * float(wanted.abs().max()))
    for name in ("old_log_probs", "entropy"):
        torch.testing.assert_close(getattr(batch, name), getattr(want, name), rtol=close, atol=close)


def test_a_problems_rows_depend_neither_on_its_place_nor_on_its_company(tokenizer):
    """A problem has the same prefixes and responses at another place of the batch and beside other problems."""
    run = make_run(tokenizer)

    def sampled(picked):
        of_problem = {i: [] for i in picked}
        for row in steps.sample_groups(run, picked, 3, range(len(picked)), rows="hybrid", rollouts=4):
            of_problem[picked[row.group]].append((row.prefix_ids, row.response, row.reward))
        return of_problem

    want = sampled([0, 1, 2, 3])
    assert sampled([3, 1, 2, 0]) == want and sampled([2]) == {2: want[2]}


def test_micro_batches_hold_every_row_once_within_the_budget(tokenizer):
    batch = rollout_batch(make_run(tokenizer), [0, 1, 2, 3], 0)
    rows = torch.arange(len(batch.rewards))
    for budget in (1, 50, 100, 10**6):
        chunks = micro_batches(batch.rollouts, rows, budget)
        assert sorted(i for c in chunks for i in c.tolist()) == rows.tolist()
        for chunk in chunks:
            total, response = batch.rollouts.attention_mask[chunk].sum(1), batch.rollouts.response_mask.sum(1)[chunk]
            columns = int(response.max() + (total - response).max())
            assert len(chunk) == 1 or len(chunk) * columns <= budget
    assert len(micro_batches(batch.rollouts, rows, 1)) == len(rows)
    assert len(micro_batches(batch.rollouts, rows, 10**6)) == 1


def test_the_ratio_is_one_to_the_bit_before_the_first_update(tokenizer):
    """Old log-probs and the first update come from equal forward passes over the same micro-batches."""
    run = make_run(tokenizer)
    batch = rollout_batch(run, [0, 1, 2, 3], 0)
    for rows in micro_batches(batch.rollouts, torch.arange(len(batch.rewards)), run.config.micro_batch_tokens):
        log_probs, _ = steps.forward(run.model, batch.rollouts, rows, 1.0)
        assert (log_probs.detach() == batch.old_log_probs[rows]).all()


def test_sampled_tokens_had_the_log_probs_the_update_sees(tokenizer):
    """Old log-probs are compared with the model run on each row alone, at the sampling temperature."""
    run = make_run(tokenizer, temperature=0.7)
    batch = rollout_batch(run, [0, 1, 2, 3], 0)
    r = batch.rollouts
    for i in range(0, len(batch.rewards), 5):
        ids = r.input_ids[i][r.attention_mask[i].bool()]
        n = int(r.response_mask.sum(1)[i])
        with torch.no_grad():
            p = (run.model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(
            batch.old_log_probs[i, :n], p.gather(1, ids[-n:, None])[:, 0], atol=1e-4, rtol=1e-4
        )


def test_sdfts_teacher_has_seen_the_demonstration(tokenizer):
    """SDFT's teacher is the model with the problem's demonstration in its prompt. The teacher's log-probs are
    compared with a forward pass of that model over each row alone. Problem 5 has no demonstration, so its teacher
    log-probs are NaN."""
    run = make_run(tokenizer, "sdft", temperature=TEMPERATURE)
    picked = [0, 1, 2, 5]
    first = run.data.encoded[0]
    # of two demonstrations, step 3 shows the second
    run.data.encoded[0] = dataclasses.replace(first, demonstrations=[[2], *first.demonstrations])
    batch = rollout_batch(run, picked, 3)
    for row, actual in zip(batch.rows, batch.hinted_log_probs):
        problem = run.data.encoded[picked[row.group]]
        assert actual.isnan().all() == (row.group == 3)
        if problem.demonstrations:
            shown = [*problem.prompt_ids, *problem.demonstrations[-1], 2, *problem.prompt_ids, *row.response]
            n = len(row.response)
            with torch.no_grad():
                p = (run.model(torch.tensor([shown])).logits[0, -n - 1 : -1] / TEMPERATURE).log_softmax(-1)
            want = p[range(n), row.response]
            torch.testing.assert_close(actual[:n], want, atol=1e-4, rtol=1e-4)


def test_the_kept_prefix_tokens_do_not_depend_on_micro_batches(tokenizer):
    counts = set()
    for budget in (1, 100, 10**6):
        run = make_run(tokenizer, micro_batch_tokens=budget)
        metrics = rl_metrics(run, rl_step(run, 0))
        counts.add((metrics["prefix_tokens"], metrics["prefix_tokens_kept"]))
        assert metrics["prefix_tokens_kept"] < metrics["prefix_tokens"]
    assert len(counts) == 1


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "rl" in method.stages])
@pytest.mark.parametrize("case", ["all wrong", "all truncated", "no demonstrations", "two rollouts"])
def test_nothing_is_nan_in_the_corner_cases(tokenizer, method, case):
    settings, demonstrated, reward = {}, 5, BY_LENGTH
    if case == "all wrong":
        reward = ALL_WRONG
    if case == "all truncated":
        settings["max_response_tokens"] = 2
    if case == "no demonstrations":
        demonstrated = 0
    if case == "two rollouts":
        settings["rollouts_per_prompt"] = 2
    run = make_run(tokenizer, method, demonstrated=demonstrated, reward=reward, **settings)
    before = [p.clone() for p in run.model.parameters()]
    metrics = rl_metrics(run, rl_step(run, 3))
    for value in metrics.values():
        assert value is None or math.isfinite(value)
    assert all(p.isfinite().all() for p in run.model.parameters())
    compared = (clipped, unclipped, zero)
    weights = (METHODS[method].policy_weight, METHODS[method].demonstration_weight)
    if case == "all wrong" and all(weight in compared for weight in weights):
        # no token has a weight, so the model stays as it is
        assert all((a == b).all() for a, b in zip(before, run.model.parameters()))


@pytest.mark.parametrize("baseline", ["on_policy", "group"])
def test_two_hybrid_rows_with_one_prefix_are_not_each_others_baseline(tokenizer, baseline):
    """At the first step both hybrid rows of a group get the same prefix, 95% of the demonstration. With the baseline
    `on_policy` the advantage of a continuation is its reward."""
    run = make_run(tokenizer, hybrid_per_prompt=2, baseline=baseline)
    batch = rollout_batch(run, [0, 1, 2, 3], 0)
    for group in range(4):
        rows = [row for row in batch.rows if row.group == group]
        members = batch.rollouts.group == group
        hybrid = members & batch.rollouts.hybrid
        assert len(rows) == 4 and hybrid.sum() == 2 and rows[2].prefix_ids == rows[3].prefix_ids != []
        compared = members if baseline == "group" else members & ~hybrid
        above = batch.rewards[hybrid] - batch.rewards[compared].mean()
        torch.testing.assert_close(batch.prefix_advantage[hybrid], above)
        kept = batch.rewards[hybrid] if baseline == "on_policy" else above
        torch.testing.assert_close(batch.response_advantage[hybrid], kept)


def far_from_known(t: Tokens) -> torch.Tensor:
    """Returns the weight (1 − p)·Z/T_d, which is 0 where p = 1. T_d is the number of demonstration tokens."""
    return (1 - t.log_probs.exp()) * t.normalizer / max(1, t.demonstration_tokens)


def moved_apart(t: Tokens) -> torch.Tensor:
    """Returns the weight 1 − r, which is 0 before the first update, because PPO's ratio r is then 1."""
    return 1 - (t.log_probs - t.old_log_probs).exp()


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("rows", ["hybrid", "demonstration", "shared_prefix"])
def test_a_weight_that_vanishes_at_p_1_trains_and_is_counted(tokenizer, rows, updates):
    """Until old log-probs are known, zeros take their place, which must not be read as log-probs of p = 1."""
    run = make_run(tokenizer, lr=0.5, updates_per_step=updates)
    run.method = Method("own", rows, zero, far_from_known, baseline="group")
    metrics = rl_metrics(run, rl_step(run, 0))
    demonstration_tokens = metrics["prefix_tokens"]
    assert metrics["grad_norm"] > 0 and metrics["trained_tokens"] == demonstration_tokens > 0
    assert metrics["clip_fraction"] == 0
    run.method = Method("own", "demonstration", demonstration_weight=far_from_known, stages=("sft",))
    step = sft_step(run, run.data.supervised[:3], 0, run.optimizer, 0.5)
    count = sum(len(problem.demonstrations[0]) + 1 for problem in run.data.supervised[:3])
    assert step.updates[0]["grad_norm"] > 0 and step.updates[0]["with_weight"] == count


def test_no_share_of_tokens_is_negative(tokenizer):
    """In this test policy tokens have the weight 0 until the first update, so the second update has more tokens with
    a weight than the first. The metric clip_fraction must not become negative."""
    run = make_run(tokenizer, lr=0.5, updates_per_step=2)
    run.method = Method("own", "hybrid", moved_apart, clipped)
    step = rl_step(run, 0)
    metrics, rollouts = rl_metrics(run, step), step.batch.rollouts
    assert 0 <= metrics["clip_fraction"] <= 1
    # in the second update tokens of on-policy rows have a weight, not only tokens of hybrid rows
    hybrid_tokens = rollouts.response_mask[rollouts.hybrid & (rollouts.group >= 2)].sum()
    assert metrics["trained_tokens"] >= step.updates[1]["with_weight"] > hybrid_tokens


def test_metrics_describe_the_whole_batch(tokenizer):
    """In a step with many micro-batches, metrics are compared with counts over the rollouts."""
    run = make_run(tokenizer, micro_batch_tokens=40)
    batch = rollout_batch(run, problems_of_step(6, 4, 2, 0, "order"), 2)
    metrics = rl_metrics(run, rl_step(run, 2))
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


@pytest.mark.parametrize(
    "boxed, problem, answer, copied",
    [
        ("69 - 13", "What is 69-13?", "56", True),
        ("69-13", "Find $69 - 13$.", "56", True),
        ("x^2 - 1", "Expand (x-1)(x+1) and compare with x^2-1.", "(x-1)(x+1)", True),
        ("56", "What is 69-13?", "56", False),
        ("9 - 13", "What is 69-13?", "56", False),
        ("56", "Is 56 more than 69-13?", "56", False),
        ("(B)", "Which? (A) 1 (B) 2", "B", False),
        ("$56$", "69-13, $56$ or 57?", "56", False),
        (None, "What is 69-13?", "56", False),
    ],
)
def test_an_answer_that_is_a_piece_of_the_problem_is_copied(boxed, problem, answer, copied):
    text = "69 - 13" if boxed is None else f"so \\boxed{{{boxed}}}"
    assert is_copied(text, Problem("p", problem, answer)) is copied


def test_the_share_of_copied_answers_is_of_right_responses_in_all(tokenizer):
    """The metric `copied` is the share of responses that are right with a piece of the problem as their answer. Here
    every response boxes its problem, so `copied` equals the share of right responses, about a half."""
    run = make_run(tokenizer, "rft", reward=BY_LENGTH)
    step = rl_step(run, 0)
    rows = [dataclasses.replace(row, text=f"\\boxed{{problem {step.picked[row.group]}}}") for row in step.batch.rows]
    step.batch.first_rows = rows
    assert 0 < rl_metrics(run, step)["copied"] == sum(row.reward == 1 for row in rows) / len(rows) < 1


@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "adapters"])
@pytest.mark.parametrize("method", ["prefix-rft", "luffy", "hpt", "rescue"])
def test_the_log_probs_of_the_sampler_stand_beside_those_of_the_training_pass(tokenizer, method, rank):
    """For each token, the log-prob from sampling is compared with that of the training pass, also where groups were
    replaced or sampled again. The metric log_prob_gap is the mean distance of a token's two log-probs."""
    run = make_run(tokenizer, method, temperature=0.7, lora_rank=rank)
    result = rl_step(run, 4)
    batch = result.batch
    own = batch.rollouts.response_mask & ~batch.rollouts.prefix_mask
    drawn = torch.tensor([value for row in batch.rows for value in row.log_probs])
    torch.testing.assert_close(drawn, batch.old_log_probs[own], atol=1e-4, rtol=0)
    assert 0 < rl_metrics(run, result)["log_prob_gap"] < 1e-4
    odd = own.nonzero()[:, 1] % 2
    batch.old_log_probs[own] = drawn + torch.tensor([-0.1, 0.3])[odd]
    want = 0.1 + 0.2 * odd.float().mean().item()
    assert rl_metrics(run, result)["log_prob_gap"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("method", ["hpt", "rescue"])
def test_groups_that_are_replaced_do_not_hide_their_failures(tokenizer, method):
    """HPT replaces unsolved groups, and rescue samples them again. HPT and rescue first sample the rows that RFT
    samples, and the metrics count these first rows. With gate 1 a group is unsolved if at most one row is right."""
    reward = dataclasses.replace(
        BY_LENGTH,
        function=lambda text, problem: float(problem.id in ("p0", "p1", "p5")),
        is_read=lambda t: len(t) % 3 > 0,
    )
    settings = {"reward": reward, "max_response_tokens": 40}
    run = make_run(tokenizer, method, gate=1, **settings)
    metrics = rl_metrics(run, rl_step(run, 5))
    batch = rollout_batch(make_run(tokenizer, "rft", **settings), problems_of_step(6, 4, 5, 0, "order"), 5)
    r = batch.rollouts
    right = [int(batch.rewards[r.group == g].sum()) for g in range(4)]
    unread = [len(text) % 3 == 0 and not cut for text, cut in zip(r.texts, r.truncated.tolist())]
    assert metrics["hybrid_rows"] > 0 and sorted(right) == [0, 1, 2, 2]
    want = {"reward_on_policy": batch.rewards.mean().item(), "truncated": r.truncated.float().mean().item()}
    want |= {"unread": sum(unread) / 16, "unsolved": sum(n <= 1 for n in right) / 4}
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value) and 0 < value < 1, name


STEP = {
    "temperature": TEMPERATURE,
    "max_response_tokens": 60,
    "prompts_per_step": 3,
    "updates_per_step": 2,
    "steps": 60,
    "lr": 0.5,
    "clip_low": 0.05,
    "clip_high": 0.05,
}


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.02])
@pytest.mark.parametrize("method", ["prefix-rft", "prefix-rft-random", "chord-mu", "hpt"])
def test_a_step_is_two_unequal_updates_one_after_the_other(tokenizer, method, max_grad_norm):
    """The step is compared with two updates by hand in float64: first 2 of 3 problems, then the third. Both updates
    use the constant Z of all planned rows, the coefficient of this step, and clipped gradients.

    Problem p5 is never solved, so HPT replaces its group and has fewer rows than were planned."""
    reward = dataclasses.replace(BY_LENGTH, function=lambda text, p: (1 + len(text) % 4) / 4 * (p.id != "p5"))
    settings = STEP | {"max_grad_norm": max_grad_norm, "reward": reward, "demonstrated": 6}
    run, step = make_run(tokenizer, method, **settings), 6
    picked = problems_of_step(6, 3, step, 0, "order")
    assert picked[0] == 5
    batch = rollout_batch(run, picked, step)
    hand = dataclasses.replace(run, model=copy.deepcopy(run.model).double())
    losses, norms, planned, left = [], [], 0, 0
    for part, (groups, z) in enumerate((((0, 1), 2 * 4 * 60), ((2,), 1 * 4 * 60))):
        rows = torch.isin(batch.rollouts.group, torch.tensor(groups)).nonzero().flatten()
        tokens = mini_batch_tokens(run, batch, rows, z, 0.1, (step, part))
        loss, weights, gradients = exact(hand, batch, tokens)
        losses.append(float(loss))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        planned += int((steps.token_weights(run.method, tokens) != 0).sum())
        left += int((weights != 0).sum())
        with torch.no_grad():
            for parameter, gradient in zip(hand.model.parameters(), gradients):
                parameter -= 0.5 * min(1, max_grad_norm / norms[-1]) * gradient
    start = [p.detach().clone() for p in run.model.parameters()]
    metrics = rl_metrics(run, rl_step(run, step))
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    assert metrics["clip_fraction"] == pytest.approx(1 - left / planned) and metrics["trained_tokens"] == planned
    if max_grad_norm > 1 and method != "hpt":  # PPO's clip gives some tokens the weight 0; HPT does not clip
        assert left < planned
    for before, actual, want in zip(start, run.model.parameters(), hand.model.parameters()):
        change = want - before
        torch.testing.assert_close(
            actual.detach() - before, change.float(), rtol=0, atol=2e-3 * float(change.abs().max())
        )


def test_the_counts_of_a_mini_batch_are_those_of_its_rows(tokenizer):
    """A mini-batch counts the demonstration and policy tokens of its own rows, not of the whole batch."""
    run = make_run(tokenizer)
    batch, parts = rollout_batch(run, [0, 1, 2, 3], 4), ((0, 1, 2), (3,))
    counts = []
    for groups in parts:
        members = [row for row in batch.rows if row.group in groups]
        prefix = sum(len(row.prefix_ids) for row in members)
        counts.append((prefix, sum(len(row.response) for row in members) - prefix))
        rows = torch.isin(batch.rollouts.group, torch.tensor(groups)).nonzero().flatten()
        tokens = mini_batch_tokens(run, batch, rows, 160.0, 0.4, (4, 0))
        assert (tokens.demonstration_tokens, tokens.policy_tokens) == counts[-1]
    assert all(prefix > 0 and own > 0 for prefix, own in counts) and counts[0] != counts[1]


def test_the_random_entropy_clip_draws_by_seed_step_and_update(tokenizer):
    run = make_run(tokenizer, "prefix-rft-random", entropy_keep=0.5)
    batch = rollout_batch(run, [0, 1, 2, 3], 4)

    def kept(seed: int, *key: int) -> tuple:
        own = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed))
        tokens = mini_batch_tokens(own, batch, torch.arange(16), 320.0, 0.4, key)
        return tuple((tokens.weight_mask & tokens.prefix_mask).flatten().tolist())

    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    masks = [kept(*key) for key in keys]
    assert len(set(masks)) == 4 and len({sum(mask) for mask in masks}) == 1
    assert [kept(*key) for key in keys] == masks


@pytest.mark.parametrize("method", ["rft", "hpt", "rescue"])
def test_sampled_tokens_are_those_of_every_try(tokenizer, monkeypatch, method):
    """The metric sampled_tokens includes groups that were replaced or sampled again, but no prefixes or whole
    demonstrations."""
    tries, plain = [], steps.sample_groups

    def count(*arguments, **settings):
        rows = plain(*arguments, **settings)
        tries.append(sum(len(row.response) - len(row.prefix_ids) for row in rows))
        return rows

    monkeypatch.setattr(steps, "sample_groups", count)
    run = make_run(tokenizer, method, reward=ALL_WRONG)
    metrics = rl_metrics(run, rl_step(run, 0))
    assert len(tries) == {"rft": 1, "hpt": 2, "rescue": 4}[method] and tries[0] > 0
    assert metrics["sampled_tokens"] == sum(tries) and (method != "rescue" or min(tries) > 0)


def test_an_sft_step_draws_among_a_problems_demonstrations(tokenizer):
    """The step's number chooses among a problem's demonstrations, and each demonstration has its turn."""
    run = make_run(tokenizer, "sft")
    problem = dataclasses.replace(run.data.encoded[0], demonstrations=[[5, 6], [7, 8]])

    def inputs(step: int) -> list[int]:
        return steps.demonstration_batch(run, [problem], step).rollouts.input_ids[0, -3:].tolist()

    drawn = [inputs(step) for step in range(12)]
    assert {tuple(ids) for ids in drawn} == {(5, 6, 2), (7, 8, 2)}
    assert drawn == [inputs(step) for step in range(12)]


def test_truncated_responses_get_no_reward(tokenizer):
    right = dataclasses.replace(BY_LENGTH, function=lambda text, problem: 1.0)
    batch = rollout_batch(make_run(tokenizer, max_response_tokens=20, reward=right), [0, 1, 2, 3], 0)
    assert 0 < batch.rollouts.truncated.sum() < len(batch.rewards)
    assert batch.rewards.equal((~batch.rollouts.truncated).float())


def test_an_sft_step_descends_the_token_mean(tokenizer):
    run = make_run(tokenizer, "sft")
    ids = run.data.supervised[:3]
    losses = [sft_step(run, ids, 0, run.optimizer, 0.05).updates[0]["loss"] for _ in range(5)]
    fresh, total, tokens = random_model(), 0.0, 0
    for problem in ids:  # the first loss is compared with plain cross-entropy, row by row
        response = [*problem.demonstrations[0], 2]
        with torch.no_grad():
            logits = fresh(input_ids=torch.tensor([problem.prompt_ids + response])).logits[0, -len(response) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        tokens += len(response)
    assert losses[0] == pytest.approx(total / tokens, rel=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_relift_collects_unsolved_problems_newest_first_and_spends_a_full_buffer(tokenizer, monkeypatch):
    """ReLIFT's buffer holds a problem as often as it was unsolved. Each step makes at most one supervised update, on
    the newest problems in the buffer."""
    spent = []

    def spend(run, problems, step, optimizer, lr):
        spent.append([problem.id for problem in problems])
        assert optimizer is run.collector.optimizer and lr == 0.25
        return steps.Step(None, [], [{"loss": 0.5, "grad_norm": 2.0, "with_weight": 9, "skipped": 0}], (0, 0), [], {})

    monkeypatch.setattr(steps, "sft_step", spend)
    run = make_run(
        tokenizer, "relift", reward=ALL_WRONG, relift_buffer=4, prompts_per_step=3, updates_per_step=1, relift_lr=0.25
    )
    waiting: list[int] = []
    for step in range(6):
        met = [i for i in problems_of_step(6, 3, step, 0, "order") if i < 5]  # problem 5 has no demonstration
        waiting = met + waiting
        expected, updates = waiting, 0
        if len(waiting) >= 4:
            expected, updates, choice = waiting[4:], 1, waiting[:4]
        metrics = rl_metrics(run, rl_step(run, step))
        if updates:
            assert spent[-1] == [f"p{i}" for i in choice] and metrics["relift_loss"] == 0.5
        assert (metrics["relift_updates"], metrics["relift_buffer"]) == (updates, len(expected))
        assert run.collector.waiting == expected
        waiting = expected
    assert len(spent) >= 3


def test_hpt_puts_a_demonstration_in_the_place_of_an_unsolved_group(tokenizer):
    run = make_run(tokenizer, "hpt", reward=ALL_WRONG)
    batch = rollout_batch(run, [0, 3, 5, 1], 0)
    assert unsolved_groups(batch.first_rows, 0) == [0, 1, 2, 3]
    rows = batch.rollouts.group.tolist()
    assert rows == [0, 1, 2, 2, 2, 2, 3]  # problem 5 has no demonstration and stays on-policy
    for i in (0, 1, 6):
        assert batch.rollouts.prefix_mask[i].equal(batch.rollouts.response_mask[i])
    solved = dataclasses.replace(BY_LENGTH, function=lambda text, problem: float(problem.id == "p3"))
    batch = rollout_batch(dataclasses.replace(run, reward=solved), [0, 3, 5, 1], 0)
    truncated_group = batch.rollouts.truncated[batch.rollouts.group == 1].all()
    assert not truncated_group and unsolved_groups(batch.first_rows, 0) == [0, 2, 3]
    assert batch.rollouts.group.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert not batch.rollouts.hybrid[1:5].any()


def test_the_gate_decides_what_is_unsolved(tokenizer):
    rewards = ((0, 1.0), (0, 1.0), (1, 1.0), (1, 0.5), (2, 0.0), (2, 0.5))
    rows = [Row(group, (), [], [], reward=reward) for group, reward in rewards]
    # a row counts as right if its reward is 1
    assert [unsolved_groups(rows, gate) for gate in (0, 1, 2)] == [[2], [1, 2], [0, 1, 2]]


def test_rescue_samples_unsolved_groups_again_behind_longer_prefixes(tokenizer, monkeypatch):
    """An unsolved group is sampled again until a row is right. Here problem p0 has a right row with 50% of its
    demonstration as prefix, p1 never, and p3 at the first attempt; p5 has no demonstration."""
    run = make_run(tokenizer, "rescue")
    calls: list[list[Row]] = []

    def sampled(model, tokenizer, rows, *_, **__):
        return [dataclasses.replace(row, response=[*row.prefix_ids, 2], log_probs=[0.0]) for row in rows]

    def grade(reward, texts, problems):
        rows = calls[-1]
        names = [problem.id for problem in problems]
        return [float(name == "p3" or (name == "p0" and row.fraction > 0.4)) for name, row in zip(names, rows)]

    monkeypatch.setattr(steps, "generate", lambda *a, **k: calls.append(sampled(*a, **k)) or calls[-1])
    monkeypatch.setattr(steps, "grade_all", grade)
    batch = rollout_batch(run, [0, 1, 3, 5], 7)
    assert unsolved_groups(batch.first_rows, 0) == [0, 1, 3]
    assert [sorted({row.group for row in rows}) for rows in calls] == [[0, 1, 2, 3], [0, 1], [0, 1], [1]]
    for attempt, rows in enumerate(calls):
        assert {row.key[-1] for row in rows} == {attempt} and len({row.key for row in rows}) == len(rows)
        for group in {row.group for row in rows}:
            assert len({tuple(row.prefix_ids) for row in rows if row.group == group}) == 1
    demonstration = run.data.encoded[1].demonstrations[0]
    assert calls[3][0].prefix_ids == demonstration[: math.floor(0.75 * len(demonstration))]
    assert batch.rollouts.group.tolist() == [g for g in range(4) for _ in range(4)]
    assert batch.rewards.tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert (batch.response_advantage == 0).all()  # advantages are 0 if all rows of a group have the same reward


def test_demonstrations_alone_are_learned_at_temperature_1(tokenizer, monkeypatch):
    """An sft step uses temperature 1 whatever the sampling temperature is. In a step of reinforcement every forward
    pass uses the sampling temperature."""
    used: list[float] = []
    plain = steps.forward
    monkeypatch.setattr(steps, "forward", lambda *a: used.append(a[-1]) or plain(*a))
    run = make_run(tokenizer, "sft-rft", temperature=0.6)
    sft_step(run, run.data.supervised[:3], 0, run.optimizer, 0.1)
    assert set(used) == {1.0}
    used.clear()
    rl_step(run, 0)
    assert set(used) == {0.6}


@pytest.mark.parametrize("parts", range(1, 17))
def test_a_step_makes_as_many_updates_as_asked(tokenizer, monkeypatch, parts):
    """The updates of a step are as equal as possible, and every problem is in one update."""
    run = make_run(tokenizer, "rft", problems=16, prompts_per_step=16, updates_per_step=parts, rollouts_per_prompt=2)
    sizes: list[int] = []

    def note(run, batch, tokens, *rest):
        sizes.append(len(batch.rollouts.group[tokens.weight_mask.any(1)].unique()))
        return dict.fromkeys(("loss", "grad_norm", "entropy", "with_weight", "skipped"), 0)

    monkeypatch.setattr(steps, "update", note)
    rl_step(run, 0)
    assert len(sizes) == parts and sum(sizes) == 16 and max(sizes) - min(sizes) <= 1


def test_a_recorded_group_is_what_the_update_reads(tokenizer):
    run = make_run(tokenizer, updates_per_step=1)
    group = record_group(run, rl_step(run, 5))
    run = make_run(tokenizer, updates_per_step=1)
    picked = problems_of_step(6, 4, 5, 0, "order")
    batch = rollout_batch(run, picked, 5)
    tokens = mini_batch_tokens(run, batch, torch.arange(16), 16 * 20, 0.5, (5, 0))
    weights = steps.token_weights(run.method, tokens)
    place = next(g for g, i in enumerate(picked) if f"p{i}" == group["id"])
    assert [row["hybrid"] for row in group["rows"]] == [False, False, False, True]
    for i, row in zip((batch.rollouts.group == place).nonzero().flatten().tolist(), group["rows"]):
        n = int(batch.rollouts.response_mask.sum(1)[i])
        assert row["tokens_total"] == n == len(row["ids"]) == len(row["tokens"])
        assert row["weight"] == pytest.approx(weights[i, :n].tolist(), abs=1e-4)
        assert row["source"] == batch.rollouts.prefix_mask[i, :n].long().tolist()
        assert row["reward"] == batch.rewards[i]
    hybrid = group["rows"][3]
    assert sum(hybrid["source"]) > 0 and sum(hybrid["kept"]) < len(hybrid["kept"])


def test_a_group_with_a_demonstration_is_recorded_wherever_the_step_has_one(tokenizer):
    run = make_run(tokenizer, demonstrated=1, updates_per_step=4, seed=1)  # each of the four updates has one problem
    places = []
    for step in range(5):
        picked = problems_of_step(6, 4, step, 1, "order")
        group = record_group(run, rl_step(run, step))
        assert any(row["hybrid"] for row in group["rows"]) == (0 in picked) == (group["id"] == "p0")
        places += [picked.index(0)] if 0 in picked else []
    assert {0, 3} <= set(places)


def test_every_problem_comes_once_an_epoch():
    for count, size in ((12, 4), (13, 4), (3, 8)):
        size_used = min(size, count)
        epoch = [i for s in range(count // size_used) for i in problems_of_step(count, size, s, 0)]
        assert len(set(epoch)) == len(epoch) == count - count % size_used
    orders = [problems_of_step(12, 4, step, seed) for step, seed in ((0, 0), (3, 0), (0, 1))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_sft_learning_rate_warms_up_and_falls_to_zero():
    config = from_dict({"sft_steps": 50, "sft_lr": 1.0})
    rates = [sft_learning_rate(s, config) for s in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.01
    ends_at_a_tenth = [
        sft_learning_rate(s, from_dict({"sft_steps": 50, "sft_lr": 1.0, "sft_lr_end": 0.1})) for s in range(50)
    ]
    assert ends_at_a_tenth == pytest.approx([*rates[:5], *(0.1 + 0.9 * rate for rate in rates[5:])])


def test_every_config_field_is_read_somewhere():
    read = set()
    root = Path(__file__).parents[1]
    for path in (*root.glob("*.py"), *root.glob("support/*.py"), root / "data" / "run_data.py"):
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


def test_an_update_of_weights_that_are_not_finite_is_skipped_and_counted(tokenizer):
    """All rewards are equal here, so no token has a weight, and the gradient does not show the NaN of the model.
    train.py ends after three consecutive skipped updates."""
    run = make_run(tokenizer, "rft", reward=ALL_WRONG)
    torch.nn.init.constant_(run.model.lm_head.weight, torch.nan)
    metrics = rl_metrics(run, rl_step(run, 0))
    assert metrics["skipped_updates"] == 2 == run.skipped
