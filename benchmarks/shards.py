"""Speed of reading shards: P2 (shard to batch, two workers) and P7 (opening in the middle of ten million samples).

    python benchmarks/shards.py [seek | shards] [--data FOLDER]

seek: 10,000 shards of 1,000 samples exist as empty (sparse) files and one manifest of synthetic facts, written with the
project's own writer. `ours` is the time from nothing to the index entry of the sample at position 5,000,000: expanding
the pattern, comparing every shard's size and time with the manifest, order, entry; `peer` is what a reader without an
index does, walking to it: webdataset's rate over 100,000 samples (no decoding), extrapolated, where webdataset is
installed. Equal: the entry is the one that was written.

shards: JPEGs of 500x375 and 1600x1200 (scikit-learn's two photographs, enlarged where need be; and pictures full of fine grain, whose decoding nothing
shortens) in shards to a uint8 batch of 224 px with two worker processes, in exact and in fast mode, against webdataset
with open_clip's training transform (fp32 batch); both random crops of the same distribution. Equal: both sides deliver
every sample once. Needs webdataset and open_clip_torch (the extra `bench`).

Medians of interleaved rounds; each line is printed and appended to results/shards.jsonl. `cpu_s` and
`worker_cpu_ms_per_sample` are processor time, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import record
from transforms import jpeg, load_photographs

ROOT = Path(__file__).resolve().parents[1]
NUM_SHARDS, PER_SHARD, POSITION = 10_000, 1_000, 5_000_000
DIGEST = "0123456789abcdef" * 2


def report(name: str, ours: float, peer: float | None, unit: str, equal: bool, **more: Any) -> None:
    ratio = None if peer is None else (peer / ours if unit.startswith("s ") else ours / peer)
    facts = {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "equal": equal, **more}
    record("shards", facts, packages=("webdataset", "open_clip_torch"))


# ------------------------------------------------------------------------------------------------------------------ seek


def synthetic_facts(shard: int) -> dict[str, np.ndarray]:
    """(samples, 3) offset, size, checksum of every member of a made-up shard in img2dataset's order; twenty differ."""
    shard %= 20
    number = np.arange(PER_SHARD, dtype=np.int64)
    sizes = {"image": 20_000 + (number * 7919 + shard * 104_729) % 60_000, "text": 20 + (number * 31 + shard) % 200,
             "metadata": 300 + (number * 17 + shard) % 400}  # fmt: skip
    blocks = {kind: -(-size // 512) + 1 for kind, size in sizes.items()}
    at = np.concatenate([[0], np.cumsum(sum(blocks.values()))[:-1]]) * 512 + 512
    facts = {}
    for salt, kind in enumerate(("image", "metadata", "text")):
        facts[kind] = np.stack([at, sizes[kind], (number * 2_654_435_761 + shard * 97 + salt) % 2**32], axis=1)
        at = at + blocks[kind] * 512
    return facts


def make_world(folder: Path) -> str:
    """Ten thousand empty shards and their manifest; returns the pattern."""
    from aimv2_vlm.data import manifest, shards

    pattern = f"{folder}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"

    def packed():
        made = []
        for shard in range(20):
            facts = synthetic_facts(shard)
            body = {**facts, "mask": [3] * PER_SHARD, "key": [f"{shard:05d}{number:04d}" for number in range(PER_SHARD)]}
            made.append(manifest.pack_index({}, body))
        ends = [int(synthetic_facts(shard)["text"][-1, 0]) + 1024 for shard in range(20)]
        for shard in range(NUM_SHARDS):
            path = folder / f"{shard:05d}.tar"
            with open(path, "wb") as file:
                file.truncate(ends[shard % 20])
            status = path.stat()
            header = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "digest": DIGEST, "columns": ["txt", "json:caption"],
                      "column_counts": {"3": PER_SHARD}, "num_bad": 0, "num_damaged": 0}  # fmt: skip
            yield made[shard % 20]._replace(header=header, key_number=shard * 10_000)

    name, digest = shards.manifest_name(pattern), manifest.names_digest([f"{folder}/{n:05d}.tar" for n in range(NUM_SHARDS)])
    with open(folder / name, "wb") as file:
        manifest.write_manifest(file, digest, packed())
    return pattern


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def open_at(pattern: str) -> dict[str, Any]:
    """Runs in a fresh process: what one opening takes, in seconds and bytes."""
    from aimv2_vlm.data.order import Order, compact_fingerprint, fingerprint
    from aimv2_vlm.data.shards import ShardSet

    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    opened = ShardSet(pattern)
    order = Order([opened.num_samples], [1.0], seed=7)
    place = order.locate(POSITION)
    entry = opened._entry(place.shard, place.sample)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    memory = resident() - before
    for position in range(POSITION, POSITION + 20_000, 37):  # on through the window
        place_then = order.locate(position)
        opened._entry(place_then.shard, place_then.sample)
    later = resident() - before
    source = {"name": "x", "weight": 1.0, "caption": "txt", "shards": opened.shard_facts()}
    with tempfile.TemporaryDirectory() as folder:
        state = len(json.dumps(compact_fingerprint(fingerprint(7, 16, [source]), folder)))
    facts = synthetic_facts(place.shard)
    wanted = [tuple(facts[kind][place.sample].tolist()) for kind in ("image", "text", "metadata")]
    equal = [entry.image, entry.text, entry.metadata] == wanted and entry.key == f"{place.shard:05d}{place.sample:04d}"
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "memory": memory, "later": later, "state": state, "equal": equal,
            "place": list(place)}  # fmt: skip


