"""This file computes values of expressions with mpmath to 60 digits or more. The variables get random values.

The work is bounded: an expression that is too large or too slow has no value (None). An opaque function such as f(x),
or a sum that was not written out, gets a random value, which is the same for equal arguments.
"""

import random
from fractions import Fraction
from functools import lru_cache

import mpmath

from .tree import CONSTANTS, DEGREE, FUNCTIONS, Node

POINTS, ENOUGH = 8, 3
WHOLES = [*range(1, 18), 24, 25, 31, 32, 33, 63, 64, 100]
WHOLE_POINTS = range(POINTS, POINTS + len(WHOLES))
DIGITS, SURE_DIGITS = 60, 150
MAX_CALLS = 100  # limit for the functions and powers in one expression
MAX_SCALE = 10**100  # limit for summands: at SURE_DIGITS digits a small number added to MAX_SCALE is not lost

context = mpmath.mp.clone()
context.dps = DIGITS


def is_real(value: mpmath.mpf | mpmath.mpc) -> bool:
    return abs(context.im(value)) <= abs(value) * context.mpf(10) ** -45


def close(p: tuple, g: tuple, digits: int) -> bool:
    """Returns whether two values agree to all but 15 of `digits` digits, relative to the largest summand in their
    computation."""
    scale = max(p[1], g[1], abs(p[0]), abs(g[0]))
    return abs(p[0] - g[0]) <= scale * context.mpf(10) ** (15 - digits)


class _NoValue(Exception):
    """The expression has no value, or its value is too expensive to compute."""


class _Work:
    """Keeps, while one value is computed, the largest summand and the number of functions and powers so far."""

    def __init__(self, index: int):
        self.index, self.scale, self.calls = index, context.mpf(0), 0

    def count(self) -> None:
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise _NoValue


@lru_cache(maxsize=4096)
def value_at(node: Node, index: int, digits: int) -> tuple | None:
    """Returns (value, size of the largest summand) of an expression at random point `index`, or None if it has no
    value there."""
    work = _Work(index)
    context.dps = digits
    try:
        value = _value(node, work)
        return (value, work.scale) if context.isfinite(value) and work.scale < MAX_SCALE else None
    except (_NoValue, ArithmeticError, ValueError):
        return None
    finally:
        context.dps = DIGITS


def exact(value: Fraction) -> mpmath.mpf:
    return context.mpf(value.numerator) / value.denominator


@lru_cache(maxsize=4096)
def _point(name: str | Node, index: int) -> Fraction:
    """Returns the value of variable `name` at random point `index`. Points 0 to 3 have positive values, some below
    and some above 1. Points 4 to 7 have values of either sign. At the points in WHOLE_POINTS every variable is a
    whole number from 1 to 100, taken from the list WHOLES."""
    if index in WHOLE_POINTS:
        return Fraction(random.Random(repr(name)).sample(WHOLES, len(WHOLES))[index - POINTS])
    draw = random.Random(f"{name!r} at {index}")
    value = Fraction(draw.randrange(10**20, 9 * 10**20), 10**21)
    if draw.random() < 0.5:
        value = 1 + 3 * value
    return value if index < 4 or draw.random() < 0.5 else -value


def _value(node: Node, work: _Work):
    kind = node[0]
    if kind in ("num", "dec"):
        return exact(node[1])
    if kind == "sym":
        if node[1] in CONSTANTS:
            return {"π": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[node[1]]
        return context.mpf(1) if node == DEGREE else exact(_point(node[1], work.index))
    if kind == "add":
        total = context.mpf(0)
        for term in node[1]:
            value = _value(term, work)
            total += value
            work.scale = max(work.scale, abs(value))
        return total
    if kind == "mul":
        product = context.mpf(1)
        for factor in node[1]:
            product *= _value(factor, work)
        return product
    work.count()
    if kind == "pow":
        return _power(_value(node[1], work), _value(node[2], work))
    if kind != "fn":
        raise _NoValue
    if node[1] not in FUNCTIONS:
        return exact(_point(node, work.index))
    return _function(node[1], [_value(x, work) for x in node[2]])


def _power(base, exponent):
    if not base:
        if context.re(exponent) > 0:
            return context.mpf(0)
        raise _NoValue
    if abs(exponent) * (abs(context.mag(base)) + 4) > 100_000:
        raise _NoValue
    return base**exponent


def _function(name: str, args: list):
    value = args[0]
    if name == "root":
        return _root(*args)
    if name in ("floor", "ceil", "min", "max", "gcd", "lcm", "mod"):
        if name in ("gcd", "lcm") or not all(map(is_real, args)):
            raise _NoValue
        args = [context.re(x) for x in args]
        if name in ("min", "max"):
            return {"min": min, "max": max}[name](args)
        if name == "mod":
            return args[0] - args[1] * context.floor(args[0] / args[1])
        nearest = context.nint(args[0])
        near = abs(args[0] - nearest) < context.mpf(10) ** -40
        return nearest if near else getattr(context, name)(args[0])
    size = max(context.mag(x) if x else 0 for x in args)
    limits = {"!": 12, "!!": 12, "binom": 12, "sinh": 16, "cosh": 16, "tanh": 16, "coth": 16, "sech": 16, "csch": 16}
    if size > limits.get(name, 4000):
        raise _NoValue
    if name == "ln" and not value:
        raise _NoValue
    # mpmath needs a hundred times longer for the double factorial of a complex number than of a real one
    if name == "!!" and not is_real(value):
        raise _NoValue
    return _FUNCTION_OF[name](*args)


def _root(value, degree):
    """Returns the root of a number. An odd root of a negative real number is the real one, not the principal one."""
    if is_real(value) and context.re(value) < 0:
        return -((-context.re(value)) ** (1 / degree))
    return value ** (1 / degree)


_RENAMED = {"abs": "fabs", "ln": "log", "!": "factorial", "!!": "fac2", "binom": "binomial"}
_FUNCTION_OF = {
    name: getattr(context, _RENAMED.get(name) or name.replace("arc", "a"))  # mpmath's name for arcsin is asin
    for name in FUNCTIONS - {"root", "floor", "ceil", "min", "max", "gcd", "lcm", "mod"}
}
