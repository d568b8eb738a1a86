"""This file is the whole of Prefix-RFT in plain PyTorch, around HuggingFace's own `model.generate`.

    python one_file.py        a tiny model, shipped with the project, learns the embedded task on one CPU core

Reinforcement learns nothing where the model never succeeds. Imitation copies everything, also what the model could do
already. Prefix-RFT (arXiv 2507.01679) begins one of the N responses to a problem with a prefix of an expert's
demonstration, and the policy writes the rest. All N responses together are a group. All N responses are graded and
trained by one objective:

    prompt | on-policy response ........... <eos>    reward r_1
    prompt | on-policy response ..... <eos>          reward r_2
      ...                                              ...       N - 1 on-policy rows
    prompt | PREFIX PREFIX | continuation ... <eos>  reward r_N  1 hybrid row

The task is to carry out instructions in the order of their labels A, B, C (`r` reverses the digits):

    problem        137;B+9;Cr;A+6?
    demonstration  137A+6=143;143B+9=152;152Cr=251;\\boxed{251}       (one training problem in four has one)

Read this file from top to bottom. loss.py, sample.py and step.py have the same method beside other methods,
micro-batches, several GPUs and exact resume. tests/test_one_file.py shows that they give the same gradient as this
file. In the shapes B is the number of rows, T the number of tokens of the longest row, and V the size of the
vocabulary.
"""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from reward import grade

# ---- settings, each with the value of the paper or of its released code

MODEL = "data/base"  # paper: Qwen2.5-Math-7B
DATA = "data/recipes"  # paper: OpenR1-Math-46k
STEPS = 60  # paper: 500
PROBLEMS = 16  # number of problems in each step; paper: 128
ROWS = 8  # N, the number of rows of a group; paper: 8
UPDATES = 2  # number of updates per step, each on a mini-batch of its own; paper: 2
MAX_TOKENS = 96  # limit of tokens of a response, prefix included; paper: 8192
SHORTEST, LONGEST = 0.05, 0.95  # bounds of a prefix's share of the demonstration; paper: 0.05, 0.95
ENTROPY_KEEP = 0.2  # share of the prefix tokens that are trained; paper: 0.2
CLIP = 0.2  # PPO clips the ratio to the range 1 - CLIP to 1 + CLIP; the paper's code: 0.2
LEARNING_RATE = 1e-4  # paper: 1e-6
MAX_GRAD_NORM = 1.0  # larger gradients are scaled down to this norm; the paper's code: 1.0

# Tokens are drawn from softmax(logits) itself, because the log-probs of softmax(logits) are trained. Every sampling
# setting is passed: HF takes a missing setting from the model's folder, and top_k is 50 if the folder does not set
# it.
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}

# ---- the rows of a step, and what the updates read of them


@dataclass
class Row:
    """One response to one problem, as token ids. The ids are never decoded and encoded again, because decoding and
    encoding can change ids."""

    prompt: list[int]
    answer: str
    prefix: list[int] = field(default_factory=list)  # start of the demonstration; empty in an on-policy row
    response: list[int] = field(default_factory=list)  # ids of the prefix, of what the policy wrote, and <eos>
    reward: float = 0.0


def new_row(problem: dict, tokenizer: Tokenizer) -> Row:
    chat = [{"role": "user", "content": problem["problem"]}]
    return Row(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), problem["answer"])


def new_group(problem: dict, progress: float, tokenizer: Tokenizer) -> list[Row]:
    """Returns N rows to sample. If the problem has a demonstration, the last row is hybrid: it starts with a prefix.

    The prefix is a random share of the demonstration, at most 95%. The smallest share falls from 95% to 5% along half
    a cosine while `progress` goes from 0 to 1. So the policy writes only the ends of solutions at first, and more and
    more of each solution later.
    """
    rows = [new_row(problem, tokenizer) for _ in range(ROWS)]
    if "demonstrations" in problem:
        demonstration = tokenizer.encode(random.choice(problem["demonstrations"]), add_special_tokens=False)
        least = SHORTEST + (LONGEST - SHORTEST) * (1 + math.cos(math.pi * progress)) / 2
        length = max(1, int(random.uniform(least, LONGEST) * len(demonstration)))
        rows[-1].prefix = demonstration[: min(length, len(demonstration) - 1, MAX_TOKENS - 1)]
    return rows


@torch.no_grad()
def respond(model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Row], sampler: dict) -> None:
    """Write and grade the response of every row. HF's `generate` gets the prefix as the end of the prompt."""
    inputs = [torch.tensor(row.prompt + row.prefix) for row in rows]
    # prompts are padded on the left, so all rows continue in the same column
    left = {"batch_first": True, "padding_side": "left"}
    output = model.generate(
        input_ids=pad_sequence(inputs, padding_value=tokenizer.pad_token_id, **left),
        attention_mask=pad_sequence([torch.ones_like(ids) for ids in inputs], **left),
        max_new_tokens=MAX_TOKENS,
        **sampler,
    )
    end = tokenizer.eos_token_id
    for row, written in zip(rows, output[:, max(map(len, inputs)) :].tolist()):
        length = written.index(end) + 1 if end in written else len(written)
        row.response = (row.prefix + written[:length])[:MAX_TOKENS]
        cut_off = row.response[-1] != end  # a response that is cut off counts as wrong, even with an answer
        row.reward = 0.0 if cut_off else grade(tokenizer.decode(row.response[:-1]), row.answer)


