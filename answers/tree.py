"""This file builds the tree of an answer. The tree is in normal form: sums and products are flat and sorted, and
rational arithmetic is done exactly. Two spellings that differ only in order, signs or arithmetic give the same tree.

A node is a nested tuple that starts with its kind.
    expressions   ("num", Fraction)  ("dec", Fraction, unit of the last stated digit)  ("sym", name)
                  ("add", terms)  ("mul", factors)  ("pow", base, exponent)  ("fn", name, arguments)
    answers       ("seq", open, close, items)  ("set", items)  ("list", items)  ("matrix", rows)  ("rel", ops, sides)
                  ("ratio", items)  ("clock", items): 10:30, which may be a ratio  ("regions", op, items)
                  ("unit", node, unit)  ("base", digits, base)  ...

The normal form collects no like terms, expands no products, and knows no trigonometric rules. Expressions that need
such steps are compared by their values, which values.py computes.
"""

import functools
import itertools
import math
import re
from fractions import Fraction

MAX_BITS = 14_000  # limit for the bits of an exact number, because Python prints at most 4,300 digits
Node = tuple


class Unreadable(ValueError):
    """The text is not an answer that the parser knows. The message of the exception gives the reason."""


def num(value: int | Fraction) -> Node:
    """Returns the node of an exact number. Raises Unreadable if the number has more than MAX_BITS bits."""
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


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# values.py computes the functions in this set. Every other function is opaque: it equals only itself with equal
# arguments.
FUNCTIONS = word_set(
    "abs floor ceil min max gcd lcm mod binom ! !! ln root conj sin cos tan cot sec csc arcsin arccos arctan "
    "arccot arcsec arccsc sinh cosh tanh coth sech csch arcsinh arccosh arctanh re im arg"
)


def is_number(node: Node) -> bool:
    return node[0] in ("num", "dec")


def expression(node: Node) -> Node:
    """Returns `node` as an operand of sums and products: 90° becomes 90 times the symbol of a degree. Raises
    Unreadable for sets, relations, quantities with units, …"""
    if node[0] in EXPRESSIONS:
        return node
    if node[0] == "unit" and node[2] == "degree":
        return mul(node[1], DEGREE)
    if is_modulo(node):  # in an expression such as (n mod 2) + 1, "n mod 2" is a number
        return node[1]
    raise Unreadable(f"a {node[0]} stands where a number or expression is expected")


def is_modulo(node: Node) -> bool:
    return node[0] == "unit" and node[2][0] == "mod"


def residue(node: Node, modulus: Node) -> Node:
    """Returns the residue of a number: 7 (mod 5) gives 2. In a congruence each side that is a number becomes its
    residue."""
    if node[0] == "rel":
        return ("rel", node[1], tuple(residue(side, modulus) for side in node[2]))
    return call("mod", node, modulus) if is_number(node) and is_number(modulus) else node


def add(*terms: Node) -> Node:
    """Returns a sum in normal form. The terms may be matrices of one shape."""
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
    """Returns a product in normal form. The factors may be matrices. A decimal times ±10^k stays a decimal, so its
    stated digits are kept."""
    matrices = [f for f in factors if f[0] == "matrix"]
    if matrices:
        return functools.reduce(_matrix_product, matrices, mul(*(f for f in factors if f[0] != "matrix")))
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


def _matrix_product(a: Node, b: Node) -> Node:
    """Returns the product of a number and a matrix, or of two matrices. The product of two column vectors is their
    scalar product."""
    if a[0] != "matrix":
        return ("matrix", tuple(tuple(mul(a, cell) for cell in row) for row in b[1]))
    if len(a[1][0]) == len(b[1][0]) == 1 and len(a[1]) == len(b[1]):
        return add(*(mul(x, y) for (x,), (y,) in zip(a[1], b[1])))
    if len(a[1][0]) != len(b[1]) or size(a) * size(b) > 40_000:
        raise Unreadable("matrices are multiplied that do not fit or are too large")
    columns = tuple(zip(*b[1]))
    return ("matrix", tuple(tuple(add(*map(mul, row, column)) for column in columns) for row in a[1]))


def _is_power_of_ten(value: Fraction) -> bool:
    small, large = sorted((value.numerator, value.denominator))
    return small == 1 and str(large).rstrip("0") == "1"


def negative(node: Node) -> Node:
    return mul(MINUS_ONE, node)


def divide(top: Node, bottom: Node) -> Node:
    return mul(top, power(bottom, MINUS_ONE))


