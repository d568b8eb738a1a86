"""Rollouts: which rows a group has, their prefixes, batched sampling, and the tensors the update reads.

In reading order: random numbers -> `prefix_fraction` -> `plan_group` (ids of every row to sample) -> `generate`
(HF generate with the processors and loops of decode.py) -> `Rollouts`.

    plan_group(problem) -> [Row(prompt_ids, prefix_ids), …]         ids only: text is never decoded and re-encoded
    generate(model, rows) -> [[token, …, eos], …]                   prefix + continuation, and log-probs as drawn
    pack(rows, responses) -> Rollouts                               left-padded prompts | right-padded responses

Every draw is a pure function of (seed, step, problem, rollout): one uniform number per row and position, turned
into a token by inverting the CDF. So a row does not depend on its neighbours, its batch or the number of ranks.
Left out: top-k, top-p, penalties (the sampler must be the policy that is trained), beams, speculative decoding.

    python sample.py --model DIR "problem" …          try a model
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from data.loader import Encoded, decode_responses, encode, render_prompt
from decode import DECODERS, DrawTokenLogitsProcessor, PrefixForcingLogitsProcessor
from model import check_window, load_model, pick_device, sampling, window_of
from support.checkpoint import trained_with
from support.command import command
from support.config import Parser, check_range
from support.distributed import gather_dict, rank, world_size
from support.errors import InputError

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


def cosine(progress: float) -> tuple[float, float]:
    """Low falls from 0.95 to 0.05 along half a cosine. [paper 3.3, A.2]"""
    return PREFIX_LOW + (PREFIX_HIGH - PREFIX_LOW) * (1 + math.cos(math.pi * progress)) / 2, PREFIX_HIGH


def uniform(progress: float) -> tuple[float, float]:
    """The whole range throughout. [ablation, paper Fig. 6]"""
    return PREFIX_LOW, PREFIX_HIGH


def constant(progress: float) -> tuple[float, float]:
    """0.5, the mean of uniform. [ablation]"""
    return 0.5, 0.5


def uft(progress: float) -> tuple[float, float]:
    """Any of 0, 1/5, ... 1 for 60% of the run, then nothing. [UFT; how often which: prefix_fraction]"""
    return 0.0, 1.0 if progress < 0.6 else 0.0


SCHEDULES = {schedule.__name__: schedule for schedule in (cosine, uniform, constant, uft)}  # progress -> low, high


def prefix_range(step: int, total_steps: int, schedule: str) -> tuple[float, float]:
    """The smallest and the largest share of the demonstration that may be given at `step` (from 0)."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule](min(1.0, step / total_steps))


