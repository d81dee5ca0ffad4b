"""R4: of 10,000 samples 500 are damaged in every listed way; every good one arrives once, every bad one is named.

    python benchmarks/reliability/corruption.py [--count 10000] [--seed 0] [--work FOLDER]

Stages: the samples of an epoch through 0 and 2 workers; a whole run that may lose 6 %; the same with the default limit,
which stops; a run whose damage only decoding shows, which stops after 1,000 samples and not before. A stage that is done
is remembered in FOLDER/corruption.jsonl. Prints and appends to results/reliability.jsonl one line: `ours` is the number
of samples lost, repeated, exchanged or wrongly named.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import runs  # noqa: E402
from benchmarks.reliability.corpus import DAMAGES, Corpus, caption_of, key_of, number_of, write_corpus  # noqa: E402
from benchmarks.reliability.summary import argument_parser, done_lines, remember, summarise  # noqa: E402

TINY = [*runs.TINY, "text.tokenizer=train", "text.vocab_size=60", "text.context_length=48", "data.sources.0.caption=txt", "data.validation=[]",
        "optim.micro_batch_size=100", "train.save_every=1000", "train.validate_every=1000"]
SHARE = 0.05  # damaged
BATCH = 100


def wrong_names(corpus: Corpus, lines: Iterable[str]) -> list[str]:
    """What is not right about the named bad samples: each must be named once, with its shard, key and reason."""
    expected = {f"{shard}: {key_of(number)}: ": DAMAGES[kind].reason for number, (shard, kind) in corpus.bad.items()}
    seen: Counter[str] = Counter()
    problems = []
    for line in lines:
        match = re.match(r"[^:]+: [^:]+: ", line)
        name = match[0] if match else line
        seen[name] += 1
        if name not in expected:
            problems.append(f"named without being damaged: {line}")
        elif not re.search(expected[name], line[len(name) :]):
            problems.append(f"another reason than {expected[name]!r}: {line}")
    problems += [f"not named: {name}" for name in expected if not seen[name]]
    return problems + [f"named {times} times: {name}" for name, times in seen.items() if times > 1]


def deliver(corpus: Corpus, workers: int) -> list[str]:
    """One epoch through the training loop's own loader, each row compared with the sample it claims to be."""
    from aimv2_vlm.config import ImageInput, PairSource
    from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
    from aimv2_vlm.data.pairs import PairDataset
    from aimv2_vlm.train.loop import StepDataset, fetch_steps

    model = corpus.folder.parent / "captions.model"
    if not model.exists():
        train_tokenizer((caption_of(n) for n in range(0, corpus.count, 7)), model, vocab_size=60)
    tokenizer = CaptionTokenizer(model, 48)
    data = PairDataset([PairSource(path=str(corpus.folder))], 0, ImageInput(size=28), tokenizer, 4)
    corpus.flip_bytes()
    total = data.epoch_positions
    steps = [range(first, min(first + BATCH, total)) for first in range(0, total, BATCH)]
    arrived: Counter[int] = Counter()
    problems, named = [], data.bad_samples()
    try:
        for batches in fetch_steps(StepDataset(lambda step: [data.microbatch(steps[step])], len(steps)), 0, workers):
            for batch in batches:
                named += batch["bad"]
                columns = (batch["pixels"].numpy(), *(batch[name].tolist() for name in ("weights", "input_ids", "text_lengths")))
                for key, pixels, weight, ids, length in zip(batch["keys"], *columns, strict=True):
                    if not weight:
                        continue
                    number = int(key[1:])
                    arrived[number] += 1
                    if number_of(pixels) != number:
                        problems.append(f"{key}: has the picture of {key_of(number_of(pixels))}")
                    if ids[:length] != tokenizer.encode(caption_of(number)):
                        problems.append(f"{key}: has another caption")
    finally:
        corpus.flip_bytes()  # and back
    problems += [f"{key_of(n)}: lost" for n in sorted(corpus.good - arrived.keys())]
    problems += [f"{key_of(n)}: arrived though damaged" for n in sorted(arrived.keys() - corpus.good)]
    problems += [f"{key_of(n)}: arrived {times} times" for n, times in arrived.items() if times > 1]
    return problems + wrong_names(corpus, named)


