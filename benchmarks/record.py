"""The one way to write a result line: printed, and appended to benchmarks/results/ with the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def record(file: str, facts: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Append `facts` to `results/<file>.jsonl`. packages: others whose versions belong to the line, where installed."""
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
    with open(RESULTS / f"{file}.jsonl", "a", encoding="utf-8") as results:
        results.write(line + "\n")
