"""This file measures the memory that an update and a call of generate take on the CPU. Tests compare the measured
memory with what plan.py computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fast.decode import LOOPS, decode_rows
from model import PreTrainedModel, token_stats
from sample import Row, generate
from support.config import Config
from support.distributed import trained
from support.loading import prepare_layers


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the most bytes of tensors that `work` holds at once, beyond the tensors that existed before.

    PyTorch's profiler records every allocation, also those inside kernels.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def new_model(shape: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape._attn_implementation = "sdpa"
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def measured_update(
    shape: Any, rows: int, prompt: int, response: int, recompute: bool, low_rank: Config | None = None
) -> int:
    """Returns the most bytes that an update needs beside weights, gradients and optimizer state, which exist before
    the update."""
    model = new_model(shape).train()
    prepare_layers(model, torch.device("cpu"), recompute, low_rank)
    optimizer = torch.optim.AdamW(trained(model).values(), fused=True)
    ids = torch.randint(0, shape.vocab_size, (rows, prompt + response))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # the first row has padding, because a batch without padding needs no mask

    def update() -> None:
        token_stats(model, ids, mask, response, 1.0)[0].sum().backward()
        optimizer.step()

    update()  # the first update allocates the gradients and the optimizer's state
    return peak_bytes(update)


def measured_sampling(shape: Any, rows: int, prompt: int, response: int) -> int:
    """Returns the most bytes that a call of generate needs beside the weights, if all rows have `response` tokens."""
    model = new_model(shape)
    model.generation_config = GenerationConfig(eos_token_id=[shape.vocab_size], pad_token_id=0)
    prompts = torch.randint(0, shape.vocab_size, (rows, prompt)).tolist()
    plan = [Row(i, (i,), ids[i % 3 :], []) for i, ids in enumerate(prompts)]
    model.loop = LOOPS[0]
    tokenizer = AutoTokenizer.from_pretrained("data/base")
    generate(model, tokenizer, plan, 2, decode=decode_rows)
    return peak_bytes(lambda: generate(model, tokenizer, plan, response, decode=decode_rows))
