"""The label laws, for every template: prompts are prefixes, answers are learned exactly, rows give no special token."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from aimv2_vlm.config import UserError
from aimv2_vlm.data.chat import (
    IGNORED,
    VICUNA_SYSTEM,
    ChatFormat,
    RowTooLong,
    TemplateError,
    build_processor,
    chat_template,
    prepare_tokenizer,
    train_chat_tokenizer,
)
from aimv2_vlm.data.conversations import IMAGE, Conversation, Turn
from aimv2_vlm.data.tiling import Tiling, image_processor

TILING = Tiling((1, 1), 28, 14)  # 4 tokens a picture
TEXTS = [
    "What is shown in the picture? Answer the question using a single word or phrase.",
    "a red circle, 19.5 % of 2048",
    "USER: and ASSISTANT: are words\nof a template\n\n",
    "Ein Bild: naïve Größe, 漢字",
    "yes",
    "no",
] * 20
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
DATED = "{{- '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' -}}" + CHATML
KINDS = ["llama3", "vicuna", "plain", "own", "own, bos put before it"]  # the last: a template without BOS, a tokenizer with one, and today's date


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tokenizers by template."""
    out = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_chat_tokenizer(TEXTS, out / kind, 600, "plain" if kind.startswith("own") else kind)
    return {kind: out / kind for kind in KINDS}


def make(folder, kind):
    """(format, stock processor); `own` is a ChatML decoder with a tokenizer that knows no pictures."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind.startswith("own"):
        tokenizer.add_special_tokens(
            {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False
        )
        tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML if kind == "own" else DATED
    if kind != "own" and kind.startswith("own"):
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    image_token = prepare_tokenizer(tokenizer)
    template = chat_template(kind.split(",")[0], image_token, tokenizer.chat_template)
    images = image_processor(TILING, [0.5] * 3, [0.5] * 3)
    return ChatFormat(tokenizer, template, image_token), build_processor(tokenizer, images, 14, template, image_token)


@pytest.fixture(scope="module")
def formats(folders):
    return {kind: make(folder, kind) for kind, folder in folders.items()}


SPECIAL = [
    IMAGE,
    "<|eot_id|>",
    "</s>",
    "<s>",
    "<|image|>",
    "<|begin_of_text|>",
    "<|im_end|>",
    "<pad>",
    "<unk>",
    "<|end_of_text|>",
]
# "▁" is how sentencepiece writes a space: it cannot be told from one.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
plain_text = st.lists(
    st.text(characters, max_size=4)
    | st.sampled_from(["\n", "\n\n", " ", "  ", "\t", "word", "Answer:", " 12", "'s", "\r\n"]),
    max_size=4,
).map("".join)
wild_text = st.lists(st.text(characters, max_size=3) | st.sampled_from([*SPECIAL, "\n", " ", "word"]), max_size=5).map(
    "".join
)


def is_plain(text):
    return not any(special in text for special in SPECIAL)


@st.composite
def conversations(draw, text):
    turns, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        parts = [draw(text).replace(IMAGE, "")]
        for _ in range(draw(st.integers(0, 2))):
            images.append("picture")
            parts += [IMAGE, draw(text).replace(IMAGE, "")]
        turns.append(Turn("user", "".join(parts)))
        turns.append(Turn("assistant", draw(text.filter(str.strip))))
    system = draw(st.none() | text.filter(str.strip))
    return Conversation("row", tuple(images), tuple(turns), system and system.strip())


def messages(conversation, number_of_turns):
    """What a user of plain transformers writes."""
    out = (
        [{"role": "system", "content": [{"type": "text", "text": conversation.system}]}] if conversation.system else []
    )
    picture = Image.new("RGB", (30, 20))
    for turn in conversation.turns[:number_of_turns]:
        content = []
        for number, part in enumerate(turn.text.split(IMAGE) if turn.role == "user" else [turn.text]):
            content += [{"type": "image", "image": picture}] if number else []
            content += [{"type": "text", "text": part}] if part else []
        out.append({"role": turn.role, "content": content})
    return out


def spans(labels):
    """[start, end) of every run of supervised tokens; runs of two answers never touch."""
    edges = [
        i
        for i in range(len(labels) + 1)
        if (i < len(labels) and labels[i] != IGNORED) != (0 < i and labels[i - 1] != IGNORED)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def decode(chat, ids):
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(conversation=conversations(plain_text.filter(is_plain)))
def test_what_inference_tokenises_is_a_prefix_of_the_training_ids_at_every_turn(formats, kind, conversation):
    chat, processor = formats[kind]
    row = chat.assemble(conversation, [4] * len(conversation.images))
    starts = [start for start, _ in spans(row.labels)]
    assert len(starts) == len(conversation.turns) // 2
    for number, start in enumerate(starts):
        prompt = processor.apply_chat_template(
            messages(conversation, 2 * number + 1), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        assert list(prompt) == row.ids[:start]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(conversation=conversations(wild_text))
def test_answers_are_learned_exactly_and_rows_give_no_special_token(formats, kind, conversation):
    chat, _ = formats[kind]
    row = chat.assemble(conversation, [4] * len(conversation.images))
    answers = [turn.text.strip() for turn in conversation.turns[1::2]]
    assert [decode(chat, row.ids[a:b]) for a, b in spans(row.labels)] == [
        a + decode(chat, chat.end_ids) for a in answers
    ]
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))

    harmless = [
        Turn(t.role, IMAGE.join("x" for _ in t.text.split(IMAGE)) if t.role == "user" else "x")
        for t in conversation.turns
    ]
    same = chat.assemble(
        Conversation("row", conversation.images, tuple(harmless), conversation.system and "x"),
        [4] * len(conversation.images),
    )
    assert [i for i in row.ids if i in chat.special_ids] == [i for i in same.ids if i in chat.special_ids]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(conversation=conversations(wild_text))
def test_own_prompts_are_prefixes_too(formats, kind, conversation):
    """Also where the text holds special tokens' names, which stock inference would take for the tokens."""
    chat, _ = formats[kind]
    row = chat.assemble(conversation, [4] * len(conversation.images))
    for number, (start, _) in enumerate(spans(row.labels)):
        turns = conversation.turns[: 2 * number + 1]
        counts = [4] * sum(turn.text.count(IMAGE) for turn in turns[::2])
        assert chat.prompt_ids(turns, counts, conversation.system) == row.ids[:start]


