"""Qwen2.5 shapes with random weights on one GPU: speed against its limits, whole steps against the plan.

    python bench/gpu.py limits step --shape 1.5b

Writes bench/results/throughput-cuda-PART-SHAPE.json.
`limits`, in bf16. Decoding: 256 rows x 1024 new tokens, no row ends; plain `generate` (dynamic cache, eager), our
loop, the static cache with HF's compiled forward pass. A decode pass cannot be faster than reading the weights and
the filled part of the cache once: bytes / measured copy bandwidth. Update: forward and backward of token_stats; model
FLOPs 6 N per token and 12 layers x width x length for attention (half of it causal), recomputation not counted, over
the peak of a large bf16 product, measured too.
`step`: two steps of prefix-rft as train.py makes them (fp32 weights, bf16 compute, 16 problems x 8 rollouts x 1024
tokens), their seconds by phase and their peak memory beside that of plan.py. Rewards are made up, so that every
group has a gradient.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from common import peak_memory, write
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

import step as steps
import train
from model import sampling, token_stats
from plan import plan
from sample import DrawTokenLogitsProcessor, Row, generate
from support.config import Config, from_dict

SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
ROWS, PROMPT, NEW = 256, 256, 1024


def seconds(call: Callable, repeats: int = 3) -> float:
    """Median wall seconds of `call`, the GPU's queue emptied around it; the first call warms up."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def limits() -> tuple[float, float]:
    """-> bytes a second that a large copy moves (read and write), FLOPs a second of a large bf16 product"""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * a.numel() / seconds(lambda: b.copy_(a), 10), 2 * 8192**3 / seconds(lambda: x @ x, 10)


def plain(model, ids: torch.Tensor, uniforms: torch.Tensor) -> None:
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0
    )
    processors = LogitsProcessorList([DrawTokenLogitsProcessor(uniforms, PROMPT, 1.0)])
    with sampling(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=processors,
        )


def new_model(shape: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True, **SHAPES[shape])
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config).to(torch.bfloat16)


def bench_limits(shape: str) -> None:
    model = new_model(shape)
    config = model.config
    model.generation_config = GenerationConfig(eos_token_id=[config.vocab_size], pad_token_id=0)  # no row ends
    bandwidth, peak = limits()
    parameters = model.num_parameters()
    head = config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes of keys and values
    least = NEW * (2 * parameters + ROWS * (PROMPT + NEW / 2) * per_token) / bandwidth

    prompts = torch.randint(0, 151936, (ROWS, PROMPT))
    rows = [Row(i, (0, i), ids.tolist(), []) for i, ids in enumerate(prompts)]
    uniforms = torch.rand(ROWS, NEW, device="cuda")
    calls = {
        "plain generate": lambda: plain(model, prompts.cuda(), uniforms),
        "loop": lambda: generate(model, rows, NEW),
        "static": lambda: generate(model, rows, NEW, decode="static"),
    }
    decoding = {}
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        took = seconds(call)
        decoding[name] = {
            "s": round(took, 2),
            "tokens_per_s": round(ROWS * NEW / took),
            "share_of_bandwidth_limit": round(least / took, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }

    batch, length = 8, 2048
    ids = torch.randint(0, 151936, (batch, length), device="cuda")

    def update() -> None:
        model.train()
        token_stats(model, ids, torch.ones_like(ids), length - PROMPT, 1.0)[0].sum().backward()
        model.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    took = seconds(update)
    attention = 12 * config.num_hidden_layers * config.hidden_size * length / 2  # forward and backward, per token
    flops = batch * length * (6 * parameters + attention)
    write(
        f"cuda-limits-{shape}",
        {
            "device": torch.cuda.get_device_name(),
            "parameters": parameters,
            "copy_bytes_per_s": bandwidth,
            "bf16_flops_per_s": peak,
            "decoding": {"rows": ROWS, "new_tokens": NEW, "limit_s": round(least, 2), **decoding},
            "update": {
                "tokens_per_s": round(batch * length / took),
                "model_flops_utilisation": round(flops / took / peak, 3),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            },
        },
    )


def watch(name: str, peaks: dict[str, list[int]]) -> None:
    """Keep the peak memory of each call of step.NAME, what stood before it included."""
    inner = getattr(steps, name)

    def watched(*args, **settings):
        before = torch.cuda.memory_allocated()
        with peak_memory() as found:
            result = inner(*args, **settings)
        peaks.setdefault(name, []).append(before + found[0])
        return result

    setattr(steps, name, watched)


def bench_step(shape: str) -> None:
    settings = {"data": Config.data, "eval_every": 0, "max_response_tokens": NEW, "lr": 1e-6}
    settings |= {"prefill": True, "recompute": True, "micro_batch_tokens": 16384, "rows_per_call": 128}
    with tempfile.TemporaryDirectory() as folder:
        new_model(shape).save_pretrained(folder)
        AutoTokenizer.from_pretrained(Config.model).save_pretrained(folder)
        run, _ = train.prepare(from_dict(settings | {"model": folder, "out": f"{folder}/run"}))
    steps.grade_all = lambda reward, texts, problems: [float(i % 2) for i in range(len(texts))]
    peaks: dict[str, list[int]] = {}
    watch("generate", peaks)
    watch("update", peaks)
    log = [steps.rl_step(run, step)[0] for step in range(2)]
    longest = max(len(problem.prompt_ids) for problem in run.data.encoded)
    planned = {phase: sum(parts.values()) for phase, parts in plan(run.config, run.model.config, 1, longest).items()}
    measured = {"sampling": max(peaks["generate"]), "update": max(peaks["update"])}
    memory = {
        phase: {
            "measured_gib": round(measured[phase] / 2**30, 2),
            "planned_gib": round(planned[phase] / 2**30, 2),
            "error": round(planned[phase] / measured[phase] - 1, 3),
        }
        for phase in measured
    }
    keys = ("loss", "grad_norm", "response_tokens", "tokens_per_second", "seconds_sample", "seconds_update")
    write(
        f"cuda-step-{shape}",
        {"settings": settings, "memory": memory, "steps": [{key: row[key] for key in keys} for row in log]},
    )


PARTS = {"limits": bench_limits, "step": bench_step}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device found; on the CPU run bench/throughput.py")
    for part in args.parts:
        PARTS[part](args.shape)
