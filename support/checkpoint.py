"""The run folder: make it, keep others out, save to it, resume from it, exactly: k steps + resume + k steps = 2k
steps, bit for bit.

A checkpoint is one file: the weights that are trained, optimizer state, the number of finished steps; ReLIFT's
buffer and optimizer. There is no random state and no data position in it: every draw is a pure function of (seed,
step, problem, rollout), and the order of problems of (seed, epoch). It is written beside the older ones and renamed
when whole, so that at any moment, also under SIGKILL or with a full disk, one whole checkpoint exists; the last two
are kept. PyTorch writes a zip file with a CRC-32 of every part: on resume the newest file that agrees with its own
is taken, and logs are cut back to its step. A lock, which the system releases however its process ends, keeps a
second process out.
With several ranks only the first writes; weights and optimizer are put together before and split again after, so a
run may go on with another number of ranks.
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

FREE = {
    "resume",
    "accept_changed",
    "out",
    "save_every",
    "save_dtype",
    "device",
}  # a run may change them as it goes on
FREE |= {"tensorboard", "recompute", "offload", "rows_per_call", "micro_batch_tokens"}  # memory: rounding may change
OURS = {"lock", "config.json.partial"}  # all that a run leaves that was killed before its config.json was whole


# ---- files


def _write(path: Path, mode: str, text: str) -> None:
    """On disk when this returns."""
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
    """Add rows to a JSONL log, on disk when this returns."""
    if rank() > 0:
        return
    with writing(path):
        _write(path, "a", "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this project out of `folder`; the first rank does. InputError if another has it.

    The lock is the system's, on an open file: it ends with the process, also with a killed one, and cannot be stale.
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
    """Of the files' contents, one after the other. (reward.py, which imports nothing of ours but answers/, has a
    small one for source files.)"""
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), path.open("rb") as file:
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
    trained = [*run.data.encoded, *run.data.supervised]
    prompts = [p.prompt_ids for encoded in (trained, *(held for _, held in run.data.held.values())) for p in encoded]
    demonstrations = [p.demonstrations for p in trained]
    fingerprints = {name: sha256(Path(path)) for name, path in files.items()}
    fingerprints["model"] = weights_fingerprint(run.config.model, run.model)
    for name, ids in {"prompts": prompts, "demonstrations": demonstrations}.items():
        fingerprints[f"{name} as token ids"] = hashlib.sha256(repr(ids).encode()).hexdigest()
    return fingerprints | {"reward": run.reward.fingerprint}


def remember(model_folder: Path, system: str | None, reward: str) -> None:
    """Note in a model folder what it was trained with: the system message its rows share (None: they have several),
    the reward."""
    write_text(model_folder / REMEMBERED, json.dumps({"system": system, "reward": reward}, indent=1) + "\n")


def trained_with(model: str) -> dict[str, str]:
    """What `remember` noted in this model folder, without what is None; {} for any other model."""
    file = Path(model) / REMEMBERED
    noted = read_json(file, "system", "reward") if file.exists() else {}
    return {name: value for name, value in noted.items() if value is not None}


# ---- the checkpoint


def checkpoint_file(folder: Path, step: int) -> Path:
    return folder / "checkpoint" / f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoint files, the newest first. A copy that somebody made by another name is not the run's."""
    return sorted((folder / "checkpoint").glob(f"step-{'[0-9]' * 8}.pt"), reverse=True)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that must stay when a run goes on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}


