"""The tree that an answer is read into, built in normal form: sums and products are flat and sorted, rational
arithmetic is done exactly. Two spellings that differ only in order, signs or arithmetic give the same tree.

A node is a nested tuple that starts with its kind.
    expressions   ("num", Fraction)  ("dec", Fraction, unit of the last stated digit)  ("sym", name)
                  ("add", terms)  ("mul", factors)  ("pow", base, exponent)  ("fn", name, arguments)
    answers       ("seq", open, close, items)  ("set", items)  ("list", items)  ("matrix", rows)  ("rel", ops, sides)
                  ("ratio", items)  ("regions", op, items)  ("unit", node, unit)  ("base", digits, base)  ...

Left out: collecting like terms, expanding, trigonometric rules. equality.py compares values instead.
"""

import math
from fractions import Fraction

MAX_BITS = 14_000  # of an exact number; Python prints at most 4,300 digits
Node = tuple


class Unreadable(ValueError):
    """The text is no answer that the reader knows; the message says why."""


def num(value: int | Fraction) -> Node:
    """An exact number; Unreadable above MAX_BITS."""
    value = Fraction(value)
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Unreadable("a number has too many digits")
    return ("num", value)


def sym(name: str) -> Node:
    return ("sym", name)


ZERO, ONE, MINUS_ONE = num(0), num(1), num(-1)
PI, E, I, INFINITY, DEGREE, REALS = sym("π"), sym("e"), sym("i"), sym("∞"), sym("°"), sym("ℝ")
CONSTANTS = {"π", "e", "i"}
EXPRESSIONS = {"num", "dec", "sym", "add", "mul", "pow", "fn"}
# Functions with a value; every other "fn" is opaque: equal to itself with equal arguments.
FUNCTIONS = set(
    "abs floor ceil min max gcd lcm mod binom ! !! ln root conj sin cos tan cot sec csc arcsin arccos arctan arccot "
    "arcsec arccsc sinh cosh tanh coth sech csch arcsinh arccosh arctanh re im arg".split()
)


def is_number(node: Node) -> bool:
    return node[0] in ("num", "dec")


def expression(node: Node) -> Node:
    """`node` as an operand of arithmetic; Unreadable for sets, relations, quantities with units, …"""
    if node[0] in EXPRESSIONS:
        return node
    if node[0] == "unit" and node[2] == "degree":
        return mul(node[1], DEGREE)
    raise Unreadable(f"a {node[0]} stands where a number or expression is expected")


def add(*terms: Node) -> Node:
    """Sum in normal form; also of matrices of one shape."""
    if len(terms) == 1:
        return terms[0]
    if all(t[0] == "matrix" for t in terms):
        return _add_matrices(terms)
    total, rest = Fraction(0), []
    for term in map(expression, terms):
        for part in term[1] if term[0] == "add" else (term,):
            if is_number(part):
                total = num(total + part[1])[1]
            else:
                rest.append(part)
    if total or not rest:
        rest.append(("num", total))
    return rest[0] if len(rest) == 1 else ("add", tuple(sorted(rest, key=repr)))


def _add_matrices(terms: tuple[Node, ...]) -> Node:
    shapes = {tuple(len(row) for row in t[1]) for t in terms}
    if len(shapes) > 1:
        raise Unreadable("matrices of different shapes are added")
    return ("matrix", tuple(tuple(add(*cells) for cells in zip(*rows)) for rows in zip(*(t[1] for t in terms))))


def mul(*factors: Node) -> Node:
    """Product in normal form; one factor may be a matrix. A decimal times ±10^k stays a decimal."""
    matrices = [f for f in factors if f[0] == "matrix"]
    if len(matrices) == 1:
        scale = mul(*(f for f in factors if f[0] != "matrix"))
        return ("matrix", tuple(tuple(mul(scale, cell) for cell in row) for row in matrices[0][1]))
    product, rest, decimals = Fraction(1), [], []
    for factor in map(expression, factors):
        for part in factor[1] if factor[0] == "mul" else (factor,):
            if is_number(part):
                product = num(product * part[1])[1]
                decimals += [part] if part[0] == "dec" else []
            else:
                rest.append(part)
    if not product:
        return ZERO
    if not rest:
        if len(decimals) == 1 and decimals[0][1]:
            scale = abs(product / decimals[0][1])
            if _is_power_of_ten(scale):
                return ("dec", product, decimals[0][2] * scale)
        return ("num", product)
    if product != 1:
        rest.append(("num", product))
    return rest[0] if len(rest) == 1 else ("mul", tuple(sorted(rest, key=repr)))


