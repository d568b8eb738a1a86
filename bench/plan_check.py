"""The plan of small models (plan.py) against measured peaks: updates, and calls of generate.

python bench/plan_check.py        writes bench/results/plan.json (about a minute on one core)
"""

import json
from typing import Any

import torch
from common import RESULTS, machine, parts_of, peak_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

import model as models
from fast.decode import LOOPS, decode_rows
from plan import PREFILL_TOKENS, sampling_bytes, update_bytes
from sample import Row, generate
from support.loading import pick_device, prepare_layers

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "qwen2, 8 rows": (Qwen2Config(**SMALL, num_hidden_layers=6, vocab_size=8000), 8, 32, 224, False),
    "qwen2, 8 rows, recompute": (Qwen2Config(**SMALL, num_hidden_layers=6, vocab_size=8000), 8, 32, 224, True),
    "llama, 2 long rows": (LlamaConfig(**SMALL, num_hidden_layers=4, vocab_size=32000), 2, 64, 960, False),
    "llama, 2 long rows, recompute": (LlamaConfig(**SMALL, num_hidden_layers=4, vocab_size=32000), 2, 64, 960, True),
}


def measured(shape: Any, rows: int, prompt: int, response: int, recompute: bool) -> tuple[int, int]:
    """Measured peak of an update in fp32 on one unsplit device -> (with, without weights, gradients, optimizer)."""
    torch.manual_seed(0)
    shape._attn_implementation = "sdpa"
    device = pick_device()
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to(device).train()
    prepare_layers(model, torch.device("cpu"), recompute)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, shape.vocab_size, (rows, prompt + response), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a batch without padding would need no mask

    def update() -> None:
        models.token_stats(model, ids, mask, response, 1.0)[0].sum().backward()
        optimizer.step()

    update()  # gradients and the optimizer's state stand there from now on
    static = 16 * sum(p.numel() for p in model.parameters())
    beyond = peak_bytes(update)
    return static + beyond, beyond


SAMPLING = {  # rows, prompt, response
    "qwen2, sampling": ("qwen2, 8 rows", 32, 32, 224),
    "qwen2, sampling, prompts read in two blocks": ("qwen2, 8 rows", 64, 512, 4),
    "llama, sampling, short responses": ("llama, 2 long rows", 32, 32, 32),
}


def measured_sampling(shape: Any, rows: int, prompt: int, response: int) -> int:
    """Measured peak of a call of generate in fp32 in which no row ends, beyond the weights."""
    shape._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to(pick_device())
    model.generation_config = GenerationConfig(eos_token_id=[shape.vocab_size], pad_token_id=0)
    prompts = torch.randint(0, shape.vocab_size, (rows, prompt)).tolist()
    plan = [Row(i, (i,), ids[i % 3 :], []) for i, ids in enumerate(prompts)]
    model.loop = LOOPS[0]
    tokenizer = AutoTokenizer.from_pretrained("data/base")
    generate(model, tokenizer, plan, 2, decode=decode_rows)
    return peak_bytes(lambda: generate(model, tokenizer, plan, response, decode=decode_rows))


def main() -> None:
    parts_of(__doc__)
    results = {}
    for name, (case, rows, prompt, response) in SAMPLING.items():
        shape = CASES[case][0]
        found = measured_sampling(shape, rows, prompt, response)
        tokens = min(PREFILL_TOKENS, rows * prompt)
        planned = sum(sampling_bytes(shape, rows, prompt + response, tokens, size=4).values())
        results[name] = {"measured_bytes": found, "planned_bytes": planned, "error": round(planned / found - 1, 4)}
        print(f"{name:<45}{found / 2**20:8.0f} MiB measured {planned / 2**20:8.0f} planned", results[name])
    for name, (shape, rows, prompt, response, recompute) in CASES.items():
        total, beyond = measured(shape, rows, prompt, response, recompute)
        fused = pick_device().type == "cuda"
        counted = update_bytes(shape, rows, prompt, response, torch.float32, recompute, fused)
        planned = total - beyond + counted
        results[name] = {
            "measured_bytes": total,
            "planned_bytes": planned,
            "error": round(planned / total - 1, 4),
            "measured_beyond_weights_gradients_optimizer": beyond,
            "planned_beyond": counted,
            "error_beyond": round(counted / beyond - 1, 4),
        }
        print(f"{name:<45}{total / 2**20:8.0f} MiB measured {planned / 2**20:8.0f} planned", results[name])
    RESULTS.mkdir(exist_ok=True)
    what = "peak of small updates and of sampling in fp32, unsplit, on this machine: measured and planned"
    (RESULTS / "plan.json").write_text(
        json.dumps({"what": what, "cases": results, "machine": machine()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
