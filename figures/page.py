"""The method in a browser: one problem's rollouts and every method's weights of their tokens, in one HTML file.

`page_html` puts `page_content` into figures/page.html, which shows it: no server, no network, no framework. Of each
model `model_content` has

    plan_rows    N rows of the policy alone, the whole demonstration, a hybrid row for each of CUTS: sampled, graded
    groups_of    which of these rows a method has in its group, for each cut that makes a difference
    weigh        the advantages and the weights of such a group, by loss.py

The group stands for a whole mini-batch, and the policy is the one that sampled, as before the first update of a step:
the ratio is 1. Weights are those before the entropy clip; the page ranks the tokens itself, for any share to keep.
Left out: methods whose rows or draws are not these (`methods_shown`), and the temperature of 1 that updates on
demonstrations alone have in a run with another.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.loader import Encoded, Problem, encode_problems, load_problems
from figures.group_log import read_groups
from loss import METHODS, Method, Tokens, advantages, coefficient_at, token_weights
from model import check_window, load_model, pick_device, token_stats, window_of
from reward import Reward, grade_all, load_reward
from sample import Rollouts, Row, generate, pack, plan_group
from support.config import Config, formula, parse_config, suggest

CUTS = range(0, 100, 5)  # per cent of the demonstration
TEMPLATE = Path(__file__).with_name("page.html")
ROWS = {
    "on_policy": "All rows are on-policy; the cut plays no part.",
    "hybrid": "All rows are on-policy but the last: it begins with the demonstration, up to the cut. In training the "
    "{schedule} schedule draws the cut.",
    "demonstration": "All rows are on-policy but the last: it is the whole demonstration. The cut plays no part.",
}
UNSOLVED = {
    "": "",
    "replace": " A group without a right row is replaced by its demonstration, which is not shown.",
    "rescue": " A group without a right row is sampled again behind a prefix, which is not shown.",
    "collect": " Demonstrations of groups without a right row are trained on later, which is not shown.",
}


def methods_shown(problem: Problem) -> dict[str, Method]:
    """The methods whose rows are among those sampled here, and whose weights follow from what is recorded of them."""
    return {
        name: method
        for name, method in METHODS.items()
        if method.rows in ROWS
        and method.entropy_clip != "random"
        and (problem.demonstrations or not method.needs_demonstrations)
    }


def describe(name: str, method: Method) -> dict[str, Any]:
    """What the page says of a method."""
    rows = ROWS[method.rows].format(schedule=method.schedule) + UNSOLVED[method.unsolved]
    if "rl" not in method.stages:
        rows = "The demonstration alone: nothing is sampled."
    elif "sft" in method.stages:
        rows = f"After a stage of supervised fine-tuning: {rows[0].lower()}{rows[1:]}"
    return {
        "name": name,
        "source": method.source,
        "graded": "rl" in method.stages,
        "rows": rows,
        "own": formula(method.policy_weight),
        "given": formula(method.demonstration_weight),
        "clip": method.entropy_clip,
        "clips_all": method.rows == "on_policy",  # as loss.weight_mask
        "c": coefficient_at(method, 0.0, None),
    }


# ---- what is shown of which model


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder, not a model's."""
    return (folder / "metrics.jsonl").exists()


def choose_problem(problems: list[Problem], wanted: str | None, recorded: list[str]) -> Problem:
    """The problem of the id `wanted`; without one, the last of those `recorded` that has a demonstration, the first
    of all that has one, or, where none has, the last recorded."""
    known = {problem.id: problem for problem in problems}
    if wanted is not None:
        if wanted not in known:
            raise ValueError(f"--problem {wanted!r:.80} is not in the data{suggest(wanted, list(known)[:9])}")
        if not known[wanted].demonstrations:
            raise ValueError(f"problem {wanted!r:.80} has no demonstration: name one that has with --problem")
        return known[wanted]
    candidates = [known[name] for name in reversed(recorded) if name in known] + problems
    return next((problem for problem in candidates if problem.demonstrations), candidates[0])


def page_html(content: dict[str, Any]) -> str:
    """The page of a page_content. Its texts were written by others: none of them can end the script it stands in."""
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)


def page_content(models: list[Path], wanted: str | None = None) -> dict[str, Any]:
    """What the page shows of one problem; each of `models` is a model folder or a run's, whose last model is taken.

    The settings and the data are those of the first run among them; without one, of the embedded task. `wanted` is
    the id of a problem with a demonstration. ValueError, one line, where one of all this is wrong.
    """
    run = next(filter(is_run, models), None)
    config = parse_config(["--config", str(run / "config.json")]) if run else Config()
    if config.reward not in ("math", "exact"):
        raise ValueError(
            f"{run} was graded by {config.reward}: code that a run folder names is not run, give a model"
        )
    reward = load_reward(config.reward)
    recorded = [group["id"] for group in read_groups(run)] if run and wanted is None else []
    problem = choose_problem(load_problems(config.data, reward), wanted, recorded)
    return {
        "id": problem.id,
        "answer": problem.answer,
        "cuts": list(CUTS),
        "keep": config.entropy_keep,
        "method": config.method,
        "L": config.max_response_tokens,
        "methods": [describe(name, method) for name, method in methods_shown(problem).items()],
        "missing": sorted(METHODS.keys() - methods_shown(problem).keys()),
        "models": [model_content(folder, problem, reward, config) for folder in models],
    }


def encode_problem(tokenizer: Any, ends: list[int], problem: Problem, reward: Reward, config: Config) -> Encoded:
    """The problem as ids. ValueError where it has demonstrations and none of them can be used."""
    encoded = encode_problems(tokenizer, [problem], config.max_response_tokens, ends, reward)[0][0]
    if problem.demonstrations and not encoded.demonstrations:
        raise ValueError(
            f"problem {problem.id!r} has no demonstration that is right and fits {config.max_response_tokens} tokens: "
            "name another with --problem"
        )
    return encoded


