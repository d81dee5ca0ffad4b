"""`aimv2-vlm eval --plan CONFIG`: what an evaluation needs and what of it is there, before anything starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2_vlm.config import UserError
from aimv2_vlm.data.labelled import count_split
from aimv2_vlm.data.recognition import find_data_set
from aimv2_vlm.evaluation.benchmarks import check_mirror, find_benchmarks, read_benchmark
from aimv2_vlm.evaluation.cells import check_names
from aimv2_vlm.evaluation.hub_sets import HUB_SETS, HubSet
from aimv2_vlm.evaluation.sweep import is_missing


@dataclass(frozen=True)
class Need:
    """One data set or model. `problem` is empty where it is there and whole."""

    name: str
    about: tuple[str, ...]
    problem: str = ""


def plan(config: Any) -> list[Need]:
    """Everything a config of any kind needs. Mirrors and parquet files are checked by their headers: columns, parts and number of rows."""
    if config.kind != "benchmarks":
        return _plan_data_sets(config)
    root = Path(config.benchmark_root)
    needs = [_benchmark(name, found, root) for name, found in find_benchmarks(root, config.benchmarks)]
    if max(config.shots, default=0) > 0:
        needs += [_shots(HUB_SETS[name], root) for name in config.benchmarks if name in HUB_SETS]
    needs += [_model(entry, max(config.shots, default=0)) for entry in config.models]
    needs += [Need(file, ("training questions",), "" if Path(file).is_file() else "missing") for file in config.train_conversations]
    return needs


def _plan_data_sets(config: Any) -> list[Need]:
    """Of a probing or zero-shot config."""
    models, names = check_names(config.models, config.data_sets, config.out)
    needs = []
    for name, data in zip(names, config.data_sets, strict=True):
        captions = getattr(data, "captions", None)
        files = [file for file in (captions, getattr(data, "class_names", None)) if file]
        splits = [] if captions else [data.train, data.test] if config.kind == "probing" else [data.test]
        needs.append(_labelled(name, data, splits, files))
    for name, model in zip(models, config.models, strict=True):
        needs.append(Need(name, (model.path,), "no checkpoint here" if is_missing(model.path) else ""))
    return needs


def _labelled(name: str, data: Any, splits: Sequence[str], files: Sequence[str]) -> Need:
    """Counts beside Table B1's where the set is one of those; a difference is told and does not stop an evaluation."""
    about = [data.path]
    try:
        known = find_data_set(data.name) if data.name else None
        for split in splits:
            count = count_split(data, split)
            wanted = known and (known.train if split == data.train else known.test)
            about.append(f"{split} {'not counted (data.where)' if count is None else f'{count:,}'}" + (f" of {wanted:,}" if wanted else ""))
        about += files
        if gone := next((file for file in files if not Path(file).is_file()), None):
            raise UserError(f"{gone} is missing")
    except UserError as error:
        return Need(name, tuple(about), str(error))
    return Need(name, tuple(about))


def print_plan(config: Any) -> int:
    """Prints the plan; 0 when nothing is missing, else 1."""
    needs = plan(config)
    for need in needs:
        print(f"{'ok     ' if not need.problem else 'MISSING'} {need.name}: {', '.join(need.about)}")
        if need.problem:
            print(f"        {need.problem}")
    missing = sum(bool(need.problem) for need in needs)
    print(f"plan: {len(needs)} things needed, {missing} missing or not whole" if missing else f"plan: all {len(needs)} things are there")
    return int(missing > 0)


def _benchmark(name: str, found: Path | UserError, root: Path) -> Need:
    if name not in HUB_SETS:
        return _own(name, found)
    hub_set = HUB_SETS[name]
    wanted = hub_set.table_rows or hub_set.rows
    per_picture = f"{hub_set.rows / hub_set.pictures:.1f} questions a picture" if hub_set.pictures else "questions a picture not known"
    about = (
        hub_set.hub, f"{hub_set.files} ({hub_set.split})", f"{hub_set.rows:,} questions", per_picture, hub_set.metric,
        _size(hub_set, found), f"licence: {hub_set.licence}",
    )  # fmt: skip
    if isinstance(found, UserError):
        return Need(name, about, f"{root / hub_set.folder} is missing; put these files there as they lie on the hub")
    try:
        rows = check_mirror(hub_set, found)
    except UserError as error:
        return Need(name, about, str(error))
    return Need(name, about, "" if rows == wanted else f"{found}: {rows:,} rows instead of {wanted:,}: a score of these is not the split's")


