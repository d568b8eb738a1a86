"""What the matrix products of some work alone would take: a lower bound to hold measured times against.

`calls` counts the products that some work makes, by their operands' shapes; `seconds` makes each of them again, by
itself, on random operands that follow one another through more memory than a cache holds, as a model's weights do;
`share` does so in turn with the work, so that a busy machine hits both alike. Two figures: the layers' products of
matrices alone, and these with attention's products, which on the CPU are one kernel with its softmax. Left out:
everything that is not a product.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MATRICES = (aten.mm.default, aten.addmm.default)
ATTENTION = (
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
STREAMED = 2**26  # bytes of operands that one timing goes through: twice the largest cache of the machine measured
TIMINGS = 3

Call = tuple  # of the operation, its arguments and its settings, with Operands for tensors


class Operand(NamedTuple):
    shape: tuple[int, ...]
    transposed: bool  # in memory


class Products(TorchDispatchMode):
    """Counts the calls of MATRICES and ATTENTION."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Call] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (*MATRICES, *ATTENTION):
            self.found[(func, tuple(map(described, args)), tuple((k, described(v)) for k, v in kwargs.items()))] += 1
            return func(*args, **kwargs)
        with self:  # what is made of other operations is counted by these
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def described(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return Operand(tuple(value.shape), value.ndim == 2 and value.stride(0) < value.stride(1))


def made(value: object) -> object:
    if not isinstance(value, Operand):
        return value
    return torch.randn(value.shape[::-1]).T if value.transposed else torch.randn(value.shape)


def size(value: object) -> int:
    """Bytes of an operand, in fp32."""
    return 4 * math.prod(value.shape) if isinstance(value, Operand) else 0


def calls(work: Callable[[], object]) -> Counter[Call]:
    with Products() as mode:
        work()
    return mode.found


@torch.inference_mode()
def seconds(found: Counter[Call], operations: tuple) -> float:
    """CPU seconds of those of these calls that are among `operations`."""
    total = 0.0
    for (func, args, kwargs), count in found.items():
        if func not in operations:
            continue
        copies = max(1, min(count, STREAMED // sum(map(size, args))))
        operands = [(tuple(map(made, args)), {k: made(v) for k, v in kwargs}) for _ in range(copies)]
        times = [timed(lambda: call_all(func, operands))[1] for _ in range(TIMINGS)]  # noqa: B023
        total += count * statistics.median(times) / copies
    return total


def call_all(func: Callable, operands: list[tuple[tuple, dict]]) -> None:
    for args, kwargs in operands:
        func(*args, **kwargs)


def flops(found: Counter[Call]) -> int:
    """Floating-point operations of the calls of MATRICES."""
    shapes = [(args[-2].shape, args[-1].shape, count) for (func, args, _), count in found.items() if func in MATRICES]
    return sum(2 * count * rows * inner * columns for (rows, inner), (_, columns), count in shapes)


def share(work: Callable[[], object], repeats: int) -> dict:
    """The products' share of the CPU seconds of `work`, which does the same each time: medians over the repeats."""
    found, times = calls(work), []
    for _ in range(repeats):
        times.append((timed(work)[1], seconds(found, MATRICES), seconds(found, ATTENTION)))
    whole, matrices, attention = map(statistics.median, zip(*times))
    return {
        "products, cpu_s": round(matrices, 3),
        "products, GFLOP/s": round(flops(found) / matrices / 1e9, 1),
        "attention, cpu_s": round(attention, 3),
        "work, cpu_s": round(whole, 3),
        "share of products": round(statistics.median(m / w for w, m, _ in times), 2),
        "share of products and attention": round(statistics.median((m + a) / w for w, m, a in times), 2),
    }