def pretrain(corpus: Corpus, out: Path, steps: int, *more: str) -> tuple[int, str]:
    """The real command on the corpus, bytes flipped after indexing; (exit status, what it said)."""
    from aimv2_vlm.cli import main

    corpus.flip_bytes()
    said = io.StringIO()
    words = ["pretrain", "demo_scenes", "data_root=.", f"out={out}", *TINY, f"data.sources.0.path={corpus.folder}",
             f"optim.steps={steps}", f"optim.batch_size={BATCH}", *more]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return main(words), said.getvalue()
    finally:
        corpus.flip_bytes()


def run_that_may_lose_six_percent(corpus: Corpus, out: Path) -> list[str]:
    status, said = pretrain(corpus, out, -(-corpus.count // BATCH), "data.max_bad_fraction=0.06")
    if status or not (out / "final").is_dir():
        return [f"exit status {status}: {said[-500:]}"]
    report = json.loads((out / "data_report.json").read_text(encoding="utf-8"))
    # An epoch is shorter than `count` positions, so some are met twice.
    return wrong_names(corpus, [*report["named_in_index"], *dict.fromkeys(report["named"])])


def run_that_stops_at_the_index(corpus: Corpus, out: Path) -> list[str]:
    status, said = pretrain(corpus, out, 5)
    indexed = sum(DAMAGES[kind].indexed for _, kind in corpus.bad.values())
    wanted = f"{indexed} of {corpus.count} samples are bad, above max_bad_fraction 0.01"
    problems = [] if status == 2 and wanted in said else [f"exit status {status}: {said[-500:]}"]
    return problems + (["it trained"] if (out / "checkpoints").exists() else [])


def run_that_stops_while_training(corpus: Corpus, out: Path) -> list[str]:
    """The first judgement is after 1,000 samples: with 5 % bad the run ends there, with a checkpoint."""
    status, said = pretrain(corpus, out, 1000)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = "of the last 1000 samples are bad, above max_bad_fraction 0.01"
    problems = [] if status == 2 and wanted in said else [f"exit status {status}: {said[-500:]}"]
    if rows[-1]["step"] != 1000 // BATCH:
        problems.append(f"stopped after {rows[-1]['samples']} samples")
    if not (out / "checkpoints" / f"step_{rows[-1]['step']:08d}" / "state.json").is_file():
        problems.append("no checkpoint of the last step")
    return problems


def stages(count: int, seed: int, folder: Path) -> dict[str, Callable[[], list[str]]]:
    """Name -> what finds its problems. Corpora are made when first needed."""
    made: dict[str, Corpus] = {}

    from aimv2_vlm.data.shards import expand_pattern, open_index

    def corpus(name: str, kinds: list[str] | None = None) -> Corpus:
        if name not in made:
            shutil.rmtree(folder / name, ignore_errors=True)
            made[name] = write_corpus(folder / name, count, int(count * SHARE), seed, min(500, max(1, count // 4)), kinds)
            for path in expand_pattern(folder / name):
                open_index(path)  # bytes are flipped after this
        return made[name]

    def out(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    late = [kind for kind, damage in DAMAGES.items() if not damage.indexed]
    return {
        "epoch, 0 workers": lambda: deliver(corpus("mixed"), 0),
        "epoch, 2 workers": lambda: deliver(corpus("mixed"), 2),
        "run, limit 6 %": lambda: run_that_may_lose_six_percent(corpus("mixed"), out("run6")),
        "run, default limit, stops at the index": lambda: run_that_stops_at_the_index(corpus("mixed"), out("run1")),
        "run, default limit, stops after 1,000": lambda: run_that_stops_while_training(corpus("late", late), out("late1")),
    }


def main() -> None:
    parser = argument_parser(__doc__, 10_000, "samples; 5 %% of them are damaged")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "aimv2_vlm_corruption")
    arguments = parser.parse_args()
    log = arguments.work / "corruption.jsonl"
    about: dict[str, Any] = {"count": arguments.count, "seed": arguments.seed}
    done = {line["stage"]: line["problems"] for line in done_lines(log, about)}
    for name, find in stages(arguments.count, arguments.seed, arguments.work).items():
        if name not in done:
            done[name] = find()
            remember(log, about | {"stage": name, "problems": done[name]})
        print(f"{name}: {len(done[name])} problems {done[name][:3] or ''}", flush=True)
    problems = sum(map(len, done.values()))
    summarise("R4 corruption", problems, "samples lost, repeated, exchanged or wrongly named", **about,
              damaged=int(arguments.count * SHARE), kinds=len(DAMAGES), stages=len(done))


if __name__ == "__main__":
    main()