def _size(hub_set: HubSet, found: Path | UserError) -> str:
    if isinstance(found, Path):
        patterns = (hub_set.files, hub_set.picture_files)
        present = sum(file.stat().st_size for pattern in patterns if pattern for file in found.glob(pattern))
        if present:
            return f"{present / 1e9:.2f} GB here"
    return f"{hub_set.gigabytes} GB to fetch" if hub_set.gigabytes else "size not known"


def _own(name: str, found: Path | UserError) -> Need:
    try:
        if isinstance(found, UserError):
            raise found
        benchmark = read_benchmark(name, found)
    except UserError as error:
        return Need(name, ("own folder",), str(error))
    pictures = Counter(row["picture_id"] for row in benchmark.rows)
    per_picture = f"{len(benchmark.rows) / len(pictures):.1f} questions a picture"
    return Need(name, (str(found), benchmark.split, f"{len(benchmark.rows):,} questions", per_picture, benchmark.metric))


def _shots(hub_set: HubSet, root: Path) -> Need:
    name = f"{hub_set.name}, shots"
    if not hub_set.train:
        return Need(name, ("no training questions are known for it",), f"leave {hub_set.name} out of a config with shots")
    folder = root / hub_set.folder
    patterns = [pattern for pattern in (hub_set.train, hub_set.train_pictures) if pattern]
    where = hub_set.hub if hub_set.train_hub else "not on the hub: written by you in the columns of the benchmark"
    gone = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    return Need(name, (where, *patterns), f"{folder}: no {' and no '.join(gone)}" if gone else "")


def _model(entry: Any, num_shots: int) -> Need:
    """Tokens per picture of a local checkpoint, and whether the longest row of pictures fits its decoder."""
    name = entry.name or entry.path
    folder = Path(entry.path).expanduser()
    if not (folder / "config.json").is_file():
        local = folder.is_dir() or is_missing(entry.path)
        return Need(name, (entry.path, "tokens a picture known when it is there"), "no checkpoint here" if local else "")
    try:
        tokens = picture_tokens(folder, entry.tiling)
    except Exception as error:  # whatever a foreign checkpoint does, it is this checkpoint's problem
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Need(name, (entry.path,), f"its processor makes no picture tokens ({reason})")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = content.get("text_config", content).get("max_position_embeddings")
    longest = tokens * (num_shots + 1)
    about = (entry.path, f"{tokens:,} tokens a picture (largest grid)")
    if positions and longest >= positions:
        return Need(name, about, f"{num_shots} shots and a question are {longest:,} picture tokens, the decoder has {positions:,} positions")
    return Need(name, about)


def picture_tokens(folder: Path, tiling: str | None = None) -> int:
    """Tokens that a large square picture takes, by the checkpoint's own processor; `tiling` overrides its grid."""
    from PIL import Image
    from transformers import AutoProcessor

    from aimv2_vlm.data.tiling import Tiling

    processor = AutoProcessor.from_pretrained(folder)
    if hasattr(processor.image_processor, "max_patches"):
        if tiling:
            raise UserError(f"{folder}: tiling: {tiling} needs a LlavaNext checkpoint")
        return Tiling.from_processor(processor).max_image_tokens
    if tiling:
        size = processor.image_processor.size["height"]
        return Tiling.parse(tiling, tile_size=size, patch_size=processor.patch_size).max_image_tokens
    token = processor.image_token
    ids = processor(images=[Image.new("RGB", (1344, 1344), "grey")], text=[token])["input_ids"][0]
    return sum(int(number) == processor.tokenizer.convert_tokens_to_ids(token) for number in ids)
