"""Train a model by any method of methods.METHODS: python train.py [--config FILE] [--FIELD VALUE ...]

The order of this file: evaluation on a run's held-out problems, then `train`, then the loop over steps in `train_in`.
step.py has one step, and data/run_data.py loads the data. A run folder gets config.json, metrics.jsonl (a row per
step), samples.jsonl, groups.jsonl (a group every few steps), eval.json, curves.png, checkpoint/ and final/ (a
HuggingFace model folder). Training has no value model, no reference model and KL term, no mixed data sources, and no
asynchronous sampling.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data.loader import odd_rows
from data.run_data import Counts, data_files, load_data
from eval import evaluate
from evaluation.statistics import summarize
from fast.check import check_model
from fast.decode import loop_of
from methods import METHODS, Collector, sft_learning_rate
from model import load_model, load_tokenizer, save_model
from reward import RewardError, load_reward
from sample import prefix_range
from step import Run, Step, problems_of_step, rl_step, sft_step
from support import adapters, checkpoint, console, distributed
from support.command import catch_signals, command
from support.config import Config, parse_config
from support.errors import Broken, Diverged, InputError, Unwritten
from support.files import writing
from support.loading import load_config, pick_device, use_one_thread_if_small, window_of
from support.model_folder import share_changed
from support.record import example_rows, record_group, rl_metrics, sft_metrics
from support.watch import Watch

TABLES = ("validation", "test", "test_sampled")  # names of the accuracy tables in eval.json
MOST_SKIPPED = 3  # the run ends after so many consecutive updates that were skipped because numbers were not finite


def check_ranks(config: Config) -> None:
    """Raises InputError if a step or an update would leave a rank without rows."""
    method, world = METHODS[config.method], distributed.world_size()
    parts = {
        "prompts_per_step": "rl" in method.stages,
        "sft_batch": "sft" in method.stages,
        "relift_buffer": method.unsolved == "collect",
    }
    for name, used in parts.items():
        value = getattr(config, name)
        if used and value < world:
            raise InputError(
                f"{name} is {value}, but there are {world} ranks: start at most {value}, or raise {name}"
            )


def new_optimizer(model: PreTrainedModel, config: Config) -> torch.optim.Optimizer:
    """Returns AdamW for the trained parameters: all weights, or only adapters, whose learning rate is multiplied by
    lora_lr_times."""
    betas = (0.9, config.adam_beta2)
    group = {"params": list(distributed.trained(model).values()), "lr_times": adapters.lr_times(config)}
    return torch.optim.AdamW([group], config.lr, betas, weight_decay=config.weight_decay, fused=True)


def accuracy(run: Run, name: str, temperature: float, title: str) -> dict[str, dict[str, float]]:
    """Returns the run's accuracy by level (statistics.summarize) on the problems `name`, "validation" or "test"; {}
    if there are no such problems."""
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
    """Returns the accuracy tables of eval.json: validation greedy, test greedy, and test at temperature 1."""
    validation = accuracy(run, "validation", 0.0, f"{who}: validation")
    test = accuracy(run, "test", 0.0, f"{who}: test, greedy")
    return dict(zip(TABLES, (validation, test, accuracy(run, "test", 1.0, f"{who}: test, temperature 1"))))


def prepare(config: Config) -> tuple[Run, Counts]:
    """Load and check everything that the run needs, and write nothing. Raises InputError for wrong input."""
    checkpoint.check_folder(config)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard is true, but the package is not installed: pip install tensorboard")
    device = pick_device(config.device)
    distributed.start(device)
    check_ranks(config)
    tokenizer, generation_config = load_tokenizer(config.model)
    context = window_of(load_config(config.model))
    reward = load_reward(config.reward)
    # a changed reward is reported before load_data grades demonstrations by it
    checkpoint.check_ingredients(config, {"reward": reward.fingerprint})
    ends = generation_config.eos_token_id
    # data are loaded before the model, so that wrong data are reported before the long reading of weights
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
    prefix_range(0, 1, method.schedule)  # raises ValueError for an unknown schedule before the run begins
    run = Run(config, method, model, tokenizer, reward, data, new_optimizer(model, config), loop_of(model))
    if method.unsolved == "collect":
        run.collector = Collector([], new_optimizer(model, config))
    return run, counts


def train(config: Config) -> int:
    """Make a whole run and return the exit code: 0, or 128 + the number of the signal that stopped it.

    Raises InputError for wrong input, before anything is written, and Broken for a fault after the run has begun.
    """
    run, counts = prepare(config)
    warnings = {text: text for path in data_files(config).values() for text in odd_rows(path)}
    if wrong := counts.left_out.get("not right"):
        warnings["demonstrations"] = f"{wrong} demonstrations are left out: their own reward says they are not right"
    ingredients = checkpoint.made_of(run, data_files(config))
    with checkpoint.opened(config, ingredients) as folder:
        bf16 = pick_device(config.device).type == "cuda"  # on CUDA distributed.shard makes layers compute in bf16
        watch = Watch(run.method, warnings, torch.bfloat16 if bf16 else torch.float32)
        start = restore(run, folder, watch)
        checkpoint.write_config(folder, config, ingredients)
        try:
            console.show_start(run, folder, counts, sum(stages(run)), start)
            for text in watch.warnings.values():
                console.warn(text)
            return train_in(folder, run, start, watch)
        except BrokenPipeError as error:
            raise Broken(f"the output was closed; to go on: {console.command(config, folder)}") from error
        except RewardError as error:
            again = console.command(dataclasses.replace(config, accept_changed="reward"), folder)
            raise Broken(f"{error}; mend this fault, then run: {again}") from error
        except Unwritten as error:
            raise Broken(f"{error}; mend this fault, then run: {console.command(config, folder)}") from error


def stages(run: Run) -> tuple[int, int]:
    """Returns the numbers of supervised and of reinforcement steps in the run."""
    wanted = run.method.stages
    return run.config.sft_steps * ("sft" in wanted), run.config.steps * ("rl" in wanted)


def one_step(run: Run, step: int) -> tuple[dict[str, Any], Step | None]:
    """Make step `step`, counted over both stages, and return its metrics. For a reinforcement step also return the
    Step."""
    config, (sft_steps, _) = run.config, stages(run)
    if step < sft_steps:
        picked = problems_of_step(len(run.data.supervised), config.sft_batch, step, config.seed, "sft order")
        problems, lr = [run.data.supervised[i] for i in picked], sft_learning_rate(step, config)
        return sft_metrics(sft_step(run, problems, step, run.optimizer, lr), lr), None
    if step == sft_steps:  # each stage starts with a fresh optimizer, like a separate run
        run.optimizer = new_optimizer(run.model, config)
    result = rl_step(run, step - sft_steps)
    return rl_metrics(run, result), result


def eval_scores(folder: Path, run: Run, who: str) -> dict[str, Any]:
    """Returns the content of eval.json. If the tables of `who` ("base" or "trained") are missing, they are measured
    first."""
    scores = distributed.from_rank_0(read_eval(folder) if distributed.rank() == 0 else None)
    if who not in scores:
        scores[who] = score(run, who)
        checkpoint.write_text(folder / "eval.json", json.dumps(scores, indent=1) + "\n")
    return scores


def train_in(folder: Path, run: Run, start: int, watch: Watch) -> int:
    """Make the steps after `start`, write the results of the run, and return the exit code."""
    config, total = run.config, sum(stages(run))
    console.show_base(eval_scores(folder, run, "base")["base"])
    stopped = catch_signals(alone=distributed.world_size() == 1)
    with console.Progress(folder, total, start, config.tensorboard, watch) as progress:
        for step in range(start, total):
            done = step
            try:
                metrics, result = one_step(run, step)
                done, stop = step + 1, distributed.from_rank_0(stopped)
                record(folder, run, done, metrics, result, progress)
            # a reward fails before or after a step's updates, so the weights are those of a whole step
            except RewardError:
                if done > start:
                    checkpoint.save(folder, done, run)
                raise
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
    write_result(folder, run, watch)
    return 0


def record(
    folder: Path, run: Run, done: int, metrics: dict[str, Any], result: Step | None, progress: console.Progress
) -> None:
    """Write step `done` to the logs and show it. Every `eval_every` steps, and at the end, measure validation
    accuracy and write one group of the step to groups.jsonl. A group of the first reinforcement step is always
    written."""
    config, (sft_steps, rl_steps) = run.config, stages(run)
    due = done == sft_steps + rl_steps or (config.eval_every and done % config.eval_every == 0)
    samples = example_rows(run, result) if result else []
    groups = [record_group(run, result)] if result and (due or done == sft_steps + 1) else []
    try:
        for level, row in (accuracy(run, "validation", 0.0, f"step {done}: validation") if due else {}).items():
            metrics |= {f"eval_{level}": row["accuracy"], f"eval_{level}_low": row["low"]}
            metrics |= {f"eval_{level}_high": row["high"]}
    finally:  # the step's updates are done, so the step is logged even if the reward fails in validation
        if new := progress.watch.look({"step": done, **metrics}):
            metrics["warnings"] = new
        for name, rows in {"samples": samples, "groups": groups, "metrics": [metrics]}.items():
            checkpoint.append_rows(folder / f"{name}.jsonl", [{"step": done, **row} for row in rows])
        progress.step(done, metrics, samples)


def write_result(folder: Path, run: Run, watch: Watch) -> None:
    """Write final/, measure the accuracy of the trained model, and print the results of the run."""
    config, systems = run.config, {problem.system for problem in run.data.train}
    with writing(folder / "final"):
        save_model(run.model, run.tokenizer, folder / "final", getattr(torch, config.save_dtype))
        adapters.save(run.model, folder / "adapter")
    checkpoint.remember(folder / "final", systems.pop() if len(systems) == 1 else None, run.reward.name)
    scores = eval_scores(folder, run, "trained")
    final = f"the model in {config.save_dtype}"
    if config.save_dtype != "float32" and distributed.rank() == 0:
        final += f", {share_changed(folder / 'final', config.model):.1%} of its weights changed"
    console.show_end(folder, scores, draw_curves(folder), run.data.train[0].problem, watch.warnings, final)


def read_eval(folder: Path) -> dict[str, Any]:
    """Returns the content of eval.json: the tables that `score` gave for the base and the trained model; {} if there
    is no such file."""
    file = folder / "eval.json"
    return checkpoint.read_json(file) if file.exists() else {}


def restore(run: Run, folder: Path, watch: Watch) -> int:
    """Put the run into the state of its newest undamaged checkpoint, and return how many steps are done.

    Watch.recall gets the metrics of all finished steps. Raises InputError, and writes nothing, if a file of the run
    is damaged or missing.
    """
    done = checkpoint.load(folder, run)
    if distributed.rank() == 0 and "base" not in read_eval(folder) and done:
        again = f"restore it, or delete {folder / 'checkpoint'} to start the run again from step 0"
        raise InputError(f"{folder / 'eval.json'}: the accuracy of the base model is missing: {again}")
    for row in checkpoint.cut_logs(folder, done):
        watch.recall(row)
    return done


def diverged(run: Run, folder: Path) -> str:
    """Returns the error message for a run that skipped MOST_SKIPPED consecutive updates, or that has weights that are
    not finite."""
    saved = " and ".join(str(file) for file in checkpoint.checkpoints(folder)) or "none: no step was saved"
    skipped = f"the loss or gradient of {run.skipped} consecutive updates was not finite"
    what = skipped if run.skipped >= MOST_SKIPPED else "the last update left weights that are not finite"
    return (
        f"{what}: the run has diverged; start again in a new folder, with a lower lr or sft_lr. "
        f"The last checkpoints before that: {saved}"
    )


def draw_curves(folder: Path) -> str:
    """Draw curves.png if matplotlib is installed, and return the text that the command prints about the figure."""
    if distributed.rank() > 0:
        return ""
    try:
        from plot import draw
    except ImportError:
        return f"(no curves.png: pip install matplotlib, then python plot.py {folder})"
    return draw([folder], folder / "curves.png").name


@command("train.py", distributed.name, RewardError)
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
        raise Broken(f"{reason}; --resume auto continues from the last checkpoint") from error
    except KeyboardInterrupt:
        print(f"\ntrain.py: stopped before the first step: nothing is lost, {again}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
