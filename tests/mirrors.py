"""Miniature mirrors of the public benchmarks: the hub's folders, file names, columns and types, a few rows each."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TEN = ["red", "red", "red", "dark red", "red", "maroon", "red", "crimson", "Red.", "the red"]


def picture(seed: int, size: tuple[int, int] = (30, 40)) -> dict:
    """A JPEG of (height, width) coarse noise, as datasets stores it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return {"bytes": buffer.getvalue(), "path": f"{seed}.jpg"}


def write(folder: Path, name: str, rows: list[dict], features: dict) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name)


def run_mirrors(root: Path, out: Path, **keys) -> tuple[int, list[str], list[dict]]:
    """One sweep over mirrors with a tiny random assistant, `out/assistant`: its status, lines and ledger."""
    import datasets
    from test_evaluation import make_assistant

    from aimv2_vlm.config import EvalConfig
    from aimv2_vlm.evaluation.sweep import run_sweep
    from aimv2_vlm.recipe import build

    assistant = make_assistant(out / "assistant", positions=512)
    raw = dict(out=str(out), precision="fp32", benchmark_root=str(root), controls=[], limit=4, batch_size=4, max_new_tokens=4,
               models=[{"path": str(assistant), "name": "one"}])  # fmt: skip
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(out / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", out / "cache")
        status = run_sweep(build(EvalConfig, {**raw, **keys}, "test"), lines.append)
    return status, lines, [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


def write_mirrors(root: Path) -> Path:
    """All of them below `root`. Questions are words that a tiny tokenizer knows."""
    from datasets import Image as ImageColumn
    from datasets import List, Value

    text, number, image, texts = Value("string"), Value("int64"), ImageColumn(), List(Value("string"))

    votes = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(TEN)]
    vote = List({"answer": text, "answer_confidence": text, "answer_id": number})
    vqav2 = dict(question_type=text, multiple_choice_answer=text, answers=vote, image_id=number, answer_type=text, question_id=number,
                 question=text, image=image)  # fmt: skip
    for split, first in (("validation", 0), ("train", 100)):
        write(root / "VQAv2" / "data", f"{split}-00000-of-00001.parquet", [
            dict(question_type="what is", multiple_choice_answer="red", answers=votes, image_id=first + i // 2, answer_type="other",
                 question_id=10 * first + i, question="what is the colour ?", image=picture(first + i // 2))
            for i in range(12 if first else 4)], vqav2)  # fmt: skip

    short = dict(question_id=text, image=image, question=text, answers=texts, question_type=text, answer_type=text)
    for split, first in (("val2014", 200), ("train2014", 250)):
        write(root / "OK-VQA" / "data", f"{split}-00000-of-00001.parquet", [
            dict(question_id=str(first + i), image=picture(first + i), question="which dog ?", answers=TEN[:8] + [f"dog {i}"],
                 question_type="one", answer_type="other") for i in range(9)], short)  # fmt: skip

    textvqa = dict(image_id=text, question_id=Value("int32"), question=text, question_tokens=texts, image=image,
                   image_width=Value("int32"), image_height=Value("int32"), answers=texts, ocr_tokens=texts, set_name=text)  # fmt: skip
    for split, first in (("validation", 300), ("train", 350)):
        write(root / "textvqa" / "data", f"{split}-00000-of-00001.parquet", [
            dict(image_id=f"t{first + i}", question_id=first + i, question="what is the NASA picture ?", question_tokens=["what"],
                 image=picture(first + i), image_width=40, image_height=30, answers=TEN, ocr_tokens=["NASA"], set_name=split)
            for i in range(9)], textvqa)  # fmt: skip

    gqa = dict(id=text, imageId=text, question=text, answer=text, fullAnswer=text, isBalanced=Value("bool"),
               types={"structural": text, "semantic": text, "detailed": text})  # fmt: skip
    for split, first in (("val", 400), ("testdev", 430), ("train", 460)):
        write(root / "GQA" / f"{split}_balanced_instructions", f"{split}-00000-of-00001.parquet", [
            dict(id=f"{first}{i:03}", imageId=f"n{first + i // 2}", question="which one is red ?", answer=["cat", "dog"][i % 2],
                 fullAnswer="It is.", isBalanced=True, types={"structural": "query", "semantic": "obj", "detailed": "categoryThis"})
            for i in range(16)], gqa)  # fmt: skip
        write(root / "GQA" / f"{split}_balanced_images", f"{split}-00000-of-00001.parquet",
              [dict(id=f"n{first + i}", image=picture(first + i)) for i in reversed(range(8))], dict(id=text, image=image))  # fmt: skip

    doc = dict(questionId=text, question=text, question_types=texts, image=image, docId=number, ucsf_document_id=text,
               ucsf_document_page_no=text, answers=texts, data_split=text)  # fmt: skip
    info = dict(questionId=text, question=text, answers=texts, answer_type=texts, image=image, image_url=text,
                **{"operation/reasoning": texts}, ocr=text, data_split=text)  # fmt: skip
    for split in ("validation", "test"):
        answers = ["Red House", "red house 12"] if split == "validation" else None
        write(root / "DocVQA" / "DocVQA", f"{split}-00000-of-00001.parquet", [
            dict(questionId=str(500 + i), question="which house ?", question_types=["form"], image=picture(500 + i // 2, (60, 40)), docId=i,
                 ucsf_document_id=f"d{i // 2}", ucsf_document_page_no="1", answers=answers, data_split=split) for i in range(4)], doc)  # fmt: skip
        write(root / "DocVQA" / "InfographicVQA", f"{split}-00000-of-00001.parquet", [
            dict(questionId=str(600 + i), question="one two ?", answers=answers, answer_type=["single span"], image=picture(600 + i, (90, 30)),
                 image_url=f"url{i}", ocr="{}", data_split=split, **{"operation/reasoning": []}) for i in range(3)], info)  # fmt: skip

    write(root / "ChartQA" / "data", "test-00000-of-00001.parquet", [
        dict(type=["human_test", "augmented_test"][i % 2], question="which one ?", answer=["3.1", "Cat", "40%", "0"][i],
             image=picture(700 + i // 2)) for i in range(4)], dict(type=text, question=text, answer=text, image=image))  # fmt: skip

    seed = {**{f"choice_{letter}": text for letter in "abcd"}, "answer": text, "data_id": text, "data_type": text, "question": text,
            "question_id": text, "question_type_id": Value("int32"), "image": List(image), "segment": List(number)}  # fmt: skip
    write(root / "SEED-Bench" / "data", "test-00000-of-00001.parquet", [
        dict(choice_a="cat", choice_b="dog", choice_c="red", choice_d="blue", answer="ABCD"[i % 4], data_id=f"s{i}",
             data_type="video" if i in (0, 3) else "image", question="what is this ?", question_id=str(i), question_type_id=1 + i % 2,
             image=[picture(800 + i)] * (8 if i in (0, 3) else 1), segment=None) for i in range(6)], seed)  # fmt: skip

    science = dict(image=image, question=text, choices=texts, answer=Value("int8"), hint=text, task=text, grade=text, subject=text,
                   topic=text, category=text, skill=text, lecture=text, solution=text)  # fmt: skip
    write(root / "ScienceQA" / "ScienceQA-IMG", "test-00000-of-00001.parquet", [
        dict(image=picture(900 + i), question="which one ?", choices=["cat", "dog", "house"][: 2 + i % 2], answer=i % 2,
             hint=["", "the red house"][i % 2], task="closed choice", grade="grade4", subject="natural science", topic="biology",
             category="c", skill="s", lecture="", solution="") for i in range(4)], science)  # fmt: skip

    mme = dict(question_id=text, image=image, question=text, answer=text, category=text)
    write(root / "MME" / "data", "test-00000-of-00001-abc.parquet", [
        dict(question_id=f"{category}/{i}.png", image=picture(1000 + 10 * k + i), question=f"{word} cat ? Please answer yes or no.",
             answer=answer, category=category)
        for k, category in enumerate(["existence", "OCR", "code_reasoning"]) for i in range(2)
        for word, answer in (("one", "Yes"), ("two", "No"))], mme)  # fmt: skip

    captions = ["a red cat .", "one cat and a dog", "the picture of a house", "red house", "a cat"]
    coco = dict(question_id=text, image=image, question=text, answer=texts, id=number, license=Value("int32"), file_name=text,
                coco_url=text, height=Value("int32"), width=Value("int32"), date_captured=text)  # fmt: skip
    for split, first in (("val", 1100), ("train", 1150)):
        write(root / "COCO-Caption2017" / "data", f"{split}-00000-of-00001.parquet", [
            dict(question_id=f"{first + i:012}.jpg", image=picture(first + i), question="Please carefully observe the image.",
                 answer=[*captions, f"{['one', 'two', 'three'][i % 3]} dog"], id=first + i, license=1, file_name=f"{first + i}.jpg", coco_url="",
                 height=30, width=40, date_captured="") for i in range(9)], coco)  # fmt: skip

    textcaps = dict(question_id=text, question=text, image=image, image_id=text, caption_id=List(number), caption_str=texts,
                    reference_strs=texts, set_name=text)  # fmt: skip
    for split, first in (("val", 1200), ("train", 1250)):
        write(root / "TextCaps" / "data", f"{split}-00000-of-00001.parquet", [
            dict(question_id=f"q{first + i}", question="", image=picture(first + i), image_id=f"c{first + i}", caption_id=[1],
                 caption_str=[*captions, f"picture {first + i}"], reference_strs=captions, set_name=split) for i in range(9)], textcaps)  # fmt: skip

    nocaps = dict(image=image, image_coco_url=text, image_date_captured=text, image_file_name=text, image_height=Value("int32"),
                  image_width=Value("int32"), image_id=Value("int32"), image_license=Value("int8"), image_open_images_id=text,
                  annotations_ids=List(Value("int32")), annotations_captions=texts, image_domain=text)  # fmt: skip
    for split, first in (("validation", 1300), ("train", 1350)):
        write(root / "NoCaps" / "data", f"{split}-00000-of-00001.parquet", [
            dict(image=picture(first + i), image_coco_url="", image_date_captured="", image_file_name=f"{i}.jpg", image_height=30,
                 image_width=40, image_id=first + i, image_license=0, image_open_images_id="", annotations_ids=[i],
                 annotations_captions=[*captions, f"number {first + i}"], image_domain="in-domain") for i in range(9)], nocaps)  # fmt: skip

    vizwiz = dict(question_id=text, image=image, question=text, answers=texts, category=text)
    for split, first in (("val", 1400), ("train", 1450)):
        write(root / "VizWiz-VQA" / "data", f"{split}-00000-of-00001.parquet", [
            dict(question_id=f"VizWiz_{split}_{i}.jpg", image=picture(first + i), question="What is the NASA house ?",
                 answers=["unanswerable"] * 6 + ["house"] * 4, category="other") for i in range(9)], vizwiz)  # fmt: skip
    return root
