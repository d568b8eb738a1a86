"""This file trains low-rank adapters (LoRA, 2106.09685) on a frozen model. The package peft makes the adapters, and
only this file imports it.

`add` gives every linear layer of the blocks a product of two small matrices, alpha / rank · B·A, that starts at 0.
The model keeps its class, so sampling and training need no code for adapters: sampling and training read the same,
unmerged matrices. Only the adapters have gradients, optimizer state and a place in the checkpoint, and ranks exchange
only adapters. `merged` adds the adapters' products to the model's weights, for the folder final/. `save` writes only
the small matrices, in peft's own format. Adapters have no dropout and no biases. Embeddings, the head and quantised
models get no adapters. No run begins with another run's adapters.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from support.config import Config
from support.distributed import full_state, rank, trained
from support.errors import InputError


def of(config: Config) -> Config | None:
    """Returns `config` if it asks for adapters (lora_rank above 0), else None."""
    return config if config.lora_rank else None


def lr_times(config: Config) -> float:
    return config.lora_lr_times if config.lora_rank else 1.0


def smallest_sides(model: nn.Module) -> dict[str, int]:
    """Returns, for each name of a linear layer in the model's blocks, the smallest dimension of all weight matrices
    with this name."""
    sides: dict[str, int] = {}
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for path, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    name = path.rpartition(".")[2]
                    sides[name] = min(sides.get(name, layer.in_features), layer.in_features, layer.out_features)
    return sides


def add(model: PreTrainedModel, config: Config) -> None:
    """Freeze the model and add adapters to it, in place. The matrices B start at 0, so new adapters change no output.

    Raises InputError for a layer name that the model does not have, and for a lora_rank above the smaller dimension
    of a layer's weight matrix.
    """
    sides = smallest_sides(model)
    names = config.lora_targets.replace(",", " ").split() or sorted(sides)
    for name in names or ["(any)"]:
        if name not in sides:
            known = ", ".join(sorted(sides)) or "none"
            raise InputError(
                f"lora_targets: this model's blocks have no linear layer {name}, expected of these: {known}"
            )
        if config.lora_rank > sides[name]:
            raise InputError(
                f"lora_rank is {config.lora_rank}, expected at most {sides[name]}, the smaller dimension of {name}"
            )
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora_rank is above 0, but peft is not installed: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    wanted = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=names,
        base_model_name_or_path=model.config._name_or_path,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(wanted, model, low_cpu_mem_usage=model.device.type == "meta")
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Returns a plain model without weights, and a state dict of fp32 weights with the adapters' products added.

    `state` is the state dict of the whole model. A model without adapters is returned unchanged, with `state`.
    """
    if not hasattr(model, "peft_config"):
        return model, state
    config = model.peft_config["default"]
    weights = {}
    for name, tensor in state.items():
        weight = tensor.cpu().float()  # weights are merged on the CPU, because the GPU may have no room for a copy
        if name.endswith(".base_layer.weight"):
            a, b = (state[name.replace("base_layer", f"lora_{side}.default")].cpu() for side in "AB")
            weight = weight + config.lora_alpha / config.r * (b @ a)
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = weight
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.generation_config = model.generation_config
    return plain, weights


def save(model: PreTrainedModel, folder: Path) -> None:
    """If the model has adapters, write them in the format that peft.PeftModel.from_pretrained reads. Every rank calls
    this function."""
    if not hasattr(model, "peft_config"):
        return
    state = full_state(trained(model))
    if rank():
        return
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    matrices = {f"base_model.model.{name.replace('.default', '')}": p.contiguous() for name, p in state.items()}
    save_file(matrices, folder / "adapter_model.safetensors", {"format": "pt"})
