"""Benchmarks: what is asked, how, and where it lies.

Own folders are `<root>/<name>/data/<split>-*.parquet`, one question a row, and may hold `benchmark.json` {"metric",
"prompt_suffix", "split"}; the embedded ones have theirs in `tasks/`. The public ones (`hub_sets.py`) are read from mirrors of the
hub's files below the same root, under their own names (`aimv2_vqav2_val`, …).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aimv2_vlm.config import UserError
from aimv2_vlm.data.recognition import check_parts
from aimv2_vlm.evaluation.hub_sets import (
    HUB_SETS,
    OPTION_LETTER,
    SINGLE_WORD,
    HubSet,
    as_questions,
    iterate_parquet,
    picture_bytes,
    picture_digest,
)
from aimv2_vlm.evaluation.metrics import LETTER_METRICS, METRIC_NAMES, SUBMISSION, most_frequent, normalize_answer

TASKS = Path(__file__).parent / "tasks"
SUFFIX_OF_METRIC = dict.fromkeys(METRIC_NAMES, SINGLE_WORD) | dict.fromkeys(LETTER_METRICS, OPTION_LETTER) | {"mme": "", "cider": ""}
COLUMNS = ("id", "picture_id", "image", "question", "question_form", "answers", "options", "answer_letter", "attribute")


def build_prompt(question: str, options: Sequence[str] = (), suffix: str = "") -> str:
    """The user's words: the question, options as "A. circle" lines, the suffix on a line of its own (Table C2).

    A suffix that begins with a space goes on in the last line.
    """
    lettered = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    asked = "\n".join([question, *lettered])
    return asked + suffix if suffix.startswith(" ") or not suffix else f"{asked}\n{suffix}"


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as it lies on disk; `rows` hold every column but the picture, in file order.

    `split` says so where a mirror holds another number of questions than the benchmark has: a part is not the split.
    """

    name: str
    folder: Path
    split: str
    metric: str
    prompt_suffix: str
    data_hash: str
    rows: list[dict[str, Any]]
    hub: HubSet | None = None
    shots: tuple[Any, ...] = ()  # fewshot.Shot: asked before every question

    @property
    def prompts(self) -> list[str]:
        return [build_prompt(row["question"], row["options"], self.prompt_suffix) for row in self.rows]

    def task_content(self, task: str, max_new_tokens: int, cache_dir: str | Path) -> dict[str, Any]:
        """The lmms-eval task of this benchmark: what its file says beyond the shipped one that it includes.

        `cache_dir` takes the Arrow copy of an own folder; mirrors use the cache of `datasets`, so that gigabytes are copied once.
        """
        line_break = "\n" if self.prompt_suffix and not self.prompt_suffix.startswith(" ") else ""
        kwargs = {"pre_prompt": "", "post_prompt": line_break + self.prompt_suffix}
        content = {
            "task": task,
            "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "until": []},
            "lmms_eval_specific_kwargs": {"default": kwargs},
        }
        if self.hub is None:
            return content | {
                "include": str(TASKS / f"_{self.metric}.yaml"),
                "dataset_path": str(self.folder.resolve()),
                "dataset_kwargs": {"cache_dir": str(Path(cache_dir).resolve())},
                "test_split": self.split,
            }
        folder = self.folder.resolve()
        if self.hub.picture_files:
            kwargs["pictures"] = [str(file) for file in sorted(folder.glob(self.hub.picture_files))]
        if self.metric == SUBMISSION:  # the sweep writes the file itself, from all of a cell's parts
            content["metric_list"] = [{"metric": SUBMISSION, "aggregation": "bypass", "higher_is_better": True}]
        files = [str(file) for file in sorted(folder.glob(self.hub.files))]
        return content | {
            "include": str(TASKS / f"{self.hub.name}.yaml"),
            "dataset_kwargs": {"data_files": {self.hub.split: files}},
        }

    def pictures(self) -> Iterator[tuple[str, bytes | None]]:
        """(picture_id, bytes) of every picture that is asked about, each once."""
        if self.hub is not None and self.hub.picture_files:
            files, columns = sorted(self.folder.glob(self.hub.picture_files)), ("id", "image")
            asked = {row["picture_id"] for row in self.rows}
            yield from ((row["id"], picture_bytes(row["image"])) for row in iterate_parquet(files, columns) if row["id"] in asked)
            return
        files = sorted(self.folder.glob(self.hub.files if self.hub else f"data/{self.split}-*.parquet"))
        number_of = {row.get("table_row", i): row["picture_id"] for i, row in enumerate(self.rows)}
        seen: set[str] = set()
        for number, row in enumerate(iterate_parquet(files, ("image",))):
            picture = number_of.get(number)
            if picture is not None and picture not in seen:
                seen.add(picture)
                yield picture, picture_bytes(row["image"])


