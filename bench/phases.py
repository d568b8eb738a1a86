"""Where a default CPU step of `rft` spends its time, and how cost grows with rows and tokens.

    OMP_NUM_THREADS=1 python bench/phases.py phases growth

Each part prints a table and writes bench/results/throughput-PART.json; growth draws growth.png too. CPU seconds of
the process. Memory: bench/memory.py.
"""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from common import RESULTS, main, new_run, rows_at, timed, write

import decode
import sample
import step as steps
from sample import Row, generate
from support.config import Config
from support.micro_batches import micro_batches

# ---- where a step's time goes


class Phases:
    """Exclusive CPU seconds by phase: a phase's time does not count what the phases inside it take."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.open: list[str] = ["rest of the step"]
        self.since = time.process_time()

    def switch(self) -> None:
        now = time.process_time()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    def wrap(self, owner: object, name: str, phase: str | Callable) -> None:
        """Count calls of owner.name as `phase` (or as what phase(arguments) gives)."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def call(*args, **settings):
            self.switch()
            self.open.append(phase if isinstance(phase, str) else phase(*args, **settings))
            try:
                return inner(*args, **settings)
            finally:
                self.switch()
                self.open.pop()

        setattr(owner, name, call)


def watch(run: steps.Run, phases: Phases, counts: dict[str, int]) -> None:
    """Put timers around the step's parts."""

    def add(name, number):
        counts[name] = counts.get(name, 0) + int(number)

    def forward_phase(input_ids, attention_mask, use_cache, **_):
        if not use_cache:
            return phases.open[-1]
        if input_ids.shape[1] > 1:
            return "prompts: forward"
        add("decode passes", 1)
        add("rows", len(input_ids))
        add("ended rows", (input_ids == run.model.generation_config.pad_token_id).sum())
        add("columns attended", attention_mask.numel())
        add("of them padding", (attention_mask == 0).sum())
        return "tokens: forward, without attention"

    def training_phase(model, rollouts, rows, temperature):
        columns, _ = rollouts.columns(rows)
        add("columns passed", len(rows) * (columns.stop - columns.start))
        add("of them tokens", rollouts.attention_mask[rows].sum())
        return "training forward: update" if torch.is_grad_enabled() else "training forward: old log-probs"

    def attention_phase(*_, **__):
        return "tokens: attention" if phases.open[-1].startswith("tokens") else phases.open[-1]

    body = run.model.base_model
    body.forward = body.forward  # an attribute of its own, so that the wrapper can be put there
    phases.wrap(body, "forward", forward_phase)
    phases.wrap(torch.nn.functional, "scaled_dot_product_attention", attention_phase)
    phases.wrap(decode.RoomyLayer, "update", "cache: write")
    phases.wrap(decode.RoomyLayer, "reorder_cache", "cache: share prompts, drop ended rows")
    phases.wrap(decode.DrawTokenLogitsProcessor, "__call__", "draw")
    phases.wrap(steps, "generate", "rest of generate")
    phases.wrap(steps, "pack", "pack")
    phases.wrap(steps, "grade_all", "grade")
    phases.wrap(steps, "forward", training_phase)
    phases.wrap(torch.Tensor, "backward", "backward")
    phases.wrap(steps, "clip_gradients", "clip, AdamW")
    phases.wrap(run.optimizer, "step", "clip, AdamW")


def bench_phases(repeats: int = 8) -> None:
    run, counts = new_run(), {}
    row, budget = rows_at(run, 0)[:1], run.config.max_response_tokens
    one = [timed(lambda: generate(run.model, row, budget, 0.0)) for _ in range(5)]
    fixed = statistics.median(cpu / (len(found[0]) or 1) for found, cpu, _ in one[1:])
    steps.rl_step(run, 0)
    phases = Phases()
    watch(run, phases, counts)
    for step in range(1, repeats + 1):
        steps.rl_step(run, step)
    phases.switch()
    total = sum(phases.seconds.values())
    table = {
        name: {"cpu_ms_per_step": round(1000 * s / repeats, 1), "share": round(s / total, 3)}
        for name, s in sorted(phases.seconds.items(), key=lambda item: -item[1])
    }
    passes = counts["decode passes"]
    facts = {
        "cpu_s_per_step": round(total / repeats, 3),
        "decode passes per step": passes / repeats,
        "rows of a decode pass": round(counts["rows"] / passes, 1),
        "of them ended already": round(counts["ended rows"] / counts["rows"], 3),
        "padding in a decode pass's attention": round(counts["of them padding"] / counts["columns attended"], 3),
        "cpu_ms per token of one row alone (call overhead)": round(1000 * fixed, 2),
        "padding in training passes": round(1 - counts["of them tokens"] / counts["columns passed"], 3),
    }
    write("phases", {"repeats": repeats, **facts, "table": table})


# ---- growth


def bench_growth(repeats: int = 3) -> None:
    """CPU seconds of sampling and of an update for more rows and for more tokens, all rows of the same length."""
    run, table = new_run(), []
    run.model.generation_config.eos_token_id = [run.model.config.vocab_size]  # never drawn: no row ends
    for rows, budget in [(32, 96), (64, 96), (128, 96), (256, 96), (64, 48), (64, 192), (64, 384)]:
        problems = run.data.encoded[: rows // 8]
        plan = [Row(g, (g, i), problem.prompt_ids, []) for g, problem in enumerate(problems) for i in range(8)]
        sampled, updated = [], []
        for _ in range(repeats):
            responses, cpu, _ = timed(lambda: generate(run.model, plan, budget))  # noqa: B023
            sampled.append(cpu)
            rollouts = sample.pack(plan, responses, run.model, run.tokenizer)

            def passes():
                for chunk in micro_batches(rollouts, torch.arange(rows), Config.micro_batch_tokens):  # noqa: B023
                    steps.forward(run.model, rollouts, chunk, 1.0)[0].sum().backward()  # noqa: B023

            updated.append(timed(passes)[1])
        tokens = rows * budget
        table.append(
            {
                "rows": rows,
                "tokens_per_row": budget,
                "sample_cpu_s": round(statistics.median(sampled), 3),
                "update_cpu_s": round(statistics.median(updated), 3),
                "sampled_tokens_per_cpu_s": round(tokens / statistics.median(sampled)),
                "update_tokens_per_cpu_s": round(tokens / statistics.median(updated)),
            }
        )
    write("growth", {"repeats": repeats, "table": table})
    draw_growth(table)


def draw_growth(table: list[dict]) -> None:
    """bench/results/growth.png: seconds over rows and over tokens a row; dotted: proportional to the last point."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, x, fixed in ((axes[0], "rows", ("tokens_per_row", 96)), (axes[1], "tokens_per_row", ("rows", 64))):
        points = sorted((row for row in table if row[fixed[0]] == fixed[1]), key=lambda row: row[x])
        for name, phase, colour in (("sample_cpu_s", "sampling", "C0"), ("update_cpu_s", "update", "C1")):
            axis.plot([row[x] for row in points], [row[name] for row in points], "o-", color=colour, label=phase)
            last = points[-1]
            axis.plot([0, last[x]], [0, last[name]], ":", color=colour, label=f"{phase}, if proportional")
        axis.set_xlabel(x.replace("_", " "))
        axis.set_ylabel("CPU seconds")
        axis.set_title(f"{fixed[1]} {fixed[0].replace('_', ' ')}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(RESULTS / "growth.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__doc__, {"phases": bench_phases, "growth": bench_growth})
