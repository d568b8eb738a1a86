"""What makes the step fast changes no token and no gradient: decoders, shared prompts, rows that nothing reads."""

import dataclasses

import pytest
import torch
from conftest import random_model
from test_sample import some_rows
from test_step import drawn_rewards, make_run  # noqa: F401  (a fixture)
from transformers import GenerationConfig

import decode
import step as steps
from loss import METHODS
from sample import Row, generate


@pytest.fixture(scope="module")
def model():
    return random_model()


def seen_batches(model, rows, budget=24, **settings) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The responses, and the shape of the ids of every forward pass."""
    shapes = []
    hook_ids = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        return generate(model, rows, budget, **settings), shapes
    finally:
        hook_ids.remove()


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_static_cache_gives_the_same_tokens_and_entropies(model, temperature, prefill):
    rows = some_rows(24)
    a, b = torch.zeros(24), torch.zeros(24)
    loop = generate(model, rows, 24, temperature, prefill=prefill, entropy=a)
    static = generate(model, rows, 24, temperature, prefill=prefill, decode="static", entropy=b)
    assert loop == static and len({len(r) for r in loop}) > 3
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (a > 0).all() if temperature else (a == 0).all()


def test_the_static_path_is_neutral_too(model):
    saved = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0, no_repeat_ngram_size=1)
        with pytest.raises(ValueError, match="not neutral"):
            generate(model, some_rows(4), 8, decode="static")
    finally:
        model.generation_config = saved


@pytest.mark.parametrize("drop_at", [0.01, 0.5, 0.999])
def test_when_ended_rows_leave_changes_nothing(model, monkeypatch, drop_at):
    rows = some_rows(24)
    want = generate(model, rows, 24)
    monkeypatch.setattr(decode, "DROP_AT", drop_at)
    assert generate(model, rows, 24) == want


def test_equal_prompts_are_read_once_and_ended_rows_leave(model):
    prompts = {"p": [1, 9, 30], "q": [1, 9], "r": [9, 1, 30]}
    rows = [Row(0, (0, 0, name, i), ids, []) for name, ids in prompts.items() for i in range(8)]
    responses, shapes = seen_batches(model, rows)
    assert shapes[0] == (3, 3) and {width for _, width in shapes[1:]} == {1}
    counts = [count for count, _ in shapes[1:]]
    assert counts == sorted(counts, reverse=True) and counts[0] <= 24 and len({len(r) for r in responses}) > 1
    for t, count in enumerate(counts, start=1):  # at most 1 / DROP_AT times the rows that go on
        assert count <= sum(len(r) > t for r in responses) / decode.DROP_AT
    assert [generate(model, [row], 24)[0] for row in rows] == responses


def test_the_same_ids_behind_other_masks_are_other_prompts(model):
    """The padding id inside a prompt: [pad, 9] and a padded [9] have equal ids and unequal masks."""
    rows = [Row(0, (0, 0, "p", 0), [0, 9], []), Row(0, (0, 0, "p", 1), [9], [])]
    assert generate(model, rows, 24) == [generate(model, [row], 24)[0] for row in rows]


def test_entropies_seen_while_sampling_are_those_of_the_model(model):
    rows, entropy = some_rows(9), torch.zeros(9)
    responses = generate(model, rows, 20, 0.7, entropy=entropy)
    for row, response, found in zip(rows, responses, entropy):
        ids = torch.tensor([row.prompt_ids + response])
        own = len(response) - len(row.prefix_ids)
        with torch.no_grad():
            p = (model(input_ids=ids).logits[0, -own - 1 : -1] / 0.7).softmax(-1)
        assert found.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if "rl" in METHODS[m].stages])
def test_rows_that_do_not_count_change_no_weight_and_no_kept_token(tokenizer, monkeypatch, method):
    """Old log-probs and entropies of all rows, or of those that count: the same updates."""
    found = []
    for every in (False, True):
        run = make_run(tokenizer, method, updates_per_step=1)
        if every:
            monkeypatch.setattr(steps, "rows_that_count", lambda m, rollouts, *_: torch.arange(len(rollouts.texts)))
        batch = steps.rollout_batch(run, [0, 1, 2, 5], 4)
        moved = torch.randn(batch.old_log_probs.shape, generator=torch.Generator().manual_seed(0))
        batch = dataclasses.replace(batch, old_log_probs=batch.old_log_probs + 0.3 * moved)
        sums = steps.update(run, batch, torch.arange(16), run.method, 320.0, 1.0, (0, 0))
        found.append((sums, [p.detach().clone() for p in run.model.parameters()]))
    (some, a), (all_rows, b) = found
    assert some["kept"] == all_rows["kept"] and some["weighted"] == all_rows["weighted"] > 0
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6)


def test_a_group_of_equal_rewards_is_not_passed_again(tokenizer, monkeypatch):
    monkeypatch.setattr(steps, "grade_batch", lambda texts, golds: [1.0] * 8 + [float(len(t) % 2) for t in texts[8:]])
    run = make_run(tokenizer, "rft", temperature=1.0)
    batch = steps.rollout_batch(run, [0, 1, 2, 3], 0)
    counting = steps.rows_that_count(run.method, batch.rollouts, batch.response_advantage, batch.prefix_advantage)
    mixed = [g for g in range(4) if len(set(batch.rewards[batch.rollouts.group == g].tolist())) == 2]
    assert mixed and set(batch.rollouts.group[counting].tolist()) == set(mixed) < {0, 1, 2, 3}
    outside = torch.ones(16, dtype=torch.bool)
    outside[counting] = False
    assert (batch.old_log_probs[outside] == 0).all() and (batch.old_log_probs[counting].sum(1) < 0).all()
    assert (batch.drawn_entropy > 0).all()
