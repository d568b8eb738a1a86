"""This file decides whether two parsed answers are equal. Two answers are equal if they have the same normal form,
the same exact number, or the same values at random points to 45 digits. In doubtful cases two answers are unequal,
because a policy learns to exploit false positives.

Two decimals are compared as exact numbers: 0.3330 is 0.333. A decimal in the prediction and an exact gold answer are
compared exactly too: 3.14 is not π, and 0.333 is not 1/3. A gold answer that is a decimal of at least three
significant digits also accepts a fraction that has no finite decimal and rounds to the gold answer: gold 0.333
accepts 1/3. An irrational number such as √2 is accepted if the decimal gold answer has at least four significant
digits.

Some parts may be missing in one of the two answers, but may not differ: 5 cm equals 5 but not 5 m. These parts are
units, degrees, %, currency, the modulus, the base, the name in "x = 5", and a domain such as "for all real x". Any
other condition behind an answer must be the same in both answers, word by word. The items of sets and lists and the
two sides of = may stand in any order. The order of the entries counts in tuples, points and matrices. The brackets of
an interval count: [0, 1] is not [0, 1). Three or more numbers in the same order equal a tuple even without
parentheses, a column vector equals a point, and {5} equals 5.

Expressions are compared as real functions if both have real values at three or more of eight random points, else as
complex functions. Expressions with ⌊ ⌋ or ⌈ ⌉ are compared at whole numbers too. If all variables are among i to n,
K, M and N, expressions with ⌊ ⌋ or ⌈ ⌉ are compared at whole numbers only. Equations are not solved: x^2 = 4 does not
equal x = 2, -2. Without ⌊ ⌋ or ⌈ ⌉, expressions that agree at whole numbers only, such as (-1)^(2n) and 1, are
unequal.
"""
# ruff: isort: skip_file

from .tree import (
    CONSTANTS, EXPRESSIONS, INFINITY, MINUS_ONE, Node, REALS, Unreadable, ZERO, add, is_modulo, is_name, is_number,
    is_region, mul, negative, num, residue, sym, symbols,
)  # fmt: skip
from .regions import FLIPPED, regions_of
from .values import DIGITS, ENOUGH, POINTS, SURE_DIGITS, WHOLE_POINTS, close, context, exact, is_real, value_at
from .whole import Answer

MAX_ITEMS, MAX_RELATIONS = 200, 40
WHOLE_NAMES = set("ijklmnKMN")
TURNED = FLIPPED | {"≡": "≡", "≈": "≈", "⊥": "⊥", "∥": "∥"}


def equal(prediction: Answer, gold: Answer) -> bool:
    """Returns whether a prediction equals the gold answer. A multiple-choice gold accepts only its letter, and words
    equal only the same words."""
    if gold.choice:
        return gold.choice in (prediction.choice, prediction.option)
    if "text" in (prediction.node[0], gold.node[0]):
        return prediction.words is not None and prediction.words == gold.words
    conditions = {prediction.condition, gold.condition}
    # a condition may be missing in one of the two answers only if it states a domain
    if len(conditions) > 1 and ("" not in conditions or len("".join(conditions)) > 1):
        return False
    # a prediction of several option letters, such as AD, stands for the list A, D
    if gold.node[0] == "list" and prediction.words and set("ABCDEFGH").issuperset(prediction.words):
        return same(("list", tuple(map(sym, prediction.words))), gold.node)
    pairs = [(prediction.node, gold.node), (prediction.second, gold.node), (prediction.node, gold.second)]
    try:
        return any(same(p, g) for p, g in pairs if p is not None and g is not None)
    except Unreadable:  # same() had to compute a number of too many bits
        return False


