"""This file has what test files share: tiny random models, rewards, a bound on rounding errors, the contents of a
folder, and one method of each kind."""

import importlib
import sys
from multiprocessing import set_forkserver_preload
from pathlib import Path
from types import ModuleType

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from methods import METHODS, Method
from reward import Reward
from support import adapters
from support.config import Config
from support.distributed import trained

# Tests that need other processes fork them from a server process, which has only imported PyTorch. A fork of the test
# process itself can crash because of what earlier tests have done in it.
START = "forkserver" if sys.platform == "linux" else "spawn"
if START == "forkserver":
    set_forkserver_preload(["torch", "transformers", "matplotlib.pyplot", "IPython", "step"])

BY_LENGTH = Reward(
    "by length", lambda text, problem: float(len(text) % 2), lambda problem: None, lambda text: True, "none"
)  # responses of odd length, about half of all, are right, and equal responses have equal rewards
ALL_WRONG = Reward("all wrong", lambda text, problem: 0.0, lambda problem: None, lambda text: True, "none")


def random_model(vocab_size: int = 103, scale: float = 0.3, seed: int = 0, **config) -> LlamaForCausalLM:
    """Returns a random two-layer Llama whose next-token distributions are far from uniform."""
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
    """Returns `model` with LoRA adapters whose matrices B are random: new adapters have B = 0 and change nothing."""
    adapters.add(model, adapters.of(config))
    for name, parameter in trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def rounding(model: torch.nn.Module, columns: int = 0) -> float:
    """Returns a bound on the rounding error of what `model` computes in float32, as a share of the largest number.
    The bound counts 2^-24 for each number that is summed, forward and backward through every matrix and over
    `columns` tokens of the batch."""
    inner = sum(parameter.shape[-1] for parameter in model.parameters() if parameter.dim() > 1)
    return (2 * inner + columns) * 2**-24


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file under `folder`, by path; a folder is listed too, with no bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def command_module(name: str) -> ModuleType:
    """Returns the module whose main() is the command `name`."""
    return importlib.import_module({"sample": "evaluation.try_model"}.get(name, name))


def mechanism(method: Method) -> tuple:
    """Returns what a method needs of the training loop beside its token weights: rows, stages, the handling of
    unsolved groups, random numbers, demonstrations in the prompt. The weights of every method are tried in
    test_loss.py and test_step.py."""
    return method.rows, method.stages, method.unsolved, method.entropy_clip == "random", method.hinted


# of all methods for which the function `mechanism` returns the same, only the first in METHODS is listed
ONE_OF_EACH = sorted({mechanism(METHODS[name]): name for name in reversed(METHODS)}.values())
