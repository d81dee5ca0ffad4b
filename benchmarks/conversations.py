"""Conversation files: how long a large one takes to open and how much memory, and whether every good row of real ones goes through.

    python benchmarks/conversations.py [--rows 7000000] [--rounds 5] [--folder /tmp] [--data DIR]

"opening": a JSONL of --rows/10 conversations (text and one of 100,000 picture names each) is opened with its index beside it, against the
least that whoever keeps no index does at every start: decoding each line once, keeping nothing. "large": the same with --rows rows, opened
for the first time (every row judged, every picture looked for) and again; `peak_mb` is the largest resident memory of a process that opens
it and reads 1,000 rows at random places. Times are of the processor, not of the clock, so that a busy machine counts less; `first_clock_s` is
of the clock, judging with a process a core, of which none took more than `first_helper_peak_mb`. `equal`: as many usable rows as were written.
Needs about 300 bytes of disk a row below --folder.

"mixture" (with --data: a folder of `<set>/llava_train.json` and `<set>/images`): every row of every share is assembled with its pictures;
`equal`: all usable rows have weight 1, every other row is counted under a reason, and all are accounted for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from record import record

from aimv2_vlm.config import ConversationSource
from aimv2_vlm.data.conversations import ConversationSet

NUM_PICTURES = 100_000
BAD_EVERY = 1000  # one row in so many has an empty answer
MEAN, STD = [0.5] * 3, [0.5] * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=7_000_000, help="0: without the large files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where temporary files go")
    parser.add_argument("--data", type=Path, default=None, help="real conversation files")
    arguments = parser.parse_args()
    if arguments.data is not None:
        mixtures(arguments.data)
    if arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            large_files(Path(folder), arguments.rows, arguments.rounds)


# ------------------------------------------------------------------------------------------------------------- opening


def large_files(folder: Path, num_rows: int, rounds: int) -> None:
    images = folder / "images"
    for number in range(NUM_PICTURES):
        place = images / f"{number % 100:02d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").touch()
    small, large = folder / "small.jsonl", folder / "large.jsonl"
    write_rows(large, num_rows)
    first = apart(open_set, large, images)
    again = [apart(open_set, large, images) for _ in range(rounds)]
    record("conversations", {
        "name": f"large: {num_rows:,} conversations", "ours": round(statistics.median(done["seconds"] for done in again), 3), "peer": None,
        "ratio": None, "unit": "s to open again", "equal": all(done["rows"] == num_usable(num_rows) for done in [first, *again]),
        "first_clock_s": round(first["clock_s"], 1), "first_helper_peak_mb": first["helper_peak_mb"], "first_peak_mb": first["peak_mb"],
        "peak_mb": max(done["peak_mb"] for done in again), "import_mb": first["import_mb"], "file_gb": round(large.stat().st_size / 1e9, 2),
        "read_one_us": round(statistics.median(done["read_one_us"] for done in again), 1),
    })  # fmt: skip
    large.unlink()
    write_rows(small, num_rows // 10)
    apart(open_set, small, images)
    ours, peer, equal = [], [], True
    for _ in range(rounds):
        for side, function in ((ours, open_set), (peer, decode_lines)):
            done = apart(function, small, images)
            side.append(done["seconds"])
            equal &= done["rows"] == num_usable(num_rows // 10) if function is open_set else done["rows"] == num_rows // 10
    record("conversations", {
        "name": f"opening {num_rows // 10:,} conversations again", "ours": round(statistics.median(ours), 4),
        "peer": round(statistics.median(peer), 4), "ratio": round(statistics.median(peer) / statistics.median(ours), 1), "unit": "s", "equal": equal,
    })  # fmt: skip


def write_rows(path: Path, num_rows: int) -> None:
    """A block of rows again and again, so that the disk and not this script is what takes time."""
    draw = random.Random(0)
    words = ["a picture", "of the", "red", "quarterly revenue", "naïve Größe", "漢字", "left of", "twelve", "\\n", "shown"]
    with open(path, "w", encoding="utf-8") as file:
        lines = []
        for number in range(min(num_rows, NUM_PICTURES)):
            picture = draw.randrange(NUM_PICTURES)
            answer = "" if number % BAD_EVERY == 0 else " ".join(draw.choices(words, k=12))
            turns = [{"from": "human", "value": "<image>\n" + " ".join(draw.choices(words, k=6))}, {"from": "gpt", "value": answer}]
            row = {"id": number if number % 2 else f"row-{number}", "image": f"{picture % 100:02d}/{picture:06d}.jpg", "conversations": turns}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        for start in range(0, num_rows, len(lines)):
            file.writelines(lines[: num_rows - start])


def num_usable(num_rows: int) -> int:
    return num_rows - -(-num_rows // BAD_EVERY)


def apart(function, path: Path, images: Path) -> dict:
    """`function` in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, path, images).result()


