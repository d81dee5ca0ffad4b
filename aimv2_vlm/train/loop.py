"""The one training loop: any objective, any placement, exact continuation.

A step takes all its micro-batches first, adds the integer counts over processes once, and back-propagates
`world * sum_k weight_k * sum_k / count_k`, so that the gradient does not depend on how the batch is cut (design, decision 3).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from aimv2_vlm.config import EXIT_STOPPED, Loop, Optimizer, UserError
from aimv2_vlm.data.order import Added
from aimv2_vlm.train import checkpoint
from aimv2_vlm.train.directory import RunDirectory
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import MetricsLog, Progress, matrix_product_tflops, say
from aimv2_vlm.train.objectives import Batch, TrainingObjective
from aimv2_vlm.train.optim import Schedule

JUDGED_SAMPLES, FIRST_JUDGEMENT = 10_000, 1_000


class Stopped(Exception):
    """The run left early on purpose (signal or `train.stop_after`); everything is saved. An empty message: already told."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """SIGTERM and SIGINT ask for a checkpoint at the end of the step; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.name = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


@dataclass
class BadSamples:
    """Bad samples met while training: named, counted by reason, judged over the last 10,000 (formats.md)."""

    max_fraction: float
    total: int = 0
    named: list[str] = field(default_factory=list)
    window: deque = field(default_factory=deque)  # (samples, bad) of each recent step
    seen: int = 0

    def add(self, samples: int, bad: int, names: list[str]) -> None:
        self.total += bad
        self.named += names[: max(0, 1000 - len(self.named))]
        self.seen += samples
        self.window.append((samples, bad))
        while sum(s for s, _ in self.window) - self.window[0][0] >= JUDGED_SAMPLES:
            self.window.popleft()

    def check(self, ended: bool = False) -> None:
        """Raises UserError where too many are bad; of a run that has `ended` also where every one is, however few they were."""
        if ended and self.total == self.seen > 0:
            raise UserError(f"data: every one of the {self.seen} samples of this run is bad, so nothing was learned (latest: "
                            f"{self.named[-1] if self.named else 'unnamed'}); see data_report.json, mend the data and begin anew with --restart")
        judged, bad = sum(s for s, _ in self.window), sum(b for _, b in self.window)
        if self.seen >= FIRST_JUDGEMENT and bad > self.max_fraction * judged:
            raise UserError(
                f"data: {bad} of the last {judged} samples are bad, above max_bad_fraction {self.max_fraction:g} "
                f"(latest: {self.named[-1] if self.named else 'unnamed'}); see data_report.json, mend the data or raise data.max_bad_fraction"
            )

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "named": self.named, "window": [list(w) for w in self.window], "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.named, self.seen = state["total"], list(state["named"]), state["seen"]
        self.window = deque((s, b) for s, b in state["window"])


class StepDataset(Dataset):
    """Item `step` = this process's micro-batches of that step; how many workers fetch them changes nothing. `order_begins`: the step that takes the
    first samples.

    A string instead: what cannot be read any more (an exception would come out of a worker with its traceback as text).
    """

    def __init__(self, micro_batches: Callable[[int], list[Batch]], num_steps: int, order_begins: int = 0):
        self.micro_batches, self.num_steps, self.order_begins = micro_batches, num_steps, order_begins

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> list[Batch] | str:
        try:
            return self.micro_batches(step - self.order_begins)
        except (UserError, OSError) as error:
            return str(error) or repr(error)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


PREFETCHED = 2  # steps a worker


def check_shared_memory(step_bytes: int, num_workers: int) -> None:
    """Refuses workers whose finished steps (`step_bytes` each on this process) do not fit into /dev/shm, through which they come; a worker that
    finds it full dies of a bus error. Raises UserError."""
    shared = Path("/dev/shm")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_workers and shared.is_dir() and (needed := step_bytes * num_workers * PREFETCHED * processes) > (free := shutil.disk_usage(shared).free):
        raise UserError(f"train.num_workers: {num_workers} workers{f' of each of {processes} processes' * (processes > 1)} keep up to {num_workers * PREFETCHED} steps of "
                        f"{step_bytes / 2**20:,.0f} MiB in /dev/shm, {needed / 2**30:.1f} GiB in all, and {free / 2**30:.1f} are free there; take fewer workers, or give "
                        f"the container more (--shm-size={math.ceil(1.2 * needed / 2**30)}g)")


