"""This file makes rollouts: it plans rows, samples responses, and packs both into the tensors that updates read.

    plan_group(problem) -> [Row(prompt_ids, prefix_ids), …]    ids only: text is never decoded and encoded again
    generate(model, rows) -> [Row(…, response), …]             prefix + continuation, by model.generate
    pack(rows) -> Rollouts                                     left-padded prompts | right-padded responses

Every random draw is a pure function of (seed, step, problem, rollout, attempt). For each row and position one uniform
number is turned into a token by inverting the CDF. So sampled tokens do not depend on the batch or the ranks. Not
supported are top-k, top-p and penalties (the sampler must be the policy that is trained), beams, and speculative
decoding. Commands pass a faster decoding loop (fast/decode.py) to `generate`.
"""

import dataclasses
import functools
import hashlib
import math
import runpy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data.loader import Encoded
from model import response_text, sampling
from support.distributed import gather_dict, rank, world_size

PREFIX_LOW, PREFIX_HIGH = 0.05, 0.95  # smallest and largest prefix fraction [paper A.2]


def seed_of(*key: object) -> int:
    """Returns a 128-bit seed, a pure function of `key`. (Unlike hash(), the seed is equal on all machines.)"""
    plain = tuple(part.item() if isinstance(part, np.generic) else part for part in key)  # np.int64(3) becomes 3
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "big")


def torch_generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key) % 2**63)


def uniforms(key: tuple, count: int) -> np.ndarray:
    """Returns `count` float32 numbers from [0, 1). Each `key` has a counter-based random stream (Philox)."""
    return np.random.Generator(np.random.Philox(key=seed_of(*key))).random(count, dtype=np.float32)


# ---- the share of a demonstration


def cosine(progress: float) -> tuple[float, float]:
    """Returns the prefix fraction's (low, high); low falls from 0.95 to 0.05 along half a cosine. [paper 3.3, A.2]"""
    return PREFIX_LOW + (PREFIX_HIGH - PREFIX_LOW) * (1 + math.cos(math.pi * progress)) / 2, PREFIX_HIGH


SCHEDULES = {  # each schedule maps the run's progress (0 to 1) to (low, high), the bounds of the prefix fraction
    "cosine": cosine,
    "uniform": lambda progress: (PREFIX_LOW, PREFIX_HIGH),  # an ablation [paper Fig. 6]: fixed bounds of the fraction
    "constant": lambda progress: (0.5, 0.5),  # an ablation: always 0.5, the mean fraction of "uniform"
    "uft": lambda progress: (0.0, float(progress < 0.6)),  # no prefix after 60% of the run; see prefix_fraction
}