class _TagBlindLoader(yaml.SafeLoader):
    """Reads task files without importing the functions they name."""


_TagBlindLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def _shipped_task(name: str) -> dict[str, Any] | None:
    path = TASKS / f"{name}.yaml"
    if not path.is_file() or name.startswith("_"):
        return None
    merged: dict[str, Any] = {}
    while path is not None:
        content = yaml.load(path.read_text(encoding="utf-8"), _TagBlindLoader)
        included = content.pop("include", None)
        merged = {**content, **merged}
        path = TASKS / included if included else None
    suffix = merged["lmms_eval_specific_kwargs"]["default"]["post_prompt"].removeprefix("\n")
    return {"metric": merged["metric_list"][0]["metric"], "prompt_suffix": suffix, "split": merged["test_split"]}


def find_benchmarks(root: str | Path, names: Iterable[str]) -> list[tuple[str, Path | UserError]]:
    """Folders of the named benchmarks below `root`; the name of a set (a folder of benchmarks) stands for its members.

    The name of a public benchmark stands for its mirror. A name that does not exist, or whose mirror does not, comes with a
    UserError that says what to do.
    """
    root = Path(root)
    names = list(names)
    public = {name: _mirror(root, HUB_SETS[name]) for name in names if name in HUB_SETS}
    if len(public) == len(names):
        return list(public.items())
    known = {str(data.parent.relative_to(root)): data.parent for data in sorted(root.glob("**/data")) if data.is_dir()}
    found: list[tuple[str, Path | UserError]] = []
    for name in names:
        members = [known_name for known_name in known if known_name.startswith(f"{name}/")]
        if name in public:
            found.append((name, public[name]))
        elif name in known:
            found.append((name, known[name]))
        elif members:
            found += [(member, known[member]) for member in members]
        elif not known and not name.startswith("aimv2_"):
            found.append((name, UserError(f"benchmarks: {name}: {root} holds no benchmark (<name>/data/*.parquet)")))
        else:
            near = difflib.get_close_matches(name, [*known, *HUB_SETS], n=3, cutoff=0.3) or sorted(known)[:3]
            found.append((name, UserError(f"benchmarks: {name} is not in {root}; nearest: {', '.join(near)}")))
    return found


def _mirror(root: Path, hub_set: HubSet) -> Path | UserError:
    folder = root / hub_set.folder
    if not folder.is_dir():
        return UserError(f"benchmarks: {hub_set.name}: {folder} is missing; put the files of {hub_set.hub} there "
                         "(`aimv2-vlm eval --plan CONFIG` lists all that is needed)")  # fmt: skip
    return folder


def check_mirror(hub_set: HubSet, folder: Path) -> int:
    """Number of rows in the files of a mirror. UserError where files or columns are missing; reads headers only."""
    import pyarrow
    import pyarrow.parquet

    total = 0
    wanted = [(hub_set.files, hub_set.all_columns)]
    wanted += [(hub_set.picture_files, ("id", "image"))] if hub_set.picture_files else []
    for pattern, columns in wanted:
        files = sorted(folder.glob(pattern))
        if not files:
            raise UserError(f"{folder}: no {pattern}; {hub_set.name} needs these files of {hub_set.hub}")
        check_parts(hub_set.hub, files)
        for file in files:
            try:
                with pyarrow.parquet.ParquetFile(file) as parquet:
                    _check_columns(file, parquet.schema_arrow.names, columns)
                    total += parquet.metadata.num_rows if pattern == hub_set.files else 0
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None
    return total


def _check_columns(file: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    missing = [column for column in wanted if column not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], present, n=2, cutoff=0.3) or present
        raise UserError(f"{file}: column {', '.join(missing)} missing; nearest to {missing[0]}: {', '.join(near)}")


def _digest_files(files: Iterable[Path]) -> Any:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest


