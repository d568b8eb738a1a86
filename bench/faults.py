"""Runs and evaluations that are killed with SIGKILL and go on: do they end as if nothing had happened?

    OMP_NUM_THREADS=1 python bench/faults.py              all parts (about 15 minutes of a core) -> results/faults.md
    OMP_NUM_THREADS=1 python bench/faults.py moments      some parts, printed only

    operations  a run, killed at each of its file operations in turn, in a life of its own, and resumed
    moments     runs, killed 30 times at random moments, life after life, until they are done; on one rank
    ranks       the same with 10 kills of one or both of two ranks
    evaluation  eval.py, killed at each of its file operations and at 10 random moments
    study       a run of results/study.py, killed at 10 random moments
    faults      what a run says of a full disk, damaged files, a second process, a folder that moved

What a life is and what is compared says bench/lives.py.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, chosen, machine
from lives import (
    EVALUATION,
    LONG,
    RELIFT,
    ROOT,
    Life,
    cut,
    differences,
    evaluating,
    evaluation_differences,
    flip,
    last_line,
    learned,
    live,
    task,
    training,
)

from results import runs, study
from results.protocol import test_rows
from support.checkpoint import checkpoints, locked

# ---- the parts: each gives the lines of its section


def each_operation(work_in: Callable[[Path], Callable], compare: Callable, root: Path) -> list[str]:
    """Kill at each file operation in turn, resume, compare."""
    whole, bad = root / "whole", []
    first = live(work_in(whole), whole)
    assert first.code == 0, first.said
    for number in range(1, first.operations + 1):
        out = root / "killed"
        shutil.rmtree(out, ignore_errors=True)
        killed = live(work_in(out), out, kill_at=number)
        assert killed.code == -signal.SIGKILL, killed
        again = live(work_in(out), out)
        if found := last_line(again.said) if again.code else compare(whole, out):
            bad.append(f"- operation {number}: {found}")
    return [f"{first.operations} file operations, so many kills, {len(bad)} that ended otherwise.", *bad]


def random_moments(
    work_in: Callable[[Path], Callable],
    compare: Callable,
    root: Path,
    kills: int,
    ranks: int = 1,
    written: Sequence[str] = (),
) -> list[str]:
    """Kill at random moments or while one of `written` is being written, life after life, until `kills` are used up;
    each finished run is compared."""
    draw, whole = random.Random(0), root / "whole"
    begun = time.monotonic()
    first = live(work_in(whole), whole, ranks=ranks)
    assert first.code == 0, first.said
    seconds = time.monotonic() - begun
    done, runs, doing, bad = 0, 0, Counter(), []
    while done < kills:
        out, runs = root / f"run-{runs}", runs + 1
        while True:
            moment = time.monotonic() + draw.uniform(0, seconds)
            paths = [out / name for name in written if not (out / name).exists()]
            path = draw.choice([None, None, None, *paths])
            victims = draw.choice([(0,), (1,), (0, 1)]) if ranks > 1 else (0,)

            def now(moment: float = moment, path: Path | None = path, wanted: bool = done < kills) -> bool:
                return wanted and (path.exists() if path else time.monotonic() > moment)

            life = live(work_in(out), out, kill_when=now, ranks=ranks, victims=victims)
            if life.code != -signal.SIGKILL:
                break
            done, doing = done + 1, doing + Counter([life.doing])
        if found := last_line(life.said) if life.code else compare(whole, out):
            bad.append(f"- run {runs}: {found}")
    moments = ", ".join(f"{what} {count}" for what, count in doing.most_common())
    return [f"{done} kills in {runs} runs (during {moments}), {len(bad)} that ended otherwise.", *bad]


def part_moments(root: Path, kills: int = 30, ranks: int = 1) -> list[str]:
    work_in, written = lambda out: training(out, **task(root), **LONG), ("checkpoint/partial", "final.partial")
    return random_moments(work_in, differences, root, kills, ranks, written)


def part_operations(root: Path) -> list[str]:
    return each_operation(lambda out: training(out, **task(root), **RELIFT), differences, root)


def part_evaluation(root: Path) -> list[str]:
    def work_in(out: Path) -> Callable[[], int]:
        return evaluating(out, EVALUATION.split())

    at_operations = each_operation(work_in, evaluation_differences, root)
    return [*at_operations, "", *random_moments(work_in, evaluation_differences, root / "random", 10)]


def studying(out: Path) -> Callable[[], int]:
    """The work of `python results/study.py run` on one small run, in this process; stored in out/habit.jsonl."""
    settings = {"demonstrations": 128, "steps": 4, "prompts_per_step": 4, "save_every": 1, "lr": 1e-3}

    def work() -> int:
        os.chdir(ROOT)
        runs.RUNS, runs.TEST, runs.EVALUATED_EVERY = out / "runs", out / "runs/data/test.jsonl", 2
        runs.test_rows = lambda: test_rows()[::100]
        study.in_processes = lambda function, specs, jobs: ((spec, function(spec)) for spec in specs)
        out.mkdir(parents=True, exist_ok=True)
        runs.make_data(["habit"])
        study.Study("habit", out, 1).make([runs.Spec("habit", "prefix-rft", 0, settings)])
        return 0

    return work


def part_study(root: Path) -> list[str]:
    def compare(one: Path, two: Path) -> list[str]:
        same = (one / "habit.jsonl").read_bytes() == (two / "habit.jsonl").read_bytes()
        return [] if same else ["the stored line"]

    return random_moments(studying, compare, root, 10)


# ---- one fault each: what the run says, and whether it goes on to the same end


def foreign(out: Path, root: Path, **settings: Any) -> None:
    """Take the newest checkpoint from a run with other settings."""
    other = root / "other"
    shutil.rmtree(other, ignore_errors=True)
    live(training(other, **task(root), **(RELIFT | settings)), other)
    shutil.copy(checkpoints(other)[0], checkpoints(out)[0])


def cases(root: Path) -> dict[str, Callable[[Path], Any]]:
    """What is done to the folder of a finished run without final/."""

    def drop_line(out: Path) -> None:
        log = out / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))

    return {
        "the newest checkpoint has one bit flipped": lambda out: flip(checkpoints(out)[0]),
        "… is cut in half": lambda out: cut(checkpoints(out)[0]),
        "… is empty": lambda out: checkpoints(out)[0].write_bytes(b""),
        "… is missing": lambda out: checkpoints(out)[0].unlink(),
        "… is another run's": lambda out: foreign(out, root, seed=1),
        "both have one bit flipped": lambda out: [flip(file) for file in checkpoints(out)],
        "both are missing": lambda out: shutil.rmtree(out / "checkpoint"),
        "metrics.jsonl is missing": lambda out: (out / "metrics.jsonl").unlink(),
        "a line of metrics.jsonl is missing": drop_line,
        "eval.json is cut in half": lambda out: cut(out / "eval.json"),
        "nothing, the folder was moved": lambda out: None,
    }


@contextlib.contextmanager
def small_disk(root: Path, size: str) -> Iterator[Path]:
    """A disk of its own; root alone may mount it."""
    disk = root / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def full_disk(root: Path, size: str) -> tuple[Life, str]:
    """A run on a disk of `size` -> how it ended, and what comes of it when there is more room."""
    with small_disk(root, size) as disk:
        work = training(disk / "run", **task(root), **RELIFT)
        life = live(work, disk / "run")
        subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
        again = live(work, disk / "run")
        return life, last_line(again.said) if again.code else end(root / "whole", disk / "run")


def closed_disk(root: Path) -> Life:
    """A finished run on a disk that may only be read."""
    with small_disk(root, "99m") as disk:
        shutil.copytree(root / "whole", disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return live(training(disk / "run", **task(root), **RELIFT), disk / "run")


def end(whole: Path, out: Path) -> str:
    found = differences(whole, out)
    return f"ANOTHER END: {', '.join(found)}" if found else "the same end"


def part_faults(root: Path) -> list[str]:
    whole = root / "whole"
    work = training(whole, **task(root), **RELIFT)
    assert live(work, whole).code == 0 and learned(whole)
    found = []
    for name, damage in cases(root).items():
        out = root / "faulty"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        shutil.rmtree(out / "final")
        damage(out)
        life = live(training(out, **task(root), **RELIFT), out)
        found.append((name, life, "refused" if life.code else end(whole, out)))
    with locked(whole):
        found.append(("a second process", live(work, whole), "refused"))
    if os.geteuid() == 0:  # the first logs, the first checkpoint, a later one, the final save have no room
        found.append(("a disk that may only be read", closed_disk(root), "refused"))
        found += [(f"a disk of {size}", *full_disk(root, size)) for size in ("8k", "60k", "2m", "8m", "9m")]
    lines = ["| fault | exit code | what the run says | then |", "|---|---|---|---|"]
    for name, life, then in found:
        told = [line for line in life.said.splitlines() if line.startswith(("warning: damaged", "train.py"))]
        line = "".join(told[:1]).partition("; mend")[0]  # the command that follows is long
        lines.append(f"| {name} | {life.code} | {line} | {then} |".replace(str(root), "…"))
    return lines


PARTS = {
    "operations": ("train.py, killed at each of its file operations", part_operations),
    "moments": ("train.py, killed at random moments", part_moments),
    "ranks": ("train.py on two ranks, likewise", lambda root: part_moments(root, kills=10, ranks=2)),
    "evaluation": ("eval.py, killed at each of its file operations and at random moments", part_evaluation),
    "study": ("A run of the study, killed at random moments", part_study),
    "faults": ("Other faults of a run that is to go on", part_faults),
}


def main() -> None:
    asked = chosen(__doc__, PARTS)
    torch.set_num_threads(1)
    said = f"Written by bench/faults.py, which says what is done and compared, on {machine()['device']}."
    lines = ["# Faults: what was tried, and what happened", "", said]
    for name in asked or PARTS:
        title, part = PARTS[name]
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as root:
            found = part(Path(root))
        section = ["", f"## {title}", "", f"    python bench/faults.py {name}", "", *found]
        print("\n".join(section), f"\n({time.monotonic() - begun:.0f} s)", flush=True)
        lines += section
    if not asked:
        (RESULTS / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
