"""This file loads and saves a HuggingFace causal LM with its tokenizer, and gives log-probs and entropies of
responses.

The order of this file: `load_tokenizer`, `load_model`, `save_model`, `sampling`; `response_text`; `token_stats`,
which is the training forward pass. On CUDA, or with several processes, support/distributed.py shards a model in
training. support/loading.py picks the device and turns errors of libraries into one line. fast/check.py tests on a
few tokens that a loaded model behaves as model.py assumes. Not supported are quantisation, remote code,
encoder-decoder models, and models that change their logits after the head.
"""

import contextlib
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from support import distributed
from support.adapters import merged
from support.config import Config
from support.errors import InputError
from support.loading import (
    end_tokens,
    limit_ids,
    load_config,
    one_line,
    prepare_layers,
    signature,
    switch_off_noise,
    weights_dtype,
)
from support.model_folder import make_readable

LOGITS_PER_CHUNK = 2**25  # number of logits computed at once: 128 MiB in fp32, whatever the vocabulary


# ---- load and save


def load_tokenizer(path: str) -> tuple[Tokenizer, GenerationConfig]:
    """Returns the tokenizer, and a generation config that has only the end and padding ids. So a top_k or
    repetition_penalty in the model folder cannot change the sampling distribution.

    Raises InputError for a folder without a tokenizer, and for a tokenizer without an end token.
    """
    config, folder = load_config(path), Path(path)
    if folder.exists() and not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        raise InputError(f"model {path!r} holds no tokenizer files: save the tokenizer into the folder too")
    with one_line(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos_token, so no response could end: set an eos_token")
        ends = [tokenizer.eos_token_id, *end_tokens(path, config)]
        limit_ids(tokenizer, config)
    pads = tokenizer.pad_token_id, tokenizer.eos_token_id
    pad = next(pad for pad in pads if pad is not None and pad < tokenizer.embedding_rows)
    return tokenizer, GenerationConfig(eos_token_id=list(dict.fromkeys(ends)), pad_token_id=pad)


def load_model(
    path: str,
    device: torch.device | str = "cpu",
    *,
    training: bool = False,
    recompute: bool = False,
    offload: bool = False,
    adapters: Config | None = None,
    check: Callable[[str, PreTrainedModel, bool], None] | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Returns a causal LM and its tokenizer, from a folder or a hub name. Only safetensors are read, and remote code
    is never run.

    With `training` the weights are fp32 whatever the file holds, because an update of 1e-6 vanishes in bf16. After
    distributed.start() the trained weights are sharded over the ranks, and only rank 0 reads the file. Without
    `training` every process has all weights; on CUDA the weights are bf16, the dtype in which training computes. All
    dropout is off, so that training and sampling give the same log-probs. With `recompute` activations are computed
    again in the backward pass instead of kept. distributed.shard explains `offload`. If `adapters` (a Config) is
    given, only low-rank adapters are trained (support/adapters.py). `check` tests that the model behaves as this file
    assumes (fast.check.check_model). Raises InputError for a folder without weights, and for what load_tokenizer,
    adapters.add or `check` reject.
    """
    device, sharded = torch.device(device), training and torch.distributed.is_initialized()
    tokenizer, generation_config = load_tokenizer(path)
    model = None
    if distributed.rank() == 0 or not training:
        model = read_model(path, weights_dtype(device, training, adapters))
        model.generation_config = generation_config
        if check:
            check(path, model if training else model.to(device), training)
    if not sharded:
        prepare_layers(model, device, recompute, adapters)
        return model.to(device).train(), tokenizer
    model, plain = distributed.follow_first(model)
    model.generation_config = generation_config
    for part in (model, plain):
        prepare_layers(part, device, recompute and part is model, adapters)
    distributed.shard(model, plain, device, offload)
    return model.train(), tokenizer


def read_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model with its weights. The model's config gets dropout 0, and tie_word_embeddings is True only if
    embedding and head really are one tensor."""
    folder, config = Path(path), switch_off_noise(load_config(path))
    if folder.exists() and not any(folder.glob("*.safetensors")):
        raise InputError(f"model {path!r} holds no *.safetensors weights: give a HuggingFace model folder")
    with one_line(path):
        settings = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings)
        if info["missing_keys"]:
            raise InputError(f"the weights lack {min(info['missing_keys'])}: the file is not whole")
    head = model.get_output_embeddings()
    model.config.tie_word_embeddings = head is not None and head.weight is model.get_input_embeddings().weight
    return model


def save_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a HF model folder. The folder is written under a temporary name and then renamed, so nobody sees a
    half-written folder. Every rank calls this function; rank 0 writes."""
    state = distributed.full_state(distributed.state_of(model))
    if distributed.rank():
        return
    model, state = merged(model, state)
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: weight.to(dtype) for name, weight in state.items()}
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    make_readable(partial, model.name_or_path, dtype)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextlib.contextmanager
def sampling(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Gives the model to sample with, in eval mode and without gradients. (In train mode gradient checkpointing would
    turn the key-value cache off.) Two `sampling` blocks must not be nested."""
    model.eval()
    try:
        with torch.no_grad(), distributed.gathered(model) as whole:
            yield whole
    finally:
        model.train()


def response_text(tokenizer: Tokenizer, ids: list[int], end_ids: list[int]) -> str:
    """Returns a response as the text that is graded and shown, without its end token. All other tokens stay in the
    text, also special tokens. An id without a token becomes \ufffd; embeddings often have more rows than the
    tokenizer has tokens. If an id without a token vanished between "\\boxed{25" and "1}", the answer would read as
    251."""
    inner = ids[:-1] if ids and ids[-1] in end_ids else ids
    text = ""
    for known, run in itertools.groupby(inner, known_ids(tokenizer).__contains__):
        text += decode(tokenizer, list(run)) if known else "\ufffd"
    return text


@functools.lru_cache(maxsize=1)
def known_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.get_vocab().values())


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---- log-probs and entropies


