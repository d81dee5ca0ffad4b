"""Laws of generation and sweeps, on tiny random assistants, through the real lmms-eval code."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFile

from aimv2_vlm.config import EvalConfig, EvalModel, UserError
from aimv2_vlm.data.chat import build_processor
from aimv2_vlm.data.transforms import BadImage
from aimv2_vlm.evaluation.generation import (
    GenerationError,
    Generator,
    Picture,
    Question,
    load_assistant,
    open_picture,
    prepare_for,
    tiling_of,
)

torch.set_num_threads(1)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = (
    "user assistant : ? . a b c what which is the colour of picture red blue green one two three cat dog house".split()
)


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    vocab = {
        token: i
        for i, token in enumerate(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", "<image>", *letters, *WORDS]))
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def make_assistant(folder: Path, tiles: int = 1, seed: int = 0, positions: int = 256, unshuffle: int = 1) -> Path:
    """A random Llava (one view of 28 px, 4 patches) or LlavaNext (2 x 2 tiles), as stock classes save it; with `unshuffle`, a
    Cohere2Vision (at most 2 x 2 tiles) with our processor."""
    from transformers import (
        Aimv2VisionConfig,
        Cohere2VisionConfig,
        Cohere2VisionForConditionalGeneration,
        Cohere2VisionImageProcessor,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessor,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    vision = Aimv2VisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, use_head=False, tie_last_hidden_states=True,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    shared = dict(
        vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    if unshuffle > 1:
        model = Cohere2VisionForConditionalGeneration(Cohere2VisionConfig(
            vision_config=vision, text_config=text, image_token_id=4, downsample_factor=unshuffle, alignment_intermediate_size=64, tie_word_embeddings=False))
        images = Cohere2VisionImageProcessor(size=size, patch_size=2 // unshuffle, max_patches=tiles**2)
    elif tiles == 1:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        images = LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size)
        kind = LlavaProcessor
    else:
        pinpoints = [[28 * tiles, 28 * tiles]]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints))
        images = LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=pinpoints)
        kind = LlavaNextProcessor
    with torch.no_grad():  # larger picture features, so that answers depend on the picture
        model.model.multi_modal_projector.linear_2.weight.mul_(30)
    if unshuffle > 1:
        processor = build_processor(tokenizer, images, 14, TEMPLATE, "<image>")
    else:
        processor = kind(
            image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )  # fmt: skip
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_picture(index: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    """A picture of (height, width) pixels with stripes that depend on `index`."""
    picture = Image.new("RGB", size[::-1], ((37 * index) % 256, (91 * index) % 256, (151 * index + 60) % 256))
    draw = ImageDraw.Draw(picture)
    for line in range(index % 5 + 1):
        draw.rectangle(
            [line * 9, 0, line * 9 + 4, size[0]], fill=((60 * line) % 256, 255 - 40 * line, (80 * index) % 256)
        )
    return picture


@pytest.fixture(scope="module")
def assistants(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("assistants")
    return {tiles: make_assistant(root / f"tiles{tiles}", tiles) for tiles in (1, 2)}


PROMPTS = [
    "what is the colour ?",
    "which one is the picture of the red house ?\na . cat",
    "dog ?",
    "a b c one two three ?",
]


@pytest.mark.parametrize("tiles", [1, 2])
def test_batched_answers_equal_stock_answers_one_at_a_time(assistants, tiles):
    model, processor = load_assistant(assistants[tiles], "fp32", "cpu")
    images = [make_picture(i, size) for i, size in enumerate([(40, 56), (56, 40), (30, 90), (28, 28)])]
    pairs = [(image, prompt) for prompt in PROMPTS for image in images]
    stock = []
    for image, prompt in pairs:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        stock.append(
            processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    assert len(set(stock)) > 4, "the answers must differ, or equality shows nothing"

    shared = Generator(model, processor, batch_size=5, max_new_tokens=6).answer([([i], p) for i, p in pairs])
    assert shared == stock
    plain = Generator(model, processor, batch_size=5, max_new_tokens=6, share_features=False)
    assert plain.answer([([i], p) for i, p in pairs]) == stock


def test_texts_without_pictures_and_pictures_mix_in_one_call(assistants):
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    questions = [
        ([make_picture(1)], PROMPTS[0]),
        ([], PROMPTS[0]),
        ([make_picture(2), make_picture(3)], PROMPTS[2]),
        ([], PROMPTS[1]),
    ]
    together = Generator(model, processor, batch_size=4, max_new_tokens=5).answer(questions)
    alone = [
        Generator(model, processor, batch_size=1, max_new_tokens=5).answer([question])[0] for question in questions
    ]
    assert together == alone
    assert together[0] != together[1], "the blind prompt is another prompt"


def test_each_picture_is_encoded_once(assistants):
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    generator = Generator(model, processor, batch_size=2, max_new_tokens=2)
    opened, encoded = [], []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    pictures = [Picture(i, lambda i=i: opened.append(i) or make_picture(i)) for i in range(3)]
    generator.answer([Question(f"{word} ?", (pictures[i],)) for word in WORDS[:20] for i in range(3)])
    assert sorted(opened) == [0, 1, 2] and sum(encoded) == 3
    assert generator.tokens_seen == {0: 4, 1: 4, 2: 4}


def test_one_bad_picture_or_prompt_is_its_own_error_only(assistants):
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    buffer = io.BytesIO()
    make_picture(4, (80, 80)).save(buffer, "JPEG")
    broken = Picture("broken", lambda: open_picture(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    good = Picture("good", lambda: make_picture(5))
    questions = [
        Question(PROMPTS[0], (good,)),
        Question(PROMPTS[0], (broken,)),
        Question("a " * 300, (good,)),
        Question(PROMPTS[1], (good,)),
    ]
    for share in (True, False):
        generator = Generator(model, processor, batch_size=4, max_new_tokens=4, share_features=share)
        answers = generator.answer(questions)
        assert isinstance(answers[1], GenerationError) and "broken" in str(answers[1])
        assert isinstance(answers[2], GenerationError) and "256 positions" in str(answers[2])
        assert answers[0] == generator.answer(questions[:1])[0] and answers[3] == generator.answer(questions[3:])[0]


def test_control_tokens_typed_in_a_question_stay_text(assistants):
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    generator = Generator(model, processor, max_new_tokens=3)
    question = Question("what is <image> and </s> ?", (Picture(0, lambda: make_picture(0)),))
    ids = generator._prompt_ids(question)
    assert ids.count(model.config.image_token_id) == 1 and 2 not in ids and ids.count(1) == 1
    assert isinstance(generator.answer([question])[0], str)


def test_source_size_brings_the_longer_side_down_and_changes_no_token_count(assistants):
    model, processor = load_assistant(assistants[2], "fp32", "cpu")
    assert prepare_for(processor, make_picture(0, (40, 80)), 20).size == (20, 10)
    assert prepare_for(processor, make_picture(0, (8, 16)), 20).size == (16, 8)
    counts = {}
    for source_size in (None, 14):
        generator = Generator(model, processor, max_new_tokens=2, source_size=source_size)
        generator.answer([Question(PROMPTS[0], (Picture(0, lambda: make_picture(0, (56, 56))),))])
        counts[source_size] = generator.tokens_seen[0]
    assert counts[None] == counts[14] == 4 + 4 * (4 + 1)  # overview, then 4 x 4 patches with one newline a row


def test_a_picture_longer_than_the_decoder_is_refused_at_load(tmp_path):
    model, processor = load_assistant(make_assistant(tmp_path / "short", tiles=2, positions=20), "fp32", "cpu")
    with pytest.raises(UserError, match="one picture takes 24 tokens, the decoder has 20 positions"):
        Generator(model, processor)


def test_another_grid_than_the_checkpoints_is_possible_for_tiles_only(assistants):
    model, processor = load_assistant(assistants[2], "fp32", "cpu")
    assert tiling_of(model, processor) == "2x2"
    generator = Generator(model, processor, max_new_tokens=2, tiling="1x2")
    generator.answer([([make_picture(0, (28, 56))], PROMPTS[0])])
    assert generator.tiling == "1x2" and list(generator.tokens_seen.values()) == [4 + 2 * (4 + 1)]
    for nonsense in ("1x1", "0x2", "two"):
        with pytest.raises(UserError, match="tiling"):
            Generator(model, processor, tiling=nonsense)
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    with pytest.raises(UserError, match="LlavaNext"):
        Generator(model, processor, tiling="2x2")


def test_unusable_checkpoints_are_refused_in_one_line(tmp_path, assistants):
    with pytest.raises(UserError, match="config.json is missing"):
        load_assistant(tmp_path / "nothing")
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(assistants[1], tmp_path / "incomplete")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.multi_modal_projector.linear_1.weight", None) or weights.pop(
        "multi_modal_projector.linear_1.weight"
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing.*linear_1"):
        load_assistant(folder)
    folder = shutil.copytree(assistants[1], tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as an assistant"):
        load_assistant(folder)
    folder = shutil.copytree(assistants[1], tmp_path / "speechless")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        load_assistant(folder)
    folder = shutil.copytree(assistants[1], tmp_path / "blind")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="processor"):
        load_assistant(folder)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "I;16", "RGBA", "1"])
def test_every_kind_of_picture_opens_as_rgb(mode, tmp_path):
    buffer = io.BytesIO()
    picture = Image.new("I;16", (9, 7), 40000) if mode == "I;16" else make_picture(3, (7, 9)).convert(mode)
    picture.save(buffer, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    opened = open_picture(buffer.getvalue())
    assert opened.mode == "RGB" and opened.size == (9, 7)
    if mode == "I;16":
        assert abs(opened.getpixel((3, 3))[0] - 40000 / 257) <= 1


def test_truncated_pictures_raise_even_when_pillow_is_tolerant(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        make_picture(3, (90, 90)).save(buffer, kind)
        with pytest.raises(BadImage):
            open_picture(buffer.getvalue()[: len(buffer.getvalue()) // 2])


# ---------------------------------------------------------------------------------------------- as in tuning

SHAPES = {"wide": (30, 91), "chart": (30, 91), "tall": (90, 31), "square": (60, 60)}  # two of one shape: one batch


@pytest.fixture(scope="module")
def tuning_rows(tmp_path_factory) -> Path:
    """A conversation about each picture of SHAPES, in the folder of the pictures."""
    folder = tmp_path_factory.mktemp("tuning_rows")
    rows = []
    for index, (name, size) in enumerate(SHAPES.items()):
        make_picture(index, size).save(folder / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a circle"}]
        rows.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """Saved assistants of this package by (tiling, pad_square); random, with answers that depend on the picture."""
    from aimv2_vlm.data.chat import train_chat_tokenizer
    from aimv2_vlm.models.assistant import build_assistant
    from aimv2_vlm.models.encoder import build_encoder

    root = tmp_path_factory.mktemp("tuned")
    train_chat_tokenizer(["What is shown? a red circle 12"] * 10, root / "tokenizer", 400)
    llm = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    folders = {}
    for tiling in ("1x1", "2x2"):
        for pad_square in (True, False):
            torch.manual_seed(0)
            encoder = build_encoder(image_size=28, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
            model, processor = build_assistant(
                encoder, None, tiling, tokenizer=str(root / "tokenizer"), llm_config=llm, pad_square=pad_square,
                image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28], max_new_tokens=6,
            )  # fmt: skip
            with torch.no_grad():
                model.lm_head.weight.normal_(std=1.0)
                model.model.multi_modal_projector.linear_2.weight.mul_(30)
            folder = folders[tiling, pad_square] = root / f"{tiling}-{pad_square}"
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("source_size", [None, 40])
@pytest.mark.parametrize("pad_square", [True, False])
@pytest.mark.parametrize("tiling", ["1x1", "2x2"])
def test_pixels_and_prompts_are_those_of_tuning(tuned, tuning_rows, tiling, pad_square, source_size):
    from aimv2_vlm.data.chat import IGNORED, ChatFormat
    from aimv2_vlm.data.collate import InstructionDataset
    from aimv2_vlm.data.conversations import ConversationSet
    from aimv2_vlm.data.tiling import Tiling
    from aimv2_vlm.data.transforms import normalize

    model, processor = load_assistant(tuned[tiling, pad_square], "fp32", "cpu")
    data = InstructionDataset(
        ConversationSet([SimpleNamespace(path=str(tuning_rows / "rows.json"), images=str(tuning_rows), take="all")]),
        ChatFormat(processor.tokenizer, processor.chat_template, processor.image_token),
        Tiling.from_processor(processor, source_size),
        processor.image_processor,
    )
    rows = [data.fetch(index) for index in range(len(SHAPES))]
    for row in rows:  # handed over as uint8, normalised on the device
        row.pictures = [normalize(views, processor.image_processor.image_mean, processor.image_processor.image_std) for views in row.pictures]
    tuned_on = torch.cat([row.pictures[0] for row in rows])
    prompts = [[token for token, label in zip(row.input_ids, row.labels) if label == IGNORED] for row in rows]
    expected = []
    for row, ids in zip(rows, prompts, strict=True):
        views = {"pixel_values": row.pictures[0]}
        if tiling != "1x1":
            views = {"pixel_values": row.pictures[0][None], "image_sizes": torch.tensor(row.image_sizes)}
        output = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, **views)
        expected.append(processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip())
    assert len(set(expected)) > 2, "the answers must differ, or equality shows nothing"

    questions = [
        Question("What?", (Picture(name, lambda name=name: open_picture(tuning_rows / f"{name}.png")),))
        for name in SHAPES
    ]
    for share in (True, False):
        generator = Generator(
            model, processor, batch_size=20, max_new_tokens=6, source_size=source_size, share_features=share
        )
        seen = []
        hook = model.model.vision_tower.register_forward_pre_hook(
            lambda module, args, named: seen.append(args[0] if args else named["pixel_values"]), with_kwargs=True
        )
        answers = generator.answer(questions)
        hook.remove()
        torch.testing.assert_close(torch.cat(seen), tuned_on, atol=1e-6, rtol=1e-6)
        assert answers == expected
        counts = [ids.count(model.config.image_token_id) for ids in prompts]
        assert list(generator.tokens_seen.values()) == counts


def test_chat_shows_the_model_what_tuning_did(tuned, tuning_rows, monkeypatch, capsys):
    from aimv2_vlm.serve.chat import CONTROLS, chat

    picture = tuning_rows / "wide.png"
    answers = []
    for folder in (tuned["2x2", True], tuned["2x2", False]):  # equal weights
        model, processor = load_assistant(folder, "fp32", "cpu")
        (answer,) = Generator(model, processor, max_new_tokens=6).answer([([open_picture(picture)], "What?")])
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}.gone\n/image {picture}\nWhat?\n"))
        assert chat(str(folder), max_new_tokens=6) == 0
        out, err = capsys.readouterr()
        assert answer and CONTROLS.sub("\ufffd", answer) in out
        assert "wide.png.gone: no picture" in err
        answers.append(answer)
    assert answers[0] != answers[1], "padding must matter, or equality shows nothing"


# ---------------------------------------------------------------------------------------------- sweeps


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_rows(num_pictures: int = 5) -> list[dict]:
    rows = []
    for index in range(num_pictures):
        for form, prompt in enumerate(PROMPTS[:2]):
            rows.append(
                {
                    "id": f"q{index}-{form}",
                    "picture_id": f"p{index}",
                    "image": {"bytes": jpeg(make_picture(index)), "path": f"p{index}.jpg"},
                    "question": prompt.split("\n")[0],
                    "question_form": f"form{form}",
                    "answers": [WORDS[10 + (index + form) % 4]],
                    "attribute": ["color", "shape"][form],
                }
            )
    return rows


@pytest.fixture(scope="module")
def oracle_rows(assistants) -> list[dict]:
    """Questions whose right answers are what the assistant "one" says: it must score 100, and only with the picture."""
    model, processor = load_assistant(assistants[1], "fp32", "cpu")
    generator = Generator(model, processor, batch_size=1, max_new_tokens=5)
    rows = make_rows()
    for row in rows:
        image = open_picture(row["image"]["bytes"])
        row["answers"] = [generator.answer([([image], f"{row['question']}\none word .")])[0]]
    assert len({row["answers"][0] for row in rows}) > 4
    return rows


@pytest.fixture(scope="module")
def benchmark_root(tmp_path_factory, oracle_rows) -> Path:
    from aimv2_vlm.evaluation.benchmarks import write_benchmark

    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmark(root / "set" / "words", oracle_rows, {"metric": "exact_match", "prompt_suffix": "one word ."})
    captions = [{**row, "answers": [*row["answers"], f"{WORDS[17 + i]} cat"]} for i, row in enumerate(oracle_rows[::2])]
    write_benchmark(root / "set" / "captions", captions, {"metric": "cider", "prompt_suffix": "one word ."})
    return root


@pytest.fixture(scope="module")
def conversations(tmp_path_factory, oracle_rows) -> Path:
    path = tmp_path_factory.mktemp("tuning") / "train.json"
    often = oracle_rows[0]["answers"][0]
    question = {"from": "human", "value": f"<image>\n{PROMPTS[0]}\none word ."}
    path.write_text(
        json.dumps(
            [
                {"id": i, "image": "x.jpg", "conversations": [question, {"from": "gpt", "value": answer}]}
                for i, answer in enumerate(["colour", often, often])
            ]
        )
    )
    return path


def make_config(
    out: Path, root: Path, models: dict[str, Path], conversations: Path | None = None, **changes
) -> EvalConfig:
    values = dict(
        out=str(out), seed=3, precision="fp32", benchmarks=["set"], benchmark_root=str(root),
        train_conversations=[str(conversations)] if conversations else [], batch_size=4, max_new_tokens=5, unit=4, checked=3,
        models=[EvalModel(str(path), name) for name, path in models.items()],
    )  # fmt: skip
    return EvalConfig(**{**values, **changes})


def sweep(config) -> tuple[int, list[str]]:
    from aimv2_vlm.evaluation.sweep import run_sweep

    lines: list[str] = []
    return run_sweep(config, lines.append), lines


def comparable(ledger: Path) -> list[dict]:
    return [{**json.loads(line), "seconds": 0} for line in ledger.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, benchmark_root, assistants, conversations):
    """One undisturbed sweep: two models x two benchmarks x three arms."""
    out = tmp_path_factory.mktemp("sweep")
    config = make_config(out, benchmark_root, {"one": assistants[1], "two": assistants[2]}, conversations)
    status, lines = sweep(config)
    return SimpleNamespace(config=config, out=out, status=status, lines=lines, rows=comparable(out / "ledger.jsonl"))


def test_a_sweep_fills_the_ledger_with_what_a_number_needs(finished):
    assert finished.status == 0 and "finished, 12 cells" in finished.lines[-1]
    assert [(row["model"], row["benchmark"], row["control"]) for row in finished.rows] == [
        (model, benchmark, control)
        for model in ("one", "two")
        for benchmark in ("set/captions", "set/words")
        for control in (None, "blind", "wrong_picture")
    ]
    for row in finished.rows:
        assert row["split"] == "test" and row["num_errors"] == 0 and row["complete"]
        assert row["num_pictures"] == 5 and row["num_questions"] == (5 if "captions" in row["benchmark"] else 10)
        assert row["tiling"] == {"one": "1x1", "two": "2x2"}[row["model"]]
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
        assert row["versions"]["lmms_eval"] and row["prompt_hash"] and row["data_hash"] and row["model_digest"]
        samples = [json.loads(line) for line in (finished.out / row["samples"]).read_text().splitlines()]
        assert len(samples) == row["num_questions"]
        assert row["score"] == pytest.approx(100 * sum(s["score"] for s in samples) / len(samples), abs=1e-3)
        assert (row["tokens_per_picture"] == 0) == (row["control"] == "blind")
    words = {row["control"]: row for row in finished.rows if (row["model"], row["benchmark"]) == ("one", "set/words")}
    assert words[None]["prompt"] == "what is the colour ?\none word ." and words[None]["metric"] == "exact_match"
    assert words[None]["score"] == 100 > max(words["blind"]["score"], words["wrong_picture"]["score"])
    assert not (finished.out / "work").exists() and (finished.out / "failed.jsonl").read_text() == ""


def test_the_majority_answer_is_that_of_the_same_question(finished, oracle_rows):
    row = next(row for row in finished.rows if row["benchmark"] == "set/words")
    samples = [json.loads(line) for line in (finished.out / row["samples"]).read_text().splitlines()]
    often = oracle_rows[0]["answers"][0]
    assert {sample["majority"] for sample in samples if sample["question_form"] == "form0"} == {often}
    assert row["majority_score"] == pytest.approx(
        100 * sum(s["answers"] == [s["majority"]] for s in samples) / len(samples)
    )
    assert row["majority_score"] >= 10


def test_blind_shows_nothing_and_wrong_pictures_belong_to_other_answers(finished):
    from aimv2_vlm.evaluation.metrics import normalize_answer

    for row in finished.rows:
        samples = [json.loads(line) for line in (finished.out / row["samples"]).read_text().splitlines()]
        answers = {(s["picture_id"], s["question_form"]): {normalize_answer(a) for a in s["answers"]} for s in samples}
        for sample in samples:
            shown = sample["shown_picture_id"]
            if row["control"] != "wrong_picture":
                assert shown == (None if row["control"] == "blind" else sample["picture_id"])
            else:
                own = answers[sample["picture_id"], sample["question_form"]]
                assert shown != sample["picture_id"] and own.isdisjoint(answers[shown, sample["question_form"]])


def test_uses_picture_is_the_score_over_the_best_control(finished):
    from aimv2_vlm.evaluation.sweep import summary

    table = {(row["model"], row["benchmark"]): row for row in summary(finished.out / "ledger.jsonl")}
    assert len(table) == 4
    for row in table.values():
        best = max(value for value in (row["blind"], row["wrong_picture"], row["majority"]) if value is not None)
        assert row["uses_picture"] == pytest.approx(row["score"] - best)


def test_a_finished_sweep_says_so_and_does_nothing(finished):
    before = (finished.out / "ledger.jsonl").read_bytes()
    status, lines = sweep(finished.config)
    assert status == 0 and "0 to run" in lines[0] and "finished" in lines[-1]
    assert (finished.out / "ledger.jsonl").read_bytes() == before


def test_a_sweep_cut_inside_a_line_ends_with_the_same_ledger(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "cut")
    lines = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (out / "ledger.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][: len(lines[9]) // 2])
    for row in finished.rows[9:]:
        (out / row["samples"]).unlink()
    assert_goes_on(finished, out, missing=3)


def test_processes_share_a_sweep_and_leave_the_ledger_of_one(finished, tmp_path, capfd, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):  # as torchrun sets them
        monkeypatch.setenv(name, value)
    status, lines = sweep(replace(finished.config, out=str(tmp_path), processes=2))
    assert status == 0 and "finished, 12 cells" in lines[-1]
    assert comparable(tmp_path / "ledger.jsonl") == finished.rows
    helper = capfd.readouterr().out
    assert "sweep: finished, 12 cells" in helper and "failed" not in helper
    assert not (tmp_path / "work").exists()


def test_a_sweep_stopped_inside_a_cell_goes_on_inside_the_cell(finished, tmp_path, monkeypatch):
    config = replace(finished.config, out=str(tmp_path), benchmarks=["set/words"], controls=[], models=finished.config.models[:1])
    stock, asked = Generator.answer, []

    def stopping(self, questions, *more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return stock(self, questions, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Generator, "answer", stopping)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    assert asked == [4, 4]
    monkeypatch.setattr(Generator, "answer", lambda self, questions, *more: asked.append(len(questions)) or stock(self, questions, *more))
    assert sweep(config)[0] == 0 and asked == [4, 4, 2]
    (expected,) = (row for row in finished.rows if (row["model"], row["benchmark"], row["control"]) == ("one", "set/words", None))
    assert comparable(tmp_path / "ledger.jsonl") == [expected]


def test_the_ledger_says_what_was_checked_and_cut(finished):
    for row in finished.rows:
        samples = [json.loads(line) for line in (finished.out / row["samples"]).read_text().splitlines()]
        assert row["num_checked"] == 3 == sum(sample["check"] is not None for sample in samples) and row["flips"] == row["ties"] == 0
        assert all(sample["check"]["stock"] == sample["prediction"] for sample in samples if sample["check"])
        assert row["num_cut"] > 0 and row["first_error"] is None


KILLED = """
import json, os, signal, sys
from types import SimpleNamespace
from PIL import ImageFile
from aimv2_vlm.config import EvalConfig
from aimv2_vlm.evaluation.sweep import run_sweep

