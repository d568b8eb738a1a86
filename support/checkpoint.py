"""The run folder: make it, save to it, resume from it, exactly: k steps + resume + k steps = 2k steps, bit for bit.

A checkpoint is one file: weights, optimizer state, the number of finished steps and ReLIFT's buffer. There is no
random state and no data position in it: every draw is a pure function of (seed, step, problem, rollout), and the
order of problems of (seed, epoch). The file is written beside the old one and renamed over it, so that at any
moment, also under SIGKILL, one whole checkpoint exists. Logs are cut back to the checkpoint's step on resume.
With several ranks only the first writes; weights and optimizer are put together before and split again after, so a
run may go on with another number of ranks.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from support.config import Config
from support.distributed import from_first, part_like, rank, state_of, whole


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if rank() > 0:
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """An object that this project wrote. ValueError, one line, where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}): restore the file, or choose another folder") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON object: choose another folder")
    return value


def state_file(folder: Path) -> Path:
    return folder / "checkpoint" / "state.pt"


def save(folder: Path, step: int, buffer: list[int], model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make this the checkpoint of the run in `folder`. Called on every rank."""
    state = {"step": step, "buffer": buffer, "model": whole(state_of(model))}
    state["optimizer"] = whole(optimizer.state_dict())
    if rank() > 0:
        return
    path = state_file(folder)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name("state.pt.partial")
    torch.save(state, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the checkpoint's weights and optimizer state into place -> its step and buffer; None if there is none.

    The file is mapped, not read: each rank takes its part. ValueError if it is damaged or of another model.
    """
    path = state_file(folder)
    if not path.exists():
        return None
    with path.open("rb"):
        pass  # a file that may not be read is not a damaged one: its OSError says what it is
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged: delete {path.parent} to start the run again from step 0") from error
    own, saved = state_of(model), state["model"]
    other = [name for name in own.keys() | saved.keys() if name not in own or name not in saved]
    other += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if other:
        raise ValueError(
            f"{path} is the checkpoint of another model: {min(other)} differs; give the model it was made with, "
            "or another out"
        )
    model.load_state_dict({name: part_like(saved[name], own[name]) for name in own}, strict=False)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if value.shape == parameters[i].shape:
                values[name] = part_like(value, parameters[i])
    optimizer.load_state_dict(state["optimizer"])
    return {"step": state["step"], "buffer": state["buffer"]}


def cut_log(path: Path, step: int) -> None:
    """Keep the rows of a JSONL log up to `step`; a last line that was cut short by a kill goes too."""
    if rank() > 0:
        return
    kept, lines = [], path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what stands after the last line's end was cut short
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: found {line[:40]!r}, expected a step's row: delete it") from error
    write_text(path, "".join(kept))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL log, on disk when this returns."""
    if rank() > 0:
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def check_folder(config: Config) -> None:
    """Raises ValueError if --out holds something that this run must not touch."""
    folder = Path(config.out)
    if not config.out or not folder.exists():
        return
    if not config.resume:
        raise ValueError(f"out {config.out!r} exists: choose another folder, or continue its run with --resume auto")
    saved = folder / "config.json"
    if not saved.exists():
        raise ValueError(f"out {config.out!r} exists and holds no run (no config.json): choose another folder")
    ours, theirs = dataclasses.asdict(config), read_json(saved)
    free = {"resume", "out", "save_every", "device", "tensorboard"}
    free |= {"recompute", "offload", "rows_per_call", "micro_batch_tokens", "decode"}  # memory: rounding may change
    changed = [name for name in ours if name not in free and ours[name] != theirs.get(name)]
    if changed:
        was = ", ".join(f"{name} {theirs.get(name)!r}" for name in changed)
        raise ValueError(f"out {config.out!r} holds a run with other settings ({was}): repeat them to resume it")


def prepare_folder(config: Config) -> Path:
    """The run's folder with its config.json: --out, or the first free runs/METHOD-NNN. Made by the first rank."""
    folder = Path(config.out)
    if rank() > 0:
        return from_first(None)
    if config.out:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
    else:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("runs") / f"{config.method}-{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    write_text(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return from_first(folder)
