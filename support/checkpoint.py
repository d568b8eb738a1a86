"""The run folder: made, locked, saved to and resumed from. k steps + resume + k steps = 2k steps, bit for bit.

A checkpoint is one file. It holds the trained weights, the optimizer's state and the number of finished steps, and
for ReLIFT its buffer and second optimizer. It needs no random state and no position in the data. Every draw is a pure
function of (seed, step, problem, rollout), and the order of problems is one of (seed, epoch). A checkpoint is written
beside the older ones and renamed when it is whole; the last two are kept. So one whole checkpoint exists at any
moment, also under SIGKILL or with a full disk. PyTorch writes a zip file with a CRC-32 of every part. On resume the
newest file whose parts agree with their CRC is taken, and the logs are cut back to its step. A lock keeps a second
process out; the system releases it however the process ends. With several ranks only the first one writes. Weights
and optimizer state are put together before saving and split again after loading, so a run may continue with another
number of ranks.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from support.config import Config
from support.distributed import from_rank_0, full_state, rank, shard_like, trained
from support.errors import InputError
from support.files import make_folder, read_json, read_log, reading, replacing, writing

REMEMBERED = "trained_with.json"

# settings that may change when a run is resumed
FREE = {"resume", "accept_changed", "out", "save_every", "save_dtype", "device"}
# changing these changes at most rounding
FREE |= {"tensorboard", "recompute", "offload", "rows_per_call", "micro_batch_tokens"}
# only these are left of a run that was killed before its config.json was whole
OURS = {"lock", "config.json.partial"}


# ---- files


def _write(path: Path, mode: str, text: str) -> None:
    """Write `text`; when this returns, it is on the disk."""
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if rank() > 0:
        return
    with replacing(path) as partial:
        _write(partial, "w", text)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL log; when this returns, they are on the disk."""
    if rank() > 0:
        return
    with writing(path):
        _write(path, "a", "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this project out of `folder`. Raises InputError if another process is at work in it.

    The first rank takes the lock. The system holds it on an open file, so it ends with the process, also with a
    killed one, and is never stale.
    """
    if rank() > 0:
        yield
        return
    lock = FileLock(folder / "lock", blocking=False)
    with reading(folder / "lock"):
        try:
            lock.acquire()
        except Timeout as error:
            other = "another process is at work in it: wait for it, end it, or choose another folder"
            raise InputError(f"{folder}: {other}") from error
    try:
        yield
    finally:
        lock.release()


def sha256(*paths: Path) -> str:
    """Returns the SHA-256 of the files' contents, one file after the other.

    reward.py, which imports nothing of ours but answers/, hashes its source files by a small function of its own.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def weights_fingerprint(path: str, model: Any) -> str:
    """Returns what identifies a model's weights: the sha256 of a folder's files, or the hub's revision."""
    folder = Path(path)
    return sha256(*sorted(folder.glob("*.safetensors"))) if folder.is_dir() else model.config._commit_hash


def made_of(run: Any, files: dict[str, str]) -> dict[str, str]:
    """Returns a fingerprint of everything that a run (a step.Run) takes by name.

    These are its data `files`, the base model, the prompts and demonstrations as token ids, and the reward. Ranks
    other than the first return {}.
    """
    if rank() > 0:
        return {}
    trained = [*run.data.encoded, *run.data.supervised]
    prompts = [p.prompt_ids for encoded in (trained, *(held for _, held in run.data.held.values())) for p in encoded]
    demonstrations = [p.demonstrations for p in trained]
    fingerprints = {name: sha256(Path(path)) for name, path in files.items()}
    fingerprints["model"] = weights_fingerprint(run.config.model, run.model)
    for name, ids in {"prompts": prompts, "demonstrations": demonstrations}.items():
        fingerprints[f"{name} as token ids"] = hashlib.sha256(repr(ids).encode()).hexdigest()
    return fingerprints | {"reward": run.reward.fingerprint}


def remember(model_folder: Path, system: str | None, reward: str) -> None:
    """Note in a model folder the system message and the reward that it was trained with.

    `system` is None if the training rows have several system messages.
    """
    write_text(model_folder / REMEMBERED, json.dumps({"system": system, "reward": reward}, indent=1) + "\n")


def trained_with(model: str) -> dict[str, str]:
    """Returns what `remember` noted in this model folder, without values of None; {} for any other model."""
    file = Path(model) / REMEMBERED
    noted = read_json(file, "system", "reward") if file.exists() else {}
    return {name: value for name, value in noted.items() if value is not None}


# ---- the checkpoint


def checkpoint_file(folder: Path, step: int) -> Path:
    return folder / "checkpoint" / f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Returns the run's checkpoint files, the newest first. A file with another name is no checkpoint of the run."""
    return sorted((folder / "checkpoint").glob(f"step-{'[0-9]' * 8}.pt"), reverse=True)


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings that must stay the same when a run is resumed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}


