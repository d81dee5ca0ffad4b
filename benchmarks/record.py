"""The one way to time sides against each other, and to write a result line: printed, and appended to benchmarks/results/ with machine and versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(sides: Mapping[str, Callable], inputs: Iterable[tuple], clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Call every side with the arguments of every input, the order of sides turned round each time: side -> seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for arguments in inputs:
        for name in order:
            start = clock()
            sides[name](*arguments)
            seconds[name].append(clock() - start)
        order.reverse()
    return seconds


def record(file: str, facts: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Append `facts` to `results/<file>.jsonl`; a line with the very same facts, of a study started again, is not written twice.

    packages: others whose versions belong to the line, where installed.
    """
    from aimv2_vlm.train.directory import processor, versions

    found = versions()
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    line = json.dumps(facts | {"machine": f"{processor()} x {os.cpu_count()}", "versions": found})
    print(line, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{file}.jsonl", "a+", encoding="utf-8") as results:
        results.seek(0)
        if line + "\n" not in results:
            results.write(line + "\n")


def recorded(file: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The last line of `results/<file>.jsonl` that holds these settings; None where there is none."""
    place, settings = RESULTS / f"{file}.jsonl", json.loads(json.dumps(settings))
    lines = place.read_text(encoding="utf-8").splitlines() if place.exists() else []
    return next((row for row in map(json.loads, reversed(lines)) if settings.items() <= row.items()), None)