def same(p: Node, g: Node) -> bool:
    """Returns whether the tree of a prediction and the tree of a gold answer mean the same."""
    if p == g:
        return True
    for node, other in ((p, g), (g, p)):
        # the set {5} equals the number 5
        if node[0] == "set" and len(node[1]) == 1 and other[0] in EXPRESSIONS | {"unit"}:
            values = node[1]
        elif node[0] == "rel" and "≈" in node[1]:
            values = _approximations(node)
        else:
            continue
        return any(same(value, g) if node is p else same(p, value) for value in values)
    kinds = {p[0], g[0]}
    # an equation such as x = 5 cm keeps its unit on one of its sides, so its unit is not split off here
    if "unit" in kinds and (kinds != {"unit", "rel"} or "rel" in (p[1][0], g[1][0])):
        if p[:2] == ("unit", g) or g[:2] == ("unit", p):  # -1 (mod 7) equals -1 and the residue 6
            return True
        (p, unit_p), (g, unit_g) = _without_unit(p), _without_unit(g)
        return (unit_p == unit_g or None in (unit_p, unit_g)) and same(p, g)
    # a congruence such as x ≡ 2 does not equal the equation x = 2
    if p[0] == g[0] == "rel" and ("≡" in p[1]) != ("≡" in g[1]):
        return False
    if p[0] == "rel" or g[0] == "rel" or "regions" in (p[0], g[0]) or REALS in (p, g):
        return _same_relations(p, g)
    if p[0] in EXPRESSIONS and g[0] in EXPRESSIONS:
        return _same_expressions(p, g)
    return _same_collections(p, g)


def _without_unit(node: Node) -> tuple[Node, str | Node | None]:
    """Splits a value from its unit or modulus: 5 cm gives 5 and cm, 7 (mod 5) gives 2 and the modulus 5."""
    if is_modulo(node):
        return residue(node[1], node[2][1]), node[2]
    return node[1:] if node[0] == "unit" else (node, None)


def _same_collections(p: Node, g: Node) -> bool:
    kinds = {p[0], g[0]}
    if kinds <= {"set", "list"}:
        return _same_items(p[1], g[1])
    if kinds == {"seq"}:
        # three or more numbers in brackets, as in [1, 2, 3], equal the tuple (1, 2, 3)
        plain = {p[1] + p[2], g[1] + g[2]} <= {"()", "[]"} and len(p[3]) > 2
        return (p[1:3] == g[1:3] or plain) and _same_in_order(p[3], g[3])
    # three or more numbers in a list without parentheses equal a tuple
    if kinds == {"seq", "list"} and {p[1], g[1]} & {"(", "["}:
        return len(p[-1]) > 2 and _same_in_order(p[-1], g[-1])
    if kinds == {"matrix"}:
        return len(p[1]) == len(g[1]) and all(_same_in_order(a, b) for a, b in zip(p[1], g[1]))
    if kinds == {"matrix", "seq"}:  # a column vector may be written as a point
        matrix, seq = (p, g) if p[0] == "matrix" else (g, p)
        column = tuple(row[0] for row in matrix[1])
        if len(matrix[1][0]) > 1 or seq[1] + seq[2] not in ("()", "[]"):
            return False
        return _same_in_order(column, seq[3]) if matrix is p else _same_in_order(seq[3], column)
    if {"ratio"} <= kinds <= {"ratio", "clock"}:  # the ratio 4:6 equals 2:3, but the time 10:30 does not equal 5:15
        return _same_ratio(p[1], g[1])
    if p[0] == "base" and p[2] == 10:
        return g == num(int(p[1]))
    return g[0] == "base" and g[1].isdigit() and p == num(int(g[1]))  # the base of a number may be missing


