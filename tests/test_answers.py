"""These tests check how answers/ reads and compares answers: labelled pairs, random expressions, hostile strings.

For random expressions sympy, which answers/ does not use, says what is equal.
"""

import random
import sys

import pytest
import sympy
from grading_pairs import ALL_PAIRS

from answers import Unreadable, equal, read
from reward import check_gold, is_equivalent

MOST_CALLS = 500_000  # the most function calls allowed for comparing a text with four answers, about 0.2 s
LETTERS = sympy.symbols("x y z")


# each test compares all pairs of one form, such as fractions, because starting a test is slow
@pytest.mark.parametrize("form", sorted({form for form, *_ in ALL_PAIRS}))
def test_labelled_pairs(form):
    pairs = [pair[1:] for pair in ALL_PAIRS if pair[0] == form]
    assert [(a, b, is_equivalent(a, b)) for a, b, _ in pairs] == pairs


def test_the_table_is_what_it_claims():
    assert len(ALL_PAIRS) >= 250
    assert sum(not equal for *_, equal in ALL_PAIRS) >= 100
    assert len({pair[1:3] for pair in ALL_PAIRS}) == len(ALL_PAIRS)


def test_every_gold_is_read_and_equals_itself_in_dollars_and_parentheses():
    for gold in sorted({gold for _, _, gold, _ in ALL_PAIRS}):
        check_gold(gold)
        assert is_equivalent(gold, gold), gold
        assert is_equivalent(f" ${gold.strip(' $')}$. ", gold) or gold.startswith("\\[") or "**" in gold, gold


def test_equality_is_symmetric_but_for_decimals_names_and_bases():
    """A unit, or another part that an answer can lack, can be missing in the prediction or in the gold answer. So
    equal answers stay equal when they change places, except decimals, letters of choices and answers with "not"."""
    for a, b in [(prediction, gold) for _, prediction, gold, same in ALL_PAIRS if same]:
        one_sided = "\\text{not" in a or "." in b or "." in a or read(a).option is not None
        assert is_equivalent(b, a) or one_sided, (a, b)


def random_polynomial(rng: random.Random) -> sympy.Expr:
    terms = [
        rng.choice([-3, -2, -1, 1, 2, 3, sympy.Rational(1, 2)]) * rng.choice(LETTERS) ** rng.randrange(1, 4)
        for _ in range(rng.randrange(2, 4))
    ]
    return sum(terms) + rng.randrange(-5, 6)


def random_expression(rng: random.Random) -> sympy.Expr:
    first, second = random_polynomial(rng), random_polynomial(rng)
    kind = rng.randrange(5)
    if kind == 0:
        return first * second
    if kind == 1:
        return first / (second + 7 * LETTERS[0] ** 4)
    if kind == 2:
        return sympy.sqrt(first**2 + 1) * second
    if kind == 3:
        return sympy.exp(LETTERS[1]) * first + sympy.sin(LETTERS[0]) * second
    return first**2 - second


@pytest.mark.parametrize("seed", range(25))
def test_expanding_and_factoring_keep_an_expression_equal(seed):
    expression = random_expression(random.Random(seed))
    text = sympy.latex(expression)
    for other in (sympy.expand(expression), sympy.together(expression), sympy.factor(expression)):
        assert is_equivalent(sympy.latex(other), text), (sympy.latex(other), text)
    assert is_equivalent(sympy.sstr(expression), text), sympy.sstr(expression)


@pytest.mark.parametrize("seed", range(25))
def test_another_coefficient_sign_or_variable_makes_it_unequal(seed):
    rng = random.Random(seed)
    expression = random_expression(rng)
    x, y, _ = LETTERS
    others = (
        expression + sympy.Rational(1, 1000),
        expression + x,
        -expression,
        expression * 2,
        expression.subs({x: y, y: x}, simultaneous=True),
        expression.subs(x, sympy.Symbol("X")),
    )
    point = {name: sympy.Rational(k, 7) for name, k in zip("xyzX", (10, 3, 9, 2))}
    for other in others:
        same = bool(abs((other - expression).evalf(40, subs=point)) < 1e-20)
        assert is_equivalent(sympy.latex(other), sympy.latex(expression)) is same, (other, expression)


