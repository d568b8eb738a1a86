"""These tests check sample.py: the prefix schedule, prefixes forced by ids, neutral sampling, and draws that depend
only on the row they belong to."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from tiny import random_model
from transformers import AutoTokenizer, GenerationConfig

import sample
from data.loader import Encoded
from fast.check import check_model
from fast.decode import LOOPS, decode_rows
from model import load_model
from sample import (
    DrawTokenLogitsProcessor,
    PrefixForcingLogitsProcessor,
    Row,
    generate,
    pack,
    plan_group,
    prefix_fraction,
    prefix_length,
    seed_of,
    torch_generator,
    uniforms,
)

# ---- schedule and plan


def fractions(step, schedule, total=500, draws=2000):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([prefix_fraction(step, total, schedule, generator) for _ in range(draws)])


def test_a_seed_depends_on_the_number_not_on_who_made_it():
    assert seed_of(np.int64(3), "a", np.str_("b")) == seed_of(3, "a", "b") != seed_of("3", "a", "b")


@pytest.mark.parametrize("step", [0, 100, 250, 400, 500])
def test_cosine_fraction_is_uniform_above_its_falling_bound(step):
    # at the five steps, the lower bound `low` of the prefix's share is 0.95, 0.864, 0.5, 0.136 and 0.05
    low = 0.05 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 500))
    drawn = fractions(step, "cosine")
    assert drawn.min() >= low - 1e-6 and drawn.max() <= 0.95 + 1e-6
    assert drawn.mean().item() == pytest.approx((low + 0.95) / 2, abs=0.02)


def test_the_bounds_of_every_schedule_at_the_beginning_in_the_middle_and_at_the_end():
    want = {
        "cosine": [0.95, 0.95, 0.5, 0.95, 0.05, 0.95],
        "uniform": [0.05, 0.95] * 3,
        "constant": [0.5, 0.5] * 3,
        "uft": [0.0, 1.0, 0.0, 1.0, 0.0, 0.0],
    }
    assert want.keys() == sample.SCHEDULES.keys()
    for name, bounds in want.items():
        found = [bound for step in (0, 250, 500) for bound in sample.prefix_range(step, 500, name)]
        assert found == pytest.approx(bounds, abs=1e-12), name
        assert sample.prefix_range(900, 500, name) == sample.prefix_range(500, 500, name)
    assert [sample.prefix_range(step, 500, "uft")[1] for step in (299, 300)] == [1.0, 0.0]


def test_other_schedules():
    assert fractions(0, "uniform").mean().item() == pytest.approx(0.5, abs=0.02)
    assert fractions(0, "uniform").min() < 0.07 and fractions(499, "uniform").max() > 0.93
    assert set(fractions(7, "constant").tolist()) == {0.5}
    uft = fractions(0, "uft")
    assert {round(5 * x, 5) for x in uft.tolist()} <= set(range(6)) and uft.mean().item() == pytest.approx(
        0.95, abs=0.01
    )
    # the schedule uft falls in the first 60% of 500 steps, so at step 150 it is half way down
    assert fractions(150, "uft").mean().item() == pytest.approx(0.5, abs=0.02)
    assert fractions(300, "uft").max() == 0
    with pytest.raises(ValueError, match="schedule"):
        prefix_fraction(0, 500, "linear", torch.Generator())


@pytest.mark.parametrize(
    "fraction, demonstration, budget, length",
    [
        (0.5, 10, 96, 5),
        (0.59, 10, 96, 5),
        (0.05, 10, 96, 1),
        (0.95, 10, 96, 9),
        (0.95, 10, 6, 5),
        (0.95, 200, 96, 95),
        (0.5, 1, 96, 0),
        (0.5, 2, 96, 1),
        (0.0, 10, 96, 0),
        (1.0, 10, 96, 9),
        (0.5, 10, 1, 0),
    ],
)
def test_prefix_length(fraction, demonstration, budget, length):
    assert prefix_length(fraction, demonstration, budget) == length


PROBLEM = Encoded("p1", [1, 20, 21, 22], [list(range(30, 50)), list(range(50, 60))], 2)
SHARE = functools.partial(prefix_fraction, 3, 10, "uniform")
PLAN = {"rollouts": 8, "hybrid": 1, "max_response_tokens": 40, "key": (0, 3), "share": SHARE}


def test_plans_of_a_group():
    plain = plan_group(PROBLEM, 0, rows="on_policy", **PLAN)
    assert all(not row.prefix_ids for row in plain) and len({row.key for row in plain}) == 8
    hybrid = plan_group(PROBLEM, 4, rows="hybrid", **PLAN)
    assert [bool(row.prefix_ids) for row in hybrid] == [False] * 7 + [True]
    prefix = hybrid[7].prefix_ids
    source = next(d for d in PROBLEM.demonstrations if d[0] == prefix[0])
    assert source[: len(prefix)] == prefix and len(prefix) < len(source) and hybrid[7].group == 4
    assert hybrid[7].fraction == len(prefix) / len(source)
    whole = plan_group(PROBLEM, 0, rows="demonstration", **PLAN)[7]
    assert whole.response == whole.prefix_ids and whole.prefix_ids in [[*d, 2] for d in PROBLEM.demonstrations]
    shared = plan_group(PROBLEM, 0, rows="shared_prefix", **PLAN)
    assert len({tuple(row.prefix_ids) for row in shared}) == 1 and len({row.key for row in shared}) == 8
    two = plan_group(PROBLEM, 0, rows="hybrid", **(PLAN | {"hybrid": 2}))
    assert [bool(row.prefix_ids) for row in two] == [False] * 6 + [True] * 2
    bare = plan_group(Encoded("p2", [1], [], 2), 0, rows="hybrid", **PLAN)
    assert all(not row.prefix_ids for row in bare)


def test_several_demonstrations_are_all_used_and_the_plan_is_a_pure_function():
    used, plans = set(), []
    for step in range(20):
        plan = plan_group(PROBLEM, 0, rows="hybrid", **(PLAN | {"key": (0, step)}))
        assert plan == plan_group(PROBLEM, 0, rows="hybrid", **(PLAN | {"key": (0, step)}))
        used.add(plan[7].prefix_ids[0])
        plans.append(tuple(plan[7].prefix_ids))
    assert used == {30, 50} and len(set(plans)) > 6


@pytest.mark.parametrize("rows", ["on_policy", "hybrid", "demonstration", "shared_prefix"])
def test_draws_are_keyed_by_the_problem_not_by_its_place(rows):
    """At another place of the batch a problem has the same prefixes and random numbers. Another problem, seed or
    attempt has other prefixes and random numbers."""

    def plans(problem=PROBLEM, group=0, seed=0, **changed):
        settings = PLAN | {"rows": rows, "hybrid": 3} | changed
        return [row for step in range(20) for row in plan_group(problem, group, **settings | {"key": (seed, step)})]

    here = plans()
    assert [dataclasses.replace(row, group=0) for row in plans(group=4)] == here
    assert len({row.key for row in here}) == len(here)
    for other in (plans(dataclasses.replace(PROBLEM, id="p2")), plans(seed=1), plans(attempt=1)):
        assert not {row.key for row in other} & {row.key for row in here}
        assert rows == "on_policy" or [row.prefix_ids for row in other] != [row.prefix_ids for row in here]


# ---- the two processors


def test_drawn_tokens_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 11).expand(50_000, -1) * 2
    u = torch.rand(50_000, 1)
    drawn = DrawTokenLogitsProcessor(u, 4, 0.8)(torch.zeros(50_000, 4), scores).argmax(-1)
    share = torch.bincount(drawn, minlength=11) / 50_000
    torch.testing.assert_close(share, (scores[0] / 0.8).softmax(-1), atol=0.01, rtol=0)


def test_a_token_of_probability_zero_is_never_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    u = torch.tensor([[0.0], [0.5 - 2**-24], [0.5], [1 - 2**-24]])
    drawn = DrawTokenLogitsProcessor(u, 0, 1.0)(torch.zeros(4, 0), scores).argmax(-1)
    assert drawn.tolist() == [1, 1, 3, 3]
    largest, rounded = 1 - 2**-24, 0
    for words in range(3, 100):
        scores = torch.zeros(1, words).index_fill(1, torch.tensor(words - 1), -torch.inf)
        # rounded in float32, all probabilities can sum to no more than the largest random number, which is below 1
        rounded += int(scores.softmax(-1).cumsum(-1)[0, -1] <= largest)
        drawn = DrawTokenLogitsProcessor(torch.tensor([[largest]]), 0, 1.0)(torch.zeros(1, 0), scores).argmax(-1)
        assert drawn < words - 1
    assert rounded


def test_forcing_touches_only_the_rows_and_places_of_a_prefix():
    force = PrefixForcingLogitsProcessor(torch.tensor([[5, 6], [7, 0], [0, 0]]), torch.tensor([2, 1, 0]), 3)
    scores = torch.randn(3, 9)
    first, second, third = (force(torch.zeros(3, 3 + t), scores) for t in range(3))
    assert first.argmax(-1)[:2].tolist() == [5, 7] and (first[2] == scores[2]).all()
    assert second.argmax(-1)[0] == 6 and (second[1:] == scores[1:]).all() and (third == scores).all()


def test_streams_are_independent_and_stable():
    a, b = uniforms((0, 1, "p", 2), 8), uniforms((0, 1, "p", 3), 8)
    assert (a == uniforms((0, 1, "p", 2), 20)[:8]).all() and (a != b).all() and a.min() >= 0 and a.max() < 1
    assert torch_generator(0, "x").initial_seed() != torch_generator(1, "x").initial_seed()


# ---- generate

TOKENIZER = AutoTokenizer.from_pretrained("data/base")
LOOPS_OF_BOTH = [None, decode_rows]  # decode=None means HuggingFace's own decoding loop


def sampled(model, rows, budget, temperature=1.0, **settings) -> list[list[int]]:
    """Returns the token ids of every response."""
    return [row.response for row in generate(model, TOKENIZER, rows, budget, temperature, **settings)]


def some_rows(count=12, prefixes=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, 103, (n,), generator=generator).tolist()

    sizes = torch.randint(1, 9, (count, 2), generator=generator).tolist()
    return [
        Row(i, (0, 0, f"p{i}", 0), ids(p), ids(2 * l) if prefixes and i % 3 == 0 else [])
        for i, (p, l) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def model():
    model = random_model()
    model.loop = LOOPS[0]
    return model


@pytest.mark.parametrize("decode", LOOPS_OF_BOTH)
def test_a_prefix_is_kept_at_every_cut(model, decode):
    """A response keeps the ids of its prefix, even where encoding the prefix's text would give other ids."""
    demonstration = [40, 40, 41, 5, 5, 5, 6, 7, 40, 41]
    rows = [Row(0, (0, 0, "p", cut), [1, 9], demonstration[:cut]) for cut in range(len(demonstration))]
    for row, response in zip(rows, sampled(model, rows, 14, decode=decode)):
        assert response[: len(row.prefix_ids)] == row.prefix_ids and len(row.prefix_ids) < len(response) <= 14