def prefix_fraction(step: int, total_steps: int, schedule: str, generator: torch.Generator) -> float:
    """The share l of the demonstration that is given at `step` (from 0) of `total_steps`: l ~ U(low, high) of the
    schedule; for uft Binomial(5, p_t) / 5 with p_t from 0.95 to 0.05 along half a cosine over its range."""
    low, high = prefix_range(step, total_steps, schedule)
    if schedule == "uft":
        chance, _ = cosine(min(1.0, step / (0.6 * total_steps)))
        return high * float((torch.rand(5, generator=generator) < chance).sum()) / 5
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
    hybrid: int,
    max_response_tokens: int,
    seed: int,
    step: int,
    total_steps: int,
    attempt: int = 0,
    fraction: float | None = None,
) -> list[Row]:
    """The rows of one problem's group: on-policy rows first, then `hybrid` rows that see a demonstration.

    rows: "on_policy" | "hybrid" (a prefix each) | "demonstration" (all of it, nothing to sample) | "shared_prefix"
    (every row starts from the same prefix). A problem without demonstrations has on-policy rows only.
    `fraction` takes the place of the schedule's draw; `attempt` counts how often the group was sampled before.
    """
    prefixes: list[list[int]] = [[] for _ in range(rollouts)]
    fractions = [0.0] * rollouts
    if rows != "on_policy" and problem.demonstrations:
        chosen = range(rollouts) if rows == "shared_prefix" else range(rollouts - hybrid, rollouts)
        for i in chosen:
            # a shared prefix is drawn once: its key names the first row for all of them
            first = chosen[0] if rows == "shared_prefix" else i
            generator = torch_generator(seed, step, problem.id, first, attempt)
            which = int(torch.randint(len(problem.demonstrations), (), generator=generator))
            demonstration = problem.demonstrations[which]
            if rows == "demonstration":
                prefixes[i], fractions[i] = [*demonstration, problem.end_id], 1.0
            else:
                given = prefix_fraction(step, total_steps, schedule, generator) if fraction is None else fraction
                length = prefix_length(given, len(demonstration), max_response_tokens)
                prefixes[i], fractions[i] = demonstration[:length], length / len(demonstration)
    return [
        Row(
            group=group,
            key=(seed, step, problem.id, i, attempt),
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


def _processors(
    rows: Sequence[Row],
    in_prompt: Sequence[int],
    prompt_length: int,
    max_response_tokens: int,
    temperature: float,
    device: torch.device,
) -> LogitsProcessorList:
    """What turns scores into the next token: forced prefixes, and draws (none: greedy). `in_prompt`: how many prefix
    tokens of each row stand in its prompt already; position 0 of a row's draws is the response's first token."""
    processors = LogitsProcessorList()
    if temperature > 0:
        table = np.zeros((len(rows), max_response_tokens - min(in_prompt)), dtype=np.float32)
        for i, (row, n) in enumerate(zip(rows, in_prompt)):
            table[i, : max_response_tokens - n] = uniforms(row.key, max_response_tokens)[n:]
        processors.append(DrawTokenLogitsProcessor(torch.from_numpy(table).to(device), prompt_length, temperature))
    lengths = [len(row.prefix_ids) - n for row, n in zip(rows, in_prompt)]
    if max(lengths):
        prefixes = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for i, row in enumerate(rows):
            prefixes[i, : lengths[i]] = torch.tensor(row.prefix_ids)
        lengths = torch.tensor(lengths, device=device)
        processors.append(PrefixForcingLogitsProcessor(prefixes.to(device), lengths, prompt_length))
    return processors


def _response(row: Row, tokens: list[int], ends: set[int], max_response_tokens: int) -> list[int]:
    """`tokens`, which begin with the row's prefix, up to the first end token after it or the end of the budget."""
    tokens = tokens[:max_response_tokens]
    stop = next((t + 1 for t in range(len(row.prefix_ids), len(tokens)) if tokens[t] in ends), len(tokens))
    return tokens[:stop]


def _generate_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    max_response_tokens: int,
    temperature: float,
    prefill: bool,
    decode: str,
) -> list[tuple[list[int], list[float]]]:
    """One call of HF generate -> of each row its response and the log-probs of the tokens it drew (none: greedy).
    The prefix is forced token by token, or (prefill) read at once with the prompt."""
    config, device = model.generation_config, model.device
    in_prompt = [len(row.prefix_ids) if prefill else 0 for row in rows]
    prompts = [row.prompt_ids + row.prefix_ids[:n] for row, n in zip(rows, in_prompt)]
    ids, mask = pad_left(prompts, config.pad_token_id)
    prompt_length = ids.shape[1]
    processors = _processors(rows, in_prompt, prompt_length, max_response_tokens, temperature, device)
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max_response_tokens - min(in_prompt),
            do_sample=False,  # our processor draws, generate takes the argmax: no temperature, top_k or top_p here
            repetition_penalty=1.0,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            cache_implementation="static" if decode == "static" else None,
        ),
        logits_processor=processors,
        custom_generate=DECODERS[decode],
        synced_gpus=False,  # ranks sample on their own
    )[:, prompt_length:].tolist()
    ends = set(config.eos_token_id)
    drawn = processors[0].drawn.log().tolist() if temperature > 0 else [[]] * len(rows)
    found = []
    for row, n, tokens, log_probs in zip(rows, in_prompt, output, drawn):
        response = _response(row, row.prefix_ids[:n] + tokens, ends, max_response_tokens)
        found.append((response, log_probs[len(row.prefix_ids) - n : len(response) - n]))
    return found


