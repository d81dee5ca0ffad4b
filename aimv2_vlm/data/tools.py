"""What `aimv2-vlm data check`, `pack` and `preview` print; the work is done in inspection.py, shards.py and preview.py."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aimv2_vlm.config import UserError

NAMED = 20  # bad rows printed by name; --json and data_report.json have all
LISTED = 5  # entries of any other list


def pack(arguments: argparse.Namespace) -> int:
    """A folder of pictures + captions -> image-text shards; exit status 1 when too many rows are bad."""
    from aimv2_vlm.data import shards

    where = {}
    for condition in arguments.where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write KEY=VALUE, e.g. --where split=train")
        where[key] = value
    report = shards.pack(arguments.folder, arguments.captions, arguments.out, arguments.samples_per_shard, where)
    _show(report, [f"{entry['row']}: {entry.get('image', '')}: {entry['reason']}" for entry in report["bad"]])
    return int(report["num_bad"] > arguments.max_bad_fraction * (report["num_written"] + report["num_bad"]))


def check(arguments: argparse.Namespace) -> int:
    """Count and validate shards or conversation files; exit status 1 when too many rows are bad or `--expect` is not met."""
    if _are_conversations(arguments.paths):
        return check_conversations(arguments)
    from aimv2_vlm.data import inspection, shards

    with _bar("reading samples", "samples") as progress:
        report = inspection.check(
            arguments.paths, shards.parse_caption(dict.fromkeys(arguments.caption or ["txt"], 1.0)), decode=arguments.decode,
            against=arguments.against, expect=arguments.expect, max_distance=_near_bits(arguments), progress=progress,
        )
    _write(arguments.json, report)
    _show(report, report["bad"])
    problems = report.get("expect", {}).get("problems", [])
    for problem in problems:
        print(f"expected of {arguments.expect}: {problem}")
    return int(bool(problems) or report["num_bad"] > arguments.max_bad_fraction * report["num_samples"])


def check_conversations(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.data import inspection
    from aimv2_vlm.data.conversations import ConversationSet

    if arguments.expect or arguments.caption:
        raise UserError(f"{arguments.paths[0]}: --expect and --caption are for shards, not for conversations")
    conversations = ConversationSet(_sources(arguments))
    report = conversations.report()
    bad = [f"{path}: row {item.row} (id {item.id}): {item.reason}" for path, item in conversations.rejections()]
    num_bad = len(bad)
    if arguments.decode or arguments.against:
        paths = list(dict.fromkeys(path for number in range(len(conversations)) for path in conversations.picture_paths(number)))
        with _bar("reading pictures", "pictures") as progress:
            pictures = inspection.check_pictures(
                paths, decode=arguments.decode, against=arguments.against, max_distance=_near_bits(arguments), progress=progress)
        bad += pictures.pop("bad_pictures")
        num_bad += pictures["num_bad_pictures"]
        report["pictures"] = pictures
    _write(arguments.json, report | {"bad": bad})
    _show(report, bad)
    return int(num_bad > arguments.max_bad_fraction * report["rows"])


def preview(arguments: argparse.Namespace) -> int:
    """Write a contact sheet of shards or conversation files and say where it is."""
    from aimv2_vlm.data import preview

    if _are_conversations(arguments.paths):
        done = preview.preview_conversations(_sources(arguments), arguments.out, arguments.num, arguments.seed)
    else:
        done = preview.preview_shards(arguments.paths, arguments.out, arguments.num, arguments.seed)
    print(f"{done['path']}: {done['num_shown']} shown, {done['num_bad_shown']} of them bad; {done['num_bad']} left out and listed")
    return 0


def _near_bits(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.data.duplicates import MAX_DISTANCE
    from aimv2_vlm.data.inspection import NEAR

    bits = NEAR if arguments.near_bits is None else arguments.near_bits
    if not 0 <= bits <= MAX_DISTANCE:
        raise UserError(f"--near-bits {bits}: must be from 0 (equal hashes) to {MAX_DISTANCE}")
    return bits


def _are_conversations(paths: list[str]) -> bool:
    named = [str(path).endswith((".json", ".jsonl", ".ndjson")) for path in paths]
    if any(named) and not all(named):
        raise UserError(f"{' '.join(paths)}: shards and conversation files in one call; name them in two")
    return all(named)


def _sources(arguments: argparse.Namespace) -> list[SimpleNamespace]:
    return [SimpleNamespace(path=path, images=arguments.images, take="all") for path in arguments.paths]


class _bar:
    """A progress bar for a `with` block; gives the `progress(done, total)` callback."""

    def __init__(self, what: str, unit: str):
        from aimv2_vlm.train.metrics import Progress

        self._bar = Progress(what, 1, unit=unit)

    def __enter__(self):
        return self._bar.of

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _write(path: str | None, report: dict) -> None:
    from aimv2_vlm.data.shards import write_json

    if path is None:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), report)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); choose another file") from None


def _show(report: dict, bad: list[str]) -> None:
    """The report on standard output as JSON, long lists cut; then the bad rows by name."""
    text = json.dumps(_cut({key: value for key, value in report.items() if key != "bad"}), indent=1, ensure_ascii=False)
    # The quantiles of one thing on one line: an object of numbers, of which no text can be a part.
    print(re.sub(r'\{(\s*"[a-z0-9%]+": -?[0-9.]+,?)+\s*\}', lambda found: " ".join(found[0].split()), text))
    for entry in bad[:NAMED]:
        print(f"bad: {entry}")
    if len(bad) > NAMED:
        print(f"bad: … and {len(bad) - NAMED} more")


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value[:LISTED]] + ([f"… and {len(value) - LISTED} more"] if len(value) > LISTED else [])
    return value
