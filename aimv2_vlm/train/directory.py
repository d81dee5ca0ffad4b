"""The run directory: what it holds, who may write to it, and whether a second start goes on or is refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from aimv2_vlm import recipe as recipes
from aimv2_vlm.config import UserError

# Keys that never change what is computed, so a run may go on with other values.
FREE_KEYS = ("train.", "licence", "optim.micro_batch_size", "data.tokens_per_microbatch", "data.max_bad_fraction", "data.changed", "out",
             "encoder.cache", "encoder.batch_size", "adapter.merge")
# What a run makes for its recipe before the first step; other keys would want others.
PREPARED = ("tokenizer", "tokenizer.model", "clip_tokenizer", "metrics.jsonl")
ENVIRONMENT = "environment.json"  # no one but a run writes it
WRITTEN = ("recipe.yaml", "data_report.json", "checkpoints", "final", *PREPARED)
LOCK = ".lock"
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "deepspeed", "safetensors", "sentencepiece",
            "simplejpeg", "pillow", "numpy", "lmms_eval", "peft", "bitsandbytes", "torchao")


def write_atomically(path: Path, text: str) -> None:
    """Temporary name, fsync, rename: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# What a disk, a quota, a mount or a network file system answers; every other OSError is a fault of the program.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
                  errno.ETIMEDOUT, errno.EREMOTEIO)


@contextlib.contextmanager
def storage_errors(folder: str | Path | None) -> Iterator[None]:
    """What storage refuses inside becomes a UserError of one line that names the file, or else `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in STORAGE_ERRORS:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{getattr(error, 'filename', None) or folder}: {reason}; what was saved before is intact; make room or mend "
                        "the folder and start the same command again") from error


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("aimv2_vlm", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


class RunDirectory:
    """`recipe.yaml`, `environment.json`, `metrics.jsonl`, `data_report.json`, `checkpoints/` and `final/` of one run."""

    def __init__(self, out: str | Path, resolved: Any, restart: bool = False, is_main: bool = True, world: int = 1):
        self.path = Path(out)
        self.is_main = is_main
        self._lock = None
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: the run directory cannot be made ({error.strerror}); choose another out=") from None
        self._lock = acquire_lock(self.path)
        try:
            self._check_folder(restart)
            if restart:
                self._remove(sorted((entry for entry in self.path.iterdir() if entry.name != LOCK), key=lambda entry: entry.name == ENVIRONMENT))
            self._check_recipe(resolved)
            self._write_environment(resolved, world)  # first: it tells a run's folder from another
            write_atomically(self.path / "recipe.yaml", recipes.dump(resolved))
        except BaseException:
            self.close()  # who called from Python may mend it and call again
            raise

    def _check_folder(self, restart: bool) -> None:
        """Raises UserError where what would go, or be overwritten, is not known to be a run's: a recipe of one's own is called recipe.yaml too.

        A run's mark is written first and removed last, so that none is without it, however a start ended."""
        if (self.path / ENVIRONMENT).is_file():
            return
        entries = sorted(entry.name for entry in self.path.iterdir() if entry.name not in (LOCK, f".{ENVIRONMENT}.tmp"))
        if restart and entries:
            raise UserError(f"{self.path}: --restart removes what a run left, but this folder holds {entries[0]} and no {ENVIRONMENT} of a run; "
                            "choose another out=, or empty it")
        if taken := [name for name in entries if name in WRITTEN]:
            raise UserError(f"{self.path}: holds {taken[0]}, which would be written over, and no {ENVIRONMENT} of a run; choose another out=")

    @staticmethod
    def _remove(entries: Iterable[Path]) -> None:
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)

    def _check_recipe(self, resolved: Any) -> None:
        """Refuse a recipe other than that of what was trained here. Before the first checkpoint there is nothing to protect: who
        mends a key that was refused gives the same command again."""
        saved = self.path / "recipe.yaml"
        if not saved.exists() or not (changed := changed_keys(saved, resolved)):
            return
        if self.finished or any(self.checkpoints.glob("step_*")):
            raise UserError(f"{saved}: the run was started with another recipe ({'; '.join(changed)}); "
                            "use the old values, another out=, or --restart to begin anew")
        self._remove(self.path / name for name in PREPARED)

    def _write_environment(self, resolved: Any, world: int) -> None:
        facts = {"versions": versions(), "git_commit": git_commit(), "seed": resolved.seed, "world": world,
                 "machine": platform.machine(), "processor": processor(), "cores": os.cpu_count(), "argv": sys.argv[1:]}
        write_atomically(self.path / ENVIRONMENT, json.dumps(facts, indent=1))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def finished(self) -> bool:
        """`final/` gets its name only when it is whole (`publish`)."""
        return self.final.is_dir()

    def publish(self, write: Any) -> None:
        """Fill a temporary folder with `write(folder)`, then give it the name `final`."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for writing one file would only hide the run's own lines
        temporary = self.path / ".final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            sync_tree(temporary)
            os.replace(temporary, self.final)
            fsync_path(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # a half-written model would keep a full disk full

    def write_json(self, name: str, content: Any) -> None:
        if self.is_main:
            write_atomically(self.path / name, json.dumps(content, indent=1, ensure_ascii=False))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def acquire_lock(folder: Path, doing: str = "working in this run directory; wait for it or choose another out=") -> TextIO:
    """The folder's lock, held while the file that is returned is open. UserError ("<who> is <doing>") when another process holds it."""
    lock = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"{folder}: {owner} is {doing}") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def changed_keys(saved: Path, resolved: Any) -> list[str]:
    """The keys in which a run's `recipe.yaml` and `resolved` differ and that change what is computed.

    A key that did not exist yet when the run began has its default.
    """
    old = recipes.load_yaml(saved)
    with contextlib.suppress(UserError):  # a key that exists no more: the comparison names it
        old = recipes.parse_yaml(recipes.dump(recipes.build(type(resolved), old, str(saved))), str(saved))
    lines = recipes.differences(old, recipes.parse_yaml(recipes.dump(resolved), "recipe"))
    return [line for line in lines if not line.startswith(FREE_KEYS)]


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that a rename after it publishes whole files."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(os.path.join(parent, name))
        fsync_path(parent)


def fsync_path(path: str | os.PathLike) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.machine()
