"""Laws of batched generation: questions that share a prefix, stop tokens, in-context examples, checks, foreign model classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_evaluation import TEMPLATE, WORDS, _tokenizer, make_assistant, make_picture

from aimv2_vlm.evaluation.generation import Answer, GenerationError, Generator, Picture, Question, load_assistant

torch.set_num_threads(1)

TEXTS = [
    "what is the colour ?", "dog ?", "which one is the picture of the red house ? a . cat", "a b c one two three ?", "a", "what is the red ?",
    "blue green", "which cat is the house of the dog ? one two three",
]  # fmt: skip


def questions_about(pictures: list, texts: list[str] = TEXTS) -> list[Question]:
    return [Question(text, (Picture(i, lambda image=image: image),)) for i, image in enumerate(pictures) for text in texts]


def stock_ids(model, processor, question: Question, max_new_tokens: int) -> list[int]:
    """What a user of plain transformers gets for this question alone."""
    turns, pictures = [*question.before, ("user", question.prompt)], iter(question.pictures)
    places = question.places or (len(question.pictures), *[0] * (len(turns) - 1))
    messages = [
        {"role": role, "content": [*({"type": "image", "image": next(pictures).open()} for _ in range(count)), {"type": "text", "text": text}]}
        for (role, text), count in zip(turns, places, strict=True)
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.dtype), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def stock_answer(model, processor, question: Question, max_new_tokens: int) -> str:
    return processor.tokenizer.decode(stock_ids(model, processor, question, max_new_tokens), skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def assistants(tmp_path_factory) -> dict[int | str, Path]:
    root = tmp_path_factory.mktemp("generation")
    made = {tiles: make_assistant(root / f"tiles{tiles}", tiles) for tiles in (1, 2)}
    return made | {"unshuffled": make_assistant(root / "unshuffled", 2, unshuffle=2)}


@pytest.fixture
def opened(assistants):
    return load_assistant(assistants[1], "fp32", "cpu")


PICTURES = [make_picture(i, size) for i, size in enumerate([(40, 56), (56, 40), (30, 90)])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tiles", [1, 2, "unshuffled"])
def test_questions_that_share_a_picture_answer_as_if_alone(assistants, tiles, attention):
    model, processor = load_assistant(assistants[tiles], "fp32", "cpu")
    model.set_attn_implementation(attention)
    questions = questions_about(PICTURES)
    alone = [stock_ids(model, processor, question, 7) for question in questions]
    # Tokens that answers really contain end them too: rows and branches leave at different times.
    model.generation_config.eos_token_id = [2, alone[0][2], alone[5][4], alone[-1][1]]
    stock = [stock_answer(model, processor, question, 7) for question in questions]
    assert len({len(text.split()) for text in stock}) > 2 and len(set(stock)) > 6, "or equality shows nothing"
    for batch_size in (1, 4, 16):
        generator = Generator(model, processor, batch_size, 7)
        assert generator.shares_prefix
        answers = generator.answer(questions)
        expected = [processor.tokenizer.decode(_until_stop(stock_ids(model, processor, q, 7), generator.stop_ids), skip_special_tokens=True).strip()
                    for q in questions[:4]]  # fmt: skip
        assert list(answers[:4]) == expected and len(answers) == len(stock)
        for question, answer in zip(questions, answers, strict=True):
            check = generator.check(question, answer)
            assert not check.flip and not check.tie, check


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids))]


def test_what_questions_share_goes_through_the_decoder_once(opened):
    model, processor = opened
    generator = Generator(model, processor, 16, 1)
    questions = questions_about(PICTURES[:2])
    assert generator.shares_prefix
    seen = []
    model.model.language_model.register_forward_pre_hook(lambda module, args, named: seen.append(named["inputs_embeds"].shape[:2]), with_kwargs=True)
    generator.answer(questions)
    features = generator._encode({picture.key: picture for question in questions for picture in question.pictures})
    lengths = [len(generator._expanded_ids(question, [features[question.pictures[0].key]])) for question in questions]
    passed = sum(rows * width for rows, width in seen)
    assert passed == sum(lengths) - 7 * 2 * (1 + 2 + 4), (passed, lengths)  # <s>, "user :", four patches: once a picture instead of eight times


def test_an_answer_says_whether_it_was_cut(opened):
    model, processor = opened
    question = questions_about(PICTURES[:1])[0]
    ids = stock_ids(model, processor, question, 6)
    for share in (True, False):
        (cut,) = Generator(model, processor, 4, 6, share_features=share).answer([question])
        assert cut.cut and list(cut.token_ids) == ids
        model.generation_config.eos_token_id = [2, ids[3]]
        (ended,) = Generator(model, processor, 4, 6, share_features=share).answer([question])
        assert not ended.cut and list(ended.token_ids) == ids[: ids.index(ids[3])]
        model.generation_config.eos_token_id = 2


def test_in_context_examples_answer_as_if_alone_and_are_computed_once(tmp_path):
    model, processor = load_assistant(make_assistant(tmp_path, positions=1024), "fp32", "cpu")
    shots = tuple(Picture(f"shot{i}", lambda i=i: make_picture(7 + i)) for i in range(3))
    before = tuple(turn for i in range(3) for turn in (("user", f"{TEXTS[i]} " + "house dog " * 12), ("assistant", WORDS[12 + i])))
    questions = [
        Question(text, (*shots, Picture(i, lambda i=i: make_picture(i))), before, (1, 0, 1, 0, 1, 0, 1)) for i in range(5) for text in TEXTS[:2]
    ]
    generator = Generator(model, processor, 4, 6)
    assert generator.shares_prefix
    passed, decoder = [], model.model.language_model
    decoder.register_forward_pre_hook(lambda module, args, named: passed.append(named["inputs_embeds"][..., 0].numel()), with_kwargs=True)
    answers = generator.answer(questions, max_new_tokens=1)
    assert sum(passed) < 3 * max(passed), "the examples pass once, not once a question"
    answers = generator.answer(questions)
    assert list(answers) == [stock_answer(model, processor, question, 6) for question in questions]
    assert len(set(answers)) > 4, "or equality shows nothing"
    shuffled = replace(questions[0], before=(*before[:1], ("assistant", "cat cat"), *before[2:]))
    assert generator.answer([shuffled, *questions[1:3]])[0] == stock_answer(model, processor, shuffled, 6)


def test_pictures_in_turns_must_fit(opened):
    generator = Generator(*opened, 4, 6)
    (wrong,) = generator.answer([Question("a", (Picture(0, lambda: PICTURES[0]),), (("user", "b"),), (1, 1))])
    assert isinstance(wrong, GenerationError) and "places" in str(wrong)


@pytest.mark.parametrize("change", ["repetition_penalty", "sliding_window"])
def test_decoders_that_cannot_share_a_prefix_still_answer_as_if_alone(opened, change):
    model, processor = opened
    if change == "repetition_penalty":
        model.generation_config.repetition_penalty = 1.7
    else:
        model.config.text_config.sliding_window = 4096
    questions = questions_about(PICTURES[:2])
    generator = Generator(model, processor, 5, 6)
    assert not generator.shares_prefix
    assert list(generator.answer(questions)) == [stock_answer(model, processor, question, 6) for question in questions]


def test_a_batch_that_fails_is_answered_one_by_one(opened, monkeypatch):
    model, processor = opened
    questions = questions_about(PICTURES)
    expected = Generator(model, processor, 8, 4).answer(questions)
    features, rows = Generator._features, Generator._answer_rows

    def few_pictures(self, pixels):
        if len(pixels["pixel_values"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(self, pixels)

    def few_questions(self, members, rows_, max_new_tokens):
        if len(members) > 1 or members == [5]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(self, members, rows_, max_new_tokens)

    monkeypatch.setattr(Generator, "_features", few_pictures)
    assert Generator(model, processor, 8, 4).answer(questions) == expected
    monkeypatch.setattr(Generator, "_answer_rows", lambda self, members, rows, max_new_tokens: few_questions(self, members, rows, max_new_tokens))
    answers = Generator(model, processor, 8, 4).answer(questions)
    assert isinstance(answers[5], GenerationError) and "out of memory" in str(answers[5])
    assert answers[:5] + answers[6:] == expected[:5] + expected[6:]


def test_a_check_tells_a_flip_from_a_tie(opened):
    model, processor = opened
    question = questions_about(PICTURES[:1])[0]
    generator = Generator(model, processor, 4, 5)
    (answer,) = generator.answer([question])
    first, *rest = answer.token_ids
    other = next(token for token in range(5, 60) if token not in answer.token_ids)
    wrong = Answer("x", (first, other, *rest[1:]), True)
    check = generator.check(question, wrong)
    assert check.flip and not check.tie and check.gap > 0 and check.stock == answer
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[rest[0]]
    check = generator.check(question, generator._answer_of([first, max(other, rest[0]), *rest[1:]], True))
    assert check.tie and not check.flip and check.gap < 1e-4


# ---------------------------------------------------------------------------------------------- other people's checkpoints


def _clip_and_llama():
    from transformers import CLIPVisionConfig, LlamaConfig

    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=32
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return tokenizer, vision, text


def make_foreign(folder: Path, kind: str) -> Path:
    """What other projects publish: stock configs, stock processors with their own defaults."""
    import transformers as t

    torch.manual_seed(1)
    tokenizer, vision, text = _clip_and_llama()
    if kind == "llava":  # CLIP, layer -2 without CLS, centre crop
        model = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=4))
        images = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = t.LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    elif kind == "llava_next":
        pinpoints = [[28, 56], [56, 28], [56, 56]]
        model = t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=4, image_grid_pinpoints=pinpoints)
        )
        images = t.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
        processor = t.LlavaNextProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    elif kind == "cohere2_vision":  # marks around a picture and behind each tile
        model = t.Cohere2VisionForConditionalGeneration(t.Cohere2VisionConfig(
            vision_config=t.SiglipVisionConfig(image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                               vision_use_head=False),
            text_config=text, image_token_id=4, alignment_intermediate_size=64, tie_word_embeddings=False))  # fmt: skip
        images = t.Cohere2VisionImageProcessor(size={"height": 28, "width": 28}, patch_size=2, max_patches=6)
        for name, token in {"image_token": "<image>", "boi_token": "a", "eoi_token": "b", "img_line_break_token": "?"}.items():
            tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, name]
            setattr(tokenizer, name, token)
        processor = t.Cohere2VisionProcessor(images, tokenizer)
    else:
        config = t.Idefics3Config(
            vision_config=dict(image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
            text_config=text.to_dict(), image_token_id=4, scale_factor=2, pad_token_id=0,
        )  # fmt: skip
        model = t.Idefics3ForConditionalGeneration(config)
        size = {"longest_edge": 56}
        images = t.Idefics3ImageProcessor(size=size, max_image_size={"longest_edge": 28}, do_image_splitting=False)
        processor = t.Idefics3Processor(images, tokenizer, image_seq_len=4)
        model.resize_token_embeddings(len(tokenizer))  # it has added tokens of its own
    with torch.no_grad():  # answers that depend on the picture
        for name, parameter in model.named_parameters():
            if "linear_2.weight" in name or "modality_projection" in name:
                parameter.mul_(30)
    processor.chat_template = TEMPLATE
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llava", "llava_next", "cohere2_vision", "idefics3"])
def test_foreign_checkpoints_answer_as_plain_transformers_does(tmp_path, kind):
    model, processor = load_assistant(make_foreign(tmp_path, kind), "fp32", "cpu")
    questions = questions_about(PICTURES, TEXTS[:4])
    generator = Generator(model, processor, 3, 6)
    assert generator.share_features == generator.shares_prefix == kind.startswith("llava")
    answers = generator.answer(questions)
    assert list(answers) == [stock_answer(model, processor, question, 6) for question in questions]
    assert len(set(answers)) > 4, "or equality shows nothing"


# ---------------------------------------------------------------------------------------------- lmms-eval's requests


class Docs(list):
    features = ("image",)


def test_questions_about_equal_pictures_share_their_encoding_whatever_the_data_set_calls_them(assistants):
    from aimv2_vlm.evaluation.lmms_model import AssistantModel

    path, checked = str(assistants[1]), frozenset(range(8))
    assistant = AssistantModel(pretrained=path, device="cpu", precision="fp32", batch_size=8, checked=checked, record_errors=True)
    docs = Docs([{"image": make_picture(i % 2)} for i in range(8)])
    assistant.task_dict = {"t": {"test": docs}}
    requests = [SimpleNamespace(args=(TEXTS[i], {"max_new_tokens": 4}, lambda doc: [doc["image"]], i, "t", "test")) for i in range(8)]
    encoded = []
    assistant.generator.model.model.vision_tower.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    answers = assistant.generate_until(requests)
    assert len(assistant.tokens_seen) == 2 and sum(encoded) == 2 + 8  # the checks encode theirs anew
    assert sorted(assistant.checks) == list(range(8)) and not any(check["flip"] or check["tie"] for check in assistant.checks.values())
    assert [check["stock"] for _, check in sorted(assistant.checks.items())] == answers and assistant.num_cut == 8


def test_units_are_stored_taken_up_and_left_to_who_holds_them(tmp_path):
    from aimv2_vlm.evaluation.sweep import Units

    first, second = Units(tmp_path / "cell", 4, 10), Units(tmp_path / "cell", 4, 10)
    assert first.count == 3 and first.open_units() == [0, 1, 2] and not first.complete
    with first._claim(1) as mine:
        assert mine and second.open_units() == [0, 2]
        assert second.run(1, lambda: pytest.fail("answered twice")) is None
    assert second.run(1, lambda: {"answers": ["a"]})["answers"] == ["a"]
    assert first.run(1, lambda: pytest.fail("answered twice"))["answers"] == ["a"] and first.open_units() == [0, 2]
    with pytest.raises(ZeroDivisionError):
        first.run(0, lambda: 1 / 0)
    assert second.open_units() == [0, 2] and not json.loads((tmp_path / "cell" / "000001.json").read_text()).get("error")
