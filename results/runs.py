"""One trial or run of the study: its data, what it is made of, what is stored of it.

A line of results/study/REGIME.jsonl has regime, method, seed, trial, settings; `made_of`, fingerprints of base, data;
`scores`, accuracies: validation, and test by level, greedy and "sampled" (at temperature 1); `right`, the right
samples of each test problem, for pairing; `tokens`; `curve`, over the steps; `probe`, what three steps of its
configuration gave when it was made.
"""

import base64
import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.loader import encode_problems, load_problems
from data.make_recipes import write_jsonl
from eval import evaluate
from evaluation.statistics import Answers, mean, summarize
from methods import METHODS
from model import load_model
from results.protocol import (
    EQUAL,
    EVALUATED_EVERY,
    EXPERT,
    REGIMES,
    TWIN,
    Line,
    Settings,
    test_rows,
    train_settings,
    training_rows,
)
from reward import load_reward
from support.checkpoint import read_json, sha256, write_text
from support.config import TASK, Config, from_dict
from support.errors import Diverged, InputError
from train import train

RUNS = Path("runs/study")
TEST = RUNS / "data/test.jsonl"
MAKE_TWIN = f"python data/make_base.py --seed 1 --out {TWIN}"
PROBED = ("loss", "grad_norm", "entropy", "response_tokens", "reward")  # of the metrics of a probe's steps
CURVES = {  # in a line: the metric it is the mean of, over the steps since the last evaluation
    "entropy": "entropy",
    "length": "response_tokens",
    "cut_off": "truncated",
    "on_policy": "reward_on_policy",
    "hybrid": "reward_hybrid",
}


@dataclass(frozen=True)
class Spec:
    """A trial or a run."""

    regime: str
    method: str
    seed: int
    settings: Settings
    trial: bool = False

    @property
    def key(self) -> tuple:
        return self.regime, self.method, self.seed, self.trial, json.dumps(self.settings, sort_keys=True)

    @property
    def name(self) -> str:
        told = {name: value if isinstance(value, str) else f"{value:g}" for name, value in self.settings.items()}
        words = [f"{name}{value}" for name, value in sorted(told.items())]
        return "-".join([self.regime, self.method, *words, f"seed{self.seed}", *["trial"] * self.trial])

    @property
    def steps(self) -> int:
        stages = METHODS["sft-rft" if self.method == EQUAL else self.method].stages
        supervised = self.settings.get("sft_steps", Config.sft_steps) if "sft" in stages else 0
        return supervised + ("rl" in stages) * self.settings["steps"]


# ---- data and what is stored


def data_file(regime: str, expert: str = EXPERT) -> Path:
    return RUNS / f"data/{regime}/{'train' if expert == EXPERT else expert}.jsonl"


def make_data(regimes: Sequence[str]) -> None:
    """Write the files of problems, always with the same bytes."""
    asked = [(regime, expert) for regime in regimes for expert in REGIMES[regime].experts]
    for path, rows in [(data_file(*pair), training_rows(*pair)) for pair in asked] + [(TEST, test_rows())]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)


def made_of(regime: str) -> dict[str, str]:
    """The first digits of the sha256 of what all runs of a regime are made of."""
    base = Path(REGIMES[regime].base)
    if str(base) == TWIN and not base.exists():
        raise InputError(f"{base}, the base of {regime}, is missing: first  {MAKE_TWIN}")
    files = {"base": base / "model.safetensors"}
    files |= {data_file(regime, expert).stem: data_file(regime, expert) for expert in REGIMES[regime].experts}
    files |= {"validation": Path(TASK) / "validation.jsonl", "test": TEST}
    return {name: sha256(path)[:12] for name, path in files.items()}


def spec_of(line: Line) -> Spec:
    return Spec(*(line[name] for name in ("regime", "method", "seed", "settings", "trial")))


# ---- one trial or run, in a process of its own


def configuration(spec: Spec) -> dict[str, Any]:
    data = data_file(spec.regime, spec.settings.get("expert", EXPERT))
    fixed = {"data": str(data), "eval_data": f"{TASK}/validation.jsonl", "seed": spec.seed}
    fixed |= {"model": REGIMES[spec.regime].base}
    return fixed | train_settings(spec.regime, spec.method, spec.settings)


