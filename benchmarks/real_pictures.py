"""Charts, tables, words, receipts, forms and aerial photographs at 1x1, 2x2 and 3x3: what a finished evaluation found, recorded.

    python benchmarks/real_pictures.py --eval runs/real_vqa_cpu_eval --data DATA

One line a benchmark: score and interval of each model, its controls (blind, wrong picture, the most frequent training answer of the question), tokens a
picture, words seen in tuning and others apart, and the paired difference of real and reduced tiles. Beside CIDEr of aerial captions stands that of a
captioner which knows each picture's class and nothing else: the caption of that class which scores best on the training pictures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from record import record

from aimv2_vlm.evaluation.metrics import cider

CANDIDATES = 20  # most frequent captions of a class that are tried


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def constant_captions(rows: list[dict[str, Any]], source: str) -> dict[str, str]:
    """Class -> its caption that scores best on the training pictures, every class being given its own."""
    train = [row for row in rows if row["source"] == source and row["split"] == "train"]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        counts[row["label"]].update(row["captions"])
    ranked = {label: [caption for caption, _ in found.most_common(CANDIDATES)] for label, found in counts.items()}
    best: dict[str, tuple[float, str]] = {}
    for number in range(CANDIDATES):
        tried = {label: captions[number % len(captions)] for label, captions in ranked.items()}
        scores = cider([tried[row["label"]] for row in train], [row["captions"] for row in train])
        sums: dict[str, float] = defaultdict(float)
        for row, score in zip(train, scores, strict=True):
            sums[row["label"]] += score
        for label, total in sums.items():
            best[label] = max(best.get(label, (-1.0, "")), (total, tried[label]))
    return {label: caption for label, (_, caption) in best.items()}


def class_captioner(data: Path, samples: list[dict[str, Any]], source: str) -> float:
    """CIDEr (points) of the class's constant caption on the pictures of `samples`."""
    rows = read(data / "photos" / "captions.jsonl")
    label_of, captions = {row["image"]: row["label"] for row in rows}, constant_captions(rows, source)
    scores = cider([captions[label_of[sample["picture_id"]]] for sample in samples], [sample["answers"] for sample in samples])
    return round(100 * float(scores.mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, required=True, help="output folder of `aimv2-vlm eval real_vqa_cpu`")
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    ledger = read(arguments.eval / "ledger.jsonl")
    comparisons = json.loads((arguments.eval / "comparisons.json").read_text(encoding="utf-8"))["paired"]
    for benchmark in dict.fromkeys(row["benchmark"] for row in ledger):
        rows = [row for row in ledger if row["benchmark"] == benchmark]
        facts: dict[str, Any] = {"name": f"real pictures, {benchmark}", "metric": rows[0]["metric"], "num_questions": rows[0]["num_questions"], "models": {}}
        for row in (row for row in rows if row["control"] is None):
            of = {"score": row["score"], "interval": row["interval"], "tokens_per_picture": row["tokens_per_picture"], "num_errors": row["num_errors"],
                  "most_frequent_answer": row["majority_score"]}
            of |= {other["control"]: other["score"] for other in rows if other["model"] == row["model"] and other["control"]}
            samples = read(arguments.eval / row["samples"])
            for seen in (True, False):
                scores = [sample["score"] for sample in samples if sample["seen_in_train"] is seen]
                if scores:
                    of["seen_in_tuning" if seen else "not_seen"] = {"score": round(100 * sum(scores) / len(scores), 4), "num_questions": len(scores)}
            facts["models"][row["model"]] = of
        if rows[0]["metric"] == "cider":
            facts["constant_caption_of_its_class"] = class_captioner(arguments.data, samples, benchmark.rpartition("/")[2])
        facts["real_minus_reduced"] = {
            pair["first"]: {key: pair[key] for key in ("difference", "interval")}
            for pair in comparisons if pair["benchmark"] == benchmark and pair["second"] == f"{pair['first']} upsampled"}  # fmt: skip
        record("real_pictures", facts)


if __name__ == "__main__":
    main()
