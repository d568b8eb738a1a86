"""The run folder: make it, save to it, resume from it, exactly: k steps + resume + k steps = 2k steps, bit for bit.

A checkpoint is one file: weights, optimizer state, the number of finished steps; ReLIFT's buffer and optimizer. There
is no random state and no data position in it: every draw is a pure function of (seed, step, problem, rollout), and
the order of problems of (seed, epoch). The file is written beside the old one and renamed over it, so that at any
moment, also under SIGKILL, one whole checkpoint exists. Logs are cut back to the checkpoint's step on resume.
With several ranks only the first writes; weights and optimizer are put together before and split again after, so a
run may go on with another number of ranks.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from support.config import Config
from support.distributed import from_rank_0, full_state, rank, shard_like, state_of

REMEMBERED = "trained_with.json"


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


def sha256(*paths: Path) -> str:
    """Of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def weights_fingerprint(path: str, model: Any) -> str:
    """What identifies a model's weights: sha256 of a folder's files, or the hub's revision."""
    folder = Path(path)
    return sha256(*sorted(folder.glob("*.safetensors"))) if folder.is_dir() else model.config._commit_hash


def made_of(run: Any, files: dict[str, str]) -> dict[str, str]:
    """Fingerprints of all that a run (a step.Run) takes by name: its data `files`, the base model, the prompts and
    demonstrations as rendered and encoded, the reward. {} on other ranks than the first."""
    if rank() > 0:
        return {}
    texts = [(p.prompt_ids, p.demonstrations) for p in (*run.data.encoded, *run.data.supervised)]
    texts += [p.prompt_ids for _, encoded in run.data.held.values() for p in encoded]
    found = {name: sha256(Path(path)) for name, path in files.items()}
    found["model"] = weights_fingerprint(run.config.model, run.model)
    found["prompts and demonstrations as token ids"] = hashlib.sha256(repr(texts).encode()).hexdigest()
    return found | {"reward": run.reward.fingerprint}


def remember(model_folder: Path, system: str | None, reward: str) -> None:
    """Note in a model folder what it was trained with: the system message its rows share (None: they have several),
    the reward."""
    write_text(model_folder / REMEMBERED, json.dumps({"system": system, "reward": reward}, indent=1) + "\n")


def trained_with(model: str) -> dict[str, str]:
    """What `remember` noted in this model folder, without what is None; {} for any other model."""
    file = Path(model) / REMEMBERED
    found = read_json(file) if file.exists() else {}
    return {name: found[name] for name in ("system", "reward") if isinstance(found.get(name), str)}


def state_file(folder: Path) -> Path:
    return folder / "checkpoint" / "state.pt"


def save(folder: Path, step: int, run: Any) -> None:
    """Make this the checkpoint of the run (a step.Run) in `folder`. Called on every rank."""
    state = {
        "step": step,
        "model": full_state(state_of(run.model)),
        "optimizer": full_state(run.optimizer.state_dict()),
    }
    if run.collector:
        state["collector"] = {
            "waiting": run.collector.waiting,
            "optimizer": full_state(run.collector.optimizer.state_dict()),
        }
    if rank() > 0:
        return
    path = state_file(folder)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name("state.pt.partial")
    torch.save(state, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(folder: Path, run: Any) -> int:
    """Put the checkpoint into the run (a step.Run) -> its step; 0 if there is none.

    The file is mapped, not read: each rank takes its part. ValueError if it is damaged or of another model.
    """
    path = state_file(folder)
    if not path.exists():
        return 0
    with path.open("rb"):
        pass  # a file that may not be read is not a damaged one: its OSError says what it is
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged: delete {path.parent} to start the run again from step 0") from error
    own, saved = state_of(run.model), state["model"]
    other = [name for name in own.keys() | saved.keys() if name not in own or name not in saved]
    other += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if other:
        raise ValueError(
            f"{path} is the checkpoint of another model: {min(other)} differs; give the model it was made with, "
            "or another out"
        )
    run.model.load_state_dict({name: shard_like(saved[name], own[name]) for name in own}, strict=False)
    load_optimizer(run.optimizer, state["optimizer"])
    if run.collector:
        run.collector.waiting = state["collector"]["waiting"]
        load_optimizer(run.collector.optimizer, state["collector"]["optimizer"])
    return state["step"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state, whole tensors, into an optimizer whose parameters may be split over ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[i].shape:
                values[name] = shard_like(value, parameters[i])
    optimizer.load_state_dict(state)


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


def changed_ingredients(config: Config, ingredients: dict[str, str]) -> list[str]:
    """Which of them are not those of the run in --out, if there is one."""
    saved = Path(config.out) / "config.json"
    if not config.out or not saved.exists():
        return []
    known = read_json(saved).get("made_of", {})
    changed = [name for name in ingredients if known.get(name) != ingredients[name]]
    return [f"{name} ({value})" if (value := getattr(config, name, "")) else name for name in changed]


def prepare_folder(config: Config, ingredients: dict[str, str]) -> Path:
    """The run's folder with its config.json: --out, or the first free runs/METHOD-NNN. Made by the first rank.

    config.json holds the settings and, under "made_of", the fingerprints of the run's `ingredients`. ValueError if
    the run that is to go on was made of others.
    """
    folder = Path(config.out)
    if changed := from_rank_0(changed_ingredients(config, ingredients) if rank() == 0 else None):
        raise ValueError(
            f"out {config.out!r} holds a run that was made of something else: {', '.join(changed)} changed since; "
            "restore what it was to go on, or choose another folder"
        )
    if rank() > 0:
        return from_rank_0(None)
    if config.out:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
    else:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path("runs") / f"{config.method}-{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    content = dataclasses.asdict(config) | {"made_of": ingredients}
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")
    return from_rank_0(folder)
