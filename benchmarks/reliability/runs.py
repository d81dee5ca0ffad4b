"""What the drivers of this folder share: training runs in processes forked from a warm parent, and what they leave behind.

The real command line (`aimv2_vlm.cli.main`) on real shards runs in a child of multiprocessing's fork server, which has
imported everything and started no thread: a run begins in milliseconds, and is a process of its own that can be killed.
An audit hook in the child sees every operation on the run directory (open, rename, make, remove) and can end the process,
signal it or refuse the operation at the n-th one: these are the moments between which a run directory changes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from benchmarks.reliability.summary import argument_parser

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "image.size=28", "image.scale=[0.4,1.0]", "image.flip=0.5", "encoder.hidden_size=32", "encoder.intermediate_size=48",
    "encoder.num_layers=1", "encoder.num_heads=2", "decoder.hidden_size=32", "decoder.intermediate_size=48", "decoder.num_layers=1",
    "decoder.num_heads=2", "optim.warmup_steps=2", "optim.batch_size=8", "optim.micro_batch_size=4", "data.validation_samples=8",
    "train.log_every=1", "train.validate_every=4", "train.save_every=2", "train.num_workers=0", "train.trackers=[]", "precision=fp32",
]
IMPORTED = ["aimv2_vlm.cli", "aimv2_vlm.train.run", "aimv2_vlm.train.launch", "accelerate", "torch.distributed.checkpoint",
            "torch.distributed.checkpoint.hf_storage", "torch.distributed.fsdp", "torch._dynamo", "transformers.models.aimv2.modeling_aimv2",
            "transformers.models.clip.image_processing_clip", "simplejpeg", "deepspeed"]
WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")

_server, _server_runs = multiprocessing.get_context("forkserver"), []


def command(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    """Words of `aimv2-vlm` that pre-train a tiny encoder; later keys win."""
    return ["pretrain", "demo_scenes", f"data_root={data}", f"out={out}", *TINY, f"optim.steps={steps}", *more]


def make_shards(data: Path) -> Path:
    """A few pictures of the embedded data as real shards, made once."""
    if not (data / "held_out").exists():
        from aimv2_vlm.data import scenes

        scenes.write_pretraining_shards(data / "shards", "train", 96, samples_per_shard=32, workers=1)
        scenes.write_pretraining_shards(data / "held_out", "dev", 16, workers=1)
    return data


# ------------------------------------------------------------------------------------------------------------- one process


@dataclass
class Moment:
    """What to do at the `at`-th operation (from 0) on files below `folder`: signal oneself, or refuse it with an error number.

    from_then_on: refuse every later one too. fill: a file that takes all the room its disk has left at that moment. at -1:
    only count.
    """

    folder: str
    at: int = -1
    send: int = 0
    refuse: int = 0
    from_then_on: bool = False
    fill: str = ""


class Run:
    """`aimv2-vlm <words>` in a forked process.

    log: where its standard output and error go, and `<log>.count` (how many operations it has begun). order: where it records
    the samples that it trains on. instead: (function, arguments…) to call in place of the command line. quick: hardly wait
    before a refused checkpoint is tried again.
    """

    def __init__(self, words: Sequence[str], log: Path, moment: Moment | None = None, order: Path | None = None,
                 environment: dict[str, str] | None = None, instead: Sequence[Any] = (), quick: bool = False):
        self.log = log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        _start_server()
        self.process = _server.Process(target=_in_child, args=(list(words), str(log), moment, order, environment or {}, instead, quick))
        self.process.start()

    def wait(self, timeout: float = 600.0) -> int:
        """Exit status; minus the signal's number when one ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"a run did not end in {timeout:g} s: {self.words()[-2000:]}")
        return self.process.exitcode

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def send(self, number: int) -> None:
        if self.alive:
            os.kill(self.process.pid, number)

    def freeze(self) -> bool:
        """Hold the process where it is (False: it has ended), so that what it has done can be read; `send(SIGCONT)` lets it go on."""
        self.send(signal.SIGSTOP)
        while self.alive:
            try:
                if Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                    return True
            except OSError:
                return False
            time.sleep(0.0005)
        return False


def run(words: Sequence[str], log: Path, **more: Any) -> tuple[int, str]:
    """(exit status, what it said) of a run from start to end."""
    process = Run(words, log, **more)
    return process.wait(), process.words()


def _start_server() -> None:
    """The warm parent of all runs: no graphics card, no hub, one thread. Children take over its environment, not this process's."""
    if _server_runs:
        return
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    outside = dict(os.environ)
    os.environ.update(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                      DS_ACCELERATOR="cpu")
    try:
        _server.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(outside)
    _server_runs.append(True)


def _in_child(words: list[str], log: str, moment: Moment | None, order: Path | None, environment: dict[str, str], instead: Sequence[Any],
              quick: bool) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.dup2(os.pipe()[0], 0)  # a launched process ends with its launcher, which it takes an end of input for
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # the command line's own; the server handed on its way
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from aimv2_vlm import cli

    if order is not None:
        record_order(order)
    if quick:
        from aimv2_vlm.train import checkpoint

        checkpoint.FIRST_PAUSE_S = 0.01
    if moment is not None:
        watch(moment, f"{log}.count")
    sys.exit(instead[0](*instead[1:]) if instead else cli.main(words))