def test_a_response_ends_at_the_first_end_token_after_its_prefix():
    """An end token in the prefix was not sampled, so it does not end the response."""
    prefix = [5, 2, 7, 2]
    for tokens, length in (([9, 2, 0, 0], 6), ([2, 9, 2, 0], 5), ([9, 8, 7, 6], 8)):
        assert sample.end_of_response(prefix + tokens, len(prefix), {2}) == length


@pytest.mark.parametrize("decode", LOOPS_OF_BOTH)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(model, temperature, decode):
    """A row has the same response alone, together with others, in another order, and in calls of 5 rows."""
    rows, sample_rows = some_rows(), functools.partial(sampled, decode=decode)
    together = sample_rows(model, rows, 24, temperature)
    assert temperature == 0 or len({len(r) for r in together}) > 2
    assert [sample_rows(model, [row], 24, temperature)[0] for row in rows] == together
    assert sample_rows(model, rows[::-1], 24, temperature)[::-1] == together
    assert sample_rows(model, rows, 24, temperature, rows_per_call=5) == together


@pytest.mark.parametrize("how", [{}, {"decode": decode_rows}, {"rows_per_call": 5}])
def test_log_probs_are_those_of_the_drawn_tokens(model, how):
    """The log-probs are compared with a forward pass over each row alone, at the sampling temperature. Prefix tokens
    and greedily decoded tokens have no log-probs."""
    whole = Row(12, (0,), [1, 9], [5, 6, 2], response=[5, 6, 2])
    rows = generate(model, TOKENIZER, [*some_rows(), whole], 24, 0.7, **how)
    assert len({len(row.response) for row in rows}) > 3
    for row in rows:
        ids, own = torch.tensor([*row.prompt_ids, *row.response]), len(row.response) - len(row.prefix_ids)
        with torch.no_grad():
            log_p = (model(input_ids=ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        want = log_p.gather(1, ids[1:, None])[len(log_p) - own :, 0]
        torch.testing.assert_close(torch.tensor(row.log_probs), want, atol=1e-4, rtol=0)
    assert rows[-1] == dataclasses.replace(whole, text=rows[-1].text) and rows[-1].text
    assert not any(row.log_probs for row in generate(model, TOKENIZER, some_rows(), 24, 0.0, **how))


def test_generate_equals_hugging_face_greedy_search(model):
    rows = some_rows(prefixes=False)
    for row, response in zip(rows, sampled(model, rows, 24, 0.0)):
        ids = torch.tensor([row.prompt_ids])
        config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=[2], pad_token_id=0)
        with torch.no_grad():
            want = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert want[0, len(row.prompt_ids) :].tolist() == response


def test_samples_follow_the_model(model):
    """In 4,000 rows of one prompt, the share of each first token is about the token's probability."""
    rows = [Row(0, (1, 0, "p", i), [1, 9, 30], []) for i in range(4000)]
    first = torch.tensor([r[0] for r in sampled(model, rows, 1, 1.3, rows_per_call=4000)])
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([[1, 9, 30]])).logits[0, -1] / 1.3).softmax(-1)
    share = torch.bincount(first, minlength=103) / 4000
    assert (share - p).abs().max() < 4 * math.sqrt(p.max() / 4000)


