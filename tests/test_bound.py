"""bench/bound.py: the products it counts, against a count by hand."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bound


def test_products_of_a_linear_layer_and_of_attention_are_counted_by_hand():
    layer, x = torch.nn.Linear(6, 10, bias=False), torch.randn(4, 6, requires_grad=True)
    q = torch.randn(2, 3, 5, 8, requires_grad=True)

    def work():
        layer(x).sum().backward()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    found = bound.calls(work)
    assert bound.flops(found) == 3 * 2 * 4 * 6 * 10  # forward, and backward for x and for the weight
    assert sum(found.values()) == 3 + 2
    operands = {args for (func, args, _) in found if func in bound.MATRICES}
    assert (((4, 6), False), ((6, 10), True)) in operands  # a weight, as the layer keeps it
    assert all(bound.seconds(found, operations) > 0 for operations in (bound.MATRICES, bound.ATTENTION))
    assert bound.seconds(found, ()) == 0


def test_share_holds_the_products_against_the_whole_work(monkeypatch):
    seconds = iter([8.0, 4.0, 2.0])
    monkeypatch.setattr(bound, "calls", lambda work: bound.Counter())
    monkeypatch.setattr(bound, "flops", lambda found: 6e9)
    monkeypatch.setattr(bound, "timed", lambda work: (None, next(seconds), None))
    monkeypatch.setattr(bound, "seconds", lambda found, operations: 3.0 if operations == bound.MATRICES else 0.2)
    found = bound.share(lambda: None, 3)
    assert found["work, cpu_s"] == 4 and found["products, GFLOP/s"] == 2
    assert found["share of products"] == pytest.approx(3 / 4)
    assert found["share of products and attention"] == pytest.approx(0.8)
