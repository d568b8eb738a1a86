"""The settings of a run are one flat dataclass, `Config`. Settings are read from a JSON file and from --FIELD VALUE
on the command line, and checked before any work.

A wrong field raises an InputError of one line, which names the field, what was found and what was expected. There are
no nested groups of settings, no defaults that depend on the model, and no environment variables.
"""

import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import METHODS, remaining_clipped
from support.command import Parser
from support.errors import InputError
from support.files import read_json

PROJECT = Path(__file__).parents[1]


def in_project(path: str) -> str:
    """Returns `path`, or, if only the project's folder has a file of this path, the path in that folder. An empty
    path, which means no file, stays empty."""
    return path if not path or os.path.exists(path) or not os.path.exists(PROJECT / path) else str(PROJECT / path)


TASK = in_project("data/recipes")  # the embedded task of the README
PATHS = ("model", "data", "eval_data", "test_data", "sft_data")  # settings whose paths may be in the project's folder
MOST = 10**9  # upper limit of whole numbers if no other is set; more steps, rows or tokens must be a mistake


def knob(
    default: Any, help: str, low: float | None = None, high: float = math.inf, choices: Collection[str] = ()
) -> Any:
    """Makes a field with a help text and its allowed values: low <= value <= high, or one of `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    The defaults suit the embedded task on a CPU. The help texts name the paper's values, or those of the paper's
    released code where the paper names none; configs/README.md has the sources of all values.
    """

    # settings of the method, the model, the data and the reward
    method: str = knob("prefix-rft", "the training method", choices=METHODS)
    model: str = knob(in_project("data/base"), "a HuggingFace model folder or hub name (paper: Qwen2.5-Math-7B)")
    data: str = knob(f"{TASK}/train.jsonl", "JSONL file of training problems (see data/README.md; paper: OpenR1-46k)")
    eval_data: str = knob("", "file of problems for the accuracy curve; empty: data/recipes' file or none")
    test_data: str = knob("", "file of problems for the final accuracy; empty: data/recipes' file or none")
    sft_data: str = knob("", "file of problems for the sft stage; empty: the file of the setting data")
    demonstration_fraction: float = knob(1.0, "share of problems that keep their demonstrations (paper: 1)", 0, 1)
    reward: str = knob("math", "math (paper), exact (compares text), or a function of your own as FILE.py[:name]")
    # settings of the run's length and folder
    steps: int = knob(120, "number of reinforcement steps (paper: 500)", 1)
    seed: int = knob(0, "all random draws of the run depend on this seed", 0)
    out: str = knob("", "folder of the run; empty: a fresh runs/METHOD-NNN")
    resume: str = knob(
        "", "auto: continue the run in --out from its last checkpoint, if any, or start the run", choices=("", "auto")
    )
    accept_changed: str = knob(
        "", "reward: resume a run although the reward's code has changed since the run began", choices=("", "reward")
    )
    save_dtype: str = knob(
        "float32",
        "dtype of the weights in final/; bfloat16 halves the file, but rounds small updates away",
        choices=("float32", "bfloat16"),
    )
    save_every: int = knob(20, "a checkpoint is saved every so many steps; 0: only at the end", 0)
    eval_every: int = knob(10, "validation accuracy is measured every so many steps; 0: only at the end", 0)
    # rollouts
    prompts_per_step: int = knob(16, "number of problems in each step (paper: 128)", 1)
    rollouts_per_prompt: int = knob(8, "N, the number of rows in each group (paper: 8)", 1)
    hybrid_per_prompt: int = knob(1, "number of rows in each group that have demonstration tokens (paper: 1)", 1)
    temperature: float = knob(1.0, "temperature in sampling and in log-probs (paper: 1)", 0.01, 10)
    max_response_tokens: int = knob(96, "limit of tokens of a response, prefix included (paper: 8192)", 2)
    # the objective
    updates_per_step: int = knob(2, "number of updates, and so of mini-batches, in each step (paper: 2)", 1)
    coefficient: float | None = knob(None, "the constant c of the methods table below; empty: the method's own c", 0)
    baseline: str = knob(
        "on_policy",
        "which mean reward is subtracted: of the on-policy rows (paper's code) or of all rows (paper's section 3)",
        choices=("on_policy", "group"),
    )
    scale_by_std: bool = knob(False, "divide advantages by the standard deviation of the group's rewards (paper: no)")
    entropy_keep: float = knob(0.2, "share of the prefix tokens that the entropy clip keeps (paper: 0.2)", 0, 1)
    clip_low: float = knob(0.2, "PPO clips the ratio where it is below 1 - clip_low (paper's code: 0.2)", 1e-3, 1)
    clip_high: float = knob(0.2, "PPO clips the ratio where it is above 1 + clip_high (paper's code: 0.2)", 1e-3)
    gate: int = knob(0, "hpt, rescue, relift: a group with at most so many right rows is unsolved (HPT: 0)", 0)
    # the optimizer
    lr: float = knob(1e-4, "learning rate of reinforcement, constant over the run (paper: 1e-6)", 0)
    sft_lr: float = knob(2.5e-4, "peak learning rate of sft: 10% warm-up, then a cosine decay (paper: 5e-5)", 0)
    sft_lr_end: float = knob(0.0, "share of sft_lr at which the cosine decay ends (LUFFY, 2604.23747: 0.1)", 0, 1)
    sft_steps: int = knob(64, "number of updates in the sft stage (paper: 3 epochs)", 1)
    sft_batch: int = knob(32, "number of demonstrations in each update of the sft stage (paper: 64)", 1)
    relift_lr: float = knob(1e-4, "learning rate of ReLIFT's supervised updates, constant (ReLIFT: 1e-6)", 0)
    relift_buffer: int = knob(4, "number of problems in ReLIFT's buffer that start an update (ReLIFT: 128)", 1)
    weight_decay: float = knob(0.0, "weight decay of AdamW (paper: 0.01)", 0)
    adam_beta2: float = knob(0.99, "beta2 of AdamW (paper's code: 0.999)", 0, 0.999999)
    max_grad_norm: float = knob(1.0, "larger gradients are scaled down to this norm; 0: never (paper's code: 1)", 0)
    # adapters (support/adapters.py)
    lora_rank: int = knob(0, "rank of low-rank adapters (needs peft); 0: all weights are trained (paper: 0)", 0)
    lora_alpha: float = knob(32.0, "the product of each adapter's matrices is scaled by lora_alpha / lora_rank", 1e-3)
    lora_targets: str = knob(
        "", "names of the linear layers that get an adapter, as q_proj,v_proj; empty: all linear layers of the blocks"
    )
    lora_lr_times: float = knob(10.0, "the adapters' learning rates are this many times lr, sft_lr and relift_lr", 0)
    base_dtype: str = knob(
        "float32", "dtype of weights frozen by adapters on a CPU (CUDA: bfloat16)", choices=("float32", "bfloat16")
    )
    # evaluation
    eval_response_tokens: int = knob(120, "limit of tokens of a response in evaluation (paper: 8192)", 2)
    eval_samples: int = knob(4, "number of samples for each test problem at temperature 1 (greedy: one)", 1)
    tensorboard: bool = knob(False, "also write the metrics for TensorBoard (needs tensorboard)")
    # the machine
    device: str = knob("auto", "auto: cuda if found, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    recompute: bool = knob(False, "gradient checkpointing: compute activations again instead of keeping them")
    offload: bool = knob(False, "CUDA only: keep weights and optimizer in host memory between uses, which is slower")
    micro_batch_tokens: int = knob(2048, "limit of tokens in a forward pass; a longer row gets its own pass", 1)
    rows_per_call: int = knob(512, "number of rows sampled together", 1)


def suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f": did you mean {close[0]}?" if close else f": choose from {', '.join(known)}"


def check_value(field: dataclasses.Field, value: Any) -> Any:
    """Returns `value` (from JSON, or text from the command line) as the type of `field`. Raises InputError for a
    wrong value."""
    kind, meta = field.type, field.metadata
    if kind == float | None:
        if value in (None, ""):
            return None
        kind = float
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise InputError(f"{field.name} is {value!r:.80}, expected {wanted}") from None
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 10**300 else math.inf
    if type(value) is not kind:
        raise InputError(f"{field.name} is {value!r:.80}, expected {kind.__name__}, found {type(value).__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise InputError(
            f"{field.name} is {value!r:.80}{suggest(str(value), [str(c) for c in meta['choices'] if c])}"
        )
    if kind is float and not math.isfinite(value):
        raise InputError(f"{field.name} is {value}, expected a finite number")
    if meta["low"] is not None:
        check_range(field.name, value, meta["low"], meta["high"])
    return value


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises InputError unless `value` is a number from `low` to `high`. If `high` is infinite, whole numbers are
    limited by MOST."""
    if isinstance(value, int) and value >= low and high == math.inf:
        high = MOST
    if not low <= value <= high or value == math.inf:
        bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InputError(f"{name} is {value!r:.80}, expected {bounds}")


def check_options(args: argparse.Namespace, **least: int) -> None:
    """Raises InputError if an option is below its `least` value, or if the temperature is neither 0 (greedy) nor 0.01
    to 10."""
    for name, low in least.items():
        if (value := getattr(args, name)) is not None:
            check_range(name, value, low)
    if args.temperature:
        check_range("temperature", args.temperature, 0.01, 10)


def check_together(config: Config) -> Config:
    """Raises InputError for settings that contradict each other."""
    method = METHODS[config.method]
    if "rl" in method.stages and config.rollouts_per_prompt < 2:
        raise InputError(
            f"rollouts_per_prompt is {config.rollouts_per_prompt}, expected at least 2: a response is compared with "
            "other responses to its problem, so a single response has no gradient"
        )
    if config.coefficient is not None and method.coefficient is None:
        having = ", ".join(name for name, m in METHODS.items() if m.coefficient is not None)
        raise InputError(
            f"coefficient is {config.coefficient}, but {config.method} has no coefficient; methods with one: {having}"
        )
    if method.unsolved and config.gate >= config.rollouts_per_prompt:
        raise InputError(
            f"gate is {config.gate} of {config.rollouts_per_prompt} rollouts_per_prompt, expected fewer: every group "
            "would count as unsolved"
        )
    if method.policy_weight is remaining_clipped and config.coefficient is not None and config.coefficient >= 1:
        raise InputError(
            f"coefficient is {config.coefficient}, expected less than 1: {config.method} gives the policy's own "
            "tokens the weight 1 - c"
        )
    mixed = method.rows in ("hybrid", "demonstration") and "rl" in method.stages
    if mixed and config.hybrid_per_prompt >= config.rollouts_per_prompt:
        raise InputError(
            f"hybrid_per_prompt is {config.hybrid_per_prompt} of {config.rollouts_per_prompt} rollouts_per_prompt, "
            "expected fewer: the on-policy rows of a group are its baseline"
        )
    if "rl" in method.stages and config.updates_per_step > config.prompts_per_step:
        raise InputError(
            f"updates_per_step is {config.updates_per_step}, expected at most prompts_per_step "
            f"({config.prompts_per_step}): each update needs at least one problem"
        )
    if config.resume and not config.out:
        raise InputError("resume needs the folder of the run: give --out")
    return config


def from_dict(values: dict[str, Any]) -> Config:
    """Returns a checked Config with `values`. All other fields keep their defaults."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in values:
        if name not in fields:
            raise InputError(f"unknown setting {name!r:.80}{suggest(name, list(fields))}")
    return check_together(Config(**{name: check_value(fields[name], value) for name, value in values.items()}))


def new_parser() -> Parser:
    """Returns the parser of train.py's command line. The parser has an option for each field of Config and leaves the
    values as text."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [--config FILE.json] [--FIELD VALUE ...]",
        epilog=f"the methods (formulas: methods.py, loss.py)\n\n{methods_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.json", help="settings from a file; the command line overrides it")
    for field in dataclasses.fields(Config):
        kind = "FLOAT" if field.type == float | None else field.type.__name__.upper()
        default = "empty" if field.default in (None, "") else field.default
        words = f"{field.metadata['help']} (default: {default})"
        if field.metadata["choices"]:
            words += f"; one of: {', '.join(filter(None, field.metadata['choices']))}"
        parser.add_argument(f"--{field.name}", metavar=kind, help=words.replace("%", "%%"))
    return parser


def methods_table() -> str:
    """Returns methods.METHODS as a Markdown table with a row for each method."""
    unsolved = {"collect": "; unsolved: SFT later", "replace": "; unsolved: a demonstration instead"}
    unsolved |= {"rescue": "; unsolved: again behind a prefix", "": ""}
    lines = ["| method | source | rows of a group | baseline | w of own tokens | of the demonstration | c | clip |"]
    lines.append("|---" * 8 + "|")
    for name, m in METHODS.items():
        rl, dash = "rl" in m.stages, "–"
        rows = m.rows + (f" ({m.schedule})" if m.rows in ("hybrid", "shared_prefix") else "") + unsolved[m.unsolved]
        baseline = (m.baseline or "as set") + (", over std" if m.scale_by_std else "")
        c = dash if m.coefficient is None else f"{m.coefficient:g}"
        c += "" if m.coefficient_end is None else f" to {m.coefficient_end:g}"
        cells = [f"`{name}`", m.source, rows, baseline if rl else dash]
        cells += [formula(m.policy_weight) if rl else dash]
        cells += [formula(m.demonstration_weight) if m.needs_demonstrations else dash]
        lines.append(f"| {' | '.join([*cells, c, m.entropy_clip or dash])} |")
    return "\n".join(lines)


def formula(weight: Callable) -> str:
    """Returns the first line of a weight function's docstring: its formula."""
    return (weight.__doc__ or weight.__name__).splitlines()[0]


def parse_config(argv: list[str]) -> Config:
    """Returns the Config given by --config FILE and --FIELD VALUE (or --FIELD=VALUE). The command line overrides the
    file.

    With --help this function prints all settings and exits.
    """
    options, rest = new_parser().parse_known_args(argv)
    if rest:
        names = [f"--{field.name}" for field in dataclasses.fields(Config)]
        raise InputError(f"found {rest[0]!r:.80}{suggest(rest[0], names)}")
    values = vars(options)
    if "config" in values:
        file = read_json(Path(values.pop("config")), advice='write the settings as one object, {"FIELD": VALUE, ...}')
        file |= {name: in_project(file[name]) for name in PATHS if isinstance(file.get(name), str)}
        values = file | values
    values.pop("made_of", None)  # the config.json of a run also has this key, which is no setting
    return from_dict(values)
