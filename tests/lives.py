"""This file runs train.py and eval.py in forked processes for the tests of faults, and compares the folders that they
leave. A forked process, called a "life" here, ends by itself or by SIGKILL before an operation on a file. A forked
process need not import PyTorch again, which saves time.

Two run folders are equal if metrics.jsonl (without times), samples.jsonl and groups.jsonl have equal rows, and
metrics.jsonl has each step once. Equal runs also have the same eval.json, weights in final/ and last checkpoint
(weights, optimizer, step), bit for bit.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import eval
import train
from support.checkpoint import checkpoints
from support.config import TASK

ROOT = Path(__file__).parents[1]
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


class Life(NamedTuple):
    """How a forked process ended, and what it printed."""

    code: int  # the process's exit code, or minus the number of the signal that killed it
    operations: int  # number of operations on files in the run's folder; 0 if the process was killed
    output: str


def count_operations(folder: Path, kill_at: int | None) -> list[int]:
    """Starts to count this process's writing operations on files under `folder`, and returns a list whose only item
    is the count so far. Before operation number `kill_at` (from 1) the process kills itself by SIGKILL."""
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
    """Fork a process that does `work`, and return its id. The process's output is written to the file `notes`, and
    its number of file operations to the file `notes`.count."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code, counted = 1, [0]
    try:
        os.environ |= env
        with notes.open("w", buffering=1) as stream:
            sys.stdout = sys.stderr = stream
            os.dup2(stream.fileno(), 2)
            counted = count_operations(folder, kill_at)
            code = work()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        Path(f"{notes}.count").write_text(str(counted[0]))
        os._exit(code if isinstance(code, int) else 1)


def live(work: Callable[[], int], folder: Path, *, kill_at: int | None = None, ranks: int = 1) -> Life:
    """Do `work` in `ranks` forked processes until they end or are killed at file operation `kill_at`. When one rank
    has died, the other ranks are killed, as torchrun does."""
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

        while len(codes) < ranks:
            time.sleep(0.002)
            reap()
            if any(codes.values()) and len(codes) < ranks:
                time.sleep(0.05)
                for rank in set(range(ranks)) - codes.keys():
                    os.kill(pids[rank], signal.SIGKILL)
        code = next((code for code in codes.values() if code), 0)
        count = Path(f"{notes[0]}.count")
        output = "".join(note.read_text() for note in notes)
        return Life(code, int(count.read_text()) if count.exists() else 0, output)


def training(folder: Path, **settings: Any) -> Callable[[], int]:
    """Returns a function that does what `python train.py --out FOLDER --resume auto …` does."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    argv = [*words, "--out", str(folder), "--resume", "auto"]

    def work() -> int:
        sys.argv = ["train.py", *argv]
        train.main()
        return 0

    return work


def evaluating(folder: Path, words: Sequence[str]) -> Callable[[], int]:
    """Returns a function that does what `python eval.py … --out FOLDER` does."""

    def work() -> int:
        sys.argv = ["eval.py", *words, "--out", str(folder)]
        eval.main()
        return 0

    return work


# ---- what is compared


def rows(path: Path) -> list[dict]:
    """Returns the rows of a log file, without times and speeds."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds_", "tokens_per_"))} for row in lines]


def differences(one: Path, two: Path) -> list[str]:
    """Returns the names of the logs and files in which two finished runs differ; [] if the runs are equal."""
    logs = [f"{name}.jsonl" for name in ("metrics", "samples", "groups")]
    names = [log for log in logs if rows(one / log) != rows(two / log)]
    steps = [row["step"] for row in rows(two / "metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        names.append("steps")
    for name in ("eval.json", "final/model.safetensors"):
        if (one / name).read_bytes() != (two / name).read_bytes():
            names.append(name)
    names += [] if learned(one) else ["nothing was learned"]
    states = [torch.load(checkpoints(folder)[0], weights_only=True) for folder in (one, two)]
    if not equal(*states):
        names.append("checkpoint")
    return names


def learned(folder: Path) -> bool:
    """Returns whether a run has made an update at all. Without updates two runs have equal weights even if resuming
    is broken, so comparing them would prove nothing."""
    return any(row["grad_norm"] + row.get("relift_grad_norm", 0) for row in rows(folder / "metrics.jsonl"))


def equal(one: Any, two: Any) -> bool:
    """Returns whether two values are equal to the bit; dicts and lists are compared item by item."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def evaluation_differences(one: Path, two: Path) -> list[str]:
    """Returns which files of two finished evaluations differ: "generations" (responses) or "results" (without
    dates)."""
    responses = [(folder / "generations.jsonl").read_bytes() for folder in (one, two)]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for result in results:
        result["settings"] |= {"date": "", "continued": ""}
    pairs = {"generations": responses, "results": results}
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


# ---- a small task

SETTINGS = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "device": "cpu", "eval_samples": 1}
# responses are short, because sampling takes most of a test's time
SETTINGS |= {"max_response_tokens": 80, "eval_response_tokens": 8}
RELIFT = SETTINGS | {"method": "relift", "relift_buffer": 2, "steps": 3, "save_every": 1, "eval_every": 2}
EVALUATION = "--model data/base --benchmarks embedded --problems 4 --samples 2 --temperature 1"
EVALUATION += " --max_response_tokens 16 --rows_per_call 8"


def task(folder: Path) -> dict[str, Any]:
    """Write 12 training problems of the embedded task, 8 of them with a demonstration, and 4 held-out problems.
    Returns the settings data, eval_data and test_data with these files' paths."""
    lines = (ROOT / TASK / "train.jsonl").read_text().splitlines()
    demonstrated = [line for line in lines if json.loads(line).get("demonstrations")]
    bare = [line for line in lines if not json.loads(line).get("demonstrations")]
    (folder / "train.jsonl").write_text("\n".join([*demonstrated[:8], *bare[:4]]) + "\n")
    (folder / "held.jsonl").write_text("\n".join(bare[-4:]) + "\n")
    return {"data": folder / "train.jsonl", "eval_data": folder / "held.jsonl", "test_data": folder / "held.jsonl"}


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
