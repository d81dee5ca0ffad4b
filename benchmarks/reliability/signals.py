"""R10: SIGTERM at any moment leaves with exit status 75, a checkpoint within one step, and a run that goes on unchanged.

    python benchmarks/reliability/signals.py [--count 100] [--seed 0] [--out FOLDER]

A long run (validation every 4 steps, a checkpoint every 7) gets SIGTERM at a random moment after its first step, again and
again, until it is finished; the process is held still while the signal is sent, so that the step it is in is known. Fresh
runs (a tenth of --count) get it before their first step, at a random operation on the run directory: the same status, no
checkpoint. Each finished run must equal an undisturbed one bit for bit. With --torchrun 1 also once under torchrun, which
replaces exit statuses: the checkpoint's state.json carries it. Prints and appends to results/reliability.jsonl one line:
`ours` is the number of faults.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.summary import done_lines, remember, summarise  # noqa: E402

EXIT_STOPPED = 75
LONGEST_WAIT_S = 0.6  # after the first step of each life
OUTSIDE = "stopped by SIGTERM outside of a training step"  # after the last one: everything was saved already
KEYS = ["train.save_every=7", "train.validate_every=4"]


def stopped_state(out: Path) -> dict:
    """state.json of the newest checkpoint."""
    return json.loads((out / "checkpoints" / f"step_{runs.complete(out)[-1]:08d}" / "state.json").read_text(encoding="utf-8"))


def after_the_first_step(words: list[str], out: Path, draw: random.Random) -> dict:
    """One life of the run in `out`, ended by SIGTERM (or by its end): what was found."""
    began_at = runs.complete(out)[-1] if runs.complete(out) else 0
    process = runs.Run(words, out.with_suffix(".log"))
    runs.until(lambda: not process.alive or runs.last_step(out) > began_at)
    time.sleep(draw.uniform(0, LONGEST_WAIT_S))
    held = process.freeze()
    logged, phase = runs.last_step(out), runs.phase(out)
    process.send(signal.SIGTERM)
    process.send(signal.SIGCONT)
    code = process.wait()
    facts = {"when": "after", "code": code, "phase": phase if held else "finished", "fault": ""}
    if not held or (code == 0 and phase == "end"):
        facts["fault"] = "" if code == 0 else f"exit status {code}: {process.words()[-300:]}"
        return facts | {"phase": "finished"}
    if code != EXIT_STOPPED:
        facts["fault"] = f"exit status {code} in {phase}: {process.words()[-300:]}"
        return facts
    step = runs.complete(out)[-1]
    facts["step"] = step
    if step not in (logged, logged + 1):
        facts["fault"] = f"held after step {logged}, but the newest checkpoint is of step {step}"
    elif OUTSIDE not in process.words() and (stopped_state(out)["stopped"], stopped_state(out)["exit_code"]) != ("SIGTERM", EXIT_STOPPED):
        facts["fault"] = "state.json does not say why the run stopped"
    elif "Traceback" in process.words():
        facts["fault"] = "a traceback"
    return facts


def before_the_first_step(words: list[str], out: Path, draw: random.Random, operations: int) -> dict:
    """SIGTERM while a fresh run sets itself up."""
    shutil.rmtree(out, ignore_errors=True)
    at = draw.randrange(operations)
    code, said = runs.run(words, out.with_suffix(".log"), moment=runs.Moment(str(out), at, signal.SIGTERM))
    fault = "" if code == EXIT_STOPPED and "Traceback" not in said else f"exit status {code}: {said[-300:]}"
    if runs.complete(out):
        fault = f"checkpoints {runs.complete(out)}"
    return {"when": "before", "code": code, "phase": "set-up", "operation": at, "fault": fault}


def set_up_operations(words: list[str], out: Path) -> int:
    """Operations on the run directory that a fresh run has surely begun before its first step."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        log = out.with_suffix(".log")
        process = runs.Run(words, log, moment=runs.Moment(str(out)))
        runs.until(lambda: not process.alive or (out / "data_report.json").exists())  # noqa: B023
        held, count = process.freeze(), runs.operations(log)
        early = held and not runs.rows(out) and not (out / "checkpoints").exists()
        process.send(signal.SIGKILL)
        process.wait()
        if early:
            return count
        if not held:
            raise RuntimeError(process.words()[-4000:])