def save(folder: Path, step: int, run: Any) -> None:
    """Save step `step` of the run (a step.Run) as the newest checkpoint in `folder`. Every rank calls this.

    The newest of the older checkpoints is kept, so there are never more than two files, also during the writing.
    Raises Unwritten if the file cannot be written.
    """
    state = {
        "step": step,
        "settings": settings_of(run.config),
        "skipped": run.skipped,
        "model": full_state(trained(run.model)),
        "optimizer": full_state(run.optimizer.state_dict()),
    }
    if run.collector:
        state["collector"] = {
            "waiting": run.collector.waiting,
            "optimizer": full_state(run.collector.optimizer.state_dict()),
        }
    if rank() > 0:
        return
    path = checkpoint_file(folder, step)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        older = [file for file in checkpoints(folder) if file < path]
        for file in {*checkpoints(folder), *path.parent.glob("*.partial")} - {*older[:1], path}:
            file.unlink()  # checkpoints after this step are damaged: the run was resumed from an older one
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the OSError of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's content, or None for a damaged file.

    The tensors are mapped, not read into memory: each rank reads only its part.
    """
    with reading(path), path.open("rb"):
        pass  # a file without permission to read is not a damaged file: this raises InputError
    try:
        if rank() == 0:
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():
                    return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can raise anything
        return None


def newest_whole(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is not damaged, or None if there are none. Raises InputError if all are
    damaged."""
    files = checkpoints(folder)
    newest = next((file for file in files if read_checkpoint(file)), None)
    if files and not newest:
        start_again = f"restore it, or delete {files[0].parent} to start the run again from step 0"
        raise InputError(f"{files[0]} is damaged, and no older checkpoint is whole: {start_again}")
    return newest


