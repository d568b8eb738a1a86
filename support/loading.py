"""This file helps to load a model: it picks the device, checks the model's folder or hub name, adapts config and
layers, and turns errors of libraries into one line."""

import contextlib
import copy
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from support.adapters import add
from support.config import Config
from support.errors import InputError
from support.files import reading

NOISE = ("drop", "jitter", "noise")  # a config field whose name contains one of these words makes training random
signature = functools.cache(inspect.signature)
SMALL = 10_000_000  # number of parameters below which a second CPU thread gains little, and costs much on a busy core


def pick_device(name: str = "auto") -> torch.device:
    """Returns the device called `name`; "auto" takes CUDA, else MPS, else the CPU. On CUDA each rank gets a GPU of
    its own."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise InputError(f"device is {name}, but PyTorch finds none here: give --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Turns errors of transformers and the hub into an InputError of one line, which names the fix if one is
    known."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged folder can raise any error
        reasons = {
            "trust_remote_code": "it needs code of its own, which is never run here: use another architecture",
            "gated repo": f"it is gated: ask for access at https://huggingface.co/{path}, then run  hf auth login",
            "not a local folder": "it is neither a folder that exists nor a model of the hub",
            "couldn't connect": "the hub cannot be reached and its cache has not got it: give a model folder",
            "ignore_mismatched_sizes": "its weights do not have the shapes of its config.json",
        }
        message = " ".join(str(error).split())[:200]
        reason = next((text for words, text in reasons.items() if words in str(error)), message)
        raise InputError(f"model {path!r} cannot be loaded: {reason}") from error


def load_config(path: str) -> PreTrainedConfig:
    """Returns the config of the model at `path`, which is a folder or a hub name. Raises InputError if `path` names
    no causal model that can be loaded."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # without a network the hub would log every retry before the error message
    folder, final = Path(path), Path(path) / "final"
    with reading(folder):
        is_here = folder.exists()
    if not is_here and (path.count("/") != 1 or path.startswith("data/")):
        raise InputError(f"model {path!r} is neither a folder that exists nor a hub name (ORGANISATION/NAME)")
    if final.is_dir() and not any(folder.glob("*.safetensors")):
        raise InputError(f"model {path!r} is the folder of a run, whose model is in {final}: give --model {final}")
    if folder.is_dir() and not (folder / "config.json").exists():
        what = "a folder here, but holds no model (no config.json): if the hub's model is meant, rename this folder"
        if (folder / "adapter_config.json").exists():
            what = "an adapter (LoRA): merge it into its model, and give the merged model's folder"
        raise InputError(f"model {path!r} is {what}")
    with one_line(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for field in ("quantization_config", "quantization", "compression_config"):
            if quantised := getattr(config, field, None):
                kind = dict(quantised).get("quant_method", field)
                raise InputError(f"the weights are quantised ({kind}): give the model that they were made from")
        if config.is_encoder_decoder:
            raise InputError("this is an encoder-decoder model: give a causal model")
        return config


def window_of(config: PreTrainedConfig) -> int | None:
    """Returns the model's window: how many tokens a prompt and its response may have together. Returns None if the
    config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_window(
    window: int | None, prompt: int, response: int, name: str, whose: str = "the longest prompt"
) -> None:
    """Raises InputError if `prompt` + `response` tokens are more than the model's `window`.

    `name` is the setting that limits the response, and `whose` names the prompt in the message.
    """
    if window and prompt + response > window:
        fix = f"lower {name} to {window - prompt}" if prompt + 1 < window else "give a shorter prompt"
        raise InputError(
            f"{whose} ({prompt} tokens) and {name} ({response}) exceed the model's {window} positions: {fix}"
        )


def fuse_norms(model: nn.Module) -> None:
    """Replace each RMS norm, for which HF runs six kernels, by a single kernel of PyTorch where the results agree.

    For Qwen2.5-1.5B on CUDA the single kernel saves a twelfth of an update's time and a tenth of the time of sampling
    [bench/results/gpu.md].
    """
    for module in model.modules():
        # a norm with a gate takes more arguments and is not replaced
        plain = list(signature(type(module).forward).parameters)[1:] == ["hidden_states"]
        if plain and hasattr(module, "variance_epsilon") and module.weight is not None:
            # the norms are compared on a copy with made-up weights, because the model may have no weights yet
            own = copy.deepcopy(module).to_empty(device="cpu").float()
            own.weight.data = torch.linspace(0.5, 1.5, own.weight.numel())
            x = own.weight.data.cos()
            if torch.allclose(own(x), fused_norm(own, x), rtol=1e-4, atol=1e-4):
                module.forward = MethodType(fused_norm, module)


def fused_norm(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def end_tokens(path: str, config: PreTrainedConfig) -> list[int]:
    """Returns the end tokens of the folder's generation config or, if it has no generation config, of the model's
    config."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        if (Path(path) / "generation_config.json").exists():
            raise
        ends = GenerationConfig.from_model_config(config).eos_token_id
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    size = config.get_text_config().vocab_size
    # end ids of `size` or more are dropped, because the model never samples them
    usable = [end for end in listed if type(end) is int and end < size]
    if any(type(end) is not int or end < 0 for end in listed) or (ends is not None and not usable):
        raise InputError(f"the eos_token_id is {ends!r:.80}, expected an id from 0 to {size - 1} or a list of ids")
    return usable


def limit_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Store in the tokenizer how many rows the model's embedding has.

    Some tokenizers have more tokens than the embedding has rows. data/loader.py raises an error only where a text
    needs such a token.
    """
    tokenizer.embedding_rows = config.get_text_config().vocab_size
    end, rows = tokenizer.eos_token_id, tokenizer.embedding_rows
    if end >= rows:
        fix = "set another eos_token in tokenizer_config.json"
        raise InputError(f"the tokenizer's end token has the id {end}, but the embedding has only {rows} rows: {fix}")


def switch_off_noise(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every probability of dropout, jitter or noise in `config` to 0, and return `config`."""
    for part in (config, config.get_text_config()):
        noise = {name for name, value in vars(part).items() if isinstance(value, float)}
        vars(part).update({name: 0.0 for name in noise if any(word in name for word in NOISE)})
    return config


def weights_dtype(device: torch.device, training: bool, config: Config | None) -> torch.dtype:
    """Returns the dtype in which weights are read. The dtype is fp32 for training; on CUDA the dtype is bf16 for
    sampling and for weights that are frozen under adapters. `config` is None without adapters."""
    if training and not config:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    return getattr(torch, config.base_dtype) if config else torch.float32


def prepare_layers(
    model: PreTrainedModel, device: torch.device, recompute: bool, adapters: Config | None = None
) -> None:
    """Add the `adapters` if given, and gradient checkpointing if `recompute`. On CUDA replace norms by faster ones.

    transformers 5.23 has renamed gradient_checkpointing_enable to activation_checkpointing_enable.
    """
    if adapters:
        add(model, adapters)
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if device.type == "cuda":
        fuse_norms(model)


def use_one_thread_if_small(model: PreTrainedModel) -> None:
    """Let the CPU use one thread for a small model, unless OMP_NUM_THREADS is set.

    The number of threads holds for the whole process, so only commands call this function.
    """
    small = model.device.type == "cpu" and model.num_parameters() < SMALL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
