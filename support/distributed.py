"""One run on several processes (ranks): who is who, exchange, and a model whose weights are sharded with FSDP2.

A plain `python train.py` on a CPU uses none of this: rank() is 0, world_size() is 1, and every function hands back
what it was given. `torchrun --nproc_per_node N train.py …` starts N ranks. All of them plan, grade and weigh the
same rows; each samples and differentiates its share (generate, micro_batches below), and rank 0 writes and
prints. Training on CUDA shards in a single process too, over a mesh of one: the simplest way to fp32 weights with
bf16 compute. eval.py shares the rows in the same way; every rank has a whole model there.

    start -> shard                             in train.py (eval.py: start alone) and model.load_model
    gather_dict, sum_over_ranks, from_rank_0   what ranks tell each other, on the CPU (gloo)
    run_forward, gathered                      the training pass; whole weights on every rank, for sampling
    clip_gradients, full_state, shard_like     norm, checkpoints and final/ of a sharded model
Left out: tensor and pipeline parallelism, several nodes without a shared folder.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from support.errors import InputError

TIMEOUT = timedelta(hours=1)  # a rank that dies ends the others at once (torchrun), one that hangs after this


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> None:
    """Join the ranks torchrun started; alone on CUDA, be a group of one. Does nothing for one process elsewhere.

    Raises InputError for several ranks on a device that cannot, or more ranks than GPUs.
    """
    if dist.is_initialized() or ("RANK" not in os.environ and device.type != "cuda"):
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"several ranks need device cuda or cpu, found {device.type}: start python alone, without torchrun"
        )
    if device.type == "cuda":
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"rank {device.index} has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **alone)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def name() -> str:
    """Who speaks, before a message: "" where there is one process."""
    return f"rank {rank()}: " if world_size() > 1 else ""


def launcher() -> str:
    """What a command line begins with that starts as many ranks again."""
    return f"torchrun --nproc_per_node {world_size()}" if world_size() > 1 else "python"


def explain(error: RuntimeError, memory: str) -> str:
    """One line on an error that is no fault of the program: a full GPU (with what to do about it, `memory`), a rank
    that is gone; "" for any other."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: {memory}"
    if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL")):
        return f"lost another rank ({error})"
    return ""


# ---- exchange


def gather_dict(mine: dict) -> dict:
    """The entries of every rank's dict, on every rank."""
    if world_size() == 1:
        return mine
    parts: list[dict] = [{}] * world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over the ranks of a tensor on the CPU, on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---- a sharded model


def follow_first(model: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """Rank 0's model or, on the others (None), one of its structure without weights; and a second one for `shard`.

    The first rank read the file and decides: config.json alone may say otherwise (weights that are tied, noise).
    """
    config, dtype, loop = from_rank_0((model.config, model.dtype, getattr(model, "loop", None)) if model else None)
    with torch.device("meta"):
        one, two = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
    one.loop = two.loop = loop
    return model or one, two


def shard(model: nn.Module, plain: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Split fp32 weights, gradients and optimizer state over the ranks, layer by layer (FSDP2), in place.

    On CUDA layers compute in bf16, gradients are summed in fp32. `offload` keeps the split weights and the
    optimizer on the CPU. Rank 0 brings the weights on the CPU, the others a model on the meta device: only one
    copy stands in host memory (4 bytes a parameter), and it is sent tensor by tensor.
    Gradients are summed over ranks, not averaged: the loss has one global denominator. `plain`, the same model on the
    meta device, is what `gathered` hands out. Frozen weights, beside adapters, are not split: each rank has them.
    Raises InputError where layers share weights: FSDP would make them two.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    settings = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "mp_policy": bf16 if device.type == "cuda" else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy(),
    }
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    settings["ignored_params"] = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for parameter in settings["ignored_params"] if rank() == 0 else ():
        parameter.data = parameter.data.to(device)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*reversed(layers), model):  # a layer inside another one first
        fully_shard(module, **settings)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if weights.keys() != dict(model.named_parameters()).keys():
        raise InputError(
            "the model's layers share weights, which cannot be split: start python alone, with --device cpu"
        )
    if world_size() > 1:
        _send_weights(model, weights, buffers, device, "cpu" if offload else device)
    plain.generation_config = model.generation_config
    object.__setattr__(model, "plain", plain.eval())  # not a submodule: its weights are the model's
    model.run_forward = MethodType(_call, model)
    register_fsdp_forward_method(model, "run_forward")