@pytest.mark.parametrize("seed", range(25))
def test_constants_agree_with_sympy(seed):
    rng = random.Random(seed)
    roots = [sympy.sqrt(rng.choice([2, 3, 5, 6, 12, 50])) * sympy.Rational(rng.randrange(-4, 5), rng.randrange(1, 5))]
    value = (roots[0] + rng.randrange(1, 6)) * (sympy.pi if seed % 3 == 0 else sympy.sqrt(2) + 1)
    other = value + rng.choice([0, 0, sympy.Rational(1, 10**12), sympy.sqrt(2) - sympy.sqrt(3)])
    same = bool(abs((value - other).evalf(40)) < 1e-20)
    assert is_equivalent(sympy.latex(sympy.nsimplify(sympy.expand(other))), sympy.latex(value)) is same


@pytest.mark.parametrize("seed", range(25))
def test_sets_are_free_in_order_and_tuples_are_not(seed):
    rng = random.Random(seed)
    items = rng.sample(["1", "-2", "\\frac{3}{4}", "\\sqrt{2}", "x+1", "(1,2)", "0.75001", "10"], rng.randrange(2, 6))
    mixed = rng.sample(items, len(items))
    joined, other = ", ".join(items), ",".join(mixed)
    assert is_equivalent(f"\\{{{other}\\}}", f"\\{{{joined}\\}}")
    assert is_equivalent(other, joined)
    assert is_equivalent(f"({other})", f"({joined})") is (items == mixed)
    assert not is_equivalent(other.rsplit(",", 1)[0] if "(" not in mixed[-1] else "7", joined)


