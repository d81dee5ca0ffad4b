"""R12: kill -9 at random moments, alone or as one of two processes, leaves the ledger of an undisturbed sweep; every exception is counted.

    python benchmarks/reliability/sweep_kill.py [--count 20] [--seed 0] [--out FOLDER]

A sweep (two random assistants, one of them with tiles, on the embedded benchmarks with both controls, through the real lmms-eval code, units of 8
questions) runs in processes forked from a warm parent, one and two in turn. One process is killed at a random time; a sweep that nobody is left to
finish is started again with the same config, until it is finished. Then `ledger.jsonl` (but for `seconds`), every file of samples and `failed.jsonl`
must equal those of an undisturbed sweep by one process, and a new one begins. In every sweep the questions of some pictures and some questions by
themselves raise: each of them must be a counted error, and none an answer. Prints and appends to results/reliability.jsonl one line: `ours` is the
number of faults.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability.summary import argument_parser, summarise

_server = multiprocessing.get_context("forkserver")
IMPORTED = ["aimv2_vlm.evaluation.lmms_model", "aimv2_vlm.evaluation.sweep", "lmms_eval.evaluator", "lmms_eval.tasks",
            "transformers.models.llava.modeling_llava", "transformers.models.llava_next.modeling_llava_next",
            "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.models.aimv2.modeling_aimv2", "datasets", "pyarrow.parquet"]


def raises(prompt: str) -> bool:
    """Which questions raise by themselves."""
    return zlib.crc32(prompt.split("\n")[0].encode()) % 11 == 0


def unreadable(picture_id: str) -> bool:
    """Which pictures are cut off in their middle."""
    return zlib.crc32(picture_id.encode()) % 7 == 0


def make_world(root: Path) -> dict:
    """Benchmarks with some unreadable pictures, two random assistants, and the keys of a sweep over them."""
    import pyarrow
    import pyarrow.parquet
    import torch

    from aimv2_vlm.data import scenes
    from aimv2_vlm.data.chat import train_chat_tokenizer
    from aimv2_vlm.models.assistant import build_assistant
    from aimv2_vlm.models.encoder import build_encoder

    scenes.write_benchmarks(root / "benchmarks", "dev", 8, workers=1)
    for file in sorted((root / "benchmarks").glob("*/data/*.parquet")):
        table = pyarrow.parquet.read_table(file)
        images, ids = table.column("image").to_pylist(), table.column("picture_id").to_pylist()
        halves = [image | {"bytes": image["bytes"][: len(image["bytes"]) // 2]} for image in images]
        broken = [half if unreadable(name) else image for name, image, half in zip(ids, images, halves, strict=True)]
        at = table.column_names.index("image")
        pyarrow.parquet.write_table(table.set_column(at, table.schema.field("image"), pyarrow.array(broken, table.schema.field("image").type)), file)
    train_chat_tokenizer(["What is shown? a red circle 12"] * 10, root / "tokenizer", 400)
    for tiling in ("1x1", "2x2"):
        torch.manual_seed(0)
        encoder = build_encoder(image_size=28, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
        llm = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model, processor = build_assistant(encoder, None, tiling, tokenizer=str(root / "tokenizer"), llm_config=llm, max_new_tokens=6,
                                           image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])  # fmt: skip
        model.save_pretrained(root / tiling)
        processor.save_pretrained(root / tiling)
    names = sorted(path.parent.name for path in (root / "benchmarks").glob("*/data"))
    return {"benchmark_root": str(root / "benchmarks"), "benchmarks": names[:2], "models": [str(root / "1x1"), str(root / "2x2")]}


def one_sweep(world: dict, out: str) -> None:
    """What each process runs."""
    import torch

    from aimv2_vlm.config import EvalConfig, EvalModel
    from aimv2_vlm.evaluation.generation import Generator
    from aimv2_vlm.evaluation.sweep import run_sweep

    torch.set_num_threads(1)
    stock = Generator._expanded_ids

    def raising(self, question, features):
        if raises(question.prompt):
            raise RuntimeError("injected")
        return stock(self, question, features)

    Generator._expanded_ids = raising
    log = open(f"{out}.log", "a", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    models = [EvalModel(path) for path in world["models"]]
    config = EvalConfig(out=out, precision="fp32", benchmark_root=world["benchmark_root"], benchmarks=world["benchmarks"], models=models,
                        max_new_tokens=5, unit=8, checked=4, batch_size=4)  # fmt: skip
    sys.exit(run_sweep(config))


def start(world: dict, out: Path) -> multiprocessing.Process:
    process = _server.Process(target=one_sweep, args=(world, str(out)))
    process.start()
    return process


def result(out: Path) -> dict[str, bytes]:
    """All that a finished sweep leaves, with the seconds taken out of the ledger."""
    rows = [{**json.loads(line), "seconds": 0} for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("samples/*"))}
    leftovers = {path.name: b"" for path in out.iterdir()}
    return {"ledger": json.dumps(rows).encode(), "failed": (out / "failed.jsonl").read_bytes(), **files, **leftovers}


def uncounted(out: Path) -> list[str]:
    """Questions that raised and are no counted error, and errors that nothing raised."""
    wrong = []
    for row in map(json.loads, (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()):
        samples = [json.loads(line) for line in (out / row["samples"]).read_text(encoding="utf-8").splitlines()]
        failed = [sample for sample in samples if sample["error"]]
        if len(failed) != row["num_errors"] or any(sample["prediction"] is not None or sample["score"] is not None for sample in failed):
            wrong.append(f"{row['samples']}: {len(failed)} errors, {row['num_errors']} counted")
        for sample in samples:
            expected = raises(sample["question"]) or (sample["shown_picture_id"] is not None and unreadable(sample["shown_picture_id"]))
            if expected != (sample["error"] is not None) or expected != (sample["prediction"] is None):
                wrong.append(f"{row['samples']}, {sample['id']}: {sample['error']}, answer {sample['prediction']!r}")
    return wrong


def kills(world: dict, root: Path, count: int, seed: int) -> dict:
    draw = random.Random(seed)
    for name in ("first", "undisturbed"):  # the first time reads and imports
        began = time.monotonic()
        process = start(world, root / name)
        process.join()
    seconds = time.monotonic() - began
    expected, faults = result(root / "undisturbed"), uncounted(root / "undisturbed")
    done, finished, by_processes, number = 0, 0, {1: 0, 2: 0}, 0
    while done < count or (root / f"run_{number}").exists():
        out, num_processes = root / f"run_{number}", 1 + number % 2
        processes = [start(world, out) for _ in range(num_processes if done < count else 1)]
        if done < count:
            time.sleep(draw.uniform(0, seconds))
            if processes[0].is_alive():
                os.kill(processes[0].pid, signal.SIGKILL)
                done += 1
                by_processes[num_processes] += 1
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(code not in (1, -signal.SIGKILL) for code in codes):  # 1: finished, with counted errors
            faults.append(f"exit status {codes}: {Path(f'{out}.log').read_text(encoding='utf-8')[-500:]}")
        if 1 in codes or any(code not in (1, -signal.SIGKILL) for code in codes):
            finished += 1
            found = result(out)
            faults += [f"run {number}: {name} differs" for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
            shutil.rmtree(out)
            number += 1
    rows = json.loads(expected["ledger"])
    return {"faults": faults, "kills": done, "kills_by_processes": by_processes, "finished": finished, "seconds": round(time.monotonic() - began),
            "cells": len(rows), "errors_counted": sum(row["num_errors"] for row in rows), "flips": sum(row["flips"] for row in rows)}


def main() -> None:
    parser: argparse.ArgumentParser = argument_parser(__doc__, 20, "kills")
    parser.add_argument("--out", type=Path, default=None, help="folder to work in (default: a temporary one)")
    options = parser.parse_args()
    _server.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.out or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        found = kills(make_world(root), root, options.count, options.seed)
    for fault in found["faults"]:
        print(fault, flush=True)
    summarise(f"R12 sweeps, {found['kills']} kills", len(found["faults"]), "faults", **{key: value for key, value in found.items() if key != "faults"})


if __name__ == "__main__":
    main()