def trials(data: Path, out: Path, count: int, steps: int, seed: int, log: Path) -> list[dict]:
    about = {"driver": "signals", "seed": seed}
    found = done_lines(log, about)
    words = runs.command(data, out / "undisturbed", steps, *KEYS)
    shutil.rmtree(out, ignore_errors=True)
    code, said = runs.run(words, out / "undisturbed.log")
    if code:
        raise RuntimeError(said[-4000:])
    digest = runs.final_digest(out / "undisturbed")
    fresh = out / "fresh"
    operations = set_up_operations(runs.command(data, fresh, steps, *KEYS), fresh)
    for number in range(sum(line["when"] == "before" for line in found), max(1, count // 10)):
        draw = random.Random(f"{seed} before {number}")
        found.append(about | before_the_first_step(runs.command(data, fresh, steps, *KEYS), fresh, draw, operations))
        remember(log, found[-1])
    folder, number = out / "run", len(found)
    while sum(line["when"] == "after" and line["phase"] != "finished" for line in found) < count or folder.exists():
        draw = random.Random(f"{seed} {number}")
        enough = sum(line["when"] == "after" and line["phase"] != "finished" for line in found) >= count
        if enough:  # brought to its end
            code, said = runs.run(runs.command(data, folder, steps, *KEYS), folder.with_suffix(".log"))
            facts = {"when": "after", "code": code, "phase": "finished", "fault": "" if code == 0 else said[-300:]}
        else:
            facts = after_the_first_step(runs.command(data, folder, steps, *KEYS), folder, draw)
        if facts["phase"] == "finished" and not facts["fault"] and runs.final_digest(folder) != digest:
            facts["fault"] = "other weights than the undisturbed run's"
        number += 1
        found.append(about | facts)
        remember(log, found[-1])
        if facts["fault"]:
            folder = out / f"run_{number}"  # what went wrong stays to be looked at
        elif facts["phase"] == "finished":
            shutil.rmtree(folder)
    return found


def under_torchrun(data: Path, out: Path) -> str:
    """"" or what is wrong: two processes under torchrun, stopped by SIGTERM."""
    shutil.rmtree(out, ignore_errors=True)
    words = runs.command(data, out, 100_000, *KEYS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "aimv2_vlm", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(launch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        runs.until(lambda: process.poll() is not None or runs.last_step(out) > 0, 600)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not runs.complete(out):
        return f"no checkpoint; torchrun's exit status {process.returncode}"
    state = stopped_state(out)
    if (state["stopped"], state["exit_code"], state["world"]) != ("SIGTERM", EXIT_STOPPED, 2) or state["step"] < runs.last_step(out):
        return f"state.json says {[state[key] for key in ('stopped', 'exit_code', 'world', 'step')]}"
    return ""


def main() -> None:
    options = runs.arguments(__doc__, 100, torchrun=(0, "1: also once under torchrun"))
    data = runs.make_shards(options.out / "data")
    began = time.monotonic()
    found = trials(data, options.out / "signals", options.count, 25 * options.count, options.seed, options.out / "signals.jsonl")
    if options.torchrun:
        found.append({"when": "torchrun", "code": None, "phase": "step", "fault": under_torchrun(data, options.out / "torchrun")})
    faults = [line for line in found if line["fault"]]
    for line in faults:
        print(line, flush=True)
    sent = [line for line in found if line["phase"] != "finished"]
    summarise(f"R10 SIGTERM, {len(sent)} moments", len(faults), "faults", when=dict(Counter(line["when"] for line in sent)),
              phases=dict(Counter(line["phase"] for line in sent)), finished=len(found) - len(sent), seconds=round(time.monotonic() - began))


if __name__ == "__main__":
    main()
