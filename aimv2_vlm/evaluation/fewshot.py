"""In-context questions (Table 8): solved training questions with their pictures as earlier turns of the chat.

The shots of a benchmark and seed stand in one file, `<benchmark>_seed<seed>.json`, from which anyone can ask the same again:

    {"benchmark", "seed", "source", "checked_against", "shots": [{"id", "picture_sha256", "question", "options", "answer"}, …]}

`source` names the files of training questions, `checked_against` the hash of the benchmark whose pictures none of the shots shows
(equal bytes, or alike by perceptual hash). A run with k shots takes the first k, so its shots are among those of a run with more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.benchmarks import COLUMNS, Benchmark, build_prompt, find_benchmarks, read_benchmark
from aimv2_vlm.evaluation.hub_sets import as_questions, iterate_parquet, picture_bytes
from aimv2_vlm.evaluation.metrics import most_frequent

SHOT_CONTROLS = ("shuffled_answers", "shots_without_pictures")
NEAR_BITS = 6  # of 64, as in `aimv2-vlm data check`
CANDIDATES_PER_SHOT = 50  # training questions tried for one shot before giving up


@dataclass(frozen=True)
class Shot:
    """One solved question. `picture` holds the encoded bytes."""

    id: str
    picture: bytes
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def picture_sha256(self) -> str:
        return hashlib.sha256(self.picture).hexdigest()


@dataclass(frozen=True)
class _Training:
    """Training questions of a benchmark: text in memory, pictures on disk."""

    source: str
    rows: list[dict[str, Any]]
    picture: Callable[[int], bytes | None]  # of rows[i]


def with_shots(benchmark: Benchmark, num: int, seed: int, longest: int, folder: Path, published: bool) -> Benchmark:
    """The benchmark asked after its first `num` shots, under its own name (`…_4shot`).

    The list for `longest` shots is read from `folder`; where it is not there and not `published`, it is chosen and written.
    Raises UserError: no training questions, no list, a list of other pictures, a shot that shows a test picture.
    """
    return _asked_after(benchmark, _listed(benchmark, seed, longest, folder, published), num)


def _listed(benchmark: Benchmark, seed: int, longest: int, folder: Path, published: bool) -> list[Shot]:
    path = Path(folder) / f"{benchmark.name.replace('/', '__')}_seed{seed}.json"
    if path.is_file():
        shots = read_shots(path, benchmark)
        if len(shots) >= longest:
            return shots
        if published:
            raise UserError(f"{path}: {len(shots)} shots, but {longest} are asked for")
    elif published:
        raise UserError(f"shot_lists: {path} does not exist; leave shot_lists out to choose shots from the training questions")
    shots = choose_shots(benchmark, longest, seed)  # those of an own list with fewer are its first
    write_shots(path, benchmark, seed, shots)
    return shots


def _asked_after(benchmark: Benchmark, shots: Sequence[Shot], num: int) -> Benchmark:
    chosen = tuple(shots[:num])
    said = [[shot.picture_sha256, shot.question, shot.options, shot.answer] for shot in chosen]
    digest = hashlib.sha256(json.dumps([benchmark.data_hash, said]).encode()).hexdigest()[:16]
    return dataclasses.replace(benchmark, name=f"{benchmark.name}_{num}shot", data_hash=digest, shots=chosen)


def open_benchmarks(config: Any) -> list[tuple[str, Benchmark | UserError]]:
    """(name, benchmark or what is wrong) of all that an EvalConfig names, with each number of shots it lists.

    `config.prompts` replaces the words after a benchmark's question. Raises UserError for wrong keys.
    """
    return list(_open(config))


def _open(config: Any) -> Iterator[tuple[str, Benchmark | UserError]]:
    unknown = sorted(set(config.prompts) - set(config.benchmarks))
    if unknown:
        raise UserError(f"prompts: {unknown[0]} is none of the benchmarks of this config")
    if not config.shots or min(config.shots) < 0:
        raise UserError(f"shots: {config.shots}: list numbers of shots, e.g. [0, 4, 8]")
    folder = Path(config.shot_lists or Path(config.out) / "shots")
    for name, found in find_benchmarks(config.benchmark_root, config.benchmarks):
        if not isinstance(found, UserError):
            try:
                found = read_benchmark(name, found)
                if name in config.prompts:
                    found = dataclasses.replace(found, prompt_suffix=config.prompts[name])
            except UserError as error:
                found = error
        shots: list[Shot] | UserError = []
        if max(config.shots) > 0 and not isinstance(found, UserError):
            try:
                shots = _listed(found, config.seed, max(config.shots), folder, bool(config.shot_lists))
            except UserError as error:
                shots = error
        for num in config.shots:
            if num == 0 or isinstance(found, UserError):
                yield f"{name}_{num}shot" if num else name, found
            elif isinstance(shots, UserError):
                yield f"{name}_{num}shot", shots
            else:
                yield f"{name}_{num}shot", _asked_after(found, shots, num)


# ------------------------------------------------------------------------------------------------ choosing


def choose_shots(benchmark: Benchmark, num: int, seed: int) -> list[Shot]:
    """`num` training questions that (seed, benchmark) alone decides, each with a picture of its own that no test question shows.

    The answer is the most frequent one. Raises UserError where too few can be found.
    """
    training = _training(benchmark)
    shows = _Shown(benchmark)
    order = random.Random(f"{seed}/{benchmark.name}").sample(range(len(training.rows)), len(training.rows))
    shots: list[Shot] = []
    for i in order[: CANDIDATES_PER_SHOT * num]:
        if len(shots) == num:
            break
        row = training.rows[i]
        answer = row["answer_letter"] or most_frequent(row["answers"])
        picture = training.picture(i) if answer else None
        if picture and not shows.alike(picture):
            shows.add(picture)
            shots.append(Shot(row["id"], picture, row["question"], tuple(row["options"]), answer))
    if len(shots) < num:
        raise UserError(f"shots: {training.source}: only {len(shots)} of {num} questions have an answer and a picture of their own "
                        f"that {benchmark.name} does not show")  # fmt: skip
    return shots


class _Shown:
    """The pictures of a benchmark, to find out whether another one is among them."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._digests: set[str] = set()
        self._hashes: list[tuple[int, ...]] = []
        for _, data in benchmark.pictures():
            if data:
                self.add(data)

    def add(self, data: bytes) -> None:
        self._digests.add(hashlib.sha256(data).hexdigest())
        seen = _hash(data)
        if seen is not None:
            self._hashes.append(seen)

    def alike(self, data: bytes) -> bool:
        """Also True for a picture that cannot be opened: it is no shot either."""
        from aimv2_vlm.data.duplicates import look_alikes
        from aimv2_vlm.data.transforms import BadImage

        if hashlib.sha256(data).hexdigest() in self._digests:
            return True
        try:
            seen = _hash(data, strict=True)
        except BadImage:
            return True
        if seen is None or not self._hashes:  # a flat picture is like none but its copies
            return False
        rows, _ = look_alikes(np.array([seen], dtype=np.uint64), np.array(self._hashes, dtype=np.uint64), NEAR_BITS)
        return len(rows) > 0


