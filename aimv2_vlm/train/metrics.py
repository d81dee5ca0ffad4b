"""Numbers of a run: `metrics.jsonl`, TensorBoard, and the progress line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aimv2_vlm.config import UserError


TIMED = ("samples_per_s", "data_wait", "tflops_per_s", "share_of_peak")  # what differs between two equal runs


def matrix_product_tflops(device: torch.device, precision: str) -> float:
    """The rate of a large dense matrix product here, in TFLOP/s, the best of several: what `share of peak` is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # numbers as in a network: equal ones draw less power, and a GPU goes faster
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def say(text: str) -> None:
    """A plain log line on standard error (standard output belongs to results)."""
    print(text, file=sys.stderr, flush=True)


class MetricsLog:
    """Append-only `metrics.jsonl`; rows after the step a run goes on from are cut off, so no step stands twice."""

    def __init__(self, folder: Path, start_step: int, trackers: list[str]):
        self.path = folder / "metrics.jsonl"
        self._drop_after(start_step)
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = None
        for tracker in trackers:
            if tracker != "tensorboard":
                raise UserError(f"train.trackers: '{tracker}' is not known; use tensorboard or an empty list")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def _drop_after(self, start_step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the half-written last line of a killed process
            if row["step"] <= start_step:
                kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({k: _rounded(v) for k, v in row.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None  # JSON has no word for it


class Progress:
    """A bar with time left on a terminal, a plain line now and then in a pipe."""

    def __init__(self, what: str, total: int, done: int = 0, enabled: bool = True, unit: str = "steps"):
        self.what, self.total, self.done, self.enabled, self.unit = what, total, done, enabled, unit
        self._first, self._start, self._last = done, time.monotonic(), 0.0
        self._bar = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                            console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        self.done = done
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.start()  # with the first news, so that a bar without any never shows
            self._bar.update(self._task, completed=done, note=note)
            if done >= self.total:
                self.close()
            return
        now = time.monotonic()
        if done >= self.total or now - self._last >= 10:
            self._last = now
            rate = (done - self._first) / max(1e-9, now - self._start)
            left = f", {format_seconds((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
            say(f"{self.what}: {done}/{self.total} {self.unit}{left}{'  ' + note if note else ''}")

    def of(self, done: int, total: int) -> None:
        """As a `progress(done, total)` callback."""
        if total != self.total:
            self.total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)
        self.update(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
