"""Laws of captions: cleaning, SigLIP's canonical form, ids that always end with the end token."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2_vlm.config import UserError
from aimv2_vlm.data.captions import CaptionTokenizer, canonicalize, clean_caption, train_tokenizer

WORDS = "a the red green blue small large circle square triangle digit seven on under picture of photo with and dog cat"
WORDS = WORDS.split()
TEXTS = [f"{WORDS[i % 20]} {WORDS[i * 7 % 21]} {WORDS[i * 3 % 19]}, number {i}" for i in range(400)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "captions.model"
    train_tokenizer(TEXTS, path, vocab_size=200)
    return path


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  two\t words \n", "two words"),
        ("fish &amp;amp; chips &lt;b&gt;", "fish & chips <b>"),
        ("schÃ¶n", "schön"),
        ("â€œquotedâ€\x9d", '"quoted"'),
        ("plain (ASCII), kept: as-is!", "plain (ASCII), kept: as-is!"),
        ("\x07bell", "bell"),
        ("", ""),
    ],
)
def test_clean_caption(text, cleaned):
    assert clean_caption(text) == cleaned


@given(st.text(st.characters(max_codepoint=127), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_short_cut_for_plain_text_equals_the_long_way(text):
    import html

    import ftfy

    collapsed = " ".join(text.split())
    if collapsed.isprintable() and "&" not in collapsed:
        assert clean_caption(text) == " ".join(html.unescape(ftfy.fix_text(collapsed)).split())


def test_canonicalize():
    assert canonicalize("A Photo_of  (two) DOGS, it's: ok!") == "a photo of two dogs its ok"
    assert canonicalize("?!…") == "…"  # ASCII punctuation only, as SigLIP's
    assert canonicalize("ÄÖ") == "äö"


@given(st.text(max_size=300), st.integers(2, 20), st.booleans())
@settings(max_examples=150, deadline=None)
def test_ids_end_with_the_end_token_and_fit(model_file, text, context_length, canonical):
    tokenizer = CaptionTokenizer(model_file, context_length, canonical)
    whole = CaptionTokenizer(model_file, 10_000, canonical).encode(text)
    ids = tokenizer.encode(text)
    assert 1 <= len(ids) <= context_length
    assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
    assert ids[:-1] == whole[:-1][: context_length - 1]
    assert tokenizer.num_truncated == (len(whole) > context_length)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_exactly_full_is_not_truncated(model_file):
    long = "red circle and blue square under the green triangle"
    length = len(CaptionTokenizer(model_file, 1000).encode(long))
    exact, short = CaptionTokenizer(model_file, length), CaptionTokenizer(model_file, length - 1)
    assert exact.encode_counted(long)[1] is False and exact.num_truncated == 0
    assert short.encode_counted(long)[1] is True and short.num_truncated == 1


def test_known_words_come_back(model_file):
    tokenizer = CaptionTokenizer(model_file)
    ids = tokenizer.encode("The RED circle, under a dog!")
    assert tokenizer.decode(ids) == "the red circle under a dog"
    assert tokenizer.decode(ids + [5, 6]) == "the red circle under a dog"  # nothing after the end token


def test_special_tokens_in_a_caption_are_plain_text(model_file):
    tokenizer = CaptionTokenizer(model_file, canonicalize=False)
    ids = tokenizer.encode("</s> <pad> <unk> </s>")
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.pad_id not in ids


def test_special_ids(model_file):
    tokenizer = CaptionTokenizer(model_file)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer._model.unk_id() == 2 and tokenizer._model.bos_id() == -1


def test_pad_equal_to_end_as_in_siglips_model(tmp_path):
    """A model without a pad token of its own: the end token pads, so only lengths tell them apart."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "m"), vocab_size=100, eos_id=1, unk_id=2, bos_id=-1,
        pad_id=-1, minloglevel=2, hard_vocab_limit=False, control_symbols=["<filler>"],
    )  # fmt: skip
    tokenizer = CaptionTokenizer(tmp_path / "m.model")
    assert tokenizer.pad_id == tokenizer.eos_id
    assert tokenizer.encode("red dog")[-1] == tokenizer.eos_id


def test_training_is_deterministic(tmp_path, model_file):
    train_tokenizer(TEXTS, tmp_path / "again.model", vocab_size=200)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path, model_type):
    size = train_tokenizer(TEXTS[:30], tmp_path / "m.model", vocab_size=32_000, model_type=model_type)
    tokenizer = CaptionTokenizer(tmp_path / "m.model")
    assert size == tokenizer.vocab_size < 2000
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == canonicalize(TEXTS[0])


@pytest.mark.parametrize("texts", [[], ["", "  ", "!!!"]])
def test_no_text_to_train_on(tmp_path, texts):
    with pytest.raises(UserError, match="no caption"):
        train_tokenizer(texts, tmp_path / "m.model")


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match="vocab_size = 5"):
        train_tokenizer(TEXTS, tmp_path / "m.model", vocab_size=5)
    assert not (tmp_path / "m.model").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x80\x04]\x94."])
def test_what_is_no_model_is_named(tmp_path, content):
    path = tmp_path / "m.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="m.model"):
        CaptionTokenizer(path)


def test_a_tokenizer_travels(model_file):
    tokenizer = CaptionTokenizer(model_file, 10, canonicalize=False)
    copy = deepcopy(tokenizer)
    assert copy.encode("The Red dog") == tokenizer.encode("The Red dog")
    assert copy.fingerprint() == tokenizer.fingerprint() != CaptionTokenizer(model_file, 11).fingerprint()
