"""This file parses tokens into a tree, by operator precedence, without backtracking, to a depth of at most MAX_DEPTH.

The parser reads ambiguous notation as follows. `e` and `i` are the mathematical constants. `1/2x` is (1/2)x, and
`t/RC` is t/(RC). A letter before parentheses that hold one letter or number, such as `f(x)`, is a function. A letter
before any other parentheses is a factor. The exponent of `x^10` is 10 and the radicand of `\\sqrt12` is 12, but
`\\frac12` is 1/2. `\\sin 2x` is the sine of the product 2x. `\\log` has an unknown base, so it equals neither `\\ln`
nor `\\lg`. `%` and `°` are units, but in an argument of a trigonometric function degrees are converted to radians.
"""
# ruff: isort: skip_file

from fractions import Fraction

import re

from .tokens import END, NO_NAME, Cursor
from .tree import (
    CONSTANTS, DEGREE, FUNCTIONS, MINUS_ONE, Node, ONE, PI, REALS, Unreadable, add, call, divide, expand_signs,
    expression, function_value, in_base, is_modulo, is_region, matrix_of, mul, negative, num, power, read_literal,
    set_of, substitute, sym, symbols, usual_form, written_out,
)  # fmt: skip
from .vocabulary import ACCENTS, LISTS, unit_name

MAX_DEPTH = 24
CLOCK = re.compile(r"([01]?[0-9]|2[0-4])(:[0-5][0-9])+")  # matches a time such as 10:30, or a ratio
MODS = ("mod", "pmod")
READERS = {"NUM": "number", "NAME": "name", "FUNC": "function", "TEXT": "words", "BEGIN": "environment"}
READERS["COMMAND"] = "command"


