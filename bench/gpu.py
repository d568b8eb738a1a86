"""Measures decoding, updates and whole steps of Qwen2.5's shapes with random weights on one GPU, against the limits
of the device and against plan.py.

    python bench/gpu.py limits step many adapters --shape 1.5b

Each part writes bench/results/throughput-cuda-PART-SHAPE.json. All computation is in bf16. On a CPU the script can be
tried: it then measures few rows and tokens of a tiny shape, and its files have `cpu` in place of `cuda` in their
names.

`limits`: decoding has 256 rows x 1024 new tokens, and for the comparison with plain `generate` 128 new tokens; no row
ends early. A forward pass of decoding cannot be faster than reading the weights and the filled part of the key-value
cache once. So the limit is the bytes of weights and cache / the measured copy bandwidth. In the limit with
arithmetic, the products with the weights take the time of reading the weights or of their FLOPs, whichever is longer.
An update is a forward and a backward pass of model.token_stats. The model FLOPs of an update are 6 N per token (N
parameters) plus 12 layers x width x length / 2 for causal attention, without recomputation. The utilisation is model
FLOPs per second / the measured rate of a large bf16 product.

`step`, `many` and `adapters`: whole steps of prefix-rft as train.py makes them, with fp32 weights. `step` has 16
problems x 8 rollouts x 512 tokens, `many` has 128 problems, and `adapters` trains low-rank adapters with 4,096
tokens. The first step of a part also warms up. Rewards are made up, so that nearly every row has a nonzero weight.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from common import CUDA, write
from torch.utils.benchmark import Timer
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import step as steps
from fast.decode import LOOPS, decode_rows
from model import token_stats
from plan import GIB, GPUS, plan
from sample import Row, generate
from support.config import Config, from_dict
from support.loading import fuse_norms
from support.memory import cache_bytes
from train import prepare

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.5b": (896, 4864, 24, 14, 2), "1.5b": (1536, 8960, 28, 12, 2), "tiny": (64, 128, 2, 4, 2)}
LESS = 1 if CUDA else 16  # a trial on the CPU has this many times fewer rows, tokens and problems
DEVICE, WORDS = ("cuda", 151936) if CUDA else ("cpu", 512)
ROWS, PROMPT, NEW, FEW = 256 // LESS, 256 // LESS, 1024 // LESS, 128 // LESS
BATCH, LENGTH = 8, 2048 // LESS  # rows, and tokens per row, of the measured update
SHORT = 512 if CUDA else 96  # most tokens of a response in a whole step
STEP = {"lr": 1e-6, "eval_every": 0, "recompute": True, "micro_batch_tokens": 49152, "rows_per_call": 128}
STEPS: dict[str, tuple[int, dict[str, Any]]] = {  # for each part of whole steps: number of steps, settings
    "step": (3, STEP | {"prompts_per_step": 16, "max_response_tokens": SHORT}),
    "many": (1, STEP | {"prompts_per_step": 128 // LESS, "max_response_tokens": SHORT}),
    "adapters": (1, STEP | {"prompts_per_step": 16, "max_response_tokens": 4096 // LESS, "lora_rank": 16}),
}


def peak_gib(call: Callable) -> tuple[Any, float]:
    """Returns the result of `call`, and the most memory that tensors took meanwhile, in GiB; 0 without CUDA."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    result = call()
    return result, torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0


def measure(call: Callable) -> dict[str, float]:
    """Returns the median wall seconds of `call` after a warm-up call, and the peak memory in GiB."""
    timer = Timer("call()", globals={"call": call})
    measured, peak = peak_gib(lambda: timer.blocked_autorange(min_run_time=1))
    return {"seconds": measured.median, "peak_gib": peak}