def _cut_into_calls(
    rows: Sequence[Row], order: Sequence[int], rows_per_call: int, max_response_tokens: int, prefill: bool
) -> list[list[int]]:
    """Cut `order`, sorted by length, into calls of generate, none of which holds more tokens than `rows_per_call`
    rows of the longest prompt and max_response_tokens would.

    Without prefilling that means `rows_per_call` rows each. A prefilled prefix widens the prompt of all rows of its
    call, and only as many tokens are saved as the shortest prefix of the call has.
    """
    longest_prompt = max((len(rows[i].prompt_ids) for i in order), default=0)
    most_tokens = rows_per_call * (longest_prompt + max_response_tokens)
    calls: list[list[int]] = []
    shortest = 0  # prefix of the call
    for i in order:
        prefix = len(rows[i].prefix_ids) if prefill else 0
        shortest = min(shortest, prefix)
        columns = len(rows[i].prompt_ids) + prefix + max_response_tokens - shortest
        if not calls or len(calls[-1]) == rows_per_call or (len(calls[-1]) + 1) * columns > most_tokens:
            calls.append([])
            shortest = prefix
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
    log_probs: list[list[float]] | None = None,
) -> list[list[int]]:
    """Responses of `rows`, in their order: prefix + continuation, the end token last unless cut off by the budget.

    A list given as `log_probs` gets, row after row, those of the continuation's tokens as they were drawn.
    temperature 0 is greedy. `decode`: one of DECODERS. `progress` names a tqdm bar. Rows of similar length share a
    call, which holds no more than `rows_per_call` rows of the longest prompt and max_response_tokens would; which
    rows share one changes no token (up to rounding of the logits). With several ranks each samples the groups
    g = rank (mod ranks) and gets the others' responses; all must call.
    """
    found: dict[int, tuple[list[int], list[float]]] = {i: (list(row.prefix_ids), []) for i, row in enumerate(rows)}
    sampled: dict[int, tuple[list[int], list[float]]] = {}
    order = [i for i, row in enumerate(rows) if not row.complete and row.group % world_size() == rank()]
    order.sort(key=lambda i: (len(rows[i].prompt_ids) + prefill * len(rows[i].prefix_ids), len(rows[i].prefix_ids)))
    quiet = not progress or rank() > 0
    with sampling(model) as policy, tqdm(total=len(order), desc=progress, unit="row", disable=quiet) as bar:
        for chosen in _cut_into_calls(rows, order, rows_per_call, max_response_tokens, prefill):
            batch = [rows[i] for i in chosen]
            sampled |= zip(chosen, _generate_batch(policy, batch, max_response_tokens, temperature, prefill, decode))
            bar.update(len(chosen))
    found |= gather_dict(sampled)
    if log_probs is not None:
        log_probs += [drawn for _, drawn in found.values()]
    return [response for response, _ in found.values()]


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
        texts=decode_responses(tokenizer, responses, config.eos_token_id),
    )


@command("sample.py")
def main() -> None:
    parser = Parser(description="Sample responses to a problem.", allow_abbrev=False)
    parser.add_argument("problems", nargs="+", metavar="PROBLEM")
    parser.add_argument("--model", required=True, help="a HuggingFace model folder, e.g. runs/prefix-rft-001/final")
    parser.add_argument("--samples", type=int, default=4, help="responses per problem (default 4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--max_response_tokens", type=int, default=128)
    parser.add_argument("--system", help="system message (default: the one the model was trained with)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    for name, least in {"samples": 1, "max_response_tokens": 1, "seed": 0}.items():
        check_range(name, getattr(args, name), least)
    check_range("temperature", args.temperature, 0, 10)
    system = trained_with(args.model).get("system", "") if args.system is None else args.system
    model, tokenizer = load_model(args.model, pick_device(args.device))
    prompts = [render_prompt(tokenizer, problem, system) for problem in args.problems]
    encoded = [encode(tokenizer, prompt, "problem") for prompt in prompts]
    window, longest = window_of(model.config), max(map(len, encoded))
    check_window(window, longest, args.max_response_tokens, "max_response_tokens")
    samples = args.samples if args.temperature else 1  # greedy responses are all alike
    for problem, prompt, ids in zip(args.problems, prompts, encoded):
        rows = [Row(0, (args.seed, problem, i), ids, []) for i in range(samples)]
        responses = generate(model, rows, args.max_response_tokens, args.temperature)
        print(f"prompt  {prompt}")
        for text in pack(rows, responses, model, tokenizer).texts:
            print(f"  -> {text}")


if __name__ == "__main__":
    main()
