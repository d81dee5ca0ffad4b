"""Chat templates, and token ids with labels assembled from conversations.

Ids are assembled, never cut out of rendered text: the prompt's ids are what inference tokenises, the answer's are
the stripped answer tokenised alone, then the template's end token. Laws (tests/test_labels.py): at every turn the
prompt's ids are a prefix of the training ids; the supervised ids decode to exactly the stripped answer and the end;
text of a row never gives a special id.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from aimv2_vlm.config import UserError
from aimv2_vlm.data.conversations import IMAGE, Conversation, Turn
from aimv2_vlm.data.interleaved import Document

IGNORED = -100
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Each template sees messages whose content is text; `_FLATTEN` in front of it makes that of content lists, with image
# tokens.
_TEMPLATES = {
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{{- message['content'] + '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "vicuna": (
        "{{- bos_token -}}"
        "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + ' ' -}}"
        "{%- else -%}{{- '" + VICUNA_SYSTEM.replace("'", "\\'") + " ' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- ' ASSISTANT: ' + message['content'] + eos_token -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}"
    ),
    "plain": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
        "{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
}
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set text = message['content'] -%}"
    "{%- if message['role'] == 'user' -%}{%- set text = text.replace('" + IMAGE + "', 'IMAGE_TOKEN') -%}{%- endif -%}"
    "{%- else -%}"
    "{%- set part = namespace(text='', images_only=true) -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'text' -%}"
    "{%- if part.images_only and part.text and item['text'] and not item['text'][:1].isspace() -%}"
    "{%- set part.text = part.text + '\\n' -%}{%- endif -%}"
    "{%- set part.text = part.text + item['text'] -%}{%- set part.images_only = false -%}"
    "{%- elif item['type'] == 'image' -%}{%- set part.text = part.text + 'IMAGE_TOKEN' -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set text = part.text -%}"
    "{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(role=message['role'], content=text.strip())] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# Templates that ask for today's date (Llama 3.1's) get the one that Llama 3.1 falls back to: a row is the same ids on every day.
_DAY = {"d": "26", "e": "26", "-d": "26", "b": "Jul", "B": "July", "m": "07", "-m": "7", "y": "24", "Y": "2024", "a": "Fri", "A": "Friday", "j": "208",
        "F": "2024-07-26", "D": "07/26/24", "H": "00", "I": "12", "M": "00", "S": "00", "p": "AM", "T": "00:00:00"}
_DATE = ("{%- macro strftime_now(format) -%}{{- format" + "".join(f"|replace('%{code}', '{value}')" for code, value in _DAY.items())
         + " -}}{%- endmacro -%}")


def chat_template(kind: str, image_token: str, own: str | None = None) -> str:
    """The Jinja template that ships with the processor. kind: llama3 | vicuna | plain | own (then `own` is the
    template).

    It takes content as text (IMAGE in a user's text is the image) or as a list of {"type": "image"} and {"type":
    "text"}; text right behind the leading images starts on a new line. Raises UserError.
    """
    if kind == "own":
        if not isinstance(own, str):
            raise UserError(
                "llm.template: own, but the decoder's tokenizer has no chat template; name llama3, vicuna or plain"
            )
        asked = re.findall(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1", own)
        if unknown := [code for _, text in asked for code in re.findall(r"%(-?.)", text) if code not in _DAY]:
            raise UserError(f"llm.template: own: the decoder's template asks for %{unknown[0]} of today's date, which is none of "
                            f"{', '.join('%' + code for code in _DAY)}; name llama3, vicuna or plain")
        body = _DATE * ("strftime_now" in own) + own
    elif kind in _TEMPLATES:
        body = _TEMPLATES[kind]
    else:
        raise UserError(f"llm.template: {kind!r} is none of {', '.join(_TEMPLATES)}, own")
    return _FLATTEN.replace("IMAGE_TOKEN", image_token.replace("'", "\\'")) + body


@dataclass(frozen=True)
class Assembled:
    """ids and labels (IGNORED where nothing is to be learned) of equal length; how much of the row they hold."""

    ids: list[int]
    labels: list[int]
    num_images: int
    num_cut: int  # turns of a conversation, pieces of a document


class TemplateError(UserError):
    """Prompt ids are no prefix of the training ids."""


class RowTooLong(ValueError):
    """Not even the first question and answer (of a document, what stands before its first text, and that) fit."""


class ChatFormat:
    """Assembles ids for one tokenizer and template. Refuses (TemplateError) a template for which the prefix law fails.

    tokenizer: a fast tokenizer of transformers. template: Jinja, from `chat_template`. image_token: one special token.
    stop_ids: the tokens that end an answer. end_ids: what follows an answer and is learned with it. document_end_id: what
    ends a document.
    """

    def __init__(self, tokenizer, template: str, image_token: str) -> None:
        self.tokenizer, self.template, self.image_token = tokenizer, template, image_token
        self._special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special_ids = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        if image_token not in self._special:
            raise UserError(f"tokenizer: the image token {image_token!r} is not one of its special tokens")
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")
        self._first, self._later = _plain_encoders(tokenizer)
        self._bos = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
        self._name = f"chat template of {tokenizer.name_or_path or type(tokenizer).__name__}"
        self.end_ids = self._find_end()
        self._answer_encoder = self._choose_answer_encoder()
        stops = {self.end_ids[-1]} | {i for i in (tokenizer.eos_token_id,) if i is not None}
        stops |= {
            i
            for t, i in zip(self._special, tokenizer.convert_tokens_to_ids(self._special))
            if t in ("<|eot_id|>", "<|end_of_text|>")
        }
        self.stop_ids = sorted(stops)
        ends = [token for token in ("<|end_of_text|>", "<|endoftext|>", tokenizer.eos_token) if token in self._special]
        self.document_end_id = tokenizer.convert_tokens_to_ids(ends[0]) if ends else self.end_ids[-1]
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops:
            raise UserError(
                f"{self._name}: the pad token is {'missing' if tokenizer.pad_token_id is None else 'a stop token'}"
                "; call prepare_tokenizer first"
            )

    def answer_ids(self, text: str) -> list[int]:
        """The stripped answer alone, special tokens split into ordinary ones; without the end."""
        return self._answer_encoder(text.strip())

    def prompt_ids(
        self, turns: Sequence[Turn], num_image_tokens: Sequence[int], system: str | None = None
    ) -> list[int]:
        """What inference tokenises for these turns (the last is the user's), each image token repeated."""
        ids, used = _repeat(self._prompt(turns, system), self.image_token_id, num_image_tokens)
        if used != len(num_image_tokens):
            raise ValueError(f"{used} image placeholders for {len(num_image_tokens)} images")
        return ids

    def assemble(
        self, conversation: Conversation, num_image_tokens: Sequence[int], max_length: int | None = None
    ) -> Assembled:
        """Ids and labels of a conversation. num_image_tokens: tokens of each of its images.

        Rows over max_length lose whole turns at the end (never a part of an image). Raises RowTooLong, TemplateError.
        """
        if len(num_image_tokens) != len(conversation.images):
            raise ValueError(f"{len(num_image_tokens)} token counts for {len(conversation.images)} images")
        ids: list[int] = []
        labels: list[int] = []
        raw: list[int] = []  # the same with every image as one token, to compare prompts by
        num_images = turns_kept = 0
        for last in range(0, len(conversation.turns), 2):
            prompt = self._prompt(conversation.turns[: last + 1], conversation.system)
            if prompt[: len(raw)] != raw:
                raise TemplateError(
                    f"{self._name}: the prompt of turn {last // 2 + 1} is not a prefix of the training ids"
                )
            shown, used = _repeat(prompt[len(raw) :], self.image_token_id, num_image_tokens[num_images:])
            answer = self.answer_ids(conversation.turns[last + 1].text) + self.end_ids
            if max_length is not None and len(ids) + len(shown) + len(answer) > max_length:
                break
            raw = prompt + answer
            ids += shown + answer
            labels += [IGNORED] * len(shown) + answer
            num_images += used
            turns_kept = last + 2
        if not turns_kept:
            raise RowTooLong(
                f"{len(shown) + len(answer)} tokens in the first question and answer, max_length is {max_length}"
            )
        return Assembled(ids, labels, num_images, len(conversation.turns) - turns_kept)

    def assemble_document(
        self, document: Document, num_image_tokens: Sequence[int], max_length: int | None = None
    ) -> Assembled:
        """Ids and labels of an interleaved document: BOS, its pieces, the end of text. Every text token is learned.

        Documents over max_length lose pieces at the end, and with them the end of text; a text stays last. Raises RowTooLong.
        """
        if len(num_image_tokens) != len(document.images):
            raise ValueError(f"{len(num_image_tokens)} token counts for {len(document.images)} images")
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

        def ids_of(num_pieces: int) -> list[int]:
            """Texts that follow each other are tokenised as one: a reader's tokens know nothing of pieces."""
            ids, counts = list(bos), iter(num_image_tokens)
            for is_text, run in groupby(document.pieces[:num_pieces], key=lambda piece: piece is not None):
                if is_text:
                    ids += (self._later if len(ids) > len(bos) else self._first)("".join(run))
                else:
                    ids += [self.image_token_id] * sum(next(counts) for _ in run)
            return ids

        kept = len(document.pieces)
        ids = [*ids_of(kept), self.document_end_id]
        if max_length is not None and len(ids) > max_length:
            ends = [number for number, piece in enumerate(document.pieces, 1) if piece is not None]
            fitting = bisect_right(ends, max_length, key=lambda end: len(ids_of(end)))
            if not fitting:
                raise RowTooLong(f"{len(ids_of(ends[0]))} tokens until the end of the first text, max_length is {max_length}")
            kept = ends[fitting - 1]
            ids = ids_of(kept)
        labels = [IGNORED if token == self.image_token_id else token for token in ids]
        labels[0] = IGNORED  # nothing precedes it
        num_images = sum(piece is None for piece in document.pieces[:kept])
        return Assembled(ids, labels, num_images, len(document.pieces) - kept)

    # ----------------------------------------------------------------------------------------------------------- inside

    def _prompt(self, turns: Sequence[Turn], system: str | None) -> list[int]:
        return self._encode(turns, system, add_generation_prompt=True)

    def _encode(self, turns: Sequence[Turn], system: str | None, add_generation_prompt: bool) -> list[int]:
        """Render and tokenise; special tokens in the row's own text are hidden from both steps, so they stay text."""
        everything = "".join([system or "", *(turn.text for turn in turns)])
        hide, show = self._disguise(everything)
        messages = [{"role": "system", "content": [{"type": "text", "text": hide(system)}]}] if system else []
        for turn in turns:
            if turn.role == "user":
                parts = turn.text.split(IMAGE)
                content = [{"type": "text", "text": hide(parts[0])}] if parts[0] else []
                for part in parts[1:]:
                    content.append({"type": "image"})
                    content += [{"type": "text", "text": hide(part)}] if part else []
            else:
                content = [{"type": "text", "text": hide(turn.text)}]
            messages.append({"role": turn.role, "content": content})
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        ids = self._begin(rendered)
        if not self._split.search(everything):
            return ids + self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        for position, piece in enumerate(self._split.split(rendered)):
            if position % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += (self._later if position else self._first)(show(piece))
        return ids

    def _begin(self, rendered: str) -> list[int]:
        """The BOS that transformers' processors put before a template that writes none, where the tokenizer begins with one."""
        return [] if rendered.startswith(self.tokenizer.bos_token or "") else list(self._bos)

    def _disguise(self, text: str):
        """Two functions: replace special tokens by private characters that the text does not hold, and back."""
        if not self._split.search(text):
            return (lambda s: s), (lambda s: s)
        start = next(
            start
            for start in range(0xF0000, 0x10F000, 0x1000)
            if not any(start <= ord(c) < start + len(self._special) for c in text)
        )
        to_mask = {token: chr(start + i) for i, token in enumerate(self._special)}
        to_token = {ord(mask): token for token, mask in to_mask.items()}
        return (lambda s: self._split.sub(lambda m: to_mask[m[0]], s)), (lambda s: s.translate(to_token))

    def _find_end(self) -> list[int]:
        """The ids between an answer and the next thing, up to the first special one, found with a probe answer."""
        question, probe = Turn("user", "Which?"), "probe"
        prompt = self._prompt([question], None)
        whole = self._encode([question, Turn("assistant", probe)], None, add_generation_prompt=False)
        for encode in (self._first, self._later):
            answer = encode(probe)
            if whole[: len(prompt) + len(answer)] == prompt + answer:
                tail = whole[len(prompt) + len(answer) :]
                stop = next((i for i, token in enumerate(tail) if token in self.special_ids), None)
                if stop is None:
                    raise TemplateError(f"{self._name}: no special token follows an answer, so nothing could end one")
                return tail[: stop + 1]
        raise TemplateError(
            f"{self._name}: prompt and answer tokenised apart are not a prefix of the two together; "
            "this template does not suit this tokenizer"
        )

    def _choose_answer_encoder(self):
        """Tokenise answers as a text's beginning or as its continuation: whichever keeps the prefix law on probes."""
        probes = [
            [
                Turn("user", f"{IMAGE}\nWhat?"),
                Turn("assistant", "a cat, 12."),
                Turn("user", "And now?"),
                Turn("assistant", "No"),
            ],
            [
                Turn("user", "Say it."),
                Turn("assistant", "19.5%"),
                Turn("user", "Again"),
                Turn("assistant", "(b) Yes\nno"),
            ],
        ]
        failures = []
        for encode in (self._first, self._later):
            self._answer_encoder = encode
            try:
                for turns in probes:
                    images = tuple("image" for turn in turns if IMAGE in turn.text)
                    self.assemble(Conversation("probe", images, tuple(turns)), [1] * len(images))
                    for answer in turns[1::2]:
                        learned = self.decode(self.answer_ids(answer.text) + self.end_ids)
                        if learned != answer.text + self.decode(self.end_ids):
                            raise TemplateError(f"{self._name}: the answer {answer.text!r} is learned as {learned!r}")
                return encode
            except TemplateError as error:
                failures.append(error)
        raise failures[0]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _repeat(ids: list[int], image_token_id: int, counts: Sequence[int]) -> tuple[list[int], int]:
    """ids with the i-th image token repeated counts[i] times, and how many image tokens there were."""
    repeated, used = [], 0
    for token in ids:
        if token == image_token_id:
            repeated += [token] * counts[used]
            used += 1
        else:
            repeated.append(token)
    return repeated, used


class _PlainEncoder:
    """Text -> ids by a tokenizer's state, knowing no special token. Goes to loader workers by that state: pickling
    the tokenizer itself would lose `encode_special_tokens`."""

    def __init__(self, state: str):
        from tokenizers import Tokenizer

        self._state, self._backend = state, Tokenizer.from_str(state)
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()

    def __call__(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def __reduce__(self) -> tuple:
        return _PlainEncoder, (self._state,)


def _plain_encoders(tokenizer) -> tuple[_PlainEncoder, _PlainEncoder]:
    """For a text's beginning, and for what follows a special token.

    They differ where the tokenizer puts a space in front of a text's beginning only (sentencepiece).
    """
    state = tokenizer.backend_tokenizer.to_str()
    later = json.loads(state)
    for step in _flat_steps(later.get("pre_tokenizer")):
        if step["type"] == "Metaspace" and step["prepend_scheme"] == "first":
            step["prepend_scheme"] = "never"
    return _PlainEncoder(state), _PlainEncoder(json.dumps(later))


def _flat_steps(step: dict | None) -> list[dict]:
    if step is None:
        return []
    return [s for inner in step["pretokenizers"] for s in _flat_steps(inner)] if step["type"] == "Sequence" else [step]


# ---------------------------------------------------------------------------------------------------------- tokenizers


def open_tokenizer(path: str | Path):
    """The fast tokenizer of a folder or hub name. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"llm: {path}: no tokenizer: {str(error).strip().splitlines()[0]}") from None
    if not opened.is_fast:
        raise UserError(f"llm: {path}: its tokenizer has no fast version, which assembling ids needs")
    return opened


def prepare_tokenizer(tokenizer) -> str:
    """Give a decoder's tokenizer an image token and a pad token that ends nothing; return the image token.

    Reserved tokens are used where there are some (Llama 3: nothing is resized); elsewhere `<image>` and `<pad>` are
    added, and the model's embeddings must grow (`build_assistant` does it).
    """
    special = {t.content: i for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special}
    reserved = [t for t in special if re.fullmatch(r"<\|reserved_special_token_\d+\|>", t)]
    stops = {tokenizer.eos_token, "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<|im_end|>", "<|endoftext|>"}

    image_token = getattr(tokenizer, "image_token", None)
    if image_token is None:
        image_token = next((t for t in ("<|image|>", IMAGE) if t in special), None) or (
            reserved.pop(0) if reserved else IMAGE
        )
    pad = tokenizer.pad_token
    if pad is None or pad in stops or (reserved and tokenizer.pad_token_id == 0):
        padding = "<|finetune_right_pad_id|>"
        pad = padding if padding in special else (reserved.pop(0) if reserved else "<pad>")
    added = [t for t in (image_token, pad) if t not in special]
    if added:
        tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer.pad_token = pad
    return image_token


LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    "<|image|>",
]
_WORDS = (  # Llama 3's pre-tokenisation, with digits one by one: a number read wrongly is then wrong in one place
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_chat_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int, template: str = "llama3"):
    """Train and save a small stock fast tokenizer with its chat template; the same texts give the same files.

    llama3 and plain: byte-level BPE, Llama 3's special tokens. vicuna: BPE with byte fallback as in Llama 2.
    Returns it.
    """
    from transformers import PreTrainedTokenizerFast

    texts = (text.replace(IMAGE, "") for text in texts)
    if template == "vicuna":
        backend, image_token = _train_llama2(texts, vocab_size), IMAGE
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    else:
        backend, image_token = _train_llama3(texts, vocab_size), "<|image|>"
        names = dict(
            bos_token="<|begin_of_text|>",
            pad_token="<|finetune_right_pad_id|>",
            eos_token="<|eot_id|>" if template == "llama3" else "<|end_of_text|>",
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": image_token},
        **names,
    )
    tokenizer.chat_template = chat_template(template, image_token)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def _train_llama3(texts: Iterable[str], vocab_size: int):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    num_learned = vocab_size - len(LLAMA3_SPECIAL)
    _check_vocab_size(num_learned, 256, vocab_size)
    trainer = trainers.BpeTrainer(
        vocab_size=num_learned, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA3_SPECIAL])
    return backend


def _train_llama2(texts: Iterable[str], vocab_size: int):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    extra = ["<pad>", IMAGE]
    ascii_ = ["▁", "\n", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    num_learned = vocab_size - len(extra)
    _check_vocab_size(num_learned, 256 + len(special) + len(ascii_), vocab_size)
    trainer = trainers.BpeTrainer(
        vocab_size=num_learned,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
        initial_alphabet=ascii_,
        limit_alphabet=max(len(ascii_), (num_learned - 256) // 2),
    )
    backend.train_from_iterator(texts, trainer)
    # The byte tokens were "special" for the trainer only, which keeps those in the vocabulary unconditionally.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in extra])
    return backend


def _check_vocab_size(num_learned: int, least: int, vocab_size: int) -> None:
    if num_learned < least:
        raise UserError(
            f"llm.vocab_size: {vocab_size} is too small, bytes and special tokens alone take {least} and a few"
        )


# ----------------------------------------------------------------------------------------------------------- processor


def build_processor(tokenizer, image_processor, patch_size: int, template: str, image_token: str):
    """The stock processor that ships with an assistant: Llava, LlavaNext or Cohere2Vision, by its image processor."""
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor, LlavaNextProcessor, LlavaProcessor

    tokenizer.chat_template = template
    if isinstance(image_processor, Cohere2VisionImageProcessor):
        # It writes marks around a picture and behind each tile. Without any, a picture is nothing but its image tokens here too.
        named = {"image_token": image_token, "boi_token": "", "eoi_token": "", "img_line_break_token": ""}
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [*dict.fromkeys([*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *named])]
        for name, token in named.items():
            setattr(tokenizer, name, token)
        return Cohere2VisionProcessor(image_processor, tokenizer, chat_template=template)
    kind = LlavaNextProcessor if hasattr(image_processor, "image_grid_pinpoints") else LlavaProcessor
    return kind(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        chat_template=template,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=image_token,
    )
