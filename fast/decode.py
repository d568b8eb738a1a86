"""This file has a decoding loop for responses of different lengths, which takes the place of the loop in
HuggingFace's `generate`.

The loop of this file gives the same tokens and log-probs as HuggingFace's loop. The order of this file: the cache;
the attention of one new token; `OneTokenPass`, a forward pass that is recorded as a CUDA graph and replayed;
`decode_rows`, the loop; `choose_loop`, which finds the variant that is right for a model when it is loaded; and
`loop_of`, the loop that commands pass to sample.generate. This file has no new GPU kernels, no static caches, and no
continuous batching, which would not take the logits processors of sample.py.
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

PREFILL_TOKENS = 2**14  # number of prompt tokens, over all rows, that one forward pass reads
# ended rows leave the batch once at most this share of its rows has not ended; they do not leave at once, because
# copying the other rows costs about as much as decoding one token of all rows
DROP_AT = 0.8
# the value of DROP_AT with CUDA graphs: it is lower, because recording a new graph takes longer than decoding ten
# tokens
DROP_AT_RECORDED = 0.5
# on CUDA a forward pass is recorded as a CUDA graph and replayed for later tokens, because launching its kernels
# takes longer than running them
GRAPHS = True
# a recorded forward pass reads as many cache columns as are filled, rounded up to a multiple of this number
GRAPH_COLUMNS = 256
# with CUDA graphs the decoding loop looks for ended rows only after every LOOK_EVERY tokens, because for each look
# Python waits for the GPU
LOOK_EVERY = 16
# Variants of decode_rows, the fastest first. "masks of ours": decode_rows makes the attention mask once; otherwise
# the model makes it at every token. "recordable": on CUDA the forward pass of one token is recorded as a CUDA graph
# if all layers have a plain cache.
LOOPS = ("masks of ours, recordable", "masks of ours", "masks of the model")


class RoomyLayer(DynamicLayer):
    """A key-value cache layer with room for `room` tokens from the start, so that a new token does not copy the
    cache.

    If the forward pass is recorded as a CUDA graph, `column` [1] holds the cache column of the new token, and the
    first `length` cache columns are read.
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
            # unused columns of the cache are zeros, because attention would turn a NaN in a masked column into a NaN
            # output
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
    """Returns the attention of one new token per row, query [B, heads, 1, D], over a cache with fewer heads, key and
    value [B, H, T, D].

    Query heads that share keys and values are treated as if they were several tokens of one head. The attention is
    the same as HF's, but HF's function copies the cache for all heads at every token, and this function reads the
    cache without a copy.
    """
    shared = query.reshape(*key.shape[:2], -1, query.shape[3])  # [B, H, heads / H, D]
    output = scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(len(query), 1, query.shape[1], -1), None


AttentionInterface.register("one_token", one_token_attention)


