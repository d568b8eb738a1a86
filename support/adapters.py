"""Low-rank adapters (LoRA, 2106.09685) on a frozen model, by the package peft, which is imported only here.

`add` gives every linear layer of the blocks a product of two small matrices, alpha / rank · B·A, that starts at 0.
The model keeps its class, so the loop does not know of them: sampling and log-probs read the same matrices, unmerged.
Only they have gradients, an optimizer, a place in the checkpoint; ranks exchange nothing else.
`merged` puts the products into the weights, for final/; `save` writes the matrices alone, in peft's own format.
Left out: dropout, biases, embeddings, the head, quantised bases, a run that begins with another run's adapters.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from support.config import Config
from support.distributed import full_state, rank, trained
from support.errors import InputError


@dataclass(frozen=True)
class Adapters:
    """`targets`: names of linear layers, with commas between; empty: all of the blocks. `base_dtype`: of the frozen
    weights; the adapters are fp32. `seed`: of A, as B starts at 0."""

    rank: int
    alpha: float
    targets: str
    base_dtype: torch.dtype
    seed: int


def of(config: Config) -> Adapters | None:
    """Those that the settings ask for."""
    if not config.lora_rank:
        return None
    dtype = getattr(torch, config.base_dtype)
    return Adapters(config.lora_rank, config.lora_alpha, config.lora_targets, dtype, config.seed)


def lr_times(config: Config) -> float:
    return config.lora_lr_times if config.lora_rank else 1.0


def smallest_sides(model: nn.Module) -> dict[str, int]:
    """The linear layers of the model's blocks by name, with the smaller side of their smallest matrix."""
    sides: dict[str, int] = {}
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for path, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    name = path.rpartition(".")[2]
                    sides[name] = min(sides.get(name, layer.in_features), layer.in_features, layer.out_features)
    return sides


def add(model: PreTrainedModel, adapters: Adapters) -> None:
    """Freeze the model and add adapters, in place. InputError for a rank or targets that cannot be."""
    sides = smallest_sides(model)
    names = adapters.targets.replace(",", " ").split() or sorted(sides)
    for name in names or ["(any)"]:
        if name not in sides:
            known = ", ".join(sorted(sides)) or "none"
            raise InputError(
                f"lora_targets: this model's blocks have no linear layer {name}, expected of these: {known}"
            )
        if adapters.rank > sides[name]:
            raise InputError(
                f"lora_rank is {adapters.rank}, expected at most {sides[name]}, the smaller side of {name}"
            )
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora_rank is above 0, but peft is not installed: pip install peft")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        target_modules=names,
        base_model_name_or_path=model.config._name_or_path,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapters.seed)
        inject_adapter_in_model(config, model, low_cpu_mem_usage=model.device.type == "meta")
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()


def merged(model: PreTrainedModel, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The base's model, without data, and its weights in fp32 with the adapters' products in them; both as they are
    where the model has no adapters. `state`: all of the model."""
    if not hasattr(model, "peft_config"):
        return model, state
    config = model.peft_config["default"]
    weights = {}
    for name, weight in state.items():
        if name.endswith(".base_layer.weight"):
            a, b = (state[name.replace("base_layer", f"lora_{side}.default")] for side in "AB")
            weight = weight.float() + config.lora_alpha / config.r * (b @ a)
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = weight.float()
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.generation_config = model.generation_config
    return plain, weights


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write what peft.PeftModel.from_pretrained reads, if the model has adapters. Called on every rank."""
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
