"""One command as several processes of this machine: small models on a CPU train faster as two processes than as two threads.

No port is opened: the processes find each other through a file and talk over the loopback device. For GPUs and several
machines use torchrun or `accelerate launch`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from aimv2_vlm.train.loop import Stopped

RENDEZVOUS = "AIMV2_VLM_RENDEZVOUS"  # file through which launched processes meet
GRACE_S = 20.0  # after one process failed, how long the others may take to notice


def cpu_processes(most: int = 2) -> int:
    """Processes worth launching for a small model: one a core, at most `most`; 1 where there is a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(most, len(os.sched_getaffinity(0)))


def run_in_processes(words: Sequence[str], count: int) -> None:
    """Run `aimv2-vlm <words>` as `count` data-parallel processes and wait.

    SIGINT and SIGTERM are handed on, so that the run saves and stops as it would alone; should this process be killed, the
    others end as well. Raises Stopped with the exit status of the first process that did not succeed; one that a signal ended is named.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_start(words, rank, count, Path(folder) / "rendezvous") for rank in range(count)]

        def hand_on(number: int, _: object) -> None:
            for child in children:
                if child.poll() is None:
                    child.send_signal(number)

        old = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _wait(children)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            left_behind = {rank for rank, child in enumerate(children) if child.poll() is None}  # beyond the grace: killed here
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
                child.stdin.close()
    codes = {rank: child.returncode for rank, child in enumerate(children) if child.returncode}
    for rank, code in codes.items():
        if code < 0 and rank not in left_behind:
            raise Stopped(f"process {rank} of {count} was ended by {signal.Signals(-code).name} (from outside, or by the system for want of memory); "
                          "the same command goes on from the newest checkpoint", 128 - code)
    if codes:
        raise Stopped("", next((code for code in codes.values() if code > 0), 1))


def _start(words: Sequence[str], rank: int, count: int, rendezvous: Path) -> subprocess.Popen:
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": threads,
             "GLOO_SOCKET_IFNAME": "lo", RENDEZVOUS: rendezvous}
    environment = os.environ | {key: str(value) for key, value in place.items()}
    # A session of its own: a Ctrl-C at the terminal reaches it once, through `hand_on`.
    return subprocess.Popen([sys.executable, "-m", "aimv2_vlm", *words], env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _wait(children: list[subprocess.Popen]) -> None:
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.returncode for child in children):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.1)


def join() -> None:
    """In a process that `run_in_processes` started: make the process group, and end when the launcher does."""
    if RENDEZVOUS not in os.environ or _joined.is_set():
        return
    import torch.distributed as dist

    _joined.set()
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    dist.init_process_group("gloo", init_method=f"file://{os.environ[RENDEZVOUS]}", rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD_SIZE"]))


_joined = threading.Event()


def _end_with_launcher() -> None:
    while os.read(0, 1):  # nothing is ever written: this returns when the launcher is gone
        pass
    os._exit(1)
