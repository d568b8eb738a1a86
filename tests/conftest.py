"""This file distributes the tests over processes and has the fixtures that test files share.

Slow packages such as PyTorch are imported inside fixtures, because pytest-xdist's first process does not need them.
Functions that test files share are in tiny.py."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# With one thread PyTorch always adds numbers in the same order. PyTorch reads OMP_NUM_THREADS when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ---- which process runs which tests

LONGEST = (  # the longest groups of tests start first, so that no process waits for another at the end
    *("6_change_it", "9_to_real_models", "8_grading_and_evaluation", "2_every_method_is_a_weight"),
    *("test_distributed", "test_faults", "test_train", "5_one_step_with_shapes", "test_eval", "4_a_run"),
    *("test_hostile_folders", "test_hostile", "test_step", "test_real_models", "test_answers", "test_study"),
)
QUICK = ("test_loss", "test_sample", "test_step", "test_model", "test_reward", "test_one_file")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the number of processes in which pytest-xdist runs the tests. If the command line names test files,
    they run in pytest's own process, where a debugger works. The whole suite runs in up to four processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if config.option.file_or_dir else min(4, cores)


def group(test: str) -> str:
    """Returns the group that a test belongs to: its file, or its notebook in test_notebooks.py. The tests of a group
    share fixtures, so they run in one process."""
    file, _, name = test.partition("::")
    notebook = re.search(r"\[(\d+_\w+)\]$", name) if "test_notebooks" in file else None
    return notebook[1] if notebook else Path(file).stem


def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable) -> object:
    """Hands out the tests of each `group` to one process. pytest-xdist's own groups do not work with pytest 9.2,
    which no longer reads the field where pytest-xdist writes them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(group(item.nodeid), len(place)))
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker("quick")


# ---- fixtures


@pytest.fixture(autouse=True, scope="module")
def without_a_gpu(request):
    """Hides a GPU from all test files but those marked cuda, because the other tests are written for the CPU."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("cuda"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # hides the GPU from processes that a test starts
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("data/base")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused("train.py", word, …) runs the command with wrong arguments and returns its error message. The fixture
    checks for exit code 2, a message of one line, and nothing written in tmp_path, runs/ or evals/."""
    from tiny import command_module, contents

    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)

    def listed() -> list[Path]:
        return sorted(path for name in ("runs", "evals") for path in root.glob(f"{name}/*"))

    def ask(command: str, *words: object) -> str:
        before = contents(tmp_path), listed()
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            command_module(command.removesuffix(".py")).main()
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and len(message) < 1000, message
        assert message.startswith(f"{command}: ") and "Traceback" not in message, message
        assert (contents(tmp_path), listed()) == before
        return message

    return ask
