"""This file makes a saved model folder readable for transformers 4 and for programs that are built on transformers 4.

transformers 5 has moved fields of config.json (`rope_theta` into `rope_parameters`). For a missing field transformers
4 takes its default without a warning: for example, RoPE's base 1e6 becomes 1e4. Training changes neither config nor
tokenizer, so the base model's own fields are written beside the new fields, and its tokenizer files are copied. If
transformers 5 has written the base model, the base has no old fields. Without old fields in the base model, RoPE's
old fields and Qwen3-MoE's number of experts are made from the new fields. In all models that both versions know, no
other field is missing [tests/transformers_4.py]. If the old fields cannot describe the RoPE of the new fields, there
is a warning.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, logging

MOVED = ("rope_theta", "partial_rotary_factor")  # transformers 5 has moved these fields to rope_parameters
OLD_NAMES = {  # for models whose type contains the key: fields of transformers 5 -> their names in transformers 4
    "gemma3": {"local_rope_theta": "rope_local_base_freq"},  # "local" means layers with sliding attention
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "local_rope_theta": "local_rope_theta"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*_tokens*.json", "chat_template*")


def make_readable(folder: Path, base: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Make `folder`, which save_pretrained has written with weights of `dtype`, readable for transformers 4.

    `base` is the folder or hub name from which model and tokenizer were loaded; `base` is empty if the model was not
    loaded from any folder.
    """
    original = PreTrainedConfig.get_config_dict(base)[0] if base else {}
    for pattern in TOKENIZER_FILES if base else ():
        for file in folder_of(base).glob(pattern):
            shutil.copyfile(file, folder / file.name)
    stored = {"dtype": str(dtype).removeprefix("torch.")}
    rewrite(folder / "config.json", lambda config: with_old_fields(config | stored, original))
    if not says_the_same(PreTrainedConfig.get_config_dict(folder)[0]):
        logging.get_logger("transformers").warning(f"{base}: once saved, transformers 4 reads its RoPE otherwise")
    rewrite(folder / "tokenizer_config.json", as_old_tokenizer)
    # save_pretrained lets only the owner read safetensors files, so they get the permissions of config.json
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def folder_of(model: str) -> Path:
    """Returns the folder of `model`: the folder itself, or for a hub name the folder where its files are cached."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def share_changed(folder: Path, base: str) -> float:
    """Returns the share of the weights in `folder` that differ from the weights of the base model, both in the dtype
    of `folder`."""
    original, changed, total = {}, 0, 0
    for file in folder_of(base).glob("*.safetensors"):
        original |= load_file(file)
    for file in folder.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if name in original:
                changed += int((weight != original[name].to(weight.dtype)).sum())
                total += weight.numel()
    return changed / max(1, total)


def rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    values = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def with_old_fields(config: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with added fields that only transformers 4 reads, taken from the base model's `original`
    config."""
    # the base is a model of text and images, of which only the text part was loaded
    if original.get("model_type") != config.get("model_type"):
        original = original.get("text_config", {})
    complete = old_fields(config) | original | config
    for name, part in config.items():
        if isinstance(part, dict) and "model_type" in part:  # `part` is text_config or vision_config
            complete[name] = with_old_fields(part, original.get(name, {}))
    if "dtype" in config:
        complete["torch_dtype"] = config["dtype"]
    return complete


def old_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that transformers 5 has moved or renamed, under the names that transformers 4 reads."""
    names = next((names for kind, names in OLD_NAMES.items() if kind in config["model_type"]), {})
    new = config.get("rope_parameters") or {}
    local, new = new.get("sliding_attention") or {}, new.get("full_attention", new) or {}
    fields = config | new | {"local_rope_theta": local.get("rope_theta")}
    old = {names.get(name, name): fields[name] for name in (*MOVED, *names) if fields.get(name) is not None}
    scaling = {name: value for name, value in new.items() if name not in MOVED}
    if "long_factor" in scaling:
        old["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
        if config["model_type"] == "phi3":  # transformers 4 refuses other fields for phi3
            scaling = {"type": "longrope"} | {name: scaling[name] for name in ("short_factor", "long_factor")}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        old["rope_scaling"] = scaling
    return old


def says_the_same(config: dict[str, Any]) -> bool:
    """Returns whether the old fields alone give the RoPE of the new fields. In this function transformers 5 reads the
    old fields, as transformers 4 would."""
    old = dict(config.get("text_config", config))
    new = old.pop("rope_parameters", None)
    try:
        read = new and AutoConfig.for_model(**old).rope_parameters | {"type": ""}
    except Exception:  # an unusual config can raise any error
        return False
    return not new or read == new | {"type": ""}  # "type" is an older name of rope_type


def as_old_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Change a tokenizer's config to the names that transformers 4 and 5 both know, and return it."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
