"""The public benchmarks of Table C2 (and VizWiz, for Table 8) as their parquet mirrors lie on disk.

A mirror is `<data_root>/<last part of the hub name>/…`, the hub's own files unchanged. `read` makes of one row what every
benchmark of this package has: id, picture_id, question, question_form, answers, options, answer_letter, attribute.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2_vlm.config import UserError
from aimv2_vlm.evaluation.metrics import SUBMISSION

SINGLE_WORD = "Answer the question using a single word or phrase."  # Table C2
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SINGLE_WORD}"
YES_OR_NO = " Please answer yes or no."  # MME's own; the space keeps it on the question's line
MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """One benchmark of a hub data set. `rows` and `pictures` count what is asked, `table_rows` what the files hold."""

    name: str
    hub: str
    files: str  # glob below the mirror
    split: str
    metric: str
    suffix: str  # after the question, on a line of its own unless it begins with a space
    rows: int
    columns: tuple[str, ...]
    read: Callable[[Row], dict[str, Any] | None]  # None: the row belongs to another part of the data set
    optional: tuple[str, ...] = ()
    table_rows: int | None = None
    pictures: int | None = None  # None: as the files hold no identity of pictures, known only after reading them
    picture_files: str = ""  # pictures in a table of their own (columns id, image)
    train: str = ""  # glob of the files that shots are drawn from, in the same columns
    train_pictures: str = ""
    train_hub: bool = False  # whether the hub data set holds those files; if not, the user makes them
    licence: str = "not stated"
    gigabytes: float | None = None  # of these files on the hub

    @property
    def folder(self) -> str:
        return self.hub.rpartition("/")[2]

    @property
    def all_columns(self) -> tuple[str, ...]:
        return self.columns if self.picture_files else (*self.columns, "image")


# ------------------------------------------------------------------------------------------------ rows


def _question(
    row: Row, number: Any, picture: Any, answers: Iterable[Any] | None, form: Any = "", attribute: Any = "", **more: Any
) -> dict[str, Any]:
    """`picture` None: the picture's bytes are its identity."""
    question = {
        "id": str(number), "picture_id": None if picture is None else str(picture), "question": str(row.get("question") or ""),
        "question_form": str(form or ""), "answers": [str(answer) for answer in answers or ()], "options": [], "answer_letter": "",
        "attribute": str(attribute or form or ""),
    }
    return question | more


def _vqav2(row: Row) -> dict[str, Any]:
    answers = [answer["answer"] for answer in row["answers"] or ()]
    return _question(row, row["question_id"], row["image_id"], answers, row.get("question_type"), row.get("answer_type"))


def _okvqa(row: Row) -> dict[str, Any]:
    return _question(row, row["question_id"], None, row["answers"], row.get("question_type"))


def _textvqa(row: Row) -> dict[str, Any]:
    return _question(row, row["question_id"], row["image_id"], row["answers"])


def _gqa(row: Row) -> dict[str, Any]:
    types = row.get("types") or {}
    return _question(row, row["id"], row["imageId"], [row["answer"]], types.get("detailed"), types.get("structural"))


def _docvqa(row: Row) -> dict[str, Any]:
    page = f"{row['ucsf_document_id']}_{row['ucsf_document_page_no']}"
    return _question(row, row["questionId"], page, row["answers"], next(iter(row.get("question_types") or ()), ""))


def _infovqa(row: Row) -> dict[str, Any]:
    return _question(row, row["questionId"], row["image_url"], row["answers"], next(iter(row.get("answer_type") or ()), ""))


def _chartqa(row: Row) -> dict[str, Any]:
    return _question(row, row["row"], None, [row["answer"]], row["type"])


def _seed(row: Row) -> dict[str, Any] | None:
    if row["data_type"] != "image":
        return None
    options = [str(row[f"choice_{letter}"]) for letter in "abcd"]
    letter = str(row["answer"]).strip().upper()
    answer = options["ABCD".index(letter)] if letter in tuple("ABCD") else letter
    form = row.get("question_type_id")
    return _question(row, row["question_id"], None, [answer], form, options=options, answer_letter=letter)


def _scienceqa(row: Row) -> dict[str, Any] | None:
    options, index = [str(choice) for choice in row["choices"]], row["answer"]
    question = f"Context: {row['hint']}\n{row['question']}" if row["hint"] else row["question"]
    right = {"answer_letter": string.ascii_uppercase[index]} if 0 <= index < len(options) else {}
    answers = [options[index]] if right else []
    return _question(row, row["row"], None, answers, row.get("topic"), row.get("subject"), question=question, options=options, **right)


