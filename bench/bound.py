"""What the matrix products of some work alone would take: a lower bound to hold measured times against.

`products` counts the products a call makes, by shape; `seconds` times each shape by itself, on matrices that follow
one another through more memory than a cache holds, as a model's weights do. Left out: attention, whose products are
inside a fused kernel, and everything else that is not a product.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STREAMED = 2**26  # bytes of weights that one timing goes through: twice the largest cache of the machine measured
REPEATS = 3


class Products(TorchDispatchMode):
    """Counts matrix products as (rows, inner, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.found[(*left.shape, right.shape[1])] += 1
            return func(*args, **(kwargs or {}))
        with self:  # what is made of other operations is counted by these
            result = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def products(call: Callable[[], object]) -> Counter[tuple[int, int, int]]:
    with Products() as mode:
        call()
    return mode.found


@torch.inference_mode()
def seconds(found: Counter[tuple[int, int, int]]) -> tuple[float, float]:
    """CPU seconds and floating-point operations of these products."""
    total = operations = 0.0
    for (rows, inner, columns), count in found.items():
        left = torch.randn(rows, inner)
        copies = max(1, min(count, STREAMED // (4 * inner * columns)))
        weights = [torch.randn(columns, inner).T for _ in range(copies)]  # as a linear layer keeps them
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            for weight in weights:
                left @ weight
            times.append((time.process_time() - start) / copies)
        total += count * statistics.median(times)
        operations += count * 2 * rows * inner * columns
    return total, operations
