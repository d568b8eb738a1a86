"""These tests check that every notebook runs and shows its figures, and that its exercises can be solved.

Exercises are found by the tags of their cells. A student edits the cell "answer", whose metadata "wrong" holds two or
more wrong answers. The cell "check" prints "not yet", "right" or "not right: …". The cell "solution" is Markdown with
one folded Python block. After the notebook has run, every exercise is tried in the same interpreter: unanswered, with
each wrong answer, with the solution. NOTEBOOK_SIZE=2 makes runs shorter and takes fewer problems; accuracy is
measured on every eighth held-out problem. Each notebook has its own IPython shell without a Jupyter kernel, because
nine kernels that import PyTorch take a minute. On Linux the processes of the shell, and of the commands that a
notebook starts, are forks of a process that has imported PyTorch.
"""

import ast
import contextlib
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import lives
import numpy as np
import pytest
import torch
from tiny import START

import step as steps
import train
from notebooks.exercise import check

pytest.importorskip("IPython", reason="pip install -r requirements-dev.txt")

FOLDER = Path("notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000  # the most bytes that a notebook with its outputs is allowed to have
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tagged(cells: list[dict], tag: str) -> list[dict]:
    return [cell for cell in cells if tag in cell["metadata"].get("tags", ())]


def exercises(cells: list[dict]) -> list[tuple]:
    """Returns the cells (answer, check, solution) of each exercise."""
    return list(zip(*(tagged(cells, tag) for tag in ("answer", "check", "solution")), strict=True))


def text_of(cell: dict) -> str:
    """Returns the printed text that is stored in a cell."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def figures_in(displayed: list[dict]) -> int:
    """Returns the number of figures among outputs. An output that updates an earlier one, by its id, replaces the
    earlier one."""
    figures = {}
    for place, output in enumerate(displayed):
        key = (output.get("transient") or {}).get("display_id", place)
        figures[key] = "image/png" in output.get("data", {})
    return sum(figures.values())


def solution_of(cell: dict) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", source(cell), re.DOTALL)
    assert "<details>" in source(cell), "a solution is folded"
    return block


def run_script(words: list[str], ranks: int) -> tuple[int, str, str]:
    """Runs `python WORDS` in forks of this process, one per rank as torchrun does, and returns exit code, stdout and
    stderr."""
    with tempfile.TemporaryDirectory() as name:
        printed = Path(name) / "stdout"

        def work() -> int:
            sys.argv = words
            with printed.open("a") as sys.stdout:
                runpy.run_path(words[0], run_name="__main__")
            return 0

        life = lives.live(work, Path(os.devnull), ranks=ranks)
        return life.code, printed.read_text(), life.output


@contextlib.contextmanager
def commands_in_copies() -> Iterator[None]:
    """Replaces subprocess.run for Python scripts: a helper process that runs no notebook cell forks itself for each
    script."""
    with ProcessPoolExecutor(1, get_context("fork")) as launcher:
        launcher.submit(int).result()  # this call forks the helper process before any notebook cell is run

        def run(words: list[str], **_: object) -> subprocess.CompletedProcess:
            script = next(place for place, word in enumerate(words) if word.endswith(".py"))
            ranks = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
            return subprocess.CompletedProcess(words, *launcher.submit(run_script, words[script:], ranks).result())

        subprocess.run = run
        yield


def measure_less() -> None:
    """Makes train.py measure accuracy on every eighth held-out problem only."""
    accuracy = train.accuracy

    def of_every_eighth(run: steps.Run, *words: object) -> dict:
        held = {name: (problems[::8], encoded[::8]) for name, (problems, encoded) in run.data.held.items()}
        return accuracy(dataclasses.replace(run, data=dataclasses.replace(run.data, held=held)), *words)

    train.accuracy = of_every_eighth


def run_sources(folder: Path, sources: list[str]) -> list[tuple[str, str, list[dict]]]:
    """Run cells one after the other in `folder`, and return stdout, stderr and displayed outputs of each."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    class Shell(InteractiveShell):
        def enable_gui(self, gui: str | None = None) -> None:
            """Opens no window, because the figures of `%matplotlib inline` need none."""

    os.environ["NOTEBOOK_SIZE"] = "2"
    measure_less()
    told = []
    with commands_in_copies() if START == "forkserver" else contextlib.nullcontext():
        os.chdir(folder)
        shell = Shell.instance(colors="nocolor")
        for text in sources:
            with capture_output() as captured:
                done = shell.run_cell(text)
            assert done.success, f"{text}\n{captured.stdout}"
            shown = [] if done.result is None else [{"data": shell.display_formatter.format(done.result)[0]}]
            told.append((captured.stdout, captured.stderr, [*captured._outputs, *shown]))
    return told


def executed(path: Path) -> tuple[list, list]:
    """Runs the notebook, then tries its exercises. Returns the outputs of the notebook's code cells, and for each try
    its kind, answer and check output."""
    cells = read(path)
    sources, tries = [source(cell) for cell in cells if cell["cell_type"] == "code"], []
    code = len(sources)
    for answer, asked, solution in exercises(cells):
        candidates = [("unanswered", source(answer))]
        candidates += [("wrong", wrong) for wrong in answer["metadata"]["wrong"]]
        candidates += [("solved", solution_of(solution))]
        for what, text in candidates:
            sources += [text, source(asked)]
            tries.append((what, text))
    context = get_context(START)
    with ProcessPoolExecutor(1, context) as pool:
        told = pool.submit(run_sources, path.parent, sources).result()
    checks = [printed for printed, *_ in told[code + 1 :: 2]]
    return told[:code], [(*one, printed) for one, printed in zip(tries, checks, strict=True)]


@every_notebook
def test_runs_shows_its_figures_and_checks_its_exercises(path):
    """The run shows as many figures as the committed notebook has, and no warning. One test checks both figures and
    exercises, because a notebook is run only once."""
    told, tries = executed(path)
    kept = [output for cell in read(path) for output in cell.get("outputs", ())]
    assert figures_in([output for *_, displayed in told for output in displayed]) == figures_in(kept) > 0
    assert not "".join(noise for _, noise, _ in told)
    expected = {"unanswered": "not yet", "wrong": "not right: ", "solved": "right\n"}
    assert tries
    for what, answer, printed in tries:
        assert printed.startswith(expected[what]), (what, answer, printed)


@every_notebook
def test_kept_state(path):
    """The committed notebook was run top to bottom without an error, its exercises are unanswered, and it is
    small."""
    cells = read(path)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert path.stat().st_size < LARGEST
    asked = exercises(cells)
    assert 2 <= len(asked) <= 4
    assert all(len(answer["metadata"]["wrong"]) >= 2 and text_of(ask) == "not yet\n" for answer, ask, _ in asked)


def test_first_cells_are_alike_and_outside_the_project_say_so_in_one_line(tmp_path, monkeypatch):
    first = {next(source(cell) for cell in read(path) if cell["cell_type"] == "code") for path in NOTEBOOKS}
    (cell,) = first
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="needs the whole project"):
        exec(cell, {})