@contextlib.contextmanager
def attention(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Inside this context the model of `config` uses the attention function called `name`."""
    own, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = own


def read_prompts(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, block: int) -> Tensor:
    """Fill `cache` with the prompts and return the scores of the first response token of each row, [B, V].

    Equal prompts (all rows of a group have the same prompt) are read once. Long prompts are read in blocks of about
    `block` tokens over all rows, which bounds the memory of a forward pass.
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
        # the cache is passed under its old and its new name; last_hidden drops the name that transformers does not
        # know
        hidden = last_hidden(model, **block_of_prompts, cache=cache, past_key_values=cache, use_cache=True)
    cache.reorder_cache(which)
    return model.get_output_embeddings()(hidden[:, -1])[which]


def whole_blocks(columns: int) -> int:
    """Returns how many columns of the key-value cache a recorded pass (CUDA graph) reads if `columns` columns are
    filled."""
    return columns + -columns % GRAPH_COLUMNS


def can_record(device: torch.device) -> bool:
    return GRAPHS and device.type == "cuda"


def record(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records the function `forward` as a CUDA graph. The returned function runs the recorded kernels again on the
    new contents of the same tensors.

    Raises ValueError if `forward` cannot be recorded, although `reads_values` found no obstacle when the model was
    loaded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = forward()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"this model's forward pass cannot be recorded ({reason}): set GRAPHS = False in fast/decode.py"
        ) from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@dataclass
class LiveRows:
    """The state of the b live rows, which are the rows still in the batch; some of them may have ended.

    The tensors are changed in place, because a recorded CUDA graph refers to them; only `keep` makes new tensors.
    """

    places: Tensor  # [b] index of each live row in the output
    token: Tensor  # [b] the newest token of each row
    ended: Tensor  # [b] bool
    position_ids: Tensor  # [b, 1] position id of each newest token
    mask: Tensor  # attention mask [b, cache columns], or [b, 1, 1, cache columns] as attention layers take it

    def keep(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


class OneTokenPass:
    """Makes the forward pass for the newest token of every row that is still in the batch.

    If `recorded`, the forward pass is recorded as a CUDA graph and replayed for later tokens. Each time the cache has
    grown by GRAPH_COLUMNS columns, the forward pass runs once without recording and is then recorded anew.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, live: LiveRows, recorded: bool):
        self.model, self.head, self.cache = model, model.get_output_embeddings(), cache
        self.live, self.recorded = live, recorded
        self.column = torch.zeros_like(live.token[:1])  # cache column of the newest token
        self.forget()

    def forget(self) -> None:
        """Drop the recorded CUDA graph, because the rows have changed."""
        self.columns, self.replay = 0, None  # `columns` is the number of cache columns that the forward pass reads

    def forward(self) -> Tensor:
        live = self.live
        new = {"input_ids": live.token[:, None], "position_ids": live.position_ids}
        new |= {"attention_mask": live.mask[..., : self.columns], "cache": self.cache, "past_key_values": self.cache}
        return self.head(last_hidden(self.model, **new, use_cache=True)[:, -1])

    def __call__(self, column: int) -> Tensor:
        """Returns the scores [b, V] of the next token. The newest token is in cache column `column`."""
        if not self.recorded:
            self.columns = column + 1
            return self.forward()
        self.column.fill_(column)
        if column >= self.columns:
            self.columns, self.replay = whole_blocks(column + 1), None
            for layer in self.cache.layers:
                layer.column, layer.length = self.column, self.columns
            # the first forward pass is not recorded, because libraries initialise themselves in it
            return self.forward()
        self.replay = self.replay or record(self.forward)
        return self.replay()


# inference_mode does less bookkeeping per call than no_grad, which saves time in small layers
@torch.inference_mode()
def decode_rows(model: PreTrainedModel, input_ids: Tensor, block: int | None = None, **arguments: Any) -> Tensor:
    """The decoding loop that HF's `generate` calls. Returns prompts and responses as ids [B, P + at most R].

    decode_rows differs from HuggingFace's loop in three ways. Equal prompts are read once. Rows that have ended leave
    the batch. The cache and the attention mask are not made again at every token.
    """
    logits_processor, settings = arguments["logits_processor"], arguments["generation_config"]
    # transformers 5.24 renamed the argument past_key_values to cache
    cache = arguments.get("cache", arguments.get("past_key_values"))
    prompt, end = input_ids.shape[1], settings.max_length
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)  # RoomyLayer can replace only a DynamicLayer
    config = model.config.get_text_config()
    ours = plain and config._attn_implementation == "sdpa" and model.loop in LOOPS[:2]
    recorded = ours and model.loop == LOOPS[0] and can_record(input_ids.device)
    width = whole_blocks(end) if recorded else end
    look_every, drop_at = (LOOK_EVERY, DROP_AT_RECORDED) if recorded else (1, DROP_AT)
    if plain:
        cache.layers = [RoomyLayer(width) for _ in cache.layers]
    mask = arguments["attention_mask"]  # HF's generate passes None for a mask of ones
    mask = torch.ones_like(input_ids) if mask is None else mask
    scores = read_prompts(model, cache, input_ids, mask, block or PREFILL_TOKENS)

    output = input_ids.new_full((len(input_ids), end), settings.pad_token_id)
    output[:, :prompt] = input_ids
    places, position_ids = torch.arange(len(output), device=output.device), mask.sum(1, keepdim=True) - 1
    mask = pad(mask, (0, width - prompt))  # the mask is 1 at tokens and 0 at padding
    if ours:  # the mask is 0 at tokens, else -inf: attention layers use such a mask unchanged
        mask = scores.new_zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
    live = LiveRows(places, torch.empty_like(places), torch.zeros_like(places, dtype=torch.bool), position_ids, mask)
    one_token_pass = OneTokenPass(model, cache, live, recorded)
    end_tokens = torch.tensor(settings.eos_token_id, device=output.device)
    with attention(config, "one_token") if ours else contextlib.nullcontext():
        for column in range(prompt, end):
            drawn = logits_processor(output[live.places, :column], scores).argmax(-1)
            live.token.copy_(drawn.masked_fill(live.ended, settings.pad_token_id))
            output[live.places, column] = live.token
            # an end token inside a forced prefix would end the row here, but data/loader.py drops demonstrations with
            # an end token inside
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
    """Sets `seen` to True if a shape or a Python branch depends on the values of a tensor, as in routers of experts.

    A recorded CUDA graph would repeat the shape or branch of the recorded values for all later tokens.
    """

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # PyTorch does not tag aten.index, but with a boolean mask as index its shape depends on values
        if func is torch.ops.aten.index.Tensor:
            self.seen |= any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            self.seen |= bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})
        return func(*args, **(kwargs or {}))


def reads_values(model: PreTrainedModel, ids: Tensor) -> bool:
    """Returns whether shapes or branches in a forward pass of one token depend on the values of tensors. `ids` is [B,
    1]."""
    mask = torch.zeros(len(ids), 1, 1, 1, dtype=model.dtype, device=ids.device)
    with ReadsValues() as mode:
        last_hidden(model, input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids), use_cache=False)
    return mode.seen


class RecordingLogitsProcessor(PrefixForcingLogitsProcessor):
    """Forces the tokens of prefix_ids, which are all different, and keeps the log-prob of each token in log_probs
    [V], at the index of the token's id."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.prefix_ids[self.rows, input_ids.shape[1] - self.prompt_length, None]
        self.log_probs[token] = scores.float().log_softmax(-1).gather(1, token)
        return super().__call__(input_ids, scores)


def choose_loop(model: PreTrainedModel, ids: Tensor, mask: Tensor, want: Tensor, close: float) -> bool:
    """Set model.loop to the first of LOOPS that gives the right log-probs, or to None if only HF's own loop gives
    them.

    The tokens of the last R columns of `ids` are forced as responses; they are all different. The log-probs of these
    tokens have to equal `want` [B, R] (0 after the end of each row) within `close`. Returns False if the log-probs of
    every loop differ from `want`.
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
        except Exception:  # a model can raise any error in a loop that it was not made for
            continue
    return False


def loop_of(model: PreTrainedModel) -> Callable | None:
    """Returns the decoding loop of this model for sample.generate: decode_rows, or None for HF's own loop.

    Returns None for a model that choose_loop has not tested, or for which no variant in LOOPS is right.
    """
    return decode_rows if getattr(model, "loop", None) else None
