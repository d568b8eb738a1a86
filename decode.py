"""The hot path of sampling: two logits processors and the loops `generate` may decode with (DECODERS).

In reading order: draw a token by inverting the CDF, force a prefix's; `decode_rows`, the loop for small models and
responses of different lengths; `decode_static`, HF's own loop over a static cache, compiled on CUDA.
Left out: kernels of our own, continuous batching (it takes no processor of ours), speculative decoding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 2**14  # tokens of a call's prompts read in one forward pass
DROP_AT = 0.8  # ended rows leave the decoding batch once this share or less is alive: a copy costs about one step


class DrawTokenLogitsProcessor(LogitsProcessor):
    """Samples: token = CDF^-1(u) of softmax(scores / temperature), u one number per row and position.

    uniforms [B, R]. The drawn token gets score 0 and all others -inf, so `generate` takes it by argmax.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float):
        self.uniforms, self.prompt_length, self.temperature = uniforms, prompt_length, temperature

    def keep(self, rows: Tensor) -> None:
        self.uniforms = self.uniforms[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cdf = (scores.float() / self.temperature).softmax(-1).cumsum(-1)  # [B, V]
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        # u * total, not u: rounding may leave the total below u. right=True skips tokens of probability 0.
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        token = token.clamp(max=scores.shape[1] - 1)  # NaN, once a run has diverged: step.old_stats says so
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class PrefixForcingLogitsProcessor(LogitsProcessor):
    """Forces row i's first prefix_lengths[i] tokens to be prefix_ids[i]; later tokens are left to the policy.

    prefix_ids [B, L] (padded with anything), prefix_lengths [B], prompt_length: columns before the response.
    """

    def __init__(self, prefix_ids: Tensor, prefix_lengths: Tensor, prompt_length: int):
        self.prefix_ids, self.prefix_lengths, self.prompt_length = prefix_ids, prefix_lengths, prompt_length

    def keep(self, rows: Tensor) -> None:
        self.prefix_ids, self.prefix_lengths = self.prefix_ids[rows], self.prefix_lengths[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        if position >= self.prefix_ids.shape[1]:
            return scores
        forced = torch.full_like(scores, -torch.inf).scatter(1, self.prefix_ids[:, position, None], 0.0)
        return torch.where((position < self.prefix_lengths)[:, None], forced, scores)


class RoomyLayer(DynamicLayer):
    """A key-value cache layer that has room for `room` tokens at once, instead of copying itself at every token."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self.all_keys = key_states.new_empty(batch, heads, self.room, width)
            self.all_values = value_states.new_empty(batch, heads, self.room, value_states.shape[3])
        self.all_keys[:, :, start : self.length] = key_states
        self.all_values[:, :, start : self.length] = value_states
        return self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.all_keys, self.all_values = self.all_keys[indices], self.all_values[indices]
        self._view()


def head_width(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: PreTrainedConfig, size: int = 2) -> int:
    """Bytes a token takes in the key-value cache; `size`: of a number, 2 in bf16."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * size * config.num_hidden_layers * heads * head_width(config)


def token_bytes(config: PreTrainedConfig, columns: int, size: int = 2) -> int:
    """Bytes the next token of a row of `columns` tokens takes for a moment: a layer's keys and values repeated for
    all heads, or, after that, scores, their CDF and copies (measured: 16 bytes a word)."""
    return max(2 * size * columns * config.num_attention_heads * head_width(config), 16 * config.vocab_size)


def row_bytes(config: PreTrainedConfig, columns: int, size: int = 2) -> int:
    """Bytes a row of `columns` tokens takes while it is sampled."""
    return columns * cache_bytes(config, size) + token_bytes(config, columns, size)


def check_neutral(processors: LogitsProcessorList) -> None:
    """Raises ValueError if a setting of the model's own generation config added a processor beside ours."""
    if not all(isinstance(p, DrawTokenLogitsProcessor | PrefixForcingLogitsProcessor) for p in processors):
        raise ValueError(f"the sampler is not neutral: it has {[type(p).__name__ for p in processors]}")


def read_prompts(model: PreTrainedModel, cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Fill `cache` and give the scores after each prompt [B, V].

    Equal prompts (a group's) are read once; long ones in blocks of columns, which bounds the memory of a pass.
    """
    both, which = torch.unique(torch.cat([input_ids, attention_mask], dim=1), dim=0, return_inverse=True)
    ids, mask = both.chunk(2, dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    block = max(1, PREFILL_TOKENS // len(ids))
    for start in range(0, ids.shape[1], block):
        stop = min(start + block, ids.shape[1])
        seen, new = mask[:, :stop], slice(start, stop)
        made = model(ids[:, new], seen, positions[:, new], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(which)
    return made.logits[:, -1][which]


@torch.inference_mode()  # less bookkeeping per call than no_grad: felt where layers are small
def decode_rows(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: list,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """The decoding loop `generate` calls: as its own, but equal prompts are read once, rows that have ended leave
    the batch, and the cache and the attention mask are not made again at every token. -> [B, P+<=R]"""
    check_neutral(logits_processor)
    prompt, room = input_ids.shape[1], generation_config.max_length - input_ids.shape[1]
    ends = torch.tensor(generation_config.eos_token_id, device=input_ids.device)
    output = input_ids.new_full((len(input_ids), prompt + room), generation_config.pad_token_id)
    output[:, :prompt] = input_ids
    mask = model_kwargs["attention_mask"]  # generate drops a mask of ones
    mask = torch.ones_like(input_ids) if mask is None else mask
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)  # sliding windows keep their own layers
    if plain:
        cache.layers = [RoomyLayer(prompt + room) for _ in cache.layers]
    scores = read_prompts(model, cache, input_ids, mask)
    position_ids = mask.sum(1, keepdim=True) - 1
    mask = torch.nn.functional.pad(mask, (0, room), value=1)
    if plain and model.config._attn_implementation == "sdpa":  # the mask a layer takes: HF makes none of its own then
        mask = mask.bool()[:, None, None]
    rows = torch.arange(len(input_ids), device=input_ids.device)  # the rows still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for length in range(prompt, prompt + room):
        token = logits_processor(output[rows, :length], scores).argmax(-1)
        token = token.masked_fill(ended, generation_config.pad_token_id)
        output[rows, length] = token
        # an end token inside a forced prefix would end the row here: encode_problem refuses such demonstrations
        ended |= torch.isin(token, ends)
        alive = (~ended).nonzero().squeeze(1)
        if len(alive) == 0 or length + 1 == prompt + room:
            break
        if len(alive) <= DROP_AT * len(rows):
            rows, token, ended = rows[alive], token[alive], ended[alive]
            position_ids, mask = position_ids[alive], mask[alive]
            cache.batch_select_indices(alive)
            for processor in logits_processor:
                processor.keep(alive)
        position_ids = position_ids + 1
        made = model(token[:, None], mask[..., : length + 1], position_ids, past_key_values=cache, use_cache=True)
        scores = made.logits[:, -1]
    return output[:, : length + 1]


def decode_static(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: list,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """HF's own loop over its static cache, whose forward pass HF compiles on CUDA: fixed shapes, so no row leaves."""
    check_neutral(logits_processor)
    return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


DECODERS = {"loop": decode_rows, "static": decode_static}
