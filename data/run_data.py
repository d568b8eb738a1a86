"""This file loads the data of a run, keeps a fraction of the demonstrations, and checks the data against the
settings.

train.py calls `load_data`. data/loader.py reads the rows and encodes them as token ids.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from data.loader import Data, Encoded, encode_problems, encode_prompts, load_problems
from methods import METHODS, hint
from reward import Reward
from sample import seed_of
from support.config import TASK, Config
from support.errors import InputError
from support.loading import check_window


class Counts(NamedTuple):
    """Numbers of demonstrations by reason: `left_out` counts demonstrations that are not used, and `noted` counts
    demonstrations that are used but reported to the user."""

    left_out: Counter
    noted: Counter


def data_files(config: Config) -> dict[str, str]:
    """Returns the data files of a run by purpose: data, sft_data, validation and test. If the settings name no
    validation or test file, the embedded task uses those in data/recipes."""
    embedded = config.data == Config.data
    files = {"data": config.data, "sft_data": config.sft_data}
    files["validation"] = config.eval_data or (f"{TASK}/validation.jsonl" if embedded else "")
    files["test"] = config.test_data or (f"{TASK}/test.jsonl" if embedded else "")
    return {name: path for name, path in files.items() if path}


def keep_fraction(problems: Sequence[Encoded], fraction: float) -> list[Encoded]:
    """Returns all `problems`, in which only a share `fraction` of the demonstrated problems keep their
    demonstrations.

    A hash of the problem's id decides whether a problem keeps its demonstrations. So every run keeps the same
    demonstrations, and a smaller fraction keeps a subset of those that a larger fraction keeps.
    """
    demonstrated = [problem.id for problem in problems if problem.demonstrations]
    ranked = sorted(demonstrated, key=lambda name: seed_of("demonstration", name))
    keeping = set(ranked[: math.ceil(fraction * len(demonstrated) - 1e-9)])
    return [
        problem if problem.id in keeping else dataclasses.replace(problem, demonstrations=[]) for problem in problems
    ]


def load_data(
    config: Config, reward: Reward, tokenizer: Tokenizer, end_ids: list[int], context: int | None
) -> tuple[Data, Counts]:
    """Returns the data of a run, checked against the settings, and the counts of its demonstrations."""
    files, counts = data_files(config), Counts(Counter(), Counter())
    problems = {purpose: load_problems(path, reward) for purpose, path in files.items()}

    def encode(purpose: str) -> list[Encoded]:
        encoded, *counted = encode_problems(tokenizer, problems[purpose], config.max_response_tokens, end_ids, reward)
        for total, number in zip(counts, counted):
            total.update(number)
        return keep_fraction(encoded, config.demonstration_fraction)

    held = {}
    for name in ("validation", "test"):
        if name in files:
            held[name] = problems[name], encode_prompts(tokenizer, problems[name])
    encoded = encode("data")
    supervised = encode("sft_data") if config.sft_data else encoded
    data = Data(problems["data"], encoded, [problem for problem in supervised if problem.demonstrations], held)
    check_enough(config, data, counts.left_out)
    check_context(config, data, context)
    return data, counts


def demonstrated(config: Config, data: Data) -> list[Encoded]:
    """Returns the problems with a demonstration that the method can use."""
    if "sft" in METHODS[config.method].stages:
        return data.supervised
    return [problem for problem in data.encoded if problem.demonstrations]


def check_enough(config: Config, data: Data, left_out: Counter) -> None:
    """Raises InputError if there are no demonstrations for a method that needs them, or too few problems for one
    step."""
    method = METHODS[config.method]
    if method.needs_demonstrations and config.demonstration_fraction == 0:
        raise InputError(f"demonstration_fraction is 0, expected > 0: method {config.method} needs demonstrations")
    if method.needs_demonstrations and not demonstrated(config, data):
        file = (config.sft_data if "sft" in method.stages else "") or config.data
        why = "".join(f", {count} left out ({why})" for why, count in left_out.items())
        fix = ": raise max_response_tokens" if "too long" in left_out else ""
        raise InputError(f"method {config.method} needs demonstrations and {file} has none it can use{why}{fix}")
    if "rl" in method.stages and config.prompts_per_step > len(data.train):
        raise InputError(
            f"prompts_per_step is {config.prompts_per_step}, but {config.data} has only {len(data.train)} problems"
        )


def check_context(config: Config, data: Data, context: int | None) -> None:
    """Raises InputError if a prompt and its response can be longer than the model's context."""
    prompts = [(problem.id, problem.prompt_ids) for problem in [*data.encoded, *data.supervised]]
    for problem in demonstrated(config, data) if METHODS[config.method].hinted else ():
        name = f"{problem.id} after its demonstration"
        prompts += [(name, hint(problem, i)) for i in range(len(problem.demonstrations))]
    held = [(problem.id, problem.prompt_ids) for _, encoded in data.held.values() for problem in encoded]
    for name, pairs in {"max_response_tokens": prompts, "eval_response_tokens": held}.items():
        if pairs:
            problem_id, ids = max(pairs, key=lambda pair: len(pair[1]))
            check_window(context, len(ids), getattr(config, name), name, f"the prompt of {problem_id!r}")