def names_in(file: Path) -> set[str]:
    """Returns the names that a Python file defines at its top level."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names |= {getattr(target, "id", getattr(target, "name", None)) for target in targets}
    return names


@every_notebook
def test_links(path):
    """Linked files exist, and the module behind a link [`module.name`](../module.py) defines the name."""
    markdown = "\n".join(source(cell) for cell in read(path) if cell["cell_type"] == "markdown")
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
        (np.int64(3), 3, "right"),
        (np.array([1, 2]), [1, 2], "right"),
        (np.array([1, None]), [1, 2], "not yet"),
        ([np.float32(0.5), torch.tensor(2)], [0.5, 2], "right"),
        (torch.tensor([1.0, 3.0]), [1, 2], "not right: try"),
        (Fraction(1, 3), 1 / 3, "right"),
        (Fraction(1, 2), 1 / 3, "not right: try"),
        (0.64, 1 - 0.95**20, "right"),  # the notebook's text rounds 0.6415… to 0.64
        (0.6, 1 - 0.95**20, "not right: try"),
        (0.39, 0.38728, "right"),
        (0.012, 0.01234, "right"),
        (0.01, 0.01234, "not right: try"),
    ],
)
def test_check(answer, expected, says, capsys):
    check(answer, expected, "try again")
    assert capsys.readouterr().out.startswith(says)
