"""Train a model by any method of methods.METHODS: python train.py [--config FILE] [--FIELD VALUE ...]

The data of a run come first, then the evaluation on its held-out problems, then `train`, the loop over steps. step.py
has what happens in one step. A run folder gets config.json, metrics.jsonl (a row per step), samples.jsonl,
groups.jsonl (a group every few steps), eval.json, curves.png, checkpoint/ and final/ (a HuggingFace model folder).
Left out are a value model, a reference model and KL, mixed data sources, and asynchronous sampling.
"""

import dataclasses
import importlib.util
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from data.loader import Data, Encoded, encode_problems, encode_prompts, load_problems, odd_rows
from eval import evaluate
from evaluation.statistics import summarize
from fast.check import check_model
from fast.decode import loop_of
from methods import METHODS, Collector, hint, sft_learning_rate
from model import load_model, load_tokenizer, save_model
from reward import Reward, load_reward
from sample import prefix_range, seed_of
from step import Run, Step, problems_of_step, rl_step, sft_step
from support import adapters, checkpoint, console, distributed
from support.command import command
from support.config import TASK, Config, parse_config
from support.errors import Broken, Diverged, InputError, Unwritten, as_input
from support.files import writing
from support.loading import check_window, load_config, pick_device, use_one_thread_if_small, window_of
from support.model_folder import share_changed
from support.record import example_rows, record_group, rl_metrics, sft_metrics
from support.watch import Watch

TABLES = ("validation", "test", "test_sampled")  # the names of the tables in eval.json
# signals at which a run saves a checkpoint and stops
ENDING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
MOST_SKIPPED = 3  # so many updates in a row with numbers that are not finite end the run

# ---- data


class Counts(NamedTuple):
    """How many demonstrations are `left_out`, by reason, and how many are used but `noted` for something else."""

    left_out: Counter
    noted: Counter


def keep_fraction(problems: Sequence[Encoded], fraction: float) -> list[Encoded]:
    """Returns `problems` with fewer demonstrations: of those that have some, a share `fraction` keeps them.

    The problems are chosen by id. So the choice is the same in every run, and a smaller share is part of a larger
    one.
    """
    demonstrated = [problem.id for problem in problems if problem.demonstrations]
    ranked = sorted(demonstrated, key=lambda name: seed_of("demonstration", name))
    keeping = set(ranked[: math.ceil(fraction * len(demonstrated) - 1e-9)])
    return [
        problem if problem.id in keeping else dataclasses.replace(problem, demonstrations=[]) for problem in problems
    ]


def data_files(config: Config) -> dict[str, str]:
    """Returns the files of a run by their purpose. The embedded task has files of its own for evaluation."""
    embedded = config.data == Config.data
    files = {"data": config.data, "sft_data": config.sft_data}
    files["validation"] = config.eval_data or (f"{TASK}/validation.jsonl" if embedded else "")
    files["test"] = config.test_data or (f"{TASK}/test.jsonl" if embedded else "")
    return {name: path for name, path in files.items() if path}


def load_data(
    config: Config, reward: Reward, tokenizer, end_ids: list[int], context: int | None
) -> tuple[Data, Counts]:
    """Returns the run's data, checked against its settings, and counts of its demonstrations."""
    train = load_problems(config.data, reward)
    held = {}
    for name in ("validation", "test"):
        if path := data_files(config).get(name):
            problems = load_problems(path, reward)
            held[name] = problems, encode_prompts(tokenizer, problems)
    encoded, left_out, noted = encode_problems(tokenizer, train, config.max_response_tokens, end_ids, reward)
    encoded = keep_fraction(encoded, config.demonstration_fraction)
    supervised = encoded
    if config.sft_data:
        problems = load_problems(config.sft_data, reward)
        supervised, *counted = encode_problems(tokenizer, problems, config.max_response_tokens, end_ids, reward)
        supervised = keep_fraction(supervised, config.demonstration_fraction)
        left_out, noted = left_out + counted[0], noted + counted[1]
    supervised = [problem for problem in supervised if problem.demonstrations]
    method = METHODS[config.method]
    used = supervised if "sft" in method.stages else [problem for problem in encoded if problem.demonstrations]
    if method.needs_demonstrations and config.demonstration_fraction == 0:
        raise InputError(f"demonstration_fraction is 0, expected more: method {config.method} needs demonstrations")
    if method.needs_demonstrations and not used:
        file = (config.sft_data if "sft" in method.stages else "") or config.data
        why = "".join(f", {count} left out ({why})" for why, count in left_out.items())
        fix = ": raise max_response_tokens" if "too long" in left_out else ""
        raise InputError(f"method {config.method} needs demonstrations and {file} has none it can use{why}{fix}")
    if "rl" in method.stages and config.prompts_per_step > len(train):
        raise InputError(
            f"prompts_per_step is {config.prompts_per_step}, but {config.data} has only {len(train)} problems"
        )
    hinted = [
        dataclasses.replace(p, id=f"{p.id} after its demonstration", prompt_ids=hint(p, i))
        for p in used * method.hinted
        for i in range(len(p.demonstrations))
    ]
    check_context(config, [*encoded, *supervised, *hinted], held, context)
    return Data(train, encoded, supervised, held), Counts(left_out, noted)


