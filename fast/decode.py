"""This file has a decoding loop for responses of different lengths, which takes the place of the loop in
HuggingFace's `generate`.

It gives the same tokens and log-probs. It begins with the cache and the attention of one new token. Then come
`OneTokenPass`, which is recorded and replayed on CUDA; `decode_rows`, the loop; `choose_loop`, which finds the
variant that is right for a model when it is loaded; and `loop_of`, which a command hands to sample.generate. Left out
are kernels of our own, continuous batching (it takes no logits processor of ours), and static caches.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicLayer

from model import last_hidden
from sample import PrefixForcingLogitsProcessor

PREFILL_TOKENS = 2**14  # how many tokens of a call's prompts are read in one forward pass
# ended rows leave the batch once at most this share is alive, because copying the rest costs about one step
DROP_AT = 0.8
DROP_AT_RECORDED = 0.5  # the share where passes are recorded, because a new recording costs more than ten steps
# on CUDA record a pass and replay it for later tokens, because launching its kernels takes longer than they run
GRAPHS = True
GRAPH_COLUMNS = 256  # a recorded pass reads the filled columns of the cache, rounded up to a multiple of this
# with recorded passes, ended rows are looked for once in so many tokens, because Python waits for the GPU then
LOOK_EVERY = 16
# Variants of decode_rows, the fastest first. "masks of ours": the attention mask is made here once, not by the model
# at every token. "recordable": on CUDA a pass of one token may be recorded, if all layers have a plain cache.
LOOPS = ("masks of ours, recordable", "masks of ours", "masks of the model")


class RoomyLayer(DynamicLayer):
    """A key-value cache layer that has room for `room` tokens from the start, so that no token copies it.

    If a pass is recorded, `column` [1] holds the column of its token, and the first `length` columns are read.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0
        self.column: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.column is not None:
            self.all_keys.index_copy_(2, self.column, key_states)
            self.all_values.index_copy_(2, self.column, value_states)
            return self._view()
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            # zeros, because a masked NaN would stay NaN
            self.all_keys = key_states.new_zeros(batch, heads, self.room, width)
            self.all_values = value_states.new_zeros(batch, heads, self.room, value_states.shape[3])
        self.all_keys[:, :, start : self.length] = key_states
        self.all_values[:, :, start : self.length] = value_states
        return self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[beam_idx], self.all_values[beam_idx]
        self._view()


def one_token_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Returns the attention of one new token, query [B, heads, 1, D], over a cache of fewer heads, key and value [B,
    H, T, D].

    Heads that share keys and values are treated as tokens of one head. The products are the same, but the cache is
    read as it is; HF's function copies it for all heads, at every token.
    """
    shared = query.reshape(*key.shape[:2], -1, query.shape[3])  # [B, H, heads / H, D]
    output = scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(len(query), 1, query.shape[1], -1), None


AttentionInterface.register("one_token", one_token_attention)


@contextlib.contextmanager
def attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Inside this context the model uses the attention function called `name`."""
    own, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = own


