"""Load and save a HuggingFace causal LM with its tokenizer; log-probs and entropies of responses.

In reading order: `load_tokenizer`, `load_model`, `save_model`, `sampling`; `token_stats`, the training forward pass.
On CUDA, or with several processes, support/distributed.py shards a model in training: three calls here, no more.
Left out: LoRA, quantisation, remote code, encoder-decoder models, models that change their logits after the head.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from support import distributed

LOGITS_PER_CHUNK = 2**25  # elements of a [tokens, V] logits chunk: 128 MiB in fp32, whatever B, R and V are
REMEMBERED = "trained_with.json"  # in a model folder that a run wrote
SMALL = 10_000_000  # below so many parameters a second CPU thread gains little, and costs much if a core is busy


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU. On CUDA each rank has a GPU of its own."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise ValueError(f"device is {name}, but PyTorch finds none here: give --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Errors of transformers and the hub as a ValueError of one line, with the fix where there is one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged folder can raise anything
        reasons = {
            "trust_remote_code": "it needs code of its own, which is never run here: use another architecture",
            "gated repo": f"it is gated: ask for access at https://huggingface.co/{path}, then run  hf auth login",
            "couldn't connect": "the hub cannot be reached and its cache has not got it: give a model folder",
            "ignore_mismatched_sizes": "its weights do not have the shapes of its config.json",
        }
        said = " ".join(str(error).split())[:200]
        reason = next((text for words, text in reasons.items() if words in str(error)), said)
        raise ValueError(f"model {path!r} cannot be loaded: {reason}") from error


def load_config(path: str) -> PreTrainedConfig:
    """The model's config, from a folder or a hub name. ValueError, one line, where there is none."""
    hub_logging.set_verbosity_error()  # without a network: our one line instead of every retry
    if not Path(path).exists() and path.count("/") != 1:
        raise ValueError(f"model {path!r} is neither a folder that exists nor a hub name (ORGANISATION/NAME)")
    with one_line(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def load_tokenizer(path: str) -> tuple[Tokenizer, GenerationConfig]:
    """The tokenizer, and the folder's generation config reduced to its end and padding ids, so that a top_k or
    repetition_penalty in it cannot change the sampling distribution.

    Raises ValueError, one line, for a folder without tokenizer or a tokenizer without an end token.
    """
    config, folder = load_config(path), Path(path)
    if folder.exists() and not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        raise ValueError(f"model {path!r} holds no tokenizer files: save the tokenizer into the folder too")
    with one_line(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no eos_token, so no response could end: set one")
        try:
            ends = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:
            if (folder / "generation_config.json").exists():
                raise
            ends = GenerationConfig.from_model_config(config).eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = [tokenizer.eos_token_id, *(end for end in ends if end != tokenizer.eos_token_id)]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return tokenizer, GenerationConfig(eos_token_id=ends, pad_token_id=pad)


def load_model(
    path: str,
    device: torch.device | str = "cpu",
    *,
    training: bool = False,
    recompute: bool = False,
    offload: bool = False,
) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal LM and its tokenizer, from a folder or a hub name (safetensors only; remote code is never run).

    `training`: weights are fp32 whatever the file holds, as an update of 1e-6 vanishes in bf16; after
    distributed.start() they are sharded over the ranks, and rank 0 alone reads them. Otherwise every process has all
    of them, on CUDA in bf16, which is what training computes in. All dropout is 0, so that the training forward pass
    gives the log-probs the sampler had.
    `recompute`: a layer's activations are made again in the backward pass instead of kept. `offload`: see
    distributed.shard.
    Raises ValueError, one line, as load_tokenizer, and for a folder without weights or a model whose logits are not
    its output head's.
    """
    device, folder = torch.device(device), Path(path)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer, generation_config = load_tokenizer(path)
    if folder.exists() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model {path!r} holds no *.safetensors weights: give a HuggingFace model folder")
    with one_line(path):
        if distributed.rank() == 0 or not training:
            dtype = torch.float32 if training or device.type != "cuda" else torch.bfloat16
            safe = {"use_safetensors": True, "trust_remote_code": False}
            model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **safe)
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {min(info['missing_keys'])}: the file is not whole")
        else:  # the weights come from rank 0
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(load_config(path), dtype=torch.float32)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"model {path!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")
    remove_dropout(model)
    if distributed.rank() == 0 and not head_gives_logits(model):
        raise ValueError(
            f"model {path!r}: its logits are not those of its output head (scaled or capped afterwards?), "
            "so log-probs taken from the head would be wrong: use another model"
        )
    model.generation_config = generation_config
    if recompute:
        recompute_layers(model)
    if training and torch.distributed.is_initialized():
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        plain.generation_config = generation_config
        distributed.shard(model, plain, device, offload)
        return model.train(), tokenizer
    if device.type == "cpu" and model.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model.to(device).train(), tokenizer


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing (transformers 5.23 has given the switch another name)."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def remove_dropout(model: PreTrainedModel) -> None:
    """All dropout probabilities 0 (not eval mode: gradient checkpointing is inactive there)."""
    for key, value in model.config.to_dict().items():
        if "dropout" in key and isinstance(value, int | float) and value:
            setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def head_gives_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output head's, tried on a few tokens."""
    ids = torch.arange(4)[None]
    head, hidden = model.get_output_embeddings(), model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(head(hidden), model(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict without the second names of tied weights."""
    once = {name for name, _ in model.named_parameters()}
    second = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second}


def save_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path, remembered: dict[str, Any] | None = None
) -> None:
    """Write a HF model folder: to a temporary name first, then renamed, so a half-written one is never seen.

    `remembered`: what `trained_with` will say about the model. Called on every rank; rank 0 writes."""
    state = distributed.full_state(state_of(model))
    if distributed.rank():
        return
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    if remembered:
        (partial / REMEMBERED).write_text(
            json.dumps(remembered, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def trained_with(path: str) -> dict[str, Any]:
    """What a run of this project noted in the model folder it wrote: "system", the system message its training rows
    share (null: they have several), and "reward"; {} for any other model."""
    file = Path(path) / REMEMBERED
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}): restore it or delete it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found {type(found).__name__}, expected a JSON object: restore it or delete it")
    return {name: found[name] for name in ("system", "reward") if isinstance(found.get(name), str)}


@contextlib.contextmanager
def sampling(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Gives the model to sample with: in eval mode, without gradients.

    (Gradient checkpointing would turn the key-value cache off in train mode.) Does not nest.
    """
    model.eval()
    try:
        with torch.no_grad(), distributed.gathered(model) as whole:
            yield whole
    finally:
        model.train()


def token_stats(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_length: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token and entropy of the distribution it came from.

    input_ids, attention_mask [B, P+R], response in the last R = response_length columns ->
    (log_probs [B, R] with gradient, entropy [B, R] without), in nats, of softmax(logits / temperature); 0 where
    attention_mask is 0. Logits are made, used and (in the backward pass) remade a chunk of tokens at a time in
    fp32; [B, R, V] never exists, and padding costs nothing here. Positions are explicit, so that padding does not
    shift them.
    """
    arguments = (input_ids, attention_mask, response_length, temperature)
    return distributed.run_forward(model, _token_stats, *arguments)


def _token_stats(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    mask = attention_mask[:, -response_length:].bool()
    hidden = hidden[:, -response_length - 1 : -1][mask]  # [n, H]: the state at token t predicts token t + 1
    targets = input_ids[:, -response_length:][mask]  # [n]
    log_probs, entropy = head_stats(model, hidden, targets, temperature)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return empty.masked_scatter(mask, log_probs), empty.masked_scatter(mask, entropy)


def head_stats(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_stats after the last layer: hidden [n, H], targets [n] -> log_probs [n], entropy [n], in chunks of n."""
    head = model.get_output_embeddings()

    def stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # [chunk, V]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)  # 0 * -inf = 0
        return log_p.gather(1, targets[:, None]).squeeze(1), entropy

    size = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    if len(targets) <= size:
        return stats(hidden, targets)
    parts = [
        checkpoint(stats, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(size), targets.split(size))
    ]
    log_probs, entropy = (torch.cat(column) for column in zip(*parts))
    return log_probs, entropy