def test_a_hostile_generation_config_changes_nothing(model, tmp_path, tokenizer):
    rows = some_rows()
    want = sampled(model, rows, 24)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hostile = {
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 1.3,
        "do_sample": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile | {"no_repeat_ngram_size": 1}))
    loaded, _ = load_model(str(tmp_path), check=check_model)
    assert sampled(loaded, rows, 24) == want
    loaded.generation_config = GenerationConfig(**(hostile | {"do_sample": False, "eos_token_id": [2]}))
    # sampling stays the same with a generation config that load_model has not made neutral
    assert sampled(loaded, rows, 24) == want
    loaded.generation_config.no_repeat_ngram_size = 1
    for decode in LOOPS_OF_BOTH:
        with pytest.raises(ValueError, match="not neutral"):
            sampled(loaded, rows, 24, decode=decode)


def test_several_end_tokens_and_pad_equal_to_end(model, monkeypatch):
    """A response ends at the first end token. The end token is trained, and padding is not."""
    rows = some_rows(40, prefixes=False)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[2, 50, 51, 60], pad_token_id=2))
    rows = generate(model, TOKENIZER, rows, 24)
    rollouts, responses = pack(rows, pad_id=2), [row.response for row in rows]
    ended = [r[-1] in (2, 50, 51, 60) for r in responses]
    assert {r[-1] for r in responses} & {50, 51, 60} and any(ended)
    for i, response in enumerate(responses):
        assert not set(response[:-1]) & {2, 50, 51, 60} and (ended[i] or len(response) == 24)
        assert rollouts.response_mask[i].sum() == len(response)
        assert rollouts.truncated[i].item() is not ended[i]
        assert rollouts.attention_mask[i].sum() == len(rows[i].prompt_ids) + len(response)


