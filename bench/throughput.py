"""Speed of sampling and of the whole step, beside plain generate and TRL.

    OMP_NUM_THREADS=1 python bench/throughput.py sampling step [--FIELD VALUE ...]

Each part prints a table and writes bench/results/throughput-PART.json; with settings of train.py (--model, --data,
--config, ...) throughput-PART-MODEL.json, its name ending in what else was set. Without: the default step of `rft`,
16 problems x 8 rollouts, at most 96 tokens, 2 updates, the embedded task and model. The learning rate is 0, so every
repeat starts from the same weights; all contenders of a repeat see the same prompts and give the same tokens
(asserted), in turn, so that a busy machine hits all alike. Times are process CPU seconds, beside wall seconds; ratios
are medians over the repeats. Peak memory, of tensors beyond those that stood before, is that of one more repeat, not
timed.

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
from common import clocks, peak_bytes, peak_memory, timed, write
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import model as models
import step as steps
from reward import grade
from sample import DrawTokenLogitsProcessor, Row, generate, padded, plan_group, uniforms
from support.command import command
from support.config import parse_config
from support.record import rl_metrics
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


def medians(times: dict[str, list[tuple[float, float]]], first: str) -> dict:
    """Per contender: median CPU and wall seconds, and the median over the repeats of its ratio to `first`."""
    table = {}
    for name, pairs in times.items():
        cpu, wall = zip(*pairs)
        ratios = [a / b for (a, _), (b, _) in zip(pairs, times[first])]
        walls = [a / b for (_, a), (_, b) in zip(pairs, times[first])]
        table[name] = {
            "cpu_s": round(statistics.median(cpu), 3),
            "wall_s": round(statistics.median(wall), 3),
            f"cpu_ratio_to_{first}": round(statistics.median(ratios), 2),
            f"wall_ratio_to_{first}": round(statistics.median(walls), 2),
            "cpu_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return table


# ---- sampling


def plain_generate(model, ids, mask, table, budget) -> list[list[int]]:
    """model.generate as it is: dynamic cache, ended rows stay. Our processor draws, so the tokens are ours."""
    config, prompt = model.generation_config, ids.shape[1]
    settings = GenerationConfig(
        max_new_tokens=budget, do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    processors = LogitsProcessorList([DrawTokenLogitsProcessor(table, prompt, 1.0)])
    with models.sampling(model):
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=processors
        )
    ends = config.eos_token_id[0]
    rows = output[:, prompt:].tolist()
    return [row[: row.index(ends) + 1] if ends in row else row for row in rows]


def responses(run: steps.Run, rows: list[Row]) -> list[list[int]]:
    budget = run.config.max_response_tokens
    return [row.response for row in generate(run.model, run.tokenizer, rows, budget, decode=run.decode)]


def bench_sampling(words: list[str]) -> None:
    repeats = 4 if words else 15
    run, times, tokens, peaks = new_run(words), {}, [], {}
    budget = run.config.max_response_tokens
    for step in range(repeats + 2):  # the first warms up, the last is for memory
        rows = rows_at(run, step)
        ids, mask = padded((row.prompt_ids for row in rows), run.model.generation_config.pad_token_id, "left")
        table = torch.stack([torch.from_numpy(uniforms(row.key, budget)) for row in rows])
        contenders = {
            "ours": lambda: responses(run, rows),  # noqa: B023
            "plain generate": lambda: plain_generate(run.model, ids, mask.long(), table, budget),  # noqa: B023
        }
        want = None
        for name, call in contenders.items():
            if step > repeats:
                peaks[name] = peak_bytes(call)
                continue
            found, cpu, wall = timed(call)
            want = want or found
            same = sum(a == b for a, b in zip(found, want))
            assert same >= len(want) - 1, f"{name}: {same} of {len(want)} rows are the same"
            if step:
                times.setdefault(name, []).append((cpu, wall))
        tokens += [sum(map(len, want))] if want else []
    table = medians(times, "ours")
    for name, row in table.items():
        row["tokens_per_cpu_s"] = round(statistics.mean(tokens) / row["cpu_s"])
        row["peak_mib"] = round(peaks[name] / 2**20, 1)
    found = {"rows": len(rows), "prompts": len({tuple(row.prompt_ids) for row in rows}), "repeats": repeats}
    found |= {"mean_tokens": statistics.mean(tokens), "table": table}
    write(part_name("sampling", words), found)


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
    problems = [run.data.train[i] for step in range(repeats + 2) for i in picked_at(run, step)]
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
        max_steps=(repeats + 2) * config.updates_per_step,
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


def compare_steps(words: list[str], repeats: int, mixed: bool, rows_per_pass: int) -> dict:
    """Ours and TRL's, step by step in turn. mixed: rewards 0 and 1 in every group, so that every row has weight."""
    run, times, ours, trl_phases, peaks = new_run(words), {"ours": [], "TRL": []}, {}, {}, {}
    sample_groups = steps.sample_groups

    def flipped(rows: int) -> list[float]:
        return [float(i % 2) for i in range(rows)]

    def kept(*args, **settings) -> list[Row]:
        rows = sample_groups(*args, **settings)
        if mixed:
            rows = [replace(row, reward=reward) for row, reward in zip(rows, flipped(len(rows)))]
        ours["rows"] = rows
        return rows

    steps.sample_groups = kept

    def our_step(step: int) -> None:
        if step > repeats:
            peaks["ours"] = peak_bytes(lambda: steps.rl_step(run, step))
            return
        result, cpu, wall = timed(lambda: steps.rl_step(run, step))
        ours["metrics"] = rl_metrics(run, result)
        times["ours"].append((cpu, wall))

    class InTurn(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            done, rest = divmod(state.global_step, run.config.updates_per_step)
            if rest:
                return
            if done > repeats + 1:
                self.memory.__exit__(None, None, None)
                peaks["TRL"] = self.peak[0]
                return
            times["TRL"].append(tuple(now - then for now, then in zip(clocks(), self.begun)))
            our_step(done)
            self.start(done)

        def start(self, step):
            if step > repeats:
                self.memory = peak_memory()
                self.peak = self.memory.__enter__()
            self.begun = clocks()

    def reward(completions, answer, **_):
        return flipped(len(completions)) if mixed else [grade(*pair) for pair in zip(completions, answer)]

    callback = InTurn()
    trainer = new_trainer(run, repeats, reward, rows_per_pass, callback)
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
        trl_phases.setdefault("generate", []).append(wall if CUDA else cpu)
        found = output[:, ids.shape[1] :].tolist()
        assert all(row[: len(want)] == want for row, want in zip(found, drawn))
        return output

    trainer.model.generate = replayed
    our_step(0)
    callback.start(0)
    trainer.train()
    steps.sample_groups = sample_groups
    table = medians({name: pairs[1:] for name, pairs in times.items()}, "ours")  # the first pair warms up
    for name, row in table.items():
        row["peak_mib"] = round(peaks[name] / 2**20, 1)
    log = ours["metrics"]
    return {
        "repeats": repeats,
        "TRL rows per pass": rows_per_pass,
        f"TRL generate {'wall' if CUDA else 'cpu'}_s": round(statistics.median(trl_phases["generate"][1:-1]), 3),
        "ours, share of groups with equal rewards": log["equal_reward_groups"],
        "ours, response tokens": log["response_tokens"],
        "table": table,
    }


def bench_step(words: list[str]) -> None:
    import trl

    table, cases = {"trl": trl.__version__}, (("mixed rewards", True, 16),)
    if CUDA:
        config = parse_config(words)
        rows = config.prompts_per_step * config.rollouts_per_prompt // config.updates_per_step
        cases = (("mixed rewards", True, math.gcd(rows, 64)),)
    if not words:
        cases = (("graded rewards", False, 64), ("graded rewards", False, 16), *cases)
    for name, mixed, rows in cases:
        table[f"{name}, TRL passes of {rows} rows"] = compare_steps(words, 3 if words else 5, mixed, rows)
    write(part_name("cuda-step" if CUDA else "step", words), table)


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
