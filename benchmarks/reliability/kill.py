"""R1: kill -9 at a random moment, restarted with the same command, changes nothing.

    python benchmarks/reliability/kill.py [--count 200] [--seed 0] [--out FOLDER]

A run of 24 steps (a checkpoint every 2, two kept, validation every 4, `final/` at the end) is killed and restarted with the
same command until it is finished; then its `final/` must equal that of an undisturbed run in every byte (but the model card, which names the run), and a new one
begins. Half of the kills come at a random time, half before a random operation on the run directory (open, rename, make,
remove), which reaches the short moments: in a save, in the rotation, while `final/` is published. After each kill every
checkpoint that has its name must be whole. Prints and appends to results/reliability.jsonl one line: `ours` is the number
of faults.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.summary import done_lines, remember, summarise  # noqa: E402

STEPS = 24


def undisturbed(data: Path, out: Path) -> dict:
    """Digest, seconds and operations of a run that nobody disturbs (run twice: the first time reads and imports)."""
    for name in ("first", "undisturbed"):
        began = time.monotonic()
        code, words = runs.run(runs.command(data, out / name, STEPS), out / f"{name}.log", moment=runs.Moment(str(out / name)))
        if code:
            raise RuntimeError(words[-4000:])
    if runs.final_digest(out / "first") != runs.final_digest(out / "undisturbed"):
        raise RuntimeError("two undisturbed runs differ: nothing can be compared")
    return {"digest": runs.final_digest(out / "undisturbed"), "seconds": time.monotonic() - began,
            "operations": runs.operations(out / "undisturbed.log")}


def trial(data: Path, out: Path, draw: random.Random | None, expected: dict) -> dict:
    """Start or restart the run in `out` and kill it (without `draw`: let it end); what was found. It may end before the kill."""
    kind = draw.choice(["time", "operation"]) if draw else "none"
    moment = runs.Moment(str(out), draw.randrange(expected["operations"]), signal.SIGKILL) if kind == "operation" else None
    process = runs.Run(runs.command(data, out, STEPS), out.with_suffix(".log"), moment=moment)
    if kind == "time":
        time.sleep(draw.uniform(0, expected["seconds"]))
        process.send(signal.SIGKILL)
    code = process.wait()
    facts = {"kind": kind, "code": code, "killed": code == -signal.SIGKILL, "fault": ""}
    if "passed over" in process.words():
        facts["fault"] = "a checkpoint with its name was not whole"
    if code == 0:
        facts |= {"phase": "finished"}
        if runs.final_digest(out) != expected["digest"]:
            facts["fault"] = "other weights than the undisturbed run's"
    elif code == -signal.SIGKILL:
        facts |= {"phase": runs.phase(out), "step": runs.last_step(out)}
    else:
        facts["fault"] = f"exit status {code}: {process.words()[-300:]}"
    return facts


def kills(data: Path, out: Path, count: int, seed: int, log: Path) -> list[dict]:
    """Until `count` kills are done and the run they fell on is finished; lines of `log` from before count."""
    about = {"driver": "kill", "seed": seed}
    found = done_lines(log, about)
    expected = undisturbed(data, out)
    number = len(found)
    folder = out / f"run_{number}"
    while sum(line["killed"] for line in found) < count or folder.exists():
        enough = sum(line["killed"] for line in found) >= count  # then the last run is brought to its end
        draw = None if enough else random.Random(f"{seed} {number}")
        facts = about | {"trial": number} | trial(data, folder, draw, expected)
        remember(log, facts)
        found.append(facts)
        number += 1
        if facts["code"] == 0 or facts["fault"]:
            if not facts["fault"]:
                shutil.rmtree(folder)
            folder = out / f"run_{number}"
    return found


def main() -> None:
    options = runs.arguments(__doc__, 200)
    data = runs.make_shards(options.out / "data")
    folder = options.out / "kill"
    shutil.rmtree(folder, ignore_errors=True)  # a run that a stopped driver left; its lines stay
    began = time.monotonic()
    found = kills(data, folder, options.count, options.seed, options.out / "kill.jsonl")
    killed = [line for line in found if line["killed"]]
    faults = [line for line in found if line["fault"]]
    for line in faults:
        print(line, flush=True)
    summarise(f"R1 kill -9, {len(killed)} kills", len(faults), "faults", kills=len(killed), kinds=dict(Counter(line["kind"] for line in killed)),
              phases=dict(Counter(line["phase"] for line in killed)), finished=sum(line["code"] == 0 for line in found),
              seconds=round(time.monotonic() - began))


if __name__ == "__main__":
    main()
