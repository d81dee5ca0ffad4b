"""Benchmark sweeps: models x benchmarks x controls through lmms-eval, with a ledger that goes on where it was stopped.

A cell is one model on one benchmark under one control. Every finished cell is one line of `ledger.jsonl`, written once,
in a fixed order, so a killed and restarted sweep ends with the same ledger (but for `seconds`). What could not run
stands in `failed.jsonl`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.benchmarks import (
    TASKS,
    Benchmark,
    TrainingAnswers,
    convert_val_jsonl,
    find_benchmarks,
    read_benchmark,
    wrong_pictures,
)
from aimv2_vlm.evaluation.metrics import bootstrap_interval, score_answers
from aimv2_vlm.train.directory import versions, write_atomically

CONTROLS = ("blind", "wrong_picture")
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
    """Hash over the names and contents of a checkpoint's files; of a hub name, the name itself."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt"):
            with open(file, "rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _models(config: Any) -> list[Model]:
    models: list[Model] = []
    for entry in config.models:
        if not entry.path:
            raise UserError(f"models: {entry.name or 'an entry'} has no path")
        folder = Path(entry.path)
        name = entry.name or (folder.parent.name if folder.name == "final" else folder.name)
        if name in [model.name for model in models]:
            raise UserError(f"models: the name {name} occurs twice; give each entry its own name")
        digest = digest_checkpoint(entry.path)
        models.append(Model(name, str(entry.path), entry.source_size, entry.tiling, digest))
    return models


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


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with open(path, "ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another process is evaluating into this folder; choose another out=") from None
        yield


# ---------------------------------------------------------------------------------------------- the sweep


def evaluate(config: Any, restart: bool = False) -> int:
    """`aimv2-vlm eval CONFIG`: the sweep, then `report.html` beside its ledger. Returns the sweep's status.

    `restart` forgets what was finished before.
    """
    from aimv2_vlm.evaluation.report import write_report

    out = Path(config.out or "")
    if restart and (out / "ledger.jsonl").is_file():
        with _locked(out):
            (out / "ledger.jsonl").unlink()
            shutil.rmtree(out / "samples", ignore_errors=True)
    status = run_sweep(config)
    print(f"report: {write_report(out / 'report.html', runs={}, eval_dir=out, title=out.name)}")
    return status


def run_sweep(config: Any, progress: Progress | None = None) -> int:
    """Runs every cell that the ledger in `config.out` does not hold yet.

    Returns 0 when every cell of the config is finished and complete, else 1: some cell failed (`failed.jsonl`), or
    some question got no answer (`num_errors` of its row). `progress` gets one plain line an event; default: stdout.
    """
    progress = progress or (lambda line: print(line, flush=True))
    unknown = [control for control in config.controls if control not in CONTROLS]
    if unknown:
        raise UserError(f"controls: {unknown[0]!r} is none of {', '.join(CONTROLS)}")
    for key in ("out", "models", "benchmarks", "benchmark_root"):
        if not getattr(config, key):
            raise UserError(f"{key}: empty; an evaluation needs models, benchmarks, their folder and where to write")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        return _run_locked(config, out, progress)


def _run_locked(config: Any, out: Path, progress: Progress) -> int:
    ledger = out / "ledger.jsonl"
    root = Path(config.benchmark_root)
    for name, jsonl in config.convert.items():
        _convert_once(Path(jsonl), root / name, progress)
    training = TrainingAnswers(config.train_conversations)
    models, settings = _models(config), _settings(config)

    failures: list[dict] = []
    benchmarks: list[Benchmark] = []
    for name, folder in find_benchmarks(root, config.benchmarks):
        try:
            if isinstance(folder, UserError):
                raise folder
            benchmarks.append(read_benchmark(name, folder))
        except UserError as error:
            failures += [_failure(model.name, name, control, error) for model in models for control in _arms(config)]
            progress(f"failed: {name}: {error}")
    cells = [
        Cell(model, benchmark, control, _key(model, benchmark, control, settings, training.digest))
        for model in models
        for benchmark in benchmarks
        for control in _arms(config)
    ]
    done = _current_rows(ledger, cells)
    open_cells = [cell for cell in cells if cell.key not in done]
    progress(f"sweep: {len(cells)} cells, {len(cells) - len(open_cells)} finished before, {len(open_cells)} to run")
    for model in models:
        mine = [cell for cell in open_cells if cell.model == model]
        if mine:
            failures += _run_model(config, settings, training, mine, out, done, progress)
    shutil.rmtree(out / "work", ignore_errors=True)
    _write_rows(out / "failed.jsonl", failures)

    incomplete = [cell for cell in cells if cell.key in done and not done[cell.key]["complete"]]
    for cell in incomplete:
        progress(f"incomplete: {cell.label}: {done[cell.key]['num_errors']} questions without an answer")
    if failures:
        progress(f"sweep: {len(failures)} cells failed, see {out / 'failed.jsonl'}; the same command tries them again")
    else:
        progress(f"sweep: finished, {len(cells)} cells in {ledger}")
    return int(bool(failures or incomplete))


def _current_rows(ledger: Path, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Ledger rows by key. Rows of these cells from another checkpoint, data or setting are taken out of the ledger:
    beside their successors they would only be mistaken for them."""
    rows = read_ledger(ledger, repair=True)
    keys = {(cell.model.name, cell.benchmark.name, cell.control): cell.key for cell in cells}
    kept = [row for row in rows if keys.get((row["model"], row["benchmark"], row["control"]), row["key"]) == row["key"]]
    if len(kept) < len(rows):
        _write_rows(ledger, kept)
    return {row["key"]: row for row in kept}


def _arms(config: Any) -> list[str | None]:
    return [None, *config.controls]


def _failure(model: str, benchmark: str, control: str | None, error: BaseException) -> dict[str, Any]:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return {"model": model, "benchmark": benchmark, "control": control, "reason": reason}


def _convert_once(jsonl: Path, folder: Path, progress: Progress) -> None:
    """Writes the benchmark set unless it was written from this very file; a half-written one is written anew."""
    if not jsonl.is_file():
        raise UserError(f"convert: {jsonl} does not exist; set data_root")
    mark, digest = folder / "converted_from.json", hashlib.sha256(jsonl.read_bytes()).hexdigest()
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")).get("sha256") == digest:
        return
    progress(f"convert: {jsonl} -> {folder}")
    convert_val_jsonl(jsonl, folder)
    _write_rows(mark, [{"file": str(jsonl), "sha256": digest}])


def _run_model(
    config: Any,
    settings: Mapping[str, Any],
    training: TrainingAnswers,
    cells: list[Cell],
    out: Path,
    done: dict[str, dict],
    progress: Progress,
) -> list[dict]:
    """Runs one model's cells into the ledger (and `done`); returns what failed."""
    from aimv2_vlm.evaluation.generation import Generator, load_assistant

    model = cells[0].model
    try:
        loaded, processor = load_assistant(model.path, settings["precision"])
        generator = Generator(
            loaded, processor, config.batch_size, config.max_new_tokens, model.source_size, model.tiling
        )
    except UserError as error:
        progress(f"failed: {model.name}: {error}")
        return [_failure(model.name, cell.benchmark.name, cell.control, error) for cell in cells]
    failures = []
    for cell in cells:
        started = time.perf_counter()
        try:
            row, samples = _run_cell(cell, generator, config, settings, training, out, progress)
        except Exception as error:  # a cell must not end the others; its reason is kept
            progress(f"failed: {cell.label}: {type(error).__name__}: {error}")
            failures.append(_failure(model.name, cell.benchmark.name, cell.control, error))
            continue
        _write_rows(out / cell.samples, samples)
        row["seconds"] = round(time.perf_counter() - started, 1)
        _append(out / "ledger.jsonl", row)
        done[cell.key] = row
        low, high = row["interval"]
        progress(
            f"{cell.label}: {row['metric']} {row['score']:.1f} [{low:.1f}, {high:.1f}], "
            f"{row['num_questions']} questions, {row['num_errors']} errors, {row['seconds']} s"
        )
    return failures


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
    generator.tokens_seen.clear()
    predictions, errors = _answers(cell, generator, config, picture_docs, out, progress)

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
    values, clusters = [scores[i] for i in answered], [rows[i]["picture_id"] for i in answered]
    low, high = bootstrap_interval(values, clusters, config.seed)
    majority = training.majority(benchmark)
    majority_scores = score_answers(benchmark.metric, majority[: len(rows)], rows) if majority else None
    tokens = list(generator.tokens_seen.values())
    mean_tokens = 0 if cell.control == "blind" else round(float(np.mean(tokens)), 1) if tokens else None
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
        "tokens_per_picture": int(mean_tokens) if mean_tokens is not None and mean_tokens % 1 == 0 else mean_tokens,
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "control": cell.control,
        "metric": benchmark.metric,
        "score": round(100.0 * float(np.mean(values)), 4),
        "interval": [round(100.0 * low, 4), round(100.0 * high, 4)],
        "num_questions": len(rows),
        "num_pictures": len({row["picture_id"] for row in rows}),
        "num_errors": len(errors),
        "complete": not errors,
        "num_other_form": num_other_form,
        "prompt": prompts[0],
        "prompt_hash": hashlib.sha256(json.dumps([template, prompts]).encode()).hexdigest()[:16],
        "majority_score": None if majority_scores is None else round(100.0 * float(majority_scores.mean()), 4),
        "data": str(benchmark.folder),
        "data_hash": benchmark.data_hash,
        **settings,
        "versions": _versions(),
        "samples": cell.samples,
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
            "attribute": rows[i]["attribute"],
            "print_height": _number_or_none(rows[i].get("print_height")),
            "question_form": rows[i]["question_form"],
            "seen_in_train": rows[i].get("seen_in_train"),
            "majority": majority[i] if majority else None,
        }
        for i in range(len(rows))
    ]
    return row, samples


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
) -> tuple[dict[int, str], dict[int, str]]:
    """Predictions and errors by question index, from lmms-eval's `simple_evaluate`."""
    from aimv2_vlm.evaluation.lmms_model import AssistantModel  # isort: skip  (first: it keeps Pillow strict)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    task = re.sub(r"[^A-Za-z0-9_-]+", "__", cell.benchmark.name)
    tasks = _write_task(cell.benchmark, task, config.max_new_tokens, out / "work")
    total = len(cell.benchmark.rows[: config.limit])
    with _Bar(cell.label, total) as bar, contextlib.redirect_stderr(io.StringIO()):  # lmms-eval's own bars
        assistant = AssistantModel(
            generator=generator,
            control=cell.control,
            picture_docs=picture_docs,
            record_errors=True,
            on_progress=bar.advance,
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
    errors = {doc_id: reason for (name, doc_id), reason in assistant.errors.items() if name == task}
    return predictions, errors


def _write_task(benchmark: Benchmark, task: str, max_new_tokens: int, work: Path) -> Path:
    """A task file that includes the shipped one of the benchmark's metric and points to its folder."""
    suffix = f"\n{benchmark.prompt_suffix}" if benchmark.prompt_suffix else ""
    content = {
        "task": task,
        "include": str(TASKS / f"_{benchmark.metric}.yaml"),
        "dataset_path": str(benchmark.folder.resolve()),
        "dataset_kwargs": {"cache_dir": str((work / "datasets").resolve())},
        "test_split": benchmark.split,
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "until": []},
        "lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": suffix}},
    }
    folder = work / "tasks" / task
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
        if None not in arms:
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