def save(folder: Path, step: int, run: Any) -> None:
    """Make this the newest checkpoint of the run (a step.Run) in `folder`. Called on every rank.

    Of the older ones the last is kept: two files at most, also while this one is written. Unwritten if it cannot be.
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
        for file in {*checkpoints(folder), *path.parent.glob("*.partial")} - {*older[:1]}:
            file.unlink()  # later ones are damaged: the run has gone on from an older one
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the OSError of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Its content, mapped, not read: each rank takes its part. None for a file that is not as it was written."""
    with reading(path), path.open("rb"):
        pass  # a file that may not be read is not a damaged one
    try:
        if rank() == 0:
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():
                    return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can raise anything
        return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is not damaged, None if there is none at all. InputError if all are."""
    files = checkpoints(folder)
    newest = next((file for file in files if read_checkpoint(file)), None)
    if files and not newest:
        start_again = f"restore it, or delete {files[0].parent} to start the run again from step 0"
        raise InputError(f"{files[0]} is damaged, and no older checkpoint is whole: {start_again}")
    return newest


def load(folder: Path, run: Any) -> int:
    """Put the newest whole checkpoint into the run (a step.Run) -> its step; 0 if there is none.

    InputError if all are damaged, or the one found is of another model or run. Nothing is written.
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
            "or another out"
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
    """Put a saved state, whole tensors, into an optimizer whose parameters may be split over ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[i].shape:
                values[name] = shard_like(value, parameters[i])
    optimizer.load_state_dict(state)


# ---- the logs


def cut_logs(folder: Path, step: int) -> list[dict[str, Any]]:
    """Cut the run's logs back to `step` -> the rows of metrics.jsonl that stay; [] on other ranks than the first.

    InputError, and nothing is written, if these are not steps 1 to `step`, or a log is damaged.
    """
    if rank() > 0:
        return []
    logs = [folder / name for name in ("metrics.jsonl", "samples.jsonl", "groups.jsonl")]
    kept = {log: [row for row in read_log(log, "step") if row["step"] <= step] for log in logs if log.exists()}
    metrics = kept.get(folder / "metrics.jsonl", [])
    if [row["step"] for row in metrics] != list(range(1, step + 1)):
        expected = f"expected the checkpoint's steps 1 to {step} once each"
        again = f"restore it, or delete {folder / 'checkpoint'} to start the run again from step 0"
        raise InputError(f"{folder / 'metrics.jsonl'}: found {len(metrics)} rows, {expected}: {again}")
    for log, rows in kept.items():
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


def earlier_ingredients(folder: Path) -> dict[str, str]:
    """Of the run in `folder`; {} where there is none."""
    saved = folder / "config.json"
    return read_json(saved).get("made_of", {}) if saved.exists() else {}


def check_ingredients(config: Config, ingredients: dict[str, str]) -> None:
    """InputError if the run in --out was made of others, but for a reward (and what it has left of the
    demonstrations) whose change is accepted."""
    known = earlier_ingredients(Path(config.out)) if config.out and rank() == 0 else {}
    changed = [name for name in ingredients if known and known.get(name) != ingredients[name]]
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
    """The run's folder, locked: --out, or the first free runs/METHOD-NNN. The first rank makes it.

    InputError if the run that is to go on was made of other `ingredients`, or another process is at work in the
    folder. Of a run that is to go on nothing is written here.
    """
    check_ingredients(config, ingredients)
    folder = from_rank_0(new_folder(config) if rank() == 0 else None)
    with locked(folder):
        if rank() == 0:
            check_folder(
                dataclasses.replace(config, out=str(folder), resume="auto")
            )  # another was quicker, and ended
        yield folder


def write_config(folder: Path, config: Config, ingredients: dict[str, str]) -> None:
    """config.json: the settings and, under "made_of", the fingerprints of the run's ingredients, and of the rewards
    that it went on without."""
    earlier = earlier_ingredients(folder)
    replaced = earlier.get("replaced rewards", [])
    if earlier and earlier["reward"] != ingredients.get("reward"):
        replaced = [*replaced, earlier["reward"]]
    if replaced:
        ingredients = ingredients | {"replaced rewards": replaced}
    content = dataclasses.asdict(config) | {"made_of": ingredients}
    write_text(folder / "config.json", json.dumps(content, indent=1) + "\n")


def new_folder(config: Config) -> Path:
    """The run's folder, made if it is not there."""
    folder = Path(config.out)
    if config.out:
        return make_folder(folder, exist_ok=bool(config.resume))
    runs = make_folder(Path("runs"))
    for number in itertools.count(1):
        folder = runs / f"{config.method}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