def power(base: Node, exponent: Node) -> Node:
    """Returns a power in normal form. A power that is too large to write out stays an opaque function, which equals
    only itself."""
    if base[0] == "matrix" and exponent in (num(2), num(3)):
        return mul(*[base] * int(exponent[1]))
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


_OF_NUMBERS = {"abs": abs, "floor": math.floor, "ceil": math.ceil, "min": lambda *x: min(x), "max": lambda *x: max(x)}
# for each function: its largest argument, whether arguments may be negative, its implementation
_OF_WHOLE_NUMBERS = {
    "gcd": (10**100, True, math.gcd), "lcm": (10**100, True, math.lcm), "mod": (10**100, True, lambda n, m: n % m),
    "binom": (2500, False, math.comb), "!": (1400, False, math.factorial),
    "!!": (1400, False, lambda n: math.prod(range(n, 0, -2))),
}  # fmt: skip


def call(name: str, *args: Node) -> Node:
    """Returns the node of a function of `args`, or its exact value if the arguments are numbers within the limits of
    the function."""
    args = tuple(map(expression, args))
    values = [a[1] for a in args] if all(map(is_number, args)) else []
    if values and name in _OF_NUMBERS:
        return num(_OF_NUMBERS[name](*values))
    if values and name in _OF_WHOLE_NUMBERS and (name != "mod" or values[1]):
        limit, negative_too, of_whole_numbers = _OF_WHOLE_NUMBERS[name]
        if all(v.denominator == 1 and (-limit if negative_too else 0) <= v <= limit for v in values):
            return num(of_whole_numbers(*map(int, values)))
    return ("fn", name, args)


def substitute(node: Node, old: Node, new: Node) -> Node:
    """Returns `node` in normal form with every `old` replaced by `new`."""
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
    """Returns the names of the variables and opaque functions of `node`, without constants."""
    if node and node[0] == "sym":
        return set() if node[1] in CONSTANTS else {node[1]}
    names = {node[1]} if node and node[0] == "fn" and node[1] not in FUNCTIONS else set()
    return names.union(*(symbols(x) for x in node if isinstance(x, tuple)))


def size(node: Node) -> int:
    """Returns the number of nested tuples in a tree, a measure of its size."""
    return 1 + sum(size(x) for x in node if isinstance(x, tuple))


def is_region(*nodes: Node) -> bool:
    """Returns whether the nodes together describe a region: all are inequalities, set operations or equations, and at
    least one is no equation."""
    ops = [set(n[1]) if n[0] == "rel" else {"<"} if n[0] == "regions" else {""} for n in nodes]
    return all({"<", ">", "<=", ">=", "!=", "="}.issuperset(o) for o in ops) and any("=" not in o for o in ops)


def is_name(node: Node) -> bool:
    """Returns whether a node can be the name of a value, such as x, f(x), V_1 : V_2 or (p, q)."""
    if node[0] in ("ratio", "seq"):
        return all(map(is_name, node[-1]))
    return (node[0] == "sym" and node[1] not in CONSTANTS) or (node[0] == "fn" and node[1].endswith("()"))


# ---------------------------------------------------------------------------------------------- literals and forms


