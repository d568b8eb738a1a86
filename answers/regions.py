"""Sets of real numbers, however they are written: intervals, unions, inequalities in one variable, {x | ...}, x ≠ 2.

Left out: inequalities that are neither linear nor |linear|, and several variables.
"""
# ruff: isort: skip_file

from .tree import (
    EXPRESSIONS, INFINITY, Node, ONE, REALS, ZERO, add, divide, is_name, is_region, mul, negative, sym, symbols,
)  # fmt: skip
from .values import DIGITS, context, is_real, value_at

Part = tuple  # (low, low closed, high, high closed), an end being (value, its tree)
MAX_LISTED = 40
LOWEST, HIGHEST = (-context.inf, negative(INFINITY)), (context.inf, INFINITY)
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def regions_of(node: Node) -> list[Part] | None:
    """A set of real numbers as sorted, merged intervals; None if it is none or in several variables."""
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


def _listed(found: list[list[Part] | None]) -> list[Part] | None:
    """x < 1, x > 2 are two pieces of a set; x > 1, x < 2 and x > 1, x != 2 are conditions on the same x."""
    if None in found:
        return None
    pieces = [part for parts in found for part in parts]
    if len(_merged(pieces)) == len(pieces):
        return pieces
    common = found[0]
    for parts in found[1:]:
        common = _common(common, parts)
    return common


def _common(left: list[Part], right: list[Part]) -> list[Part]:
    found = []
    for a in left:
        for b in right:
            low, low_closed = max((a[:2], b[:2]), key=lambda e: (e[0][0], not e[1]))
            high, high_closed = min((a[2:], b[2:]), key=lambda e: (e[0][0], e[1]))
            if low[0] < high[0] or (low[0] == high[0] and low_closed and high_closed):
                found.append((low, low_closed, high, high_closed))
    return found


def _without(part: Part, points: list[Part]) -> list[Part]:
    found = [part]
    for point, *_ in points:
        pieces = []
        for low, low_closed, high, high_closed in found:
            if low[0] < point[0] < high[0]:
                pieces += [(low, low_closed, point, False), (point, False, high, high_closed)]
            else:
                pieces.append((low, low_closed and low[0] != point[0], high, high_closed and high[0] != point[0]))
        found = pieces
    return found


def _of_relation(ops: tuple[str, ...], sides: tuple[Node, ...]) -> list[Part] | None:
    """x > 1, 1 < x <= 2, x != 3, x in [0, 1], 2x + 1 < 5, |x - 1| < 2."""
    if ops == ("∈",):
        return _parts(sides[1]) if sides[0][0] == "sym" else None
    if not {"<", "<=", ">", ">=", "!=", "="}.issuperset(ops) or len(ops) > 2:
        return None
    if ops[0] in (">", ">=") or (len(sides) == 2 and sides[1][0] == "sym" and is_name(sides[1])):
        ops, sides = tuple(FLIPPED[op] for op in reversed(ops)), sides[::-1]
    ops, sides = _isolated(ops, sides)
    where = next((k for k, side in enumerate(sides) if not _end(side)), 0)
    if sides[where][:2] == ("fn", "abs"):
        return _of_absolute(ops, sides, where)
    ends = [_end(side) for side in sides]
    if not is_name(sides[where]) or not all(ends[:where] + ends[where + 1 :]):
        return None
    if len(ops) == 2:
        if where != 1 or ops[0][0] != ops[1][0] or ops[0][0] not in "<>" or not ends[0][0] < ends[2][0]:
            return None
        return [(ends[0], ops[0] == "<=", ends[2], ops[1] == "<=")]
    value = ends[1 - where]
    if ops[0] == "=":
        return [(value, True, value, True)]
    if ops[0] == "!=":
        return _without((LOWEST, False, HIGHEST, False), [(value, True, value, True)])
    closed = ops[0][-1] == "="
    return [(LOWEST, False, value, closed) if (ops[0][0] == "<") == (where == 0) else (value, closed, HIGHEST, False)]


def _isolated(ops: tuple[str, ...], sides: tuple[Node, ...]) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """The same relation with the variable alone, where the one side that is not constant is ax + b."""
    where = [k for k, side in enumerate(sides) if symbols(side)]
    if len(where) != 1 or sides[where[0]][0] not in ("add", "mul"):
        return ops, sides
    line = _line(sides[where[0]])
    slope = _end(line[0]) if line else None
    if not slope or not slope[0]:
        return ops, sides
    rest = [divide(add(side, negative(line[1])), line[0]) for side in sides]
    rest[where[0]] = sym(*symbols(sides[where[0]]))
    if slope[0] > 0:
        return ops, tuple(rest)
    return (tuple(FLIPPED[op] for op in ops), tuple(rest)) if len(ops) == 1 else (ops[::-1], tuple(rest[::-1]))


def _line(node: Node) -> tuple[Node, Node] | None:
    """(a, b) of ax + b."""
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


def _of_absolute(ops: tuple[str, ...], sides: tuple[Node, ...], where: int) -> list[Part] | None:
    """|x - 1| < 2, |x| >= 3, 1 < |x| < 2, |x| = 2."""
    (inside,) = sides[where][2]
    if len(ops) == 2:
        low, high = sides[0], sides[2]
        if where != 1 or not _end(low) or _end(low)[0] < 0 or not {"<", "<="}.issuperset(ops):
            return None
        right = _of_relation(ops, (low, inside, high))
        left = _of_relation(ops[::-1], (negative(high), inside, negative(low)))
        return None if left is None or right is None else left + right
    op = ops[0] if where == 0 else FLIPPED[ops[0]]
    bound = sides[1 - where]
    if not _end(bound) or _end(bound)[0] <= 0 or op == "!=":
        return None
    if op in ("<", "<="):
        return _of_relation((op, op), (negative(bound), inside, bound))
    left, right = _of_relation((FLIPPED[op],), (inside, negative(bound))), _of_relation((op,), (inside, bound))
    return None if left is None or right is None else left + right


def _end(node: Node) -> tuple | None:
    """The value of an end point with its tree; None unless it is a real constant or ±∞."""
    if node in (INFINITY, LOWEST[1]):
        return HIGHEST if node == INFINITY else LOWEST
    value = value_at(node, 0, DIGITS) if node[0] in EXPRESSIONS and not symbols(node) else None
    return (context.re(value[0]), node) if value and is_real(value[0]) else None
