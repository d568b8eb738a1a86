"""Runs and evaluations that are killed with SIGKILL and go on: do they end as if nothing had happened?

    OMP_NUM_THREADS=1 python bench/faults.py              all parts (about 15 minutes of a core) -> results/faults.md
    OMP_NUM_THREADS=1 python bench/faults.py moments      some parts, printed only

    operations  a run, killed at each of its file operations in turn, in a life of its own, and resumed
    moments     runs, killed 30 times at random moments, life after life, until they are done; on one rank
    ranks       the same with 10 kills of one or both of two ranks
    evaluation  eval.py, killed at each of its file operations and at 10 random moments
    faults      what a run says of a full disk, damaged files, a second process, a folder that moved

Each life is a forked process that runs train.train as the command does, so that what is measured is the run and not
the import of PyTorch. "The same" means: every row of metrics.jsonl (but times), samples.jsonl and groups.jsonl once
and equal, and eval.json, the weights in final/ and the last checkpoint (weights, optimizer, step) equal bit for bit.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, chosen, machine

import eval
import train
from support.checkpoint import checkpoints, locked
from support.config import TASK

ROOT = Path(__file__).parents[1]
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
PHASES = {  # a function on the stack of a killed process -> what it was doing; the first found counts
    "save_model": "the final save",
    "save": "a checkpoint",
    "accuracy": "an evaluation",
    "draw_curves": "the figure",
    "sample_and_grade": "sampling",
    "sample_missing": "sampling",
    "old_stats": "an update",
    "update": "an update",
    "prepare": "loading",
    "load": "resuming",
}


class Life(NamedTuple):
    """How a process ended."""

    code: int  # of exit; negative: the signal
    operations: int  # on files in its folder, if it was not killed
    said: str  # on stdout and stderr
    doing: str  # what it was doing when it was killed from outside


def count_operations(folder: Path, kill_at: int | None) -> list[int]:
    """From now on count this process's writing operations on files under `folder`; before number `kill_at` (from 1)
    die by SIGKILL."""
    counted = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        counted[0] += 1
        if counted[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counted


def start(work: Callable[[], int], folder: Path, notes: Path, kill_at: int | None, env: dict) -> int:
    """Fork a process that does `work` -> its id. What it says and how many operations it made stand in `notes`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code, counted = 1, [0]
    try:
        os.environ |= env
        with notes.open("w") as said, Path(f"{notes}.stack").open("w") as stack:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
            faulthandler.register(signal.SIGUSR1, stack)
            counted = count_operations(folder, kill_at)
            code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        Path(f"{notes}.count").write_text(str(counted[0]))
        os._exit(code if isinstance(code, int) else 1)


