"""Which rows go through the model together: as many as a budget of tokens allows, of similar length, on every rank.

The gradient does not depend on it (step.update); time and memory do.
"""

import torch
from torch import Tensor

from sample import Rollouts
from support.distributed import rank, world_size


def micro_batches(rollouts: Rollouts, rows: Tensor, budget: int) -> list[Tensor]:
    """`rows` sorted by length and cut so that rows x columns stay within `budget` tokens (or a row is alone)."""
    responses = rollouts.response_tokens
    prompts, responses = (rollouts.attention_mask.sum(1) - responses).tolist(), responses.tolist()
    chunks: list[list[int]] = []
    prompt = response = 0
    for i in sorted(rows.tolist(), key=lambda i: (responses[i], prompts[i])):
        prompt, response = max(prompt, prompts[i]), max(response, responses[i])
        if not chunks or (len(chunks[-1]) + 1) * (prompt + response) > budget:
            chunks.append([])
            prompt, response = prompts[i], responses[i]
        chunks[-1].append(i)
    return [torch.tensor(chunk) for chunk in chunks]


def rank_micro_batches(rollouts: Rollouts, rows: Tensor, budget: int) -> list[tuple[Tensor, bool]]:
    """This rank's micro-batches of `rows`, and whether each counts.

    Rows are dealt to the ranks by length. FSDP wants equally many passes on every rank: one with fewer micro-batches
    than another passes a row once more, which counts for nothing.
    """
    order = torch.cat([rows[:0], *micro_batches(rollouts, rows, budget)])  # also without any row
    of_ranks = [micro_batches(rollouts, order[r :: world_size()], budget) for r in range(world_size())]
    mine, most = of_ranks[rank()], max(map(len, of_ranks))
    return [(chunk, True) for chunk in mine] + [(order[:1], False)] * (most - len(mine))