# ---- Rollouts


def test_pack_places_every_token():
    rows = [
        Row(0, (0,), [9, 8, 7], [5], response=[5, 11, 2]),
        Row(1, (1,), [6], [], response=[12], truncated=True),
        Row(1, (2,), [6], [4, 3, 2], response=[4, 3, 2]),
    ]
    r = pack(rows, pad_id=0)
    assert r.input_ids.tolist() == [[9, 8, 7, 5, 11, 2], [0, 0, 6, 12, 0, 0], [0, 0, 6, 4, 3, 2]]
    assert r.attention_mask.tolist() == [[1] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert r.response_mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert r.prefix_mask.int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert r.group.tolist() == [0, 1, 1] and r.hybrid.tolist() == [True, False, True]
    assert r.truncated.tolist() == [False, True, False]


def test_the_end_token_may_be_the_last_of_the_budget(model):
    """Prefix and continuation together stay within the limit of tokens. A response's end token can be the last token
    within the limit."""
    rows = some_rows(60)
    for budget in (17, 18):
        for row, response in zip(rows, sampled(model, rows, budget)):
            assert len(response) <= budget and len(response) > len(row.prefix_ids) - (len(row.prefix_ids) >= budget)
    long = sampled(model, rows, 60)
    for row, response in zip(rows, long):
        if response[-1] == 2 and len(response) > len(row.prefix_ids) + 1:
            again = sampled(model, [row], len(response))[0]
            # the limit of tokens is the response's own length, so its end token is the last that fits
            assert again == response
            return
    pytest.fail("no row ended: the test model is wrong")