def live(
    work: Callable[[], int],
    folder: Path,
    *,
    kill_at: int | None = None,
    kill_after: float | None = None,
    ranks: int = 1,
    victims: Sequence[int] = (0,),
) -> Life:
    """One life of a run: to its end, or to a kill at a file operation or after `kill_after` seconds. All `victims`
    are killed at once and then, as torchrun does, the ranks that are left."""
    with tempfile.TemporaryDirectory() as name:
        notes = [Path(name) / str(rank) for rank in range(ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            net = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env = [net | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
        pids = [start(work, folder, note, kill_at, e) for note, e in zip(notes, env)]
        codes: dict[int, int] = {}

        def reap() -> None:
            for rank, pid in enumerate(pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])

        def kill(chosen: Sequence[int], number: int) -> None:
            for rank in chosen:
                if rank not in codes:
                    os.kill(pids[rank], number)

        deadline = None if kill_after is None else time.monotonic() + kill_after
        doing, killed = "", False
        while len(codes) < ranks:
            time.sleep(0.002)
            reap()
            if deadline and time.monotonic() > deadline and not codes:
                kill(victims, signal.SIGUSR1)  # writes where it is
                time.sleep(0.01)
                kill(victims, signal.SIGKILL)
                deadline, killed = None, True
            elif any(codes.values()) and len(codes) < ranks:
                time.sleep(0.05)
                kill(range(ranks), signal.SIGKILL)
        code = -signal.SIGKILL if killed else next((code for code in codes.values() if code), 0)
        if killed:
            stack = Path(f"{notes[victims[0]]}.stack").read_text()
            doing = next((what for name, what in PHASES.items() if f" in {name}\n" in stack), "between")
        count = Path(f"{notes[0]}.count")
        said = "".join(note.read_text() for note in notes)
        return Life(code, int(count.read_text()) if count.exists() else 0, said, doing)


def training(folder: Path, **settings: Any) -> Callable[[], int]:
    """The work of `python train.py --out FOLDER --resume auto …`"""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    argv = [*words, "--out", str(folder), "--resume", "auto"]

    def work() -> int:
        sys.argv = ["train.py", *argv]
        train.main()
        return 0

    return work


def evaluating(folder: Path, words: Sequence[str]) -> Callable[[], int]:
    """The work of `python eval.py … --out FOLDER`"""

    def work() -> int:
        sys.argv = ["eval.py", *words, "--out", str(folder)]
        eval.main()
        return 0

    return work


# ---- what is compared


def rows(path: Path) -> list[dict]:
    """The rows of a log, without times."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds_", "tokens_per_"))} for row in found]


def differences(one: Path, two: Path) -> list[str]:
    """In what two finished runs differ; [] for nothing."""
    logs = [f"{name}.jsonl" for name in ("metrics", "samples", "groups")]
    found = [log for log in logs if rows(one / log) != rows(two / log)]
    steps = [row["step"] for row in rows(two / "metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        found.append("steps")
    for name in ("eval.json", "final/model.safetensors"):
        if (one / name).read_bytes() != (two / name).read_bytes():
            found.append(name)
    found += [] if learned(one) else ["nothing was learned"]
    states = [torch.load(checkpoints(folder)[0], weights_only=True) for folder in (one, two)]
    if not equal(*states):
        found.append("checkpoint")
    return found


def learned(folder: Path) -> bool:
    """Whether a run has made an update at all: the end of one that has not says little."""
    return any(row["grad_norm"] + row.get("relift_grad_norm", 0) for row in rows(folder / "metrics.jsonl"))


def equal(one: Any, two: Any) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def evaluation_differences(one: Path, two: Path) -> list[str]:
    """In what two finished evaluations differ: responses, results but for dates."""
    responses = [(folder / "generations.jsonl").read_bytes() for folder in (one, two)]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for result in results:
        for name in ("date", "continued"):
            result["settings"].pop(name, None)
    pairs = {"generations": responses, "results": results}
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


# ---- the parts: each gives the lines of its section


SETTINGS = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "device": "cpu", "eval_samples": 1, "decode": "loop"}
SETTINGS |= {"max_response_tokens": 80, "eval_response_tokens": 48}
RELIFT = SETTINGS | {"method": "relift", "relift_buffer": 2, "steps": 3, "save_every": 1, "eval_every": 2}
LONG = SETTINGS | {"steps": 12, "save_every": 2, "eval_every": 3}
EVALUATION = "--model data/base --benchmarks embedded --problems 4 --samples 2 --temperature 1"
EVALUATION += " --max_response_tokens 40 --rows_per_call 8"


def task(folder: Path) -> dict[str, Any]:
    """A few problems of the embedded task, half of them with a demonstration, and the settings that name them."""
    lines = (ROOT / TASK / "train.jsonl").read_text().splitlines()
    given = [line for line in lines if json.loads(line).get("demonstrations")]
    bare = [line for line in lines if not json.loads(line).get("demonstrations")]
    (folder / "train.jsonl").write_text("\n".join([*given[:8], *bare[:4]]) + "\n")
    (folder / "held.jsonl").write_text("\n".join(bare[-4:]) + "\n")
    return {"data": folder / "train.jsonl", "eval_data": folder / "held.jsonl", "test_data": folder / "held.jsonl"}


def each_operation(work_in: Callable[[Path], Callable], compare: Callable, root: Path) -> list[str]:
    """Kill at each file operation in turn, resume, compare."""
    whole = root / "whole"
    first = live(work_in(whole), whole)
    assert first.code == 0, first.said
    bad = []
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
    work_in: Callable[[Path], Callable], compare: Callable, root: Path, kills: int, ranks: int = 1
) -> list[str]:
    """Kill at random moments, life after life, until `kills` are used up; each finished run is compared."""
    draw, whole = random.Random(0), root / "whole"
    begun = time.monotonic()
    first = live(work_in(whole), whole, ranks=ranks)
    assert first.code == 0, first.said
    seconds = time.monotonic() - begun
    done, runs, doing, bad = 0, 0, Counter(), []
    while done < kills:
        out, runs = root / f"run-{runs}", runs + 1
        while True:
            moment = draw.uniform(0, seconds) if done < kills else None
            victims = draw.choice([(0,), (1,), (0, 1)]) if ranks > 1 else (0,)
            life = live(work_in(out), out, kill_after=moment, ranks=ranks, victims=victims)
            if life.code != -signal.SIGKILL:
                break
            done, doing = done + 1, doing + Counter([life.doing])
        if found := last_line(life.said) if life.code else compare(whole, out):
            bad.append(f"- run {runs}: {found}")
    moments = ", ".join(f"{what} {count}" for what, count in doing.most_common())
    return [f"{done} kills in {runs} runs (during {moments}), {len(bad)} that ended otherwise.", *bad]


def part_operations(root: Path) -> list[str]:
    return each_operation(lambda out: training(out, **task(root), **RELIFT), differences, root)


def part_moments(root: Path) -> list[str]:
    return random_moments(lambda out: training(out, **task(root), **LONG), differences, root, 30)


def part_ranks(root: Path) -> list[str]:
    return random_moments(lambda out: training(out, **task(root), **LONG), differences, root, 10, ranks=2)


def part_evaluation(root: Path) -> list[str]:
    words = EVALUATION.split()
    (root / "random").mkdir()
    at_operations = each_operation(lambda out: evaluating(out, words), evaluation_differences, root)
    at_moments = random_moments(lambda out: evaluating(out, words), evaluation_differences, root / "random", 10)
    return [*at_operations, "", *at_moments]


# ---- one fault each: what the run says, and whether it goes on to the same end


def last_line(said: str) -> str:
    return said.splitlines()[-1] if said else ""


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
        lines.append(f"| {name} | {life.code} | {''.join(told[:1])} | {then} |".replace(str(root), "…"))
    return lines


PARTS = {
    "operations": ("train.py, killed at each of its file operations", part_operations),
    "moments": ("train.py, killed at random moments", part_moments),
    "ranks": ("train.py on two ranks, killed at random moments", part_ranks),
    "evaluation": ("eval.py, killed at each of its file operations and at random moments", part_evaluation),
    "faults": ("Other faults of a run that is to go on", part_faults),
}


def main() -> None:
    asked = chosen(__doc__, PARTS)
    torch.set_num_threads(1)
    lines = ["# Faults: what was tried, and what happened", ""]
    lines += [f"Written by bench/faults.py, which says what is done and compared, on {machine()['device']}."]
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