def load(folder: Path, run: Any) -> int:
    """Put the newest whole checkpoint into the run (a step.Run) and return its step; 0 if there is no checkpoint.

    Writes nothing. Raises InputError if all checkpoints are damaged, or if the newest whole one belongs to another
    model or run.
    """
    path = from_rank_0(newest_whole(folder) if rank() == 0 else None)
    if path is None:
        return 0
    state = read_checkpoint(path)
    own, saved = trained(run.model), state["model"]
    other = [name for name in own.keys() | saved.keys() if name not in own or name not in saved]
    other += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if other:
        raise InputError(
            f"{path} is the checkpoint of another model: {min(other)} differs; give the model it was made with, "
            "or another --out"
        )
    if changed := {name for name, value in settings_of(run.config).items() if state["settings"].get(name) != value}:
        raise InputError(
            f"{path} is the checkpoint of a run with other settings ({', '.join(sorted(changed))}): restore this "
            f"run's own, or delete {path.parent} to start again from step 0"
        )
    run.model.load_state_dict({name: shard_like(saved[name], own[name]) for name in own}, strict=False)
    load_optimizer(run.optimizer, state["optimizer"])
    if run.collector:
        run.collector.waiting = state["collector"]["waiting"]
        load_optimizer(run.collector.optimizer, state["collector"]["optimizer"])
    run.skipped = state["skipped"]
    return state["step"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state of whole tensors into an optimizer whose parameters may be split over ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[i].shape:
                values[name] = shard_like(value, parameters[i])
    optimizer.load_state_dict(state)


# ---- the logs


def cut_logs(folder: Path, step: int) -> list[dict[str, Any]]:
    """Cut the run's logs back to `step` and return the rows of metrics.jsonl that stay. Later ranks return [].

    Raises InputError, and writes nothing, if those rows are not steps 1 to `step`, or if a log is damaged.
    """
    if rank() > 0:
        return []
    logs = [folder / name for name in ("metrics.jsonl", "samples.jsonl", "groups.jsonl")]
    rows_of = {log: [row for row in read_log(log, "step") if row["step"] <= step] for log in logs if log.exists()}
    metrics = rows_of.get(folder / "metrics.jsonl", [])
    if [row["step"] for row in metrics] != list(range(1, step + 1)):
        expected = f"expected the checkpoint's steps 1 to {step} once each"
        again = f"restore it, or delete {folder / 'checkpoint'} to start the run again from step 0"
        raise InputError(f"{folder / 'metrics.jsonl'}: found {len(metrics)} rows, {expected}: {again}")
    for log, rows in rows_of.items():
        write_text(log, "".join(map(json_line, rows)))
    return metrics


# ---- the folder


def check_folder(config: Config) -> None:
    """Raises InputError if --out holds something that this run must not touch."""
    folder = Path(config.out)
    with reading(folder):
        if not config.out or not folder.exists():
            return
    if not config.resume:
        raise InputError(f"out {config.out!r} exists: choose another folder, or continue its run with --resume auto")
    saved = folder / "config.json"
    if not saved.exists():
        if folder.is_dir() and {file.name for file in folder.iterdir()} <= OURS:
            return
        raise InputError(f"out {config.out!r} exists and holds no run (no config.json): choose another folder")
    ours, theirs = settings_of(config), read_json(saved)
    changed = [name for name in ours if ours[name] != theirs.get(name)]
    if changed:
        was = ", ".join(f"{name} {theirs.get(name)!r}" for name in changed)
        raise InputError(f"out {config.out!r} holds a run with other settings ({was}): repeat them to resume it")


def earlier_ingredients(folder: Path) -> dict[str, str] | None:
    """Returns the ingredients' fingerprints that the run in `folder` recorded; None if there is no run."""
    saved = folder / "config.json"
    return read_json(saved).get("made_of", {}) if saved.exists() else None


def check_ingredients(config: Config, ingredients: dict[str, str]) -> None:
    """Raises InputError if the run in --out started from another model, other data or another reward.

    A changed reward is allowed if the settings accept it; a new reward may also leave out other demonstrations.
    """
    known = earlier_ingredients(Path(config.out)) if config.out and rank() == 0 else None
    changed = [] if known is None else [name for name in ingredients if known.get(name) != ingredients[name]]
    if config.accept_changed == "reward":
        changed = [name for name in changed if name not in ("reward", "demonstrations as token ids")]
    if changed := from_rank_0(changed):
        names = [f"{name} ({value})" if (value := getattr(config, name, "")) else name for name in changed]
        fix = "restore what it was to go on, or choose another folder"
        if changed == ["reward"]:
            fix += ". With  --accept_changed reward  it goes on by the new one, and config.json says so"
        raise InputError(
            f"out {config.out!r} holds a run that was made of something else: {', '.join(names)} changed since; {fix}"
        )


@contextlib.contextmanager
def opened(config: Config, ingredients: dict[str, str]) -> Iterator[Path]:
    """Opens and locks the run's folder: --out, or the first free runs/METHOD-NNN. The first rank makes the folder.

    Raises InputError if the run to be resumed was made of other `ingredients`, or if another process is at work in
    the folder. When a run is resumed, this writes nothing.
    """
    check_ingredients(config, ingredients)
    folder = from_rank_0(new_folder(config) if rank() == 0 else None)
    with locked(folder):
        if rank() == 0:  # another process may have been quicker, and may have ended since
            check_folder(dataclasses.replace(config, out=str(folder), resume="auto"))
        yield folder


def write_config(folder: Path, config: Config, ingredients: dict[str, str]) -> None:
    """Write config.json: the settings and, under "made_of", the fingerprints of the run's ingredients.

    "made_of" also lists the fingerprints of earlier rewards that a resumed run has replaced.
    """
    earlier = earlier_ingredients(folder) or ingredients
    replaced = earlier.get("replaced rewards", [])
    if earlier.get("reward") != ingredients.get("reward"):
        replaced = [*replaced, earlier.get("reward")]
    if replaced:
        ingredients = ingredients | {"replaced rewards": replaced}
    content = dataclasses.asdict(config) | {"made_of": ingredients}
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


def new_folder(config: Config) -> Path:
    """Returns the run's folder; makes it if it is not there."""
    folder = Path(config.out)
    if config.out:
        return make_folder(folder, exist_ok=bool(config.resume))
    runs = make_folder(Path("runs"))
    for number in itertools.count(1):
        folder = runs / f"{config.method}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
