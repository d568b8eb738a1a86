"""This script compares the plan of small models (plan.py) with measured peaks, of updates and of calls of generate.

python bench/plan_check.py        writes bench/results/plan.json (about a minute on one core)

All is in fp32, on one device without sharding. The peak of an update is counted beyond weights, gradients and
optimizer, which exist before it.
"""

import itertools
from typing import Any

import torch
from common import peak_bytes, write
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

import model as models
from fast.decode import LOOPS, decode_rows
from plan import PREFILL_TOKENS, sampling_bytes, update_bytes
from sample import Row, generate
from support.config import Config
from support.distributed import trained
from support.loading import pick_device, prepare_layers

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = Qwen2Config(**SMALL, num_hidden_layers=6, vocab_size=8000)
LLAMA = LlamaConfig(**SMALL, num_hidden_layers=4, vocab_size=32000)
UPDATES = ((QWEN, 8, 32, 224), (LLAMA, 2, 64, 960))  # (rows, prompt tokens, response tokens)
SAMPLING = ((QWEN, 32, 32, 224), (QWEN, 64, 512, 4), (LLAMA, 32, 32, 32))


def new_model(shape: Any) -> models.PreTrainedModel:
    torch.manual_seed(0)
    shape._attn_implementation = "sdpa"
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).to(pick_device())


def measured_update(
    shape: Any, rows: int, prompt: int, response: int, recompute: bool, low_rank: Config | None = None
) -> int:
    model = new_model(shape).train()
    prepare_layers(model, torch.device("cpu"), recompute, low_rank)
    optimizer = torch.optim.AdamW(trained(model).values(), fused=True)
    ids = torch.randint(0, shape.vocab_size, (rows, prompt + response), device=model.device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding is there because a batch without it would need no mask

    def update() -> None:
        models.token_stats(model, ids, mask, response, 1.0)[0].sum().backward()
        optimizer.step()

    update()  # from now on gradients and the optimizer's state exist
    return peak_bytes(update)


def measured_sampling(shape: Any, rows: int, prompt: int, response: int) -> int:
    """Returns the peak of a call of generate in which no row ends."""
    model = new_model(shape)
    model.generation_config = GenerationConfig(eos_token_id=[shape.vocab_size], pad_token_id=0)
    prompts = torch.randint(0, shape.vocab_size, (rows, prompt)).tolist()
    plan = [Row(i, (i,), ids[i % 3 :], []) for i, ids in enumerate(prompts)]
    model.loop = LOOPS[0]
    tokenizer = AutoTokenizer.from_pretrained("data/base")
    generate(model, tokenizer, plan, 2, decode=decode_rows)
    return peak_bytes(lambda: generate(model, tokenizer, plan, response, decode=decode_rows))


def compared(measured: int, planned: float) -> dict[str, Any]:
    return {"measured": measured, "planned": planned, "error": f"{planned / measured - 1:+.1%}"}


def main() -> None:
    results, fused = {}, pick_device().type == "cuda"
    for shape, *sizes in SAMPLING:
        rows, prompt, response = sizes
        tokens = min(PREFILL_TOKENS, rows * prompt)
        planned = sum(sampling_bytes(shape, rows, prompt + response, tokens, size=4).values())
        results[f"sampling, {shape.model_type}, {sizes}"] = compared(measured_sampling(shape, *sizes), planned)
    for (shape, *sizes), recompute in itertools.product(UPDATES, (False, True)):
        planned = update_bytes(shape, *sizes, torch.float32, recompute, fused)
        name = f"update, {shape.model_type}, {sizes}" + ", recompute" * recompute
        results[name] = compared(measured_update(shape, *sizes, recompute), planned)
    write("plan", results)


if __name__ == "__main__":
    main()
