"""Speed of sampling and of the whole step, beside plain generate and TRL.

    OMP_NUM_THREADS=1 python bench/throughput.py sampling step [--FIELD VALUE ...]

Each part prints a table and writes bench/results/throughput-PART.json; with settings of train.py (--model, --data,
--config, ...) throughput-PART-MODEL.json, its name ending in what else was set. Without: the default step of `rft`,
16 problems x 8 rollouts, at most 96 tokens, 2 updates, the embedded task and model. The learning rate is 0, so every
repeat starts from the same weights; all contenders of a repeat see the same prompts and give the same tokens
(asserted), in turn, so that a busy machine hits all alike. Times are process CPU seconds, beside wall seconds; ratios
are medians over the repeats. Rewards are made up in `step`: 0 and 1 in every group.

On CUDA `step` runs too, ours and TRL's in bf16 on fp32 weights (throughput-cuda-step….json): there wall seconds are
what counts, and TRL passes as many rows at once as its update has, at most 64. Limits of decoding: bench/gpu.py.
"""

import argparse
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from common import clocks, timed, write
from transformers import LogitsProcessor, LogitsProcessorList

import step as steps
from sample import Row, generate, plan_group
from support.command import command
from support.config import parse_config
from train import prepare

CUDA = torch.cuda.is_available()

# ---- what both parts share


def new_run(words: Sequence[str] = ()) -> steps.Run:
    """The default run of rft, or that of train.py's settings `words`, at learning rate 0, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run, _ = prepare(replace(parse_config(list(words)), method="rft", lr=0.0, out=f"{folder}/run"))
    torch.set_num_threads(1)
    return run


def picked_at(run: steps.Run, step: int) -> list[int]:
    return steps.problems_of_step(len(run.data.train), run.config.prompts_per_step, step, run.config.seed, "order")


def rows_at(run: steps.Run, step: int) -> list[Row]:
    """The on-policy rows of a step, not yet sampled."""
    rows: list[Row] = []
    for group, i in enumerate(picked_at(run, step)):
        key, rollouts = (run.config.seed, step), run.config.rollouts_per_prompt
        rows += plan_group(run.data.encoded[i], group, rows="on_policy", rollouts=rollouts, hybrid=0, key=key)
    return rows


def medians(times: dict[str, list[list[float]]]) -> dict:
    """Of each contender's [CPU, wall] seconds without those of the first repeat, which warms up: the medians, and the
    median over the repeats of the ratio to ours."""
    table = {}
    for name, pairs in times.items():
        cpu, wall = zip(*pairs[1:])
        our_cpu, our_wall = zip(*times["ours"][1:])
        ratios = [a / b for a, b in zip(cpu, our_cpu)]
        table[name] = {
            "cpu_s": round(statistics.median(cpu), 3),
            "wall_s": round(statistics.median(wall), 3),
            "cpu_ratio_to_ours": round(statistics.median(ratios), 2),
            "wall_ratio_to_ours": round(statistics.median(a / b for a, b in zip(wall, our_wall)), 2),
            "cpu_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return table


# ---- sampling


def responses(run: steps.Run, rows: list[Row], decode: Callable | None) -> list[list[int]]:
    sampled = generate(run.model, run.tokenizer, rows, run.config.max_response_tokens, decode=decode)
    return [row.response for row in sampled]


def bench_sampling(words: list[str]) -> None:
    repeats = 4 if words else 15
    run, times, tokens = new_run(words), {"ours": [], "plain generate": []}, []
    for step in range(repeats + 1):  # the first warms up
        rows = rows_at(run, step)
        ours, *our_times = timed(lambda: responses(run, rows, run.decode))  # noqa: B023
        theirs, *plain_times = timed(lambda: responses(run, rows, None))  # noqa: B023
        same = sum(a == b for a, b in zip(ours, theirs))
        assert same >= len(ours) - 1, f"{same} of {len(ours)} rows are the same"
        times["ours"].append(our_times)
        times["plain generate"].append(plain_times)
        tokens.append(sum(map(len, ours)))
    table = medians(times)
    for row in table.values():
        row["tokens_per_cpu_s"] = round(statistics.mean(tokens) / row["cpu_s"])
    work = {"rows": len(rows), "prompts": len({tuple(row.prompt_ids) for row in rows}), "repeats": repeats}
    write(part_name("sampling", words), work | {"mean_tokens": statistics.mean(tokens), "table": table})


def part_name(part: str, words: list[str]) -> str:
    """The part, the model, and what is set beside it, so that no result takes another's place."""
    if not words:
        return part
    given = " ".join(words).replace("=", " ").split()
    others = [(name.lstrip("-"), Path(value).name) for name, value in zip(given[::2], given[1::2])]
    others = [word for name, value in others if name not in ("config", "model") for word in (name, value)]
    return "-".join([part, Path(parse_config(words).model).name, *others])


# ---- the whole step