def progress(line):
    if os.path.exists(config.out + "/ledger.jsonl") and len(open(config.out + "/ledger.jsonl").readlines()) == 2:
        assert "lmms_eval" in sys.modules and ImageFile.LOAD_TRUNCATED_IMAGES is False
        os.kill(os.getpid(), signal.SIGKILL)

config = json.loads(sys.argv[1], object_hook=lambda fields: SimpleNamespace(**fields))
config = EvalConfig(**vars(config) | {"convert": {}, "prompts": {}})
run_sweep(config, progress)
"""


def test_a_killed_sweep_ends_with_the_same_ledger_and_pillow_stays_strict(finished, tmp_path):
    config = replace(finished.config, out=str(tmp_path / "killed"))
    text = json.dumps(vars(config), default=vars)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, text], capture_output=True, text=True, timeout=600, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert_goes_on(finished, Path(config.out), missing=10)


def assert_goes_on(finished, out: Path, missing: int) -> None:
    status, events = sweep(replace(finished.config, out=str(out)))
    assert status == 0 and f"{12 - missing} finished before, {missing} to run" in events[0]
    assert comparable(out / "ledger.jsonl") == finished.rows
    for row in finished.rows:
        assert (out / row["samples"]).read_bytes() == (finished.out / row["samples"]).read_bytes()


def test_a_changed_checkpoint_runs_again_and_replaces_its_rows(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "again")
    changed = make_assistant(tmp_path / "changed", tiles=1, seed=9)
    models = [EvalModel(str(changed), "one"), finished.config.models[1]]
    status, events = sweep(replace(finished.config, out=str(out), models=models))
    rows = comparable(out / "ledger.jsonl")
    assert status == 0 and "6 finished before, 6 to run" in events[0] and len(rows) == 12
    assert events[1] == ("6 rows are of another checkpoint, data or setting and stand until their successors are finished: one / set/captions, one / set/words")
    assert len({row["model_digest"] for row in rows if row["model"] == "one"}) == 1
    assert {row["model_digest"] for row in rows} != {row["model_digest"] for row in finished.rows}


def test_an_exception_is_a_counted_error_and_never_an_empty_answer(assistants, tmp_path, monkeypatch):
    from aimv2_vlm.evaluation.benchmarks import write_benchmark

    rows = make_rows()
    rows[4]["image"] = {"bytes": rows[4]["image"]["bytes"][:200], "path": "cut.jpg"}
    rows[5]["image"] = rows[4]["image"]
    write_benchmark(tmp_path / "root" / "words", rows, {"metric": "exact_match"})
    original = Generator._answer_rows

    def failing(self, members, rows, max_new_tokens):
        if any(i == 0 for i in members):
            raise RuntimeError("injected")
        return original(self, members, rows, max_new_tokens)

    monkeypatch.setattr(Generator, "_answer_rows", failing)
    config = make_config(tmp_path / "out", tmp_path / "root", {"one": assistants[1]}, benchmarks=["words"], controls=[], unit=10)
    status, lines = sweep(config)
    (row,) = comparable(tmp_path / "out" / "ledger.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "out" / row["samples"]).read_text().splitlines()]
    failed = [sample for sample in samples if sample["error"]]
    assert status == 1 and row["num_errors"] == 3 and not row["complete"] and row["num_questions"] == 10
    assert [sample["id"] for sample in failed] == ["q0-0", "q2-0", "q2-1"]
    assert all(sample["prediction"] is None and sample["score"] is None for sample in failed)
    assert "injected" in failed[0]["error"] and "p2" in failed[1]["error"]
    assert any("incomplete" in line and "3 questions" in line for line in lines)


def test_the_same_command_asks_again_only_what_has_no_answer(assistants, tmp_path, monkeypatch):
    from aimv2_vlm.evaluation.benchmarks import write_benchmark

    write_benchmark(tmp_path / "root" / "words", make_rows(), {"metric": "exact_match", "prompt_suffix": "one word ."})
    stock, asked, broken = Generator.answer, [], [True]

    def answering(self, questions, *more):
        asked.append(len(questions))
        given = stock(self, questions, *more)
        return [GenerationError("out of memory"), *given[1:]] if broken[0] and len(asked) == 2 else given

    monkeypatch.setattr(Generator, "answer", answering)
    config = make_config(tmp_path / "out", tmp_path / "root", {"one": assistants[1]}, benchmarks=["words"], controls=[])
    status, lines = sweep(config)
    (first,) = comparable(tmp_path / "out" / "ledger.jsonl")
    assert status == 1 and first["num_errors"] == 1 and "asks what has no answer again" in lines[-1] and asked == [4, 4, 2]
    broken[0] = False
    status, lines = sweep(config)
    (row,) = comparable(tmp_path / "out" / "ledger.jsonl")
    assert status == 0 and "1 to run" in lines[0] and asked == [4, 4, 2, 4], "answers that were given stay"
    assert row["complete"] and row["num_errors"] == 0 and row["key"] == first["key"] and not (tmp_path / "out" / "work").exists()
    assert sweep(replace(config, out=str(tmp_path / "undisturbed")))[0] == 0
    assert comparable(tmp_path / "undisturbed" / "ledger.jsonl") == [row]


def test_controls_of_an_older_checkpoint_do_not_stay_beside_a_new_score(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "again")
    changed = make_assistant(tmp_path / "changed", tiles=1, seed=9)
    config = replace(finished.config, out=str(out), models=[EvalModel(str(changed), "one")], benchmarks=["set/words", "set/words"], controls=[])
    status, lines = sweep(config)
    assert status == 0 and lines[0] == "sweep: 1 cells, 0 finished before, 1 to run", "named twice, asked once"
    rows = comparable(out / "ledger.jsonl")
    assert [row["control"] for row in rows if (row["model"], row["benchmark"]) == ("one", "set/words")] == [None]
    assert [row for row in rows if row["model"] == "two"] == [row for row in finished.rows if row["model"] == "two"]


@pytest.mark.parametrize("path", ["/unmounted/one", "runs/one"])
def test_a_checkpoint_that_is_not_there_keeps_its_rows(finished, tmp_path, path, monkeypatch):
    """Also one whose path may be a name on the hub."""
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(finished.out, tmp_path / "again")
    config = replace(finished.config, out=str(out), models=[EvalModel(path, "one")])
    status, _ = sweep(config)
    assert status == 1 and comparable(out / "ledger.jsonl") == finished.rows and path in (out / "failed.jsonl").read_text()


def test_rows_stand_until_those_that_follow_them_are_there(finished, tmp_path, monkeypatch):
    """A quick look at a few questions that fails in the middle: the whole rows it has not got to are still there."""
    from aimv2_vlm.evaluation import sweep as module

    out, run = shutil.copytree(finished.out, tmp_path / "again"), module._run_cell

    def fails_at_captions(cell, *rest):
        if cell.benchmark.name == "set/captions":
            raise RuntimeError("out of memory")
        return run(cell, *rest)

    monkeypatch.setattr(module, "_run_cell", fails_at_captions)
    status, _ = sweep(replace(finished.config, out=str(out), models=finished.config.models[:1], limit=2))
    rows = comparable(out / "ledger.jsonl")
    of = lambda rows, name: [row for row in rows if (row["model"], row["benchmark"]) == ("one", name)]  # noqa: E731
    assert status == 1 and of(rows, "set/captions") == of(finished.rows, "set/captions")
    assert [row["num_questions"] for row in of(rows, "set/words")] == [2, 2, 2]


def test_an_evaluation_of_another_kind_does_not_take_the_place_of_a_row(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "again")
    rows = comparable(out / "ledger.jsonl")
    (out / "ledger.jsonl").write_text("".join(json.dumps(row | {"kind": "probing"}) + "\n" for row in rows))
    with pytest.raises(UserError, match="holds one / set/.* from an evaluation of kind probing; choose another out="):
        sweep(replace(finished.config, out=str(out)))
    assert len(comparable(out / "ledger.jsonl")) == len(rows)


def test_a_sweep_removes_nothing_that_it_did_not_write(assistants, benchmark_root, tmp_path):
    from aimv2_vlm.evaluation.sweep import evaluate

    kept = [tmp_path / name for name in ("work/my_photos/a.jpg", "samples/mine.jsonl", "notes.txt")]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    config = make_config(tmp_path, benchmark_root, {"one": assistants[1]}, benchmarks=["set/words"], controls=[], limit=2)
    with pytest.raises(UserError, match="models: empty"):
        evaluate(replace(config, models=[]), restart=True)
    assert evaluate(config) == evaluate(config, restart=True) == 0 and all(file.exists() for file in kept)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["my_photos"]


def test_a_checkpoint_is_known_by_its_adapter_too(tmp_path):
    from aimv2_vlm.evaluation.sweep import digest_checkpoint

    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for content in ("one", "two"):
        (tmp_path / "adapter" / "adapter_model.safetensors").write_text(content)
        found.add(digest_checkpoint(str(tmp_path)))
    assert len(found) == 2


def test_without_the_sweep_lmms_eval_stops_instead_of_scoring_an_error(assistants, monkeypatch):
    from aimv2_vlm.evaluation.lmms_model import AssistantModel, UnansweredError

    assistant = AssistantModel(pretrained=str(assistants[1]), device="cpu", precision="fp32", batch_size="2")
    assistant.task_dict = {"t": {"test": Docs([{"image": None}])}}
    request = SimpleNamespace(args=("dog ?", {"max_new_tokens": 2}, lambda doc: doc["nothing"], 0, "t", "test"))
    with pytest.raises(UnansweredError, match="1 requests have no answer; t 0: .*KeyError"):
        assistant.generate_until([request])


class Docs(list):
    """Rows of a foreign task: no picture_id among their columns."""

    features = ("image",)


def test_bad_benchmarks_and_models_are_one_line_each_and_the_sweep_goes_on(assistants, benchmark_root, tmp_path):
    import pyarrow.parquet

    root = shutil.copytree(benchmark_root, tmp_path / "root")
    shutil.copytree(root / "set" / "words", root / "narrow")
    file = root / "narrow" / "data" / "test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(
        table.rename_columns(["answer" if c == "answers" else c for c in table.column_names]), file
    )
    shutil.copytree(root / "set" / "words", root / "doubled")
    rows = make_rows(2)
    from aimv2_vlm.evaluation.benchmarks import write_benchmark

    write_benchmark(root / "doubled", [*rows, rows[0]], {"metric": "anls"})
    models = {"one": assistants[1], "gone": tmp_path / "gone"}
    config = make_config(
        tmp_path / "out", root, models, benchmarks=["set/wrods", "narrow", "doubled", "set/words"], controls=[]
    )
    status, _ = sweep(config)
    assert status == 1
    assert [row["benchmark"] for row in comparable(tmp_path / "out" / "ledger.jsonl")] == ["set/words"]
    failures = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    reasons = {(failure["model"], failure["benchmark"]): failure["reason"] for failure in failures}
    assert "nearest: set/words" in reasons["one", "set/wrods"]
    assert "column answers missing; nearest to answers: answer" in reasons["one", "narrow"]
    assert "q0-0" in reasons["one", "doubled"]
    assert "config.json is missing" in reasons["gone", "set/words"]
    assert all("\n" not in reason for reason in reasons.values()) and len(reasons) == 7


def test_evaluate_writes_the_report_and_restart_forgets(assistants, benchmark_root, tmp_path):
    from aimv2_vlm.evaluation.sweep import evaluate

    config = make_config(
        tmp_path, benchmark_root, {"one": assistants[1]}, benchmarks=["set/words"], controls=[], limit=3
    )
    assert evaluate(config) == 0 and "set/words" in (tmp_path / "report.html").read_text()
    before = comparable(tmp_path / "ledger.jsonl")[0]
    assert evaluate(replace(config, limit=2), restart=True) == 0 and not (tmp_path / before["samples"]).exists()
    assert [row["num_questions"] for row in comparable(tmp_path / "ledger.jsonl")] == [2]


def test_two_different_sweeps_into_one_folder_are_refused(finished, monkeypatch):
    from aimv2_vlm.evaluation import sweep as module

    monkeypatch.setattr(module, "PATIENCE_S", 0)
    with module._joined(finished.out, finished.config):
        with pytest.raises(UserError, match="another config"):
            sweep(replace(finished.config, seed=4))
        with pytest.raises(UserError, match="another process"), module._locked(finished.out):
            pass


def test_a_broken_line_inside_the_ledger_is_named(tmp_path):
    from aimv2_vlm.evaluation.sweep import read_ledger

    (tmp_path / "ledger.jsonl").write_text('{"key": 1}\n{"key"\n{"key": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_the_manifest_is_light_and_names_an_importable_model():
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from aimv2_vlm.evaluation import lmms_manifest

    assert "import" not in Path(lmms_manifest.__file__).read_text().split("def manifest")[0]
    registry = ModelRegistryV2()
    registry.register_manifest(lmms_manifest.manifest())
    assert issubclass(registry.get_model_class("aimv2_vlm"), lmms)
    assert importlib.import_module("aimv2_vlm.evaluation.lmms_model") is sys.modules["aimv2_vlm.evaluation.lmms_model"]


def test_shipped_tasks_run_by_name_from_the_folder_of_the_benchmarks(assistants, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from aimv2_vlm.evaluation.benchmarks import TASKS, read_benchmark, write_benchmark
    from aimv2_vlm.evaluation.lmms_model import AssistantModel

    rows = [{**row, "options": ["red", "blue"], "answer_letter": "AB"[i % 2], "answers": [["red", "blue"][i % 2]]}
            for i, row in enumerate(make_rows(2))]  # fmt: skip
    names = ["scenes_objects", "scenes_print", "scenes_choice", "scenes_heldout", "scenes_captions"]
    for name in names:
        write_benchmark(tmp_path / name, rows, {"metric": "anls"})
        (tmp_path / name / "benchmark.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    results = simple_evaluate(
        model=AssistantModel(pretrained=str(assistants[1]), device="cpu", precision="fp32", max_new_tokens=3),
        tasks=list(names),
        task_manager=TaskManager(include_path=[str(TASKS)], include_defaults=False),
        bootstrap_iters=0,
    )
    for name in names:
        benchmark = read_benchmark(name, tmp_path / name)
        assert f"{benchmark.metric},none" in results["results"][name]
        assert results["samples"][name][0]["arguments"][0] == benchmark.prompts[0]
    assert (
        "A. red\nB. blue\nAnswer with the option's letter"
        in read_benchmark("scenes_choice", tmp_path / "scenes_choice").prompts[0]
    )