def new_model(shape: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(vocab_size=WORDS, tie_word_embeddings=True, **dict(zip(SIZES, SHAPES[shape])))
    with torch.device(DEVICE):
        return Qwen2ForCausalLM(config).to(torch.bfloat16)


# ---- against the limits of the device


def bench_decoding(model: Qwen2ForCausalLM, flops: float) -> dict[str, Any]:
    """Measures decoding on a device whose products make `flops` FLOPs per second."""
    a = torch.empty(2**30 // LESS, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    # a copy reads each byte and writes it, so each byte counts twice in the bandwidth
    bandwidth = 2 * a.numel() / measure(lambda: b.copy_(a))["seconds"]
    tokenizer = AutoTokenizer.from_pretrained(Config.model)
    rows = [Row(i, (0, i), ids, []) for i, ids in enumerate(torch.randint(0, WORDS, (ROWS, PROMPT)).tolist())]
    weights, product = 2 * model.num_parameters() / bandwidth, 2 * model.num_parameters() * ROWS / flops
    table = {}
    for name, new, decode in (("ours", NEW, decode_rows), ("few", FEW, decode_rows), ("plain, few", FEW, None)):
        measured = measure(lambda: generate(model, tokenizer, rows, new, decode=decode))  # noqa: B023
        caches = ROWS * (PROMPT + new / 2) * cache_bytes(model.config) / bandwidth
        limits = {
            "limit_s": new * (weights + caches),
            "limit_with_arithmetic_s": new * (max(weights, product) + caches),
        }
        table[name] = measured | limits | {"tokens_per_s": ROWS * new / measured["seconds"]}
    return table | {"copy_bytes_per_s": bandwidth}


def flops_per_token(model: Any, length: float, passes: int = 6) -> float:
    """Returns the model FLOPs of an update per token, forward and backward. `passes` is 4 for adapters, because the
    frozen weights need no gradients."""
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * length / 2
    return passes * model.num_parameters() + attention


def bench_limits(shape: str) -> dict[str, Any]:
    model = new_model(shape)
    model.loop = LOOPS[0]
    # the end token is outside the vocabulary, so no row ends early
    model.generation_config = GenerationConfig(eos_token_id=[WORDS], pad_token_id=0)
    fuse_norms(model)
    x = torch.randn(8192 // LESS, 8192 // LESS, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * len(x) ** 3 / measure(lambda: x @ x)["seconds"]
    ids = torch.randint(0, WORDS, (BATCH, LENGTH), device=DEVICE)

    def update() -> None:
        token_stats(model.train(), ids, torch.ones_like(ids), LENGTH - PROMPT, 1.0)[0].sum().backward()
        model.zero_grad()

    measured = measure(update)
    measured["model_flops_utilisation"] = ids.numel() * flops_per_token(model, LENGTH) / measured["seconds"] / peak
    return {"decoding": bench_decoding(model, peak), "update": measured, "bf16_flops_per_s": peak}


# ---- whole steps


def bench_steps(shape: str, part: str) -> dict[str, Any]:
    count, settings = STEPS[part]
    with tempfile.TemporaryDirectory() as folder:
        new_model(shape).save_pretrained(folder)
        AutoTokenizer.from_pretrained(Config.model).save_pretrained(folder)
        run, _ = prepare(from_dict(settings | {"model": folder, "out": f"{folder}/run"}))
    peaks: dict[str, list[float]] = {"sampling": [], "update": []}

    def watched(call: Callable, phase: str) -> Callable:
        def inner(*args: Any, **named: Any) -> Any:
            result, peak = peak_gib(lambda: call(*args, **named))
            peaks[phase].append(peak)
            return result

        return inner

    def uncut(*args: Any, **named: Any) -> list[Row]:
        return [replace(row, truncated=False) for row in generate(*args, **named)]  # a cut-off row would get reward 0

    with (
        patch.object(steps, "generate", watched(uncut, "sampling")),
        patch.object(steps, "update", watched(steps.update, "update")),
        patch.object(steps, "grade_all", lambda _, texts, __: [float(i % 2) for i in range(len(texts))]),
    ):
        made = [steps.rl_step(run, step) for step in range(count)]
    lines = []
    for step in made:
        lengths = [len(row.prompt_ids) + len(row.response) for row in step.batch.rows]
        work = sum(
            length * flops_per_token(run.model, length, 4 if run.config.lora_rank else 6) for length in lengths
        )
        seconds = dict(zip(("seconds_sample", "seconds_update"), step.seconds))
        seconds["tokens_with_weight"] = sum(update["with_weight"] for update in step.updates)
        share = work / step.seconds[1] / (GPUS["H200"][1] * 1e12)
        lines.append(seconds | {"mean_length": statistics.mean(lengths), "share_of_h200_data_sheet": share})
    longest = max(len(problem.prompt_ids) for problem in run.data.encoded)
    planned = plan(run.config, run.model.config, 1, longest)
    memory = {
        phase: {"measured_gib": max(gib), "planned_gib": sum(planned[phase].values()) / GIB}
        for phase, gib in peaks.items()
    }
    return {"settings": settings, "memory": memory, "steps": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=("limits", *STEPS))
    parser.add_argument("--shape", default="1.5b" if CUDA else "tiny", choices=SHAPES)
    args = parser.parse_args()
    for part in args.parts:
        table = bench_limits(args.shape) if part == "limits" else bench_steps(args.shape, part)
        write(f"throughput-{DEVICE}-{part}-{args.shape}", table)


if __name__ == "__main__":
    main()
