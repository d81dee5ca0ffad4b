"""Checkpoints: sharded safetensors + JSON, visible only when complete, loadable at another number of processes.

`checkpoints/step_00000100/` holds safetensors shards (torch.distributed.checkpoint's Hugging Face writer: no pickle) and
`state.json` (step, samples, fingerprint, the size of every file). It is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.train.directory import sync_tree, write_atomically
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import say

PREFIX, FORMAT = "step_", 1


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], placement: Placement, keep_last: int) -> None:
    """Write `tensors` and `state` as `folder/step_<step>`; older checkpoints beyond `keep_last` are removed afterwards.

    Raises UserError when the disk is full or not writable; the previous checkpoint stays as it was.
    """
    target, temporary = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}.tmp"
    problem = ""
    try:
        if placement.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        placement.barrier()
        _write_shards(temporary, tensors, placement)
    except Exception as error:  # DCP wraps what the disk said in its own types
        problem = _disk_message(error)
        if not problem:
            raise
    if placement.any(bool(problem)):
        if placement.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{target}: the checkpoint could not be written ({problem or 'another process failed'}); the previous one is "
                        "intact; free some space and start again")
    if placement.is_main:
        try:
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            write_atomically(temporary / "state.json", json.dumps({"format": FORMAT, "step": step, "files": files, **state}, indent=1))
            sync_tree(temporary)
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
            _sync_folder(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"{target}: the checkpoint could not be written ({error.strerror}); the previous one is intact; "
                            "free some space and start again") from None
        rotate(folder, keep_last)
    placement.barrier()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], placement: Placement) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=placement.world == 1)


def _disk_message(error: BaseException | None) -> str:
    """The operating system's words when `error` (or what caused it) is about the disk, else an empty string."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        for reason in ("No space left", "Disk quota", "Read-only file system", "Permission denied"):
            if reason in str(error):
                return reason
        error, seen = error.__cause__ or error.__context__, seen + 1
    return ""


def rotate(folder: Path, keep_last: int) -> None:
    """Remove what is older than the `keep_last` newest checkpoints, and left-overs of killed writers."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in sorted(folder.glob(f"{PREFIX}*"))[: -max(1, keep_last)]:
        doomed = folder / f".{old.name}.tmp"  # a kill in the middle of removing must not leave half a checkpoint under its name
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint and its state; incomplete ones are passed over with a warning."""
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        problem, state = _verify(path)
        if not problem:
            return path, state
        say(f"warning: {path}: passed over ({problem})")
    return None


def _verify(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read: {error}", {}
    if state.get("format") != FORMAT:
        return f"format {state.get('format')} is not {FORMAT}", {}
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut off", {}
        if not _header_ok(file):
            return f"{name} has a broken header", {}
    return "", state


def _header_ok(file: Path) -> bool:
    """A safetensors file begins with the length of its JSON header, which must fit in the file."""
    with open(file, "rb") as opened:
        head = opened.read(8)
        if len(head) < 8:
            return False
        (length,) = struct.unpack("<Q", head)
        if length > file.stat().st_size - 8:
            return False
        try:
            return isinstance(json.loads(opened.read(length)), dict)
        except ValueError:
            return False


def stored_names(path: Path) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def load(path: Path, tensors: dict[str, torch.Tensor], placement: Placement) -> None:
    """Fill `tensors` in place from `path`; UserError naming keys when the two do not hold the same names or shapes."""
    import torch.distributed.checkpoint as dcp

    have = stored_names(path)
    missing, extra = sorted(set(tensors) - have), sorted(have - set(tensors))
    if missing or extra:
        raise UserError(f"{path}: does not fit this model: missing {_some(missing)}, unexpected {_some(extra)}")
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=placement.world == 1)
    except Exception as error:
        if "size" in str(error).lower():
            raise UserError(f"{path}: a tensor has another shape than in this model ({_shapes(path, tensors)})") from None
        raise


def _shapes(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    from safetensors import safe_open

    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                if len(opened.get_slice(name).get_shape()) and list(opened.get_slice(name).get_shape()) != list(tensors[name].shape):
                    return f"{name}: {opened.get_slice(name).get_shape()} against {list(tensors[name].shape)}"
    return "see above"


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