def _mme(row: Row) -> dict[str, Any] | None:
    if row["category"] not in MME_PERCEPTION:
        return None
    question = row["question"].strip().removesuffix(YES_OR_NO.strip()).strip()
    number = f"{row['question_id']}: {question}"  # the two questions of a picture share question_id
    picture = f"{row['category']}/{row['question_id']}"
    return _question(row, number, picture, [row["answer"]], row["category"], question=question)


def _captions(number: str, captions: str) -> Callable[[Row], dict[str, Any]]:
    """Captioning: the prompt is the whole question."""
    return lambda row: _question(row, row[number], row[number], row[captions], "caption", question=CAPTION)


def _vizwiz(row: Row) -> dict[str, Any]:
    return _question(row, row["question_id"], None, row["answers"], row.get("category"))


# ------------------------------------------------------------------------------------------------ the sets

_VQAV2 = ("question_id", "image_id", "question", "answers")
_DOC = ("questionId", "question", "answers", "ucsf_document_id", "ucsf_document_page_no")
_INFO = ("questionId", "question", "answers", "image_url")
_GQA = ("id", "imageId", "question", "answer")
_CC_BY = "CC BY 4.0"

HUB_SETS = {
    hub_set.name: hub_set
    for hub_set in (
        HubSet("aimv2_vqav2_val", "lmms-lab-encoder/VQAv2", "data/validation-*.parquet", "validation", "vqa_accuracy", SINGLE_WORD,
               214_354, _VQAV2, _vqav2, ("question_type", "answer_type"), pictures=40_504, train="data/train-*.parquet",
               licence=_CC_BY),
        HubSet("aimv2_okvqa_val", "lmms-lab-encoder/OK-VQA", "data/val2014-*.parquet", "val2014", "vqa_accuracy_challenge", SINGLE_WORD,
               5_046, ("question_id", "question", "answers"), _okvqa, ("question_type",), pictures=5_033,
               train="data/train2014-*.parquet", gigabytes=0.83),
        HubSet("aimv2_textvqa_val", "lmms-lab-encoder/textvqa", "data/validation-*.parquet", "validation", "vqa_accuracy_challenge",
               SINGLE_WORD, 5_000, ("question_id", "image_id", "question", "answers"), _textvqa, pictures=3_166,
               train="data/train-*.parquet", train_hub=True, licence=_CC_BY),
        HubSet("aimv2_gqa_val", "lmms-lab-encoder/GQA", "val_balanced_instructions/val-*.parquet", "val", "gqa_exact", SINGLE_WORD,
               132_062, _GQA, _gqa, ("types",), pictures=10_234, picture_files="val_balanced_images/val-*.parquet",
               train="train_balanced_instructions/train-*.parquet", train_pictures="train_balanced_images/train-*.parquet",
               train_hub=True, licence=_CC_BY, gigabytes=1.47),
        HubSet("aimv2_gqa_testdev", "lmms-lab-encoder/GQA", "testdev_balanced_instructions/testdev-*.parquet", "testdev", "gqa_exact",
               SINGLE_WORD, 12_578, _GQA, _gqa, ("types",), pictures=398, picture_files="testdev_balanced_images/testdev-*.parquet",
               train="train_balanced_instructions/train-*.parquet", train_pictures="train_balanced_images/train-*.parquet",
               train_hub=True, licence=_CC_BY),
        HubSet("aimv2_docvqa_val", "lmms-lab-encoder/DocVQA", "DocVQA/validation-*.parquet", "validation", "anls", SINGLE_WORD, 5_349,
               _DOC, _docvqa, ("question_types",), pictures=1_286, licence="Apache 2.0"),
        HubSet("aimv2_docvqa_test", "lmms-lab-encoder/DocVQA", "DocVQA/test-*.parquet", "test", SUBMISSION, SINGLE_WORD, 5_188,
               _DOC, _docvqa, ("question_types",), pictures=1_287, licence="Apache 2.0", gigabytes=1.11),
        HubSet("aimv2_infovqa_val", "lmms-lab-encoder/DocVQA", "InfographicVQA/validation-*.parquet", "validation", "anls", SINGLE_WORD,
               2_801, _INFO, _infovqa, ("answer_type",), pictures=500, licence="Apache 2.0"),
        HubSet("aimv2_infovqa_test", "lmms-lab-encoder/DocVQA", "InfographicVQA/test-*.parquet", "test", SUBMISSION, SINGLE_WORD, 3_288,
               _INFO, _infovqa, ("answer_type",), pictures=579, licence="Apache 2.0"),
        HubSet("aimv2_chartqa_test", "lmms-lab-encoder/ChartQA", "data/test-*.parquet", "test", "relaxed_accuracy", SINGLE_WORD, 2_500,
               ("type", "question", "answer"), _chartqa, licence="GPL 3.0"),
        HubSet("aimv2_seed_image", "lmms-lab-encoder/SEED-Bench", "data/test-*.parquet", "test", "first_letter", OPTION_LETTER, 14_233,
               ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type"), _seed,
               ("question_type_id",), table_rows=17_990, licence="CC BY-NC 4.0"),
        HubSet("aimv2_scienceqa_image", "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG/test-*.parquet", "test", "letter_alone",
               OPTION_LETTER, 2_017, ("question", "choices", "answer", "hint"), _scienceqa, ("topic", "subject"),
               licence="CC BY-NC-SA 4.0"),
        HubSet("aimv2_mme_perception", "lmms-lab-encoder/MME", "data/test-*.parquet", "test", "mme", YES_OR_NO, 2_114,
               ("question_id", "question", "answer", "category"), _mme, table_rows=2_374, pictures=1_057, gigabytes=0.87),
        HubSet("aimv2_coco2017_val", "lmms-lab-encoder/COCO-Caption2017", "data/val-*.parquet", "val", "cider", "", 5_000,
               ("question_id", "answer"), _captions("question_id", "answer"), pictures=5_000, train="data/train-*.parquet",
               licence=_CC_BY),
        HubSet("aimv2_textcaps_val", "lmms-lab-encoder/TextCaps", "data/val-*.parquet", "val", "cider", "", 3_166,
               ("image_id", "caption_str"), _captions("image_id", "caption_str"), pictures=3_166, train="data/train-*.parquet",
               train_hub=True, licence=_CC_BY),
        HubSet("aimv2_nocaps_val", "lmms-lab-encoder/NoCaps", "data/validation-*.parquet", "validation", "cider", "", 4_500,
               ("image_id", "annotations_captions"), _captions("image_id", "annotations_captions"), pictures=4_500,
               train="data/train-*.parquet", licence="CC BY 2.0", gigabytes=1.42),
        HubSet("aimv2_vizwiz_val", "lmms-lab-encoder/VizWiz-VQA", "data/val-*.parquet", "val", "vqa_accuracy_challenge", UNANSWERABLE,
               4_319, ("question_id", "question", "answers"), _vizwiz, ("category",), pictures=4_319,
               train="data/train-*.parquet", licence=_CC_BY),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ reading


def as_questions(
    hub_set: HubSet, rows: Sequence[Row], digests: Callable[[], Sequence[str]]
) -> tuple[list[dict[str, Any]], list[int]]:
    """The questions of a set's rows, and the number of the row each one came from.

    `digests` gives one identity a row; it is asked for only where the rows name no pictures. ValueError names a bad row.
    """
    questions, kept = [], []
    for number, row in enumerate(rows):
        try:
            question = hub_set.read({**row, "row": number})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"row {number} cannot be read ({type(error).__name__}: {error})") from None
        if question is not None:
            questions.append(question)
            kept.append(number)
    if any(question["picture_id"] is None for question in questions):
        of_row = digests()
        for question, number in zip(questions, kept, strict=True):
            question["picture_id"] = of_row[number]
    return questions, kept


def picture_bytes(cell: Any) -> bytes | None:
    """The bytes of a picture cell as datasets writes it: {bytes, path}, or a list of them, of which the first."""
    if isinstance(cell, (list, tuple)):
        cell = cell[0] if cell else None
    return cell.get("bytes") if isinstance(cell, Mapping) else cell


def picture_digest(data: bytes | None) -> str:
    """Identity of a picture by its bytes."""
    return hashlib.sha256(data or b"").hexdigest()[:16]


def iterate_parquet(files: Iterable[Path], columns: Sequence[str], batch: int = 64) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, one after the other, a few in memory. Raises UserError naming the file."""
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                for rows in parquet.iter_batches(batch_size=batch, columns=list(columns)):
                    yield from rows.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None