def check_context(config: Config, encoded: list[Encoded], held: dict, context: int | None) -> None:
    """Raises InputError if a prompt and its response can be longer than the model's context."""
    lists = {"max_response_tokens": encoded, "eval_response_tokens": [p for _, ids in held.values() for p in ids]}
    for name, problems in lists.items():
        longest = max(problems, key=lambda problem: len(problem.prompt_ids), default=None)
        if longest:
            budget, whose = getattr(config, name), f"the prompt of {longest.id!r}"
            check_window(context, len(longest.prompt_ids), budget, name, whose)


def check_ranks(config: Config) -> None:
    """Raises InputError if a rank would have nothing to do."""
    method, world = METHODS[config.method], distributed.world_size()
    parts = {"prompts_per_step": config.prompts_per_step} if "rl" in method.stages else {}
    if "sft" in method.stages:
        parts["sft_batch"] = config.sft_batch
    if method.unsolved == "collect":
        parts["relift_buffer"] = config.relift_buffer
    for name, value in parts.items():
        if value < world:
            raise InputError(
                f"{name} is {value}, but there are {world} ranks: start at most {value}, or raise {name}"
            )


# ---- the run


def new_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """Returns an optimizer of what is trained: all weights, or the adapters at a learning rate of their own."""
    betas = (0.9, config.adam_beta2)
    group = {"params": list(distributed.trained(model).values()), "lr_times": adapters.lr_times(config)}
    return torch.optim.AdamW([group], config.lr, betas, weight_decay=config.weight_decay, fused=True)


def accuracy(run: Run, name: str, temperature: float, title: str) -> dict[str, dict[str, float]]:
    """Returns statistics.summarize on the run's "validation" or "test" problems; {} if it has none."""
    if name not in run.data.held:
        return {}
    problems, encoded = run.data.held[name]
    answers = evaluate(
        run.model,
        run.tokenizer,
        problems,
        encoded,
        reward=run.reward,
        samples=run.config.eval_samples if temperature else 1,
        temperature=temperature,
        max_response_tokens=run.config.eval_response_tokens,
        seed=run.config.seed,
        rows_per_call=run.config.rows_per_call,
        decode=run.decode,
        progress=title if sys.stderr.isatty() else None,
    )
    return summarize(answers)


def score(run: Run, who: str) -> dict[str, Any]:
    """Returns the tables of eval.json: validation greedy, test greedy, and test at temperature 1."""
    validation = accuracy(run, "validation", 0.0, f"{who}: validation")
    test = accuracy(run, "test", 0.0, f"{who}: test, greedy")
    return dict(zip(TABLES, (validation, test, accuracy(run, "test", 1.0, f"{who}: test, temperature 1"))))


def prepare(config: Config) -> tuple[Run, Counts]:
    """Load and check everything; write nothing. Raises InputError for wrong input."""
    checkpoint.check_folder(config)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard is true, but it is not installed: pip install tensorboard")
    device = pick_device(config.device)
    distributed.start(device)
    check_ranks(config)
    tokenizer, generation_config = load_tokenizer(config.model)
    context = window_of(load_config(config.model))
    with as_input():
        reward = load_reward(config.reward)
    # earlier than load_data, which grades demonstrations by the reward
    checkpoint.check_ingredients(config, {"reward": reward.fingerprint})
    ends = generation_config.eos_token_id
    # earlier than load_model, because reading weights takes long
    data, counts = load_data(config, reward, tokenizer, ends, context)
    model, _ = load_model(
        config.model,
        device,
        training=True,
        recompute=config.recompute,
        offload=config.offload,
        adapters=adapters.of(config),
        check=check_model,
    )
    use_one_thread_if_small(model)
    method = METHODS[config.method]
    prefix_range(0, 1, method.schedule)  # raises for an unknown schedule
    run = Run(config, method, model, tokenizer, reward, data, new_optimizer(model, config), loop_of(model))
    if method.unsolved == "collect":
        run.collector = Collector([], new_optimizer(model, config))
    return run, counts


