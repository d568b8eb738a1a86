"""These tests check that README.md, the other Markdown files and the comments agree with the code, and that imports
point one way."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

from support.config import Config, methods_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in ("runs", "evals")]
SOURCES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.glob("*.py"))]
DOCUMENTS = [path for path in ROOT.rglob("*.md") if not any(part in ("runs", "evals") for part in path.parts)]


def test_the_table_of_methods_is_generated():
    """Each row of the table in configs/README.md must equal the row that methods_table() writes. A method is allowed
    to have no row."""
    documented = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in documented if line.startswith("| `") and "·" in line]
    assert len(rows) > 20 and set(rows) <= set(methods_table().splitlines())


def test_the_weights_in_readme_are_those_of_the_methods():
    """README's table of six methods has the weights of methods_table(), for the model's and the demonstration's
    tokens."""
    table = {cells[0]: cells[4:6] for cells in map(cells_of, methods_table().splitlines())}
    rows = [cells_of(line) for line in README.splitlines() if line.startswith("| `") and line.count("|") == 5]
    weights = {cells[0]: [cell.split(",")[0] for cell in cells[2:]] for cells in rows if cells[0] in table}
    assert len(weights) == 6 and all(weights[method] == table[method] for method in weights)


def cells_of(line: str) -> list[str]:
    """Returns the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_readme_has_no_gap_left_to_fill_in():
    # in README.md an @ marks a gap to fill in, except in avg@k and pass@k
    assert "@" not in re.sub(r"@[0-9k]", "", README)


@pytest.mark.parametrize(
    "command",
    ["pip install -r requirements.txt && python train.py", "pip install -r requirements-dev.txt && pytest"],
)
def test_the_two_commands_stand_alone(command):
    assert command in README.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_linked_or_named_exists(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    for link in links:
        assert (document.parent / link).exists(), link
    if document == ROOT / "README.md":
        names = re.findall(r"`([\w/]+\.(?:py|md|json)|\w+/)`", text)
        assert len(names) > 10
        for name in names:
            assert (ROOT / name).exists() or name in ("config.json", "eval.json"), name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_comment_or_docstring_names_exists(source):
    with source.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type in (tokenize.COMMENT, tokenize.STRING)]
    note = [t.string for t in tokens if t.type == tokenize.COMMENT or t.string.lstrip("rRbB").startswith('"""')]
    for folder, name in re.findall(r"(?<![\w/])(\w+)/((?:\w+/)*\w+\.py)\b", "\n".join(note)):
        assert (ROOT / folder / name).exists(), f"{folder}/{name}"


def test_every_setting_on_a_command_line_exists():
    fields = set(Config.__dataclass_fields__) | {"config", "help"}
    lines = [line for path in DOCUMENTS for line in path.read_text(encoding="utf-8").splitlines()]
    commands = [line.split("#")[0] for line in lines if re.match(r"\s*(python|torchrun.*) train\.py ", line)]
    assert len(commands) > 5
    for command in commands:
        flags = re.findall(r"--(\w+)", command.split("train.py")[1])
        assert set(flags) <= fields, command


def test_imports_point_one_way():
    """No file of answers/, evaluation/, figures/ or support/ imports a command. loss.py and answers/ import nothing
    else of this project, and reward.py only answers/. step.py, sample.py and model.py import nothing of fast/. No
    imports form a circle."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"answers", "data", "evaluation", "fast", "figures", "support"}
    graph: dict[str, set[str]] = {}
    for path in [*ROOT.glob("*.py"), *(p for folder in ours for p in (ROOT / folder).glob("*.py"))]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        result = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                result |= {w if (ROOT / (w.replace(".", "/") + ".py")).exists() else node.module for w in whole}
            elif isinstance(node, ast.Import):
                result |= {alias.name for alias in node.names}
        graph[name] = {target for target in result if target.split(".")[0] in ours}
    scripts = {"data.prepare", "data.make_base", "data.make_recipes"}  # these files of data/ are commands
    for name, targets in graph.items():
        folder = name.split(".")[0]
        if folder in ("answers", "evaluation", "figures", "support") or name == "data.loader":
            assert not targets & {"train", "eval", "plot", "plan"}, name
        if name == "loss" or folder == "answers":
            assert all(target.split(".")[0] == folder for target in targets), name
        if name in ("step", "sample", "model"):
            assert not any(target.split(".")[0] == "fast" for target in targets), name
        if name == "reward":
            assert all(target.split(".")[0] == "answers" for target in targets)
    order: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join((*path, name))}"
        if name not in order:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            order.append(name)

    for name in graph.keys() - scripts:
        visit(name, ())
