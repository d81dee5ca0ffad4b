"""R5: garbage over a header in the middle of a tar, 1,000 positions: at most that sample is lost, never silently.

    python benchmarks/reliability/headers.py [--count 1000] [--seed 0] [--work FOLDER]

Trial i overwrites one member's header in one of three tar dialects in one of seven ways, all drawn from (seed, i). A
trial that is done is remembered in FOLDER/headers.jsonl. Prints and appends to results/reliability.jsonl one line:
`ours` is the number of trials in which another sample was lost or changed, or a loss was not named.
"""

from __future__ import annotations

import io
import random
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability.corpus import caption_of, key_of, picture  # noqa: E402
from benchmarks.reliability.summary import argument_parser, done_lines, remember, summarise  # noqa: E402

NUM_SAMPLES = 24
DIALECTS = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}
GARBAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "random": lambda old, draw: draw.randbytes(512),
    "zeros": lambda old, draw: bytes(512),
    "ones": lambda old, draw: b"\xff" * 512,
    "text": lambda old, draw: (b"ustar is a word that may stand anywhere " * 13)[:512],
    "one bit": lambda old, draw: _burst(old, draw, 1),
    "a few bytes": lambda old, draw: _burst(old, draw, 16),
    "half": lambda old, draw: old[:256] + draw.randbytes(256) if draw.random() < 0.5 else draw.randbytes(256) + old[256:],
}


def _burst(old: bytes, draw: random.Random, most: int) -> bytes:
    """Between one bit and `most` bytes changed where the header says something: name, mode, size, checksum, type, magic."""
    new = bytearray(old)
    at = draw.choice([draw.randrange(8), 100 + draw.randrange(7), draw.randrange(124, 135), draw.randrange(148, 154), 156, draw.randrange(257, 262)])
    for i in range(draw.randint(1, most)):
        new[(at + i) % 512] ^= 1 << draw.randrange(8) if most == 1 else draw.randrange(1, 256)
    return bytes(new)


@lru_cache
def archive(dialect: str) -> tuple[bytes, list[tuple[str, int]], dict[str, tuple[bytes, str]]]:
    """(bytes of a tar, (member, offset of its last header), key -> (picture, caption)); some names need an extra header."""
    buffer, samples = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=DIALECTS[dialect]) as tar:
        for number in range(NUM_SAMPLES):
            key = key_of(number) if number % 4 or dialect == "ustar" else f"{'long' * 30}-{key_of(number)}"
            samples[key] = picture(number), caption_of(number)
            for name, data in (("jpg", samples[key][0]), ("txt", samples[key][1].encode()), ("json", b'{"n": %d}' % number)):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        headers = [(info.name, info.offset_data - 512) for info in tar]
    return buffer.getvalue(), headers, samples


def trial(number: int, seed: int, folder: Path) -> tuple[str, list[str]]:
    """(what was done, what is wrong with the outcome)."""
    from aimv2_vlm.data.shards import ShardSet

    draw = random.Random(f"headers {seed} {number}")
    dialect, kind = draw.choice(list(DIALECTS)), draw.choice(list(GARBAGE))
    data, headers, samples = archive(dialect)
    member, at = headers[draw.randrange(len(headers))]
    hit = member.split(".")[0]
    garbage = GARBAGE[kind](data[at : at + 512], draw)
    path = folder / f"{number:06d}.tar"
    path.write_bytes(data[:at] + garbage + data[at + 512 :])
    problems = []
    try:
        shards = ShardSet(path)
        named = shards.bad_samples()
        found: Counter[str] = Counter()
        for sample in (shards.read(0, n) for n in range(shards.num_samples[0])):
            found[sample.key] += 1
            if sample.key not in samples:
                problems.append(f"{sample.key} arrived and was never there")
            elif (sample.image_bytes, sample.caption) != samples[sample.key]:
                problems.append(f"{sample.key} arrived with other bytes")
        problems += [f"{key} was lost" for key in samples.keys() - found.keys() - {hit}]
        problems += [f"{key} arrived {times} times" for key, times in found.items() if times > 1]
        if not named:
            problems.append("nothing was named")
        if hit not in found and not any(f": {hit}:" in line for line in named) and not any("(damage)" in line for line in named):
            problems.append(f"{hit} was lost and is not named")
    finally:
        for left in folder.glob(f"{path.name}*"):
            left.unlink()
    return f"{kind} over {member} ({dialect})", problems


def main() -> None:
    parser = argument_parser(__doc__, 1000, "positions")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "aimv2_vlm_headers")
    arguments = parser.parse_args()
    log = arguments.work / "headers.jsonl"
    done = {line["trial"]: line["problems"] for line in done_lines(log, {"seed": arguments.seed})}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.count):
            if number in done:
                continue
            what, problems = trial(number, arguments.seed, Path(folder))
            done[number] = problems
            remember(log, {"seed": arguments.seed, "trial": number, "what": what, "problems": problems})
            if problems:
                print(f"trial {number}: {what}: {problems}", flush=True)
    failures = sum(bool(done[number]) for number in range(arguments.count))
    summarise("R5 garbage headers", failures, "positions with another sample lost or a silent loss",
              count=arguments.count, seed=arguments.seed)


if __name__ == "__main__":
    main()