def open_set(path: Path, images: Path) -> dict:
    import_mb = peak_mb()
    start, clock = time.process_time(), time.perf_counter()
    rows = ConversationSet([ConversationSource(path=str(path), images=str(images))])
    seconds, clock_s = time.process_time() - start, time.perf_counter() - clock
    places = random.Random(1).choices(range(len(rows)), k=1000)
    start = time.process_time()
    for place in places:
        rows[place]
    return {
        "seconds": seconds, "rows": len(rows), "peak_mb": peak_mb(), "import_mb": import_mb, "clock_s": clock_s,
        "helper_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "read_one_us": (time.process_time() - start) / len(places) * 1e6,
    }  # fmt: skip


def decode_lines(path: Path, images: Path) -> dict:
    start, rows = time.process_time(), 0
    with open(path, "rb") as file:
        for line in file:
            rows += isinstance(json.loads(line), dict)
    return {"seconds": time.process_time() - start, "rows": rows}


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# ------------------------------------------------------------------------------------------------------------ mixtures


def mixtures(data: Path) -> None:
    from aimv2_vlm.data.chat import ChatFormat, train_chat_tokenizer
    from aimv2_vlm.data.collate import InstructionDataset
    from aimv2_vlm.data.tiling import Tiling, image_processor

    files = sorted(data.glob("*/llava_train.json"))
    with tempfile.TemporaryDirectory() as cache:
        def rows_of(takes: list[str]) -> ConversationSet:
            sources = [ConversationSource(path=str(f), images=str(f.parent / "images"), take=t) for f, t in zip(files, takes, strict=True)]
            return ConversationSet(sources, cache_dir=cache)

        everything = rows_of(["all"] * len(files))
        texts = [text for index in range(len(everything)) for text in everything[index].texts]
        tokenizer = train_chat_tokenizer(texts, Path(cache) / "tokenizer", 2048)
        chat = ChatFormat(tokenizer, tokenizer.chat_template, tokenizer.image_token)
        tiling = Tiling((2, 2), 56, 14)
        for takes in (["all"], ["first:500"], ["random:500"], ["10%"], ["25%", "random:100"]):
            rows = rows_of([takes[number % len(takes)] for number in range(len(files))])
            report = rows.report()
            dataset = InstructionDataset(rows, chat, tiling, image_processor(tiling, MEAN, STD), max_length=1024)
            start, lost, cut = time.process_time(), [], 0
            for index in range(len(rows)):
                row = dataset.fetch(index)
                cut += row.num_cut > 0
                if row.bad is not None:
                    lost.append(row.bad)
            rejected = sum(report["rejected"].values())
            record("conversations", {
                "name": f"mixture of {', '.join(f.parent.name for f in files)}: {' and '.join(takes)}",
                "ours": round((time.process_time() - start) / len(rows) * 1e3, 3), "peer": None, "ratio": None,
                "unit": "ms a row, decoded and assembled", "equal": not lost and report["good"] + rejected == report["rows"],
                "rows": report["rows"], "good": report["good"], "taken": report["taken"], "rejected": report["rejected"],
                "weight_0": lost[:5], "cut": cut,
            })  # fmt: skip


if __name__ == "__main__":
    main()