class Replay(LogitsProcessor):
    """Makes TRL's sampler draw the given tokens: a scatter per token, so that its rows and lengths are ours."""

    def __init__(self, responses: list[list[int]], pad: int, prompt: int, device: torch.device):
        width = max(map(len, responses))
        self.tokens = torch.tensor([r + [pad] * (width - len(r)) for r in responses], device=device)
        self.prompt = prompt

    def __call__(self, input_ids, scores):
        column = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, column, 0.0)


def new_trainer(run: steps.Run, repeats: int, reward: Callable, rows_per_pass: int, callback):
    """TRL's GRPOTrainer on the same problems in the same order: Dr.GRPO loss, 2 updates per 128 rollouts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from data.loader import render_prompt

    config = run.config
    problems = [run.data.train[i] for step in range(repeats + 1) for i in picked_at(run, step)]
    data = [{"prompt": render_prompt(run.tokenizer, p.problem, p.system), "answer": p.answer} for p in problems]
    rows = config.prompts_per_step * config.rollouts_per_prompt
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not CUDA,
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=rows // config.updates_per_step // rows_per_pass,
        generation_batch_size=rows,
        num_generations=config.rollouts_per_prompt,
        max_completion_length=config.max_response_tokens,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        adam_beta2=config.adam_beta2,
        gradient_checkpointing=config.recompute,  # on by default: it would cost TRL another forward pass
        bf16=CUDA,  # on by default, also on a CPU, where it is slow; ours is fp32 there as well
        loss_type="dr_grpo",
        scale_rewards="none",
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=config.updates_per_step,
        max_steps=(repeats + 1) * config.updates_per_step,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(data),
        processing_class=run.tokenizer,
        callbacks=[callback],
    )


def compare_steps(words: list[str], repeats: int, rows_per_pass: int) -> dict:
    """Ours and TRL's, step by step in turn. Rewards are 0 and 1 in every group, so that every row has a weight."""
    run, times, generate_seconds, ours = new_run(words), {"ours": [], "TRL": []}, [], {}
    sample_groups = steps.sample_groups

    def rewards(rows: list) -> list[float]:
        return [float(i % 2) for i in range(len(rows))]

    def with_rewards(*args, **settings) -> list[Row]:
        rows = sample_groups(*args, **settings)
        ours["rows"] = [replace(row, reward=reward) for row, reward in zip(rows, rewards(rows))]
        return ours["rows"]

    steps.sample_groups = with_rewards

    def our_step(step: int) -> None:
        _, *seconds = timed(lambda: steps.rl_step(run, step))
        times["ours"].append(seconds)

    class InTurn(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            done, rest = divmod(state.global_step, run.config.updates_per_step)
            if not rest:
                times["TRL"].append([now - then for now, then in zip(clocks(), self.begun)])
                if done <= repeats:
                    our_step(done)
                self.begun = clocks()

    callback = InTurn()
    trainer = new_trainer(run, repeats, lambda completions, **_: rewards(completions), rows_per_pass, callback)
    precision = "bf16" if CUDA else "no"
    assert trainer.accelerator.mixed_precision == precision, "TRL would not compute in the dtype that ours does"
    plain = trainer.model.generate

    @functools.wraps(plain)
    def replayed(*args, **settings):
        ids, mask = settings["input_ids"], settings["attention_mask"]
        assert [i[m.bool()].tolist() for i, m in zip(ids, mask)] == [row.prompt_ids for row in ours["rows"]]
        drawn = [list(row.response) for row in ours["rows"]]
        settings["logits_processor"] = LogitsProcessorList(
            [Replay(drawn, run.model.generation_config.pad_token_id, ids.shape[1], ids.device)]
        )
        output, cpu, wall = timed(lambda: plain(*args, **settings))
        generate_seconds.append(wall if CUDA else cpu)
        rows = output[:, ids.shape[1] :].tolist()
        assert all(row[: len(want)] == want for row, want in zip(rows, drawn))
        return output

    trainer.model.generate = replayed
    our_step(0)
    callback.begun = clocks()
    trainer.train()
    steps.sample_groups = sample_groups
    return {
        "repeats": repeats,
        "TRL rows per pass": rows_per_pass,
        f"TRL generate {'wall' if CUDA else 'cpu'}_s": round(statistics.median(generate_seconds[1:]), 3),
        "response tokens": statistics.mean(len(row.response) for row in ours["rows"]),
        "table": medians(times),
    }


def bench_step(words: list[str]) -> None:
    import trl

    config, rows_per_pass = parse_config(words), 16
    if CUDA:
        rows = config.prompts_per_step * config.rollouts_per_prompt // config.updates_per_step
        rows_per_pass = math.gcd(rows, 64)
    steps_of_both = compare_steps(words, 3 if words else 5, rows_per_pass)
    write(part_name("cuda-step" if CUDA else "step", words), {"trl": trl.__version__} | steps_of_both)


PARTS = {"sampling": bench_sampling, "step": bench_step}


@command("throughput.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    args, words = parser.parse_known_args()
    for part in args.parts:
        PARTS[part](words)


if __name__ == "__main__":
    main()
