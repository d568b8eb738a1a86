"""This file lets one run use several processes (ranks): it numbers them, exchanges data between them, and shards a
model with FSDP2.

A plain `python train.py` on a CPU needs none of these functions: rank() is 0, world_size() is 1, and all exchange and
sharding functions return their argument unchanged. `torchrun --nproc_per_node N train.py …` starts N ranks. All ranks
plan and grade the same rows and compute the same token weights. Each rank samples a part of the rows
(sample.generate) and computes the gradients of a part of the rows (`micro_batches`); rank 0 writes and prints. On
CUDA a single process shards the model too, over a mesh of one rank, because this is the simplest way to fp32 weights
with bf16 compute. In eval.py each rank also samples a part of the rows, but has a whole model.

    start, shard                               called by train.py and model.load_model (by eval.py: start alone)
    gather_dict, sum_over_ranks, from_rank_0   exchange between ranks, on the CPU (gloo)
    run_forward, gathered                      the training pass; whole weights on every rank, for sampling
    clip_gradients, full_state, shard_like     norm, checkpoints and final/ of a sharded model
Not supported are tensor and pipeline parallelism, and several nodes without a shared folder.
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

# if a rank hangs, the run ends after this time; if a rank dies, torchrun ends the run at once
TIMEOUT = timedelta(hours=1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: torch.device) -> None:
    """Join the process group of the ranks that torchrun started. A single process on CUDA becomes a group of one
    rank, and for a single process on another device `start` does nothing.

    Raises InputError if the device cannot have several ranks, or if there are more ranks than GPUs.
    """
    if dist.is_initialized() or ("RANK" not in os.environ and device.type != "cuda"):
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"several ranks need device cuda or cpu, found {device.type}: start python alone, without torchrun"
        )
    if device.type == "cuda":
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"rank {device.index} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **alone)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def name() -> str:
    """Returns the text with which this rank begins its messages; "" if there is only one process."""
    return f"rank {rank()}: " if world_size() > 1 else ""


def launcher() -> str:
    """Returns the beginning of a command line that starts the same number of ranks again."""
    return f"torchrun --nproc_per_node {world_size()}" if world_size() > 1 else "python"


def explain(error: RuntimeError, memory: str) -> str:
    """Returns a message of one line if `error` is a full GPU or a lost rank, which are no bugs. Returns "" for any
    other error.

    `memory` is the advice that the message gives for a full GPU.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: {memory}"
    if isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL")):
        return f"lost another rank ({error})"
    return ""


# ---- exchange


def gather_dict(mine: dict) -> dict:
    """Returns, on every rank, one dict with the entries of all ranks' dicts."""
    if world_size() == 1:
        return mine
    parts: list[dict] = [{}] * world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def sum_over_ranks(values: Tensor) -> Tensor:
    """Returns, on every rank, the sum of all ranks' `values`, which are tensors on the CPU."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def from_rank_0(value: Any) -> Any:
    """Returns, on every rank, the `value` of rank 0."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---- a sharded model


