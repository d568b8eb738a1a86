"""Measures decoding and updates of Qwen2.5's shapes with random weights on one GPU, against the limits of the device.

    python bench/gpu.py --shape 1.5b

The script writes bench/results/throughput-cuda-limits-SHAPE.json. All computation is in bf16.

Decoding is measured with 256 rows x 1024 new tokens, and compared with plain `generate` at 128 new tokens; no row
ends early. A forward pass of decoding cannot be faster than reading the weights and the filled part of the key-value
cache once. So the limit is the bytes of weights and cache / the measured copy bandwidth. An update is a forward and a
backward pass of model.token_stats. The model FLOPs of an update are 6 N per token (N parameters) plus 12 layers x
width x length / 2 for causal attention, without recomputation. The utilisation is model FLOPs per second / the
measured rate of a large bf16 product.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from common import CUDA, write
from torch.utils.benchmark import Timer
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from fast.decode import LOOPS, decode_rows
from model import token_stats
from sample import Row, generate
from support.config import Config
from support.loading import fuse_norms
from support.memory import cache_bytes

WORDS = 151936
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"0.5b": (896, 4864, 24, 14, 2), "1.5b": (1536, 8960, 28, 12, 2)}
ROWS, PROMPT, NEW, FEW = 256, 256, 1024, 128
BATCH, LENGTH = 8, 2048  # rows, and tokens per row, of the measured update


def measure(call: Callable) -> dict[str, float]:
    """Returns the median wall seconds of `call` after a warm-up call, and the peak memory in GiB."""
    torch.cuda.reset_peak_memory_stats()
    seconds = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=1).median
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def new_model(shape: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(vocab_size=WORDS, tie_word_embeddings=True, **dict(zip(SIZES, SHAPES[shape])))
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.loop = LOOPS[0]
    # the end token is outside the vocabulary, so no row ends early
    model.generation_config = GenerationConfig(eos_token_id=[WORDS], pad_token_id=0)
    fuse_norms(model)
    return model


def bench_decoding(model: Qwen2ForCausalLM) -> dict[str, dict]:
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    # a copy reads each byte and writes it, so each byte counts twice in the bandwidth
    bandwidth = 2 * a.numel() / measure(lambda: b.copy_(a))["seconds"]
    tokenizer = AutoTokenizer.from_pretrained(Config.model)
    rows = [Row(i, (0, i), ids, []) for i, ids in enumerate(torch.randint(0, WORDS, (ROWS, PROMPT)).tolist())]
    table = {}
    for name, new, decode in (("ours", NEW, decode_rows), ("few", FEW, decode_rows), ("plain, few", FEW, None)):
        measured = measure(lambda: generate(model, tokenizer, rows, new, decode=decode))  # noqa: B023
        passed = 2 * model.num_parameters() + ROWS * (PROMPT + new / 2) * cache_bytes(model.config)
        share = new * passed / bandwidth / measured["seconds"]
        table[name] = measured | {"tokens_per_s": ROWS * new / measured["seconds"], "share_of_bandwidth_limit": share}
    return table | {"copy_bytes_per_s": bandwidth}


def bench_update(model: Qwen2ForCausalLM) -> dict[str, float]:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / measure(lambda: x @ x)["seconds"]
    ids = torch.randint(0, WORDS, (BATCH, LENGTH), device="cuda")

    def update() -> None:
        token_stats(model.train(), ids, torch.ones_like(ids), LENGTH - PROMPT, 1.0)[0].sum().backward()
        model.zero_grad()

    measured = measure(update)
    # FLOPs of causal attention per token, forward and backward
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * LENGTH / 2
    flops = BATCH * LENGTH * (6 * model.num_parameters() + attention)
    utilisation = flops / measured["seconds"] / peak
    return measured | {"model_flops_utilisation": utilisation, "bf16_flops_per_s": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    shape = parser.parse_args().shape
    if not CUDA:
        sys.exit("gpu.py: no CUDA device found; on the CPU run bench/throughput.py")
    model = new_model(shape)
    write(f"throughput-cuda-limits-{shape}", {"decoding": bench_decoding(model), "update": bench_update(model)})


if __name__ == "__main__":
    main()
