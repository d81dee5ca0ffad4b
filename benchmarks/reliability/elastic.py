"""R3: a run that goes on with another number of processes or workers reads the same samples and loses nothing.

    python benchmarks/reliability/elastic.py [--count 20] [--seed 0] [--out FOLDER]

1. By the order itself: for --count of the 20 ordered pairs of worlds {1, 2, 3, 4, 8} and as many seeded chains of several
   worlds, every process of every world reads its part of each step (through 0, 1 or 2 workers) from the real dataset. Key
   and checksum of every sample, in global order, must be those of one process; every epoch holds every sample once.
2. For real: the command line as 1, then 2, then 1 processes on one run directory, under DDP, FSDP2 and ZeRO-2. The samples
   that were trained on must be those of an undisturbed single process, and the 20 losses after each change must agree to
   2e-6 x max(1, loss).

Prints and appends to results/reliability.jsonl one line a part: `ours` is the number of faults.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.summary import done_lines, remember, summarise  # noqa: E402

WORLDS, STRATEGIES = (1, 2, 3, 4, 8), ("ddp", "fsdp2", "zero2")
BATCH = 24  # every world divides it, and 4 steps are an epoch of the 96 samples
TOLERANCE, AFTER = 2e-6, 20  # losses after a change
STEPS = 3 * AFTER // 2 + AFTER  # 10 alone, 20 as two, 20 alone
LEGS = ((1, AFTER // 2), (2, AFTER // 2 + AFTER), (1, None))  # (processes, step to leave after)

# ------------------------------------------------------------------------------------------------------- by the order itself


def chain(draw: random.Random, steps: int) -> list[tuple[int, int, int]]:
    """(world, workers, first step) of each leg: three to six worlds, no two alike in a row."""
    worlds = [draw.choice(WORLDS)]
    while len(worlds) < draw.randint(3, 6):
        worlds.append(draw.choice([world for world in WORLDS if world != worlds[-1]]))
    starts = [0, *sorted(draw.sample(range(1, steps), len(worlds) - 1))]
    return [(world, draw.randrange(3), start) for world, start in zip(worlds, starts, strict=True)]


def read_chains(data: str, out: str, chains: list[list[tuple[int, int, int]]], steps: int, result: str) -> None:
    """In a forked process: faults of each chain into the file `result`, as JSON."""
    from aimv2_vlm.recipe import load_recipe
    from aimv2_vlm.train import run
    from aimv2_vlm.train.distributed import Placement
    from aimv2_vlm.train.loop import StepDataset, fetch_steps

    words = runs.command(Path(data), Path(out), steps, f"optim.batch_size={BATCH}")[2:]
    recipe = load_recipe("pretrain", "demo_scenes", words)
    placement = Placement("single", "fp32")
    directory = run.open_run(recipe, placement, False)
    _, pairs, _ = run.pair_data(recipe, directory, placement)
    directory.close()

    def read(world: int, workers: int, first: int, last: int) -> list[list[str]]:
        """Samples of steps `first` to `last`, the processes' parts in rank order."""
        parts = []
        for rank in range(world):
            micro_batches = run.PairSteps(recipe, pairs, SimpleNamespace(rank=rank, world=world))
            steps_of = fetch_steps(StepDataset(micro_batches, last), first, workers if last - first > 1 else 0)
            parts.append([sum(map(runs.names_of, batches), []) for batches in steps_of])
        return [sum(step, []) for step in zip(*parts, strict=True)]

    expected = read(1, 0, 0, steps)
    epoch = pairs.epoch_positions
    flat = [name for step in expected for name in step]
    faults = []
    for start in range(0, len(flat) - epoch + 1, epoch):
        keys = Counter(name.split()[0] for name in flat[start : start + epoch])
        if len(keys) != pairs.num_samples or max(keys.values()) > 1:
            faults.append(f"epoch at {start}: {pairs.num_samples - len(keys)} missing, {sum(keys.values()) - len(keys)} repeated")
    answers = []
    for legs in chains:
        ends = [start for _, _, start in legs[1:]] + [steps]
        found = [step for (world, workers, start), end in zip(legs, ends, strict=True) for step in read(world, workers, start, end)]
        answers.append("; ".join(faults) if faults else "" if found == expected else "another order than one process's")
    Path(result).write_text(json.dumps(answers), encoding="utf-8")


