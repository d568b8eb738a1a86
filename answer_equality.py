"""Whether two answers that were read mean the same: the same normal form, else the same exact number, else the same
values at random points to 45 digits. When in doubt, not equal: a false positive is what a policy learns to exploit.

Decimals. Two decimals, or a decimal in the prediction and an exact gold, are compared as exact numbers: 3.14 is not π,
0.333 is not 1/3, 0.3330 is 0.333. Only a gold that is itself a decimal of at least three significant digits also
accepts an exact prediction that no decimal can state (1/3, √2) and that rounds to it: gold 0.333 accepts 1/3.

Optional, but never contradicted: units, degrees, %, currency, the modulus, the base, the name in "x = 5" (5 cm is 5,
and is not 5 m). Free order: sets and lists, the sides of =. Ordered: tuples, points, matrices. [0, 1] is not [0, 1).

Expressions are compared as functions of real variables, where both are real at at least three of eight points; else as
complex ones. Left out: solving equations (x^2 = 4 is not x = 2, -2), identities that hold for whole numbers only.
"""

import random
from fractions import Fraction
from functools import lru_cache

import mpmath

from answer_nodes import (
    CONSTANTS, DEGREE, EXPRESSIONS, FUNCTIONS, INFINITY, REALS, ZERO, Node, Unreadable,
    add, divide, is_name, is_number, mul, negative, num, symbols,
)  # fmt: skip
from answers import Answer

POINTS, ENOUGH = 8, 3
DIGITS, SURE_DIGITS = 60, 400
MAX_ITEMS = 200
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "≡": "≡", "≈": "≈", "⊥": "⊥", "∥": "∥"}


def equal(prediction: Answer, gold: Answer) -> bool:
    """Whether a prediction is right. A multiple-choice gold accepts its letter only, words accept equal words only."""
    if gold.choice:
        return prediction.choice == gold.choice
    if "text" in (prediction.node[0], gold.node[0]):
        return prediction.words is not None and prediction.words == gold.words
    pairs = [(prediction.node, gold.node), (prediction.second, gold.node), (prediction.node, gold.second)]
    try:
        return any(same(p, g) for p, g in pairs if p is not None and g is not None)
    except Unreadable:  # arithmetic on the two grew too large
        return False


def same(p: Node, g: Node) -> bool:
    """Whether the tree of a prediction and that of a gold mean the same."""
    if p == g:
        return True
    if p[0] == "unit" or g[0] == "unit":
        (p, unit_p), (g, unit_g) = ((n[1], n[2]) if n[0] == "unit" else (n, None) for n in (p, g))
        return _same_units(unit_p, unit_g) and same(p, g)
    for node, other, gold_first in ((p, g, False), (g, p, True)):
        if node[0] == "rel" and "≈" in node[1]:
            return any(same(*((other, v) if gold_first else (v, other))) for v in _approximations(node))
    if p[0] == "rel" or g[0] == "rel" or "regions" in (p[0], g[0]) or REALS in (p, g):
        return _same_relations(p, g)
    if p[0] in EXPRESSIONS and g[0] in EXPRESSIONS:
        return _same_expressions(p, g)
    return _same_collections(p, g)


def _same_units(p: str | None, g: str | None) -> bool:
    return p is None or g is None or p == g


def _same_collections(p: Node, g: Node) -> bool:
    kinds = {p[0], g[0]}
    if kinds <= {"set", "list"}:
        return _same_items(p[1], g[1])
    if kinds == {"seq"}:
        plain = {p[1] + p[2], g[1] + g[2]} <= {"()", "[]"} and len(p[3]) > 2  # [1, 2, 3] is (1, 2, 3)
        return (p[1:3] == g[1:3] or plain) and _same_in_order(p[3], g[3])
    if kinds == {"seq", "list"} and {p[1], g[1]} & {"(", "["}:  # three or more numbers in order, with or without ( )
        return len(p[-1]) > 2 and _same_in_order(p[-1], g[-1])
    if kinds == {"matrix"}:
        return len(p[1]) == len(g[1]) and all(_same_in_order(a, b) for a, b in zip(p[1], g[1]))
    if kinds == {"matrix", "seq"}:  # a column vector as a point
        matrix, seq = (p, g) if p[0] == "matrix" else (g, p)
        column = tuple(row[0] for row in matrix[1])
        if len(matrix[1][0]) > 1 or seq[1] + seq[2] not in ("()", "[]"):
            return False
        return _same_in_order(column, seq[3]) if matrix is p else _same_in_order(seq[3], column)
    if kinds == {"det"}:
        return len(p[1]) == len(g[1]) and all(_same_in_order(a, b) for a, b in zip(p[1], g[1]))
    if kinds == {"ratio"}:
        return _same_ratio(p[1], g[1])
    if p[0] == "set" and len(p[1]) == 1 and g[0] in EXPRESSIONS:  # {5} is 5
        return same(p[1][0], g)
    if g[0] == "set" and len(g[1]) == 1 and p[0] in EXPRESSIONS:
        return same(p, g[1][0])
    return g[0] == "base" and g[1].isdigit() and p == num(int(g[1]))