def train(config: Config) -> int:
    """Make a whole run and return the exit code: 0, or 128 + the number of the signal that stopped it.

    Raises InputError for wrong input, before anything is written, and Broken for a fault of a run that had begun.
    """
    run, counts = prepare(config)
    warnings = {text: text for path in data_files(config).values() for text in odd_rows(path)}
    if wrong := counts.left_out.get("not right"):
        warnings["demonstrations"] = f"{wrong} demonstrations are left out: their own reward says they are not right"
    ingredients = checkpoint.made_of(run, data_files(config))
    with checkpoint.opened(config, ingredients) as folder:
        bf16 = pick_device(config.device).type == "cuda"  # distributed.shard computes in bf16 on CUDA
        watch = Watch(run.method, warnings, torch.bfloat16 if bf16 else torch.float32)
        start = restore(run, folder, watch)
        checkpoint.write_config(folder, config, ingredients)
        try:
            console.show_start(run, folder, counts, sum(stages(run)), start)
            for text in watch.said.values():
                console.warn(text)
            return train_in(folder, run, start, watch)
        except BrokenPipeError as error:
            raise Broken(f"its output was closed; to go on: {console.command(config, folder)}") from error
        except InputError as error:  # the user's reward has failed
            again = console.command(dataclasses.replace(config, accept_changed="reward"), folder)
            raise Broken(f"{error}; mend that, then: {again}") from error
        except Unwritten as error:
            raise Broken(f"{error}; mend that, then: {console.command(config, folder)}") from error


def stages(run: Run) -> tuple[int, int]:
    """Returns the numbers of supervised steps and of reinforcement steps."""
    wanted = run.method.stages
    return run.config.sft_steps * ("sft" in wanted), run.config.steps * ("rl" in wanted)


def one_step(run: Run, step: int) -> tuple[dict[str, Any], Step | None]:
    """Make step `step`, counted over both stages, and return its metrics. A reinforcement step also returns its
    Step."""
    config, (sft_steps, _) = run.config, stages(run)
    if step < sft_steps:
        picked = problems_of_step(len(run.data.supervised), config.sft_batch, step, config.seed, "sft order")
        problems, lr = [run.data.supervised[i] for i in picked], sft_learning_rate(step, config)
        return sft_metrics(sft_step(run, problems, step, run.optimizer, lr), lr), None
    if step == sft_steps:  # each stage starts with a fresh optimizer, as two separate runs would
        run.optimizer = new_optimizer(run.model, config)
    result = rl_step(run, step - sft_steps)
    return rl_metrics(run, result), result


def train_in(folder: Path, run: Run, start: int, watch: Watch) -> int:
    """Make the steps after `start`, write the result, and return the exit code."""
    config, (sft_steps, rl_steps) = run.config, stages(run)
    total = sft_steps + rl_steps
    scores_file = folder / "eval.json"
    scores = distributed.from_rank_0(read_eval(folder) if distributed.rank() == 0 else None)
    if "base" not in scores:
        scores = {"base": score(run, "base")}
        checkpoint.write_text(scores_file, json.dumps(scores, indent=1) + "\n")
        console.show_base(scores["base"])

    def due(done: int) -> bool:
        """Returns whether validation accuracy is measured, and a group recorded, after `done` steps."""
        return done == total or bool(config.eval_every and done % config.eval_every == 0)

    stopped = catch_signals()
    with console.Progress(folder, total, start, config.tensorboard, watch) as progress:
        for step in range(start, total):
            try:
                metrics, result = one_step(run, step)
            except InputError:  # the user's reward has failed, before any update of this step: no step is lost
                if step > start:
                    checkpoint.save(folder, step, run)
                raise
            shown = example_rows(run, result) if result else []
            group = record_group(run, result) if result and (step == sft_steps or due(step + 1)) else None
            done, stop = step + 1, distributed.from_rank_0(stopped)
            if due(done):
                table = accuracy(run, "validation", 0.0, f"step {done}: validation")
                for level, row in table.items():
                    metrics |= {f"eval_{level}": row["accuracy"], f"eval_{level}_low": row["low"]}
                    metrics |= {f"eval_{level}_high": row["high"]}
            checkpoint.append_rows(folder / "samples.jsonl", [{"step": done, **sample} for sample in shown])
            checkpoint.append_rows(folder / "groups.jsonl", [{"step": done, **group}] if group else [])
            if new := watch.look({"step": done, **metrics}):
                metrics["warnings"] = new
            checkpoint.append_rows(folder / "metrics.jsonl", [{"step": done, **metrics}])
            progress.step(done, metrics, shown)
            save = (config.save_every and done % config.save_every == 0 and not run.skipped) or done == total or stop
            lost = save and not distributed.total_norm(list(distributed.trained(run.model).values())).isfinite()
            if run.skipped >= MOST_SKIPPED or lost:
                raise Diverged(diverged(run, folder))
            if save:
                checkpoint.save(folder, done, run)
            if stop and done < total:
                progress.close()
                console.show(f"stopped after step {done} of {total}; to go on: {console.command(config, folder)}")
                return 128 + stop[0]
    systems = {problem.system for problem in run.data.train}
    with writing(folder / "final"):
        save_model(run.model, run.tokenizer, folder / "final", getattr(torch, config.save_dtype))
        adapters.save(run.model, folder / "adapter")
    checkpoint.remember(folder / "final", systems.pop() if len(systems) == 1 else None, run.reward.name)
    if "trained" not in scores:
        scores["trained"] = score(run, "trained")
        checkpoint.write_text(scores_file, json.dumps(scores, indent=1) + "\n")
    final = f"the model in {config.save_dtype}"
    if config.save_dtype != "float32" and distributed.rank() == 0:
        final += f", {share_changed(folder / 'final', config.model):.1%} of its weights changed"
    console.show_end(folder, scores, draw_curves(folder), run.data.train[0].problem, watch.said, final)
    return 0