def read_literal(text: str) -> Node:
    """Reads a number. 142 and 142.0 are exact numbers. 0.50 and 4.5e33 are decimals, and the unit of their last
    stated digit is kept: 0.01 and 1e32."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, places = mantissa.partition(".")
    shift = int(exponent or 0) if len(exponent) < 7 else MAX_BITS
    if abs(shift) > 4000:
        raise Unreadable("a number has too many digits")
    unit = Fraction(10) ** (shift - len(places))
    value = num(int(whole + places) * unit)
    return ("dec", value[1], unit) if places.strip("0") else value


_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTED.split())}


def in_base(digits: str, base: str) -> Node:
    """Returns the node of a number that is written in a base, such as 101_2."""
    base = base.strip("() ")
    value = NUMBER_WORDS.get(base.lower()) or (int(base) if re.fullmatch(r"[0-9]{1,2}", base) else 0)
    if not 2 <= value <= 36 or any(int(d, 36) >= value for d in digits):
        raise Unreadable(f"{digits} is not a number in base {base}")
    return ("base", digits.lstrip("0") or "0", value)


def function_value(name: str, argument: Node, base: Node | None) -> Node:
    """Returns the value of a function of one argument. Degrees become radians in trigonometric functions only."""
    if name == "exp":
        return power(E, argument)
    if name in ("log", "lg", "ln"):
        base = num(10) if name == "lg" else base
        top = call("ln", argument)
        if base is None:
            return mul(sym("unstated base"), top) if name == "log" else top
        return divide(top, call("ln", base))
    if DEGREE[1] in symbols(argument):
        argument = substitute(argument, DEGREE, divide(PI, num(180)))
    if name == "cis":
        return add(call("cos", argument), mul(I, call("sin", argument)))
    return call(name, argument)


def expand_signs(node: Node) -> list[Node]:
    """Returns the values of a node with ±. Each ± takes both signs independently. If the node has a ∓, all ± take the
    same sign."""
    names = sorted(name for name in symbols(node) if name.startswith("±"))
    if len(names) > 3:
        raise Unreadable("it has more than three ±")
    values = []
    for signs in itertools.product((1, -1), repeat=len(names)):
        if "±0" in names and len(set(signs)) > 1:
            continue
        one = node
        for name, sign in zip(names, signs):
            one = substitute(one, sym(name), num(sign))
        values.append(one)
    return values


def usual_form(items: list[Node]) -> Node:
    """Returns one node for the items of a list: n = -6, 9 becomes n = -6, n = 9, and x = 1, y = 2 becomes (x, y) =
    (1, 2).

    The modulus at the end of x ≡ 1, 4 (mod 5) holds for all items.
    """
    if len(items) == 1:
        return items[0]
    if items[0][:2] == ("rel", ("≡",)) and is_modulo(items[-1]):
        listed = usual_form([x[1] if is_modulo(x) else x for x in items])
        return ("list", tuple(("unit", x, items[-1][2]) for x in listed[1]))
    named = [x[0] == "rel" and x[1] in (("=",), ("≡",)) and is_name(x[2][0]) for x in items]
    if named[0] and not any(x[0] == "rel" for x in items[1:]):
        _, ops, (name, _) = items[0]
        items = [items[0]] + [("rel", ops, (name, x)) for x in items[1:]]
    elif all(named) and len({x[2][0] for x in items}) == len(items) and {x[1] for x in items} == {("=",)}:
        names, values = zip(*(x[2] for x in items))
        return ("rel", ("=",), (("seq", "(", ")", names), ("seq", "(", ")", values)))
    return ("list", tuple(items))


def written_out(name: str, low: Node, high: Node, body: Node) -> Node | None:
    """Returns a sum or product over up to 100 whole numbers, written out term by term, or None if the bounds are not
    whole numbers or lie further apart."""
    if name not in ("sum", "prod") or low[0] != "rel" or low[1] != ("=",) or low[2][0][0] != "sym":
        return None
    index, first = low[2]
    if not all(is_number(x) and x[1].denominator == 1 for x in (first, high)) or not 0 <= high[1] - first[1] < 100:
        return None
    numbers = range(int(first[1]), int(high[1]) + 1)
    if len(numbers) * size(body) > 800:
        raise Unreadable("a sum is too long to write out")
    return (add if name == "sum" else mul)(*(substitute(body, index, num(k)) for k in numbers))


def set_of(items: list[Node]) -> Node:
    """Returns the node of a set. A set such as {x | x > 0} or {x : x > 0} becomes its condition."""
    first = items[0]
    # in {x : x > 0} the colon was parsed as a ratio
    if len(items) == 1 and first[0] == "rel" and first[2][0][0] == "ratio":
        variable, start = first[2][0][1]
        first = ("builder", variable, (("rel", first[1], (start, *first[2][1:])),))
    if first[0] == "builder" and len(first[2]) == 1 and first[1][0] in ("sym", "rel"):
        return first[2][0]
    return ("set", tuple(dict.fromkeys(x for item in items for x in expand_signs(item))))


def matrix_of(environment: str, rows: list[list[Node]]) -> Node:
    if len({len(row) for row in rows}) != 1:
        raise Unreadable("the rows of a matrix differ in length")
    return _determinant(tuple(map(tuple, rows))) if environment == "vmatrix" else ("matrix", tuple(map(tuple, rows)))


def _determinant(rows: tuple[tuple[Node, ...], ...]) -> Node:
    """Returns the determinant of a matrix of at most 4 x 4, expanded along the first row."""
    if len(rows) != len(rows[0]) or len(rows) > 4 or size(rows) > 400:
        raise Unreadable("a determinant is not square or larger than 4 x 4")
    if len(rows) == 1:
        return expression(rows[0][0])
    minors = (tuple(row[:k] + row[k + 1 :] for row in rows[1:]) for k in range(len(rows)))
    return add(*(mul(num((-1) ** k), rows[0][k], _determinant(minor)) for k, minor in enumerate(minors)))