def advantages(rewards: Tensor, hybrid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two advantages of each row: one for the tokens that the policy wrote, and one for the prefix. All
    tensors are [groups, N].

    An on-policy row and a prefix start from the prompt, so their reward is compared with the mean of the on-policy
    rows. A continuation starts from the end of its prefix, where no other row starts. So the reward of a continuation
    is compared with nothing and is the whole advantage. As in Dr.GRPO, advantages are not divided by a standard
    deviation.
    """
    mean = (rewards * ~hybrid).sum(1, keepdim=True) / (~hybrid).sum(1, keepdim=True)  # mean reward of on-policy rows
    compared = rewards - mean
    return torch.where(hybrid, rewards, compared), compared


def token_stats(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of every token but the first, and the entropy of the model's distribution at that token's
    place: input_ids [B, T] -> two tensors [B, T - 1].

    Rows are padded on the right. A causal model never looks to the right, so it sees no padding and needs no mask.
    """
    log_p = model(input_ids=input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)  # [B, T - 1, V]
    log_probs = log_p.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return log_probs, -(log_p.exp() * log_p).sum(-1).detach()


@torch.no_grad()
def new_batch(model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Row]) -> dict[str, Tensor]:
    """Returns the tensors that the updates read, with all rows, group after group. All tensors but input_ids are [B,
    T - 1], and their column t is about token t + 1."""
    ids = [torch.tensor(row.prompt + row.response) for row in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, T]
    token = torch.arange(1, ids.shape[1])
    begin = torch.tensor([[len(row.prompt)] for row in rows])  # [B, 1]: index of each row's first response token
    own = begin + torch.tensor([[len(row.prefix)] for row in rows])  # index of the first token that the policy wrote
    end = begin + torch.tensor([[len(row.response)] for row in rows])  # index of the first padding token
    prefix_mask = (begin <= token) & (token < own)
    rewards = torch.tensor([row.reward for row in rows])
    own_advantage, prefix_advantage = advantages(rewards.view(-1, ROWS), (own > begin).view(-1, ROWS))
    # old log-probs of prefix tokens also come from the policy, so the ratio of every token starts at 1
    old_log_probs, entropy = token_stats(model, ids)
    return {
        "input_ids": ids,
        # the mask is made from positions, not from ids, and includes <eos>, because <pad> can have the id of <eos>
        "response_mask": (begin <= token) & (token < end),
        "prefix_mask": prefix_mask,
        "advantages": torch.where(prefix_mask, prefix_advantage.view(-1, 1), own_advantage.view(-1, 1)),
        "old_log_probs": old_log_probs,
        "entropy": entropy,
    }


# ---- the objective


def entropy_clip(prefix_mask: Tensor, entropy: Tensor) -> Tensor:
    """Returns which prefix tokens of a mini-batch are trained: the 20% with the highest entropy.

    At these tokens the policy was unsure how the solution goes on, so the demonstration teaches most. If all prefix
    tokens were trained, long prefixes would outweigh the tokens that the policy writes itself.
    """
    count = int(prefix_mask.sum())
    ranked = entropy.masked_fill(~prefix_mask, -math.inf).flatten().sort(descending=True, stable=True).indices
    keep_mask = torch.zeros_like(prefix_mask)
    keep_mask.view(-1)[ranked[: count - int((1 - ENTROPY_KEEP) * count)]] = True
    return keep_mask


def objective(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Returns PPO's clipped surrogate of a mini-batch, as a loss. A prefix token is trained like any other response
    token."""
    log_probs, _ = token_stats(model, batch["input_ids"])
    # the ratio is 1 in the first update of a step, but its gradient is not 0
    ratio = (log_probs - batch["old_log_probs"]).exp()
    advantage = batch["advantages"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    dropped = batch["prefix_mask"] & ~entropy_clip(batch["prefix_mask"], batch["entropy"])
    # the sum is divided by a constant: a mean over tokens would blame each token of a long wrong response less
    return -surrogate[batch["response_mask"] & ~dropped].sum() / (len(ratio) * MAX_TOKENS)


# ---- the run


def accuracy(model: PreTrainedModel, tokenizer: Tokenizer, problems: list[dict]) -> float:
    rows = [new_row(problem, tokenizer) for problem in problems]
    respond(model, tokenizer, rows, GREEDY)
    return sum(row.reward for row in rows) / len(rows)


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the model is too small to gain from a second thread
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # the weights are fp32, because bf16 would round small updates away
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    files = [Path(DATA, name).read_text().splitlines() for name in ("train.jsonl", "validation.jsonl")]
    train, validation = ([json.loads(line) for line in lines] for lines in files)
    before = accuracy(model, tokenizer, validation)
    bar = trange(STEPS, desc="Prefix-RFT")
    for step in bar:
        problems = random.sample(train, PROBLEMS)
        rows = [row for problem in problems for row in new_group(problem, step / STEPS, tokenizer)]
        respond(model, tokenizer, rows, SAMPLED)
        batch = new_batch(model, tokenizer, rows)
        for part in torch.arange(len(rows)).chunk(UPDATES):  # whole groups
            objective(model, {name: values[part] for name, values in batch.items()}).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(reward=f"{sum(row.reward for row in rows) / len(rows):.2f}")
    after = accuracy(model, tokenizer, validation)
    print(f"greedy accuracy on {len(validation)} validation problems: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main()