def token_stats(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each response token, and the entropy of the model's distribution at that place.

    input_ids and attention_mask are [B, P+R], and the response is in the last R = response_length columns. Log-probs
    and entropies are [B, R], in nats, of softmax(logits / temperature), and 0 where attention_mask is 0. Only
    log_probs have a gradient. The fp32 logits are computed for a chunk of real tokens at a time, and again in the
    backward pass, so a tensor [B, R, V] never exists.
    """
    return distributed.run_forward(model, response_stats, input_ids, attention_mask, response_length, temperature)


def response_stats(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the log-probs and entropies of token_stats. The weights must be whole, not split over ranks
    (distributed.run_forward gathers them).

    Every row is moved to the left, so that its padding is on the right. Padding on the right changes no token and no
    position, and a causal model needs no mask for it. Columns that no row uses are dropped.
    """
    mask = attention_mask[:, -response_length:].bool()
    width, length = input_ids.shape[1], int(attention_mask.sum(1).max())
    column = torch.arange(width, device=input_ids.device)
    first = attention_mask.argmax(1, keepdim=True)
    # [B, length] the column of input_ids where each moved token was before
    source = (first + column[:length]) % width
    ids = input_ids.gather(1, source)
    response = (attention_mask.bool() & (column >= width - response_length)).gather(1, source)[:, 1:]
    hidden = last_hidden(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden, targets = hidden[:, :-1][response], ids[:, 1:][response]  # [n, H], [n]: state t predicts token t + 1
    log_probs, entropy = head_stats(model, hidden, targets, temperature)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return empty.masked_scatter(mask, log_probs), empty.masked_scatter(mask, entropy)


def last_hidden(model: PreTrainedModel, **arguments: Any) -> Tensor:
    """Returns the hidden states [B, T, H] that the model's head reads. Arguments that the model's forward does not
    know are not passed: some models take no position_ids and compute them from the mask."""
    body = model.base_model
    body = next(model.children()) if body is model else body  # base_model can be the whole model, head included
    known = signature(type(body).forward).parameters
    return body(**{name: value for name, value in arguments.items() if name in known}).last_hidden_state


def head_stats(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log-probs [n] of `targets` [n] and entropies [n], from the last layer's `hidden` states [n, H]. At most
    LOGITS_PER_CHUNK logits exist at a time."""
    head = model.get_output_embeddings()

    def stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = head(hidden).float()  # [chunk, V]
        log_p = torch.log_softmax(scores if temperature == 1 else scores / temperature, dim=-1)
        with torch.no_grad():
            # a logit of -inf would give 0 * -inf = NaN, but its part of the entropy is 0
            entropy = -log_p.exp().mul_(log_p).nan_to_num_().sum(-1)
        return log_p.gather(1, targets[:, None]).squeeze(1), entropy

    size = max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    if len(targets) <= size:
        return stats(hidden, targets)
    parts = []
    for chunk in zip(hidden.split(size), targets.split(size)):
        parts.append(checkpoint(stats, *chunk, use_reentrant=False, preserve_rng_state=False))
    return tuple(torch.cat(column) for column in zip(*parts))
