"""Benchmark sweeps: models x benchmarks x controls through lmms-eval, with a ledger that goes on where it was stopped.

A cell is one model on one benchmark under one control; a unit is a slice of its questions. Any number of processes that run the
same sweep into one folder share its units: who answers one holds a lock that ends with the process, and a unit's answers are
stored before the lock is given back, so a killed process costs the units it was answering and nothing else. Every finished cell
is one line of `ledger.jsonl`, in the order of the config: the same ledger (but for `seconds`) however often and by how many
processes the sweep was run. What could not run stands in `failed.jsonl`.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.benchmarks import (
    Benchmark,
    TrainingAnswers,
    convert_val_jsonl,
    wrong_pictures,
)
from aimv2_vlm.evaluation.fewshot import SHOT_CONTROLS, earlier_turns, open_benchmarks
from aimv2_vlm.evaluation.metrics import SUBMISSION, benchmark_score, score_answers, score_interval
from aimv2_vlm.train.directory import versions, write_atomically

CONTROLS = ("blind", "wrong_picture")
PATIENCE_S = 5.0  # for another sweep in the same folder to end
Progress = Callable[[str], None]


# ---------------------------------------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class Model:
    """One checkpoint as the config lists it. `tiling` overrides the grid the checkpoint was tuned with."""

    name: str
    path: str
    source_size: int | None
    tiling: str | None
    digest: str


@dataclass(frozen=True)
class Cell:
    """One line of the ledger. `key` names everything the answers depend on."""

    model: Model
    benchmark: Benchmark
    control: str | None
    key: str

    @property
    def label(self) -> str:
        return f"{self.model.name} / {self.benchmark.name}" + (f" / {self.control}" if self.control else "")

    @property
    def samples(self) -> str:
        readable = "__".join([self.model.name, self.benchmark.name, self.control or "as_is"])
        return f"samples/{re.sub(r'[^A-Za-z0-9_.-]+', '_', readable)}__{self.key[:8]}.jsonl"


def digest_checkpoint(path: str) -> str:
    """Hash over the names and contents of a checkpoint's files, those of an adapter beside it among them; of a hub name, the name itself."""
    from aimv2_vlm.models.adapters import ADAPTER

    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in [*sorted(folder.iterdir()), *sorted(folder.glob(f"{ADAPTER}/*"))]:
        if file.is_file() and file.suffix in (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"):
            with open(file, "rb") as stream:
                digest.update(str(file.relative_to(folder)).encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def is_missing(path: str) -> bool:
    """Whether a checkpoint's path neither exists nor is a name on the hub: what is there now cannot be told from what was."""
    return not Path(path).expanduser().exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1)


def mean_tokens(counts: Sequence[float]) -> float | int:
    """Of pictures, to one decimal; a whole number where all take the same."""
    mean = round(float(np.mean(counts)), 1)
    return int(mean) if mean % 1 == 0 else mean


def names_of(key: str, entries: Sequence[Any]) -> list[str]:
    """Names of a config's entries: `title` or `name`, else the folder. Raises UserError for an entry without path and a name used twice."""
    names: list[str] = []
    for entry in entries:
        if not entry.path:
            raise UserError(f"{key}: {entry.name or 'an entry'} has no path")
        folder = Path(entry.path)
        name = getattr(entry, "title", "") or entry.name or (folder.parent.name if folder.name == "final" else folder.name)
        if name in names:
            raise UserError(f"{key}: the name {name} occurs twice; give each entry its own {'title' if hasattr(entry, 'title') else 'name'}")
        names.append(name)
    return names


def _models(config: Any) -> list[Model]:
    return [
        Model(name, str(entry.path), entry.source_size, entry.tiling, digest_checkpoint(entry.path))
        for name, entry in zip(names_of("models", config.models), config.models, strict=True)
    ]


def _settings(config: Any) -> dict[str, Any]:
    """What of the config changes answers or scores; batch_size does not."""
    from aimv2_vlm.train.precision import choose_precision

    return {
        "seed": config.seed,
        "limit": config.limit,
        "max_new_tokens": config.max_new_tokens,
        "precision": choose_precision(config.precision),
    }


def _key(model: Model, benchmark: Benchmark, control: str | None, settings: Mapping, training: str) -> str:
    parts = [model.name, model.digest, model.source_size, model.tiling, benchmark.name, benchmark.data_hash]
    parts += [benchmark.metric, benchmark.prompt_suffix, benchmark.split, control, training, dict(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- ledger


def read_ledger(path: str | Path, repair: bool = False) -> list[dict[str, Any]]:
    """Rows of a ledger. A half-written last line is left out, and with `repair` also cut off."""
    path = Path(path)
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: not JSON; delete the line and its cell runs again") from None
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder for this process alone. Raises UserError while a sweep runs in it."""
    with open(out / ".lock", "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is evaluating into this folder; choose another out=") from None
        yield


@contextlib.contextmanager
def _joined(out: Path, config: Any) -> Iterator[None]:
    """The folder together with other processes of the same sweep. Raises UserError while another sweep runs in it."""
    told = {key: value for key, value in vars(config).items() if key not in ("batch_size", "num_workers", "processes")}
    words = hashlib.sha256(json.dumps(told, default=vars, sort_keys=True).encode()).hexdigest()
    deadline = time.monotonic() + PATIENCE_S
    with open(out / ".lock", "a+", encoding="utf-8") as lock:
        while True:
            with contextlib.suppress(OSError):  # the first one
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                lock.write(words)
                lock.flush()
                _try_again(out)
                fcntl.flock(lock, fcntl.LOCK_SH)
                break
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                lock.seek(0)
                if lock.read() == words:
                    break
                fcntl.flock(lock, fcntl.LOCK_UN)
            if time.monotonic() > deadline:
                raise UserError(f"{out}: another process is evaluating another config into this folder; choose another out=")
            time.sleep(0.05)
        yield


def _try_again(out: Path) -> None:
    """What failed before this sweep: its marks go, cells with errors are marked as open, stored answers with errors are forgotten."""
    shutil.rmtree(out / "work" / "failed", ignore_errors=True)
    for row in read_ledger(out / "ledger.jsonl"):
        if not row.get("complete", True):
            mark = out / "work" / "again" / row["key"]
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    for unit in (out / "work" / "answers").glob("*/*.json"):
        if any(answer["error"] is not None for answer in json.loads(unit.read_text(encoding="utf-8"))["answers"]):
            unit.unlink()


def _clean_up(out: Path) -> None:
    """Removes what only a running sweep needs; a cell with errors keeps its good answers for the same command."""
    incomplete = {row["key"] for row in read_ledger(out / "ledger.jsonl") if not row.get("complete", True)}
    own = [entry for pattern in ("failed", "again", "datasets", "tasks_*") for entry in (out / "work").glob(pattern)]
    for entry in [*own, *(out / "work" / "answers").glob("*")]:
        if not (entry.parent.name == "answers" and entry.name.partition("_")[0] in incomplete):
            shutil.rmtree(entry, ignore_errors=True)
    for folder in (out / "work" / "answers", out / "work"):
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


@contextlib.contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with open(file, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Units:
    """Stored answers of one cell, a file for each slice of `size` questions.

    `run` answers a slice unless its answers are stored or another process is answering it.
    """

    def __init__(self, folder: Path, size: int, num_questions: int) -> None:
        self.folder, self.size, self.count = folder, size, -(-num_questions // size)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    @contextlib.contextmanager
    def _claim(self, number: int) -> Iterator[bool]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{number:06d}.lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def open_units(self) -> list[int]:
        """Units without stored answers that nobody is answering."""
        found = []
        for number in range(self.count):
            if not self._file(number).is_file():
                with self._claim(number) as mine:
                    found += [number] if mine else []
        return found

    @property
    def complete(self) -> bool:
        return all(self._file(number).is_file() for number in range(self.count))

    def run(self, number: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The unit's stored answers, or `work()`'s, then stored; None while another process answers it."""
        file = self._file(number)
        if not file.is_file():
            with self._claim(number) as mine:
                if mine and not file.is_file():
                    started = time.perf_counter()
                    answers = work()
                    write_atomically(file, json.dumps(answers | {"seconds": time.perf_counter() - started}, ensure_ascii=False))
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


# ---------------------------------------------------------------------------------------------- the sweep


def evaluate(config: Any, restart: bool = False) -> int:
    """`aimv2-vlm eval CONFIG`: the sweep, then `report.html` beside its ledger. Returns the sweep's status.

    `restart` forgets what was finished before.
    """
    from aimv2_vlm.evaluation.report import write_report

    check_config(config)
    out = Path(config.out)
    if restart and out.is_dir():
        with _locked(out):
            forget(out)
            shutil.rmtree(out / "work" / "answers", ignore_errors=True)
    status = run_sweep(config)
    if int(os.environ.get("RANK", "0")) == 0:
        from aimv2_vlm.evaluation.comparison import write_comparisons

        print(f"comparisons: {write_comparisons(out)}")
        if config.write_cards:
            _write_cards(config, out)
        print(f"report: {write_report(out / 'report.html', runs={}, eval_dir=out, title=out.name)}")
    return status


def forget(out: Path) -> None:
    """Removes the rows of `out`'s ledger and their samples, and nothing else."""
    for row in read_ledger(out / "ledger.jsonl", repair=True):
        if row.get("samples") and (out / row["samples"]).resolve().is_relative_to(out.resolve()):
            (out / row["samples"]).unlink(missing_ok=True)
    (out / "ledger.jsonl").unlink(missing_ok=True)


def _write_cards(config: Any, out: Path) -> None:
    from aimv2_vlm.train.card import add_scores

    rows = read_ledger(out / "ledger.jsonl")
    for model in _models(config):
        mine = [row for row in rows if row["model"] == model.name and row["source_size"] is None and not row["tiling_override"]]
        if mine and Path(model.path).is_dir():
            print(f"model card: {add_scores(model.path, mine)}")


def check_config(config: Any) -> None:
    """Raises UserError where keys of a sweep mean nothing, before anything is read or removed."""
    for key, known in (("controls", CONTROLS), ("shot_controls", SHOT_CONTROLS)):
        unknown = [control for control in getattr(config, key) if control not in known]
        if unknown:
            raise UserError(f"{key}: {unknown[0]!r} is none of {', '.join(known)}")
    for key in ("out", "models", "benchmarks", "benchmark_root"):
        if not getattr(config, key):
            raise UserError(f"{key}: empty; an evaluation needs models, benchmarks, their folder and where to write")
    for key, least in (("unit", 1), ("processes", 1), ("limit", 1), ("checked", 0)):
        if (value := getattr(config, key)) is not None and value < least:
            raise UserError(f"{key}: {value} must be at least {least}")


def run_sweep(config: Any, progress: Progress | None = None) -> int:
    """Runs every cell that the ledger in `config.out` does not hold yet.

    Returns 0 when every cell of the config is finished and complete, else 1: some cell failed (`failed.jsonl`), or
    some question got no answer (`num_errors` of its row). `progress` gets one plain line an event; default: stdout.

    Processes that are started with the same config (`processes`, torchrun, or by hand) share the work; each returns when all of it
    is done. On GPUs, process LOCAL_RANK takes the device of that number.
    """
    progress = progress or (lambda line: print(line, flush=True))
    check_config(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _launcher_hidden() as device, _helpers(config):
        with _joined(out, config):
            status = _run_joined(config, device, out, progress)
        with contextlib.suppress(UserError), _locked(out):  # the last one cleans up
            _clean_up(out)
    return status


@contextlib.contextmanager
def _helpers(config: Any) -> Iterator[None]:
    """The other `processes - 1` processes: they end with the work, and with this process should it be killed."""
    if config.processes == 1:
        yield
        return
    import torch

    context = multiprocessing.get_context("spawn")
    share = max(1, len(os.sched_getaffinity(0)) // config.processes)
    children = [context.Process(target=_help, args=(config, rank, share), daemon=True) for rank in range(1, config.processes)]
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, share))
    for child in children:
        child.start()
    try:
        yield
        for child in children:
            child.join()
    finally:
        torch.set_num_threads(before)
        for child in children:
            child.kill()


def _help(config: Any, rank: int, num_threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends this process
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(num_threads)
    config = copy.copy(config)
    config.processes = 1
    with contextlib.suppress(UserError):  # the parent says it
        run_sweep(config)


@contextlib.contextmanager
def _launcher_hidden() -> Iterator[str | None]:
    """Yields the device of this process among those that share a machine's GPUs (None: as ever).

    Meanwhile a launcher's variables are out of sight: lmms-eval would make a process group of these processes and split the questions
    itself, and would hang when one dies.
    """
    import torch

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        num_devices = torch.cuda.device_count()
        yield f"cuda:{int(hidden['LOCAL_RANK']) % num_devices}" if "LOCAL_RANK" in hidden and num_devices else None
    finally:
        os.environ.update(hidden)


def _run_joined(config: Any, device: str | None, out: Path, progress: Progress) -> int:
    with _exclusive(out / ".ledger.lock"):
        root = Path(config.benchmark_root)
        for name, jsonl in config.convert.items():
            _convert_once(Path(jsonl), root / name, progress)
        opened = open_benchmarks(config)
    ledger = out / "ledger.jsonl"
    training = TrainingAnswers(config.train_conversations)
    models, settings = _models(config), _settings(config)

    failures: list[dict] = []
    benchmarks: list[Benchmark] = []
    for name, found in opened:
        if isinstance(found, Benchmark):
            benchmarks.append(found)
        else:
            failures += [failure(model.name, name, control, found) for model in models for control in _arms(config)]
            progress(f"failed: {name}: {found}")
    listed = [
        Cell(model, benchmark, control, _key(model, benchmark, control, settings, training.digest))
        for model in models
        for benchmark in benchmarks
        for control in _arms(config, benchmark)
    ]
    cells = list({cell.key: cell for cell in listed}.values())  # a set and one of its members may both be named
    with _exclusive(out / ".ledger.lock"):
        rows = read_ledger(ledger, repair=True)
    keys = _current_keys(cells, settings, training.digest)
    old, done = superseded(rows, keys, "benchmarks", ledger), _finished(out, rows)
    open_cells = [cell for cell in cells if cell.key not in done]
    progress(f"sweep: {len(cells)} cells, {len(cells) - len(open_cells)} finished before, {len(open_cells)} to run")
    if old:
        progress(announce_superseded(old))
    order = {cell.key: number for number, cell in enumerate(cells)}
    marks = out / "work" / "failed"
    while open_cells:
        found = [cell for cell in open_cells if _units(cell, config, out).complete or _units(cell, config, out).open_units()]
        for model in models:
            mine = [cell for cell in found if cell.model == model]
            if mine:
                _run_model(config, settings, training, mine, device, out, order, keys, progress)
        done = _finished(out, read_ledger(ledger))
        open_cells = [cell for cell in open_cells if cell.key not in done and not (marks / cell.key).is_file()]
        if open_cells and not found:  # the rest is in the hands of other processes: until they are done or dead
            time.sleep(0.2)
    failed = [marks / cell.key for cell in cells if cell.key not in done and (marks / cell.key).is_file()]
    failures += [json.loads(mark.read_text(encoding="utf-8")) for mark in failed]
    with _exclusive(out / ".ledger.lock"):
        write_rows(out / "failed.jsonl", failures)

    incomplete = [cell for cell in cells if cell.key in done and not done[cell.key]["complete"]]
    for cell in incomplete:
        row = done[cell.key]
        progress(f"incomplete: {cell.label}: {row['num_errors']} questions without an answer; the first: {row.get('first_error')}")
    if failures:
        progress(f"sweep: {len(failures)} cells failed, see {out / 'failed.jsonl'}; the same command tries them again")
    elif incomplete:
        progress(f"sweep: {len(incomplete)} of {len(cells)} cells in {ledger} are incomplete; the same command asks what has no answer again")
    else:
        progress(f"sweep: finished, {len(cells)} cells in {ledger}")
    return int(bool(failures or incomplete))


def _units(cell: Cell, config: Any, out: Path) -> Units:
    return Units(out / "work" / "answers" / f"{cell.key}_{config.unit}_{config.checked}", config.unit, len(cell.benchmark.rows[: config.limit]))


def _publish(out: Path, row: Mapping[str, Any], samples: list[dict[str, Any]], order: Mapping[str, int], keys: Mapping[tuple[str, str], set[str]]) -> bool:
    """Puts a finished cell into the ledger at its place, where it follows what it supersedes; False where another process has done so."""
    with _exclusive(out / ".ledger.lock"):
        rows = read_ledger(out / "ledger.jsonl", repair=True)
        if row["key"] in _finished(out, rows):
            return False
        write_rows(out / row["samples"], samples)
        place = row["model"], row["benchmark"]
        gone = {row["key"], *(old["key"] for old in superseded(rows, {place: keys[place]}, "benchmarks", out / "ledger.jsonl"))}
        rows = [*(other for other in rows if other["key"] not in gone), row]
        rows.sort(key=lambda row: order.get(row["key"], -1))  # stable: rows of other configs stay in front
        write_rows(out / "ledger.jsonl", rows)
        (out / "work" / "again" / row["key"]).unlink(missing_ok=True)
        return True


def _finished(out: Path, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ledger rows by key, without those that this sweep still has to try again."""
    return {row["key"]: row for row in rows if row.get("complete", True) or not (out / "work" / "again" / row["key"]).is_file()}


def _current_keys(cells: list[Cell], settings: Mapping, training: str) -> dict[tuple[str, str], set[str]]:
    """(model, benchmark) -> the keys that its rows have with these checkpoints, data and settings, under whatever control."""
    arms = (None, *CONTROLS, *SHOT_CONTROLS)
    return {(cell.model.name, cell.benchmark.name): {_key(cell.model, cell.benchmark, arm, settings, training) for arm in arms} for cell in cells}


def superseded(rows: Sequence[dict[str, Any]], keys: Mapping[tuple[str, str], set[str]], kind: str, ledger: Path) -> list[dict[str, Any]]:
    """Rows from another checkpoint, data or setting than `keys` stand for: they go when the first row that follows them is there (beside it they
    would be mistaken for its like), not before. Raises UserError where an evaluation of another kind has rows of the same name."""
    places = [row for row in rows if (row["model"], row["benchmark"]) in keys]
    if other := [row for row in places if row.get("kind", "benchmarks") != kind]:
        raise UserError(f"out: {ledger} holds {other[0]['model']} / {other[0]['benchmark']} from an evaluation of kind {other[0].get('kind', 'benchmarks')}; "
                        "choose another out=, or give the data set another name")
    return [row for row in places if row["key"] not in keys[row["model"], row["benchmark"]]]


def announce_superseded(rows: Sequence[dict[str, Any]]) -> str:
    named = ", ".join(sorted({f"{row['model']} / {row['benchmark']}" for row in rows}))
    return f"{len(rows)} rows are of another checkpoint, data or setting and stand until their successors are finished: {named}"


def _arms(config: Any, benchmark: Benchmark | None = None) -> list[str | None]:
    if benchmark is not None and benchmark.metric == SUBMISSION:  # controls are for scores
        return [None]
    if benchmark is None or not benchmark.shots:
        return [None, *config.controls]
    return [None, *(control for control in config.shot_controls if control != "shuffled_answers" or len(benchmark.shots) > 1)]  # one answer has no other place


def failure(model: str, benchmark: str, control: str | None, error: BaseException) -> dict[str, Any]:
    """A row of `failed.jsonl`."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return {"model": model, "benchmark": benchmark, "control": control, "reason": reason}


def _convert_once(jsonl: Path, folder: Path, progress: Progress) -> None:
    """Writes the benchmark set unless it was written from this very file; a half-written one is written anew."""
    if not jsonl.is_file():
        raise UserError(f"convert: {jsonl} does not exist; set data_root")
    mark, digest = folder / "converted_from.json", hashlib.sha256(jsonl.read_bytes()).hexdigest()
    before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
    if before.get("sha256") == digest:
        return
    progress(f"convert: {jsonl} -> {folder}")
    names = [written.name for written in convert_val_jsonl(jsonl, folder)]
    for gone in set(before.get("sets", ())) - set(names):  # a source that the file no longer has
        shutil.rmtree(folder / Path(gone).name, ignore_errors=True)
    write_rows(mark, [{"file": str(jsonl), "sha256": digest, "sets": names}])


def _run_model(
    config: Any,
    settings: Mapping[str, Any],
    training: TrainingAnswers,
    cells: list[Cell],
    device: str | None,
    out: Path,
    order: Mapping[str, int],
    keys: Mapping[tuple[str, str], set[str]],
    progress: Progress,
) -> None:
    """Runs one model's cells into the ledger, as far as others do not; what fails leaves its reason in work/failed."""
    from aimv2_vlm.evaluation.generation import Generator, load_assistant
    from aimv2_vlm.evaluation.lmms_model import AnsweredElsewhere

    def failed(cell: Cell, error: Exception) -> None:
        mark = out / "work" / "failed" / cell.key
        with _exclusive(out / ".ledger.lock"):
            write_rows(mark, [failure(model.name, cell.benchmark.name, cell.control, error)])

    model = cells[0].model
    try:
        loaded, processor = load_assistant(model.path, settings["precision"], device)
        generator = Generator(
            loaded, processor, config.batch_size, config.max_new_tokens, model.source_size, model.tiling, num_workers=config.num_workers
        )
    except UserError as error:
        progress(f"failed: {model.name}: {error}")
        for cell in cells:
            failed(cell, error)
        return
    for cell in cells:
        try:
            row, samples = _run_cell(cell, generator, config, settings, training, out, progress)
        except AnsweredElsewhere:
            continue
        except Exception as error:  # a cell must not end the others; its reason is kept
            reason = failure(model.name, cell.benchmark.name, cell.control, error)["reason"]
            progress(f"failed: {cell.label}: {'' if isinstance(error, UserError) else type(error).__name__ + ': '}{reason}")
            failed(cell, error)
            continue
        if not _publish(out, row, samples, order, keys):
            continue
        low, high = row["interval"] or (float("nan"), float("nan"))
        score = f"answers in {row['submission']}" if row["score"] is None else f"{row['metric']} {row['score']:.1f} [{low:.1f}, {high:.1f}]"
        progress(
            f"{cell.label}: {score}, {row['num_questions']} questions, {row['num_errors']} errors, "
            f"{row['flips']} of {row['num_checked']} checked answers differ, {row['seconds']} s"
        )


def _run_cell(
    cell: Cell,
    generator: Any,
    config: Any,
    settings: Mapping[str, Any],
    training: TrainingAnswers,
    out: Path,
    progress: Progress,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    benchmark, rows = cell.benchmark, cell.benchmark.rows[: config.limit]
    picture_docs, num_other_form = None, None
    if cell.control == "wrong_picture":
        picture_docs, num_other_form = wrong_pictures(benchmark.rows, config.seed)
    predictions, assistant = _answers(cell, generator, config, picture_docs, out, progress)
    errors = {doc_id: reason for (_, doc_id), reason in assistant.errors.items()}
    scoring = time.perf_counter()

    answered = [i for i in range(len(rows)) if i not in errors]
    if not answered:
        raise UserError(f"none of the {len(rows)} questions got an answer; the first: {errors[min(errors)]}")
    scores = dict(
        zip(
            answered,
            score_answers(benchmark.metric, [predictions[i] for i in answered], [rows[i] for i in answered]),
            strict=True,
        )
    )
    values, scored = [scores[i] for i in answered], [rows[i] for i in answered]
    low, high = score_interval(benchmark.metric, values, scored, config.seed)
    majority = training.majority(benchmark)
    majority_scores = score_answers(benchmark.metric, majority[: len(rows)], rows) if majority else None
    tokens = list(assistant.tokens_seen.values())
    prompts = benchmark.prompts[: len(rows)]
    template = generator.processor.chat_template
    row = {
        "key": cell.key,
        "model": cell.model.name,
        "model_path": cell.model.path,
        "model_digest": cell.model.digest,
        "tiling": generator.tiling,
        "tiling_override": cell.model.tiling is not None,
        "source_size": cell.model.source_size,
        "tokens_per_picture": 0 if cell.control == "blind" else mean_tokens(tokens) if tokens else None,
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "control": cell.control,
        "shots": len(benchmark.shots),
        "metric": benchmark.metric,
        "score": round(benchmark_score(benchmark.metric, values, scored), 4),
        "interval": [round(low, 4), round(high, 4)],
        "num_questions": len(rows),
        "num_pictures": len({row["picture_id"] for row in rows}),
        "num_errors": len(errors),
        "complete": not errors,
        "first_error": errors[min(errors)] if errors else None,
        "num_cut": assistant.num_cut,
        "num_checked": len(assistant.checks),
        "flips": sum(check["flip"] for check in assistant.checks.values()),
        "ties": sum(check["tie"] for check in assistant.checks.values()),
        "num_other_form": num_other_form,
        "prompt": prompts[0],
        "prompt_suffix": benchmark.prompt_suffix,
        "prompt_hash": hashlib.sha256(json.dumps([template, prompts]).encode()).hexdigest()[:16],
        "majority_score": None if majority_scores is None else round(benchmark_score(benchmark.metric, majority_scores, rows), 4),
        "data": str(benchmark.folder),
        "data_hash": benchmark.data_hash,
        **settings,
        "versions": _versions(),
        "samples": cell.samples,
        "seconds": round(assistant.seconds + time.perf_counter() - scoring, 1),
    }
    samples = [
        {
            "id": rows[i]["id"],
            "picture_id": rows[i]["picture_id"],
            "doc_id": i,
            "shown_picture_id": _shown(cell.control, benchmark, picture_docs, i),
            "question": rows[i]["question"],
            "prediction": None if i in errors else predictions[i],
            "answers": rows[i]["answers"],
            "answer_letter": rows[i]["answer_letter"],
            "score": None if i in errors else float(scores[i]),
            "error": errors.get(i),
            "check": assistant.checks.get(i),
            "attribute": rows[i]["attribute"],
            "print_height": _number_or_none(rows[i].get("print_height")),
            "question_form": rows[i]["question_form"],
            "seen_in_train": rows[i].get("seen_in_train"),
            "majority": majority[i] if majority else None,
        }
        for i in range(len(rows))
    ]
    if benchmark.metric == SUBMISSION:
        for sample in samples:
            sample["score"] = None
        row |= {"score": None, "interval": None, "majority_score": None, "submission": _write_submission(cell, rows, predictions, errors, out)}
    return row, samples


def _write_submission(cell: Cell, rows: list[dict], predictions: Mapping[int, str], errors: Mapping[int, str], out: Path) -> str:
    """The answers in the organisers' form; a question without an answer is left out."""
    name = f"submissions/{Path(cell.samples).stem}.json"
    answers = [{"questionId": int(row["id"]), "answer": predictions[i]} for i, row in enumerate(rows) if i not in errors]
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out / name, json.dumps(answers, ensure_ascii=False))
    return name


def _shown(control: str | None, benchmark: Benchmark, picture_docs: Mapping[int, int] | None, i: int) -> str | None:
    if control == "blind":
        return None
    return benchmark.rows[picture_docs[i] if picture_docs else i]["picture_id"]


def _number_or_none(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)  # JSON has no NaN


_versions = functools.cache(versions)


# ---------------------------------------------------------------------------------------------- lmms-eval


def _answers(
    cell: Cell,
    generator: Any,
    config: Any,
    picture_docs: Mapping[int, int] | None,
    out: Path,
    progress: Progress,
) -> tuple[dict[int, str], Any]:
    """Predictions by question index, from lmms-eval's `simple_evaluate`, and the AssistantModel that gave them.

    Raises AnsweredElsewhere while other processes answer some of the questions.
    """
    from aimv2_vlm.evaluation.lmms_model import AssistantModel  # isort: skip  (first: it keeps Pillow strict)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    task = re.sub(r"[^A-Za-z0-9_-]+", "__", cell.benchmark.name)
    tasks = _write_task(cell.benchmark, task, config.max_new_tokens, out / "work")
    total = len(cell.benchmark.rows[: config.limit])
    checked = random.Random(f"{config.seed}/{cell.key}").sample(range(total), min(config.checked, total))
    with _Bar(cell.label, total) as bar, contextlib.redirect_stderr(io.StringIO()):  # lmms-eval's own bars
        assistant = AssistantModel(
            generator=generator,
            control=cell.control if cell.control in CONTROLS else None,
            earlier=earlier_turns(cell.benchmark, cell.control),
            picture_docs=picture_docs,
            record_errors=True,
            on_progress=bar.advance,
            units=_units(cell, config, out),
            checked=frozenset(checked),
        )
        results = simple_evaluate(
            model=assistant,
            tasks=[task],
            task_manager=TaskManager(include_path=[str(tasks)], include_defaults=False),
            limit=config.limit,
            bootstrap_iters=0,
            process_docs_parallel=1,
            # Without this lmms-eval decodes every picture again to score, and copies small ones into its log.
            cli_args=SimpleNamespace(process_with_media=False),
        )
    predictions = {sample["doc_id"]: sample["filtered_resps"][0] for sample in results["samples"][task]}
    if sorted(predictions) != list(range(total)):
        raise RuntimeError(f"lmms-eval returned {len(predictions)} of {total} answers")
    return predictions, assistant


def _write_task(benchmark: Benchmark, task: str, max_new_tokens: int, work: Path) -> Path:
    """A task file that includes the shipped one of the benchmark's metric and points to its folder."""
    content = benchmark.task_content(task, max_new_tokens, work / "datasets")
    folder = work / f"tasks_{os.getpid()}" / task  # lmms-eval reads every file below: none may be half-written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.yaml").write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    return folder


class _Bar:
    """A progress bar with time left on a terminal; nothing where the output is piped."""

    def __init__(self, label: str, total: int) -> None:
        self._columns = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._columns = RichProgress(console=Console(file=sys.stderr), transient=True)
            self._task = self._columns.add_task(label, total=total)

    def __enter__(self) -> Self:
        if self._columns is not None:
            self._columns.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._columns is not None:
            self._columns.stop()

    def advance(self, count: int) -> None:
        if self._columns is not None:
            self._columns.advance(self._task, count)


# ---------------------------------------------------------------------------------------------- reading it


def summary(ledger: str | Path) -> list[dict[str, Any]]:
    """One row a model and benchmark: score beside its controls, and `uses_picture` = score - the best of them.

    Percentage points (protocols.md: right - max(blind, wrong picture, most frequent training answer)); None where the
    ledger holds neither control nor majority score.
    """
    cells: dict[tuple[str, str], dict[str | None, dict]] = {}
    for row in read_ledger(ledger):
        cells.setdefault((row["model"], row["benchmark"]), {})[row["control"]] = row
    rows = []
    for arms in cells.values():
        if None not in arms or arms[None]["score"] is None:
            continue
        own = arms[None]
        baselines = {control: arms[control]["score"] for control in CONTROLS if control in arms}
        baselines |= {"majority": own["majority_score"]} if own["majority_score"] is not None else {}
        rows.append(
            {
                **{name: own[name] for name in ("model", "benchmark", "tiling", "source_size", "tokens_per_picture")},
                **{name: own[name] for name in ("split", "metric", "score", "interval", "num_questions", "num_errors")},
                "blind": baselines.get("blind"),
                "wrong_picture": baselines.get("wrong_picture"),
                "majority": baselines.get("majority"),
                "uses_picture": round(own["score"] - max(baselines.values()), 4) if baselines else None,
                "complete": all(arm["complete"] for arm in arms.values()),
            }
        )
    return rows