def _call(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    return function(model, *arguments)


def run_forward(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    """function(model, *arguments), which passes through the model's parts. Of a sharded model it runs as a method,
    around which FSDP gathers the weights."""
    return model.run_forward(function, *arguments) if isinstance(model, FSDPModule) else function(model, *arguments)


@torch.no_grad()
def _send_weights(
    model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], device: torch.device, home: Any
) -> None:
    """Rank 0's weights and buffers to the others, whose model is still on the meta device."""
    if rank() > 0:
        model.to_empty(device=home)

    def sent(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device) if rank() == 0 else torch.empty_like(tensor, device=device)
        dist.broadcast(tensor, 0)
        return tensor

    for name, weight in weights.items():
        parameter, whole = model.get_parameter(name), sent(weight)
        if parameter.requires_grad:
            parameter.data.copy_(shard_like(whole, parameter))
        else:
            parameter.data = whole
    if len(trained(model)) < len(weights):
        model.tie_weights()  # to_empty has made two of a frozen embedding that is the head too
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = sent(buffer)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The model with whole weights on every rank (in bf16 on CUDA): it needs no other rank, however long it is used.

    Of a sharded model it is a plain one of the same shape that reads the gathered weights, without FSDP's hooks at
    every layer of every token (the sharded one would split the weights again).
    """
    if not isinstance(model, FSDPModule):
        yield model
        return
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.unshard()
    for own, sharded in zip(model.plain.modules(), model.modules(), strict=True):
        own._parameters.update(sharded._parameters)
        own._buffers.update(sharded._buffers)
    try:
        yield model.plain
    finally:
        for module in parts:
            module.reshard()


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together, over all ranks."""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to `max_norm` (0: leave it) -> its norm over all ranks, before."""
    parameters = list(parameters)
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without the second names of tied weights."""
    once = {name for name, _ in model.named_parameters()}
    second = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second}


def full_state(state: Any) -> Any:
    """A state dict (nested dicts and lists) with its split tensors put together, on rank 0's CPU; None elsewhere."""
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.detach().to(state.device_mesh.device_type).full_tensor()
    return tensor.cpu() if rank() == 0 else None


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """`tensor`, which every rank holds whole, split as `like` is; itself if that is not split."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


# ---- micro-batches


def cut_by_length(rollouts: Any, rows: Tensor, budget: int) -> list[Tensor]:
    """`rows` of sample.Rollouts sorted by length and cut so that rows x columns stay within `budget` tokens (or a row
    is alone)."""
    responses = rollouts.response_mask.sum(1)
    prompts, responses = (rollouts.attention_mask.sum(1) - responses).tolist(), responses.tolist()
    chunks: list[list[int]] = []
    prompt = response = 0
    for i in sorted(rows.tolist(), key=lambda i: (responses[i], prompts[i])):
        prompt, response = max(prompt, prompts[i]), max(response, responses[i])
        if not chunks or (len(chunks[-1]) + 1) * (prompt + response) > budget:
            chunks.append([])
            prompt, response = prompts[i], responses[i]
        chunks[-1].append(i)
    return [torch.tensor(chunk) for chunk in chunks]


def micro_batches(rollouts: Any, rows: Tensor, budget: int) -> list[Tensor]:
    """This rank's part of `rows`, as micro-batches of `budget` tokens: which rows go through the model together.

    Rows are dealt to the ranks by length. FSDP wants equally many passes on every rank, so a rank with fewer
    micro-batches than another gets empty ones behind its own. The gradient does not depend on the cut (step.update);
    time and memory do.
    """
    order = torch.cat([rows[:0], *cut_by_length(rollouts, rows, budget)])  # also without any row
    of_ranks = [cut_by_length(rollouts, order[r :: world_size()], budget) for r in range(world_size())]
    mine, most = of_ranks[rank()], max(map(len, of_ranks))
    return mine + [rows[:0]] * (most - len(mine))