def fetch_steps(dataset: StepDataset, start: int, num_workers: int) -> Iterator[list[Batch] | str]:
    loader = DataLoader(dataset, batch_size=None, sampler=range(start, len(dataset)), num_workers=num_workers,
                        prefetch_factor=PREFETCHED if num_workers else None, worker_init_fn=_start_worker, pin_memory=torch.cuda.is_available())
    yield from loader


def global_slice(step: int, batch_size: int, rank: int, world: int) -> range:
    """Positions of process `rank` in `step`: contiguous, so that every world size reads the same global batch."""
    share = batch_size // world
    first = step * batch_size + rank * share
    return range(first, first + share)


def check_batch(optim: Optimizer, placement: Placement) -> None:
    """Refuses a batch that the processes cannot share; a micro-batch size of 0 becomes a process's share."""
    optim.micro_batch_size = optim.micro_batch_size or optim.batch_size // placement.world
    if optim.batch_size % placement.world:
        raise UserError(f"optim.batch_size: {optim.batch_size} is not a multiple of {placement.world} processes")


def weighted_loss(objective: TrainingObjective, sums: dict[str, Any], counts: dict[str, int]) -> Any:
    return sum(weight * sums[term] / max(1, counts[term]) for term, weight in objective.weights.items())


def run_step(
    objective: TrainingObjective, model: torch.nn.Module, optimizer: torch.optim.Optimizer, micro_batches: list[Batch],
    counts: dict[str, int], placement: Placement, clip: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One optimizer step. counts: of the whole global batch. Returns this process's sums and the gradient norm."""
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches):
        with placement.accumulate(model, last=i == len(micro_batches) - 1):
            with placement.autocast():
                sums = objective.sums(model, batch, placement.device)
            placement.backward(model, placement.world * weighted_loss(objective, sums, counts))
        for term, value in sums.items():
            totals[term] = totals.get(term, 0) + value.detach().float()
    return totals, placement.step(model, optimizer, clip)


def add_counts(objective: TrainingObjective, batches: Iterable[Batch]) -> dict[str, int]:
    total: Counter[str] = Counter(dict.fromkeys(("samples", "tokens", "bad", "truncated", *objective.weights), 0))
    for batch in batches:
        total.update(objective.counts(batch))
        total["bad"] += len(batch["bad"])
        total["truncated"] += batch.get("num_truncated", 0)
    return dict(total)


def losses(objective: TrainingObjective, sums: dict[str, torch.Tensor], counts: dict[str, int], placement: Placement) -> dict[str, float]:
    """Mean of every term over all processes, and `loss`; one transfer to the host."""
    names = sorted(sums)
    values = placement.sum_tensor(torch.stack([sums[n].double() for n in names])).tolist()
    means = {n: v / max(1, counts[objective.logged.get(n, n)]) for n, v in zip(names, values, strict=True)}
    total = sum(weight * means[term] for term, weight in objective.weights.items())
    return {"loss": total} | ({f"{n}_loss": means[n] for n in names} if len(names) > 1 else {})


@torch.no_grad()
def validate(objective: TrainingObjective, model: torch.nn.Module, batches: Iterable[Batch], placement: Placement) -> dict[str, float]:
    """Held-out losses under the names `val_<term>_loss`; model and batches as in training, no gradients."""
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(add_counts(objective, [batch]))
        with placement.autocast():
            for term, value in objective.sums(model, batch, placement.device).items():
                sums[term] = sums.get(term, 0) + value.float()
    model.train()
    return {f"val_{k}": v for k, v in losses(objective, sums, placement.sum_counts(dict(counts)), placement).items()}