def order_trials(data: Path, out: Path, count: int, seed: int, steps: int, log: Path) -> list[dict]:
    about = {"driver": "elastic order", "seed": seed}
    found = done_lines(log, about)
    pairs = list(itertools.permutations(WORLDS, 2))
    random.Random(seed).shuffle(pairs)
    chains = []
    for number, (one, two) in enumerate(pairs[:count]):
        draw = random.Random(f"{seed} {number}")
        chains += [[(one, draw.randrange(3), 0), (two, draw.randrange(3), draw.randrange(1, steps))], chain(draw, steps)]
    known = [line["chain"] for line in found]
    chains = [legs for legs in chains if [list(leg) for leg in legs] not in known]
    for start in range(0, len(chains), 4):
        some = chains[start : start + 4]
        answers = out / "answers.json"
        out.mkdir(parents=True, exist_ok=True)
        answers.unlink(missing_ok=True)
        process = runs.Run([], out / "order.log", instead=(read_chains, str(data), str(out / "order"), some, steps, str(answers)))
        code = process.wait()
        if code:
            raise RuntimeError(process.words()[-4000:])
        for legs, fault in zip(some, json.loads(answers.read_text()), strict=True):
            found.append(about | {"chain": [list(leg) for leg in legs], "fault": fault})
            remember(log, found[-1])
    return found


# --------------------------------------------------------------------------------------------------------------- for real


def launched(words: list[str], out: Path, world: int, order: str) -> list[str]:
    """The command as `world` processes; what went wrong, process by process."""
    with tempfile.TemporaryDirectory() as folder:
        places = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GLOO_SOCKET_IFNAME": "lo",
                   "AIMV2_VLM_RENDEZVOUS": f"{folder}/rendezvous"} if world > 1 else {} for rank in range(world)]
        processes = [runs.Run(words, out / f"{order}_{rank}.log", order=out / f"{order}_{rank}",
                              environment={key: str(value) for key, value in place.items()}) for rank, place in enumerate(places)]
        return [f"process {rank}: {process.words()[-600:]}" for rank, process in enumerate(processes) if process.wait()]


def undisturbed(data: Path, out: Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if problems := launched(real_words(data, out / "run", "single"), out, 1, "order"):
        raise RuntimeError(problems[0])
    return {"order": runs.recorded_order(out / "order_0"), "losses": losses(out / "run")}


def losses(out: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in ("loss", "text_loss", "pixel_loss")} for row in runs.rows(out) if "loss" in row]


def real_words(data: Path, out: Path, strategy: str, *more: str) -> list[str]:
    return runs.command(data, out, STEPS, f"optim.batch_size={BATCH}", "train.save_every=1000", f"train.strategy={strategy}", *more)


def real_trial(data: Path, out: Path, strategy: str, expected: dict) -> dict:
    """1 -> 2 -> 1 processes; the largest deviation of a loss, and what is wrong."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    order = []
    for leg, (world, stop) in enumerate(LEGS):
        more = [f"train.stop_after={stop}"] if stop else []
        problems = launched(real_words(data, out / "run", strategy if world > 1 else "single", *more), out, world, f"order{leg}")
        if problems:
            return {"strategy": strategy, "fault": "; ".join(problems)}
        order += runs.recorded_order(*(out / f"order{leg}_{rank}" for rank in range(world)))
    found = losses(out / "run")
    if len(found) != STEPS or order != expected["order"]:
        return {"strategy": strategy, "fault": f"other samples, or steps: {len(found)}, {len(order)}"}
    deviation = max(abs(row[name] - wanted[name]) / max(1.0, abs(wanted[name]))
                    for row, wanted in zip(found, expected["losses"], strict=True) for name in wanted)
    fault = "" if deviation <= TOLERANCE else f"a loss deviates by {deviation:.2g}"
    return {"strategy": strategy, "deviation": deviation, "fault": fault}


def main() -> None:
    options = runs.arguments(__doc__, 20)
    data, log = runs.make_shards(options.out / "data"), options.out / "elastic.jsonl"
    began = time.monotonic()
    found = order_trials(data, options.out / "elastic", options.count, options.seed, 12, log)
    faults = [line for line in found if line["fault"]]
    summarise(f"R3 order of {len(found)} pairs and chains of worlds", len(faults), "faults", pairs=sum(len(line["chain"]) == 2 for line in found),
              worlds=WORLDS, workers=[0, 1, 2], seconds=round(time.monotonic() - began))
    expected = undisturbed(data, options.out / "elastic" / "undisturbed")
    for strategy in STRATEGIES:
        began = time.monotonic()
        facts = real_trial(data, options.out / "elastic" / strategy, strategy, expected)
        remember(log, {"driver": "elastic", "seed": options.seed} | facts)
        faults += [facts] if facts["fault"] else []
        summarise(f"R3 1 -> 2 -> 1 processes, {strategy}", int(bool(facts["fault"])), "faults", deviation=facts.get("deviation"),
                  tolerance=TOLERANCE, losses_after_each_change=AFTER, seconds=round(time.monotonic() - began))
    for line in faults:
        print(line, flush=True)


if __name__ == "__main__":
    main()