def read_prompts(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, block: int) -> Tensor:
    """Fill `cache` and return the scores after each prompt, [B, V].

    Equal prompts (a group's) are read once. Long prompts are read in blocks of about `block` tokens of all rows,
    which bounds the memory of a pass.
    """
    both, which = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
    ids, mask = both.chunk(2, dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    width = max(1, block // len(ids))
    for start in range(0, ids.shape[1], width):
        new = slice(start, start + width)
        block_of_prompts = {
            "input_ids": ids[:, new],
            "attention_mask": mask[:, : new.stop],
            "position_ids": positions[:, new],
        }
        # by both names: last_hidden leaves out the one that this version of transformers does not know
        hidden = last_hidden(model, **block_of_prompts, cache=cache, past_key_values=cache, use_cache=True)
    cache.reorder_cache(which)
    return model.get_output_embeddings()(hidden[:, -1])[which]


def whole_blocks(columns: int) -> int:
    """Returns how many columns of the cache a recorded pass reads if `columns` are filled."""
    return columns + -columns % GRAPH_COLUMNS


def can_record(device: torch.device) -> bool:
    return GRAPHS and device.type == "cuda"


def record(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records `forward` as a CUDA graph. Calling the result runs its kernels again on the same tensors' new contents.

    Raises ValueError if the model does something on CUDA that it did not do in `reads_values` when it was loaded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = forward()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"this model's pass cannot be recorded ({reason}): set GRAPHS = False in fast/decode.py"
        ) from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@dataclass
class LiveRows:
    """The b rows that are still in the batch.

    Their tensors change in place, because a recording refers to them; only `keep` makes new ones.
    """

    places: Tensor  # [b] the live rows' places in the output
    token: Tensor  # [b] the newest tokens
    ended: Tensor  # [b] bool
    position_ids: Tensor  # [b, 1] of the newest tokens
    mask: Tensor  # [b, columns of the cache], or as attention layers take it [b, 1, 1, columns]

    def keep(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


class OneTokenPass:
    """Makes the forward pass of every live row's newest token.

    If `recorded`, the pass is made once for every GRAPH_COLUMNS columns of the cache, then recorded and replayed.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, live: LiveRows, recorded: bool):
        self.model, self.head, self.cache = model, model.get_output_embeddings(), cache
        self.live, self.recorded = live, recorded
        self.column = torch.zeros_like(live.token[:1])  # the column of the newest token
        self.forget()

    def forget(self) -> None:
        """Drop the recording, because the rows have changed."""
        self.columns, self.replay = 0, None  # `columns` is how many columns a pass reads

    def forward(self) -> Tensor:
        live = self.live
        new = {"input_ids": live.token[:, None], "position_ids": live.position_ids}
        new |= {"attention_mask": live.mask[..., : self.columns], "cache": self.cache, "past_key_values": self.cache}
        return self.head(last_hidden(self.model, **new, use_cache=True)[:, -1])

    def __call__(self, column: int) -> Tensor:
        """Returns the scores [b, V] after the newest token, which is in `column`."""
        if not self.recorded:
            self.columns = column + 1
            return self.forward()
        self.column.fill_(column)
        if column >= self.columns:
            self.columns, self.replay = whole_blocks(column + 1), None
            for layer in self.cache.layers:
                layer.column, layer.length = self.column, self.columns
            return self.forward()  # the first pass is not recorded, because libraries set themselves up in it
        self.replay = self.replay or record(self.forward)
        return self.replay()


@torch.inference_mode()  # it does less bookkeeping per call than no_grad, which matters where layers are small
def decode_rows(model: PreTrainedModel, input_ids: Tensor, block: int | None = None, **arguments: Any) -> Tensor:
    """The decoding loop that `generate` calls; returns ids [B, P+<=R].

    It differs from HuggingFace's loop in three ways: equal prompts are read once, ended rows leave the batch, and
    neither the cache nor the attention mask is made again at every token.
    """
    logits_processor, settings = arguments["logits_processor"], arguments["generation_config"]
    cache = arguments.get("cache", arguments.get("past_key_values"))  # `cache` since transformers 5.24
    prompt, end = input_ids.shape[1], settings.max_length
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)  # layers of other kinds stay as they are
    config = model.config.get_text_config()
    ours = plain and config._attn_implementation == "sdpa" and model.loop in LOOPS[:2]
    recorded = ours and model.loop == LOOPS[0] and can_record(input_ids.device)
    width = whole_blocks(end) if recorded else end
    look_every, drop_at = (LOOK_EVERY, DROP_AT_RECORDED) if recorded else (1, DROP_AT)
    if plain:
        cache.layers = [RoomyLayer(width) for _ in cache.layers]
    mask = arguments["attention_mask"]  # generate passes None for a mask of ones
    mask = torch.ones_like(input_ids) if mask is None else mask
    scores = read_prompts(model, cache, input_ids, mask, block or PREFILL_TOKENS)

    output = input_ids.new_full((len(input_ids), end), settings.pad_token_id)
    output[:, :prompt] = input_ids
    places, position_ids = torch.arange(len(output), device=output.device), mask.sum(1, keepdim=True) - 1
    mask = pad(mask, (0, width - prompt))  # 1 where there is a token, else 0
    if ours:  # 0 where there is a token, else -inf: layers take this mask as it is, and HF makes none of its own
        mask = scores.new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
    live = LiveRows(places, torch.empty_like(places), torch.zeros_like(places, dtype=torch.bool), position_ids, mask)
    one_token_pass = OneTokenPass(model, cache, live, recorded)
    end_tokens = torch.tensor(settings.eos_token_id, device=output.device)
    with attention(config, "one_token") if ours else contextlib.nullcontext():
        for column in range(prompt, end):
            drawn = logits_processor(output[live.places, :column], scores).argmax(-1)
            live.token.copy_(drawn.masked_fill(live.ended, settings.pad_token_id))
            output[live.places, column] = live.token
            # an end token inside a forced prefix would end the row here, but the loader leaves out such
            # demonstrations
            live.ended |= torch.isin(live.token, end_tokens)
            if column + 1 == end:
                break
            if (column - prompt) % look_every == look_every - 1:
                alive = (~live.ended).nonzero().squeeze(1)
                if len(alive) == 0:
                    break
                if len(alive) <= drop_at * len(live.ended):
                    live.keep(alive)
                    cache.reorder_cache(alive)
                    for processor in logits_processor:
                        processor.rows = processor.rows[alive]
                    one_token_pass.forget()
            live.position_ids += 1
            live.mask[..., column] = 0 if ours else 1
            scores = one_token_pass(column)
    return output[:, : column + 1]


class ReadsValues(TorchDispatchMode):
    """Notes in `seen` whether a shape or a Python branch depends on a tensor's values, as in routers of experts.

    A recording would repeat the shape or branch of the first values.
    """

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # `index` has no such tag, but a boolean mask in it gives a shape that depends on values
        if func is torch.ops.aten.index.Tensor:
            self.seen |= any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            self.seen |= bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})
        return func(*args, **(kwargs or {}))


def reads_values(model: PreTrainedModel, ids: Tensor) -> bool:
    """Returns whether the shapes or branches in a pass of one token depend on tensors' values. ids [B, 1]"""
    mask = torch.zeros(len(ids), 1, 1, 1, dtype=model.dtype, device=ids.device)
    with ReadsValues() as mode:
        last_hidden(model, input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids), use_cache=False)
    return mode.seen


class RecordingLogitsProcessor(PrefixForcingLogitsProcessor):
    """Forces tokens, each of them once, and keeps the log-prob of each in log_probs [V]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.prefix_ids[self.rows, input_ids.shape[1] - self.prompt_length, None]
        self.log_probs[token] = scores.float().log_softmax(-1).gather(1, token)
        return super().__call__(input_ids, scores)


def choose_loop(model: PreTrainedModel, ids: Tensor, mask: Tensor, want: Tensor, close: float) -> bool:
    """Set model.loop to the first of LOOPS that gives the right log-probs, or to None if only HF's own loop does.

    The last R columns of `ids`, all of them different tokens, are forced. Their log-probs have to be `want` [B, R],
    which is 0 after the end of a row. Returns False if no loop gives them.
    """
    lengths, prompt = (want != 0).sum(1), ids.shape[1] - want.shape[1]
    forced = ids[:, prompt:]
    ends = forced.gather(1, lengths[:, None] - 1).flatten().tolist()
    settings = {"max_new_tokens": forced.shape[1], "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    for model.loop in (*LOOPS, None):
        recorder = RecordingLogitsProcessor(forced, lengths, prompt)
        recorder.log_probs = want.new_zeros(model.get_input_embeddings().num_embeddings)
        own = functools.partial(decode_rows, block=3 * len(ids)) if model.loop else None
        try:
            if model.loop == LOOPS[0] and reads_values(model, ids[:, :1]):
                continue
            model.generate(
                input_ids=ids[:, :prompt],
                attention_mask=mask[:, :prompt],
                generation_config=GenerationConfig(**settings),
                logits_processor=LogitsProcessorList([recorder]),
                custom_generate=own,
            )
            if torch.allclose(recorder.log_probs[forced] * (want != 0), want, rtol=0, atol=close):
                return True
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a model may raise anything in a loop that it was not made for
            continue
    return False


def loop_of(model: PreTrainedModel) -> Callable | None:
    """Returns the loop that sample.generate decodes this model with: decode_rows, or None for HF's own loop.

    It is None for a model that choose_loop has not seen, or for which no variant in LOOPS is right.
    """
    return decode_rows if getattr(model, "loop", None) else None