def train(
    *, directory: RunDirectory, placement: Placement, objective: TrainingObjective, model: torch.nn.Module,
    optimizer: torch.optim.Optimizer, micro_batches: Callable[[int], list[Batch]], schedule: Schedule, loop: Loop,
    fingerprint: dict[str, Any], compare: Callable[[dict[str, Any], dict[str, Any]], list[str]], changed: str = "refuse",
    max_bad_fraction: float = 0.01, report: dict[str, Any] | None = None,
    validation: Callable[[], dict[str, float]] | None = None, what: str = "training", dropout_seed: int | None = None,
) -> None:
    """Train from the newest complete checkpoint (or the start, or the checkpoint that a cooldown begins at) to the schedule's end.

    micro_batches(step) gives this process's micro-batches. changed: what to do where `compare(its fingerprint, fingerprint)` says that the data are not
    those of the checkpoint: `refuse`; `append`: go on at the position reached, in the order of the new data, which must hold the old ones as they were;
    `restart`: go on at the first position of whatever the data are now. dropout_seed: of a model with dropout, whose draws become a function of it, the
    step and the process (so that no generator's state has to be kept). Raises Stopped after a signal or `loop.stop_after` (a checkpoint exists),
    UserError when data changed since the checkpoint or too many samples are bad.
    """
    bad = BadSamples(max_bad_fraction)
    step, samples, tokens, truncated, order_begins = 0, 0, 0, 0, 0
    optim, end = schedule.optim, schedule.steps
    found = checkpoint.newest(directory.checkpoints, placement)
    if found is None and optim.cooldown.checkpoint is not None:
        found = checkpoint.at(Path(optim.cooldown.checkpoint))
    if found is not None:
        path, state = found
        differences = compare(state["fingerprint"], fingerprint)
        refused = {"refuse": differences, "append": [change for change in differences if not isinstance(change, Added)], "restart": []}[changed]
        if refused:
            raise UserError(f"{path}: the data changed since this checkpoint ({'; '.join(refused)}); bring the old data back, or begin anew with --restart "
                            "(pre-training also takes data.changed=append where shards were only added, and data.changed=restart)")
        tensors = placement.state_tensors(model, optimizer)
        checkpoint.load(path, tensors, placement)
        placement.after_load(model, optimizer, tensors)
        step, samples, tokens, truncated = state["step"], state["samples"], state["tokens"], state.get("truncated", 0)
        order_begins = step if differences and changed == "restart" else state.get("order_begins", 0)
        bad.restore(state["bad"])
        if step >= end:
            bad.check(ended=True)
        if placement.is_main:
            say(f"{what}: going on from step {step} ({path})")
            if differences:
                where = "at the first sample of the new data" if changed == "restart" else "in the new order of all samples, some of which were seen"
                say(f"{what}: the data changed ({'; '.join(differences)}); going on {where}")
    log = MetricsLog(directory.path, step, loop.trackers) if placement.is_main else None
    progress = Progress(what, end, step, placement.is_main)
    peak = (loop.peak_tflops or matrix_product_tflops(placement.device, placement.precision)) if placement.is_main else 0.0
    whole = placement.unwrap(model)

    def save(stopped: str = "", exit_code: int | None = None) -> None:
        # torchrun replaces exit codes, so the checkpoint carries it
        directory.write_json("data_report.json", {**(report or {}), "bad_samples_in_training": bad.total, "named": bad.named})
        content = {"samples": samples, "tokens": tokens, "truncated": truncated, "order_begins": order_begins, "fingerprint": fingerprint, "world": placement.world,
                   "bad": bad.state(), "stopped": stopped, "exit_code": exit_code}
        checkpoint.save(directory.checkpoints, step, placement.state_tensors(model, optimizer), content, placement, loop.keep_last, loop.keep_steps)

    def stopped(message: str, exit_code: int) -> Stopped:
        return Stopped(message if placement.is_main else "", exit_code)

    model.train()
    steps = fetch_steps(StepDataset(micro_batches, end, order_begins), step, loop.num_workers)
    saved_step = step
    last_time, last_samples, waited, operations = time.monotonic(), samples, 0.0, 0.0
    skipped = torch.zeros((), device=placement.device)  # steps whose gradient was not finite
    with StopSignals() as stop:
        def leave() -> None:
            if step > 0:  # a checkpoint of this very step only learns the reason
                save(stop.name or "signal", EXIT_STOPPED)
            raise stopped(f"{what}: stopped by {stop.name or 'a signal'} after step {step}; the same command goes on from there", EXIT_STOPPED)

        try:
            while step < end:
                before = time.monotonic()
                batches = next(steps)
                waited += time.monotonic() - before
                unreadable = batches if isinstance(batches, str) else ""
                asks = {"stop": int(bool(stop.name)), "unreadable": int(bool(unreadable))}
                counts = placement.sum_counts(add_counts(objective, [] if unreadable else batches) | asks)
                if counts["unreadable"]:
                    if step > 0:
                        save("data cannot be read")
                    raise UserError(unreadable or "data: another process cannot read its samples any more")
                if counts["stop"]:
                    leave()
                rate = schedule.learning_rate(step)
                for group in optimizer.param_groups:  # the points of a grid have a schedule each
                    group["lr"] = group["rates"](step) if "rates" in group else rate * group["lr_scale"]
                if dropout_seed is not None:
                    torch.manual_seed((dropout_seed * 1_000_003 + step) * placement.world + placement.rank)
                sums, norm = run_step(objective, model, optimizer, batches, counts, placement, optim.clip)
                skipped += ~torch.isfinite(norm)
                step, samples, tokens = step + 1, samples + counts["samples"], tokens + counts["tokens"]
                truncated += counts["truncated"]
                operations += sum(objective.flops(whole, batch) for batch in batches) if placement.is_main else 0.0
                names = placement.gather_strings([b for m in batches for b in m["bad"]]) if counts["bad"] else []
                bad.add(counts["samples"], counts["bad"], names)
                last = step == end
                if step % loop.log_every == 0 or last:
                    row = losses(objective, sums, counts, placement)
                    now = time.monotonic()
                    row |= {"lr": rate, "grad_norm": float(norm), "samples": samples, "tokens": tokens, "bad_samples": bad.total,
                            "samples_per_s": (samples - last_samples) / (now - last_time), "data_wait": waited / (now - last_time)}
                    speed = f"{row['samples_per_s']:.0f} samples/s"
                    if operations:  # of the main process, whose device is like the others'
                        row["tflops_per_s"] = operations / (now - last_time) / 1e12
                        row["share_of_peak"] = row["tflops_per_s"] / peak
                        speed += f", {row['tflops_per_s']:.3g} TFLOP/s = {row['share_of_peak']:.0%} of peak"
                    if truncated:
                        row["truncated"] = truncated  # captions or rows so far that lost their end
                    if row_skipped := int(skipped):
                        row["skipped_steps"] = row_skipped
                        speed += f", {row_skipped} steps skipped (gradient not finite)"
                    last_time, last_samples, waited, operations = now, samples, 0.0, 0.0
                    if log is not None:
                        log.write({"step": step} | row)
                    progress.update(step, f"loss {row['loss']:.3f}, {speed}")
                try:
                    bad.check(ended=last)
                except UserError:
                    save("too many bad samples")
                    raise
                if validation is not None and (step % loop.validate_every == 0 or last):
                    row = validation()
                    if log is not None:
                        log.write({"step": step} | row)
                if step % loop.save_every == 0 or last or step in loop.keep_steps:
                    save()
                    saved_step = step
                if loop.stop_after is not None and step >= loop.stop_after and not last:
                    if step > saved_step:
                        save("stop_after")
                    raise stopped(f"{what}: left after step {step} as train.stop_after says", 0)
            if placement.any(bool(stop.name)):  # during the last step
                leave()
        finally:
            progress.close()
            if log is not None:
                log.close()
