"""These tests check how reward.py finds the box in a response, grades it, and reports faults of answers and
rewards."""

import os
import shutil
import time
from pathlib import Path

import pytest

import reward
from data.loader import Problem, load_problems
from reward import (
    check_gold,
    extract_boxed,
    grade,
    grade_all,
    is_equivalent,
    is_read,
    load_reward,
)

BOXES = [
    ("so \\boxed{42}.", "42"),
    ("\\boxed {42}", "42"),
    ("\\boxed\n{42}", "42"),
    ("\\fbox{42}", "42"),
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{1} then \\fbox{2}", "2"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{x^{2^{3^{4}}}}", "x^{2^{3^{4}}}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
    ("\\boxed{\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}"),
    ("\\boxed{\\boxed{7}}", "\\boxed{7}"),
    ("\\boxed{a} \\boxed{\\boxed{7}", "7"),
    ("\\boxed{}", ""),
    ("\\boxed{5} and an empty \\boxed{}", ""),
    ("\\boxed{5}}}} {{{", "5"),
    ("{{{ \\boxed{5}", "5"),
    ("} \\boxed{5}", "5"),
    ("$n = \\boxed 19$.", "19"),
    ("\\boxed 3\\pmod 9", "3"),
    ("\\boxed -7.", "-7"),
    ("\\boxed\\frac12$", "\\frac12"),
    ("\\boxed 5 or \\boxed 6", "6"),
    ("\\boxed 5 or \\boxed{6}", "6"),
    ("\\boxed{5} or \\boxed 6", "6"),
    ("\\boxed 5 is in the \\boxed !", "5"),
    ("\\boxed{\\boxed 7 m}", "\\boxed 7 m"),
    ("\\boxed{5} cut off in \\boxed{6", "5"),
    ("\\boxed{$6$}", "$6$"),
    ("no box: 42", None),
    ("", None),
    ("\\boxed{42", None),
    ("\\boxed{\\frac{1}{2}", None),
    ("\\boxed", None),
    ("\\boxedx{5}", None),
    ("\\boxed{\\}", None),
    ("boxed{5}", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_extract_boxed(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150000,
        "{" * 10**6,
        "}" * 10**6,
        "\\" * 10**6,
        "\\boxed " * 150000,
        "\\boxed{1}" * 110000,
        "\\boxed{" + "{" * 500000 + "}" * 400000,
        "\\boxed" + " " * 10**6,
        "\\boxed\\a" + "b c" * 300000,
    ],
    ids=lambda text: text[:16],
)
def test_a_megabyte_takes_no_time(text):
    start = time.process_time()
    extract_boxed(text)
    assert grade(text, "5") == 0.0
    assert time.process_time() - start < 3.0


def test_grade_is_one_or_zero():
    assert grade("I think \\boxed{0.5}, no, $\\boxed{\\frac{2}{4}}$.", "\\frac12") == 1.0
    assert grade("\\boxed{\\frac12} or rather \\boxed{3}", "\\frac12") == 0.0
    assert isinstance(grade("\\boxed{1}", "1"), float)
    assert grade("the answer is 4", "4") == 0.0
    assert grade("\\boxed{3} and not -3", "-3") == 0.0
    assert grade("\\boxed{(B)}", "B") == 1.0


def test_a_rounded_gold_accepts_the_fraction_and_not_the_other_way_round():
    assert grade("\\boxed{\\frac13}", "0.333") == 1.0
    assert grade("\\boxed{0.333}", "\\frac13") == 0.0


@pytest.mark.parametrize(
    "prediction, gold",
    [
        ("x + y = 2", "100000x + 100001y = 200000"),
        ("x + 3y = 2.00001", "x + 3y = 2"),
        ("0 < x < 1", "0 < x \\le 1"),
        ("0 < x < 1", "0 \\le x < 1"),
        ("(x, y) = (1, 2)", "(x, y, z) = (1, 2, 3)"),
        ("0 : 1 : 2", "0 : 5 : 7"),
    ],
)
def test_what_is_nearly_the_same_is_not(prediction, gold):
    assert is_equivalent(prediction, prediction) and is_equivalent(gold, gold)
    assert not is_equivalent(prediction, gold) and not is_equivalent(gold, prediction)


@pytest.mark.parametrize("response", [None, 5, b"\\boxed{5}", ["\\boxed{5}"], float("nan")])
def test_a_response_that_is_no_string_is_graded_zero(response):
    assert grade(response, "5") == 0.0
    assert is_read(response) is False
    assert is_equivalent(response, "5") is False


@pytest.mark.parametrize("gold", [None, 5, 5.0, b"5", ["5"]])
def test_a_gold_that_is_no_string_is_the_callers_mistake(gold):
    with pytest.raises(TypeError, match="gold must be a string"):
        grade("\\boxed{5}", gold)
    with pytest.raises(ValueError, match="must be a string"):
        check_gold(gold)


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("\\boxed{5}", True),
        ("\\boxed{\\text{even}}", True),
        ("\\boxed{wrong, 6}", True),
        ("5", False),
        ("\\boxed{5", False),
        ("\\boxed{}", False),
        ("\\boxed{\\frac{1}{}}", False),
        ("\\boxed{1/0}", False),
    ],
)
def test_is_read(response, read):
    assert is_read(response) is read


