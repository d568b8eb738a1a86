"""Every notebook runs from a fresh kernel, shows figures, and its exercises can be solved.

A notebook's exercises are found by the tags of its cells, in this order for each: "answer" (the cell a student edits;
its metadata "wrong" holds two or more wrong answers), "check" (prints "not yet", "right" or "not right: …") and
"solution" (Markdown with one folded Python block). After the whole notebook has run as it is, every exercise is tried
in the same kernel: unanswered, with each wrong answer, with the solution.
NOTEBOOK_STEPS=4 shortens the runs of those notebooks that train.
"""

import ast
import copy
import os
import re
from functools import cache
from pathlib import Path

import pytest

from notebooks.exercise import check

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")

FOLDER = Path("notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes of a notebook with its outputs
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def text_of(cell) -> str:
    """What the cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def figures_in(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def solution_of(cell) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
    assert "<details>" in cell.source, "a solution is folded"
    return block


@cache
def executed(path: Path):
    """The notebook run as it is, then its exercises tried -> (notebook, tries); a try is (what, its check's cell)."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    as_it_is, tries = len(notebook.cells), []
    answers, checks, solutions = (tagged(notebook, tag) for tag in ("answer", "check", "solution"))
    for answer, asked, solution in zip(answers, checks, solutions):
        candidates = [("unanswered", answer.source)]
        candidates += [("wrong", wrong) for wrong in answer.metadata["wrong"]]
        candidates += [("solved", solution_of(solution))]
        for what, source in candidates:
            again = copy.deepcopy(asked)
            notebook.cells += [nbformat.v4.new_code_cell(source), again]
            tries.append((what, again))
    environment = {"NOTEBOOK_STEPS": "4", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment)
    notebook.cells = notebook.cells[:as_it_is]
    return notebook, tries


@every_notebook
def test_runs_and_shows_figures(path):
    """nbclient raises where a cell fails; as many figures come out as the kept notebook has."""
    notebook, _ = executed(path)
    assert figures_in(notebook) == figures_in(nbformat.read(path, as_version=4)) > 0
    noise = [o for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert not noise


@every_notebook
def test_exercises(path):
    _, tries = executed(path)
    expected = {"unanswered": "not yet", "wrong": "not right: ", "solved": "right\n"}
    assert tries
    for what, cell in tries:
        assert text_of(cell).startswith(expected[what]), (what, cell.source, text_of(cell))


@every_notebook
def test_kept_state(path):
    """What is committed: run top to bottom without an error, unanswered, small."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert all(text_of(cell) == "not yet\n" for cell in tagged(notebook, "check"))
    assert path.stat().st_size < LARGEST
    answers, checks, solutions = (tagged(notebook, tag) for tag in ("answer", "check", "solution"))
    assert 2 <= len(answers) == len(checks) == len(solutions) <= 4
    assert all(len(answer.metadata["wrong"]) >= 2 for answer in answers)


def test_first_cells_are_alike():
    first = {next(c.source for c in nbformat.read(p, as_version=4).cells if c.cell_type == "code") for p in NOTEBOOKS}
    assert len(first) == 1


def names_in(file: Path) -> set[str]:
    """Names that a Python file defines at its top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names |= {getattr(target, "id", getattr(target, "name", None)) for target in targets}
    return names


@every_notebook
def test_links(path):
    """Files that are linked to exist, and [`module.name`](../module.py) names something the module defines."""
    cells = nbformat.read(path, as_version=4).cells
    markdown = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\[([^\]]*)\]\(([^)\s#]+)\)", markdown)
    assert links
    for words, target in links:
        if "://" in target:
            continue
        file = (path.parent / target).resolve()
        assert file.exists(), f"{path}: {target}"
        if file.suffix == ".py" and (named := re.fullmatch(r"`[\w/]*?(\w+)\.(\w+)`", words)) and named[2] != "py":
            assert named[1] == file.stem and named[2] in names_in(file), f"{path}: {words} in {target}"


@pytest.mark.parametrize(
    ("answer", "expected", "says"),
    [
        (None, 1, "not yet"),
        ([1, None], [1, 2], "not yet"),
        (lambda: [None], [1], "not yet"),
        (0.333, 1 / 3, "right"),
        (0.34, 1 / 3, "not right: try"),
        ("None ", "none", "right"),
        ("one", 1, "not right: try"),
        ([1], [1, 2], "not right: try"),
        (float("nan"), 1, "not right: try"),
        (lambda: 1 / 0, 1, "not right: it raised ZeroDivisionError"),
        (object(), 1, "not right: try"),
    ],
)
def test_check(answer, expected, says, capsys):
    check(answer, expected, "try again")
    assert capsys.readouterr().out.startswith(says)