def test_text_of_each_template(formats):
    row = Conversation(
        "row",
        ("a",),
        (Turn("user", f"{IMAGE}\nWhat?"), Turn("assistant", " yes\n"), Turn("user", "And?"), Turn("assistant", "no")),
    )
    shown = {kind: decode(chat, chat.assemble(row, [2]).ids) for kind, (chat, _) in formats.items()}
    assert shown["llama3"] == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|><|image|>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    )
    assert (
        shown["vicuna"]
        == f"<s>{VICUNA_SYSTEM} USER: <image><image>\nWhat? ASSISTANT: yes</s>USER: And? ASSISTANT: no</s>"
    )
    assert shown["plain"] == "<|begin_of_text|><|image|><|image|>\nWhat?\nyes<|end_of_text|>And?\nno<|end_of_text|>"
    assert shown["own"] == (
        "<|im_start|>user\n<|image|><|image|>\nWhat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )


def test_a_template_without_bos_gets_the_one_stock_processors_put_and_one_date_for_all_days(formats):
    chat, _ = formats[KINDS[-1]]
    row = chat.assemble(Conversation("row", (), (Turn("user", "Hi"), Turn("assistant", "yes")), None), [])
    assert decode(chat, row.ids).startswith(chat.tokenizer.bos_token + "<|im_start|>system\nToday: 26 Jul 2024<|im_end|>\n")
    assert row.ids.count(chat.tokenizer.bos_token_id) == 1


def test_every_way_to_write_the_date_is_known_or_refused(formats):
    _, processor = formats["own"]
    asked = "%A, %a %-d %d %e %b %B %m %-m %y %Y %j %F %D %H:%M:%S %I %p %T"
    own = "{{- strftime_now('" + asked + "') -}}" + CHATML
    said = processor.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, chat_template=chat_template("own", "<|image|>", own))
    assert said.startswith(datetime.datetime(2024, 7, 26).strftime(asked) + "<|im_start|>user")
    with pytest.raises(UserError, match="asks for %Z of today's date"):
        chat_template("own", "<|image|>", own.replace("%T", "%Z"))


@pytest.mark.parametrize("kind", KINDS)
def test_content_as_text_and_as_list_give_the_same_prompt(formats, kind):
    _, processor = formats[kind]
    as_list = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    as_text = [{"role": "user", "content": "<image>\nWhat?"}]
    one, other = (processor.apply_chat_template(m, add_generation_prompt=True) for m in (as_list, as_text))
    assert one == other and processor.image_token + "\nWhat?" in one


@pytest.mark.parametrize("kind", KINDS)
def test_stop_and_pad_tokens(formats, kind):
    chat, processor = formats[kind]
    names = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids)
    expected = {"llama3": {"<|eot_id|>", "<|end_of_text|>"}, "vicuna": {"</s>"}}
    assert set(names) == expected.get(kind, set(names)) and chat.end_ids[-1] in chat.stop_ids
    assert processor.tokenizer.pad_token_id not in {0, None, *chat.stop_ids, chat.image_token_id}


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_lose_whole_turns_only(formats, kind):
    chat, _ = formats[kind]
    turns = tuple(
        turn for n in range(3) for turn in (Turn("user", f"{IMAGE}\nquestion {n}"), Turn("assistant", f"answer {n}"))
    )
    row = Conversation("row", ("a", "b", "c"), turns)
    whole = chat.assemble(row, [20, 30, 40])
    ends = [end for _, end in spans(whole.labels)]
    lengths = set()
    for limit in range(ends[0], len(whole.ids) + 1):
        cut = chat.assemble(row, [20, 30, 40], max_length=limit)
        kept = cut.num_images
        assert len(cut.ids) == max(end for end in ends if end <= limit) == ends[kept - 1]
        assert (
            cut.num_cut == 6 - 2 * kept
            and cut.ids == whole.ids[: len(cut.ids)]
            and cut.labels == whole.labels[: len(cut.ids)]
        )
        assert cut.ids.count(chat.image_token_id) == sum([20, 30, 40][:kept])
        lengths.add(len(cut.ids))
    assert lengths == set(ends)
    with pytest.raises(RowTooLong):
        chat.assemble(row, [20, 30, 40], max_length=ends[0] - 1)