def _read_mirror(hub_set: HubSet, folder: Path, pattern: str = "") -> Benchmark:
    """A public benchmark; with `pattern` other rows in its columns (training questions, for shots)."""
    import pyarrow.parquet

    if not pattern:
        check_mirror(hub_set, folder)
    files = sorted(folder.glob(pattern or hub_set.files))
    names = [pyarrow.parquet.read_schema(file).names for file in files]
    for file, present in zip(files, names, strict=True):
        _check_columns(file, present, hub_set.all_columns)
    columns = [*hub_set.columns, *(column for column in hub_set.optional if all(column in present for present in names))]
    rows = list(iterate_parquet(files, columns, batch=4096))

    def digests() -> list[str]:
        return [picture_digest(picture_bytes(row["image"])) for row in iterate_parquet(files, ("image",))]

    try:
        questions, kept = as_questions(hub_set, rows, digests)
    except ValueError as error:
        raise UserError(f"{files[0].parent}: {error}") from None
    for question, number in zip(questions, kept, strict=True):
        question["table_row"] = number
    digest = _digest_files([*files, *sorted(folder.glob(hub_set.picture_files))] if hub_set.picture_files else files)
    split = hub_set.split
    if not pattern and len(questions) != hub_set.rows:
        split = f"{split}, {len(questions)} of {hub_set.rows} questions"
    return Benchmark(hub_set.name, folder, split, hub_set.metric, hub_set.suffix, digest.hexdigest()[:16], questions, hub_set)