def _same_in_order(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    return len(p) == len(g) and all(map(same, p, g))


def _same_items(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    """One to one in any order."""
    if len(p) != len(g) or len(p) > MAX_ITEMS:
        return False
    left = list(g)
    for item in p:
        match = next((k for k, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_ratio(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    """Equal or proportional; 1:20 may be a time and stays as it is."""
    if _same_in_order(p, g):
        return True
    expressions = len(p) == len(g) and all(x[0] in EXPRESSIONS for x in p + g)
    return expressions and all(_same_values(mul(p[0], b), mul(g[0], a)) for a, b in zip(p, g)) and p[0] != ZERO


# ---------------------------------------------------------------------------------------------- relations and regions


def _same_relations(p: Node, g: Node) -> bool:
    name_p, value_p = _named_value(p)
    name_g, value_g = _named_value(g)
    if name_p and name_g and name_p[0] == name_g[0] == "seq":
        pairs = [dict(zip(n[3], v[3])) if len(n[3]) == len(v[3]) else {} for n, v in ((name_p, value_p), (name_g, value_g))]
        return bool(pairs[0]) and pairs[0].keys() == pairs[1].keys() and all(same(v, pairs[1][k]) for k, v in pairs[0].items())
    if (name_p is None) != (name_g is None) or (name_p is not None and name_p == name_g):
        if same(value_p, value_g):
            return True
        if name_p is None or name_g is None:
            assigned, value, other = (name_g, value_g, p) if name_p is None else (name_p, value_p, g)
            if assigned[0] == "seq" and other[0] == "list":  # x = 1, y = 2 for 1, 2
                return _same_in_order(value[3], other[1]) if assigned is name_p else _same_in_order(other[1], value[3])
    regions = _regions(p), _regions(g)
    if None not in regions:
        return _same_regions(*regions)
    if p[0] == g[0] == "regions":
        return p[1] == g[1] and (_same_items if p[1] in "∪∩" else _same_in_order)(p[2], g[2])
    return p[0] == g[0] == "rel" and _same_relation(p, g)


def _named_value(node: Node) -> tuple[Node | None, Node]:
    """x = 5 is 5 by the name x, x ∈ A is A; in a chain the last side counts if the others agree with it."""
    if node[0] != "rel" or len(set(node[1])) > 1 or node[1][0] not in ("=", "∈"):
        return None, node
    name, *sides = node[2]
    if node[1][0] == "∈":
        return (name, sides[0]) if is_name(name) and len(sides) == 1 else (None, node)
    value = sides[-1]
    if len(sides) == 1 and is_name(value) and not symbols(name):  # 5 = x
        name, value = value, name
        sides = [value]
    constant = not symbols(value)
    if not is_name(name):
        if name[0] in ("add", "mul") and all(x[0] == "sym" for x in name[1]) and constant:  # a + b = 7
            pass
        elif len(sides) > 1 or not symbols(name):  # 2 + 3 = 5
            sides, name = [name, *sides[:-1]], ("sym", "")
        else:
            return None, node
    agree = all((constant and symbols(side)) or same(side, value) for side in sides)
    if not agree or symbols(name) & symbols(value):
        return None, node
    return (name, value) if name[1] else (None, value)


def _approximations(node: Node) -> list[Node]:
    """Both sides of "exact ≈ decimal" if the decimal is the exact value rounded; the value of "x ≈ decimal"."""
    cut = node[1].index("≈")
    left, right = node[2][: cut + 1], node[2][cut + 1 :]
    if len(right) > 1 or right[0][0] != "dec":
        return []
    if len(left) == 1 and is_name(left[0]):
        return [right[0]]
    exact = ("rel", node[1][:cut], left) if cut else left[0]
    value = _named_value(exact)[1]
    return [exact, right[0]] if value[0] in EXPRESSIONS and _rounds_to(value, right[0]) else []


def _same_relation(p: Node, g: Node) -> bool:
    """Relations side by side, also turned round; single ones also as lhs - rhs up to a constant factor."""
    turned = tuple(FLIPPED.get(op, op) for op in reversed(p[1])), p[2][::-1]
    for ops, sides in ((p[1], p[2]), turned if all(op in FLIPPED for op in p[1]) else (p[1], p[2])):
        if ops == g[1] and _same_in_order(sides, g[2]):
            return True
    if len(p[1]) > 1 or len(g[1]) > 1 or any(s[0] not in EXPRESSIONS for s in p[2] + g[2]):
        return False
    (op_p,), (op_g,) = p[1], g[1]
    if op_g not in ("=", "!=", "<", ">", "<=", ">=") or op_p not in (op_g, FLIPPED[op_g]):
        return False
    signs = {1, -1} if op_p in ("=", "!=") else {1 if op_p == op_g else -1}
    return _proportional(*(add(n[2][0], negative(n[2][1])) for n in (p, g)), signs)


def _proportional(p: Node, g: Node, signs: set[int]) -> bool:
    """Whether p / g is a constant, its sign among `signs`."""
    if symbols(p) != symbols(g) or ZERO in (p, g) or not symbols(p):
        return False
    ratio = None
    for index in range(POINTS):
        p_value, g_value = value_at(p, index, DIGITS), value_at(g, index, DIGITS)
        if p_value and g_value and g_value[0]:
            ratio = p_value[0] / g_value[0]
            break
    if ratio is None or _context.im(ratio) or (1 if ratio > 0 else -1) not in signs or not ratio:
        return False
    factor = _rational(ratio)
    return factor is not None and _same_values(p, mul(num(factor), g)) or _constant_ratio(p, g)


def _rational(value) -> Fraction | None:
    found = Fraction(str(_context.nstr(_context.re(value), 50))).limit_denominator(10**12)
    return found if abs(float(found) - float(_context.re(value))) <= 1e-15 * abs(float(found)) else None


def _constant_ratio(p: Node, g: Node) -> bool:
    values = []
    for index in range(POINTS):
        pair = value_at(p, index, DIGITS), value_at(g, index, DIGITS)
        if all(pair) and pair[1][0]:
            values.append(pair[0][0] / pair[1][0])
    return len(values) >= ENOUGH and all(abs(v - values[0]) < abs(values[0]) * _context.mpf(10) ** -45 for v in values)


def _regions(node: Node) -> list[tuple] | None:
    """A set of real numbers as intervals (low, low closed, high, high closed), sorted and merged; None if it is none."""
    parts = _parts(node)
    if parts is None:
        return None
    merged: list[tuple] = []
    for low, low_closed, high, high_closed in sorted(parts, key=lambda r: (r[0][0], not r[1])):
        if merged:
            last = merged[-1]
            touches = low[0] < last[2][0] or (low[0] == last[2][0] and (low_closed or last[3]))
            if touches:
                end = max((last[2], last[3]), (high, high_closed), key=lambda e: (e[0][0], e[1]))
                merged[-1] = (*last[:2], *end)
                continue
        merged.append((low, low_closed, high, high_closed))
    return merged


def _parts(node: Node) -> list[tuple] | None:
    ends = (-_context.inf, negative(INFINITY)), (_context.inf, INFINITY)
    everything = [(ends[0], False, ends[1], False)]
    if node == REALS:
        return everything
    if node[0] == "seq" and len(node[3]) == 2:
        low, high = map(_end, node[3])
        if low is None or high is None or not low[0] < high[0]:
            return None
        return [(low, node[1] == "[", high, node[2] == "]")]
    if node[0] == "set" and node[1]:
        points = [_end(x) for x in node[1]]
        return None if None in points else [(x, True, x, True) for x in points]
    if node[0] == "regions" and node[1] == "∪":
        parts = [_parts(x) for x in node[2]]
        return None if None in parts else parts[0] + parts[1]
    if node[0] == "regions" and node[1] == "∖" and node[2][1][0] == "set":
        left, points = _parts(node[2][0]), _parts(node[2][1])
        return None if left is None or points is None else [r for part in left for r in _without(part, points)]
    if node[0] == "list":
        variables = {frozenset(symbols(x)) for x in node[1]}
        parts = [_parts(x) if x[0] == "rel" else None for x in node[1]]
        return None if None in parts or len(variables) > 1 else [r for part in parts for r in part]
    return _inequality_parts(node, everything) if node[0] == "rel" else None


def _inequality_parts(node: Node, everything: list[tuple]) -> list[tuple] | None:
    """x > 1, 1 < x <= 2, x != 3, x in [0, 1]."""
    ops, sides = node[1], node[2]
    if ops == ("∈",):
        return _parts(sides[1]) if sides[0][0] == "sym" else None
    if not {"<", "<=", ">", ">=", "!="}.issuperset(ops) or len(ops) > 2:
        return None
    if ops[0] in (">", ">=") or (len(sides) == 2 and sides[1][0] == "sym" and is_name(sides[1])):
        ops, sides = tuple(FLIPPED[op] for op in reversed(ops)), sides[::-1]
    ends = [_end(side) for side in sides]
    low, high = everything[0][0], everything[0][2]
    if len(ops) == 1 and (is_name(sides[0]) and ends[1] or is_name(sides[1]) and ends[0]):
        value = ends[1] or ends[0]
        if ops[0] == "!=":
            return _without(everything[0], [(value, True, value, True)])
        below = (ops[0][0] == "<") == is_name(sides[0])
        closed = ops[0][-1] == "="
        return [(low, False, value, closed) if below else (value, closed, high, False)]
    if len(ops) == 2 and is_name(sides[1]) and ends[0] and ends[2] and ops[0][0] == ops[1][0] == "<":
        return [(ends[0], ops[0] == "<=", ends[2], ops[1] == "<=")] if ends[0][0] < ends[2][0] else None
    return None


def _without(part: tuple, points: list[tuple]) -> list[tuple]:
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


def _end(node: Node) -> tuple | None:
    """The value of an end point with its tree; None unless it is a real constant or ±∞."""
    if node in (INFINITY, negative(INFINITY)):
        return (_context.inf if node == INFINITY else -_context.inf), node
    value = value_at(node, 0, DIGITS) if node[0] in EXPRESSIONS and not symbols(node) else None
    return (_context.re(value[0]), node) if value and _is_real(value[0]) else None


def _same_regions(p: list[tuple], g: list[tuple]) -> bool:
    return len(p) == len(g) and all(
        a[1] == b[1] and a[3] == b[3] and same(a[0][1], b[0][1]) and same(a[2][1], b[2][1]) for a, b in zip(p, g)
    )


# ---------------------------------------------------------------------------------------------- numbers, expressions


def _same_expressions(p: Node, g: Node) -> bool:
    if is_number(p) and is_number(g):
        return p[1] == g[1]
    if symbols(p) != symbols(g) and (not symbols(p) or not symbols(g)) and INFINITY in (p, g):
        return False
    if g[0] == "dec" and _rounds_to(p, g):
        return True
    return _same_values(p, g)


def _rounds_to(value: Node, decimal: Node) -> bool:
    """Whether an exact value that no decimal can state rounds to a decimal of three or more significant digits."""
    if abs(decimal[1]) < 100 * decimal[2] or value[0] == "dec" or symbols(value):
        return False
    if value[0] == "num":
        rest = value[1].denominator
        while rest % 2 == 0 or rest % 5 == 0:
            rest //= 2 if rest % 2 == 0 else 5
        return rest > 1 and 2 * abs(value[1] - decimal[1]) < decimal[2]
    found = value_at(value, 0, DIGITS)
    if not found or not _is_real(found[0]):
        return False
    return 2 * abs(_context.re(found[0]) - _exact(decimal[1])) < _exact(decimal[2])


def _same_values(p: Node, g: Node) -> bool:
    """Equal at the random points where both are real, at least ENOUGH of them; else at all points."""
    points = range(POINTS if symbols(p) | symbols(g) else 1)
    agreed, complex_agreed, decided = [], 0, 0
    for index in points:
        pair = value_at(p, index, DIGITS), value_at(g, index, DIGITS)
        if not all(pair):
            continue
        decided += 1
        close = _close(*pair, DIGITS)
        if _is_real(pair[0][0]) and _is_real(pair[1][0]):
            if not close:
                return False
            agreed.append(index)
        elif close:
            complex_agreed += 1
            agreed += [index] if len(points) == 1 else []
    if len(points) > 1 and len(agreed) < ENOUGH and (complex_agreed + len(agreed) < decided or decided < ENOUGH):
        return False
    if not decided or (len(points) == 1 and not agreed):
        return False
    index = agreed[0] if agreed else 0
    pair = value_at(p, index, SURE_DIGITS), value_at(g, index, SURE_DIGITS)
    return all(pair) and _close(*pair, SURE_DIGITS)


def _is_real(value) -> bool:
    return abs(_context.im(value)) <= abs(value) * _context.mpf(10) ** -45


def _close(p: tuple, g: tuple, digits: int) -> bool:
    """Equal to all but 15 of `digits`, relative to the largest sum that was formed on the way."""
    scale = max(p[1], g[1], abs(p[0]), abs(g[0]))
    return abs(p[0] - g[0]) <= scale * _context.mpf(10) ** (15 - digits)


_context = mpmath.mp.clone()
_context.dps = DIGITS


class _NoValue(Exception):
    """There is no value here, or none that is cheap to find."""


@lru_cache(maxsize=4096)
def value_at(node: Node, index: int, digits: int) -> tuple | None:
    """(value, size of the largest sum on the way) of an expression at random point `index`; None if it has none."""
    scale = [_context.mpf(0)]
    _context.dps = digits
    try:
        value = _value(node, index, scale)
        return (value, scale[0]) if _context.isfinite(value) and scale[0] < _context.mpf(10) ** 300 else None
    except (_NoValue, ArithmeticError, ValueError):
        return None
    finally:
        _context.dps = DIGITS


def _exact(value: Fraction):
    return _context.mpf(value.numerator) / value.denominator


def _variable(name: object, index: int):
    """Points 0 to 3 are positive, below and above 1 by turns; 4 to 7 have either sign."""
    draw = random.Random(f"{name!r} at {index}")
    value = Fraction(draw.randrange(10**20, 9 * 10**20), 10**21)
    if draw.random() < 0.5:
        value = 1 + 3 * value
    return _exact(value if index < 4 or draw.random() < 0.5 else -value)


def _value(node: Node, index: int, scale: list):
    kind = node[0]
    if kind in ("num", "dec"):
        return _exact(node[1])
    if kind == "sym":
        if node[1] in CONSTANTS:
            return {"π": +_context.pi, "e": +_context.e, "i": _context.mpc(0, 1)}[node[1]]
        return _context.mpf(1) if node == DEGREE else _variable(node[1], index)
    if kind == "add":
        total = _context.mpf(0)
        for term in node[1]:
            value = _value(term, index, scale)
            total += value
            scale[0] = max(scale[0], abs(value))
        return total
    if kind == "mul":
        product = _context.mpf(1)
        for factor in node[1]:
            product *= _value(factor, index, scale)
        return product
    if kind == "pow":
        return _power(_value(node[1], index, scale), _value(node[2], index, scale))
    if kind != "fn":
        raise _NoValue
    if node[1] not in FUNCTIONS:
        return _variable(node, index)
    return _function(node[1], [_value(x, index, scale) for x in node[2]])


def _power(base, exponent):
    if not base:
        if _context.re(exponent) > 0:
            return _context.mpf(0)
        raise _NoValue
    if abs(exponent) * (abs(_context.mag(base)) + 4) > 100_000:
        raise _NoValue
    return base**exponent


def _function(name: str, args: list):
    value = args[0]
    if name == "root":
        return _root(*args)
    if name in ("floor", "ceil", "min", "max", "gcd", "lcm", "mod", "!!"):
        if not all(map(_is_real, args)):
            raise _NoValue
        args = [_context.re(x) for x in args]
        if name in ("min", "max"):
            return {"min": min, "max": max}[name](args)
        if name in ("gcd", "lcm", "!!"):
            raise _NoValue
        if name == "mod":
            return args[0] - args[1] * _context.floor(args[0] / args[1])
        nearest = _context.nint(args[0])
        near = abs(args[0] - nearest) < _context.mpf(10) ** -40
        return nearest if near else getattr(_context, name)(args[0])
    size = max(_context.mag(x) if x else 0 for x in args)
    limits = {"!": 12, "binom": 12, "sinh": 16, "cosh": 16, "tanh": 16, "coth": 16, "sech": 16, "csch": 16}
    if size > limits.get(name, 4000):
        raise _NoValue
    if name == "ln" and not value:
        raise _NoValue
    return _FUNCTION_OF[name](*args)


def _root(value, degree):
    """The real odd root of a real number."""
    if not _is_real(value):
        return value ** (1 / degree)
    value = _context.re(value)
    return value ** (1 / degree) if value >= 0 else -((-value) ** (1 / degree))


_RENAMED = {
    "abs": "fabs", "ln": "log", "!": "factorial", "binom": "binomial", "arcsin": "asin", "arccos": "acos",
    "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc", "arcsinh": "asinh", "arccosh": "acosh",
    "arctanh": "atanh",
}  # fmt: skip
_FUNCTION_OF = {
    name: getattr(_context, _RENAMED.get(name, name))
    for name in FUNCTIONS - {"root", "floor", "ceil", "min", "max", "gcd", "lcm", "mod", "!!"}
}
