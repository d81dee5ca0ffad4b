"""Independent runs of small models side by side, one a core. They pass through faster than one after the other as two processes each,
because nothing is exchanged: mini_aimv2 on 2 cores trained 229 pictures/s as two runs at once, 158 as one run of two processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from aimv2_vlm.train.metrics import Progress, say


def jobs_here() -> int:
    """One a core."""
    return len(os.sched_getaffinity(0))


class Pool:
    """`jobs` processes with a core each, for one study: `with Pool(2) as pool: pool.run(...)`."""

    def __init__(self, jobs: int):
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        self._lanes: dict[Connection, Any] = {}  # our end of its pipe -> process
        for number in range(jobs):
            ours, theirs = context.Pipe()
            self._lanes[ours] = context.Process(target=_lane, args=(theirs, cores[number % len(cores)]))
            self._lanes[ours].start()
            theirs.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for lane, process in self._lanes.items():
            lane.close()  # its process ends with that
            process.join()

    def run(self, what: str, calls: Sequence[tuple[Path, Callable[..., Any], tuple]]) -> list[Any]:
        """`work(*arguments)` of every (folder, work, arguments); results in order.

        What they print goes to `<folder>/log.txt`. SIGINT and SIGTERM are handed on, so that training runs save and stop, and end
        this process when they have; a call that fails ends it when those that had begun are through. Raises SystemExit then.
        """
        free, waiting, running = list(self._lanes), list(enumerate(calls))[::-1], {}
        results: dict[int, Any] = {}
        failed = stopped = ""

        def hand_on(number: int, _: FrameType | None) -> None:
            nonlocal stopped
            stopped = signal.Signals(number).name
            for process in self._lanes.values():
                if process.is_alive():
                    os.kill(process.pid, number)

        progress = Progress(what, len(calls), unit="runs")
        old = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        if calls:
            say(f"{what}: {len(calls)} runs, {len(self._lanes)} at once; what they print is in {os.path.commonpath([folder for folder, _, _ in calls])}/**/log.txt")
        try:
            while running or (waiting and not failed and not stopped):
                while waiting and free and not failed and not stopped:
                    (number, call), lane = waiting.pop(), free.pop()
                    try:
                        lane.send(call)
                    except OSError:  # its process was ended while it had nothing to do
                        failed = f"{what}: a process of the pool was ended from outside; the same command goes on from there"
                    else:
                        running[lane] = number
                for lane in wait(list(running), timeout=1.0):
                    number = running.pop(lane)
                    try:
                        good, results[number] = lane.recv()
                        free.append(lane)
                    except (EOFError, OSError):  # its process was ended from outside
                        good = False
                    if not good:
                        failed = failed or f"{calls[number][0] / 'log.txt'}: this run failed; the last lines say why"
                    progress.update(len(results))
        finally:
            progress.close()
            for number, handler in old.items():
                signal.signal(number, handler)
        if stopped or failed:
            raise SystemExit(f"{what}: stopped by {stopped}; the same command goes on from there" if stopped else failed)
        return [results[number] for number in range(len(calls))]


def _lane(calls: Connection, core: int) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn its loader workers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a study in the background of a shell inherits that it is ignored
    os.setsid()  # a Ctrl-C reaches this process once, from the one that started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            folder, work, arguments = calls.recv()
        except (EOFError, KeyboardInterrupt):
            return
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            answer = True, work(*arguments)
        except BaseException:
            traceback.print_exc()
            answer = False, None
        calls.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