@pytest.mark.parametrize("gold", ["", " ", "$", "\\frac{1}", "(1, 2", "\\undefined{3}", "1/0", "9" * 5000])
def test_check_gold_names_the_answer_the_reason_and_the_fix(gold):
    with pytest.raises(ValueError, match=r"cannot be read: .+; rewrite it"):
        check_gold(gold)
    assert grade(f"\\boxed{{{gold}}}", gold) == 0.0, "an unreadable gold rewards nobody"


PROSE = [
    "Natalia sold 12 clips.",
    "\\text{Natalia sold } 12 \\text{ clips}",
    "She bought 3 apples and 2 pears for 5 dollars",
    "He has 12",
    "x is 5",
    "the 12",
    "12 not",
    "Each child gets $5",
    "This problem has 2 solutions",
    "No, because 5 is odd",
    "The answer depends on the number of students",
    "\\text{all reals except } 2",
    "if x > 0 then 5",
]


@pytest.mark.parametrize("gold", PROSE)
def test_check_gold_refuses_prose_in_one_line(gold):
    with pytest.raises(ValueError, match=r"cannot be read: [^\n]*(words?|expected|stands)[^\n]*; rewrite it[^\n]*$"):
        check_gold(gold)


def test_check_gold_accepts_words_that_are_an_answer():
    for gold in (
        "east",
        "\\text{Tuesday}",
        "no solution",
        "isosceles right triangle",
        "\\text{Yes}, \\text{No}",
        "12 clips",
        "3 apples and 2 pears",
        "12 \\text{ (weeks)}",
        "\\text{Area} = 5",
        "x^2 \\text{ if } x > 0",
        "C) Days will become shorter.",
        "\\begin{cases} x & \\text{if } x>0 \\\\ 0 & \\text{otherwise} \\end{cases}",
    ):
        check_gold(gold)
        assert is_equivalent(gold, gold)


def test_check_gold_accepts_what_answer_keys_hold():
    for gold in ("042", "$\\frac{1}{2}$", "(B)", "\\text{Evelyn}", "x \\in [-2,7]", "2516_8", "4.5e33", "$69$,$84$"):
        check_gold(gold)


# ---- a reward of one's own

PROBLEM = Problem("p7", "What is half of a cat?", "ca")
OWN = '''
from __future__ import annotations
import dataclasses
import sys

@dataclasses.dataclass
class Scale:
    top: float = 1.0

def reward(response, problem):
    """The share of the answer's letters that the response has."""
    return sum(letter in response for letter in problem.answer) / len(problem.answer)

def fails(response, problem):
    return 1 / 0

def wrong(response, problem):
    return {value}

def ends(response, problem):
    sys.exit()

def lines(response, problem):
    raise ValueError("one\\ntwo")

def check(problem):
    if problem.answer == "dog":
        raise ValueError("no dogs")
    if problem.answer == "cow":
        sys.exit("no\\ncows")
'''


def own(tmp_path, value="2"):
    path = tmp_path / "own.py"
    path.write_text(OWN.replace("{value}", value))
    return path


def test_a_reward_of_ones_own_gives_partial_credit(tmp_path):
    path = own(tmp_path)
    result = load_reward(str(path))
    assert result.name == f"{path}:reward" and result.function("cat", PROBLEM) == 1.0
    assert grade_all(result, ["cat", "act", "xc"], [PROBLEM] * 3) == [1.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="no dogs"):
        result.check(Problem("p", "x", "dog"))
    assert result.fingerprint != load_reward("math").fingerprint
    before = result.fingerprint
    path.write_text(path.read_text() + "\n")
    assert load_reward(f"{path}:reward").fingerprint != before


@pytest.mark.parametrize(
    "value, want",
    [
        ("0.7 + 0.2 + 0.1", 1.0),
        ("0.1 + 0.2 + 0.7 + 1e-16", 1.0),
        ("1.1 - 0.1 + 2e-16", 1.0),
        ("0.1 + 0.2", 0.3),
        ("1e-17", 0.0),
        ("True", 1.0),
        ("np.float32(0.7) + np.float32(0.3)", 1.0),
        ("np.bool_(True)", 1.0),
        ("np.array(0.5)", 0.5),
        ("torch.tensor(0.3)", 0.3),
        ("torch.tensor(True)", 1.0),
        ("Decimal('0.7') + Decimal('0.3')", 1.0),
        ("Fraction(1, 4)", 0.25),
        ("np.int64(1)", 1.0),
    ],
)
def test_a_reward_is_a_number_whatever_made_it(tmp_path, value, want):
    path = own(tmp_path, value)
    names = "import numpy as np\nimport torch\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    path.write_text(f"{path.read_text()}\n{names}")
    rewards = grade_all(load_reward(f"{path}:wrong"), ["x"], [PROBLEM])
    assert rewards == [want] and type(rewards[0]) is float


