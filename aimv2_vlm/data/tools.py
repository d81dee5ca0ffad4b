"""What `aimv2-vlm data check` and `aimv2-vlm data pack` print; the work is done in shards.py and conversations.py."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

from aimv2_vlm.config import UserError

NAMED = 20  # bad rows printed by name; data_report.json has more


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
    return _show(report, arguments.max_bad_fraction)


def check(arguments: argparse.Namespace) -> int:
    """Count and validate shards or conversation files; exit status 1 when too many rows are bad."""
    if all(str(path).endswith((".json", ".jsonl")) for path in arguments.paths):
        return check_conversations(arguments)
    from aimv2_vlm.data import shards
    from aimv2_vlm.train.metrics import Progress

    bar = Progress("reading samples", 1, unit="samples")
    try:
        report = shards.check(arguments.paths, progress=bar.of)
    finally:
        bar.close()
    return _show(report, arguments.max_bad_fraction)


def check_conversations(arguments: argparse.Namespace) -> int:
    from aimv2_vlm.data.conversations import ConversationSet

    sources = [SimpleNamespace(path=path, images=arguments.images, take="all") for path in arguments.paths]
    conversations = ConversationSet(sources)
    report = conversations.report()
    print(json.dumps(report, indent=1, ensure_ascii=False))
    for path, rejection in list(conversations.rejections())[:NAMED]:
        print(f"bad: {path}: row {rejection.row} (id {rejection.id}): {rejection.reason}")
    return int(report["rows"] - report["good"] > arguments.max_bad_fraction * report["rows"])


def _show(report: dict, max_bad_fraction: float) -> int:
    bad = report["bad"]
    print(json.dumps({k: v for k, v in report.items() if k != "bad"}, indent=1, ensure_ascii=False))
    for entry in bad[:NAMED]:
        print("bad: " + (entry if isinstance(entry, str) else f"{entry['row']}: {entry.get('image', '')}: {entry['reason']}"))
    total = report["num_samples"] if "num_samples" in report else report["num_written"] + report["num_bad"]
    return int(report["num_bad"] > max_bad_fraction * total)
