"""The functions that the task files name; lmms-eval loads this file by its path."""

import functools
import json

from aimv2_vlm.evaluation.benchmarks import build_prompt
from aimv2_vlm.evaluation.generation import open_picture
from aimv2_vlm.evaluation.hub_sets import HUB_SETS, as_questions, picture_bytes, picture_digest
from aimv2_vlm.evaluation.metrics import SINGLE_METRICS, benchmark_score, cider


def keep_picture_bytes(dataset):
    """Pictures stay undecoded until a question needs them: one broken picture must not end a whole benchmark."""
    from datasets import Image, List

    if "image" not in dataset.features:
        return dataset
    undecoded = Image(decode=False)
    several = isinstance(dataset.features["image"], (list, List))
    return dataset.cast_column("image", List(undecoded) if several else undecoded)


def doc_to_visual(doc):
    picture = doc["image"][0] if isinstance(doc["image"], list) else doc["image"]
    return [open_picture(picture["bytes"] or picture["path"])]


@functools.lru_cache(maxsize=2)
def _pictures_by_id(files):
    """(table, row of each id) of pictures that lie in files of their own."""
    import datasets

    table = keep_picture_bytes(datasets.load_dataset("parquet", data_files={"pictures": list(files)}, split="pictures"))
    return table, {number: row for row, number in enumerate(table["id"])}


def doc_to_visual_by_id(doc, lmms_eval_specific_kwargs):
    files = lmms_eval_specific_kwargs["pictures"]
    table, row_of = _pictures_by_id((files,) if isinstance(files, str) else tuple(files))
    if doc["picture_id"] not in row_of:
        raise KeyError(f"picture {doc['picture_id']} is not in {files}")
    return [open_picture(picture_bytes(table[row_of[doc["picture_id"]]]["image"]))]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    kwargs = lmms_eval_specific_kwargs or {}
    prompt = build_prompt(doc["question"], doc["options"], kwargs.get("post_prompt", "").removeprefix("\n"))
    return kwargs.get("pre_prompt", "") + prompt


def _as_questions(name, dataset):
    """The rows of a mirror in the columns that every benchmark of this package has; pictures stay where they are."""
    import datasets

    hub_set = HUB_SETS[name]
    dataset = keep_picture_bytes(dataset)
    columns = [column for column in (*hub_set.columns, *hub_set.optional) if column in dataset.column_names]

    def digests():
        return [picture_digest(picture_bytes(row["image"])) for row in dataset.select_columns(["image"])]

    questions, kept = as_questions(hub_set, dataset.select_columns(columns).to_list(), digests)
    text = datasets.Value("string")
    lists = dict.fromkeys(("answers", "options"), datasets.List(text))
    features = datasets.Features({column: lists.get(column, text) for column in questions[0]})
    table = datasets.Dataset.from_list(questions, features=features)
    if hub_set.picture_files:
        return table
    if len(kept) == len(dataset):
        return datasets.concatenate_datasets([table, dataset.select_columns(["image"])], axis=1)
    row_of = {row: number for number, row in enumerate(kept)}  # joined over all rows, then chosen: nothing is copied
    full = table.select([row_of.get(row, 0) for row in range(len(dataset))])
    return datasets.concatenate_datasets([full.flatten_indices(), dataset.select_columns(["image"])], axis=1).select(kept)


vqav2_val = functools.partial(_as_questions, "aimv2_vqav2_val")
okvqa_val = functools.partial(_as_questions, "aimv2_okvqa_val")
textvqa_val = functools.partial(_as_questions, "aimv2_textvqa_val")
gqa_val = functools.partial(_as_questions, "aimv2_gqa_val")
gqa_testdev = functools.partial(_as_questions, "aimv2_gqa_testdev")
docvqa_val = functools.partial(_as_questions, "aimv2_docvqa_val")
docvqa_test = functools.partial(_as_questions, "aimv2_docvqa_test")
infovqa_val = functools.partial(_as_questions, "aimv2_infovqa_val")
infovqa_test = functools.partial(_as_questions, "aimv2_infovqa_test")
chartqa_test = functools.partial(_as_questions, "aimv2_chartqa_test")
seed_image = functools.partial(_as_questions, "aimv2_seed_image")
scienceqa_image = functools.partial(_as_questions, "aimv2_scienceqa_image")
mme_perception = functools.partial(_as_questions, "aimv2_mme_perception")
coco2017_val = functools.partial(_as_questions, "aimv2_coco2017_val")
textcaps_val = functools.partial(_as_questions, "aimv2_textcaps_val")
nocaps_val = functools.partial(_as_questions, "aimv2_nocaps_val")
vizwiz_val = functools.partial(_as_questions, "aimv2_vizwiz_val")


def _process(metric, doc, results):
    return {metric: SINGLE_METRICS[metric](results[0], doc)}


process_exact_match = functools.partial(_process, "exact_match")
process_vqa_accuracy = functools.partial(_process, "vqa_accuracy")
process_vqa_accuracy_challenge = functools.partial(_process, "vqa_accuracy_challenge")
process_gqa_exact = functools.partial(_process, "gqa_exact")
process_anls = functools.partial(_process, "anls")
process_relaxed_accuracy = functools.partial(_process, "relaxed_accuracy")
process_option_letter = functools.partial(_process, "option_letter")
process_first_letter = functools.partial(_process, "first_letter")
process_letter_alone = functools.partial(_process, "letter_alone")


def process_cider(doc, results):
    return {"cider": {"prediction": results[0], "answers": doc["answers"]}}


def aggregate_cider(items):
    return float(cider([item["prediction"] for item in items], [item["answers"] for item in items]).mean())


def process_mme(doc, results):
    keys = ("attribute", "picture_id")
    return {"mme": {"score": SINGLE_METRICS["mme"](results[0], doc), **{key: doc[key] for key in keys}}}


def aggregate_mme(items):
    return benchmark_score("mme", [item["score"] for item in items], items)


def process_submission(doc, results):
    return {"submission": {"questionId": int(doc["id"]), "answer": results[0]}}


def aggregate_submission(items, args):
    from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

    with open(generate_submission_file("submission.json", args), "w", encoding="utf-8") as file:
        json.dump(items, file)