def test_the_fingerprint_of_math_is_that_of_all_its_code(tmp_path, monkeypatch):
    """The fingerprint of the reward `math` covers reward.py and every file of answers/."""
    here = Path(reward.__file__)
    files = [here, *here.with_name("answers").glob("*.py")]
    (tmp_path / "answers").mkdir()
    copies = [shutil.copy(file, tmp_path / file.relative_to(here.parent)) for file in files]
    monkeypatch.setattr(reward, "__file__", str(copies[0]))
    result = [load_reward("math").fingerprint]
    assert len(files) > 8 and result[0] == reward.MATH.fingerprint
    for copy in copies:
        copy.write_text(copy.read_text() + "# another\n")
        result.append(load_reward("math").fingerprint)
    assert len(set(result)) == len(files) + 1


@pytest.mark.parametrize(
    "spec, message",
    [
        ("maths", "reward is 'maths', expected math, exact, or a Python file"),
        ("{folder}/none.py", "does not exist"),
        ("{folder}/own.py:rewards", "has no function rewards"),
        ("{folder}/broken.py", "cannot be run: SyntaxError"),
        ("{folder}/ends.py", "cannot be run: SystemExit: 0"),
        ("{folder}/lines.py", "cannot be run: one two"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_line(tmp_path, spec, message):
    own(tmp_path)
    for name, code in {
        "broken": "def reward(:",
        "ends": "raise SystemExit(0)",
        "lines": "raise ValueError('one\\ntwo')",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        load_reward(spec.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_reward_that_changes_the_working_directory_is_told(tmp_path):
    before, path = os.getcwd(), own(tmp_path)
    (tmp_path / "moves.py").write_text("import os\nos.chdir('/')\n")
    with pytest.raises(ValueError, match=r"cannot be run: the code changes the working directory: name files"):
        load_reward(str(tmp_path / "moves.py"))
    path.write_text(path.read_text() + "\ndef moves(text, problem):\n    import os\n    os.chdir('/')\n")
    with pytest.raises(ValueError, match="failed on problem 'p7': the code changes the working directory"):
        grade_all(load_reward(f"{path}:moves"), ["x"], [PROBLEM])
    path.write_text(path.read_text() + "    raise OSError('my tool failed')\n")
    with pytest.raises(ValueError, match="my tool failed"):
        grade_all(load_reward(f"{path}:moves"), ["x"], [PROBLEM])
    assert os.getcwd() == before


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("fails", "0", r"failed on problem 'p7': ZeroDivisionError: .* \(\S+own.py:\d+\)$"),
        ("ends", "0", "failed on problem 'p7': SystemExit"),
        ("lines", "0", r"failed on problem 'p7': one two \(\S+own.py:\d+\)$"),
        ("wrong", "int('x')", r"failed on problem 'p7': invalid literal .*: 'x' \(\S+own.py:\d+\)$"),
        ("wrong", "10 ** 400", "failed on problem 'p7': OverflowError"),
        ("wrong", "1j", "gave 1j on problem 'p7'"),
        ("wrong", "__import__('numpy').zeros((3, 3))", r"gave array\(\[\[0., 0., 0.\], \[0."),
        ("wrong", "'long' * 1000", "gave 'long.{0,80} on problem"),
        ("wrong", "2", "gave 2 on problem 'p7', expected a number from 0 to 1"),
        ("wrong", "-0.1", "gave -0.1"),
        ("wrong", "float('nan')", "gave nan"),
        ("wrong", "'1'", "gave '1'"),
        ("wrong", "None", "gave None"),
        ("wrong", "1.001", "gave 1.001"),
        ("wrong", "[1.0]", r"gave \[1.0\]"),
    ],
)
def test_what_a_reward_gives_is_checked(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        grade_all(load_reward(f"{own(tmp_path, value)}:{name}"), ["x"], [PROBLEM])
    assert "\n" not in str(error.value)


def test_a_check_of_ones_own_that_ends_the_program_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "?", "answer": "cow"}')
    with pytest.raises(ValueError, match=r"a.jsonl:1: SystemExit: no cows \(\S+own.py:\d+\)$"):
        load_problems(tmp_path / "a.jsonl", load_reward(str(own(tmp_path))))


def test_exact_compares_the_text_in_the_box():
    result = load_reward("exact")
    golds = [Problem("p", "?", "cat")] * 4
    assert grade_all(result, ["\\boxed{ cat }", "\\boxed{act}", "cat", "\\boxed{cat"], golds) == [1.0, 0.0, 0.0, 0.0]
    # to the reward `math`, "act" and "cat" are equal products of three letters
    assert grade_all(load_reward("math"), ["\\boxed{act}"], golds[:1]) == [1.0]
    assert not result.is_read("cat") and result.is_read("\\boxed{x}")
    with pytest.raises(ValueError, match="answer is empty"):
        result.check(Problem("p", "?", " "))
