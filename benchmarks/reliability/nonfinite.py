"""Not-a-number and infinity in loss, gradient or pixels of one process only: every process skips alike, weights, moments and step counters
stay untouched, and the next step is that of a run which never saw it.

    python benchmarks/reliability/nonfinite.py [--processes 4] [--strategies ddp fsdp2 zero2 zero3] --work FOLDER

Gloo processes on this machine, each strategy with every (value, place, process); a result line goes to benchmarks/results/reliability.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

VALUES, PLACES = ("nan", "inf", "-inf"), ("loss", "gradient", "pixels")


def poisoned(value: float, place: str, rank: int) -> Any:
    """The worker's objective, spoiled at one place on one process."""
    import torch
    from distributed_worker import PATCH, GenerativeObjective, Objective

    mine = torch.distributed.get_rank() == rank

    class Poisoned(GenerativeObjective):
        def sums(self, model: torch.nn.Module, batch: dict[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
            sums = super().sums(model, batch, device)
            if not mine:
                return sums
            if place == "loss":
                return {name: total * value for name, total in sums.items()}
            if place == "gradient":
                for total in sums.values():
                    if total.requires_grad:
                        total.register_hook(lambda gradient: gradient * value)
            return sums

    objective = Poisoned(Objective(), PATCH, [0.5] * 3, [0.25] * 3)
    if mine and place == "pixels":
        clean = objective.normalize

        def spoiled(pixels: torch.Tensor) -> torch.Tensor:
            return clean(pixels).index_fill(0, torch.zeros(1, dtype=torch.long), value)

        objective.normalize = spoiled
    return objective


def work(strategies: list[str], out: Path) -> None:
    """In each process: every case of every strategy."""
    import torch
    from distributed_worker import Run

    torch.set_num_threads(1)
    for strategy in strategies:
        run, faults, cases = Run(strategy), [], 0
        run.steps(0, 2, 2)
        for value in VALUES:
            for place in PLACES:
                for rank in range(run.placement.world):
                    before = run.snapshot()
                    row = run.steps(2, 3, 2, objective=poisoned(float(value), place, rank))[0]
                    after = run.snapshot()
                    touched = run.placement.gather_strings([name for name in before if not torch.equal(before[name], after[name])])
                    finite = torch.isfinite(torch.tensor(row["grad_norm"])).item()
                    cases += 1
                    if touched or finite:
                        faults.append(f"{value} in {place} of process {rank}: touched {touched[:3]}, norm {row['grad_norm']}")
        row = run.steps(2, 3, 2)[0]  # the step that each of these cases failed to make
        clean = Run(strategy)
        wanted = clean.steps(0, 3, 2)[-1]
        if row != wanted:
            faults.append(f"the next step {row} is not that of an undisturbed run {wanted}")
        if run.placement.is_main:
            (out / f"{strategy}.json").write_text(json.dumps({"cases": cases, "faults": faults}))
    torch.distributed.destroy_process_group()


def main() -> None:
    from benchmarks.reliability.summary import launched_parser, summarise

    arguments = launched_parser(__doc__).parse_args()
    if "RANK" in os.environ:
        work(arguments.strategies, arguments.work)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.processes), __file__,
               "--work", str(arguments.work), "--strategies", *arguments.strategies]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    found = {strategy: json.loads((arguments.work / f"{strategy}.json").read_text()) for strategy in arguments.strategies}
    faults = [f"{strategy}: {fault}" for strategy, result in found.items() for fault in result["faults"]]
    summarise("R9 not-a-number and infinity on one process", len(faults), "faults", processes=arguments.processes, strategies=arguments.strategies,
              cases=sum(result["cases"] for result in found.values()), first_faults=faults[:3])
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
