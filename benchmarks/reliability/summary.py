"""Work files and result lines of the reliability drivers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import record


def argument_parser(description: str, count: int, what: str) -> argparse.ArgumentParser:
    """What every driver takes: --count (of `what`) and --seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count, help=f"{what} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def launched_parser(description: str) -> argparse.ArgumentParser:
    """What a driver takes that launches processes itself: --processes, --strategies, --work."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--work", type=Path, required=True)
    return parser


def done_lines(log: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of a driver's work file that belong to this count and seed; a line that a kill cut off does not count."""
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if all(entry.get(name) == value for name, value in about.items()):
            lines.append(entry)
    return lines


def remember(log: Path, entry: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def summarise(name: str, failures: int, unit: str, **more: Any) -> None:
    """Print and append one result line; the peer of a count of failures is none."""
    record("reliability", {"name": name, "ours": failures, "peer": 0, "ratio": None, "unit": unit, "equal": failures == 0, **more})
