"""How far training by each pre-training objective strays from its oracle: two equal programs, step by step.

    python benchmarks/objective_curves.py [--steps 200] [--only aimv2 clip]

Ours is the project's loop, loss and fused AdamW; the oracle (tests/oracles.py) is the objective written out in plain tensor
operations under a written-out fully decoupled AdamW, from the same weights on the same batches (uneven captions, random
prefixes, a row of weight 0, clipping, warm-up and cosine). Prints and appends to results/objective_curves.jsonl one line
an objective and length: `ours` is the largest deviation of the loss divided by max(1, loss), `peer` the tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from record import record

ROOT = Path(__file__).resolve().parents[1]
TOLERANCES = {20: 2e-6, 200: 1e-3}


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from objective_cases import CASES, curves

    from aimv2_vlm.config import Optimizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=max(TOLERANCES), help="of the longest curve")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="objectives (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        for length, tolerance in TOLERANCES.items():
            if length > arguments.steps:
                continue
            optim = Optimizer(lr=1e-3, min_lr=1e-4, warmup_lr=1e-6, warmup_steps=max(4, length // 10), steps=length, weight_decay=0.05)
            ours, theirs = curves(dataclasses.replace(CASES[name], layers=1), optim)
            deviation = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
            record("objective_curves", {
                "name": f"objective {name} over {length} steps", "ours": deviation, "peer": tolerance, "ratio": deviation / tolerance,
                "unit": "largest loss deviation / max(1, loss)", "equal": deviation <= tolerance, "first_loss": theirs[0], "last_loss": theirs[-1],
            })


if __name__ == "__main__":
    main()
