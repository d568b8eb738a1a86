"""Rollouts: which rows a group has, their prefixes, batched sampling, and the tensors the update reads.

In reading order: random numbers -> `prefix_fraction` -> `plan_group` (ids of every row to sample) -> `generate`
(HF generate with the processors and loops of decode.py) -> `Rollouts`.

    plan_group(problem) -> [Row(prompt_ids, prefix_ids), …]         ids only: text is never decoded and re-encoded
    generate(model, rows) -> [[token, …, eos], …]                   prefix + continuation
    pack(rows, responses) -> Rollouts                               left-padded prompts | right-padded responses

Every draw is a pure function of (seed, step, problem, rollout): one uniform number per row and position, turned
into a token by inverting the CDF. So a row does not depend on its neighbours, its batch or the number of ranks.
Left out: top-k, top-p, penalties (the sampler must be the policy that is trained), beams, speculative decoding.

    python sample.py --model DIR "problem" …          try a model
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from data.loader import Encoded, encode, render_prompt
from decode import DECODERS, DrawTokenLogitsProcessor, PrefixForcingLogitsProcessor
from model import load_model, pick_device, sampling
from support.distributed import rank, union, world_size

PREFIX_LOW, PREFIX_HIGH = 0.05, 0.95  # bounds of the prefix fraction [paper A.2]


# ---- random numbers


def seed_of(*key: object) -> int:
    """A 128-bit seed that depends on `key` only (the same on every machine, unlike hash())."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "big")


def torch_generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key) % 2**63)


def uniforms(key: tuple, count: int) -> np.ndarray:
    """`count` numbers of [0, 1), float32: a counter-based stream (Philox) of its own for each key."""
    return np.random.Generator(np.random.Philox(key=seed_of(*key))).random(count, dtype=np.float32)


# ---- the plan of a group


def prefix_range(step: int, total_steps: int, schedule: str) -> tuple[float, float]:
    """The interval (low, high) in which the share l of `step` (from 0) of `total_steps` is drawn.

    cosine    (low_t, 0.95), low_t from 0.95 to 0.05 along half a cosine       [paper 3.3, A.2]
    uniform   (0.05, 0.95) throughout                                          [ablation, paper Fig. 6]
    constant  (0.5, 0.5), the mean of uniform                                  [ablation]
    uft       (0, 1) over the first 60%, then (0, 0)                           [UFT]
    """
    span = PREFIX_HIGH - PREFIX_LOW
    if schedule == "cosine":
        return PREFIX_LOW + span * (1 + math.cos(math.pi * min(1.0, step / total_steps))) / 2, PREFIX_HIGH
    if schedule == "uniform":
        return PREFIX_LOW, PREFIX_HIGH
    if schedule == "constant":
        return PREFIX_LOW + span / 2, PREFIX_LOW + span / 2
    if schedule == "uft":
        return 0.0, float(step < 0.6 * total_steps)
    raise ValueError(f"schedule is {schedule!r}, expected cosine, uniform, constant or uft")


def prefix_fraction(step: int, total_steps: int, schedule: str, generator: torch.Generator) -> float:
    """The share l of the demonstration that is given at `step` (from 0) of `total_steps`.

    l ~ U(low, high) of `prefix_range`; under uft l ~ Binomial(5, p_t) / 5, p_t from 0.95 to 0.05 along half a cosine
    over the first 60% of the steps, then 0.
    """
    low, high = prefix_range(step, total_steps, schedule)
    if schedule == "uft":
        progress = step / (0.6 * total_steps)
        chance = PREFIX_LOW + (PREFIX_HIGH - PREFIX_LOW) * (1 + math.cos(math.pi * progress)) / 2 if high else 0.0
        return float((torch.rand(5, generator=generator) < chance).sum()) / 5
    return low + (high - low) * float(torch.rand((), generator=generator))


def prefix_length(fraction: float, demonstration_tokens: int, max_response_tokens: int) -> int:
    """L = floor(l |y*|), at least 1 and at most min(|y*| - 1, max_response_tokens - 1); 0 for l = 0 or no room."""
    if fraction <= 0:
        return 0
    longest = min(demonstration_tokens - 1, max_response_tokens - 1)
    return max(0, min(max(1, math.floor(fraction * demonstration_tokens)), longest))


@dataclass(frozen=True)
class Row:
    """One rollout to be sampled. `prefix_ids` is forced; `complete`: it is all there is, end token included."""

    group: int
    key: tuple  # of its random draws
    prompt_ids: list[int]
    prefix_ids: list[int]
    complete: bool = False
    fraction: float = 0.0  # of the demonstration that is given


