"""R13: a full disk, a read-only one and storage that fails: one clear line, nothing lost, and the same command goes on.

    python benchmarks/reliability/storage.py [--count 200] [--seed 0] [--out FOLDER]

Kinds of trial, in turn: `full`: a file system of its own fills up before a random operation on the run directory; `once`: one
random operation (open, rename, make, remove) fails with an input/output error; `always`: it and all later ones do;
`small`: the disk is too small from the start; `read-only`: it becomes so between two starts. A run ends well or with exit
status 2 and one line that names a file; after that the same command on sound storage must reach an undisturbed run's `final/`,
bit for bit, without passing over any checkpoint. `full`, `small` and `read-only` need a private mount (root, or user
namespaces). Prints and appends to results/reliability.jsonl one line: `ours` is the number of faults.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.summary import done_lines, remember, summarise  # noqa: E402

STEPS, KINDS, MOUNTED = 8, ("full", "once", "always", "small", "read-only"), ("full", "small", "read-only")
LARGE, SMALL = "64m", "900k"  # a whole run takes about 3 MB


def told(code: int, words: str, out: Path) -> str:
    """"" or why this is not an honest failure: status 2 and one line that names a file of the run."""
    lines = [line for line in words.splitlines() if line.startswith("error: ")]
    if code != 2 or len(lines) != 1 or "Traceback" in words or str(out) not in lines[0]:
        return f"exit status {code}: {words[-600:]}"
    return ""


def on_a_disk_of_its_own(kind: str, disk: str, words: list[str], at: int, log: str, result: str) -> None:
    """In a forked process: mount, run, mend, run again; {"codes", "first", "digest"} or {"impossible"} into `result`.

    What the two runs say goes to `log` and `log`.2.
    """
    import os

    from aimv2_vlm import cli

    def start(number: int) -> int:
        descriptor = os.open(log if number == 1 else f"{log}.2", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        return cli.main(words)

    out = Path(disk, "run")
    try:
        runs.private_disk(disk, SMALL if kind == "small" else LARGE)
    except OSError as error:
        Path(result).write_text(json.dumps({"impossible": str(error)}))
        return
    if kind == "full":
        runs.watch(runs.Moment(str(out), at, fill=f"{disk}/ballast"), f"{log}.count")
    elif kind == "read-only":
        cli.main([*words, "train.stop_after=4"])
        runs.remount(disk, read_only=True)
    codes, kept = [start(1)], runs.complete(out)
    if kind == "full":
        Path(disk, "ballast").unlink(missing_ok=True)
    else:
        runs.remount(disk, f"size={LARGE}")
    codes.append(start(2))
    Path(result).write_text(json.dumps({"codes": codes, "kept": kept, "digest": runs.final_digest(out)}))


def trial(kind: str, data: Path, out: Path, draw: random.Random, expected: dict) -> dict:
    """One failure and the run after it; `fault` is "" or what is wrong."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    at, run_folder, log = draw.randrange(expected["operations"]), out / "disk" / "run", out / "run.log"
    words, facts = runs.command(data, run_folder, STEPS), {"kind": kind, "operation": at, "fault": ""}
    if kind in MOUNTED:
        (out / "disk").mkdir()
        result = out / "result.json"
        process = runs.Run([], out / "outer.log", instead=(on_a_disk_of_its_own, kind, str(out / "disk"), words, at, str(log), str(result)))
        if process.wait():
            return facts | {"fault": process.words()[-600:]}
        found = json.loads(result.read_text())
        if "impossible" in found:
            return facts | {"impossible": found["impossible"]}
        codes, digest, second = found["codes"], found["digest"], Path(f"{log}.2").read_text()
        if kind != "full" and codes[0] != 2:
            return facts | {"fault": f"exit status {codes[0]} on a disk that is {kind}"}
        if kind == "small" and (found["kept"] or "MB are free" not in log.read_text()):
            return facts | {"fault": "a run that cannot fit was not refused with figures before its first step"}
        if kind == "read-only" and found["kept"] != [2, 4]:
            return facts | {"fault": f"kept {found['kept']}"}
    else:
        codes = [runs.run(words, log, moment=runs.Moment(str(run_folder), at, refuse=errno.EIO, from_then_on=kind == "always"), quick=True)[0]]
        code, second = runs.run(words, out / "second.log")
        codes, digest = [*codes, code], runs.final_digest(run_folder)
    first = log.read_text()
    facts |= {"codes": codes, "said": next((line for line in first.splitlines() if line.startswith(("error:", "warning:"))), "")}
    if codes[0]:
        facts["fault"] = told(codes[0], first, out)
    elif kind == "always" and not runs.operations(log) <= at:
        facts["fault"] = facts["fault"] or ("" if "warning" in first else "failed storage went unnoticed")
    if not facts["fault"] and codes[1]:
        facts["fault"] = f"the second start: exit status {codes[1]}: {second[-600:]}"
    if not facts["fault"] and "passed over" in second:
        facts["fault"] = "a checkpoint was not whole"
    if not facts["fault"] and digest != expected["digest"]:
        facts["fault"] = "other weights than the undisturbed run's"
    return facts


def undisturbed(data: Path, out: Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    code, words = runs.run(runs.command(data, out / "run", STEPS), out / "run.log", moment=runs.Moment(str(out / "run")))
    if code:
        raise RuntimeError(words[-4000:])
    return {"digest": runs.final_digest(out / "run"), "operations": runs.operations(out / "run.log")}


def trials(data: Path, out: Path, count: int, seed: int, log: Path) -> list[dict]:
    about = {"driver": "storage", "seed": seed}
    found = done_lines(log, about)
    expected = undisturbed(data, out / "undisturbed")
    for number in range(len(found), count):
        # the two last kinds have no random moment: once in ten
        kind = KINDS[number % 3] if number % 10 < 8 else KINDS[number % 10 - 5]
        found.append(about | {"trial": number} | trial(kind, data, out / "trial", random.Random(f"{seed} {number}"), expected))
        remember(log, found[-1])
    return found


def main() -> None:
    options = runs.arguments(__doc__, 200)
    data = runs.make_shards(options.out / "data")
    began = time.monotonic()
    found = trials(data, options.out / "storage", options.count, options.seed, options.out / "storage.jsonl")
    faults = [line for line in found if line["fault"]]
    for line in faults:
        print(line, flush=True)
    possible = [line for line in found if "impossible" not in line]
    summarise(f"R13 storage, {len(possible)} trials", len(faults), "faults", kinds=dict(Counter(line["kind"] for line in possible)),
              outcomes={str(k): v for k, v in Counter(str(line.get("codes")) for line in possible).items()}, seconds=round(time.monotonic() - began))


if __name__ == "__main__":
    main()
