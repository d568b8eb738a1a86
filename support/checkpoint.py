"""This file makes and locks a run's folder, saves checkpoints to it and resumes from them. A run that is stopped
after k steps and resumed for k more equals a run of 2k steps, bit for bit.

Each checkpoint is one file. A checkpoint holds the trained weights, the optimizer's state and the number of finished
steps, and for ReLIFT the buffer and the second optimizer. A checkpoint needs no random state and no position in the
data: every draw is a pure function of (seed, step, problem, rollout), and the order of problems is a pure function of
(seed, epoch). A checkpoint is written beside the older ones and renamed when it is complete; the last two checkpoints
are kept. So a complete checkpoint exists at any moment, also after SIGKILL or with a full disk. PyTorch writes a
checkpoint as a zip file with a CRC-32 of every part. A resumed run takes the newest checkpoint whose parts agree with
their CRC, and cuts the run's logs back to the step of that checkpoint. A lock keeps a second process out of the
folder; the operating system releases the lock however the process ends. With several ranks only rank 0 writes. Split
weights and optimizer state are made whole before saving and split again after loading, so a run may continue with
another number of ranks.
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

# settings that may differ when a run is resumed
FREE = {"resume", "accept_changed", "out", "save_every", "save_dtype", "device"}
# further settings that may differ when a run is resumed, because they change at most the rounding
FREE |= {"tensorboard", "recompute", "offload", "rows_per_call", "micro_batch_tokens"}
# a run that was killed before its config.json was complete leaves only these files
OURS = {"lock", "config.json.partial"}


# ---- files


def _write(path: Path, mode: str, text: str) -> None:
    """Write `text` to a file. When the function returns, the text is on the disk."""
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` to the file, whole or not at all."""
    if rank() > 0:
        return
    with replacing(path) as partial:
        _write(partial, "w", text)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSONL log. When the function returns, the rows are on the disk. Without rows no file is made."""
    if rank() > 0 or not rows:
        return
    with writing(path):
        _write(path, "a", "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of this project out of `folder`. Raises InputError if another process is at work in
    `folder`.

    Rank 0 takes the lock. The operating system ties the lock to an open file, so the lock ends with the process, also
    if the process is killed.
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

    reward.py hashes its source files by a small function of its own, because reward.py may import only answers/.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def model_fingerprint(path: str, model: Any) -> str:
    """Returns a text that identifies a model: the SHA-256 of the folder's configs and safetensors files, or the
    revision on the hub. The configs say how the weights are used, and which tokens end a response."""
    folder = Path(path)
    if not folder.is_dir():
        return model.config._commit_hash
    configs = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).exists()]
    return sha256(*configs, *sorted(folder.glob("*.safetensors")))


def made_of(run: Any, files: dict[str, str]) -> dict[str, str]:
    """Returns a fingerprint of each ingredient of a run (a step.Run), by name.

    The ingredients are the data `files`, the base model, the prompts and demonstrations as token ids, and the reward.
    Ranks above 0 return {}.
    """
    if rank() > 0:
        return {}
    trained = [*run.data.encoded, *run.data.supervised]
    prompts = [p.prompt_ids for encoded in (trained, *(held for _, held in run.data.held.values())) for p in encoded]
    demonstrations = [p.demonstrations for p in trained]
    fingerprints = {name: sha256(Path(path)) for name, path in files.items()}
    fingerprints["model"] = model_fingerprint(run.config.model, run.model)
    for name, ids in {"prompts": prompts, "demonstrations": demonstrations}.items():
        fingerprints[f"{name} as token ids"] = hashlib.sha256(repr(ids).encode()).hexdigest()
    return fingerprints | {"reward": run.reward.fingerprint}


def remember(model_folder: Path, system: str | None, reward: str) -> None:
    """Write into a model folder the system message and the reward that the model was trained with.

    `system` is None if the training rows have several system messages.
    """
    write_text(model_folder / REMEMBERED, json.dumps({"system": system, "reward": reward}, indent=1) + "\n")


def trained_with(model: str) -> dict[str, str]:
    """Returns the system message and reward that `remember` wrote into this model folder, without values of None; {}
    if it wrote nothing there."""
    file = Path(model) / REMEMBERED
    noted = read_json(file, "system", "reward") if file.exists() else {}
    for name, value in noted.items():
        if not isinstance(value, str | None):
            raise InputError(f"{file}: {name} is {value!r:.40}, expected a text or null: restore it, or delete it")
    return {name: value for name, value in noted.items() if value is not None}


# ---- the checkpoint


def checkpoint_file(folder: Path, step: int) -> Path:
    return folder / "checkpoint" / f"step-{step:08d}.pt"


def checkpoints(folder: Path) -> list[Path]:
    """Returns the run's checkpoint files, the newest first. Files with other names are not checkpoints of the run."""
    return sorted((folder / "checkpoint").glob(f"step-{'[0-9]' * 8}.pt"), reverse=True)


