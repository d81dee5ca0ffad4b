"""Captions: cleaning, SigLIP's canonical form, and token ids from any sentencepiece model."""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import re
import string
from collections.abc import Iterable
from pathlib import Path

from aimv2_vlm.config import UserError
from aimv2_vlm.data.shards import atomic_file

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_caption(text: str) -> str:
    """Mend mis-decoded text (ftfy), resolve HTML entities (twice: `&amp;amp;`), collapse white space."""
    text = " ".join(text.split())
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # ftfy and html leave it as it is; most captions, and a hundred times faster
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def canonicalize(text: str) -> str:
    """SigLIP's form: underscores to spaces, ASCII punctuation removed, lower case, single spaces."""
    return " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


class CaptionTokenizer:
    """For generative objectives: text -> ids that end with the end token, at most `context_length` of them **with** it.

    Works with any sentencepiece `.model`. In SigLIP's, pad and end are the same id: mask by length, never by id.
    `num_truncated` counts captions that were cut. Raises UserError when the file is no sentencepiece model or has no
    end token.
    """

    num_special = 1  # ids of a caption of no words

    def __init__(self, model_file: str | os.PathLike, context_length: int = 77, canonicalize: bool = True):
        self.model_file, self.context_length, self.canonicalize = Path(model_file), context_length, canonicalize
        if context_length < 2:
            raise UserError(f"text.context_length = {context_length}: must hold at least one token and the end token")
        try:
            model_bytes = self.model_file.read_bytes()
        except OSError as error:
            raise UserError(f"text.tokenizer: {model_file}: cannot be read ({error.strerror})") from error
        self._load(model_bytes)
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"text.tokenizer: {model_file}: the model has no end token (eos)")
        pad_id = self._model.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.vocab_size = self._model.vocab_size()
        self.num_truncated = 0

    def _load(self, model_bytes: bytes) -> None:
        import sentencepiece

        self._model_bytes = model_bytes
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._model.LoadFromSerializedProto(model_bytes)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"text.tokenizer: {self.model_file}: is not a sentencepiece model") from error
        if not loaded or not self._model.vocab_size():
            raise UserError(f"text.tokenizer: {self.model_file}: is not a sentencepiece model")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_model"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._load(state["_model_bytes"])

    def prepare(self, text: str) -> str:
        """The text that is tokenised: cleaned and, where configured, canonical."""
        text = clean_caption(text)
        return canonicalize(text) if self.canonicalize else text

    def encode(self, text: str) -> list[int]:
        """Ids of a caption, the end token last; at most `context_length`. Only the end token when nothing is left
        after cleaning."""
        return self.encode_counted(text)[0]

    def encode_counted(self, text: str) -> tuple[list[int], bool]:
        """(ids, whether the caption was cut); also counted in `num_truncated` of this process."""
        ids = self._model.EncodeAsIds(self.prepare(text))
        truncated = len(ids) >= self.context_length
        self.num_truncated += truncated
        return [*ids[: self.context_length - 1], self.eos_id], truncated

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token."""
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            kept.append(int(token))
        return self._model.DecodeIds(kept)

    def fingerprint(self) -> dict:
        """What decides the ids."""
        digest = hashlib.sha256(self._model_bytes).hexdigest()[:32]
        return {"model": digest, "context_length": self.context_length, "canonicalize": self.canonicalize}


class ClipTokenizer:
    """For two towers: text -> [begin] ids [end] with CLIP's byte-pair encoding, at most `context_length` of them in all.

    `folder`: a tokenizer as transformers saves it (vocab.json and merges.txt, or tokenizer.json). Captions are cleaned
    as for `CaptionTokenizer`; case and white space are the encoding's own matter. Raises UserError when the folder
    holds no such tokenizer.
    """

    num_special = 2

    def __init__(self, folder: str | os.PathLike, context_length: int = 77, canonicalize: bool = False):
        from transformers import CLIPTokenizer

        self.folder, self.context_length, self.canonicalize = Path(folder), context_length, canonicalize
        if context_length < 3:
            raise UserError(f"text.context_length = {context_length}: must hold at least one token, begin and end")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"text.tokenizer: {folder}: holds no tokenizer.json or vocab.json; clip and lit need CLIP's tokenizer")
        try:
            self.stock = CLIPTokenizer.from_pretrained(str(self.folder), model_max_length=context_length + 1)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"text.tokenizer: {folder}: is not CLIP's tokenizer ({str(error).splitlines()[0]})") from None
        self.eos_id, self.pad_id = self.stock.eos_token_id, self.stock.pad_token_id
        self.vocab_size = len(self.stock)
        self.num_truncated = 0

    def prepare(self, text: str) -> str:
        """The text that is tokenised: cleaned and, where configured, canonical."""
        text = clean_caption(text)
        return canonicalize(text) if self.canonicalize else text

    def encode(self, text: str) -> list[int]:
        """Ids of a caption with begin and end; at most `context_length`."""
        return self.encode_counted(text)[0]

    def encode_counted(self, text: str) -> tuple[list[int], bool]:
        """(ids, whether the caption was cut); also counted in `num_truncated` of this process."""
        words = self.stock(self.prepare(text), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        truncated = len(words) > self.context_length - 2
        self.num_truncated += truncated
        return [self.stock.bos_token_id, *words[: self.context_length - 2], self.eos_id], truncated


def train_clip_tokenizer(texts: Iterable[str], folder: str | os.PathLike, vocab_size: int = 49_408, canonicalize: bool = False) -> int:
    """Train CLIP's byte-pair encoding on captions and write it as transformers' `CLIPTokenizer`; returns its vocabulary
    size. Raises UserError when there is no text."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    begin, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = [*letters, *(letter + "</w>" for letter in letters)]
    blank = CLIPTokenizer(vocab={word: i for i, word in enumerate([*whole, begin, end])})
    # Pairs of equal count are ordered by the ids of their halves. Letters that end a word would get theirs in the order of a
    # hash table, another one in each run; named beforehand they have fixed ones.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix="</w>", special_tokens=[begin, end, *whole[len(letters) :]],
        show_progress=False,
    )
    lines = [line for line in map(clean_caption, texts) if line]
    if not lines:
        raise UserError(f"text.tokenizer: {folder}: no caption to train on")
    blank.backend_tokenizer.train_from_iterator(map(_canonical, lines) if canonicalize else lines, trainer)
    learned = json.loads(blank.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    # CLIP's own layout: letters, letters that end a word, merges, begin, end.
    words = dict.fromkeys([*whole, *(a + b for a, b in merges), begin, end])
    stock = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    stock.save_pretrained(folder)
    return len(stock)


def train_tokenizer(
    texts: Iterable[str],
    model_path: str | os.PathLike,
    vocab_size: int = 32_000,
    seed: int = 0,
    model_type: str = "unigram",
    canonicalize: bool = True,
) -> int:
    """Train a sentencepiece model on captions; returns its vocabulary size (smaller when the captions do not yield
    `vocab_size` pieces).

    pad 0, end 1, unknown 2, no begin token (that is a learned vector). The same texts and arguments give the same
    file. The texts are prepared as `CaptionTokenizer(canonicalize=…)` will prepare them. Raises UserError when there
    is no text or too small a vocabulary.
    """
    import sentencepiece

    prepare = _canonical if canonicalize else clean_caption
    lines = [line for line in map(prepare, texts) if line]
    if not lines:
        raise UserError(f"text.tokenizer: {model_path}: no caption to train on")
    sentencepiece.set_random_generator_seed(seed)
    while True:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                hard_vocab_limit=False,
                character_coverage=1.0,
                num_threads=1,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                minloglevel=2,
            )
            break
        except RuntimeError as error:
            # sentencepiece names the largest size the corpus allows when it was asked for more
            allowed = re.search(r"<= (\d+)", str(error))
            if allowed and 3 < int(allowed[1]) < vocab_size:
                vocab_size = int(allowed[1])
                continue
            reason = re.sub(r"\s+", " ", str(error))[-200:]
            raise UserError(
                f"text.vocab_size = {vocab_size}: sentencepiece cannot train on these captions: {reason}"
            ) from error
    path = Path(model_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(model.getvalue())
    return CaptionTokenizer(path).vocab_size


def _canonical(text: str) -> str:
    return canonicalize(clean_caption(text))
