"""Load and save a HuggingFace causal LM with its tokenizer; log-probs and entropies of responses.

In reading order: `load_tokenizer`, `load_model` and `check_model`, which asks a model on a few tokens for all that
sampling and log-probs take for granted; `save_model`, `sampling`; `token_stats`, the training forward pass.
On CUDA, or with several processes, support/distributed.py shards a model in training.
Left out: LoRA, quantisation, remote code, encoder-decoder models, models that change their logits after the head.
"""

import contextlib
import copy
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor, nn
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

from decode import choose_loop, last_hidden, signature
from support import distributed
from support.errors import InputError

LOGITS_PER_CHUNK = 2**25  # elements of a [tokens, V] logits chunk: 128 MiB in fp32, whatever B, R and V are
NOISE = ("drop", "jitter", "noise")  # what the config's fields for random changes in training have in their names
SMALL = 10_000_000  # below so many parameters a second CPU thread gains little, and costs much if a core is busy


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU. On CUDA each rank has a GPU of its own."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise InputError(f"device is {name}, but PyTorch finds none here: give --device auto")
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
        raise InputError(f"model {path!r} cannot be loaded: {reason}") from error


def load_config(path: str) -> PreTrainedConfig:
    """The model's config, from a folder or a hub name. ValueError, one line, where there is none."""
    hub_logging.set_verbosity_error()  # without a network: our one line instead of every retry
    if not Path(path).exists() and (path.count("/") != 1 or Path(path).parent.exists()):
        raise InputError(f"model {path!r} is neither a folder that exists nor a hub name (ORGANISATION/NAME)")
    final = Path(path) / "final"
    if final.is_dir() and not any(Path(path).glob("*.safetensors")):
        raise InputError(f"model {path!r} is a run's folder, its model is in {final}: give --model {final}")
    with one_line(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def window_of(config: PreTrainedConfig) -> int | None:
    """The most tokens of a prompt and its response together; None where the config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_window(
    window: int | None, prompt: int, response: int, name: str, whose: str = "the longest prompt"
) -> None:
    """ValueError if a prompt and a response, whose budget is the setting `name`, can be longer than the window."""
    if window and prompt + response > window:
        fix = f"lower {name} to {window - prompt}" if prompt + 1 < window else "give a shorter prompt"
        raise InputError(
            f"{whose} ({prompt} tokens) and {name} ({response}) exceed the model's {window} positions: {fix}"
        )


def load_tokenizer(path: str) -> tuple[Tokenizer, GenerationConfig]:
    """The tokenizer, and the folder's generation config reduced to its end and padding ids, so that a top_k or
    repetition_penalty in it cannot change the sampling distribution. ValueError, one line, for a folder without a
    tokenizer or a tokenizer without an end token."""
    config, folder = load_config(path), Path(path)
    if folder.exists() and not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        raise InputError(f"model {path!r} holds no tokenizer files: save the tokenizer into the folder too")
    with one_line(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise InputError("its tokenizer has no eos_token, so no response could end: set one")
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
    of them, on CUDA in bf16, which is what training computes in. All noise is off, so that the training forward pass
    gives the log-probs the sampler had. `recompute`: a layer's activations are made again in the backward pass
    instead of kept. `offload`: see distributed.shard.
    Raises ValueError, one line, as load_tokenizer, for a folder without weights, and as check_model.
    """
    device, sharded = torch.device(device), training and torch.distributed.is_initialized()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer, generation_config = load_tokenizer(path)
    model = None
    if distributed.rank() == 0 or not training:
        model = read_model(path, torch.float32 if training or device.type != "cuda" else torch.bfloat16)
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise InputError(f"model {path!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")
        model.generation_config = generation_config
        check_model(path, model if training else model.to(device), training)
    if sharded:
        model, plain = distributed.follow_first(model)
    model.generation_config = generation_config
    if recompute:
        recompute_layers(model)
    if device.type == "cuda":
        for part in (model, plain) if sharded else (model,):
            fuse_norms(part)
    if sharded:
        distributed.shard(model, plain, device, offload)
        return model.train(), tokenizer
    if device.type == "cpu" and model.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model.to(device).train(), tokenizer


def read_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights. Its config says what it is, also where the file's says otherwise: without noise,
    and an embedding and a head that are both in the file are not tied."""
    folder, config = Path(path), load_config(path)
    if folder.exists() and not any(folder.glob("*.safetensors")):
        raise InputError(f"model {path!r} holds no *.safetensors weights: give a HuggingFace model folder")
    for part in (config, config.get_text_config()):
        noise = {name for name, value in vars(part).items() if isinstance(value, float)}
        vars(part).update({name: 0.0 for name in noise if any(word in name for word in NOISE)})
    with one_line(path):
        settings = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings)
        if info["missing_keys"]:
            raise InputError(f"its weights lack {min(info['missing_keys'])}: the file is not whole")
    head = model.get_output_embeddings()
    model.config.tie_word_embeddings = head is not None and head.weight is model.get_input_embeddings().weight
    return model


@torch.no_grad()
def check_model(path: str, model: PreTrainedModel, training: bool) -> None:
    """Ask the model, on a few tokens, for what sampling and log-probs take for granted, and choose its model.loop.

    ValueError, one line, unless: the logits are finite and its head's, to the bit; two training passes agree, but
    for the last bits (a product of matrices need not repeat them); a row in a padded batch has the log-probs it has
    alone in a plain pass, in training and in sampling, to half the digits of its dtype. Three rows, which end at
    other times.
    """
    step, column = model.get_input_embeddings().num_embeddings // 19, torch.arange(13)
    first, last = torch.tensor([[0], [4], [0]]), torch.tensor([[12], [8], [10]])  # of each row
    mask = ((column >= first) & (column <= last)).long().to(model.device)
    prompts, responses = torch.arange(1, 8).expand(3, 7), torch.arange(1, 19).view(3, 6)
    ids = (step * torch.cat([prompts, responses], dim=1)).to(model.device)
    want = torch.zeros(responses.shape, device=model.device)
    made: list[Tensor] = []  # what the head gave
    head = model.eval().get_output_embeddings()
    with one_line(path), head.register_forward_hook(lambda *call: made.append(call[-1].clone())):
        for i, real in enumerate(mask.bool()):
            logits = model(input_ids=ids[i : i + 1, real], use_cache=False).logits
            if not logits.isfinite().all():
                raise InputError("its logits are not finite, so its weights are damaged: fetch or train it again")
            if not torch.equal(made[-1].float(), logits.float()):
                raise InputError("its logits are not those of its output head (scaled, capped?): use another model")
            log_p = logits[0, -int(real[7:].sum()) - 1 : -1].float().log_softmax(-1)
            want[i, real[7:]] = log_p.gather(1, ids[i, 7:][real[7:], None]).squeeze(1)
        close = float(want.abs().max()) * torch.finfo(model.dtype).eps ** 0.5
        found = [_token_stats(model.train(), ids, mask, 6, 1.0)[0] for _ in range(1 + training)]
        if not torch.allclose(found[0], found[-1], rtol=0, atol=close / 64):
            raise InputError("two training passes differ: set the noise in its config.json to 0")
        if not torch.allclose(found[0], want, rtol=0, atol=close):
            raise InputError(
                "log-probs of a training pass are not those of a plain one (scaled? not causal?): use another"
            )
        if not choose_loop(model.eval(), ids, mask, want, close):
            raise InputError("rows sampled in a batch are not what they are alone (a recurrent state?): use another")
        if model.loop == "transformers":
            logging.get_logger("transformers").warning(f"{path}: sampled by transformers' own loop, which is slower")


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing (transformers 5.23 has given the switch another name)."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def fuse_norms(model: nn.Module) -> None:
    """RMS norms as one kernel of PyTorch's instead of the six of their HF module, where both compute the same.

    On CUDA the update of Qwen2.5-1.5B takes a twelfth less time, sampling a tenth [bench/results/gpu.md].
    """
    for module in model.modules():
        plain = list(signature(type(module).forward).parameters)[1:] == ["hidden_states"]  # some take a gate, too
        if plain and hasattr(module, "variance_epsilon") and module.weight is not None:
            own = copy.deepcopy(module).to_empty(device="cpu").float()  # the model may have no weights yet
            own.weight.data = torch.linspace(0.5, 1.5, own.weight.numel())
            x = own.weight.data.cos()
            if torch.allclose(own(x), fused_norm(own, x), rtol=1e-4, atol=1e-4):
                module.forward = MethodType(fused_norm, module)


def fused_norm(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a HF model folder: to a temporary name first, then renamed, so a half-written one is never seen.
    Called on every rank; rank 0 writes."""
    state = distributed.full_state(distributed.state_of(model))
    if distributed.rank():
        return
    folder, partial = Path(folder), Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextlib.contextmanager
def sampling(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Gives the model to sample with: in eval mode (gradient checkpointing would turn the key-value cache off in
    train mode), without gradients. Does not nest."""
    model.eval()
    try:
        with torch.no_grad(), distributed.gathered(model) as whole:
            yield whole
    finally:
        model.train()


def token_stats(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token and entropy of the distribution it came from.

    input_ids, attention_mask [B, P+R], response in the last R = response_length columns ->
    (log_probs [B, R] with gradient, entropy [B, R] without), in nats, of softmax(logits / temperature); 0 where
    attention_mask is 0. Logits are made, used and (in the backward pass) remade a chunk of tokens at a time in
    fp32; [B, R, V] never exists, and padding costs nothing here.

    For the pass every row is moved to the first column: padding then stands behind what it could disturb, shifts no
    position, a causal pass needs no mask, and columns that no row uses are left out.
    """
    return distributed.run_forward(model, _token_stats, input_ids, attention_mask, response_length, temperature)


def _token_stats(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, temperature: float
) -> tuple[Tensor, Tensor]:
    mask = attention_mask[:, -response_length:].bool()
    width, length = input_ids.shape[1], int(attention_mask.sum(1).max())
    column = torch.arange(width, device=input_ids.device)
    moved = (
        attention_mask.argmax(1, keepdim=True) + column[:length]
    ) % width  # [B, length] where a column comes from
    ids = input_ids.gather(1, moved)
    response = (attention_mask.bool() & (column >= width - response_length)).gather(1, moved)[:, 1:]
    hidden = last_hidden(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden, targets = hidden[:, :-1][response], ids[:, 1:][response]  # [n, H], [n]: state t predicts token t + 1
    log_probs, entropy = head_stats(model, hidden, targets, temperature)
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return empty.masked_scatter(mask, log_probs), empty.masked_scatter(mask, entropy)


def head_stats(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_stats after the last layer: hidden [n, H], targets [n] -> log_probs [n], entropy [n], in chunks of n."""
    head = model.get_output_embeddings()

    def stats(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = head(hidden).float()  # [chunk, V]
        log_p = torch.log_softmax(scores if temperature == 1 else scores / temperature, dim=-1)
        with torch.no_grad():
            entropy = -log_p.exp().mul_(log_p).nan_to_num_().sum(-1)  # 0 * -inf = 0
        return log_p.gather(1, targets[:, None]).squeeze(1), entropy

    size = max(1, LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    if len(targets) <= size:
        return stats(hidden, targets)
    parts = [
        checkpoint(stats, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(size), targets.split(size))
    ]
    return tuple(torch.cat(column) for column in zip(*parts))
