"""How tests are shared among processes; tiny models made in the test; one thread, so that sums have one order; what a
command refuses."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from methods import METHODS, Method
from reward import Reward
from support import adapters
from support.config import Config
from support.distributed import trained

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that a test starts

# ---- which process runs which tests

LONGEST = (  # started first, so that no process waits for another at the end
    *("6_change_it", "9_to_real_models", "8_grading_and_evaluation", "2_every_method_is_a_weight"),
    *("test_distributed", "test_faults", "test_train", "5_one_step_with_shapes", "test_eval", "4_a_run"),
    *("test_hostile_folders", "test_hostile", "test_step", "test_real_models", "test_answers", "test_study"),
)
QUICK = ("test_loss", "test_methods", "test_sample", "test_step", "test_model", "test_reward", "test_one_file")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Files that are named run in this process, where a debugger works; all of them in up to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if config.option.file_or_dir else min(4, cores)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays in one process, for what its tests share; of the notebooks' file each notebook."""
    for item in items:
        called = getattr(item, "callspec", None)
        path = called.params.get("path") if called and item.path.stem == "test_notebooks" else None
        item.add_marker(pytest.mark.xdist_group(path.stem if path else item.path.stem))
        if item.path.stem in QUICK:
            item.add_marker("quick")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.get_closest_marker("xdist_group").args[0], len(place)))


# how a test starts a process that needs PyTorch: as a copy of its own where that is safe, which spares the imports
START = "fork" if sys.platform == "linux" else "spawn"

# ---- what tests share

BY_LENGTH = Reward(
    "by length", lambda text, problem: float(len(text) % 2), lambda problem: None, lambda text: True, "none"
)  # about half right, the same for equal responses
ALL_WRONG = Reward("all wrong", lambda text, problem: 0.0, lambda problem: None, lambda text: True, "none")


@pytest.fixture(autouse=True, scope="module")
def without_a_gpu(request):
    """Where there is a GPU, only the files marked cuda see it: the other tests are written for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("cuda"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained("data/base")


def random_model(vocab_size: int = 103, scale: float = 0.3, seed: int = 0, **config) -> LlamaForCausalLM:
    """A random two-layer Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | config)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0)
    return model.train()


def with_adapters(model: LlamaForCausalLM, config: Config) -> LlamaForCausalLM:
    """`model` with adapters that are not at their start, where they make no difference."""
    adapters.add(model, adapters.of(config))
    for name, parameter in trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def rounding(model: torch.nn.Module, columns: int = 0) -> float:
    """The largest error of what `model` computes in float32, as a share of the largest number: a rounding of 2^-24
    for each number that is summed on the way, forward and back through every matrix and over the batch's columns."""
    inner = sum(parameter.shape[-1] for parameter in model.parameters() if parameter.dim() > 1)
    return (2 * inner + columns) * 2**-24


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder under `folder`, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def command_module(name: str) -> ModuleType:
    """The module with the main() of a command."""
    return importlib.import_module({"sample": "evaluation.try_model"}.get(name, name))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused("train.py", word, …): what the command says to words that it must refuse, with exit code 2, in one
    line, and nothing written in tmp_path, runs/ or evals/."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)

    def listed() -> list[Path]:
        return sorted(path for name in ("runs", "evals") for path in root.glob(f"{name}/*"))

    def ask(command: str, *words: object) -> str:
        before = contents(tmp_path), listed()
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            command_module(command.removesuffix(".py")).main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and len(said) < 1000, said
        assert said.startswith(f"{command}: ") and "Traceback" not in said, said
        assert (contents(tmp_path), listed()) == before
        return said

    return ask


def mechanism(method: Method) -> tuple:
    """What a run or several ranks have to do for a method beside its weights, which are functions of a batch's
    tensors: test_loss and test_step try those of every method."""
    return method.rows, method.stages, method.unsolved, method.entropy_clip == "random", method.hinted


# the first method of each
ONE_OF_EACH = sorted({mechanism(METHODS[name]): name for name in reversed(METHODS)}.values())