class Reader(Cursor):
    """The parser of an answer. The methods are ordered from the loosest to the tightest binding: items, relation, set
    operation, ratio, quantity, sum, term, factor, primary."""

    def __init__(self, tokens: list[tuple[str, str]]):
        super().__init__(tokens)
        self.depth = 0
        self.bars = 0  # number of open bars |, as in |x|; the next bar closes the last open bar
        self.bar_separates = False  # whether a bar | begins a condition, as in {x | x > 0}
        self.degrees = False
        self.currency: str | None = None
        self.signs = 0  # number of ± signs read so far
        # whether the answer is a congruence, in which = means ≡
        self.congruence = re.search(r"≡|pmod|\(mod", "".join(value for _, value in tokens))

    def whole(self) -> Node:
        items = self.items()
        if self.token != END:
            raise Unreadable(f"{self.token[1]!r} is not expected where it stands")
        return usual_form([expanded for item in items for expanded in expand_signs(item)])

    def items(self) -> list[Node]:
        items = [self.item()]
        while self.token[0] == "SEP":
            while self.token[0] == "SEP":  # consecutive separators count as one, as in "a, b, and c"
                separator = self.take()
            item = self.item()
            # two inequalities such as "x < 1 or x > 2" are one region
            if separator in ("or", "and") and is_region(items[-1], item):
                item = ("regions", "∪" if separator == "or" else "∩", (items.pop(), item))
            items.append(item)
        return items

    def item(self) -> Node:
        sides, ops = [self.set_operation()], []
        while self.token[0] == "REL":
            ops.append(self.take())
            sides.append(self.set_operation())
        if ops and self.congruence and is_modulo(sides[-1]):  # the modulus of a congruence holds for all its sides
            _, sides[-1], modulus = sides[-1]
            return ("unit", ("rel", tuple("≡" if op == "=" else op for op in ops), tuple(sides)), modulus)
        return ("rel", tuple(ops), tuple(sides)) if ops else sides[0]

    def set_operation(self) -> Node:
        node = self.ratio()
        while op := self.accept("∪", "∩", "∖"):
            node = ("regions", op, (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        start = self.at
        parts = [self.quantity()]
        while self.accept(":"):
            parts.append(self.quantity())
        if len(parts) == 1:
            return parts[0]
        text = "".join(value for _, value in self.tokens[start : self.at])
        return ("clock" if CLOCK.fullmatch(text) else "ratio", tuple(parts))

    def quantity(self) -> Node:
        """Reads a sum with an optional unit, currency, percent sign or modulus."""
        currency, self.currency = self.currency, None
        node = self.sum()
        unit, self.currency = self.currency, currency
        if self.degrees and DEGREE[1] in symbols(node):
            node, unit = substitute(node, DEGREE, ONE), "degree"
        scale, words = self.unit_words()
        if scale != 1:
            node = mul(node, num(scale))
        # an answer such as "\\$5 dollars" states its currency twice
        if words and (unit_name(words) != unit or not unit):
            unit = unit_name((unit + " " if unit else "") + words)
        in_parentheses = self.is_op("(") and self.ahead(1)[1] in MODS and self.take()
        if self.accept(*MODS):
            unit = ("mod", expression(self.factor()))
            if not self.congruence:  # without parentheses, 17 mod 5 is the number 2; 17 (mod 5) is a residue class
                node = call("mod", node, unit[1])
        if in_parentheses:
            self.expect(")")
        return ("unit", node, unit) if unit else node

    def sign(self) -> Node:
        """Reads the signs at the current token and returns their product. The sign ± becomes a symbol that
        expand_signs later replaces by +1 and -1."""
        sign = ONE
        while op := self.accept("+", "-", "±", "∓"):
            if op == "-":
                sign = negative(sign)
            elif op == "±":
                self.signs += 1
                sign = mul(sign, sym(f"±{self.signs}"))
            elif op == "∓":
                sign = mul(sign, MINUS_ONE, sym("±0"))
            if op in "±∓":
                self.accept("*")
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
            if op := self.accept("*", "/"):
                factor = mul(self.sign(), self.factor()) if self.is_op("+", "-") else self.factor()
                factors.append(power(factor, MINUS_ONE) if op == "/" else factor)
            elif self.starts_factor():
                factors.append(self.factor())
            else:
                return mul(*factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        kind, value = self.token
        if kind == "NUM":
            return self.tokens[self.at - 1][0] != "NUM" or self.tokens[self.at - 2] == ("OP", "^")
        if kind == "OP":
            if value == "|":
                return not self.bars and not self.bar_separates
            is_group = value == "(" and self.ahead(1)[1] not in MODS and not self.is_unit()
            return is_group or value in ("[", "{", "⌊", "⌈")
        return kind in ("NAME", "FUNC", "COMMAND", "BEGIN")

    def factor(self) -> Node:
        node = self.primary()
        while self.token[0] == "OP":
            value = self.token[1]
            if self.accept("^"):
                node = self.superscript(node)
            elif self.accept("!"):
                node = call("!!" if self.accept("!") else "!", node)
            elif value == "_" and node[0] == "num" and node[1].denominator == 1 and node[1] >= 0:
                self.take()
                node = in_base(str(node[1]), self.script_text())
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
        exponent = self.script()
        if exponent == MINUS_ONE and base[0] == "sym" and base[1] in "fgh" and self.is_op("("):
            return self.name(base[1] + "^-1")
        return power(base, exponent)

    def script(self) -> Node:
        """Reads an exponent: a braced group, or a signed primary, which may have an exponent of its own, as in
        2^3^2."""
        sign = self.sign() if self.is_op("-", "+") else ONE
        node = self.single()
        if self.accept("^"):
            node = self.superscript(node)
        return node if sign == ONE else mul(sign, node)

    def single(self) -> Node:
        """Reads an exponent, a radicand or the base of a logarithm. An exponent is no mixed number, so 2^3\\frac12 is
        2^3 times 1/2, which is 4."""
        return read_literal(self.take()) if self.token[0] == "NUM" else self.primary()

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
        if kind in READERS:
            return getattr(self, READERS[kind])(value)
        if kind == "CURRENCY":
            self.currency = value
            return self.factor()
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

    def words(self, words: str) -> Node:
        """Reads words that are an answer or the name of a value, as in \\text{Area of }ABC = 5. Words directly before
        a value make the answer unreadable."""
        is_value = self.at > 1 and self.tokens[self.at - 2][0] == "REL"
        while self.token[0] == "TEXT":
            words += " " + self.take()
        alone = self.token[0] in ("SEP", "END", "END_ENV") or self.is_op(")", "]", "}", "\\}", "&", "|")
        goes_on = self.token[0] == "NAME" or self.is_op("(")
        is_name = not self.starts_factor() or (goes_on and any(kind == "REL" for kind, _ in self.tokens[self.at :]))
        if (is_value or not alone) and not (is_name and NO_NAME.isdisjoint(words.lower().split())):
            raise Unreadable(f"the words {words!r} stand before {self.token[1]!r}")
        return sym(words if len(words) == 1 else words.lower())

    def number(self, literal: str) -> Node:
        node = read_literal(literal)
        if literal.isdigit():
            if self.token in (("COMMAND", "frac"), ("COMMAND", "dfrac"), ("COMMAND", "tfrac")):
                part = self.primary()
                mixed = part[0] == "num" and 0 < part[1] < 1
                return add(node, part) if mixed else mul(node, part)
            # an answer such as 3 1/2 is a mixed number
            if [self.token[0], self.ahead(1), self.ahead(2)[0]] == ["NUM", ("OP", "/"), "NUM"]:
                top, bottom = read_literal(self.take()), read_literal(self.ahead(1)[1])
                self.at += 2
                return add(node, divide(top, bottom))
            if self.accept("_"):
                return in_base(literal, self.script_text())
        return node

    def name(self, name: str) -> Node:
        """Reads a variable with subscript and primes, or the application of an unknown function such as f(x), u(t),
        I(0) or t(0,4]."""
        self.degrees |= name == "°"
        if self.accept("_"):
            name += "_" + self.script_text()
        while self.accept("'"):
            name += "'"
        if name not in CONSTANTS and self.is_op("(") and self.is_application(name):
            self.take()
            inside = self.sequence("(")
            _, opening, closing, arguments = inside if inside[0] == "seq" else ("seq", "(", ")", (inside,))
            return ("fn", name + opening + closing, arguments)
        return sym(name)

    def function(self, name: str) -> Node:
        exponent = base = None
        while mark := self.accept("^", "_"):
            if mark == "^":
                exponent = self.script()
            else:
                base = self.log_base()
        if name in ("min", "max", "gcd", "lcm") and self.accept("(", "[", "\\{"):
            args = self.items()
            self.expect(")", "]", "\\}")
            return call(name, *args)
        inverse = exponent == MINUS_ONE and "arc" + name in FUNCTIONS
        argument = expression(self.argument())
        node = function_value("arc" + name if inverse else name, argument, base)
        return node if inverse or exponent is None else power(node, exponent)

    def log_base(self) -> Node:
        kind, value = self.token
        if kind == "NUM" and len(value) > 1 and value.isdigit() and self.ahead(1)[0] in ("END", "REL", "SEP"):
            # \log_28 without an argument behind it is the logarithm of 8 to base 2
            self.tokens[self.at] = ("NUM", value[1:])
            return read_literal(value[0])
        return expression(self.single())

    def argument(self) -> Node:
        """Reads the argument of a function: (…), {…}, or the product up to the next function, sign or division. A
        division by a number belongs to the argument if π is a factor, as in \\sin 2 \\pi t / 3."""
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
            if self.accept("["):
                index = expression(self.sum())
                self.expect("]")
            inside = expression(self.single())
            odd = index[0] == "num" and index[1].denominator == 1 and index[1] % 2 == 1
            return call("root", inside, index) if odd else power(inside, power(index, MINUS_ONE))
        if name == "mathbb":
            letter = self.script_text()
            return REALS if letter == "R" else sym("set " + letter)
        if name in ACCENTS:
            return self.name(f"{'vec' if name == 'overrightarrow' else name} {self.script_text()}")
        if name in ("angle", "triangle", "measuredangle"):
            letters = name.replace("measured", "")
            while self.token[0] == "NAME":
                letters += " " + self.take()
                if self.accept("_"):
                    letters += "_" + self.script_text()
            return sym(letters)
        if name in ("sum", "prod", "int", "lim"):
            return self.big_operator(name)
        raise Unreadable(f"\\{name} is not expected where it stands")

    def fraction(self) -> Node:
        start = self.at
        top = self.digit_or_group()
        middle = self.at
        bottom = self.digit_or_group()
        texts = [
            "".join(v for _, v in self.tokens[a:b] if v not in "{}") for a, b in ((start, middle), (middle, self.at))
        ]
        if all(t[:1] in ("d", "∂") for t in texts) and re.fullmatch(r"[d∂](\^\d)?\w'?(\^\d)?", texts[1]):
            return sym("/".join(texts))  # a derivative such as dM/dt is one symbol, not a division
        return divide(top, bottom)

    def digit_or_group(self) -> Node:
        """Reads an argument of \\frac or \\binom: a braced group or, as in TeX, one digit or symbol."""
        kind, value = self.token
        if kind == "NUM" and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = ("NUM", value[1:])
            return read_literal(value[0])
        if self.is_op("{") or kind in ("NUM", "NAME", "COMMAND"):
            return expression(self.primary())
        raise Unreadable("a fraction has no argument")

    def inside(self, bar_separates: bool = False) -> list[Node]:
        """Reads the items inside brackets. A bar | inside the brackets never closes a bar that was opened outside."""
        saved = self.bars, self.bar_separates
        self.bars, self.bar_separates = 0, bar_separates
        items = self.items()
        self.bars, self.bar_separates = saved
        return items

    def sequence(self, opening: str) -> Node:
        """Reads parentheses or brackets. Brackets around one item only group it; brackets around several items make a
        tuple, point or interval."""
        items = self.inside()
        closing = self.expect(")", "]")
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        return ("seq", opening, closing, tuple(items))

    def braces(self) -> Node:
        items = self.inside()
        if self.accept("choose"):
            items = [call("binom", items[0], self.sum())]
        self.expect("}")
        return items[0] if len(items) == 1 else ("set", tuple(x for item in items for x in expand_signs(item)))

    def set(self) -> Node:
        if self.accept("\\}"):
            return ("set", ())
        items = self.inside(bar_separates=True)
        if self.accept("|"):
            items = [("builder", items[0], tuple(self.inside()))]
        self.expect("\\}")
        return set_of(items)

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
        if re.fullmatch(LISTS, name):
            items = self.items()
            if self.take() != name:
                raise Unreadable(f"\\begin{{{name}}} is never ended")
            return usual_form(items)
        rows: list[list[Node]] = [[]]
        while self.token[0] != "END_ENV":
            rows[-1].append(self.item())
            if self.token == ("SEP", "\\\\"):
                self.take()
                rows.append([])
            elif self.token[0] != "END_ENV":
                self.expect("&")
        self.take()
        return matrix_of(name, [row for row in rows if row])

    def big_operator(self, name: str) -> Node:
        """Reads a sum, product, integral or limit. Sums and products over up to 100 whole numbers are written out
        term by term. All other sums, products, integrals and limits become opaque functions, which equal only
        themselves."""
        low = high = sym("")
        while mark := self.accept("_", "^"):
            if mark == "_":
                low = self.item() if not self.is_op("{") else self.primary()
            else:
                high = self.script()
        body = self.term()
        return written_out(name, low, high, body) or ("fn", name, (low, high, body))