def _is_power_of_ten(value: Fraction) -> bool:
    small, large = sorted((value.numerator, value.denominator))
    return small == 1 and large == 10 ** round((large.bit_length() - 1) * math.log10(2))


def negative(node: Node) -> Node:
    return mul(MINUS_ONE, node)


def divide(top: Node, bottom: Node) -> Node:
    return mul(top, power(bottom, MINUS_ONE))


def power(base: Node, exponent: Node) -> Node:
    """Power in normal form. A power too large to write out stays an opaque symbol: equal to itself only."""
    base, exponent = expression(base), expression(exponent)
    if exponent == ONE:
        return base
    if is_number(base) and is_number(exponent) and exponent[1].denominator == 1:
        value, times = base[1], int(exponent[1])
        if not value and times <= 0:
            raise Unreadable("a division by zero or 0^0")
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if abs(value) in (0, 1) or size * abs(times) <= MAX_BITS // 2:
            return num(value ** (times if abs(value) != 1 else times % 2))
        return ("fn", "huge power", (base, exponent))
    return ("pow", base, exponent)


def sqrt(node: Node) -> Node:
    return power(node, num(Fraction(1, 2)))


def _whole(args: tuple[Node, ...], limit: int) -> list[int] | None:
    if all(is_number(a) and a[1].denominator == 1 and abs(a[1]) <= limit for a in args):
        return [int(a[1]) for a in args]
    return None


def call(name: str, *args: Node) -> Node:
    """A function of expressions, done exactly where the arguments are small whole numbers."""
    args = tuple(map(expression, args))
    if name in ("abs", "floor", "ceil", "min", "max") and all(map(is_number, args)):
        do = {"abs": abs, "floor": math.floor, "ceil": math.ceil, "min": min, "max": max}[name]
        return num(do(*(a[1] for a in args)))
    if name in ("gcd", "lcm", "mod", "binom", "!", "!!"):
        whole = _whole(args, {"binom": 2500, "!": 1400, "!!": 1400}.get(name, 10**100))
        if whole and name in ("gcd", "lcm"):
            return num(getattr(math, name)(*whole))
        if whole and name == "mod" and whole[1]:
            return num(whole[0] % whole[1])
        if whole and min(whole) >= 0 and name != "mod":
            do = {"binom": math.comb, "!": math.factorial, "!!": lambda n: math.prod(range(n, 0, -2))}[name]
            return num(do(*whole))
    return ("fn", name, args)


def substitute(node: Node, old: Node, new: Node) -> Node:
    """`node` with `old` replaced, in normal form again."""
    if node == old:
        return new
    if not node or node[0] in ("num", "dec", "sym"):
        return node
    if node[0] in ("add", "mul"):
        return (add if node[0] == "add" else mul)(*(substitute(x, old, new) for x in node[1]))
    if node[0] == "pow":
        return power(substitute(node[1], old, new), substitute(node[2], old, new))
    if node[0] == "fn" and node[1] in FUNCTIONS:
        return call(node[1], *(substitute(x, old, new) for x in node[2]))
    return tuple(substitute(x, old, new) if isinstance(x, tuple) else x for x in node)


def symbols(node: Node) -> set[str]:
    """Names of the variables and opaque functions of `node`, constants left out."""
    if node and node[0] == "sym":
        return set() if node[1] in CONSTANTS else {node[1]}
    found = {node[1]} if node and node[0] == "fn" and node[1] not in FUNCTIONS else set()
    return found.union(*(symbols(x) for x in node if isinstance(x, tuple)))


def size(node: Node) -> int:
    """How many parts a tree has."""
    return 1 + sum(size(x) for x in node if isinstance(x, tuple))


def is_name(node: Node) -> bool:
    """Whether a node can be the name of a value: x, f(x), V_1 : V_2, (p, q)."""
    if node[0] in ("ratio", "seq"):
        return all(map(is_name, node[-1]))
    return (node[0] == "sym" and node[1] not in CONSTANTS) or (node[0] == "fn" and node[1].endswith("()"))
