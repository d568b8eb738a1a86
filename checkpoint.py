"""The run folder: make it, save to it, resume from it, exactly: k steps + resume + k steps = 2k steps, bit for bit.

A checkpoint is one file: weights, optimizer state, the number of finished steps and ReLIFT's buffer. There is no
random state and no data position in it: every draw is a pure function of (seed, step, problem, rollout), and the
order of problems of (seed, epoch). The file is written beside the old one and renamed over it, so that at any
moment, also under SIGKILL, one whole checkpoint exists. Logs are cut back to the checkpoint's step on resume.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch

from config import Config


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def state_file(folder: Path) -> Path:
    return folder / "checkpoint" / "state.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Make `state` the checkpoint of the run in `folder`."""
    path = state_file(folder)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name("state.pt.partial")
    torch.save(state, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The run's checkpoint; None if it has none yet."""
    path = state_file(folder)
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def cut_log(path: Path, step: int) -> None:
    """Keep the rows of a JSONL log up to `step`; a last line that was cut short by a kill goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    write_text(path, "".join(line + "\n" for line in kept))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL log, on disk when this returns."""
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
    ours, theirs = dataclasses.asdict(config), json.loads(saved.read_text(encoding="utf-8"))
    free = {"resume", "out", "save_every", "device", "tensorboard"}
    changed = [name for name in ours if name not in free and ours[name] != theirs.get(name)]
    if changed:
        was = ", ".join(f"{name} {theirs.get(name)!r}" for name in changed)
        raise ValueError(f"out {config.out!r} holds a run with other settings ({was}): repeat them to resume it")


def prepare_folder(config: Config) -> Path:
    """The run's folder with its config.json: --out, or the first free runs/METHOD-NNN."""
    folder = Path(config.out)
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
    return folder