def _check_questions(folder: Path, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every question has an id of its own and a right answer; MME's come in pairs. Raises UserError."""
    if not rows:
        raise UserError(f"{folder}: the benchmark has no questions")
    ids = Counter(row["id"] for row in rows)
    twice = [row_id for row_id, count in ids.items() if count > 1]
    if twice:
        raise UserError(f"{folder}: {len(twice)} question ids occur more than once, for instance {twice[0]}")
    for row in rows:
        if not isinstance(row["answers"], list) or not all(isinstance(answer, str) for answer in row["answers"]):
            raise UserError(f"{folder}: question {row['id']}: answers must be a list of texts, not {row['answers']!r}")
        if metric != SUBMISSION and not row["answers"] or (metric in LETTER_METRICS and not row["answer_letter"]):
            raise UserError(f"{folder}: question {row['id']} has no answer for the metric {metric}")
    if metric == "mme":
        of_picture = Counter((row["attribute"], row["picture_id"]) for row in rows)
        odd = next((picture for (_, picture), count in of_picture.items() if count != 2), None)
        if odd is not None:
            raise UserError(f"{folder}: picture {odd} has not two questions; MME counts pairs")


def read_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Opens one folder and checks it. UserError names file, column or row, and the reason."""
    if name in HUB_SETS:
        benchmark = _read_mirror(HUB_SETS[name], Path(folder))
        _check_questions(benchmark.folder, benchmark.metric, benchmark.rows)
        return benchmark
    import pyarrow
    import pyarrow.parquet

    folder = Path(folder)
    card = folder / "benchmark.json"
    if card.is_file():
        try:
            declared = json.loads(card.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{card}: not JSON ({error})") from None
        if not isinstance(declared, dict):
            raise UserError(f"{card}: not a mapping with the key metric")
    else:
        declared = _shipped_task(name)
        if declared is None:
            raise UserError(f'{card}: missing; write {{"metric": one of {", ".join(METRIC_NAMES)}}} there')
    metric = declared.get("metric")
    if metric not in METRIC_NAMES:
        near = difflib.get_close_matches(str(metric), METRIC_NAMES, n=1, cutoff=0.0)[0]
        raise UserError(f"{card}: metric {metric!r} is not known; nearest: {near}")
    split = declared.get("split", "test")
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise UserError(f"{folder / 'data'}: no {split}-*.parquet")
    check_parts(name, files)
    digest, rows = _digest_files(files), []
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                present = parquet.schema_arrow.names
                _check_columns(file, present, COLUMNS)
                rows += parquet.read(columns=[column for column in present if column != "image"]).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None
    if card.is_file():
        digest.update(card.read_bytes())
    _check_questions(folder, metric, rows)
    suffix = declared.get("prompt_suffix", SUFFIX_OF_METRIC[metric])
    return Benchmark(name, folder, split, metric, suffix, digest.hexdigest()[:16], rows)


# ---------------------------------------------------------------------------------------------- controls


def wrong_pictures(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[dict[int, int], int]:
    """For each question the row whose picture it gets instead, and how many had to look beyond their own form.

    The other row has the same question form, another picture and none of the right answers; where no such row
    exists, any form serves. Depends on (seed, question id) only. UserError where even that fails.
    """
    by_form: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_form[row["question_form"]].append(i)
    right = [{normalize_answer(answer) for answer in row["answers"]} for row in rows]
    everything = list(range(len(rows)))

    def pick(i: int, candidates: list[int], generator: random.Random) -> int | None:
        def fits(j: int) -> bool:
            return rows[j]["picture_id"] != rows[i]["picture_id"] and right[i].isdisjoint(right[j])

        for _ in range(32):  # nearly always enough; the full search below is for rare forms
            j = generator.choice(candidates)
            if fits(j):
                return j
        fitting = [j for j in candidates if fits(j)]
        return generator.choice(fitting) if fitting else None

    chosen, num_other_form = {}, 0
    for i, row in enumerate(rows):
        generator = random.Random(f"{seed}/{row['id']}")
        j = pick(i, by_form[row["question_form"]], generator)
        if j is None:
            num_other_form += 1
            j = pick(i, everything, generator)
        if j is None:
            raise UserError(f"wrong_picture: no row has another picture and another answer than question {row['id']}")
        chosen[i] = j
    return chosen, num_other_form


_OPTION_LINE = re.compile(r"^[A-Z]\. ")


def _bare(prompt: str) -> str:
    """A prompt without picture markers, option lines and white space, to find equal questions by."""
    lines = [line for line in prompt.replace("<image>", " ").split("\n") if not _OPTION_LINE.match(line)]
    return " ".join(" ".join(lines).lower().split())


class TrainingAnswers:
    """Answers by question over the tuning conversations: what an assistant says that knows the question's text only."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._answers: dict[str, list[str]] = defaultdict(list)
        self._majorities: dict[tuple, list[str]] = {}
        self._digest = hashlib.sha256()
        for file in files:
            self._read(Path(file))

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:16]

    def _read(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"train_conversations: {file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
        self._digest.update(text.encode())
        try:
            jsonl = file.suffix == ".jsonl"
            rows = [json.loads(line) for line in text.splitlines() if line.strip()] if jsonl else json.loads(text)
        except ValueError as error:
            raise UserError(f"train_conversations: {file} is not JSON ({error})") from None
        if not isinstance(rows, list) or not any(isinstance(row, dict) and isinstance(row.get("conversations"), list) for row in rows):
            raise UserError(f"train_conversations: {file} has no row with conversations")
        for row in rows:  # what cannot be tuned on teaches no answer
            turns = row.get("conversations") if isinstance(row, dict) else None
            turns = [(turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or "")
                     for turn in (turns if isinstance(turns, list) else []) if isinstance(turn, dict)]
            turns = [(speaker, text) for speaker, text in turns if isinstance(text, str)]
            for (speaker, question), (answerer, answer) in itertools.pairwise(turns):
                if speaker in ("human", "user") and answerer in ("gpt", "assistant") and answer.strip():
                    self._answers[_bare(question)].append(answer.strip())

    def majority(self, benchmark: Benchmark) -> list[str] | None:
        """The most frequent training answer for each row's question; None without any.

        A question that training never asked falls back to all training questions of its form, then to all that end
        in the same prompt suffix, then to all.
        """
        if not self._answers:
            return None
        known = (benchmark.name, benchmark.data_hash, benchmark.prompt_suffix, len(benchmark.rows))
        if known not in self._majorities:  # every model and control of a sweep asks for the same ones
            self._majorities[known] = self._majority(benchmark)
        return self._majorities[known]

    def _majority(self, benchmark: Benchmark) -> list[str]:
        keys = [_bare(build_prompt(row["question"], (), benchmark.prompt_suffix)) for row in benchmark.rows]
        forms: dict[str, dict[str, None]] = defaultdict(dict)
        for row, key in zip(benchmark.rows, keys, strict=True):
            forms[row["question_form"]][key] = None
        of_key = {key: most_frequent(self._answers.get(key, ())) for key in dict.fromkeys(keys)}
        of_form = {
            form: most_frequent(text for key in members for text in self._answers.get(key, ()))
            for form, members in forms.items()
        }
        fallback = None
        if not all(of_form.values()):
            suffix = _bare(benchmark.prompt_suffix)
            alike = [text for key, texts in self._answers.items() if key.endswith(suffix) for text in texts]
            fallback = most_frequent(alike) or most_frequent(text for texts in self._answers.values() for text in texts)
        return [of_key[key] or of_form[row["question_form"]] or fallback for row, key in zip(benchmark.rows, keys, strict=True)]


# ---------------------------------------------------------------------------------------------- writing


def write_benchmark(folder: str | Path, rows: Iterable[Mapping[str, Any]], card: Mapping[str, Any]) -> Path:
    """Parquet in the schema above plus `benchmark.json`; `image` is {"bytes", "path"}. Missing fields are filled."""
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        id=text, picture_id=text, image=datasets.Image(), question=text, question_form=text,
        answers=datasets.List(text), options=datasets.List(text), answer_letter=text, attribute=text,
        print_height=datasets.Value("float64"), seen_in_train=datasets.Value("bool"),
    )  # fmt: skip
    filled = {"options": [], "answer_letter": "", "attribute": "", "print_height": float("nan"), "seen_in_train": None}
    table = datasets.Dataset.from_list([{**filled, **row} for row in rows], features=features)
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "data" / f"{card.get('split', 'test')}-00000-of-00001.parquet")
    (folder / "benchmark.json").write_text(json.dumps(dict(card), indent=1), encoding="utf-8")
    return folder


