"""A grid of 14 probes (Table A2: seven learning rates, two weight decays) trained at once against 14 separate runs; same pictures, same losses.

    python benchmarks/probe_grid.py [--rounds 7] [--batch 64]

A round is one step of every point: the grid reads, decodes, augments and encodes its batch once; the peer is the project's own single probe
14 times, each run reading its batch for itself as 14 commands would. The frozen encoder is 192 wide, 6 layers, 112 px (64 patches); JPEGs of
250 x 200, 101 classes, the paper's augmentation. CPU seconds of the one process: both sides do all their work in it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import interleaved, record

from aimv2_vlm.config import ProbeAugmentation, ProbeRecipe
from aimv2_vlm.data.labelled import LabelledDataset, Picture, training_transform
from aimv2_vlm.data.transforms import EvalTransform
from aimv2_vlm.evaluation.probing import LEARNING_RATES, WEIGHT_DECAYS
from aimv2_vlm.models.backbone import Backbone
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.models.probe import AttentiveProbe
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.grid import GridAdamW, grid_points
from aimv2_vlm.train.loop import add_counts, global_slice, run_step
from aimv2_vlm.train.objectives import ProbeObjective
from aimv2_vlm.train.optim import learning_rate
from aimv2_vlm.train.run import make_optimizer, seeded

SIZE, CLASSES, MEAN, STD = 112, 101, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make_pictures(count: int) -> list[Picture]:
    """JPEGs with broad and fine structure; the class is drawn."""
    draws, pictures = np.random.default_rng(0), []
    for number in range(count):
        broad = np.asarray(Image.fromarray(draws.integers(0, 256, (7, 8, 3), dtype=np.uint8)).resize((250, 200), Image.Resampling.BICUBIC), float)
        file = io.BytesIO()
        Image.fromarray(np.clip(broad + draws.normal(0, 12, broad.shape), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(Picture(str(number), f"{draws.integers(CLASSES):03d}", file.getvalue(), f"{number:064x}"))
    return pictures


class Side:
    """One run: a probe, or a grid of them at once."""

    def __init__(self, data: LabelledDataset, backbone: Backbone, optims: list[Any], batch: int, at_once: bool):
        self.data, self.optims, self.batch, self.placement = data, optims, batch, Placement("single", "fp32")
        self.model = seeded(0, lambda: AttentiveProbe(backbone, CLASSES, batch, len(optims) if at_once else None))
        self.objective = ProbeObjective(14, MEAN, STD, [str(i) for i in range(len(optims))] if at_once else [])
        if at_once:
            self.optimizer = GridAdamW([p for p in self.model.parameters() if p.requires_grad], optims)
        else:
            self.placement.is_main = False  # no line for each of 14 optimizers
            self.optimizer = make_optimizer(self.model, optim=optims[0], placement=self.placement)

    def step(self, number: int) -> list[float]:
        """Loss of every point."""
        batch = self.data.microbatch(global_slice(number, self.batch, 0, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rates"](number) if "rates" in group else learning_rate(number, self.optims[0])
        counts = add_counts(self.objective, [batch])
        sums, _ = run_step(self.objective, self.model, self.optimizer, [batch], counts, self.placement, self.optims[0].clip)
        return [float(sums[name]) / counts["classification"] for name in self.objective.points or ["classification"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    optim = ProbeRecipe().optim
    optim.batch_size, optim.steps = arguments.batch, arguments.rounds + 2
    optims = grid_points(optim, list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS)))
    encoder = seeded(1, lambda: build_encoder(image_size=SIZE, hidden_size=192, intermediate_size=512, num_layers=6, num_heads=3))
    backbone = Backbone("aimv2", encoder).eval()
    data = LabelledDataset(make_pictures(4 * arguments.batch), [f"{c:03d}" for c in range(CLASSES)], 0, EvalTransform(SIZE),
                           training_transform(ProbeAugmentation(), SIZE, MEAN))
    grid, separate = Side(data, backbone, optims, arguments.batch, True), [Side(data, backbone, [one], arguments.batch, False) for one in optims]
    losses: dict[str, list[list[float]]] = {"ours": [], "peer": []}
    times = interleaved({"ours": lambda number: losses["ours"].append(grid.step(number)),
                         "peer": lambda number: losses["peer"].append([run.step(number)[0] for run in separate])}, [(n,) for n in range(optim.steps)],
                        time.process_time)
    pairs = zip(sum(losses["ours"], []), sum(losses["peer"], []), strict=True)
    gap = max(abs(a - b) / max(1.0, b) for a, b in pairs)
    apart = 0.0  # of the trained weights, relative norm per tensor
    for number, run in enumerate(separate):
        ours, theirs = grid.model.probe_state(number), run.model.probe_state()
        apart = max(apart, *(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in theirs))
    seconds = {side: statistics.median(values[2:]) for side, values in times.items()}  # the first two warm up
    record("probe_grid", {
        "name": f"probe grid of {len(optims)}, batch {arguments.batch}", "ours": round(seconds["ours"], 4), "peer": round(seconds["peer"], 4),
        "ratio": round(seconds["peer"] / seconds["ours"], 2), "unit": "CPU s for a step of every point", "equal": gap <= 2e-6 and apart <= 1e-5,
        "largest_relative_loss_difference": gap, "largest_relative_weight_difference": apart, "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
    })


if __name__ == "__main__":
    main()