def _same_in_order(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    return len(p) == len(g) and all(map(same, p, g))


def _same_items(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    """Returns whether the items of two lists match one to one, in any order."""
    if len(p) != len(g) or len(p) > MAX_ITEMS:
        return False
    left, rest = list(g), []
    for item in p:  # items with identical trees are matched first, because comparing trees costs little
        left.remove(item) if item in left else rest.append(item)
    if len(rest) > MAX_RELATIONS and any(item[0] in ("rel", "regions") for item in rest):
        return False
    for item in rest:
        match = next((k for k, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_ratio(p: tuple[Node, ...], g: tuple[Node, ...]) -> bool:
    """Returns whether two ratios have equal or proportional parts. Ratios with a part 0 are never proportional,
    because 3:00 and 7:00 are times."""
    if _same_in_order(p, g):
        return True
    expressions = len(p) == len(g) and all(x[0] in EXPRESSIONS for x in p + g)
    return expressions and all(_same_values(mul(p[0], b), mul(g[0], a)) for a, b in zip(p, g)) and ZERO not in p


# ---------------------------------------------------------------------------------------------- relations and regions


def _same_relations(p: Node, g: Node) -> bool:
    (name_p, value_p), (name_g, value_g) = _named_value(p), _named_value(g)
    # an equation of numbers, such as 2 + 3 = 5, gives a value without a name
    if (name_p is None and value_p != p) or (name_g is None and value_g != g):
        return same(value_p if name_p is None else p, value_g if name_g is None else g)
    if name_p and name_g and name_p[0] == name_g[0] == "seq":
        return _same_assignments(name_p, value_p, name_g, value_g)
    for name, value, stated, other in ((name_p, value_p, p, g), (name_g, value_g, g, p)):
        # the point in P = (1, 2) does not equal the region 1 < x < 2
        if name and value[0] == "seq" and stated[1][0] == "=" and is_region(other):
            return False
    if (name_p is None) != (name_g is None) or (name_p is not None and name_p == name_g):
        if same(value_p, value_g):
            return True
        if name_p is None or name_g is None:
            assigned, other = (name_g, p) if name_p is None else (name_p, g)
            plain = other[0] == "list" and not any(x[0] == "rel" for x in other[1])
            # the answer "x = 1, y = 2" equals the list "1, 2"
            if assigned[0] == "seq" and plain and "seq" in (value_p[0], value_g[0]):
                return _same_in_order(value_p[-1], value_g[-1])
    regions = regions_of(p), regions_of(g)
    if None not in regions:
        variables = [symbols(n) - {INFINITY[1], REALS[1]} for n in (p, g)]
        return (not all(variables) or variables[0] == variables[1]) and _same_regions(*regions)
    if p[0] == g[0] == "regions":
        return p[1] == g[1] and (_same_items if p[1] in "∪∩" else _same_in_order)(p[2], g[2])
    return p[0] == g[0] == "rel" and _same_relation(p, g)


def _named_value(node: Node) -> tuple[Node | None, Node]:
    """Returns the name and the value of an answer: x = 5 gives x and 5, and x ∈ A gives x and A. In a chain of
    equations, such as x = 2 + 3 = 5, the last side is the value if the other sides agree with it."""
    if node[0] != "rel" or len(set(node[1])) > 1 or node[1][0] not in ("=", "∈", "≡"):
        return None, node
    name, *sides = node[2]
    if node[1][0] == "∈":
        return (name, sides[0]) if is_name(name) and len(sides) == 1 else (None, node)
    value = sides[-1]
    if len(sides) == 1 and is_name(value) and not symbols(name):  # the name may stand on the right, as in 5 = x
        name, value = value, name
        sides = [value]
    constant = not symbols(value)
    if not is_name(name) and not (constant and _is_quantity(name)):
        if len(sides) == 1 and symbols(name):
            return None, node
        sides, name = [name, *sides[:-1]], None  # 2 + 3 = 5 has no name, so all its sides are compared
    agree = all((constant and symbols(side)) or same(side, value) for side in sides)
    if not agree or (name and name[0] == "sym" and name[1] in symbols(value)):
        return None, node
    return name, value


def _same_assignments(name_p: Node, value_p: Node, name_g: Node, value_g: Node) -> bool:
    """Returns whether two assignments give each name the same value, such as (x, y) = (1, 2) and (y, x) = (2, 1)."""
    if any(v[0] != "seq" or len(v[3]) != len(n[3]) for n, v in ((name_p, value_p), (name_g, value_g))):
        return False
    p, g = dict(zip(name_p[3], value_p[3])), dict(zip(name_g[3], value_g[3]))
    return p.keys() == g.keys() and all(same(value, g[name]) for name, value in p.items())


def _is_quantity(node: Node) -> bool:
    """Returns whether `node` is an expression whose value an equation can state, such as a + b (in a + b = 7), AB/CD,
    |AB| or cos A. The result is False for |x| and 2x, because |x| = 5 and 2x = 5 are equations for x."""
    if node[0] == "ratio":  # the node is a ratio such as AB : CD
        return all(_is_plain(x) or _is_quantity(x) for x in node[1])
    if node[0] == "fn" and node[1] == "abs":
        return node[2][0][0] == "mul" and all(_is_plain(x) for x in node[2][0][1])
    if node[0] == "fn":
        return node[1] in ("lim", "int", "sum") or (node[1] in ("sin", "cos", "tan") and _is_plain(node[2][0]))
    return node[0] in ("add", "mul") and all(_is_plain(x) for x in node[1])


def _is_plain(node: Node) -> bool:
    if node[0] == "pow" and node[2] == num(-1):
        return all(map(_is_plain, node[1][1])) if node[1][0] == "mul" else _is_plain(node[1])
    return node[0] == "sym" and node[1] not in CONSTANTS


def _approximations(node: Node) -> list[Node]:
    """Returns the values that an approximation states: both sides of "exact ≈ decimal" if the exact value rounds to
    the decimal, or the number alone in "x ≈ number"."""
    cut = node[1].index("≈")
    left, right = node[2][: cut + 1], node[2][cut + 1 :]
    if len(right) == len(left) == 1 and is_name(left[0]):
        return [right[0]] if is_number(right[0]) or (right[0][0] == "unit" and is_number(right[0][1])) else []
    if len(right) > 1 or right[0][0] != "dec":
        return []
    exact = ("rel", node[1][:cut], left) if cut else left[0]
    value = _named_value(exact)[1]
    return [exact, right[0]] if value[0] in EXPRESSIONS and _rounds_to(value, right[0], 2) else []


def _same_relation(p: Node, g: Node) -> bool:
    """Returns whether two relations have equal sides, also if one relation is turned round (x < 1 is 1 > x).
    Relations with a single relation sign, such as y = 2x, are also compared by the difference of their sides, up to a
    constant factor."""
    turned = tuple(TURNED.get(op, op) for op in reversed(p[1])), p[2][::-1]
    for ops, sides in ((p[1], p[2]), turned if all(op in TURNED for op in p[1]) else (p[1], p[2])):
        if ops == g[1] and _same_in_order(sides, g[2]):
            return True
    if len(p[1]) > 1 or len(g[1]) > 1 or any(s[0] not in EXPRESSIONS for s in p[2] + g[2]):
        return False
    (op_p,), (op_g,) = p[1], g[1]
    if op_g not in ("=", "!=", "<", ">", "<=", ">=") or op_p not in (op_g, TURNED[op_g]):
        return False
    signs = {1, -1} if op_p in ("=", "!=") else {1 if op_p == op_g else -1}
    terms = [add(n[2][0], negative(n[2][1])) for n in (p, g)]
    if op_p == "=":
        terms = list(map(_without_denominators, terms))
    return _proportional(*terms, signs)


def _without_denominators(node: Node) -> Node:
    """Multiplies an expression by its denominators, so that the equations y = 3/x and xy = 3 become equal: y - 3/x is
    multiplied by x."""
    terms = node[1] if node[0] == "add" else (node,)
    factors = [factor for term in terms for factor in (term[1] if term[0] == "mul" else (term,))]
    below = {f[1] for f in factors if f[0] == "pow" and f[2] == MINUS_ONE and symbols(f[1])}
    return add(*(mul(term, *sorted(below)) for term in terms)) if len(terms) > 1 and len(below) < 4 else node


def _proportional(p: Node, g: Node, signs: set[int]) -> bool:
    """Returns whether the quotient p / g is a constant whose sign is in `signs`."""
    if symbols(p) != symbols(g) or ZERO in (p, g) or not symbols(p):
        return False
    ratios = []
    for index in range(POINTS):
        p_value, g_value = value_at(p, index, DIGITS), value_at(g, index, DIGITS)
        if p_value and g_value and g_value[0]:
            ratios.append(p_value[0] / g_value[0])
    if len(ratios) < ENOUGH or not is_real(ratios[0]) or (1 if context.re(ratios[0]) > 0 else -1) not in signs:
        return False
    return all(abs(r - ratios[0]) < abs(ratios[0]) * context.mpf(10) ** -45 for r in ratios)


def _same_regions(p: list[tuple], g: list[tuple]) -> bool:
    return len(p) == len(g) and all(
        a[1] == b[1] and a[3] == b[3] and same(a[0][1], b[0][1]) and same(a[2][1], b[2][1]) for a, b in zip(p, g)
    )


# ---------------------------------------------------------------------------------------------- numbers, expressions


def _same_expressions(p: Node, g: Node) -> bool:
    if g[0] == "dec" and _rounds_to(p, g, 3 if p[0] == "num" else 4):
        return True
    if is_number(p) and is_number(g):
        return p[1] == g[1]
    return INFINITY not in (p, g) and _same_values(p, g)


def _rounds_to(value: Node, decimal: Node, digits: int) -> bool:
    """Returns whether an exact value without a finite decimal rounds to `decimal`, which must have at least `digits`
    significant digits."""
    if abs(decimal[1]) < 10 ** (digits - 1) * decimal[2] or value[0] == "dec" or symbols(value):
        return False
    if value[0] == "num":
        no_decimal = pow(10, value[1].denominator.bit_length(), value[1].denominator) > 0
        return no_decimal and 2 * abs(value[1] - decimal[1]) < decimal[2]
    number = value_at(value, 0, DIGITS)
    if not number or not is_real(number[0]):
        return False
    return 2 * abs(context.re(number[0]) - exact(decimal[1])) < exact(decimal[2])


def _same_values(p: Node, g: Node) -> bool:
    """Returns whether two expressions have equal values at the random points where both values are real. If there are
    fewer than ENOUGH (three) such points, the values must also be equal at the points where a value is complex.

    If the expressions have a root and several variables, only points with positive coordinates are used, because
    √(x²y) equals x√y for positive x only, and such variables are mostly lengths or masses. Expressions with ⌊x⌋ or
    ⌈x⌉ are compared at whole numbers too. If all variables are in WHOLE_NAMES, the values are compared at whole
    numbers only.
    """
    variables = symbols(p) | symbols(g)
    positive = len(variables) > 1 and _roots_only((p, g)) == (True, False)
    points = range(POINTS // 2 if positive else POINTS) if variables else ()
    if variables and _rounds((p, g)):
        points = [*WHOLE_POINTS, *(() if variables <= WHOLE_NAMES else points)]
    agreed, all_agree, decided = [], True, 0
    for index in points:
        pair = value_at(p, index, DIGITS), value_at(g, index, DIGITS)
        if not all(pair):
            continue
        decided += 1
        agree = close(*pair, DIGITS)
        if is_real(pair[0][0]) and is_real(pair[1][0]):
            if not agree:
                return False
            agreed.append(index)
        else:
            all_agree &= agree
    if variables and len(agreed) < ENOUGH and (not all_agree or decided < ENOUGH):
        return False
    index = agreed[0] if agreed else 0
    pair = value_at(p, index, SURE_DIGITS), value_at(g, index, SURE_DIGITS)
    return all(pair) and close(*pair, SURE_DIGITS)


def _rounds(node: Node) -> bool:
    rounds = node[0] == "fn" and node[1] in ("floor", "ceil", "mod", "!!")
    return rounds or any(_rounds(x) for x in node if isinstance(x, tuple))


def _roots_only(node: Node) -> tuple[bool, bool]:
    """Returns two booleans: whether an expression contains a root, and whether it contains an absolute value."""
    root = node[:1] == ("pow",) and node[2][0] == "num" and node[2][1].denominator > 1
    parts = [_roots_only(x) for x in node if isinstance(x, tuple)]
    return root or any(f[0] for f in parts), node[:2] == ("fn", "abs") or any(f[1] for f in parts)