def model_content(folder: Path, problem: Problem, reward: Reward, config: Config) -> dict[str, Any]:
    """What one model sampled, and the weights of each method."""
    path = str(folder / "final" if is_run(folder) else folder)
    model, tokenizer = load_model(path, pick_device(config.device))
    encoded = encode_problem(tokenizer, model.generation_config.eos_token_id, problem, reward, config)
    budget = config.max_response_tokens
    check_window(window_of(model.config), len(encoded.prompt_ids), budget, "max_response_tokens", "the prompt")
    rows = plan_rows(encoded, config)
    progress = folder.name if sys.stderr.isatty() else None
    responses = generate(model, rows, budget, config.temperature, progress=progress)
    rollouts = pack(rows, responses, model, tokenizer)
    rewards = torch.tensor(grade_all(reward, rollouts.texts, [problem] * len(rows))).where(~rollouts.truncated, 0.0)
    stats = [torch.zeros(rollouts.response_mask.shape) for _ in range(2)]
    with torch.no_grad():
        for i in torch.arange(len(rows)).split(1):
            columns, width = rollouts.columns(i)
            ids, mask = rollouts.input_ids[i, columns], rollouts.attention_mask[i, columns]
            found = token_stats(model, ids.to(model.device), mask.to(model.device), width, config.temperature)
            for values, new in zip(stats, found):
                values[i, :width] = new.cpu()
    ids = {i for row in rows for i in row.prompt_ids}.union(*responses)
    log_probs, entropy = stats
    return {
        "name": folder.name,
        "prompt": encoded.prompt_ids,
        "texts": {i: tokenizer.decode(i) for i in sorted(ids)},
        "rows": [
            {
                "ids": response,
                "given": len(row.prefix_ids),
                "whole": row.complete,
                "p": [short(p) for p in log_probs[i, : len(response)].exp().tolist()],
                # every digit of a float32: the page ranks by it
                "entropy": [short(h, 9) for h in entropy[i, : len(response)].tolist()],
                "reward": float(rewards[i]),
                "truncated": bool(rollouts.truncated[i]),
            }
            for i, (row, response) in enumerate(zip(rows, responses))
        ],
        "groups": {
            name: [
                weigh(method, torch.tensor(group), rollouts, rewards, log_probs, entropy, config)
                for group in groups_of(method, config.rollouts_per_prompt)
            ]
            for name, method in methods_shown(problem).items()
        },
    }


# ---- rows and groups


def plan_rows(encoded: Encoded, config: Config) -> list[Row]:
    """N on-policy rows and, of a problem with a demonstration, all of it and a hybrid row for each cut above 0."""

    def group(rows: str, cut: int = 0) -> list[Row]:
        return plan_group(
            encoded,
            0,
            rows=rows,
            schedule="constant",
            rollouts=config.rollouts_per_prompt,
            hybrid=1,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
            step=0,
            total_steps=1,
            fraction=cut / 100,
        )

    if not encoded.demonstrations:
        return group("on_policy")
    return [*group("on_policy"), group("demonstration")[-1], *(group("hybrid", cut)[-1] for cut in CUTS[1:])]


def groups_of(method: Method, rollouts: int) -> list[list[int]]:
    """The rows of plan_rows in the method's group: for every cut, or once where the cut plays no part."""
    others, demonstration = list(range(rollouts - 1)), rollouts
    if "rl" not in method.stages:
        return [[demonstration]]
    if method.rows == "demonstration":
        return [[*others, demonstration]]
    on_policy = [*others, rollouts - 1]
    hybrid = [[*others, demonstration + place] for place in range(1, len(CUTS))]
    return [on_policy, *hybrid] if method.rows == "hybrid" else [on_policy]


def weigh(
    method: Method,
    rows: torch.Tensor,
    rollouts: Rollouts,
    rewards: torch.Tensor,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    config: Config,
) -> dict[str, Any]:
    """One group of a method: its rows, each with its advantages (its own, its prefix's) and its weights, as runs of
    equal ones [weight, count]; the mini-batch's numbers."""
    std = config.scale_by_std if method.scale_by_std is None else method.scale_by_std
    compared = advantages(
        rewards[rows], rollouts.group[rows], rollouts.hybrid[rows], method.baseline or config.baseline, std
    )
    response_mask, prefix_mask = rollouts.response_mask[rows], rollouts.prefix_mask[rows]
    demonstration_tokens = int(prefix_mask.sum())
    tokens = Tokens(
        log_probs=log_probs[rows],
        old_log_probs=log_probs[rows],
        entropy=entropy[rows],
        response_mask=response_mask,
        prefix_mask=prefix_mask,
        weight_mask=response_mask,
        rewards=rewards[rows],
        response_advantage=compared[0],
        prefix_advantage=compared[1],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        coefficient=coefficient_at(method, 0.0, None),
        policy_tokens=int(response_mask.sum()) - demonstration_tokens,
        demonstration_tokens=demonstration_tokens,
        normalizer=len(rows) * config.max_response_tokens if "rl" in method.stages else demonstration_tokens,
        max_response_tokens=config.max_response_tokens,
    )
    weights = [row[mask].tolist() for row, mask in zip(token_weights(method, tokens), response_mask)]
    return {
        "rows": rows.tolist(),
        "advantages": [[short(a) for a in pair] for pair in zip(*(a.tolist() for a in compared))],
        "weights": [[[w, len(list(same))] for w, same in itertools.groupby(map(short, row))] for row in weights],
        "T_own": tokens.policy_tokens,
        "T_d": tokens.demonstration_tokens,
        "Z": tokens.normalizer,
    }


def short(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