def read_eval(folder: Path) -> dict[str, Any]:
    """Returns eval.json: the tables that `score` gave for the base and the trained model; {} if there is no file."""
    file = folder / "eval.json"
    return checkpoint.read_json(file) if file.exists() else {}


def restore(run: Run, folder: Path, watch: Watch) -> int:
    """Put the run into the state of its newest whole checkpoint and return how many steps are done.

    `watch` recalls the metrics of these steps. Raises InputError, and writes nothing, if a file of the run is damaged
    or missing.
    """
    done = checkpoint.load(folder, run)
    if distributed.rank() == 0 and "base" not in read_eval(folder) and done:
        again = f"restore it, or delete {folder / 'checkpoint'} to start the run again from step 0"
        raise InputError(f"{folder / 'eval.json'}: the accuracy of the base model is missing: {again}")
    for row in checkpoint.cut_logs(folder, done):
        watch.recall(row)
    return done


def diverged(run: Run, folder: Path) -> str:
    """Returns the error's text for a run whose updates were skipped in a row, or whose last update lost the
    weights."""
    kept = " and ".join(str(file) for file in checkpoint.checkpoints(folder)) or "none: no step was saved"
    skipped = f"the loss or gradient of {run.skipped} updates in a row was not finite"
    what = skipped if run.skipped >= MOST_SKIPPED else "the last update left weights that are not finite"
    return (
        f"{what}: the run has diverged; start again in a new folder, with a lower lr or sft_lr. "
        f"The last checkpoints before that: {kept}"
    )


def draw_curves(folder: Path) -> str:
    """Draw curves.png if matplotlib is there, and return the text that the command prints about it."""
    if distributed.rank() > 0:
        return ""
    try:
        from plot import draw
    except ImportError:
        return f"(no curves.png: pip install matplotlib, then python plot.py {folder})"
    return draw([folder], folder / "curves.png").name


def catch_signals() -> list[int]:
    """Returns a list that SIGINT, SIGTERM and the signals by which clusters announce the end will fill.

    The loop ends after its step when the list is not empty. A second signal ends the process at once.
    """
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        if caught and distributed.world_size() == 1:  # torchrun sends a signal twice, and kills after 30 seconds
            sys.exit(128 + number)
        caught.append(number)

    for name in ENDING:
        number = getattr(signal, name, None)  # Windows lacks most of them
        # SIGHUP stays ignored under nohup
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, note)
    return caught


@command("train.py", distributed.name)
def main() -> None:
    config = parse_config(sys.argv[1:])
    again = "start it again with --resume auto" if config.out and not config.resume else "start it again"
    try:
        code = train(config)
        distributed.stop()
        sys.exit(code)
    except RuntimeError as error:
        if not (reason := distributed.explain(error, console.memory_advice(error, config))):
            raise
        raise Broken(f"{reason}; --resume auto goes on from the last checkpoint") from error
    except KeyboardInterrupt:
        print(f"\ntrain.py: stopped before the first step: nothing is lost, {again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