CONGRUENCES = [
    "x \\equiv {r} \\pmod {{{m}}}", "x \\equiv {r} \\bmod {m}", "x ≡ {r} (mod {m})", "{r} \\equiv x \\pmod{{{m}}}",
    "x = {r} \\pmod {m}", "{r} \\pmod {m}", "x \\equiv {r} \\text{{ (mod {m})}}", "{r} \\bmod {m}",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_congruences_agree_where_modulus_and_residues_do(seed):
    rng = random.Random(seed)
    for _ in range(60):
        (r, m), (s, n) = [(rng.randrange(-9, 20), rng.randrange(2, 8)) for _ in range(2)]
        one, other = rng.choice(CONGRUENCES).format(r=r, m=m), rng.choice(CONGRUENCES).format(r=s, m=n)
        assert is_equivalent(one, other) is (m == n and (r - s) % m == 0), (one, other)
        residues = [rng.randrange(-5, 15) for _ in range(rng.randrange(1, 4))]
        shifted = [x + m * rng.randrange(-2, 3) for x in rng.sample(residues, len(residues))]
        others = rng.choice([shifted, shifted[:-1], [*shifted[:-1], shifted[-1] + 1], [*shifted, shifted[0]]])
        either = " \\text{ or } ".join(map(str, residues))
        one = f"x \\equiv {either} \\pmod {m}"
        other = f"x ≡ {', '.join(map(str, others))} mod {m}"
        same = sorted(x % m for x in residues) == sorted(x % m for x in others)
        assert not others or is_equivalent(one, other) is same, (one, other)


UNIT_NAMES = "ml L gal kg g mg lb cm m km in ft min sec hr day week dollars cents EUR apples %"
UNITS = UNIT_NAMES.split()
UNIT_FORMS = [
    "12 {}", "12 \\text{{ {}}}", "12 ({})", "12 \\text{{ ({})}}", "12\\,(\\text{{{}}})", "x = 12 \\text{{ {}}}",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_not_another_unit_however_it_is_written(unit):
    rng = random.Random(unit)
    for other in UNITS:
        one, two = rng.choice(UNIT_FORMS).format(unit), rng.choice(UNIT_FORMS).format(other)
        assert other == unit or not is_equivalent(one, two), (one, two)
    assert all(is_equivalent(form.format(unit), "12") for form in UNIT_FORMS if "text" in form) or unit == "%"


NEGATING = "not never no wrong false minus negative except half halves unless ten million thousand under inverse"
AROUND = [
    "12 {}", "{} 12", "12 \\text{{ {}}}", "\\text{{{} }}12", "12 ({})", "12 \\text{{ ({})}}", "12\\,(\\text{{{}}})",
    "x = 12 \\text{{ {}}}", "\\text{{{}}} x = 12", "{} x = 12", "12 {} apples", "12 apples {}", "12 \\text{{ cm {}}}",
    "12 (cm {})", "The answer is {} 12", "12 \\text{{ for {} }} x", "\\text{{{}}} = 12", "\\text{{{}}}(12)",
]  # fmt: skip


@pytest.mark.parametrize("word", NEGATING.split())
def test_no_word_that_changes_the_value_is_read_as_a_unit_or_a_name(word):
    for form in AROUND:
        assert not is_equivalent(form.format(word), "12"), form.format(word)


def test_letters_of_several_choices():
    assert is_equivalent("AD", "A, D") and is_equivalent("DA", "A, D")
    assert not is_equivalent("AC", "A, D") and not is_equivalent("AD", "A, D, E") and not is_equivalent("ad", "a, d")


# ------------------------------------------------------------------------------------------------------ hostile input

NESTED = [
    ("{", "1", "}"), ("(", "1", ")"), ("[", "1", "]"), ("\\{", "1", "\\}"), ("\\frac{1}{", "2", "}"),
    ("\\sqrt{", "2", "}"),
    ("\\left(", "x", "\\right)"), ("|", "x", "|"), ("-(", "x", ")"), ("\\sin(", "x", ")"), ("x^{", "2", "}"),
    ("\\text{", "a", "}"), ("\\boxed{", "5", "}"), ("f(", "x", ")"), ("\\begin{pmatrix}", "1", "\\end{pmatrix}"),
    ("\\lfloor ", "x", "\\rfloor "), ("\\binom{2}{", "1", "}"), ("\\sum_{k=1}^{9}(", "k", ")"), ("\\mathrm{1",
    "2", "}"),
]  # fmt: skip
LONG = [
    "9", "1.", "x+", "x^", "-", "+-", "\\sqrt", "\\frac", "\\frac1", "\\sin ", "(", ")", "{", "}", "[", "\\{",
    "|", "||", "^", "_",
    "x_", "!", "5!+", "2006!+", "1/3+", "1,", "1,000,", "(1,2),", "\\pm ", "1\\pm ", "=", "x=", "<", "1<",
    "\\cup ", "(0,1)\\cup ",
    "\\text{a}", "\\text{", "a", "ab ", "\\alpha", "\\", "\\\\", "$", "\\$", "%", "'", "x'", ".", "..", ",",
    "&", "1&", "1\\\\",
    "\\left", "\\begin{matrix}", "\\sum_{k=1}^{99}", "e^", "10^", "2^{", "\\ln ", "f(x)", "\x00", "\t", " ",
    "é", "１", "√", "²",
    "\u202e", "\\infty+", "\\overline{3}", "0.\\overline{3}+", "\\gcd(6,4)", "\\arctan ", "\\log_", "\\circ",
    "^\\circ", "or ",
    "\\mathbb{R}\\setminus\\{1\\}", "1:", "3 1/2 ", "\\dfrac{1}{2}\\frac", "\\d", "d/d", "\\binom{9}{4}",
    "0.1", "1e9", "\\approx1",
]  # fmt: skip
SINGLE = [
    "", " ", "$", "$$", "{}", "\\", "\\boxed{}", "()", "9^9^9^9", "9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}",
    "(10^{10})!", "99999!",
    "999!!!!!!", "1e999999999", "10^{10^{10}}", "-10^{99999999}", "1/0", "0/0", "0^0", "0^{-1}", "\\log 0",
    "\\log_1 5", "\\log_0 1",
    "\\tan(90^\\circ)", "e^{e^{e^{e^9}}}", "\\exp(\\exp(\\exp(\\exp(9))))", "\\binom{10^9}{5\\cdot10^8}",
    "\\binom{x}{10^{30}}",
    "x^{x^{x^{x^x}}}", "\\sin(10^{3000})", "\\Gamma(10^9)", "\\sum_{k=1}^{10^9} k", "\\prod_{k=1}^{99} k^{k^k}",
    "\\sum_{n=1}^{100}(i!!+n)!!", "x+\\sum_{n=1}^{90}(n+i)!!",
    "\\sum_{a=1}^{99}\\sum_{b=1}^{99}\\sum_{c=1}^{99} abc", "\\pm\\pm\\pm\\pm\\pm 1",
    "\\frac{1}{10^{-99999}}", "7^{7^{7}}-7^{7^{7}}",
    "\\gcd(10^{99}, 0)", "5 \\bmod 0", "\\sqrt[0]{5}", "\\sqrt[10^9]{5}", "(-1)^{10^{400}}", "1_1", "9_8",
    "12_{99}", "\\frac{}{}",
    "\\begin{pmatrix}1&2\\\\3\\end{pmatrix}", "\\begin{pmatrix}", "\\end{pmatrix}", "\\begin{evil}1\\end{evil}",
    "__import__('os').system('true')", "exec('1')", "eval(1)", "().__class__.__bases__[0].__subclasses__()",
    "lambda: 0", "5 if 1 else 0",
    "open('/dev/zero').read()", "{{7*7}}", "${7*7}", "%s%s%s%n", "\\input{/etc/passwd}", "\\write18{true}",
    "\\def\\a{\\a}\\a",
    "\\newcommand{\\x}{\\x\\x}\\x", "\\csname end\\endcsname", "5\x00", "\x1b[2J", "5\u202e", "\ud800", "🙂",
    "NaN", "nan", "inf/inf",
    "None", "null", "undefined", "True", "5; drop table answers", "5 or 6 or 7 or 8", "any number",
    "the right answer",
    "5=5=5=6", "5 \\approx 6", "\\{5, 6\\}", "\\{x \\mid x\\}", "\\text{5 or }6", "5 \\ne 6", "5 \\text{ or any}",
]  # fmt: skip


def hostile() -> list[str]:
    nested = [opening * n + core + closing * n for opening, core, closing in NESTED for n in (30, 5_000)]
    return SINGLE + nested + [piece * n for piece in LONG for n in (40, 900, 100_000)]


@pytest.mark.parametrize("text", hostile(), ids=lambda text: repr(text[:20]) + str(len(text)))
def test_hostile_strings_are_wrong_and_quick(text):
    """The test counts function calls instead of seconds, which depend on what else the machine does."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        compare_with_answers(text)
    finally:
        sys.setprofile(None)
    assert calls < MOST_CALLS


def compare_with_answers(text: str) -> None:
    for gold in ("5", "x^2+1", "(0,1)", "\\text{even}"):
        assert is_equivalent(text, gold) is False or (text.strip("1 .") == "" and gold == "1")
        assert is_equivalent(gold, text) is False


MARKS = (
    r"{ } ( ) [ ] ^ _ | , = < ! % : ' / ± 9 0 e i x - + . & \frac \sqrt \pm \cup \\ ^\circ \{ \} \infty \ln \text{a}"
)
PIECES = MARKS.split()


@pytest.mark.parametrize("seed", range(8))
def test_mangled_answers_are_read_or_unreadable_and_nothing_else(seed):
    rng = random.Random(seed)
    for _ in range(500):
        _, prediction, gold, _ = rng.choice(ALL_PAIRS)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(prediction) + 1)
            cut = rng.choice((0, 0, 1, 2))
            prediction = prediction[:at] + rng.choice([*PIECES, ""]) + prediction[at + cut :]
        try:
            assert isinstance(equal(read(prediction), read(gold)), bool)
            assert isinstance(equal(read(gold), read(prediction)), bool)
        except Unreadable as error:
            assert str(error)


def test_there_are_enough_hostile_strings():
    assert len(set(hostile())) >= 300


UNREADABLE = ["", "  ", "$$", "1/0", "\\frac{1}{", "(1,2", "\\unknown{5}", ",1", "5 5", "x +", "91_8", "\x00"]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_says_why(text):
    with pytest.raises(Unreadable, match=r"."):
        read(text)