def test_image_counts_must_fit(formats):
    chat, _ = formats["llama3"]
    with pytest.raises(ValueError, match="images"):
        chat.assemble(Conversation("row", ("a",), (Turn("user", "no picture"), Turn("assistant", "x"))), [])
    with pytest.raises(ValueError, match="placeholders"):
        chat.prompt_ids([Turn("user", "no picture")], [4])


def test_digits_are_single_tokens(formats):
    for chat, _ in formats.values():
        words = [
            w
            for w in chat.tokenizer.convert_ids_to_tokens(chat.answer_ids("2048 and 19.5 of 1234567890"))
            if any(c.isdigit() for c in w)
        ]
        assert words == list("2048195" + "1234567890")


def test_training_a_tokenizer_is_deterministic(tmp_path):
    for kind in ("llama3", "vicuna"):
        for run in "ab":
            train_chat_tokenizer(iter(TEXTS), tmp_path / kind / run, 500, kind)
        one, other = ((tmp_path / kind / run / "tokenizer.json").read_bytes() for run in "ab")
        assert one == other
    with pytest.raises(UserError, match="vocab_size"):
        train_chat_tokenizer(TEXTS, tmp_path / "small", 100)


def test_a_template_that_breaks_the_prefix_law_is_refused_by_name(folders):
    """Vicuna writes a space before the answer; byte-level tokenizers make it a part of the answer's first token."""
    tokenizer = AutoTokenizer.from_pretrained(folders["plain"])
    tokenizer.name_or_path = "some/decoder"
    with pytest.raises(TemplateError, match="some/decoder"):
        ChatFormat(tokenizer, chat_template("vicuna", "<|image|>"), "<|image|>")


@pytest.mark.parametrize(
    "template,message",
    [
        ("{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\n' -}}{%- endfor -%}", "end|prefix"),
        (
            "{{- messages | length | string -}}"
            "{%- for m in messages -%}{{- '<|eot_id|>' + m['content'] + '<|eot_id|>' -}}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|eot_id|>' -}}{%- endif -%}",
            "prefix",
        ),
    ],
)
def test_other_unfit_templates_are_refused(folders, template, message):
    tokenizer = AutoTokenizer.from_pretrained(folders["plain"])
    with pytest.raises(TemplateError, match=message):
        ChatFormat(tokenizer, chat_template("own", "<|image|>", template), "<|image|>")


@pytest.mark.parametrize("pad,message", [(None, "missing"), ("<|eot_id|>", "a stop token"), ("<|end_of_text|>", "a stop token")])
def test_a_pad_token_that_is_missing_or_ends_answers_is_refused_until_it_is_prepared(folders, pad, message):
    tokenizer = AutoTokenizer.from_pretrained(folders["llama3"])
    tokenizer.pad_token = pad
    with pytest.raises(UserError, match=f"the pad token is {message}; call prepare_tokenizer") as error:
        ChatFormat(tokenizer, tokenizer.chat_template, "<|image|>")
    assert "\n" not in str(error.value)
    image_token = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token_id not in ChatFormat(tokenizer, tokenizer.chat_template, image_token).stop_ids


def test_templates_that_are_not_there_are_refused():
    with pytest.raises(UserError, match="llama2"):
        chat_template("llama2", "<|image|>")
    with pytest.raises(UserError, match="no chat template"):
        chat_template("own", "<|image|>")


def test_reserved_tokens_are_used_where_a_decoder_has_some(folders):
    """Llama 3 needs no new embeddings; other tokenizers get two tokens, and a pad token that ends nothing."""
    from transformers import PreTrainedTokenizerFast

    base = AutoTokenizer.from_pretrained(folders["vicuna"])

    def bare(extra, **names):
        state = base.backend_tokenizer.from_str(
            base.backend_tokenizer.to_str().replace('"<pad>"', '"<x>"').replace('"<image>"', '"<y>"')
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=state, bos_token="<s>", eos_token="</s>", **names)
        tokenizer.add_special_tokens({"extra_special_tokens": extra})
        return tokenizer

    llama = bare([f"<|reserved_special_token_{i}|>" for i in range(4)])
    before = len(llama)
    assert (
        prepare_tokenizer(llama) == "<|reserved_special_token_0|>" and llama.pad_token == "<|reserved_special_token_1|>"
    )
    assert len(llama) == before

    other = bare([], pad_token="</s>")
    before = len(other)
    assert prepare_tokenizer(other) == IMAGE and other.pad_token == "<pad>" and len(other) == before + 2
    assert prepare_tokenizer(other) == IMAGE and len(other) == before + 2
