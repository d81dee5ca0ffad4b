"""Probes of several encoders on labelled pictures through `aimv2-vlm eval`, their ledger rows and paired differences recorded.

    python benchmarks/recognition.py --out runs/recognition --data DATA/recognition/clothing --test val --encoders photos=RUN/final

Beside each encoder one of the same sizes with random weights (Apple's initialisation) is probed the same way; both get the mean and std of the
trained one's processor. The difference is bootstrapped over test pictures. Features are cached (no augmentation): short work for a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from record import record

from aimv2_vlm.cli import main as aimv2_vlm
from aimv2_vlm.evaluation.metrics import paired_difference
from aimv2_vlm.models.encoder import initialize_encoder, load_encoder


def random_twin(encoder: Path, folder: Path) -> Path:
    """The encoder's sizes and processor with fresh weights."""
    if not folder.is_dir():
        model = load_encoder(encoder)
        initialize_encoder(model, torch.Generator().manual_seed(0))
        model.save_pretrained(folder)
        shutil.copy(encoder / "preprocessor_config.json", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recognition"))
    parser.add_argument("--data", type=Path, required=True, help="folder of <split>/<class>/*")
    parser.add_argument("--test", default="test")
    parser.add_argument("--encoders", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    models = []
    for word in arguments.encoders:
        name, _, folder = word.partition("=")
        twin = random_twin(Path(folder), arguments.out / f"random_{name}")
        models += [{"name": name, "path": folder}, {"name": f"{name}, random weights", "path": str(twin)}]
    config = {
        "kind": "probing", "out": str(arguments.out), "precision": "fp32", "models": models, "warmup_epochs": 1,
        "data_sets": [{"title": arguments.data.name, "path": str(arguments.data), "test": arguments.test}], "augment": {"policy": "none"},
        "optim": {"epochs": arguments.epochs, "batch_size": arguments.batch, "warmup_steps": 0},
        "train": {"num_workers": 0, "log_every": 100, "trackers": [], "save_every": 1000},
    }
    file = arguments.out / "probing.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if status := aimv2_vlm(["eval", str(file)]):
        raise SystemExit(status)
    rows = {row["model"]: row for row in map(json.loads, (arguments.out / "ledger.jsonl").read_text(encoding="utf-8").splitlines())}
    for trained, twin in zip(models[::2], models[1::2], strict=True):
        right, names = [], []
        for model in (trained, twin):
            found = (arguments.out / "runs").glob(f"*__{rows[model['name']]['key'][:8]}/samples.jsonl")
            samples = [json.loads(line) for line in next(found).read_text(encoding="utf-8").splitlines()]
            right.append([s["right"] for s in samples])
            names = [s["name"] for s in samples]
        mean, low, high = paired_difference([right[0]], [right[1]], [names])
        kept = ("score", "interval", "best_on_test", "majority_score", "lr", "weight_decay", "num_questions", "split_sizes", "steps", "batch_size",
                "image_size", "features")
        record("recognition", {
            "name": f"recognition probe, {arguments.data.name}: {trained['name']}", "epochs": arguments.epochs, "augment": "none",
            "trained": {key: rows[trained["name"]][key] for key in kept}, "random": {key: rows[twin["name"]][key] for key in kept},
            "difference": {"points": round(100 * mean, 2), "interval": [round(100 * low, 2), round(100 * high, 2)]},
        })


if __name__ == "__main__":
    main()
