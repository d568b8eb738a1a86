"""These tests check that one_file.py gives the prefixes, responses and gradients of loss.py, sample.py and
step.py."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from tiny import BY_LENGTH, rounding

import one_file
from data.loader import Data, Problem, encode_problems
from methods import METHODS
from model import load_model
from one_file import Row
from reward import grade
from sample import Row as SampledRow
from sample import generate, prefix_length, prefix_range
from step import Run, rl_step
from support.config import Config

TRAIN = [json.loads(line) for line in Path("data/recipes/train.jsonl").read_text().splitlines()]
DEMONSTRATED = [problem for problem in TRAIN if "demonstrations" in problem]


@pytest.fixture
def model():
    return load_model("data/base", training=True)[0]


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_both_updates_of_a_step_have_the_gradient_of_step_py(model, tokenizer):
    """one_file.py gets the rows that step.rl_step has sampled and graded. The first update is so large that PPO clips
    tokens in the second one."""
    start = copy.deepcopy(model)
    config = Config(prompts_per_step=4, lr=0.5, max_grad_norm=1e9)
    problems = [Problem(p["id"], p["problem"], p["answer"], p.get("demonstrations", ())) for p in DEMONSTRATED[:3]]
    problems.append(next(Problem(p["id"], p["problem"], p["answer"]) for p in TRAIN if "demonstrations" not in p))
    encoded, *_ = encode_problems(tokenizer, problems, config.max_response_tokens, [tokenizer.eos_token_id])
    optimizer = torch.optim.SGD(model.parameters(), config.lr)
    gradients: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(gradient(model)))
    run = Run(config, METHODS["prefix-rft"], model, tokenizer, BY_LENGTH, Data(problems, encoded, [], {}), optimizer)
    rows = rl_step(run, 30).batch.rows

    rows = [Row(row.prompt_ids, "", row.prefix_ids, row.response, row.reward) for row in rows]
    batch = one_file.new_batch(start, tokenizer, rows)
    optimizer = torch.optim.SGD(start.parameters(), config.lr)
    for part, expected in zip(torch.arange(len(rows)).chunk(one_file.UPDATES), gradients, strict=True):
        mini_batch = {name: values[part] for name, values in batch.items()}
        log_probs, _ = one_file.token_stats(start, mini_batch["input_ids"])
        ratio = (log_probs - mini_batch["old_log_probs"]).exp()
        one_file.objective(start, mini_batch).backward()
        error = (gradient(start) - expected).norm()
        assert error <= rounding(model, batch["input_ids"].numel()) * expected.norm() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert ratio.max() > 1 + one_file.CLIP and ratio.min() < 1 - one_file.CLIP


def test_prefixes_have_the_lengths_of_the_schedule(tokenizer):
    random.seed(0)
    for step in (0, 30, 59):
        low, high = prefix_range(step, 60, "cosine")
        for problem in DEMONSTRATED:
            *on_policy, hybrid = one_file.new_group(problem, step / 60, tokenizer)
            solution = tokenizer.encode(problem["demonstrations"][0], add_special_tokens=False)
            shortest, longest = (prefix_length(share, len(solution), one_file.MAX_TOKENS) for share in (low, high))
            assert shortest <= len(hybrid.prefix) <= longest and hybrid.prefix == solution[: len(hybrid.prefix)]
            assert not any(row.prefix for row in on_policy) and len(on_policy) == one_file.ROWS - 1
    plain = next(problem for problem in TRAIN if "demonstrations" not in problem)
    assert not any(row.prefix for row in one_file.new_group(plain, 0.0, tokenizer))


def test_responses_are_those_of_the_sampler_and_a_cut_off_one_is_wrong(model, tokenizer, monkeypatch):
    rows = [row for problem in DEMONSTRATED[:6] for row in one_file.new_group(problem, 0.9, tokenizer)[-2:]]
    short = min(len(DEMONSTRATED[i]["demonstrations"][0]) for i in range(6)) + 1
    monkeypatch.setattr(one_file, "MAX_TOKENS", short)
    for row in rows:
        row.prefix = row.prefix[: short - 1]
    one_file.respond(model, tokenizer, rows, one_file.GREEDY)
    sampled = [SampledRow(0, (i,), row.prompt, row.prefix) for i, row in enumerate(rows)]
    greedy = generate(model, tokenizer, sampled, short, temperature=0)
    assert [row.response for row in rows] == [row.response for row in greedy]
    for row in rows:
        ended = row.response[-1] == tokenizer.eos_token_id
        assert row.reward == ended * grade(tokenizer.decode(row.response), row.answer)
    assert {row.reward for row in rows} == {0.0, 1.0} and any(len(row.response) == short for row in rows)


def test_a_run_trains_and_prints_the_accuracies(tmp_path, monkeypatch, capsys):
    for split in ("train", "validation"):
        lines = Path(f"data/recipes/{split}.jsonl").read_text().splitlines()
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines[:3]))
    weights = []

    def accuracy(model, tokenizer, problems):
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        return len(weights) / len(problems)

    for name, value in {"DATA": tmp_path, "STEPS": 1, "PROBLEMS": 2, "accuracy": accuracy}.items():
        monkeypatch.setattr(one_file, name, value)
    one_file.main()
    assert "greedy accuracy on 3 validation problems: 33.3% before, 66.7% after" in capsys.readouterr().out
    change = (weights[0] - weights[1]).abs().max()
    # each of AdamW's first two updates moves a weight by at most the learning rate
    assert 0 < change <= 2.1 * one_file.LEARNING_RATE