def walk_rate(folder: Path) -> float | None:
    """Samples per second of webdataset over 100,000 small samples, None without webdataset."""
    try:
        import webdataset
    except ImportError:
        return None
    from aimv2_vlm.data.shards import write_shards

    if not list(folder.glob("*.tar")):
        write_shards(({"key": None, "image_bytes": bytes(2000), "ext": "jpg", "caption": "x", "json": {}} for _ in range(10_000)),
                     folder, 10_000)  # fmt: skip
    (path,) = folder.glob("*.tar")
    start = time.perf_counter()
    count = sum(1 for _ in webdataset.WebDataset([str(path)] * 10, shardshuffle=False, empty_check=False))
    return count / (time.perf_counter() - start)


def seek(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name) / "shards", Path(name) / "walk"
        folder.mkdir()
        pattern = make_world(folder)
        on_disk = next(folder.glob("manifest-*")).stat().st_size / (NUM_SHARDS * PER_SHARD)
        results, rates = [], []
        for _ in range(rounds):
            done = subprocess.run([sys.executable, __file__, "open", "--pattern", pattern], capture_output=True, text=True, check=True,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
            results.append(json.loads(done.stdout))
            rates.append(walk_rate(small))
    median = {key: statistics.median(result[key] for result in results) for key in ("seconds", "cpu_seconds", "memory", "later", "state")}
    peer = POSITION / statistics.median(rates) if all(rates) else None
    report(
        f"seek to sample {POSITION:,} of {NUM_SHARDS * PER_SHARD:,} in {NUM_SHARDS:,} shards", median["seconds"], peer,
        "s (peer extrapolated from 100,000 samples)", all(result["equal"] for result in results),
        cpu_s=median["cpu_seconds"], best_s=min(result["seconds"] for result in results), bytes_per_sample_on_disk=on_disk,
        resident_mb=median["memory"] / 1e6, resident_mb_later=median["later"] / 1e6, state_bytes=median["state"], rounds=rounds,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- shards


def write_pictures(folder: Path, size: tuple[int, int], count: int, kind: str, data: Path | None) -> None:
    """Shards of JPEGs of quality 90. kind: `photographs` from `data` brought to `size`, without it windows of scikit-learn's two; or
    `grain`, smooth noise with texture."""
    from PIL import Image, ImageOps

    from aimv2_vlm.data.shards import write_shards

    width, height = size
    generator = np.random.default_rng(0)
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")) if data else []
    ours = load_photographs(None, 2)[0] if kind == "photographs" and not data else []
    if data and len(files) < 16:
        raise SystemExit(f"--data {data}: holds {len(files)} pictures, 16 are needed")

    def picture(number: int) -> Image.Image:
        if files:
            with Image.open(files[number * len(files) // 16]) as image:
                return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
        if ours:
            photograph = ours[number % 2]
            wide, high = photograph.width * 9 // 10, photograph.height * 9 // 10
            left, top = (photograph.width - wide) * (number // 2) // 7, (photograph.height - high) * (number // 2) // 7
            return ImageOps.fit(photograph.crop((left, top, left + wide, top + high)), size, Image.Resampling.LANCZOS)
        small = Image.fromarray(generator.integers(0, 255, (height // 25, width // 25, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += generator.normal(0, 6, pixels.shape).astype(np.int16)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    made = [jpeg(picture(number)) for number in range(16)]
    rows = ({"key": None, "image_bytes": made[n % 16], "ext": "jpg", "caption": f"number {n}", "json": {}} for n in range(count))
    write_shards(rows, folder, samples_per_shard=count // 8)


class Images:
    """Batches of pictures in the run's order, as a map-style dataset of batches."""

    def __init__(self, folder: Path, count: int, batch: int, mode: str):
        from aimv2_vlm.data.order import Order
        from aimv2_vlm.data.shards import ShardSet
        from aimv2_vlm.data.transforms import TrainTransform

        self.shards, self.count, self.batch = ShardSet(folder), count, batch
        self.order = Order([self.shards.num_samples], [1.0], seed=0)
        self.transform = TrainTransform(224, (0.4, 1.0), (0.75, 1.33), 0.5, mode)

    def __len__(self) -> int:
        return self.count // self.batch

    def __getitem__(self, number: int) -> tuple[Any, list[str]]:
        import torch

        from aimv2_vlm.data.order import draws

        pictures, keys = [], []
        for position in range(number * self.batch, (number + 1) * self.batch):
            place = self.order.locate(position)
            raw = self.shards.read(place.shard, place.sample)
            pictures.append(self.transform.decode(raw.image_bytes, draws(0, position, "crop")))
            keys.append(raw.key)
        return torch.stack(pictures), keys


def _one_thread(_: int) -> None:
    import torch

    torch.set_num_threads(1)


def ours_loader(folder: Path, count: int, batch: int, mode: str) -> Any:
    from torch.utils.data import DataLoader

    data = Images(folder, count, batch, mode)
    return DataLoader(data, batch_size=None, num_workers=2, worker_init_fn=_one_thread, persistent_workers=True)


def peer_loader(folder: Path, batch: int) -> Any:
    import webdataset
    from open_clip.transform import AugmentationCfg, image_transform
    from torch.utils.data import DataLoader

    transform = image_transform(224, is_train=True, aug_cfg=AugmentationCfg(scale=(0.4, 1.0)))
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(100)
    data = data.decode("pilrgb").rename(image="jpg").map_dict(image=transform).to_tuple("image", "__key__").batched(batch)
    return DataLoader(data, batch_size=None, num_workers=2, worker_init_fn=_one_thread, persistent_workers=True)


class Side:
    """A loader whose workers have started; `round` takes all its batches once."""

    def __init__(self, loader: Any, count: int):
        others = {child.pid for child in multiprocessing.active_children()}
        self.loader, self.count, self.rates, self.cpu, self.equal = loader, count, [], [], True
        for _ in loader:  # starts the workers, loads what they import
            pass
        self.workers = [child.pid for child in multiprocessing.active_children() if child.pid not in others]

    def _cpu_seconds(self) -> float:
        ticks = 0
        for worker in self.workers:
            with open(f"/proc/{worker}/stat", encoding="ascii") as file:
                ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def round(self) -> None:
        keys: list[str] = []
        start, cpu = time.perf_counter(), self._cpu_seconds()
        for pictures, names in self.loader:
            self.equal &= tuple(pictures.shape[1:]) == (3, 224, 224)
            keys += names
        self.rates.append(self.count / (time.perf_counter() - start))
        self.cpu.append((self._cpu_seconds() - cpu) / self.count * 1000)
        self.equal &= len(keys) == len(set(keys)) == self.count


def shards(rounds: int, data: Path | None) -> None:
    kinds = ("photographs",) if data else ("photographs", "grain")
    for (size, count), kind in itertools.product((((500, 375), 384), ((1600, 1200), 96)), kinds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pictures(folder, size, count, kind, data)
            mean_bytes = sum(path.stat().st_size for path in folder.glob("*.tar")) // count
            sides = {mode: Side(ours_loader(folder, count, 12, mode), count) for mode in ("exact", "fast")} | {"peer": Side(peer_loader(folder, 12), count)}
            for _ in range(rounds):
                for side in sides.values():
                    side.round()
        peer = sides.pop("peer")
        for mode, ours in sides.items():
            cpu = statistics.median(ours.cpu), statistics.median(peer.cpu)
            report(
                f"shards to batch, {size[0]}x{size[1]} JPEG, {kind}, 2 workers, {mode}", statistics.median(ours.rates), statistics.median(peer.rates),
                "samples/s (ours uint8, peer normalised fp32)", ours.equal and peer.equal, rounds=rounds, worker_cpu_ms_per_sample=cpu,
                cpu_ratio=cpu[1] / cpu[0], pictures=kind, bytes_per_sample=mean_bytes,
            )  # fmt: skip


def main() -> None:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("seek", "shards", "open"), help="one of the two; `open` is one round of seek")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder of photographs to make the shards of (without: scikit-learn's two, and grain)")
    parser.add_argument("--pattern")
    arguments = parser.parse_args()
    if arguments.what == "open":
        print(json.dumps(open_at(arguments.pattern)))
        return
    if arguments.what in (None, "seek"):
        seek(arguments.rounds)
    if arguments.what in (None, "shards"):
        shards(arguments.rounds, arguments.data)


if __name__ == "__main__":
    main()
