"""Makes a saved model folder readable for transformers 4 and for programs that are built on it.

transformers 5 has moved fields of config.json (`rope_theta` into `rope_parameters`). Version 4 takes its default for
a missing field, without a warning: RoPE's base 1e6 becomes 1e4. Training changes neither config nor tokenizer, so
the base model's own fields are written beside the new ones, and its tokenizer files are copied.
A base model that version 5 has written has no old fields. Its old RoPE fields are then made from the new ones.
Left out are other fields that such a base may lack (`num_experts`), and RoPE of two kinds except Gemma 3's.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import cached_file

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)


def make_readable(folder: Path, base: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Complete a folder that save_pretrained has written, with weights of dtype `dtype`.

    `base` is the folder or hub name that model and tokenizer were loaded from; it is empty if neither was loaded.
    """
    original = PreTrainedConfig.get_config_dict(base)[0] if base else {}
    for pattern in TOKENIZER_FILES if base else ():
        for file in folder_of(base).glob(pattern):
            shutil.copyfile(file, folder / file.name)
    stored = {"dtype": str(dtype).removeprefix("torch.")}
    rewrite(folder / "config.json", lambda config: with_old_fields(config | stored, original))
    rewrite(folder / "tokenizer_config.json", as_old_tokenizer)
    # safetensors files can be read by their owner alone; give them config.json's permissions
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def folder_of(model: str) -> Path:
    """Returns the folder itself, or for a hub name the folder where its files are cached."""
    return Path(model) if Path(model).is_dir() else Path(cached_file(model, "config.json")).parent


def share_changed(folder: Path, base: str) -> float:
    """Returns the share of the weights in `folder` that differ from those of the base model, rounded to their
    dtype."""
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
    """Returns `config` with the fields that only transformers 4 reads, taken from the base model's `original`
    config."""
    if original.get("model_type") != config.get("model_type"):  # then only the text part of the base was loaded
        original = original.get("text_config", {})
    complete = old_rope(config) | original | config
    for name, part in config.items():
        if isinstance(part, dict) and "model_type" in part:  # such a part is text_config or vision_config
            complete[name] = with_old_fields(part, original.get(name, {}))
    if "dtype" in config:
        complete["torch_dtype"] = config["dtype"]
    return complete


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `rope_parameters` as the fields that transformers 4 reads."""
    new = config.get("rope_parameters") or {}
    old = {}
    if new and "gemma3" in config["model_type"]:  # Gemma 3 has one RoPE for each kind of layer
        old["rope_local_base_freq"] = new["sliding_attention"]["rope_theta"]
        new = new["full_attention"]
    scaling = dict(new)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in new:
            old[name] = scaling.pop(name)
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old


def as_old_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Change a tokenizer's config to the names that transformers 4 and 5 both know, and return it."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