def convert_val_jsonl(jsonl: str | Path, out_dir: str | Path, image_root: str | Path | None = None) -> list[Path]:
    """Rows {id, image, question, answers, metric, source} to one benchmark folder per source, `out_dir/<source>`.

    Images are relative to `image_root` (default: the file's folder). A source with two metrics gets two folders.
    The picture's file is its identity, `attribute` is the source, questions asked often are their own form.
    """
    jsonl, out_dir = Path(jsonl), Path(out_dir)
    image_root = Path(image_root) if image_root is not None else jsonl.parent
    try:
        lines = jsonl.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"convert: {jsonl} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no mapping")
            missing = [key for key in ("id", "image", "question", "answers", "metric", "source") if key not in row]
        except ValueError as error:
            raise UserError(f"{jsonl}, line {number}: not JSON ({error})") from None
        if missing:
            raise UserError(f"{jsonl}, line {number}: {', '.join(missing)} missing")
        if not isinstance(row["answers"], list):
            raise UserError(f"{jsonl}, line {number}: answers must be a list, not {row['answers']!r}")
        if not isinstance(row["source"], str) or Path(row["source"]).name != row["source"]:
            raise UserError(f"{jsonl}, line {number}: source {row['source']!r} names the set's folder; write a word without / or ..")
        if row["metric"] not in METRIC_NAMES:
            near = difflib.get_close_matches(row["metric"], METRIC_NAMES, n=1, cutoff=0.0)[0]
            raise UserError(f"{jsonl}, line {number}: metric {row['metric']!r} is not known; nearest: {near}")
        if not (image_root / row["image"]).is_file():
            raise UserError(f"{jsonl}, line {number}: picture {image_root / row['image']} does not exist")
        groups[row["source"], row["metric"]].append(row)
    if not groups:
        raise UserError(f"{jsonl}: no rows")
    metrics_of = Counter(source for source, _ in groups)
    folders = []
    for (source, metric), rows in groups.items():
        asked = Counter(_bare(row["question"]) for row in rows)
        converted = (
            {
                "id": str(row["id"]),
                "picture_id": row["image"],
                "image": {"bytes": (image_root / row["image"]).read_bytes(), "path": row["image"]},
                "question": row["question"],
                "question_form": _bare(row["question"]) if asked[_bare(row["question"])] >= 5 else source,
                "answers": [str(answer) for answer in row["answers"]],
                "options": [str(option) for option in row.get("options", [])],
                "answer_letter": row.get("answer_letter", ""),
                "attribute": source,
                "seen_in_train": row.get("seen_in_train"),
            }
            for row in rows
        )
        name = source if metrics_of[source] == 1 else f"{source}_{metric}"
        suffix = SUFFIX_OF_METRIC[metric]
        card = {"metric": metric, "prompt_suffix": suffix, "split": "test", "source": jsonl.name}
        folders.append(write_benchmark(out_dir / name, converted, card))
    return folders
