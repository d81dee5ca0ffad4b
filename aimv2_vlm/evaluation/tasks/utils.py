"""The functions that the task files name; lmms-eval loads this file by its path."""

from aimv2_vlm.evaluation.benchmarks import build_prompt
from aimv2_vlm.evaluation.generation import open_picture
from aimv2_vlm.evaluation.metrics import SINGLE_METRICS, cider


def keep_picture_bytes(dataset):
    """Pictures stay undecoded until a question needs them: one broken picture must not end a whole benchmark."""
    from datasets import Image

    return dataset.cast_column("image", Image(decode=False))


def doc_to_visual(doc):
    return [open_picture(doc["image"]["bytes"] or doc["image"]["path"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    kwargs = lmms_eval_specific_kwargs or {}
    prompt = build_prompt(doc["question"], doc["options"], kwargs.get("post_prompt", "").removeprefix("\n"))
    return kwargs.get("pre_prompt", "") + prompt


def _process(metric, doc, results):
    return {metric: SINGLE_METRICS[metric](results[0], doc)}


def process_exact_match(doc, results):
    return _process("exact_match", doc, results)


def process_anls(doc, results):
    return _process("anls", doc, results)


def process_relaxed_accuracy(doc, results):
    return _process("relaxed_accuracy", doc, results)


def process_option_letter(doc, results):
    return _process("option_letter", doc, results)


def process_cider(doc, results):
    return {"cider": {"prediction": results[0], "answers": doc["answers"]}}


def aggregate_cider(items):
    return float(cider([item["prediction"] for item in items], [item["answers"] for item in items]).mean())
