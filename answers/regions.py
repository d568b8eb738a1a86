"""This file turns sets of real numbers (intervals, unions, inequalities in one variable, {x | ...}, x ≠ 2) into
intervals, so that different spellings can be compared.

Sets in several variables are not read. Of the inequalities, only linear ones and those with the absolute value of a
linear term are read.
"""
# ruff: isort: skip_file

import functools

from .tree import (
    EXPRESSIONS, INFINITY, Node, ONE, REALS, ZERO, add, divide, is_name, is_region, mul, negative, sym, symbols,
)  # fmt: skip
from .values import DIGITS, context, is_real, value_at

Part = tuple  # an interval: (low, low closed, high, high closed); low and high are pairs (value, tree)
MAX_LISTED = 40
LOWEST, HIGHEST = (-context.inf, negative(INFINITY)), (context.inf, INFINITY)
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def regions_of(node: Node) -> list[Part] | None:
    """Returns a set of real numbers as sorted, merged intervals, or None for other nodes and for sets in several
    variables."""
    if len(symbols(node) - {INFINITY[1], REALS[1]}) > 1:
        return None
    parts = _parts(node)
    return None if parts is None else _merged(parts)


def _merged(parts: list[Part]) -> list[Part]:
    merged: list[Part] = []
    for low, low_closed, high, high_closed in sorted(parts, key=lambda part: (part[0][0], not part[1])):
        if merged:
            last = merged[-1]
            if low[0] < last[2][0] or (low[0] == last[2][0] and (low_closed or last[3])):
                end = max((last[2], last[3]), (high, high_closed), key=lambda e: (e[0][0], e[1]))
                merged[-1] = (*last[:2], *end)
                continue
        merged.append((low, low_closed, high, high_closed))
    return merged


def _parts(node: Node) -> list[Part] | None:
    if node == REALS:
        return [(LOWEST, False, HIGHEST, False)]
    if node[0] == "seq" and len(node[3]) == 2:
        low, high = map(_end, node[3])
        if low is None or high is None or not low[0] < high[0]:
            return None
        return [(low, node[1] == "[", high, node[2] == "]")]
    if node[0] == "set" and node[1]:
        points = [_end(x) for x in node[1]]
        return None if None in points else [(x, True, x, True) for x in points]
    if node[0] == "regions":
        left, right = _parts(node[2][0]), _parts(node[2][1])
        if left is None or right is None:
            return None
        if node[1] == "∖":
            return [rest for part in left for rest in _without(part, right)] if node[2][1][0] == "set" else None
        return left + right if node[1] == "∪" else _common(left, right)
    if node[0] == "list" and len(node[1]) <= MAX_LISTED and all(map(is_region, node[1])):
        return _listed([_parts(x) for x in node[1]])
    return _of_relation(node[1], node[2]) if node[0] == "rel" else None


def _listed(sets: list[list[Part] | None]) -> list[Part] | None:
    """Returns the intervals of a list of inequalities. Inequalities that do not overlap, such as x < 1, x > 2, are
    parts of a union. Inequalities that overlap, such as x > 1, x < 2 or x > 1, x != 2, are conditions on the same x
    and give an intersection."""
    if None in sets:
        return None
    pieces = [part for parts in sets for part in parts]
    if len(_merged(pieces)) == len(pieces):
        return pieces
    return functools.reduce(_common, sets)


def _common(left: list[Part], right: list[Part]) -> list[Part]:
    common = []
    for a in left:
        for b in right:
            low, low_closed = max((a[:2], b[:2]), key=lambda e: (e[0][0], not e[1]))
            high, high_closed = min((a[2:], b[2:]), key=lambda e: (e[0][0], e[1]))
            if low[0] < high[0] or (low[0] == high[0] and low_closed and high_closed):
                common.append((low, low_closed, high, high_closed))
    return common


def _without(part: Part, points: list[Part]) -> list[Part]:
    rest = [part]
    for point, *_ in points:
        rest = _common(rest, [(LOWEST, False, point, False), (point, False, HIGHEST, False)])
    return rest


def _of_relation(ops: tuple[str, ...], sides: tuple[Node, ...]) -> list[Part] | None:
    """Returns the intervals of a relation such as x > 1, 1 < x <= 2, x != 3, x in [0, 1], 2x + 1 < 5 or |x - 1| <
    2."""
    if ops == ("∈",):
        return _parts(sides[1]) if sides[0][0] == "sym" else None
    if not FLIPPED.keys() >= set(ops) or len(ops) > 2:
        return None
    if len(ops) == 2:
        halves = _of_relation(ops[:1], sides[:2]), _of_relation(ops[1:], sides[1:])
        return None if None in halves else _common(*halves) or None
    (op,), (left, right) = ops, sides
    if _end(left):
        op, left, right = FLIPPED[op], right, left
    line = _line(left) if left[0] in ("add", "mul") and _end(right) else None
    slope = _end(line[0]) if line else None
    if slope and slope[0]:  # the relation is an inequality ax + b < c
        op = op if slope[0] > 0 else FLIPPED[op]
        left, right = sym(*symbols(left)), divide(add(right, negative(line[1])), line[0])
    value = _end(right)
    if value and left[:2] == ("fn", "abs"):
        return _of_absolute(op, left[2][0], value)
    if not value or not is_name(left):
        return None
    if op == "=":
        return [(value, True, value, True)]
    if op == "!=":
        return _without((LOWEST, False, HIGHEST, False), [(value, True, value, True)])
    closed = op[-1] == "="
    return [(LOWEST, False, value, closed) if op[0] == "<" else (value, closed, HIGHEST, False)]


def _of_absolute(op: str, inside: Node, value: tuple) -> list[Part] | None:
    """Returns the intervals of an inequality with an absolute value, such as |x - 1| < 2, |x| >= 3 or |x| = 2."""
    bound, opposite = value[1], negative(value[1])
    if op == "!=" or value[0] < 0 or (op[0] == "<" and not value[0]):
        return None
    if op[0] == "<":
        return _of_relation((op, op), (opposite, inside, bound))
    left, right = _of_relation((FLIPPED[op],), (inside, opposite)), _of_relation((op,), (inside, bound))
    return None if left is None or right is None else left + right


def _line(node: Node) -> tuple[Node, Node] | None:
    """Returns the coefficients (a, b) of a linear expression ax + b."""
    if not symbols(node):
        return ZERO, node
    if node[0] == "sym":
        return ONE, ZERO
    if node[0] == "add":
        lines = [_line(term) for term in node[1]]
        return None if None in lines else tuple(add(*parts) for parts in zip(*lines))
    if node[0] != "mul":
        return None
    inside = [factor for factor in node[1] if symbols(factor)]
    line = _line(inside[0]) if len(inside) == 1 else None
    scale = mul(*(factor for factor in node[1] if not symbols(factor)))
    return line and (mul(scale, line[0]), mul(scale, line[1]))


def _end(node: Node) -> tuple | None:
    """Returns the pair (value, tree) of an end point, or None if the end point is neither a real constant nor ±∞."""
    if node in (INFINITY, LOWEST[1]):
        return HIGHEST if node == INFINITY else LOWEST
    value = value_at(node, 0, DIGITS) if node[0] in EXPRESSIONS and not symbols(node) else None
    return (context.re(value[0]), node) if value and is_real(value[0]) else None