def _hash(data: bytes, strict: bool = False) -> tuple[int, ...] | None:
    from aimv2_vlm.data.duplicates import perceptual_hash
    from aimv2_vlm.data.transforms import BadImage, decode_image

    try:
        return perceptual_hash(decode_image(data))
    except BadImage:
        if strict:
            raise
        return None  # a broken test picture is compared by its bytes alone


def _training_files(benchmark: Benchmark) -> tuple[list[Path], str]:
    """The files of training questions, and how a list calls them. UserError names what is missing."""
    hub_set, folder = benchmark.hub, benchmark.folder
    pattern = hub_set.train if hub_set else "data/train-*.parquet"
    files = sorted(folder.glob(pattern)) if pattern else []
    if not files:
        what = pattern or "training questions"
        hint = f"fetch them from {hub_set.hub}" if hub_set and hub_set.train_hub else "write them there in the columns of the benchmark"
        raise UserError(f"shots: {benchmark.name}: no {what} in {folder}; {hint}")
    return files, f"{folder.name}/{pattern}"


def _training(benchmark: Benchmark) -> _Training:
    files, source = _training_files(benchmark)
    hub_set, folder = benchmark.hub, benchmark.folder
    if hub_set is None:
        rows = list(iterate_parquet(files, [column for column in COLUMNS if column != "image"], batch=4096))
        return _Training(source, rows, lambda i: picture_bytes(_row_at(files, i, "image")))
    rows, kept = as_questions(hub_set, list(iterate_parquet(files, hub_set.columns, batch=4096)), _Nameless)
    if not hub_set.train_pictures:
        return _Training(source, rows, lambda i: picture_bytes(_row_at(files, kept[i], "image")))
    picture_files = sorted(folder.glob(hub_set.train_pictures))
    row_of = {row["id"]: i for i, row in enumerate(iterate_parquet(picture_files, ("id",), batch=65536))}

    def by_id(i: int) -> bytes | None:
        row = row_of.get(rows[i]["picture_id"])
        return None if row is None else picture_bytes(_row_at(picture_files, row, "image"))

    return _Training(source, rows, by_id)


