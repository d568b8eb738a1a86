"""Qwen2.5 shapes with random weights on one GPU: decoding and updates against the limits of the device.

    python bench/gpu.py --shape 1.5b

Writes bench/results/throughput-cuda-limits-SHAPE.json. All in bf16.

Decoding, no row ends: 256 rows x 1024 new tokens; and 128 new tokens beside plain `generate`. A decode pass cannot be
faster than reading the weights and the filled part of the cache once: bytes / measured copy bandwidth.
Update: forward and backward of token_stats; model FLOPs 6 N per token and 12 layers x width x length for attention
(half of it causal), recomputation not counted, over the peak of a large bf16 product, measured too.
Both also with HF's norms in place of the fused ones.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from common import write
from torch.utils.benchmark import Timer
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from fast.decode import LOOPS, decode_rows
from model import token_stats
from sample import Row, generate
from support.config import Config
from support.loading import fuse_norms

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
ROWS, PROMPT, NEW, FEW = 256, 256, 1024, 128


def seconds(call: Callable) -> float:
    """Median wall seconds of `call`, after it was called three times to warm up."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median


def limits() -> tuple[float, float]:
    """-> bytes a second that a large copy moves (read and write), FLOPs a second of a large bf16 product"""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * a.numel() / seconds(lambda: b.copy_(a)), 2 * 8192**3 / seconds(lambda: x @ x)


def new_model(shape: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True, **SHAPES[shape])
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.loop = LOOPS[0]
    return model


def unfuse_norms(model: Qwen2ForCausalLM) -> None:
    for module in model.modules():
        module.__dict__.pop("forward", None)


def bench_limits(shape: str) -> None:
    model = new_model(shape)
    config = model.config
    model.generation_config = GenerationConfig(eos_token_id=[config.vocab_size], pad_token_id=0)  # no row ends
    bandwidth, peak = limits()
    parameters = model.num_parameters()
    head = config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes of keys and values

    def floor(new: int) -> float:
        return new * (2 * parameters + ROWS * (PROMPT + new / 2) * per_token) / bandwidth

    prompts = torch.randint(0, 151936, (ROWS, PROMPT))
    rows = [Row(i, (0, i), ids.tolist(), []) for i, ids in enumerate(prompts)]
    decoding = {}

    def time_decoding(name: str, call: Callable, new: int) -> None:
        torch.cuda.reset_peak_memory_stats()
        took, least = seconds(call), floor(new)
        decoding[name] = {
            "new_tokens": new,
            "s": round(took, 2),
            "tokens_per_s": round(ROWS * new / took),
            "limit_s": round(least, 2),
            "share_of_bandwidth_limit": round(least / took, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        print(name, decoding[name], flush=True)

    tokenizer = AutoTokenizer.from_pretrained(Config.model)

    def sampled(new: int, decode: Callable | None = decode_rows) -> list[Row]:
        return generate(model, tokenizer, rows, new, decode=decode)

    fuse_norms(model)
    time_decoding("ours, few tokens", lambda: sampled(FEW), FEW)
    time_decoding("ours", lambda: sampled(NEW), NEW)
    unfuse_norms(model)
    time_decoding("ours, HF's norms", lambda: sampled(NEW), NEW)
    time_decoding("plain generate, few tokens", lambda: sampled(FEW, None), FEW)

    batch, length = 8, 2048
    ids = torch.randint(0, 151936, (batch, length), device="cuda")

    def update() -> None:
        model.train()
        token_stats(model, ids, torch.ones_like(ids), length - PROMPT, 1.0)[0].sum().backward()
        model.zero_grad()

    def time_update() -> dict:
        torch.cuda.reset_peak_memory_stats()
        took = seconds(update)
        return {
            "tokens_per_s": round(batch * length / took),
            "model_flops_utilisation": round(flops / took / peak, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }

    attention = 12 * config.num_hidden_layers * config.hidden_size * length / 2  # forward and backward, per token
    flops = batch * length * (6 * parameters + attention)
    updates = {"ours, HF's norms": time_update()}
    fuse_norms(model)
    updates["ours"] = time_update()
    write(
        f"cuda-limits-{shape}",
        {
            "device": torch.cuda.get_device_name(),
            "parameters": parameters,
            "copy_bytes_per_s": bandwidth,
            "bf16_flops_per_s": peak,
            "decoding": {"rows": ROWS, "prompt": PROMPT, **decoding},
            "update": {"rows": batch, "length": length, **updates},
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device found; on the CPU run bench/throughput.py")
    bench_limits(args.shape)
