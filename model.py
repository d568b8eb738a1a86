"""Load and save a HuggingFace causal LM with its tokenizer; log-probs and entropies of responses.

In reading order: `load_model`, `save_model`, `sampling`; `token_stats`, the training forward
pass. Left out: LoRA, quantisation, remote code, encoder-decoder models.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

LOGITS_PER_CHUNK = 2**25  # elements of a [tokens, V] logits chunk: 128 MiB in fp32, whatever B, R and V are
SMALL = 10_000_000  # below so many parameters a second CPU thread gains little, and costs much if a core is busy


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model(path: str, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Tokenizer]:
    """A causal LM in fp32 and its tokenizer, from a folder or a hub name.

    Weights are fp32 whatever the file holds: an update of 1e-6 vanishes in bf16. All dropout is 0, so that the
    training forward pass gives the log-probs the sampler had. The folder's generation config is reduced to its
    end and padding ids, so that a top_k or repetition_penalty in it cannot change the sampling distribution.
    Raises ValueError, one line, for a folder without weights or tokenizer or a tokenizer without an end token.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folder = Path(path)
    if folder.exists() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model {path!r} holds no *.safetensors weights: give a HuggingFace model folder")
    if folder.exists() and not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        raise ValueError(f"model {path!r} holds no tokenizer files: save the tokenizer into the folder too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {path!r} cannot be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {path!r}: its tokenizer has no eos_token, so no response could end: set one")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        rows = model.get_input_embeddings().num_embeddings
        raise ValueError(f"model {path!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")
    for key, value in model.config.to_dict().items():
        if "dropout" in key and isinstance(value, int | float) and value:
            setattr(model.config, key, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = [tokenizer.eos_token_id, *(end for end in ends if end != tokenizer.eos_token_id)]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    if torch.device(device).type == "cpu" and model.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model.to(device).train(), tokenizer


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a HF model folder: to a temporary name first, then renamed, so a half-written one is never seen."""
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextlib.contextmanager
def sampling(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradients: gradient checkpointing would turn the key-value cache off in train mode."""
    model.eval()
    try:
        with torch.no_grad():
            yield
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
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    mask = attention_mask[:, -response_length:].bool()
    hidden = hidden[:, -response_length - 1 : -1][mask]  # [n, H]: the state at token t predicts token t + 1
    targets = input_ids[:, -response_length:][mask]  # [n]
    head = model.get_output_embeddings()

    def stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # [chunk, V]
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)  # 0 * -inf = 0
        return log_p.gather(1, targets[:, None]).squeeze(1), entropy

    size = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    if len(targets) <= size:
        parts = [stats(hidden, targets)]
    else:
        parts = [
            checkpoint(stats, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden.split(size), targets.split(size))
        ]
    log_probs, entropy = (torch.cat(column) for column in zip(*parts))
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return empty.masked_scatter(mask, log_probs), empty.masked_scatter(mask, entropy)