class _Nameless:
    """In place of the identities of training pictures, of which only the chosen ones are ever read."""

    def __getitem__(self, number: int) -> str:
        return ""


def _row_at(files: Sequence[Path], number: int, column: str) -> Any:
    """One cell of a table that lies in several parquet files; only its row group is read."""
    import pyarrow.parquet

    for file in files:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                if number < size:
                    return parquet.read_row_group(group, columns=[column]).column(column)[number].as_py()
                number -= size
    raise IndexError(f"row {number} is beyond the end of {files[-1]}")


# ------------------------------------------------------------------------------------------------ files


def write_shots(path: Path, benchmark: Benchmark, seed: int, shots: Sequence[Shot]) -> None:
    """The list as it is published: pictures by their hash."""
    from aimv2_vlm.train.directory import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": shot.id, "picture_sha256": shot.picture_sha256, "question": shot.question, "options": list(shot.options), "answer": shot.answer}
        for shot in shots
    ]
    content = {"benchmark": benchmark.name, "seed": seed, "source": _training_files(benchmark)[1],
               "checked_against": benchmark.data_hash, "shots": rows}  # fmt: skip
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_shots(path: Path, benchmark: Benchmark) -> list[Shot]:
    """The shots of a list, their pictures found among the training questions by id and hash.

    Raises UserError: not such a file, another benchmark's, a picture that is not there, or one that the benchmark shows.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["id"], row["picture_sha256"], row["question"], tuple(row["options"]), row["answer"]) for row in content["shots"]]
        name, checked = content["benchmark"], content["checked_against"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a list of shots ({type(error).__name__}: {error})") from None
    if name != benchmark.name:
        raise UserError(f"{path}: these shots are for {name}, not for {benchmark.name}")
    training = _training(benchmark)
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(training.rows):
        rows_of.setdefault(row["id"], []).append(i)
    shots = []
    for number, digest, question, options, answer in rows:
        pictures = [training.picture(i) for i in rows_of.get(number, ())]
        picture = next((data for data in pictures if data and hashlib.sha256(data).hexdigest() == digest), None)
        if picture is None:
            raise UserError(f"{path}: {training.source} holds no question {number} with the picture {digest[:12]}…; it is other data")
        shots.append(Shot(number, picture, question, options, answer))
    if checked != benchmark.data_hash:
        shows = _Shown(benchmark)
        shown = next((shot.id for shot in shots if shows.alike(shot.picture)), None)
        if shown is not None:
            raise UserError(f"{path}: shot {shown} shows a picture that {benchmark.name} asks about; choose others")
    return shots


# ------------------------------------------------------------------------------------------------ asking


def earlier_turns(benchmark: Benchmark, control: str | None) -> Mapping[str, Any]:
    """What `generation.Question` needs of the shots: `before` (role, text), `pictures`, `places`; {} without shots.

    `shuffled_answers`: the answers go round, by as many places as leave the fewest beside a question that they answer too (of yes and no some stay).
    `shots_without_pictures`: text alone.
    """
    from aimv2_vlm.evaluation.generation import Picture, open_picture

    shots = benchmark.shots
    if not shots:
        return {}
    answers = [shot.answer for shot in shots]
    if control == "shuffled_answers":
        turns = [answers[by:] + answers[:by] for by in range(1, len(answers))]
        answers = min(turns, key=lambda turned: sum(map(operator.eq, turned, answers)), default=answers)
    before: list[tuple[str, str]] = []
    for shot, answer in zip(shots, answers, strict=True):
        before += [("user", build_prompt(shot.question, shot.options, benchmark.prompt_suffix)), ("assistant", answer)]
    if control == "shots_without_pictures":
        return {"before": tuple(before), "pictures": (), "places": (0,) * len(before)}
    pictures = tuple(Picture(("shot", shot.picture_sha256), lambda shot=shot: open_picture(shot.picture)) for shot in shots)
    return {"before": tuple(before), "pictures": pictures, "places": (1, 0) * len(shots)}
