"""R2: a run that stops after any of 60 steps and goes on ends with the same weights, having seen the same samples.

    python benchmarks/reliability/resume.py [--count 180] [--seed 0] [--out FOLDER]

Trials are (step to stop after) x (0, 2, 4 workers), in a seeded order; all of them with --count 180. Weights are compared
bit for bit (every file of `final/`), samples by key and checksum of pixels, tokens and draws of every row that was
trained on. Prints and appends to results/reliability.jsonl one line: `ours` is the number of faults.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_vlm.train.metrics import TIMED  # noqa: E402
from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.summary import done_lines, remember, summarise  # noqa: E402

WORKERS = (0, 2, 4)
QUIET = ["train.save_every=1000", "train.validate_every=20"]


def undisturbed(data: Path, out: Path, steps: int) -> dict:
    """Digest and order of a run without a stop and without workers."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    code, words = runs.run(runs.command(data, out / "run", steps, *QUIET), out / "run.log", order=out / "order")
    if code:
        raise RuntimeError(words[-4000:])
    return {"digest": runs.final_digest(out / "run"), "order": runs.recorded_order(out / "order"), "rows": losses(out / "run")}


def losses(out: Path) -> list[dict]:
    """What metrics.jsonl says, without what a clock decides."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in runs.rows(out)]


def trial(data: Path, out: Path, steps: int, stop: int, workers: int, expected: dict) -> str:
    """"" or what differs from the undisturbed run."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    words = runs.command(data, out / "run", steps, *QUIET, f"train.num_workers={workers}")
    for more in ([f"train.stop_after={stop}"], []):
        code, said = runs.run([*words, *more], out / "run.log", order=out / "order")
        if code:
            return f"exit status {code}: {said[-300:]}"
        if more and runs.complete(out / "run") != [stop]:
            return f"stopped with checkpoints {runs.complete(out / 'run')}"
    if runs.recorded_order(out / "order") != expected["order"]:
        return "other samples"
    if losses(out / "run") != expected["rows"]:
        return "other losses"
    return "" if runs.final_digest(out / "run") == expected["digest"] else "other weights"


def trials(data: Path, out: Path, cases: list[tuple[int, int]], steps: int, seed: int, log: Path) -> list[dict]:
    about = {"driver": "resume", "seed": seed}
    found = done_lines(log, about)
    expected = undisturbed(data, out / "undisturbed", steps)
    known = {(line["stop"], line["workers"]) for line in found}
    for stop, workers in cases:
        if (stop, workers) in known:
            continue
        fault = trial(data, out / "run", steps, stop, workers, expected)
        found.append(about | {"stop": stop, "workers": workers, "fault": fault})
        remember(log, found[-1])
    return found


def main() -> None:
    options = runs.arguments(__doc__, 180, steps=(60, "steps after which a run may stop"))
    cases = [(stop, workers) for stop in range(1, options.steps + 1) for workers in WORKERS]
    random.Random(options.seed).shuffle(cases)
    data = runs.make_shards(options.out / "data")
    began = time.monotonic()
    found = trials(data, options.out / "resume", cases[: options.count], options.steps + 1, options.seed, options.out / "resume.jsonl")
    faults = [line for line in found if line["fault"]]
    for line in faults:
        print(line, flush=True)
    summarise(f"R2 stop after one of {options.steps} steps and go on, {len(found)} trials", len(faults), "faults", trials=len(found),
              steps=len({line["stop"] for line in found}), workers={str(k): v for k, v in sorted(Counter(line["workers"] for line in found).items())},
              seconds=round(time.monotonic() - began))


if __name__ == "__main__":
    main()