def watch(moment: Moment, count_file: str) -> None:
    """Install the audit hook of `moment`; the number of operations so far stands in `count_file` (8 bytes)."""
    import mmap

    with open(count_file, "wb") as file:
        file.write(bytes(8))
    with open(count_file, "r+b") as file:
        counter = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")

    def hook(event: str, arguments: tuple) -> None:
        if event not in WATCHED:
            return
        # shutil.rmtree names what it removes relative to an open folder
        relative = event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        if not (relative or path.startswith(moment.folder)) or path.endswith("/.lock"):
            return
        number = counter[0]
        counter[0] = number + 1
        if number == moment.at and moment.send:
            os.kill(os.getpid(), moment.send)
        if number == moment.at and moment.fill:
            _fill(moment.fill)
        if moment.refuse and (number == moment.at or (moment.from_then_on and number > moment.at >= 0)):
            raise OSError(moment.refuse, os.strerror(moment.refuse), path)

    sys.addaudithook(hook)


def _fill(path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def operations(log: Path) -> int:
    """How many operations on its run directory the run with this log has begun."""
    path = Path(f"{log}.count")
    return int.from_bytes(path.read_bytes(), sys.byteorder) if path.exists() else 0


def record_order(path: Path) -> None:
    """Append a line for every step of this process: the samples it trains on."""
    from aimv2_vlm.train import loop

    step = loop.run_step

    def recorded(objective: Any, model: Any, optimizer: Any, micro_batches: list[dict], *more: Any, **keys: Any) -> Any:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(sum(map(names_of, micro_batches), [])) + "\n")
        return step(objective, model, optimizer, micro_batches, *more, **keys)

    loop.run_step = recorded


def names_of(batch: dict[str, Any]) -> list[str]:
    """Key and checksum (pixels, tokens, draws) of every sample of a micro-batch."""
    tensors = [batch[name] for name in sorted(batch) if hasattr(batch[name], "numpy") and len(batch[name]) == len(batch["keys"])]
    names = []
    for i, key in enumerate(batch["keys"]):
        check = 0
        for tensor in tensors:
            check = zlib.crc32(tensor[i].contiguous().numpy().tobytes(), check)
        names.append(f"{key} {check:08x}")
    return names


def recorded_order(*paths: Path) -> list[list[str]]:
    """The samples of every step, the processes' parts in rank order."""
    parts = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]
    return [sum(step, []) for step in zip(*parts, strict=True)]


def private_disk(folder: str, size: str) -> None:
    """A small file system of its own at `folder`, seen by this process alone; raises OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        _call(libc.unshare, 0x00020000)  # CLONE_NEWNS
    else:
        user, group = os.geteuid(), os.getegid()
        _call(libc.unshare, 0x00020000 | 0x10000000)  # and CLONE_NEWUSER, in which it may mount
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    _call(libc.mount, b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: nobody else sees what follows
    _call(libc.mount, b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode())


def remount(folder: str, options: str = "", read_only: bool = False) -> None:
    """Another size of a private disk, or the same one read-only."""
    _call(ctypes.CDLL(None, use_errno=True).mount, b"tmpfs", folder.encode(), b"tmpfs", 0x20 | int(read_only), options.encode() or None)


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ----------------------------------------------------------------------------------------------------- what a run leaves


def rows(out: Path) -> list[dict]:
    """Whole rows of metrics.jsonl."""
    path, found = out / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # being written
    return found


def last_step(out: Path) -> int:
    return max((row["step"] for row in rows(out) if "loss" in row), default=0)


def complete(out: Path) -> list[int]:
    """Steps whose checkpoint has its name, oldest first."""
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))


def final_digest(out: Path) -> str:
    """Digest of every file of `final/` but the model card, which names the run: equal digests are equal weights, bit for bit."""
    digest = hashlib.sha256()
    for path in sorted((out / "final").rglob("*")):
        if path.is_file() and path.name != "README.md":
            digest.update(f"{path.relative_to(out)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if (out / "final" / "model.safetensors").exists() else ""


def phase(out: Path, validate_every: int = 4) -> str:
    """What a killed run was doing, by what lies in its directory."""
    steps = complete(out)
    halves = [int(path.name.removeprefix(".step_").removesuffix(".tmp")) for path in (out / "checkpoints").glob(".step_*.tmp")]
    if (out / "final").exists():
        return "end"
    if (out / ".final.tmp").exists():
        return "final"
    if halves:
        return "save" if not steps or max(halves) > steps[-1] else "rotation"
    if len(steps) > 2:
        return "rotation"
    found = rows(out)
    if not found:
        return "start"
    return "evaluation" if found[-1]["step"] % validate_every == 0 and "val_loss" not in found[-1] else "step"


# -------------------------------------------------------------------------------------------------------------- a driver


def arguments(description: str, count: int, **more: tuple) -> argparse.Namespace:
    """--count, --seed and --out of every driver, and `more`: name -> (default, help)."""
    parser = argument_parser(description, count, "trials")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reliability",
                        help="work folder with one line a trial; a stopped driver goes on from it (default: runs/reliability)")
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name}", default=default, help=text, type=type(default))
    return parser.parse_args()


def until(condition: Callable[[], bool], seconds: float = 300.0, pause: float = 0.003) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing happened in time")
        time.sleep(pause)