def plan_group(
    problem: Encoded,
    group: int,
    *,
    rows: str,
    schedule: str,
    rollouts: int,
    guided: int,
    max_response_tokens: int,
    seed: int,
    step: int,
    total_steps: int,
) -> list[Row]:
    """The rows of one problem's group: on-policy rows first, then `guided` rows that see a demonstration.

    rows: "on_policy" | "hybrid" (a prefix each) | "demonstration" (all of it, nothing to sample) | "shared_prefix"
    (every row starts from the same prefix). A problem without demonstrations has on-policy rows only.
    """
    prefixes: list[list[int]] = [[] for _ in range(rollouts)]
    fractions = [0.0] * rollouts
    if rows != "on_policy" and problem.demonstrations:
        chosen = {"shared_prefix": range(rollouts)}.get(rows, range(rollouts - guided, rollouts))
        for i in chosen:
            # a shared prefix is drawn once: its key names the first row for all of them
            generator = torch_generator(seed, step, problem.id, chosen[0] if rows == "shared_prefix" else i)
            pick = int(torch.randint(len(problem.demonstrations), (), generator=generator))
            demonstration = problem.demonstrations[pick]
            if rows == "demonstration":
                prefixes[i], fractions[i] = [*demonstration, problem.end_id], 1.0
            else:
                fraction = prefix_fraction(step, total_steps, schedule, generator)
                length = prefix_length(fraction, len(demonstration), max_response_tokens)
                prefixes[i], fractions[i] = demonstration[:length], length / len(demonstration)
    return [
        Row(
            group=group,
            key=(seed, step, problem.id, i),
            prompt_ids=problem.prompt_ids,
            prefix_ids=prefix,
            complete=rows == "demonstration" and bool(prefix),
            fraction=fractions[i],
        )
        for i, prefix in enumerate(prefixes)
    ]


# ---- sampling


def pad_left(sequences: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """-> ids, mask [B, longest]"""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask


def _generate_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    max_response_tokens: int,
    temperature: float,
    prefill: bool,
    decode: str,
) -> list[list[int]]:
    """One call of HF generate. The prefix is forced token by token, or (prefill) read at once with the prompt."""
    config, device = model.generation_config, model.device
    lengths = [len(row.prefix_ids) for row in rows]
    given = [len(row.prefix_ids) if prefill else 0 for row in rows]  # prefix tokens that stand in the prompt
    ids, mask = pad_left([row.prompt_ids + row.prefix_ids[:n] for row, n in zip(rows, given)], config.pad_token_id)
    steps, prompt = max_response_tokens - min(given), ids.shape[1]
    processors = LogitsProcessorList()
    if temperature > 0:
        table = np.zeros((len(rows), steps), dtype=np.float32)
        for i, (row, n) in enumerate(zip(rows, given)):  # position 0 of the stream is the response's first token
            table[i, : max_response_tokens - n] = uniforms(row.key, max_response_tokens)[n:]
        processors.append(DrawTokenLogitsProcessor(torch.from_numpy(table).to(device), prompt, temperature))
    if not prefill and max(lengths):
        forced = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for i, row in enumerate(rows):
            forced[i, : lengths[i]] = torch.tensor(row.prefix_ids)
        processors.append(
            PrefixForcingLogitsProcessor(forced.to(device), torch.tensor(lengths, device=device), prompt)
        )
    neutral = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,  # our processor draws and generate takes the argmax: no temperature, top_k or top_p here
        repetition_penalty=1.0,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        cache_implementation="static" if decode == "static" else None,
    )
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=neutral,
        logits_processor=processors,
        custom_generate=DECODERS[decode],
        synced_gpus=False,  # ranks sample on their own
    )[:, prompt:].tolist()
    ends = set(config.eos_token_id)
    responses = []
    for row, n, length, tokens in zip(rows, given, lengths, output):
        tokens = (row.prefix_ids[:n] + tokens)[:max_response_tokens]
        stop = next((t + 1 for t in range(length, len(tokens)) if tokens[t] in ends), len(tokens))
        responses.append(tokens[:stop])
    return responses


def _calls(
    rows: Sequence[Row], order: Sequence[int], rows_per_call: int, max_response_tokens: int, prefill: bool
) -> list[list[int]]:
    """Cut `order`, sorted by length, into calls of at most `rows_per_call` rows: fewer where prefilled prefixes,
    which widen a call for all its rows, would make it hold more tokens than so many rows without any."""
    room = rows_per_call * (max((len(rows[i].prompt_ids) for i in order), default=0) + max_response_tokens)
    calls: list[list[int]] = []
    least = 0  # of the prefix tokens given to the rows of the call: the others are generated
    for i in order:
        given = prefill * len(rows[i].prefix_ids)
        least = min(least, given)
        columns = len(rows[i].prompt_ids) + given + max_response_tokens - least
        if not calls or len(calls[-1]) == rows_per_call or (len(calls[-1]) + 1) * columns > room:
            calls.append([])
            least = given
        calls[-1].append(i)
    return calls