def prefix_range(step: int, total_steps: int, schedule: str) -> tuple[float, float]:
    """Returns the smallest and the largest share of a demonstration that a prefix may have at `step` (from 0)."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule](min(1.0, step / total_steps))


def prefix_fraction(step: int, total_steps: int, schedule: str, generator: torch.Generator) -> float:
    """Draws l, the share of a demonstration that becomes the prefix, at `step` (from 0) of `total_steps`. The share
    is l ~ U(low, high) with the bounds of `schedule`. For "uft" l is Binomial(5, p_t) / 5 in the first 60% of the
    steps, where p_t falls from 0.95 to 0.05 along half a cosine; later l is 0."""
    low, high = prefix_range(step, total_steps, schedule)
    if schedule == "uft":
        chance, _ = cosine(min(1.0, step / (0.6 * total_steps)))
        return high * float((torch.rand(5, generator=generator) < chance).sum()) / 5
    return low + (high - low) * float(torch.rand((), generator=generator))


def prefix_length(fraction: float, demonstration_tokens: int, max_response_tokens: int) -> int:
    """Returns the prefix length L = floor(l |y*|) for a fraction l of demonstration y*: at least 1 and at most
    min(|y*| - 1, max_response_tokens - 1). L is 0 if l is 0, or if the policy would have no token to write."""
    if fraction <= 0:
        return 0
    longest = min(demonstration_tokens - 1, max_response_tokens - 1)
    return max(0, min(max(1, math.floor(fraction * demonstration_tokens)), longest))


@dataclass(frozen=True)
class Row:
    """One rollout: its plan (prompt and prefix), then the sampled response and its reward."""

    group: int  # index of the row's problem in the batch
    key: tuple  # (seed, step, problem, rollout, attempt), on which the row's random draws depend
    prompt_ids: list[int]
    prefix_ids: list[int]  # tokens of the demonstration with which the response must begin
    fraction: float = 0.0  # len(prefix_ids) as a share of the demonstration
    response: Sequence[int] = ()  # ids of prefix and continuation, or of a whole demonstration
    log_probs: Sequence[float] = ()  # log-probs of sampled tokens, for metrics only
    truncated: bool = False  # True if the limit of tokens cut the response off before an end token
    text: str = ""
    reward: float = 0.0


def plan_group(
    problem: Encoded,
    group: int,
    *,
    rows: str,
    rollouts: int,
    hybrid: int,
    key: tuple,
    attempt: int = 0,
    share: Callable[[torch.Generator], float] | None = None,
    max_response_tokens: int = 0,
) -> list[Row]:
    """Returns the rows of one problem's group: on-policy rows, then `hybrid` rows with demonstration tokens.

    `rows` is "on_policy", "hybrid" (hybrid rows have a prefix), "demonstration" (such rows are a whole demonstration
    and are not sampled) or "shared_prefix" (all rows of the group have the same prefix). A problem without
    demonstrations has on-policy rows only. `key` is (seed, step); `attempt` counts how often the group was sampled
    before. `share` draws the fraction l of each prefix; max_response_tokens - 1 is the longest prefix.
    """
    planned = [Row(group, (*key, problem.id, i, attempt), problem.prompt_ids, []) for i in range(rollouts)]
    if rows == "on_policy" or not problem.demonstrations:
        return planned
    shared = rows == "shared_prefix"
    for i in range(0 if shared else rollouts - hybrid, rollouts):
        # all rows draw a shared prefix with the first row's key, so all rows have the same prefix
        generator = torch_generator(*key, problem.id, 0 if shared else i, attempt)
        which = int(torch.randint(len(problem.demonstrations), (), generator=generator))
        demonstration = problem.demonstrations[which]
        if rows == "demonstration":
            whole = [*demonstration, problem.end_id]
            planned[i] = dataclasses.replace(planned[i], prefix_ids=whole, fraction=1.0, response=whole)
        else:
            length = prefix_length(share(generator), len(demonstration), max_response_tokens)
            prefix, fraction = demonstration[:length], length / len(demonstration)
            planned[i] = dataclasses.replace(planned[i], prefix_ids=prefix, fraction=fraction)
    return planned


class DrawTokenLogitsProcessor(LogitsProcessor):
    """Draws each token as CDF^-1(u) of softmax(scores / temperature). uniforms [B, R] has one u per row and position.

    The drawn token gets score 0 and all others -inf, so `generate` takes it by argmax. drawn [B, R] has the drawn
    tokens' probabilities. `rows` are the indices of the rows still in the batch; a decoding loop may drop ended rows.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float):
        self.uniforms, self.prompt_length, self.temperature = uniforms, prompt_length, temperature
        self.rows, self.drawn = torch.arange(len(uniforms), device=uniforms.device), torch.zeros_like(uniforms)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores if self.temperature == 1 else scores.float() / self.temperature
        probabilities = scores.softmax(-1, dtype=torch.float32)  # [B, V]
        cdf, place = probabilities.cumsum(-1), (self.rows, input_ids.shape[1] - self.prompt_length)
        # u is scaled to the CDF's last value, which rounding may leave below u; right=True skips tokens of zero mass
        token = torch.searchsorted(cdf, self.uniforms[place][:, None] * cdf[:, -1:], right=True)
        # NaN scores of a diverged run give an index behind the last token; step.update reports such a run
        token = token.clamp(max=scores.shape[1] - 1)
        self.drawn[place] = probabilities.gather(1, token).squeeze(1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class PrefixForcingLogitsProcessor(LogitsProcessor):
    """Forces row i's first prefix_lengths[i] tokens to be prefix_ids[i] and leaves later tokens to the policy.

    prefix_ids [B, L] can be padded with any ids. prompt_length is the number of columns before the response. `rows`
    are the indices of the rows still in the batch.
    """

    def __init__(self, prefix_ids: Tensor, prefix_lengths: Tensor, prompt_length: int):
        self.prefix_ids, self.prefix_lengths, self.prompt_length = prefix_ids, prefix_lengths, prompt_length
        self.rows = torch.arange(len(prefix_ids), device=prefix_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        if position >= self.prefix_ids.shape[1]:
            return scores
        forced_scores = torch.full_like(scores, -torch.inf)
        forced_scores.scatter_(1, self.prefix_ids[self.rows, position, None], 0.0)
        return torch.where((position < self.prefix_lengths[self.rows])[:, None], forced_scores, scores)


# ---- sampling


def padded(sequences: Iterable[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Returns `sequences` as ids [B, longest], padded with `value` on the "left" or "right", and their mask."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(tensors, padding_value=value), pad([torch.ones_like(ids, dtype=torch.bool) for ids in tensors])


def decoding_loop(model: PreTrainedModel, input_ids: Tensor, decode: Callable | None, **arguments) -> Tensor:
    """Samples with the decoding loop `decode` (None: HF's own). Raises ValueError if transformers has added a logits
    processor for a setting of the model folder: then the sampler would not be the policy that is trained."""
    for processor in arguments["logits_processor"]:
        if not isinstance(processor, DrawTokenLogitsProcessor | PrefixForcingLogitsProcessor):
            raise ValueError(f"the sampler is not neutral: transformers has added {type(processor).__name__}")
    return (decode or type(model)._sample)(model, input_ids, **arguments)


def end_of_response(tokens: list[int], start: int, ends: set[int]) -> int:
    """Returns the index after the first end token at or after `start`; len(tokens) if there is none."""
    for place in range(start, len(tokens)):
        if tokens[place] in ends:
            return place + 1
    return len(tokens)


def generate_call(
    model: PreTrainedModel, rows: Sequence[Row], max_response_tokens: int, temperature: float, decode: Callable | None
) -> list[Row]:
    """Calls HF's `generate` once. Returns `rows` with responses and, unless greedy, the log-probs of drawn tokens."""
    config, device = model.generation_config, model.device
    ids, mask = padded((row.prompt_ids for row in rows), config.pad_token_id, "left")
    prefixes, is_prefix = padded((row.prefix_ids for row in rows), 0, "right")
    table = torch.from_numpy(np.stack([uniforms(row.key, max_response_tokens) for row in rows]))  # [B, R]
    draw = DrawTokenLogitsProcessor(table.to(device), ids.shape[1], temperature)
    force = PrefixForcingLogitsProcessor(prefixes.to(device), is_prefix.sum(1).to(device), ids.shape[1])
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.long().to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max_response_tokens,
            do_sample=False,  # argmax takes the token that DrawTokenLogitsProcessor has drawn
            repetition_penalty=1.0,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ),
        logits_processor=LogitsProcessorList([draw, force] if temperature > 0 else [force]),
        custom_generate=functools.partial(decoding_loop, decode=decode),
        synced_gpus=False,  # each rank samples on its own, without waiting for others
    )[:, ids.shape[1] :].tolist()
    ends, sampled = set(config.eos_token_id), []
    for row, tokens, drawn in zip(rows, output, draw.drawn.log().tolist()):
        start = len(row.prefix_ids)
        stop = end_of_response(tokens, start, ends)
        log_probs = drawn[start:stop] if temperature > 0 else []
        truncated = tokens[stop - 1] not in ends
        sampled.append(dataclasses.replace(row, response=tokens[:stop], log_probs=log_probs, truncated=truncated))
    return sampled


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    max_response_tokens: int,
    temperature: float = 1.0,
    *,
    rows_per_call: int = 512,
    decode: Callable | None = None,
    progress: str | None = None,
) -> list[Row]:
    """Returns `rows` with responses: prefix, continuation and an end token (unless the limit of tokens was reached).

    Temperature 0 is greedy. `decode` replaces HF's decoding loop (fast.decode.decode_rows gives the same tokens).
    `progress` labels a tqdm bar. Rows of similar length share a call of HF's `generate`; sharing changes tokens only
    by rounding. Every rank must call `generate`; rank r samples groups g = r (mod ranks) and gets all others.
    """
    mine = [i for i, row in enumerate(rows) if not row.response and row.group % world_size() == rank()]
    mine.sort(key=lambda i: (len(rows[i].prompt_ids), len(rows[i].prefix_ids)))
    results: dict[int, Row] = {}
    quiet = not progress or rank() > 0
    with sampling(model) as policy, tqdm(total=len(mine), desc=progress, unit="row", disable=quiet) as bar:
        for start in range(0, len(mine), rows_per_call):
            call = mine[start : start + rows_per_call]
            sampled = generate_call(policy, [rows[i] for i in call], max_response_tokens, temperature, decode)
            results |= zip(call, sampled)
            bar.update(len(call))
    results = dict(enumerate(rows)) | gather_dict(results)
    ends, answered = model.generation_config.eos_token_id, []
    for row in results.values():
        answered.append(dataclasses.replace(row, text=response_text(tokenizer, row.response, ends)))
    return answered


# ---- what the update reads


@dataclass
class Rollouts:
    """A batch of B rows as tensors: P prompt columns (left-padded), then R response columns (right-padded)."""

    input_ids: Tensor  # [B, P+R]
    attention_mask: Tensor  # [B, P+R] 1 at real tokens, 0 at padding
    response_mask: Tensor  # [B, R] bool: True at prefix, generated tokens and end token
    prefix_mask: Tensor  # [B, R] bool: True at tokens of the demonstration
    group: Tensor  # [B] index of the row's problem in the batch
    hybrid: Tensor  # [B] bool: True for rows with demonstration tokens
    truncated: Tensor  # [B] bool: True if the limit of tokens cut the response off before an end token
    texts: list[str]  # the responses as text, prefix included


def pack(rows: Sequence[Row], pad_id: int) -> Rollouts:
    """Returns the rows as tensors on the CPU. Masks come from rows' lengths, because pad_id can be an end token."""
    prompts, prompt_mask = padded((row.prompt_ids for row in rows), pad_id, "left")
    responses, response_mask = padded((row.response for row in rows), pad_id, "right")
    prefix_lengths = torch.tensor([len(row.prefix_ids) for row in rows])
    return Rollouts(
        input_ids=torch.cat([prompts, responses], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1).long(),
        response_mask=response_mask,
        prefix_mask=torch.arange(responses.shape[1]) < prefix_lengths[:, None],
        group=torch.tensor([row.group for row in rows]),
        hybrid=prefix_lengths > 0,
        truncated=torch.tensor([row.truncated for row in rows]),
        texts=[row.text for row in rows],
    )


if __name__ == "__main__":  # python sample.py --model DIR "problem": try a model
    runpy.run_module("evaluation.try_model", run_name="__main__")
