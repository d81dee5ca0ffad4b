"""Checkpoints: sharded safetensors + JSON, visible only when complete, loadable at another number of processes.

`checkpoints/step_00000100/` holds safetensors shards (torch.distributed.checkpoint's Hugging Face format: no pickle)
and `state.json` (step, samples, fingerprint, the size of every file). It is written under a temporary name, synced and
renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from aimv2_vlm.config import Loop, UserError
from aimv2_vlm.models.adapters import num_elements
from aimv2_vlm.train.directory import fsync_path, sync_tree, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import say

PREFIX, FORMAT = "step_", 1
WRITE_ATTEMPTS, FIRST_PAUSE_S = 3, 1.0  # of a checkpoint on storage that fails now and then; the pause doubles
TRANSIENT = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNRESET)
# What reading a broken file raises.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{PREFIX}{step:08d}"


# ---------------------------------------------------------------------------------------------------------------- write


def save(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], placement: Placement,
    keep_last: int, keep_steps: Sequence[int] = (),
) -> None:
    """Write `tensors` and `state` as `folder/step_<step>`; then remove all but the `keep_last` newest and those of `keep_steps`.

    A collective call. What storage refuses now and then is tried again from the start, WRITE_ATTEMPTS times in all (after
    a failed fsync the pages written before may be gone). Raises UserError on every process when the disk is full or not
    writable; the previous checkpoint stays as it was. A step that is already there keeps its tensors (a step has one set
    of weights), its state changes.
    """
    target = folder / step_name(step)
    for attempt in range(1, WRITE_ATTEMPTS + 1):
        try:
            _try_to_save(folder, step, tensors, state, placement)
            break
        except Refused as refused:
            if attempt == WRITE_ATTEMPTS or not refused.transient:
                raise UserError(f"{target}: the checkpoint could not be written ({refused}); the previous one is intact; "
                                "make room or mend the folder and start the same command again") from None
            pause = FIRST_PAUSE_S * 2 ** (attempt - 1)
            if placement.is_main:
                say(f"warning: {target}: could not be written ({refused}); trying again in {pause:g} s")
            time.sleep(pause)
    if placement.is_main:
        try:
            rotate(folder, keep_last, keep_steps)
        except OSError as error:  # the new one is safe, and the next save rotates again
            say(f"warning: {folder}: an old checkpoint could not be removed ({error.strerror or error})")


class Refused(Exception):
    """What the operating system refused to one process at least; raised on all of them."""

    def __init__(self, reason: str, transient: bool):
        super().__init__(reason)
        self.transient = transient


def _try_to_save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], placement: Placement) -> None:
    target, temporary = folder / step_name(step), folder / f".{step_name(step)}.tmp"
    there: list[bool] = []

    def prepare() -> None:
        if placement.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            there.append(not _verify(target)[0])
            temporary.mkdir()

    def write() -> None:
        if not temporary.is_dir():
            raise OSError(f"{folder} is not on a file system that all processes share")
        _write_shards(temporary, tensors, placement)

    def publish() -> None:
        if placement.is_main:
            _publish(temporary, target, {"format": FORMAT, "step": step, **state})

    try:
        _together(prepare, placement)
        if placement.any(any(there)):
            _together(lambda: _restate(target, state, placement), placement)
        else:
            _together(write, placement)
            _together(publish, placement)
    finally:
        if placement.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def _together(act: Callable[[], None], placement: Placement) -> None:
    """`act` on every process; what the disk refuses to one of them is an error on all, so that nobody waits for it."""
    problem, lasting = "", False
    try:
        act()
    except OSError as error:
        problem, lasting = error.strerror or str(error), error.errno not in TRANSIENT
    problem = "; ".join(sorted(set(filter(None, placement.gather_strings([problem])))))
    if problem:
        raise Refused(problem, not placement.any(lasting))


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], placement: Placement) -> None:
    """Each process writes its part. One process needs no plan of who writes what, and is ten times faster without."""
    if placement.world == 1:
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        (folder / "model-00001-of-00001.safetensors").write_bytes(safetensors.torch.save(whole))
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as wrapped:  # raised on every process, with what happened to each
        error = next((e for e, _ in wrapped.failures.values()), None)
        raise error or wrapped from None


def _publish(temporary: Path, target: Path, state: dict[str, Any]) -> None:
    files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
    write_atomically(temporary / "state.json", _sealed(state | {"files": files}))
    sync_tree(temporary)
    if target.exists():  # incomplete, or `save` would have kept it
        shutil.rmtree(target)
    os.replace(temporary, target)
    fsync_path(target.parent)


def _sealed(state: dict[str, Any]) -> str:
    """state.json's text, with a digest of all it says."""
    return json.dumps(state | {"digest": _digest(state)}, indent=1)