def follow_first(model: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """Returns, for `shard`, the model and a second model of the same structure without weights.

    Rank 0 passes its `model` and gets this model back; other ranks pass None and get a model without weights. All
    ranks build their models from rank 0's config, because read_model may have corrected it (tied weights, dropout).
    """
    config, dtype, loop = from_rank_0((model.config, model.dtype, getattr(model, "loop", None)) if model else None)
    with torch.device("meta"):
        one, two = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
    one.loop = two.loop = loop
    return model or one, two


def shard(model: nn.Module, plain: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Split fp32 weights, gradients and optimizer state over the ranks, layer by layer (FSDP2), in place.

    On CUDA layers compute in bf16, and gradients are summed in fp32. `offload` keeps the split weights and the
    optimizer on the CPU. Before the call rank 0 has the weights on the CPU, and other ranks have a model on the meta
    device. Thus host memory holds only one copy of the weights (4 bytes per parameter), and rank 0 sends the weights
    tensor by tensor. Gradients are summed over ranks, not averaged, because the loss has one global denominator.
    `plain` is the same model on the meta device, which `gathered` gives to the sampler. Weights that are frozen under
    adapters are not split: each rank has all frozen weights. Raises InputError if layers share weights, because FSDP
    would make two copies of shared weights.
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
    for module in (*reversed(layers), model):  # FSDP needs inner layers to be sharded first
        fully_shard(module, **settings)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo, the backend on CPUs, can only sum, not average
    if weights.keys() != dict(model.named_parameters()).keys():
        raise InputError(
            "the model's layers share weights, which cannot be split: start python alone, with --device cpu"
        )
    if world_size() > 1:
        _send_weights(model, weights, buffers, device, "cpu" if offload else device)
    plain.generation_config = model.generation_config
    object.__setattr__(model, "plain", plain.eval())  # not a submodule, so `plain` adds no weights to the model
    model.run_forward = MethodType(_call, model)
    register_fsdp_forward_method(model, "run_forward")


def _call(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    return function(model, *arguments)


def run_forward(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    """Returns function(model, *arguments), where `function` may call single parts of the model.

    For a sharded model `function` runs as a method of the model, around which FSDP gathers the weights.
    """
    return model.run_forward(function, *arguments) if isinstance(model, FSDPModule) else function(model, *arguments)


@torch.no_grad()
def _send_weights(
    model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], device: torch.device, home: Any
) -> None:
    """Send rank 0's weights and buffers to the other ranks, whose model is still on the meta device."""
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
        model.tie_weights()  # to_empty has separated the frozen embedding and head, so they are tied again
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = sent(buffer)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Gives, on every rank, a model with whole weights (in bf16 on CUDA). This model can be used without an exchange
    with other ranks.

    For a sharded model `gathered` gives the plain model of `shard`, which reads the gathered weights. The plain model
    has no FSDP hooks; the hooks of the sharded model would run at every layer and token and split the weights again.
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
    """Returns the norm of all `tensors` together, over all ranks. (In torch 2.13 the norm of sharded tensors already
    is the whole norm on every rank; `full_tensor` makes sure that the norm is whole.)"""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient down to a norm of at most `max_norm` (0: do not scale), and return its norm before the
    scaling, over all ranks."""
    parameters = list(parameters)
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the model's parameters that are not frozen, by name; tied parameters occur once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's state dict without the second names of tied weights."""
    once = {name for name, _ in model.named_parameters()}
    second = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second}


def full_state(state: Any) -> Any:
    """Returns a copy of `state` (nested dicts and lists) in which rank 0 has each split tensor whole, on the CPU, and
    other ranks have None in its place."""
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    tensor = state.detach().to(state.device_mesh.device_type).full_tensor()
    return tensor.cpu() if rank() == 0 else None


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """Returns `tensor`, which every rank holds whole, split over the ranks as `like` is. If `like` is not split,
    `tensor` is returned unchanged."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


# ---- micro-batches


def cut_by_length(rollouts: Any, rows: Tensor, budget: int) -> list[Tensor]:
    """Sorts `rows` of sample.Rollouts by length and cuts them into parts of at most `budget` tokens (rows x columns).
    A row that is longer than `budget` becomes a part of its own.
    """
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
    """Returns this rank's part of `rows` as micro-batches of at most `budget` tokens. The rows of a micro-batch pass
    through the model together.

    Rows are sorted by length and dealt to the ranks in turn. FSDP needs equally many forward passes on every rank, so
    a rank with fewer micro-batches than another gets empty micro-batches at the end. How rows are cut into
    micro-batches changes time and memory, not the gradient (step.update).
    """
    # rows[:0] stands here because torch.cat needs at least one tensor
    order = torch.cat([rows[:0], *cut_by_length(rollouts, rows, budget)])
    of_ranks = [cut_by_length(rollouts, order[r :: world_size()], budget) for r in range(world_size())]
    mine, most = of_ranks[rank()], max(map(len, of_ranks))
    return mine + [rows[:0]] * (most - len(mine))
