"""This file makes an HTML page that shows the methods in a browser: rollouts of one problem, and the weight of each
token under each method.

`page_html` inserts the result of `page_content` into figures/page.html, which needs no server, network or framework.
For each model the content has

    rows      N on-policy rows, the whole demonstration, and a hybrid row for each cut in CUTS; all are graded
    groups    for each method, and each cut that the method uses, the rows of its group (`groups_of`), with the
              advantages and weights that a training step would give them (`weigh`)

Each group is treated as a whole mini-batch. The weights are those before the first update of a step, so the policy is
still the one that sampled the rows, and PPO's ratio is 1. The entropy clip is not applied here: the page ranks the
tokens itself, because the user chooses the share to keep. Left out are methods that need other kinds of rows than
`plan_rows` has, a demonstration in the prompt, or a random entropy clip (`methods_shown`). In training, updates on
demonstrations alone always compute probabilities at temperature 1; the page uses the run's temperature for them.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from data.loader import Data, Encoded, Problem, encode_problems, load_problems
from fast.check import check_model
from fast.decode import loop_of
from figures.group_log import read_groups
from loss import advantages, token_weights
from methods import METHODS, Method, coefficient_at, variant
from model import load_model
from reward import Reward, grade_all, load_reward
from sample import Row, generate, pack, plan_group
from step import Batch, Run, mini_batch_tokens, old_stats
from support.config import Config, formula, parse_config, suggest
from support.errors import InputError
from support.loading import check_window, pick_device, window_of

CUTS = range(0, 100, 5)  # prefix lengths, in percent of the demonstration
TEMPLATE = Path(__file__).with_name("page.html")
ROWS = {
    "on_policy": "All rows are on-policy; the cut plays no part.",
    "hybrid": "All rows are on-policy but one, which begins with the demonstration, up to the cut.",
    "demonstration": "All rows are on-policy but one, which is the whole demonstration. The cut plays no part.",
}


def is_run(folder: Path) -> bool:
    """Returns whether the folder is a run folder, not a model folder."""
    return (folder / "metrics.jsonl").exists()


def page_html(content: dict[str, Any]) -> str:
    """Returns the HTML page that shows `content`. Each < in the content is escaped, so that no text of a problem or
    response can end the script of the page."""
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)


def page_content(models: list[Path], wanted: str | None = None) -> dict[str, Any]:
    """Returns the content of the page for one problem. Each path in `models` is a model folder, or a run folder,
    whose last model is shown.

    Settings and data come from the first run folder in `models`, or from the embedded task if there is no run folder.
    `wanted` is the id of a problem with a demonstration. Raises InputError for a wrong folder, id or setting.
    """
    run = next(filter(is_run, models), None)
    config = parse_config(["--config", str(run / "config.json")]) if run else Config()
    # the run's coefficient is removed, so that each method uses its own coefficient c
    config = dataclasses.replace(config, coefficient=None)
    if config.reward not in ("math", "exact"):
        raise InputError(f"{run} was graded by {config.reward}, which plot.py does not execute: give a model folder")
    reward = load_reward(config.reward)
    recorded = [group["id"] for group in read_groups(run)] if run and wanted is None else []
    problem = choose_problem(load_problems(config.data, reward), wanted, recorded)
    shown = methods_shown(problem)
    return {
        "answer": problem.answer,
        "cuts": list(CUTS),
        "keep": config.entropy_keep,
        "method": config.method,
        "L": config.max_response_tokens,
        "methods": [describe(name, method) for name, method in shown.items()],
        "missing": [name for name in METHODS if name not in shown],
        "models": [model_content(folder, problem, reward, config) for folder in models],
    }


def choose_problem(problems: list[Problem], wanted: str | None, recorded: list[str]) -> Problem:
    """Returns the problem with the id `wanted`.

    Without an id, returns the last problem recorded in groups.jsonl that has a demonstration, else the first problem
    of the data that has one, else the last recorded problem.
    """
    known = {problem.id: problem for problem in problems}
    if wanted is None:
        candidates = [known[name] for name in reversed(recorded) if name in known] + problems
        return next((problem for problem in candidates if problem.demonstrations), candidates[0])
    if wanted not in known:
        raise InputError(f"--problem {wanted!r:.80} is not in the data{suggest(wanted, list(known)[:9])}")
    if not known[wanted].demonstrations:
        raise InputError(f"--problem {wanted!r:.80} has no demonstration: choose another problem")
    return known[wanted]


# ---- methods


def methods_shown(problem: Problem) -> dict[str, Method]:
    """Returns the methods that the page can show: `plan_rows` samples the kinds of rows that these methods need, and
    their weights need neither random numbers nor a demonstration in the prompt."""

    def is_shown(method: Method) -> bool:
        possible = problem.demonstrations or not method.needs_demonstrations
        recorded = method.entropy_clip != "random" and not method.hinted
        return bool(possible) and method.rows in ROWS and recorded

    return {name: method for name, method in METHODS.items() if is_shown(method)}


def describe(name: str, method: Method) -> dict[str, Any]:
    """Returns the name, formulas and sentences that the page shows for a method."""
    sentences = [ROWS[method.rows] if "rl" in method.stages else "The demonstration alone: nothing is sampled."]
    if len(method.stages) > 1:
        sentences.append("The stage of supervised fine-tuning before is not shown.")
    if method.unsolved:
        sentences.append(f"What becomes of groups without a right row ({method.unsolved}) is not shown.")
    return {
        "name": name,
        "source": method.source,
        "about": " ".join(sentences),
        "graded": "rl" in method.stages,
        "own": formula(method.policy_weight),
        "given": formula(method.demonstration_weight),
        "clip": method.entropy_clip,
        # whether the entropy clip ranks all tokens instead of the prefix tokens alone (loss.weighted_tokens)
        "clips_all": method.rows == "on_policy",
        "c": coefficient_at(method, 0.0, None),
    }


# ---- models


def model_content(folder: Path, problem: Problem, reward: Reward, config: Config) -> dict[str, Any]:
    """Returns the rows that one model sampled, and the groups with their weights for each method."""
    path = str(folder / "final" if is_run(folder) else folder)
    model, tokenizer = load_model(path, pick_device(config.device), check=check_model)
    ends, budget = model.generation_config.eos_token_id, config.max_response_tokens
    encoded = encode_problems(tokenizer, [problem], budget, ends, reward)[0][0]
    if problem.demonstrations and not encoded.demonstrations:
        fix = "give another --problem"
        raise InputError(f"no demonstration of {problem.id!r} is right and fits {budget} tokens: {fix}")
    check_window(window_of(model.config), len(encoded.prompt_ids), budget, "max_response_tokens", "the prompt")
    rows = plan_rows(encoded, config)
    rows = generate(model, tokenizer, rows, budget, config.temperature, decode=loop_of(model))
    rollouts, none = pack(rows, model.generation_config.pad_token_id), torch.zeros(len(rows))
    rewards = torch.tensor(grade_all(reward, rollouts.texts, [problem] * len(rows))) * ~rollouts.truncated
    stats = old_stats(model, rollouts, config, torch.arange(len(rows)))
    batch = Batch(rollouts, rewards, none, none, *stats, none == 0, rows, rows, 0)
    run = Run(config, METHODS[config.method], model, tokenizer, reward, Data([problem], [encoded], [], {}), None)
    groups = {
        name: [weigh(run, method, batch, group) for group in groups_of(method, config.rollouts_per_prompt)]
        for name, method in methods_shown(problem).items()
    }
    return {
        "name": folder.name,
        "prompt": tokenizer.decode(encoded.prompt_ids),
        "texts": {i: tokenizer.decode(i) for i in set().union(*(row.response for row in rows))},
        "rows": [row_content(batch, i) for i in range(len(rows))],
        "groups": groups,
    }


def plan_rows(encoded: Encoded, config: Config) -> list[Row]:
    """Returns the rows to sample: N on-policy rows. If the problem has a demonstration, a row with the whole
    demonstration and a hybrid row for each cut are added."""

    def group(rows: str, cut: int = 0) -> list[Row]:
        settings = {"rollouts": config.rollouts_per_prompt, "max_response_tokens": config.max_response_tokens}
        settings |= {"hybrid": 1, "key": (config.seed, 0), "share": lambda generator: cut / 100}
        return plan_group(encoded, 0, rows=rows, **settings)

    if not encoded.demonstrations:
        return group("on_policy")
    return [*group("on_policy"), group("demonstration")[-1], *(group("hybrid", cut)[-1] for cut in CUTS[1:])]


def row_content(batch: Batch, i: int) -> dict[str, Any]:
    row, mask = batch.rows[i], batch.rollouts.response_mask[i]
    return {
        "ids": row.response,
        "given": len(row.prefix_ids),
        "whole": row.fraction == 1,
        "p": shortened(batch.old_log_probs[i, mask].exp()),
        # all digits of a float32, because the page ranks tokens by entropy
        "entropy": shortened(batch.entropy[i, mask], 9),
        "reward": float(batch.rewards[i]),
        "truncated": row.truncated,
    }


def groups_of(method: Method, rollouts: int) -> list[list[int]]:
    """Returns the indices of the rows in a method's group: one list for each cut (prefix length), or a single list if
    the method uses no cut."""
    others, demonstration = list(range(rollouts - 1)), rollouts
    if "rl" not in method.stages:
        return [[demonstration]]
    if method.rows == "demonstration":
        return [[*others, demonstration]]
    hybrid = [demonstration + place for place in range(1, len(CUTS))] if method.rows == "hybrid" else []
    return [[*others, last] for last in (rollouts - 1, *hybrid)]


def weigh(run: Run, method: Method, batch: Batch, group: list[int]) -> dict[str, Any]:
    """Returns one group of a method: its rows, their advantages and weights, and the token counts and Z of the
    mini-batch.

    Each row has two advantages: one for tokens that the policy sampled, one for its prefix. The weights of a row are
    pairs (weight, number of consecutive tokens with this weight).
    """
    config, rollouts, rows = run.config, batch.rollouts, torch.tensor(group)
    baseline = method.baseline or config.baseline
    scale_by_std = config.scale_by_std if method.scale_by_std is None else method.scale_by_std
    compared = advantages(batch.rewards[rows], rollouts.group[rows], rollouts.hybrid[rows], baseline, scale_by_std)
    own, prefix = (torch.zeros_like(batch.rewards).scatter(0, rows, values) for values in compared)
    batch = dataclasses.replace(batch, response_advantage=own, prefix_advantage=prefix)
    normalizer = len(rows) * config.max_response_tokens
    if "rl" not in method.stages:
        normalizer = int(rollouts.prefix_mask[rows].sum())
    unclipped = dataclasses.replace(run, method=variant(method, entropy_clip=""))
    tokens = mini_batch_tokens(unclipped, batch, rows, normalizer, 0.0, ())
    weights = token_weights(method, tokens)
    each = [shortened(weights[row, rollouts.response_mask[row]]) for row in rows]
    return {
        "rows": group,
        "advantages": [shortened(torch.stack(pair)) for pair in zip(*compared)],
        "weights": [[[w, len(list(same))] for w, same in itertools.groupby(row)] for row in each],
        "T_own": tokens.policy_tokens,
        "T_d": tokens.demonstration_tokens,
        "Z": normalizer,
    }


def shortened(values: torch.Tensor, digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
