"""README.md says what the code does."""

import re
from pathlib import Path

import pytest

from loss import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_formula_table_is_the_table_of_methods():
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (\S+) \| (\S+) \| (\w+) \|$", README, flags=re.M)
    guided = {
        "ppo": "I·A·r",
        "zero": "0",
        "static": "{c:g}",
        "mean": "{c:g}·Z/tokens",
        "shaped": "A·γπ/(π+γ)²",
    }
    policy = {"ppo": "I·A·r", "ratio": "A·r"}
    want = [
        (name, m.rows, policy[m.policy], guided[m.guided].format(c=m.coefficient), m.select)
        for name, m in METHODS.items()
    ]
    assert rows == want


@pytest.mark.parametrize(
    "command",
    ["pip install -r requirements.txt && python train.py", "pip install -r requirements-dev.txt && pytest"],
)
def test_the_two_commands_stand_alone(command):
    assert command in README.splitlines()


def test_every_file_that_is_named_exists():
    names = re.findall(r"`([\w/]+\.(?:py|md|json)|\w+/)`", README)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists() or name in ("config.json", "eval.json"), name
