"""How far DDP, FSDP2, ZeRO-2 and ZeRO-3 on two processes (gloo) stray from the single process, global batch equal.

    python benchmarks/distributed_curves.py [--steps 200]

Uneven captions, holes of weight 0, micro-batches of 3 and 1 against one of 8, a frozen block, one group with learning
rate x 8, clipping. Prints and appends to results/distributed_curves.jsonl one line a strategy and length: `ours` is the
largest deviation of any loss divided by max(1, loss), `peer` the tolerance (2e-6 over 20 steps, 1e-3 over 200).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "distributed_worker.py"
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
TOLERANCES = {20: 2e-6, 200: 1e-3}


def run(words: list[str], strategies: tuple[str, ...], steps: int, out: Path) -> None:
    command = [sys.executable, *words, str(WORKER), *strategies]
    command += ["--curves-only", "--steps", str(steps), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True)


def largest_deviation(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    return max(abs(row[name] - wanted[name]) / max(1.0, abs(wanted[name]))
               for row, wanted in zip(rows, expected, strict=True) for name in wanted if name != "grad_norm")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=max(TOLERANCES))
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run([], ("single",), steps, out)
        run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], STRATEGIES, steps, out)
        curves = {s: json.loads((out / f"{s}.json").read_text())["curve"] for s in ("single", *STRATEGIES)}
    for strategy in STRATEGIES:
        for length, tolerance in TOLERANCES.items():
            if length > steps:
                continue
            deviation = largest_deviation(curves[strategy][:length], curves["single"][:length])
            record("distributed_curves", {
                "name": f"distributed {strategy} x 2 over {length} steps", "ours": deviation, "peer": tolerance,
                "ratio": deviation / tolerance, "unit": "largest loss deviation / max(1, loss)", "equal": deviation <= tolerance,
            })


if __name__ == "__main__":
    main()
