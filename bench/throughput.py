"""This script measures the speed of sampling against plain `generate`, and of a whole training step against TRL.

    OMP_NUM_THREADS=1 python bench/throughput.py sampling step [--name NAME] [--FIELD VALUE ...]

Each part prints a table and writes bench/results/throughput-PART.json, or throughput-PART-NAME.json if --name is
given. Further arguments are settings of train.py (--model, --data, --config, ...). Without settings the script
measures the default step of `rft` with the embedded task and model: 16 problems x 8 rollouts, at most 96 tokens, 2
updates. The learning rate is 0, so every repeat starts from the same weights. In each repeat all programs get the
same prompts and produce the same tokens (asserted). The programs run in turn, so that a busy machine slows all of
them. Times are CPU seconds of the process, or wall seconds on CUDA. Ratios are medians over the repeats. In the part
`step` every group has made-up rewards of 0 and 1, so that every row has a nonzero weight.

On CUDA both our code and TRL compute the part `step` in bf16 on fp32 weights. On CUDA, TRL processes all rows of an
update in one pass, but at most 64. bench/gpu.py compares decoding with the limits of the device.
"""

import argparse
import functools
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from common import CUDA, clock, write
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

import step as steps
from data.loader import render_prompt
from sample import Row, generate, plan_group
from support.command import command
from support.config import parse_config
from train import prepare

REPEATS = 5  # number of repeats after a first repeat, which only warms up

# ---- what both parts share


def new_run(words: Sequence[str]) -> steps.Run:
    """Returns a run of rft with the command line `words` of train.py, at learning rate 0 on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run, _ = prepare(replace(parse_config(list(words)), method="rft", lr=0.0, out=f"{folder}/run"))
    torch.set_num_threads(1)
    return run


def picked_at(run: steps.Run, step: int) -> list[int]:
    return steps.problems_of_step(len(run.data.train), run.config.prompts_per_step, step, run.config.seed, "order")


def medians(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Returns, for each program, its median seconds, and the median and range of the ratio of its seconds to the
    seconds of our code. The first repeat is left out, because it only warms up."""
    table = {}
    for name, values in seconds.items():
        ratios = [value / ours for value, ours in zip(values[1:], seconds["ours"][1:])]
        spread = [min(ratios), max(ratios)]
        table[name] = {"seconds": statistics.median(values[1:]), "ratio": statistics.median(ratios), "range": spread}
    return table


# ---- sampling


def bench_sampling(words: list[str]) -> dict:
    run = new_run(words)
    seconds: dict[str, list[float]] = {"ours": [], "plain generate": []}
    for step in range(1 + REPEATS):
        rows: list[Row] = []
        for group, i in enumerate(picked_at(run, step)):
            key, rollouts = (run.config.seed, step), run.config.rollouts_per_prompt
            rows += plan_group(run.data.encoded[i], group, rows="on_policy", rollouts=rollouts, hybrid=0, key=key)
        responses = []
        for name, decode in (("ours", run.decode), ("plain generate", None)):
            begin = clock()
            sampled = generate(run.model, run.tokenizer, rows, run.config.max_response_tokens, decode=decode)
            seconds[name].append(clock() - begin)
            responses.append([row.response for row in sampled])
        same = sum(a == b for a, b in zip(*responses))
        # at most one row may have different responses of our code and of `generate`, because rounding can change a
        # drawn token
        assert same >= len(rows) - 1, f"{same} of {len(rows)} rows are the same"
    return {"rows": len(rows), "tokens": sum(map(len, responses[0])), "table": medians(seconds)}


# ---- the whole step


class Replay(LogitsProcessor):
    """Makes TRL's sampler draw the tokens that our sampler drew, so that TRL's responses equal ours. The replay costs
    TRL one scatter operation per token."""

    def __init__(self, responses: list[list[int]], pad: int, prompt: int, device: torch.device):
        width = max(map(len, responses))
        self.tokens = torch.tensor([r + [pad] * (width - len(r)) for r in responses], device=device)
        self.prompt = prompt

    def __call__(self, input_ids, scores):
        column = self.tokens[:, input_ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, column, 0.0)


def new_trainer(run: steps.Run, callback: transformers.TrainerCallback):
    """Returns the GRPOTrainer of TRL with the problems, their order, the loss (Dr.GRPO) and the number of updates per
    step of `run`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = run.config
    problems = [run.data.train[i] for step in range(1 + REPEATS) for i in picked_at(run, step)]
    prompts = [{"prompt": render_prompt(run.tokenizer, p.problem, p.system)} for p in problems]
    rows = config.prompts_per_step * config.rollouts_per_prompt
    rows_per_pass = math.gcd(rows // config.updates_per_step, 64 if CUDA else 16)
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
        # by default TRL uses gradient checkpointing, which costs another forward pass
        gradient_checkpointing=config.recompute,
        bf16=CUDA,  # TRL computes in bf16 by default, also on a CPU, where bf16 is slow and our code uses fp32
        loss_type="dr_grpo",
        scale_rewards="none",
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        max_steps=(1 + REPEATS) * config.updates_per_step,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        reward_funcs=lambda completions, **_: made_up_rewards(None, completions, None),
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=run.tokenizer,
        callbacks=[callback],
    )
    precision = "bf16" if CUDA else "no"
    assert trainer.accelerator.mixed_precision == precision, "TRL would not compute in the dtype that ours does"
    return trainer


def made_up_rewards(_reward: object, texts: list, _problems: object) -> list[float]:
    return [float(i % 2) for i in range(len(texts))]


def bench_step(words: list[str]) -> dict:
    """Runs the steps of our code and of TRL in turn, and returns the seconds of our steps and of TRL's."""
    run, rows = new_run(words), []
    seconds: dict[str, list[float]] = {"ours": [], "TRL": []}
    steps.grade_all = made_up_rewards

    def our_step(step: int) -> None:
        begin = clock()
        rows[:] = steps.rl_step(run, step).batch.rows
        seconds["ours"].append(clock() - begin)

    class InTurn(transformers.TrainerCallback):
        begin = 0.0

        def on_step_begin(self, args, state, control, **_):
            step, update = divmod(state.global_step, run.config.updates_per_step)
            if not update:
                our_step(step)
                self.begin = clock()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % run.config.updates_per_step == 0:
                seconds["TRL"].append(clock() - self.begin)

    trainer = new_trainer(run, InTurn())
    plain = trainer.model.generate

    @functools.wraps(plain)
    def replayed(*args, **settings):
        ids, mask = settings["input_ids"], settings["attention_mask"]
        assert [i[m.bool()].tolist() for i, m in zip(ids, mask)] == [row.prompt_ids for row in rows]
        drawn = [list(row.response) for row in rows]
        replay = Replay(drawn, run.model.generation_config.pad_token_id, ids.shape[1], ids.device)
        output = plain(*args, **settings | {"logits_processor": LogitsProcessorList([replay])})
        assert all(row[: len(want)] == want for row, want in zip(output[:, ids.shape[1] :].tolist(), drawn))
        return output

    trainer.model.generate = replayed
    trainer.train()
    return {"response tokens": statistics.mean(len(row.response) for row in rows), "table": medians(seconds)}


PARTS = {"sampling": bench_sampling, "step": bench_step}


@command("throughput.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--name", default="", help="suffix of the result files, for a bench with other settings")
    args, words = parser.parse_known_args()
    for part in args.parts:
        place = ["throughput", "cuda" * CUDA, part, args.name]
        write("-".join(filter(None, place)), PARTS[part](words))


if __name__ == "__main__":
    main()