def probe(spec: Spec) -> list[list[float]]:
    """PROBED of three steps of each stage of a configuration: what the code does, told apart from how it looks."""
    short = {"steps": 3, "sft_steps": 3, "relift_buffer": 4, "eval_data": "", "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Diverged):  # its steps up to there tell it apart too
            if code := train(from_dict(configuration(spec) | short | {"out": f"{folder}/run"})):
                raise KeyboardInterrupt(code)
        rows = read_rows(Path(folder) / "run/metrics.jsonl")
    return [[float(f"{row.get(name) or 0:.6g}") for name in PROBED] for row in rows]


def alike(first: list[list[float]], second: list[list[float]]) -> bool:
    """Whether two probes are the same but for rounding."""
    numbers = [[value for row in found for value in row] for found in (first, second)]
    return len(numbers[0]) == len(numbers[1]) and all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in zip(*numbers)
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def answers(
    model_folder: str, problems_file: Path, temperature: float, seed: int, samples: int = Config.eval_samples
) -> list[Answers]:
    """Graded responses of a model: 1 a problem at temperature 0, else `samples`."""
    model, tokenizer = load_model(model_folder, torch.device("cpu"))
    reward = load_reward("math")
    problems, budget = load_problems(str(problems_file), reward), Config.eval_response_tokens
    encoded, *_ = encode_problems(tokenizer, problems, budget, model.generation_config.eos_token_id, reward)
    how = {"samples": samples if temperature else 1, "temperature": temperature, "seed": seed}
    return evaluate(model, tokenizer, problems, encoded, max_response_tokens=budget, **how)


def measure(model_folder: str, seed: int, trial: bool, greedy: float | None = None) -> dict[str, Any]:
    """Scores of a model: on the validation problems (`greedy` where it is known) and, not for a trial, on the test
    problems by level, with the right samples of each test problem."""
    validation = Path(TASK) / "validation.jsonl"

    def accuracy(temperature: float) -> float:
        return mean([a.accuracy for a in answers(model_folder, validation, temperature, seed)])

    scores: dict[str, Any] = {"greedy": accuracy(0.0) if greedy is None else greedy, "sampled": accuracy(1.0)}
    scores = {"validation": {name: round(value, 4) for name, value in scores.items()}}
    if trial:
        return {"scores": scores}
    right = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found = answers(model_folder, TEST, temperature, seed)
        scores[name] = {level: round(row["accuracy"], 4) for level, row in summarize(found).items()}
        right[name] = pack_counts([a.right for a in found])
    return {"scores": scores, "right": right}


def pack_counts(counts: Sequence[int]) -> str:
    """Right samples of each problem, each at most 7, two problems a byte, in base 64."""
    padded = [*counts, *[0] * (len(counts) % 2)]
    return base64.b64encode(bytes(a << 4 | b for a, b in zip(padded[::2], padded[1::2]))).decode()


def unpack_counts(text: str, problems: int) -> list[int]:
    """What pack_counts packed. InputError where that were not so many problems."""
    packed = base64.b64decode(text, validate=True)
    if len(packed) != (problems + 1) // 2:
        raise InputError(f"found {len(packed)} bytes, expected {(problems + 1) // 2}: two problems a byte")
    return [count for byte in packed for count in (byte >> 4, byte & 15)][:problems]


def curve_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Validation accuracy at the evaluated steps, all tokens so far, and CURVES."""
    ends = [i for i, row in enumerate(rows) if (i + 1) % EVALUATED_EVERY == 0 or i == len(rows) - 1]
    curve: dict[str, list] = {"step": [rows[i]["step"] for i in ends]}
    curve["validation"] = [rows[i].get("eval_all") for i in ends]
    curve["tokens"] = [sum(tokens_of(rows[: i + 1]).values()) for i in ends]
    parts = [rows[0 if place == 0 else ends[place - 1] + 1 : end + 1] for place, end in enumerate(ends)]
    for name, metric in CURVES.items():
        values = [[row[metric] for row in part if row.get(metric) is not None] for part in parts]
        curve[name] = [float(f"{mean(found):.4g}") if found else None for found in values]
        if not any(values):
            del curve[name]
    return curve


def tokens_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens that were sampled, trained by reinforcement, and trained in updates on demonstrations alone."""
    reinforced = [row for row in rows if "reward" in row]
    supervised = [row["trained_tokens"] for row in rows if "reward" not in row]
    return {
        "sampled": sum(row["sampled_tokens"] for row in reinforced),
        "trained": sum(row["trained_tokens"] for row in reinforced),
        "supervised": sum(supervised) + sum(row.get("relift_tokens", 0) for row in reinforced),
    }


def line_of(spec: Spec) -> Line:
    """Train (or go on), evaluate -> what is stored of it, at most 4 KB."""
    line = {"regime": spec.regime, "method": spec.method, "seed": spec.seed, "trial": spec.trial}
    line |= {"settings": spec.settings, "made_of": made_of(spec.regime)}
    if spec.method == "base":
        return line | measure(REGIMES[spec.regime].base, spec.seed, trial=False)
    folder, probed = RUNS / spec.name, probe(spec)
    begun_with = RUNS / f"{spec.name}.probe.json"
    if begun_with.exists() and not alike(read_json(begun_with)["probe"], probed):
        shutil.rmtree(folder, ignore_errors=True)  # begun by code that does other things
    write_text(begun_with, json.dumps({"probe": probed}))
    every = 0 if spec.trial else EVALUATED_EVERY
    config = from_dict(configuration(spec) | {"out": str(folder), "resume": "auto", "eval_every": every})
    try:
        if code := train(config):
            raise KeyboardInterrupt(code)
    except Diverged as error:
        if not spec.trial:
            raise
        return line | {"scores": {}, "diverged": str(error), "probe": probed}
    rows = read_rows(folder / "metrics.jsonl")
    line |= measure(str(folder / "final"), spec.seed, spec.trial, greedy=rows[-1]["eval_all"])
    return line | {"tokens": tokens_of(rows), "curve": curve_of(rows), "probe": probed}