def settings_of(config: Config) -> dict[str, Any]:
    """Returns the settings that must stay the same when a run is resumed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}


def save(folder: Path, step: int, run: Any) -> None:
    """Save step `step` of the run (a step.Run) as the newest checkpoint in `folder`. Every rank calls this function.

    Of the older checkpoints only the newest is kept, so there are never more than two files, also while one is
    written. Raises Unwritten if the file cannot be written.
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
            # a checkpoint of a later step is deleted too: it is damaged, else the run would have been resumed from it
            file.unlink()
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch raises a RuntimeError for a full disk and hides the OSError in it
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's content, or None for a damaged file.

    The tensors are memory-mapped, so each rank reads only its part of them.
    """
    with reading(path), path.open("rb"):
        pass  # raises InputError for a file without read permission, which is not damaged
    try:
        if rank() == 0:
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():
                    return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can raise any error
        return None


def newest_whole(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is not damaged, or None if the folder has no checkpoints. Raises InputError
    if all checkpoints are damaged."""
    files = checkpoints(folder)
    newest = next((file for file in files if read_checkpoint(file)), None)
    if files and not newest:
        start_again = f"restore it, or delete {files[0].parent} to start the run again from step 0"
        raise InputError(f"{files[0]} is damaged, and so is every older checkpoint: {start_again}")
    return newest


def load(folder: Path, run: Any) -> int:
    """Load the newest undamaged checkpoint into the run (a step.Run) and return its step; 0 if there is no
    checkpoint.

    Writes nothing. Raises InputError if all checkpoints are damaged, or if the newest undamaged one belongs to
    another model or run.
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
            f"{path} is the checkpoint of another model: {min(other)} differs; give the model that it was made with, "
            "or another --out"
        )
    if changed := {name for name, value in settings_of(run.config).items() if state["settings"].get(name) != value}:
        raise InputError(
            f"{path} is the checkpoint of a run with other settings ({', '.join(sorted(changed))}): restore the "
            f"run's own checkpoint, or delete {path.parent} to start again from step 0"
        )
    run.model.load_state_dict({name: shard_like(saved[name], own[name]) for name in own}, strict=False)
    load_optimizer(run.optimizer, state["optimizer"])
    if run.collector:
        run.collector.waiting = state["collector"]["waiting"]
        load_optimizer(run.collector.optimizer, state["collector"]["optimizer"])
    run.skipped = state["skipped"]
    return state["step"]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved optimizer state, which has whole tensors, into an optimizer whose parameters may be split over
    ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.shape == parameters[i].shape:
                values[name] = shard_like(value, parameters[i])
    optimizer.load_state_dict(state)


# ---- the logs


def cut_logs(folder: Path, step: int) -> list[dict[str, Any]]:
    """Cut the run's logs back to `step` and return the remaining rows of metrics.jsonl. Ranks above 0 return [].

    Raises InputError, and writes nothing, if the remaining rows are not steps 1 to `step`, or if a log is damaged.
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
    """Raises InputError unless --out is new, or --resume is given and --out holds a run with the settings `config`
    (or only the files that a run leaves if it is killed before config.json is complete)."""
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
        raise InputError(f"out {config.out!r} holds a run with other settings ({was}): repeat them to resume the run")


def earlier_ingredients(folder: Path) -> dict[str, str] | None:
    """Returns the fingerprints of a run's ingredients from config.json in `folder`; None if `folder` has no run."""
    saved = folder / "config.json"
    return read_json(saved).get("made_of", {}) if saved.exists() else None


def check_ingredients(config: Config, ingredients: dict[str, str]) -> None:
    """Raises InputError if the run in --out started from another model, other data or another reward.

    With --accept_changed reward the reward may differ, and so may the demonstrations, because the loader drops those
    that the new reward rejects.
    """
    known = earlier_ingredients(Path(config.out)) if config.out and rank() == 0 else None
    changed = [] if known is None else [name for name in ingredients if known.get(name) != ingredients[name]]
    if config.accept_changed == "reward":
        changed = [name for name in changed if name not in ("reward", "demonstrations as token ids")]
    if changed := from_rank_0(changed):
        names = [f"{name} ({value})" if (value := getattr(config, name, "")) else name for name in changed]
        fix = "to resume the run restore what has changed, or choose another folder"
        if changed == ["reward"]:
            fix += ". With  --accept_changed reward  the run goes on with the new reward, and config.json notes it"
        raise InputError(
            f"out {config.out!r} holds a run that was made of something else: {', '.join(names)} changed since; {fix}"
        )


@contextlib.contextmanager
def opened(config: Config, ingredients: dict[str, str]) -> Iterator[Path]:
    """Opens and locks the run's folder: --out, or the first free runs/METHOD-NNN. Rank 0 makes the folder.

    Raises InputError if the run to be resumed was made of another model, other data or another reward than those in
    `ingredients`, or if another process is at work in the folder. If a run is resumed, `opened` writes nothing.
    """
    check_ingredients(config, ingredients)
    folder = from_rank_0(new_folder(config) if rank() == 0 else None)
    with locked(folder):
        # the folder is checked again, because another process may have used the folder before it was locked
        if rank() == 0:
            check_folder(dataclasses.replace(config, out=str(folder), resume="auto"))
        yield folder


def write_config(folder: Path, config: Config, ingredients: dict[str, str]) -> None:
    """Write config.json with the run's settings and, under "made_of", the fingerprints of its ingredients.

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
    """Returns the run's folder, and makes it if it does not exist."""
    folder = Path(config.out)
    if config.out:
        return make_folder(folder, exist_ok=bool(config.resume))
    runs = make_folder(Path("runs"))
    for number in itertools.count(1):
        folder = runs / f"{config.method}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
