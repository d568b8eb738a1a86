"""This file trains low-rank adapters (LoRA, 2106.09685) on a frozen model. The package peft makes them and is
imported only here.

`add` gives every linear layer of the blocks a product of two small matrices, alpha / rank · B·A, that starts at 0.
The model keeps its class, so the loop does not know of adapters: sampling and log-probs read the same, unmerged
matrices. Only the adapters have gradients, optimizer state and a place in the checkpoint; ranks exchange nothing
else. `merged` adds the products to the weights, for final/. `save` writes the matrices alone, in peft's own format.
Left out are dropout, biases, embeddings, the head, quantised bases, and runs that begin with another run's adapters.
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
    """Returns the settings if they ask for adapters, else None."""
    return config if config.lora_rank else None


def lr_times(config: Config) -> float:
    return config.lora_lr_times if config.lora_rank else 1.0


def smallest_sides(model: nn.Module) -> dict[str, int]:
    """Returns the linear layers of the model's blocks by name, each with the smaller side of its smallest matrix."""
    sides: dict[str, int] = {}
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for path, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    name = path.rpartition(".")[2]
                    sides[name] = min(sides.get(name, layer.in_features), layer.in_features, layer.out_features)
    return sides


def add(model: PreTrainedModel, config: Config) -> None:
    """Freeze the model and add adapters to it, in place. B starts at 0, so they change nothing.

    Raises InputError for a layer name that the model does not have, and for a rank that is larger than a layer
    allows.
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
                f"lora_rank is {config.lora_rank}, expected at most {sides[name]}, the smaller side of {name}"
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
    """Returns a plain model without data, and its fp32 weights with the adapters' products added.

    `state` is the state dict of the whole model. A model without adapters comes back unchanged, with its `state`.
    """
    if not hasattr(model, "peft_config"):
        return model, state
    config = model.peft_config["default"]
    weights = {}
    for name, tensor in state.items():
        weight = tensor.cpu().float()  # not on a GPU, which may have no room for this copy
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
    """If the model has adapters, write them as peft.PeftModel.from_pretrained reads them. Every rank calls this."""
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
