"""one_file.py is the method of loss.py, sample.py and step.py: the same prefixes, responses and gradient."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import rounding

import one_file
from loss import advantages, entropy_clip, ppo_weight, weighted_loss
from model import load_model, token_stats
from one_file import Row
from reward import grade
from sample import Row as SampledRow
from sample import generate, pack, prefix_length, prefix_range

TRAIN = [json.loads(line) for line in Path("data/recipes/train.jsonl").read_text().splitlines()]
DEMONSTRATED = [problem for problem in TRAIN if "demonstrations" in problem]


@pytest.fixture
def model():
    return load_model("data/base", training=True)[0]


def written_rows(tokenizer) -> list[Row]:
    """Two mini-batches of two groups: with a hybrid row and without, mixed rewards and equal ones; responses that
    end where nothing follows, too early, or not at all."""
    rows = []
    for group, problem in enumerate(DEMONSTRATED[:4]):
        solution = tokenizer.encode(problem["demonstrations"][0], add_special_tokens=False)
        for i in range(one_file.ROWS):
            row = one_file.new_row(problem, tokenizer)
            row.response = solution[: len(solution) - 6 * i]
            if i != 2:
                row.response = [*row.response, tokenizer.eos_token_id]
            if i == one_file.ROWS - 1 and group != 1:
                row.prefix = solution[: 3 + 4 * group]
            row.reward = 1.0 if group == 3 else float((i + group) % 3 == 0)
            rows.append(row)
    return rows


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_both_updates_of_a_step_have_the_gradient_of_the_path(model, tokenizer):
    rows = written_rows(tokenizer)
    batch = one_file.new_batch(model, tokenizer, rows)
    sampled = []
    for i, row in enumerate(rows):
        sampled.append(SampledRow(i // one_file.ROWS, (), row.prompt, row.prefix, response=row.response))
    rollouts = pack(sampled, tokenizer.pad_token_id)
    rewards = torch.tensor([row.reward for row in rows])
    own, prefix = advantages(rewards, rollouts.group, rollouts.hybrid)
    advantage = torch.where(rollouts.prefix_mask, prefix[:, None], own[:, None])
    width = rollouts.response_mask.shape[1]
    with torch.no_grad():
        old_log_probs, entropy = token_stats(model, rollouts.input_ids, rollouts.attention_mask, width, 1.0)
    clipped = []
    for part in torch.arange(len(rows)).chunk(one_file.UPDATES):
        loss = one_file.objective(model, {name: values[part] for name, values in batch.items()})
        found = gradient(loss, model)

        log_probs, _ = token_stats(
            model, rollouts.input_ids[part], rollouts.attention_mask[part], width, temperature=1.0
        )
        weights = ppo_weight(log_probs, old_log_probs[part], advantage[part], one_file.CLIP, one_file.CLIP)
        kept = entropy_clip(rollouts.prefix_mask[part], entropy[part], one_file.ENTROPY_KEEP)
        mask = rollouts.response_mask[part] & (kept | ~rollouts.prefix_mask[part])
        expected = gradient(weighted_loss(log_probs, weights, mask, len(part) * one_file.MAX_TOKENS), model)
        assert expected.norm() > 0
        assert (found - expected).norm() <= rounding(model, mask.numel()) * expected.norm()
        clipped.append(int((mask & (advantage[part] != 0) & (weights == 0)).sum()))
        with torch.no_grad():  # far enough that the ratios of the second update leave the clip's range
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad / expected.norm()
    assert clipped[0] == 0 < clipped[1]


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
    assert 0 < change <= 2.1 * one_file.LEARNING_RATE  # AdamW's first two updates