def generate(
    model: PreTrainedModel,
    rows: Sequence[Row],
    max_response_tokens: int,
    temperature: float = 1.0,
    *,
    rows_per_call: int = 512,
    prefill: bool = False,
    decode: str = "loop",
    progress: str | None = None,
) -> list[list[int]]:
    """Responses of `rows`, in their order: prefix + continuation, the end token last unless cut off by the budget.

    temperature 0 is greedy. `decode`: one of DECODERS. `progress` names a tqdm bar. Rows of similar length share a
    call, which holds no more than `rows_per_call` rows of the longest prompt and max_response_tokens would; which
    rows share one changes no token (up to rounding of the logits). With several ranks each samples the groups
    g = rank (mod ranks) and gets the others' responses; all must call.
    """
    responses = {i: list(row.prefix_ids) for i, row in enumerate(rows)}
    sampled: dict[int, list[int]] = {}
    order = [i for i, row in enumerate(rows) if not row.complete and row.group % world_size() == rank()]
    order.sort(key=lambda i: (len(rows[i].prompt_ids) + prefill * len(rows[i].prefix_ids), len(rows[i].prefix_ids)))
    quiet = not progress or rank() > 0
    with sampling(model) as policy, tqdm(total=len(order), desc=progress, unit="row", disable=quiet) as bar:
        for chosen in _calls(rows, order, rows_per_call, max_response_tokens, prefill):
            batch = [rows[i] for i in chosen]
            sampled |= zip(chosen, _generate_batch(policy, batch, max_response_tokens, temperature, prefill, decode))
            bar.update(len(chosen))
    return list((responses | union(sampled)).values())


# ---- what the update reads


@dataclass
class Rollouts:
    """A batch of rows: B rows, P prompt columns (left-padded), R response columns (right-padded)."""

    input_ids: Tensor  # [B, P+R]
    attention_mask: Tensor  # [B, P+R] 1 at real tokens
    response_mask: Tensor  # [B, R] bool: prefix + generated + end token
    prefix_mask: Tensor  # [B, R] bool: tokens of the demonstration
    group: Tensor  # [B] which problem of the batch
    hybrid: Tensor  # [B] bool: the row has demonstration tokens
    truncated: Tensor  # [B] bool: cut off by the budget without an end token
    texts: list[str]  # the responses as text, prefix included

    @property
    def response_tokens(self) -> Tensor:
        """[B] tokens of each response."""
        return self.response_mask.sum(1)

    def columns(self, rows: Tensor) -> tuple[slice, int]:
        """The columns of input_ids that `rows` need, and how many of them are response columns."""
        prompt = self.input_ids.shape[1] - self.response_mask.shape[1]
        width = int(self.attention_mask[rows, :prompt].sum(1).max())
        response = int(self.response_tokens[rows].max())
        return slice(prompt - width, prompt + response), response


def pack(rows: Sequence[Row], responses: Sequence[list[int]], model: PreTrainedModel, tokenizer) -> Rollouts:
    """Rows and their responses as tensors on the CPU. Masks come from what was generated, never from ids == pad."""
    config = model.generation_config
    ids, mask = pad_left([row.prompt_ids for row in rows], config.pad_token_id)
    width = max(map(len, responses))
    lengths = torch.tensor([len(r) for r in responses])
    prefix = torch.tensor([len(row.prefix_ids) for row in rows])
    padded = torch.tensor([r + [config.pad_token_id] * (width - len(r)) for r in responses])
    column = torch.arange(width)
    response_mask = column < lengths[:, None]
    ends = set(config.eos_token_id)
    return Rollouts(
        input_ids=torch.cat([ids, padded], dim=1),
        attention_mask=torch.cat([mask, response_mask.long()], dim=1),
        response_mask=response_mask,
        prefix_mask=column < prefix[:, None],
        group=torch.tensor([row.group for row in rows]),
        hybrid=prefix > 0,
        truncated=torch.tensor([r[-1] not in ends for r in responses]),
        texts=tokenizer.batch_decode(responses, skip_special_tokens=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample responses to a problem.", allow_abbrev=False)
    parser.add_argument("problems", nargs="+", metavar="PROBLEM")
    parser.add_argument("--model", required=True, help="a HuggingFace model folder, e.g. runs/prefix-rft-001/final")
    parser.add_argument("--samples", type=int, default=4, help="responses per problem (default 4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--max_response_tokens", type=int, default=128)
    parser.add_argument("--system", default="", help="system message, if the chat template has one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    if args.samples < 1 or args.max_response_tokens < 1 or not 0 <= args.temperature < math.inf:
        sys.exit("sample.py: --samples and --max_response_tokens must be at least 1, --temperature at least 0")
    try:
        model, tokenizer = load_model(args.model, pick_device(args.device))
        for problem in args.problems:
            prompt = render_prompt(tokenizer, problem, args.system)
            ids = encode(tokenizer, prompt, "problem")
            rows = [Row(0, (args.seed, problem, i), ids, []) for i in range(args.samples)]
            responses = generate(model, rows, args.max_response_tokens, args.temperature)
            print(f"prompt  {prompt}")
            for text in pack(rows, responses, model, tokenizer).texts:
                print(f"  -> {text}")
    except ValueError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
