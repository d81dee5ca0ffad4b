"""Batches that differ from process to process, and a process that dies: a run finishes, or ends with an error within 30 s. It never hangs.

    python benchmarks/reliability/uneven.py [--processes 4] [--strategies ddp fsdp2 zero2 zero3] --work FOLDER

Conversations are drawn so that within a step some processes get text only, some several pictures, some rows of a few tokens and some that are cut at the
longest length; a step holds as many rows as processes, so some get one row and some, after sharing by length, none. Every strategy tunes on them through
torchrun; the losses are those of a single process. Then one process of a run is killed (-9) at three moments under torchrun and under `--processes`: how long until
the command has ended, and that the same command then finishes. A result line goes to benchmarks/results/reliability.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ROWS, STEPS, LIMIT_S = 64, 8, 30.0
TOLERANCE = 2e-6  # of losses, times max(1, loss)


def write_conversations(folder: Path) -> None:
    """Text-only rows, rows with one and three pictures, rows of two words and of far more than the longest length, empty answers."""
    from aimv2_vlm.data import scenes

    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    rows = []
    for number in range(ROWS):
        kind = ("text", "short", "long", "pictures", "picture")[number % 5]
        images = [f"{number}_{i}.jpg" for i in range({"picture": 1, "pictures": 3, "short": 1}.get(kind, 0))]
        for i, name in enumerate(images):
            (folder / "images" / name).write_bytes(scenes.encode_jpeg(scenes.render(scenes.make_scene("train", 10 * number + i, "scene"))))
        words = {"text": 30, "short": 1, "long": 400, "pictures": 8, "picture": 20}[kind]
        turns = [{"from": "human", "value": "<image>" * len(images) + "What is it?"}, {"from": "gpt", "value": " ".join(generator.choices(["red", "blue", "seven", "word"], k=words))}]
        if kind == "long":
            turns = [{"from": "human", "value": "Say more."}, {"from": "gpt", "value": "red blue"}] + turns
        rows.append({"id": number, "image": images} | {"conversations": turns})
    rows.append({"id": "empty", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]})
    (folder / "conversations.json").write_text(json.dumps(rows), encoding="utf-8")


def words(data: Path, encoder: Path, out: Path, processes: int, strategy: str, steps: int) -> list[str]:
    from conftest import TINY_TUNING

    return ["sft", "demo_scenes_1x1", f"data_root={data}", f"encoder.path={encoder}", f"data.sources=[{{path: {data}/conversations.json, images: {data}/images}}]",
            f"out={out}", *TINY_TUNING, f"optim.batch_size={processes}", "optim.micro_batch_size=1", f"optim.steps={steps}", "data.max_length=160",
            "data.max_bad_fraction=0.1", "encoder.cache=off", f"train.strategy={strategy}"]


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "aimv2_vlm"]


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def finish(command: list[str], log: Path) -> str:
    """What went wrong, or nothing."""
    try:
        status = start(command, log).wait(900)
    except subprocess.TimeoutExpired:
        return f"hung: {log}"
    return f"exit status {status}: {log.read_text()[-600:]}" if status else ""


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def workers(process: int) -> list[int]:
    """Processes below `process` that train: those that run this package."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False).stdout.split()
    found = []
    for child in map(int, children):
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        found += [child] if b"aimv2_vlm" in line and b"torch.distributed.run" not in line else workers(child)
    return found


def kill_one(command: list[str], out: Path, log: Path, at_step: int, processes: int) -> tuple[float, str]:
    """(seconds until the command ended after one of its processes was killed, what was wrong)."""
    launched = start(command, log)
    while launched.poll() is None and not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").exists() and len(losses(out)) < at_step:
        if launched.poll() is not None:
            return 0.0, f"ended before step {at_step}: {log.read_text()[-600:]}"
        time.sleep(0.02)
    alive = workers(launched.pid)
    if len(alive) != processes:
        launched.kill()
        return 0.0, f"{len(alive)} processes found, not {processes}"
    os.kill(alive[-1], signal.SIGKILL)
    begun = time.monotonic()
    try:
        status = launched.wait(120)
    except subprocess.TimeoutExpired:
        launched.kill()
        return 120.0, f"still running 120 s after a process died: {log}"
    return time.monotonic() - begun, "" if status else "exit status 0 although a process died"


def main() -> None:
    from benchmarks.reliability.summary import launched_parser, summarise

    arguments = launched_parser(__doc__).parse_args()
    from conftest import TINY_PRETRAINING

    from aimv2_vlm.data import scenes

    work, count = arguments.work, arguments.processes
    data, encoder = work / "data", work / "encoder"
    if not (data / "conversations.json").exists():
        scenes.write_pretraining_shards(data / "shards", "train", 32, samples_per_shard=32, workers=1)
        scenes.write_pretraining_shards(data / "held_out", "dev", 8, workers=1)
        write_conversations(data)
    pretrain = [sys.executable, "-m", "aimv2_vlm", "pretrain", "demo_scenes", f"data_root={data}", f"out={encoder}", *TINY_PRETRAINING, "optim.steps=3"]
    faults = [fault for fault in [finish(pretrain, work / "encoder.log")] if fault]
    single = work / "single"
    faults += filter(None, [finish([sys.executable, "-m", "aimv2_vlm", *words(data, encoder / "final", single, count, "single", STEPS)], work / "single.log")])
    wanted, gaps, seconds = losses(single), {}, {}
    for strategy in arguments.strategies:
        out = work / strategy
        if fault := finish([*torchrun(count), *words(data, encoder / "final", out, count, strategy, STEPS)], work / f"{strategy}.log"):
            faults.append(f"{strategy}: {fault}")
            continue
        found = losses(out)
        gaps[strategy] = max(abs(a - b) / max(1.0, b) for a, b in zip(found, wanted, strict=True))
        if gaps[strategy] > TOLERANCE:
            faults.append(f"{strategy}: losses are {gaps[strategy]:.1e} from those of one process")
    for launcher, command in (("torchrun", torchrun(count)), ("--processes", [sys.executable, "-m", "aimv2_vlm"])):
        for at_step in (1, 3, 6):
            out = work / f"killed_{launcher.strip('-')}_{at_step}"
            run = [*command, *words(data, encoder / "final", out, count, "ddp", 12), *([] if launcher == "torchrun" else ["--processes", str(count)])]
            log = work / f"{out.name}.log"
            took, fault = kill_one(run, out, log, at_step, count)
            seconds[f"{launcher}, step {at_step}"] = round(took, 1)
            if not fault and took > LIMIT_S:
                fault = f"ended {took:.0f} s after a process died"
            fault = fault or finish(run, log)
            if fault:
                faults.append(f"{launcher}, killed at step {at_step}: {fault}")
    summarise("R11 uneven batches, and a process that dies", len(faults), "faults", processes=count, strategies=arguments.strategies,
              largest_loss_difference={name: float(f"{gap:.1e}") for name, gap in gaps.items()}, seconds_to_end=seconds, first_faults=faults[:3])
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
