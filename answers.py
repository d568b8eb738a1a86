"""Reads a final answer, LaTeX or plain text, into a tree in normal form (answer_nodes.py).

The text is cut into tokens (answer_tokens.py); a precedence reader turns them into a tree; the items of a list are put
into their usual form (n = -6, 9 is two equations); answers in words stay words.

Bounded by construction: at most MAX_CHARS characters, MAX_TOKENS tokens and MAX_DEPTH levels, no backtracking, no
evaluation of the text. What is not understood is Unreadable; nothing is guessed. Choices where usage is divided: `e`
and `i` are the constants; `1/2x` is (1/2)x; `f(x)` with one letter or number in the parentheses is a function, other
letters before parentheses multiply; `x^10` and `\\sqrt12` take the whole number, `\\frac12` one digit each; `a, b` is a
list whose order is free; `\\log` has an unstated base, so it equals neither `\\ln` nor `\\lg`; `%` and `°` are units.

Left out: units beyond their spelling, matrix algebra beyond sums and multiples, prose.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import regex

from answer_nodes import (
    CONSTANTS, DEGREE, FUNCTIONS, MINUS_ONE, ONE, PI, REALS, E, Node, Unreadable,
    add, call, divide, expression, is_name, is_number, mul, negative, num, power, size, substitute, sym, symbols,
)  # fmt: skip
from answer_tokens import (
    ACCENTS, FONTS, KNOWN, LISTS, MAX_CHARS, NUMBER_WORDS, SCALES, SHORT_WORDS, STOP_WORDS, TEXTS,
    clean, tokenize, unit_name,
)  # fmt: skip

MAX_DEPTH = 24
END = ("END", "")


# ---------------------------------------------------------------------------------------------- tokens to tree


class Reader:
    """Precedence reader over tokens, loosest first: items, relation, set operation, ratio, quantity, sum, term, factor."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.bars = 0  # open |, so that the next one closes
        self.bar_separates = False  # in {x | x > 0}
        self.degrees = False
        self.currency: str | None = None
        self.signs = 0  # ± seen

    @property
    def token(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else END

    def ahead(self, count: int) -> tuple[str, str]:
        return self.tokens[self.at + count] if self.at + count < len(self.tokens) else END

    def take(self) -> str:
        value = self.token[1]
        self.at += 1
        return value

    def is_op(self, *values: str) -> bool:
        return self.token[0] == "OP" and self.token[1] in values

    def expect(self, *values: str) -> str:
        if not self.is_op(*values):
            raise Unreadable(f"{self.token[1] or 'the end'!r} stands where {' or '.join(values)} is expected")
        return self.take()

    def whole(self) -> Node:
        items = self.items()
        if self.token != END:
            raise Unreadable(f"{self.token[1]!r} is not expected where it stands")
        return usual_form([expanded for item in items for expanded in expand_signs(item)])

    def items(self) -> list[Node]:
        found = [self.item()]
        while self.token[0] == "SEP":
            while self.token[0] == "SEP":  # "a, b, and c"
                self.take()
            found.append(self.item())
        return found

    def item(self) -> Node:
        sides, ops = [self.set_operation()], []
        while self.token[0] == "REL":
            ops.append(self.take())
            sides.append(self.set_operation())
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def set_operation(self) -> Node:
        node = self.ratio()
        while self.is_op("∪", "∩", "∖"):
            node = ("regions", self.take(), (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        parts = [self.quantity()]
        while self.is_op(":"):
            self.take()
            parts.append(self.quantity())
        return ("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def quantity(self) -> Node:
        """A sum with an optional unit, currency, percent sign or modulus."""
        currency, self.currency = self.currency, None
        node = self.sum()
        unit, self.currency = self.currency, currency
        if self.degrees and DEGREE[1] in symbols(node):
            node, unit = substitute(node, DEGREE, ONE), "degree"
        scale, words = self.unit_words()
        if scale != 1:
            node = mul(node, num(scale))
        if words:
            unit = unit_name((unit + " " if unit else "") + words)
        if self.is_op("pmod") or (self.is_op("(") and self.ahead(1) == ("OP", "mod")):
            in_parentheses = self.take() == "("
            if in_parentheses:
                self.take()
            unit = f"mod {self.factor()}"
            if in_parentheses:
                self.expect(")")
        return ("unit", node, unit) if unit else node

    def unit_words(self) -> tuple[int, str]:
        words, scale = "", 1
        while True:
            if self.token[0] == "TEXT":
                words += " " + self.take()
            elif self.is_op("%") or self.token[0] == "CURRENCY":
                words += " " + self.take()
            elif words and self.is_op("^"):
                self.take()
                words += f"^{self.script()}"
            elif words and self.is_op("/", "*") and self.ahead(1)[0] == "TEXT":
                words += "/" if self.take() == "/" else " "
            else:
                break
        pieces = words.split()
        if len(pieces) > 4 or STOP_WORDS.intersection(w.lower().strip("'") for w in pieces):
            raise Unreadable(f"the words{words!r} follow the answer")
        while pieces and pieces[0].lower().rstrip("s") in SCALES:
            scale *= SCALES[pieces.pop(0).lower().rstrip("s")]
        return scale, regex.sub(r"\('num', Fraction\((-?\d+), 1\)\)", r"\1", " ".join(pieces))

    def sign(self) -> Node:
        """The product of the signs that stand here; ± is a symbol that expand_signs replaces by +1 and -1."""
        sign = ONE
        while self.is_op("+", "-", "±", "∓"):
            op = self.take()
            if op == "-":
                sign = negative(sign)
            elif op == "±":
                self.signs += 1
                sign = mul(sign, sym(f"±{self.signs}"))
            elif op == "∓":
                sign = mul(sign, MINUS_ONE, sym("±0"))
            if op in "±∓" and self.is_op("*"):
                self.take()
        return sign

    def sum(self) -> Node:
        terms = []
        while not terms or self.is_op("+", "-", "±", "∓"):
            sign = self.sign()
            term = self.term()
            terms.append(term if sign == ONE else mul(sign, term))
        return add(*terms)

    def term(self) -> Node:
        factors = [self.factor()]
        while True:
            if self.is_op("*", "/"):
                divides = self.take() == "/"
                factor = mul(self.sign(), self.factor()) if self.is_op("+", "-") else self.factor()
                factors.append(power(factor, MINUS_ONE) if divides else factor)
            elif self.is_op("mod"):
                self.take()
                factors = [call("mod", mul(*factors), self.factor())]
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return mul(*factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        kind, value = self.token
        if kind == "NUM":
            return self.tokens[self.at - 1][0] != "NUM"
        if kind == "OP":
            if value == "|":
                return not self.bars and not self.bar_separates
            return value in ("[", "{", "⌊", "⌈") or (value == "(" and self.ahead(1) != ("OP", "mod"))
        return kind in ("NAME", "FUNC", "COMMAND", "BEGIN")

    def factor(self) -> Node:
        node = self.primary()
        while self.token[0] == "OP":
            value = self.token[1]
            if value == "^":
                self.take()
                node = self.superscript(node)
            elif value == "!":
                self.take()
                double = self.is_op("!") and self.take()
                node = call("!!" if double else "!", node)
            elif value == "_" and node[0] == "num":
                self.take()
                node = in_base(str(node[1]), self.script_text())
            elif value == "_" and node[0] == "pow" and node[1][0] == "sym":  # E^2_0
                self.take()
                node = power(sym(f"{node[1][1]}_{self.script_text()}"), node[2])
            elif value == "%" and (self.ahead(1)[0] in ("NUM", "NAME", "COMMAND") or self.ahead(1)[1] in ("*", "(")):
                self.take()
                node = mul(node, num(Fraction(1, 100)))
            else:
                break
        return node

    def superscript(self, base: Node) -> Node:
        braced = self.is_op("{")
        mark = self.ahead(1) if braced else self.token
        if mark in (("OP", "∘"), ("NAME", "°")):
            self.at += 3 if braced else 1
            self.degrees = True
            return mul(base, DEGREE)
        if mark == ("OP", "'") and base[0] == "sym":
            self.at += 1 if braced else 0
            name = base[1]
            while self.is_op("'"):
                name += self.take()
            if braced:
                self.expect("}")
            return self.name(name)
        exponent = self.script()
        if exponent == MINUS_ONE and base[0] == "sym" and base[1] in "fgh" and self.is_op("("):
            return self.name(base[1] + "^-1")
        return power(base, exponent)

    def script(self) -> Node:
        """An exponent: a group, or a signed primary with its own exponent (2^3^2)."""
        sign = self.sign() if self.is_op("-", "+") else ONE
        node = self.primary()
        if self.is_op("^"):
            self.take()
            node = self.superscript(node)
        return node if sign == ONE else mul(sign, node)

    def script_text(self) -> str:
        """A subscript as text: of x_1, x_{n+1}, \\lambda_{\\text{red}}."""
        if not self.is_op("{"):
            return self.take()
        depth, text = 0, ""
        while True:
            if self.token == END:
                raise Unreadable("a brace is never closed")
            value = self.take()
            depth += {"{": 1, "}": -1}.get(value, 0)
            if not depth:
                return text
            text += value if value != "{" else ""

    def primary(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("it is nested too deep")
        kind, value = self.token
        if not value:
            raise Unreadable("it ends too early")
        self.at += 1
        node = self.read_primary(kind, value)
        self.depth -= 1
        return node

    def read_primary(self, kind: str, value: str) -> Node:
        if kind == "NUM":
            return self.number(value)
        if kind == "NAME":
            self.degrees |= value == "°"
            return self.name(value)
        if kind == "FUNC":
            return self.function(value)
        if kind == "TEXT":
            while self.token[0] == "TEXT":
                value += " " + self.take()
            return sym(value if len(value) == 1 else value.lower())
        if kind == "CURRENCY":
            self.currency = value
            return self.factor()
        if kind == "BEGIN":
            return self.environment(value)
        if kind == "COMMAND":
            return self.command(value)
        if value in ("(", "["):
            return self.sequence(value)
        if value == "{":
            return self.braces()
        if value == "\\{":
            return self.set()
        if value == "∅":
            return ("set", ())
        if value in ("|", "⌊", "⌈"):
            return self.enclosed(value)
        raise Unreadable(f"{value!r} is not expected where it stands")

    def number(self, literal: str) -> Node:
        node = read_literal(literal)
        if literal.isdigit():
            if self.token in (("COMMAND", "frac"), ("COMMAND", "dfrac"), ("COMMAND", "tfrac")):
                part = self.primary()
                mixed = part[0] == "num" and 0 < part[1] < 1
                return add(node, part) if mixed else mul(node, part)
            if [self.token[0], self.ahead(1), self.ahead(2)[0]] == ["NUM", ("OP", "/"), "NUM"]:  # 3 1/2
                top, bottom = read_literal(self.take()), read_literal(self.ahead(1)[1])
                self.at += 2
                return add(node, divide(top, bottom))
            if self.is_op("_"):
                self.take()
                return in_base(literal, self.script_text())
        return node

    def name(self, name: str) -> Node:
        """A variable with subscript and primes, or a function of its own: f(x), u(t), I(0), t(0,4]."""
        if self.is_op("_"):
            self.take()
            name += "_" + self.script_text()
        while self.is_op("'"):
            name += self.take()
        if name not in CONSTANTS and self.is_op("(") and self.is_application(name):
            self.take()
            inside = self.sequence("(")
            arguments = inside[3] if inside[0] == "seq" else (inside,)
            brackets = inside[1] + inside[2] if inside[0] == "seq" else "()"
            return ("fn", f"{name}{brackets}", arguments)
        return sym(name)

    def is_application(self, name: str) -> bool:
        kinds = [self.ahead(k)[0] for k in range(1, 4)]
        if kinds[0] in ("NUM", "NAME") and self.ahead(2) == ("OP", ")"):
            return True
        if name[0] in "fghFGHP" and self.ahead(1) == ("OP", "-") and self.ahead(3) == ("OP", ")"):
            return True
        depth = 0
        for k in range(self.at, len(self.tokens)):
            kind, value = self.tokens[k]
            if kind == "OP":
                depth += (value in ("(", "[", "{", "\\{")) - (value in (")", "]", "}", "\\}"))
            if depth < 1:
                return False
            if depth == 1 and (kind == "REL" or value == ","):
                return True
        return False

    def function(self, name: str) -> Node:
        exponent = base = None
        while self.is_op("^", "_"):
            if self.take() == "^":
                exponent = self.script()
            else:
                base = self.log_base()
        if name in ("min", "max", "gcd", "lcm") and self.is_op("(", "\\{"):
            self.take()
            args = self.items()
            self.expect(")", "\\}")
            return call(name, *args)
        inverse = exponent == MINUS_ONE and "arc" + name in FUNCTIONS
        argument = expression(self.argument())
        node = function_value("arc" + name if inverse else name, argument, base)
        return node if inverse or exponent is None else power(node, exponent)

    def log_base(self) -> Node:
        kind, value = self.token
        if kind == "NUM" and len(value) > 1 and value.isdigit() and self.ahead(1)[0] not in ("NUM", "NAME", "COMMAND", "OP"):
            self.tokens[self.at] = ("NUM", value[1:])  # \log_28 is the logarithm of 8 to base 2
            return read_literal(value[0])
        return expression(self.primary())

    def argument(self) -> Node:
        """(…), {…}, or the product that follows up to the next function, sign or division (\\sin 2 \\pi t / 3)."""
        if self.is_op("(", "{"):
            return self.primary()
        sign = self.sign()
        factors = [sign, self.factor()]
        while self.starts_factor() and self.token[0] != "FUNC" and not self.is_op("(", "[", "{", "|"):
            factors.append(self.factor())
        if self.is_op("/") and self.ahead(1)[0] == "NUM" and PI in factors:
            self.take()
            factors.append(power(self.factor(), MINUS_ONE))
        return mul(*factors)

    def command(self, name: str) -> Node:
        if name.endswith("frac"):
            return self.fraction()
        if name.endswith("binom"):
            return call("binom", self.digit_or_group(), self.digit_or_group())
        if name == "sqrt":
            index = num(2)
            if self.is_op("["):
                self.take()
                index = expression(self.sum())
                self.expect("]")
            inside = expression(self.primary())
            odd = index[0] == "num" and index[1].denominator == 1 and index[1] % 2 == 1
            return call("root", inside, index) if odd else power(inside, power(index, MINUS_ONE))
        if name == "mathbb":
            letter = self.script_text()
            return REALS if letter == "R" else sym("set " + letter)
        if name in ACCENTS:
            return self.name(f"{name} {self.script_text()}")
        if name in ("angle", "triangle", "measuredangle"):
            letters = name.replace("measured", "")
            while self.token[0] == "NAME":
                letters += " " + self.take()
                if self.is_op("_"):
                    letters += self.take() + self.script_text()
            return sym(letters)
        if name in ("sum", "prod", "int", "lim"):
            return self.big_operator(name)
        raise Unreadable(f"\\{name} is not expected where it stands")

    def fraction(self) -> Node:
        start = self.at
        top = self.digit_or_group()
        middle = self.at
        bottom = self.digit_or_group()
        texts = ["".join(v for _, v in self.tokens[a:b] if v not in "{}") for a, b in ((start, middle), (middle, self.at))]
        if all(t[:1] in ("d", "∂") for t in texts) and regex.fullmatch(r"[d∂](\^\d)?\w'?(\^\d)?", texts[1]):
            return sym("/".join(texts))  # dM/dt is one symbol
        return divide(top, bottom)

    def digit_or_group(self) -> Node:
        """An argument of \\frac or \\binom: a group or, as in TeX, one digit or symbol."""
        kind, value = self.token
        if kind == "NUM" and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = ("NUM", value[1:])
            return read_literal(value[0])
        if self.is_op("{") or kind in ("NUM", "NAME", "COMMAND"):
            return expression(self.primary())
        raise Unreadable("a fraction has no argument")

    def sequence(self, opening: str) -> Node:
        """Parentheses or brackets: grouping around one item, else a tuple, point or interval."""
        saved, self.bars, self.bar_separates = (self.bars, self.bar_separates), 0, False
        items = self.items()
        closing = self.expect(")", "]")
        self.bars, self.bar_separates = saved
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        return ("seq", opening, closing, tuple(items))

    def braces(self) -> Node:
        saved, self.bars, self.bar_separates = (self.bars, self.bar_separates), 0, False
        items = self.items()
        if self.is_op("choose"):
            self.take()
            items = [call("binom", items[0], self.sum())]
        self.expect("}")
        self.bars, self.bar_separates = saved
        return items[0] if len(items) == 1 else ("set", tuple(x for item in items for x in expand_signs(item)))

    def set(self) -> Node:
        if self.is_op("\\}"):
            self.take()
            return ("set", ())
        saved, self.bars, self.bar_separates = (self.bars, self.bar_separates), 0, True
        items = self.items()
        if self.is_op("|"):
            self.take()
            condition = self.items()
            items = [("builder", items[0], tuple(condition))]
        self.expect("\\}")
        self.bars, self.bar_separates = saved
        first = items[0]
        if len(items) == 1 and first[0] == "rel" and first[2][0][0] == "ratio":  # {x : x > 0}
            variable, start = first[2][0][1]
            first = ("builder", variable, (("rel", first[1], (start, *first[2][1:])),))
        if first[0] == "builder" and len(first[2]) == 1 and first[1][0] in ("sym", "rel"):
            return first[2][0]
        return ("set", tuple(dict.fromkeys(x for item in items for x in expand_signs(item))))

    def enclosed(self, opening: str) -> Node:
        if opening != "|":
            node = self.sum()
            self.expect({"⌊": "⌋", "⌈": "⌉"}[opening])
            return call({"⌊": "floor", "⌈": "ceil"}[opening], node)
        self.bars += 1
        node = self.sum()
        self.expect("|")
        self.bars -= 1
        return call("abs", node)

    def environment(self, name: str) -> Node:
        if regex.fullmatch(LISTS, name):
            items = self.items()
            if self.take() != name:
                raise Unreadable(f"\\begin{{{name}}} is never ended")
            return usual_form(items)
        rows: list[list[Node]] = [[]]
        while self.token[0] != "END_ENV":
            rows[-1].append(self.item())
            if self.is_op("&"):
                self.take()
            elif self.token == ("SEP", "\\\\"):
                self.take()
                if self.token[0] != "END_ENV":
                    rows.append([])
            elif self.token[0] != "END_ENV":
                raise Unreadable("a matrix is not closed")
        self.take()
        if len({len(row) for row in rows}) > 1 or not rows[0]:
            raise Unreadable("the rows of a matrix differ in length")
        return ("det" if name == "vmatrix" else "matrix", tuple(map(tuple, rows)))

    def big_operator(self, name: str) -> Node:
        """Sums and products over up to 100 whole numbers are written out; others are opaque."""
        low = high = sym("")
        while self.is_op("_", "^"):
            if self.take() == "_":
                low = self.item() if not self.is_op("{") else self.primary()
            else:
                high = self.script()
        body = self.term()
        if name in ("sum", "prod") and low[0] == "rel" and low[1] == ("=",) and low[2][0][0] == "sym":
            index, first = low[2]
            if all(is_number(x) and x[1].denominator == 1 for x in (first, high)) and 0 <= high[1] - first[1] < 100:
                values = range(int(first[1]), int(high[1]) + 1)
                if len(values) * size(body) > 3000:
                    raise Unreadable("a sum is too long to write out")
                return (add if name == "sum" else mul)(*(substitute(body, index, num(k)) for k in values))
        return ("fn", name, (low, high, body))


# ---------------------------------------------------------------------------------------------- pieces of the reader


def read_literal(text: str) -> Node:
    """142 and 142.0 are exact; 0.50 is a decimal that states hundredths; 4.5e33 states 1e32."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent.lstrip("+-")) > 4:
        raise Unreadable("a number has too many digits")
    whole, _, places = mantissa.partition(".")
    shift = int(exponent or 0)
    if abs(shift) > 4000:
        raise Unreadable("a number has too many digits")
    unit = Fraction(10) ** (shift - len(places))
    value = num(int(whole + places) * unit)
    return ("dec", value[1], unit) if places.strip("0") else value


def in_base(digits: str, base: str) -> Node:
    """A number with its base; base 10 is the number itself."""
    value = NUMBER_WORDS.get(base.strip().lower()) or (int(base) if regex.fullmatch(r"[0-9]{1,2}", base) else 0)
    if not 2 <= value <= 36 or any(int(d, 36) >= value for d in digits):
        raise Unreadable(f"{digits} is not a number in base {base}")
    return num(int(digits)) if value == 10 else ("base", digits.lstrip("0") or "0", value)


def function_value(name: str, argument: Node, base: Node | None) -> Node:
    """A function of one argument; degrees become radians in trigonometric functions only."""
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
    return call(name, argument)


def expand_signs(node: Node) -> list[Node]:
    """The values of a node with ±: each ± on its own, but all together where a ∓ answers them."""
    names = sorted(name for name in symbols(node) if name.startswith("±"))
    if len(names) > 3:
        raise Unreadable("it has more than three ±")
    together = "±0" in names
    found = []
    for signs in [(1,) * len(names), (-1,) * len(names)] if together else itertools.product((1, -1), repeat=len(names)):
        one = node
        for name, sign in zip(names, signs):
            one = substitute(one, sym(name), num(sign))
        found.append(one)
    return found


def usual_form(items: list[Node]) -> Node:
    """One node for the items of a list: n = -6, 9 is n = -6, n = 9; x = 1, y = 2 is (x, y) = (1, 2)."""
    if len(items) == 1:
        return items[0]
    named = [x[0] == "rel" and x[1] == ("=",) and is_name(x[2][0]) for x in items]
    if named[0] and not any(x[0] == "rel" for x in items[1:]):
        items = [items[0]] + [("rel", ("=",), (items[0][2][0], x)) for x in items[1:]]
    elif all(named) and len({x[2][0] for x in items}) == len(items):
        names, values = zip(*(x[2] for x in items))
        return ("rel", ("=",), (("seq", "(", ")", names), ("seq", "(", ")", values)))
    return ("list", tuple(items))


# ---------------------------------------------------------------------------------------------- whole answers


@dataclass(frozen=True)
class Answer:
    """The tree; a second tree where "1,234" may be a list; the words or the choice if the answer is one."""

    node: Node
    second: Node | None = None
    words: str | None = None  # only where the whole answer is letters
    choice: str | None = None  # the capital of a multiple-choice answer: B of (B), \\text{B}, B.


def read(text: str) -> Answer:
    """The answer that `text` states; Unreadable, with the reason, where none is understood."""
    if len(text) > MAX_CHARS:
        raise Unreadable(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
    return _read(text)


@lru_cache(maxsize=8192)
def _read(text: str) -> Answer:
    cleaned = clean(text)
    flat = regex.sub(rf"\\(?:{'|'.join(FONTS | TEXTS)})(?![A-Za-z])|\\q?quad|\\[,;:! ]|[{{}}~\s]+", " ", cleaned)
    flat = regex.sub(r"\s+", " ", flat).strip(" .,")
    if not flat:
        raise Unreadable("it is empty")
    choice = regex.fullmatch(r"\(? ?([A-Z]) ?\)?[.:]?", flat)
    words, is_text = _words(flat, cleaned)
    letter = choice[1] if choice else None
    if words in ("all real numbers", "all reals", "real numbers", "set of all real numbers", "all real number"):
        return Answer(REALS, words=words)
    if is_text:
        return Answer(("text", words), words=words, choice=letter)
    special = _time(flat) or _letter_digits(flat)
    if special:
        return Answer(special)
    try:
        node = _tree(cleaned, True)
    except Unreadable:
        if words:
            return Answer(("text", words), words=words)
        if not regex.search(r"\b(?:where|such that|for (?:all|any|every|some)|when|if)\b", flat):
            raise
        return Answer(("prose", tuple(value for _, value in tokenize(cleaned) if value not in "{}")))
    second = None
    if regex.search(r"\d,\d{3}", cleaned):
        try:
            second = _tree(cleaned, False)
        except Unreadable:
            second = None
    return Answer(node, second if second != node else None, words, letter)


def _tree(text: str, grouped: bool) -> Node:
    tokens = tokenize(text, grouped)
    if not any(kind == "BEGIN" and not regex.fullmatch(LISTS, value) for kind, value in tokens):
        tokens = [t for t in tokens if t != ("OP", "&")]  # alignment marks
    return Reader(tokens).whole()


def _words(flat: str, cleaned: str) -> tuple[str | None, bool]:
    """The answer as words if it is nothing but letters, and whether it must be read as words."""
    if not regex.fullmatch(r"[A-Za-zÀ-ÿ](?:[A-Za-zÀ-ÿ' .-]|\\ )*", flat):
        return None, False
    runs = regex.findall(r"[A-Za-zÀ-ÿ']+", flat)
    if max(map(len, runs)) < 2:
        return None, False
    long = any(len(run) > 3 and run not in KNOWN for run in runs)
    words = " ".join(runs)
    if long or words.lower() in SHORT_WORDS:
        words = regex.sub(r"^(?:the|a|an) |(?<=\bsolution|\breal number)s$", "", words.lower())
        listed = {"or", "and"} & set(runs) and not cleaned.startswith("\\")
        return words, not listed
    return words, regex.match(rf"\\(?:{'|'.join(TEXTS)})\b", cleaned) is not None and not set(runs) & KNOWN


def _time(flat: str) -> Node | None:
    match = regex.fullmatch(r"(\d{1,2})(?: ?: ?(\d\d))? ?([ap])\.? ?m\.?", flat, flags=regex.IGNORECASE)
    return ("time", int(match[1]) % 12, int(match[2] or 0), match[3].lower()) if match else None


def _letter_digits(flat: str) -> Node | None:
    """1A_{16}: a number in a base above 10 that has a letter among its digits."""
    match = regex.fullmatch(r"\(?([0-9A-F]+)\)?_([1-3][0-9])", flat.replace(" ", ""))
    if not match or match[1].isdigit() or match[1].isalpha() or match[2] == "10":
        return None
    return in_base(match[1], match[2])