def _digest(state: dict[str, Any]) -> str:
    said = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _restate(target: Path, state: dict[str, Any], placement: Placement) -> None:
    if placement.is_main:
        old = json.loads((target / "state.json").read_text(encoding="utf-8"))
        write_atomically(target / "state.json", _sealed(old | state))
        fsync_path(target)


def check_room(folder: Path, model: torch.nn.Module, num_steps: int, loop: Loop, placement: Placement) -> None:
    """Refuse a run whose checkpoints (one more than it keeps, while it writes) and final model do not fit on the disk.

    folder: where its checkpoints go, or lie already (what they take is counted as theirs). model: before it is placed. A
    collective call. Raises UserError with the figures on every process.
    """
    problem = ""
    if placement.is_main:
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        final = sum(num_elements(p) * max(p.element_size(), 4 * (not p.is_floating_point())) for p in model.parameters())  # dequantised
        one = 3 * trained  # weights, two moments
        count = min(max(1, loop.keep_last) + 1, math.ceil(num_steps / loop.save_every)) + len(loop.keep_steps)
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = max(0, count * one - taken) + final
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            problem = (f"{folder}: {count} checkpoints of {_size(one)} and the final model of {_size(final)} need {_size(needed)} more, "
                       f"but {_size(free)} are free; make room, lower train.keep_last ({loop.keep_last}) or choose another out=")
    problem = placement.gather_strings([problem])[0]
    if problem:
        raise UserError(problem)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def rotate(folder: Path, keep_last: int, keep_steps: Sequence[int] = ()) -> None:
    """Remove all but the `keep_last` newest complete checkpoints and those of `keep_steps`, and left-overs of killed writers."""
    _remove_leftovers(folder)
    complete = [path for path in sorted(folder.glob(f"{PREFIX}*")) if not _verify(path)[0]]
    kept = {path for path in complete if path.name in map(step_name, keep_steps)} | set(complete[-max(1, keep_last) :])
    for old in set(folder.glob(f"{PREFIX}*")) - kept:
        doomed = folder / f".{old.name}.tmp"  # a kill while removing must not leave half a checkpoint under its name
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f".{PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------- read


def newest(folder: Path, placement: Placement) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its state; incomplete ones are passed over with a warning.

    A collective call: the main process decides for all.
    """
    name = ""
    if placement.is_main:
        for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
            problem, _ = _verify(path)
            if not problem:
                name = path.name
                break
            say(f"warning: {path}: passed over ({problem})")
    name = placement.gather_strings([name])[0]
    return (folder / name, _verify(folder / name)[1]) if name else None


def at(path: Path) -> tuple[Path, dict[str, Any]]:
    """`path` itself and its state, for a run that begins at another run's checkpoint. UserError when it is not complete."""
    problem, state = _verify(path)
    if problem:
        raise UserError(f"{path}: no complete checkpoint ({problem}); name a folder <run>/checkpoints/{PREFIX}…")
    return path, state


def _verify(path: Path) -> tuple[str, dict[str, Any]]:
    """("" or what is wrong, state.json's content)."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        form, files = state["format"], {path / name: size for name, size in state["files"].items()}
        if form != FORMAT:
            return f"format {form} is not {FORMAT}", {}
        if not files or path.name != step_name(state["step"]):
            return "state.json names no files or another step", {}
        if state.get("digest") != _digest(state):
            return "state.json is damaged: its digest does not fit", {}
    except BROKEN as error:
        return f"state.json cannot be read: {error!r}", {}
    for file, size in files.items():
        if not file.is_file() or file.stat().st_size != size:
            return f"{file.name} is missing or cut off", {}
        try:
            with safe_open(file, framework="pt"):  # reads and checks the header
                pass
        except BROKEN as error:
            return f"{file.name} cannot be read: {error}", {}
    return "", state


def load(path: Path, tensors: dict[str, torch.Tensor], placement: Placement) -> None:
    """Fill `tensors` in place from `path`, whatever strategy and number of processes wrote it.

    A collective call. UserError naming keys when the two do not hold the same names or shapes.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        stored = {name: list(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read ({error!r}); remove it, the run goes on from the one before") from None
    mine = [json.dumps([name, list(tensor.shape)]) for name, tensor in tensors.items()]
    wanted = dict(map(json.loads, placement.gather_strings(mine)))  # under ZeRO each process holds some of the names
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    common = sorted(wanted.keys() & stored.keys())
    reshaped = [f"{name} {stored[name]} against {wanted[name]}" for name in common if stored[name] != wanted[name]]
    if missing or extra or reshaped:
        raise UserError(f"{path}: does not fit this model: missing {_some(missing)}; unexpected {_some(extra)}; "
                        f"other shapes {_some(reshaped)}; use the recipe it was made with, or --restart")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)  # each process reads what it needs


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
