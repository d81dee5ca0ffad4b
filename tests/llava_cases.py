r"""What LLaVA's preprocessing makes of fixed conversations: ids with -200 for the picture, and labels; and what its connector computes.

LLaVA's own code pins old versions of everything and is not installed. This is a second derivation from what it does,
on sentencepiece and numpy alone, and it knows nothing of this package. Its results lie in fixtures/llava_cases.json and
fixtures/llava_connector.safetensors; run this file to make them anew.

    v1 (Vicuna)  system + " USER: q ASSISTANT: a</s>USER: q ASSISTANT: a</s>"; a row with a picture is cut at "<image>", its
                 pieces are tokenised apart, each without its begin token, and -200 stands between them. Labels by rounds: the
                 text is cut at "</s>"; a round counts as many ids as it has when tokenised alone (its begin token stands for the
                 "</s>"), its question ends two ids before the end of "… ASSISTANT: " tokenised alone (begin token, last space);
                 where the sum is not the length of the row, the whole row is ignored.
    plain        "<image>" + caption + "\n": the question is dropped, the caption and the newline are learned.

The tokenizer is Llama's kind: sentencepiece BPE with byte fallback, single digits, no normalisation and a space in front.
`legacy`: as Llama's first tokenizers, a space in front of every piece between special tokens, else of the first alone.
"""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import save_file

FIXTURE = Path(__file__).parent / "fixtures" / "llava_cases.json"
CONNECTOR = FIXTURE.with_name("llava_connector.safetensors")
IMAGE, PICTURE, IGNORED, END = "<image>", -200, -100, "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEXTS = [SYSTEM, "USER: What is shown in the picture?", "ASSISTANT: A red circle on a table.", "How many circles? Answer with a number.",
         "Yes, there are 12 of them, and 3 are blue.", "a red circle stands left of the blue square"]  # fmt: skip

# name -> (template, legacy, has a picture, values of question and answer in turn)
CASES: dict[str, tuple[str, bool, bool, list[str]]] = {
    "one turn": ("v1", True, True, [f"{IMAGE}\nWhat is shown?", "A red circle."]),
    "picture last": ("v1", True, True, [f"What is shown?\n{IMAGE}", "A red circle."]),
    "picture inside": ("v1", True, True, [f"What {IMAGE} is shown?", "A red circle."]),
    "three turns": ("v1", True, True, [f"{IMAGE}\nHow many?", "12", "Are they red?", "Yes, 3 are.", "And the blue?", "left of the\nsquare"]),
    "text only": ("v1", True, False, ["Are circles round?", "Yes."]),
    "text only, two turns": ("v1", True, False, ["How many?", "3 of them", "Sure?", "Yes, naïve 漢"]),
    "answer with a newline in front": ("v1", True, True, [f"{IMAGE}\nWhat is shown?", "\nA red circle."]),
    "answer with a space behind": ("v1", True, True, [f"{IMAGE}\nWhat is shown?", "A red circle. "]),
    "question with spaces behind": ("v1", True, False, ["What is shown? \n", "A red circle."]),
    "question without spaces behind": ("v1", True, False, ["What is shown?", "A red circle."]),
    "end token typed in a question": ("v1", True, False, [f"What does {END} mean?", "the end"]),
    "picture, newer tokenizer": ("v1", False, True, [f"{IMAGE}\nWhat is shown?", "A red circle."]),
    "text, newer tokenizer": ("v1", False, False, ["Are circles round?", "Yes."]),
    "caption": ("plain", False, True, [f"Describe it.\n{IMAGE}", "A red circle on a table."]),
}  # fmt: skip


def train_tokenizer() -> bytes:
    """A sentencepiece model as Llama's, of few words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, model_type="bpe", vocab_size=430, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True,
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


class Tokenizer:
    """ids of a text, begin token first; "</s>" in it is the end token."""

    def __init__(self, model: bytes, legacy: bool) -> None:
        self.pieces, self.legacy = sentencepiece.SentencePieceProcessor(model_proto=model), legacy

    def __call__(self, text: str) -> list[int]:
        ids = [self.pieces.bos_id()]
        for number, part in enumerate(text.split(END)):
            if number:
                ids.append(self.pieces.eos_id())
                assert self.legacy or not part, "several turns of a newer tokenizer are not derived here"
            ids += self.pieces.encode(part) if part else []
        return ids

    def with_picture(self, text: str) -> list[int]:
        first, *others = (self(part) for part in text.split(IMAGE))
        return first + [id_ for part in others for id_ in [PICTURE, *part[1:]]]


def picture_first(question: str) -> str:
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip() if IMAGE in question else question


def v1(tokenizer: Tokenizer, has_picture: bool, values: list[str]) -> tuple[list[int], list[int]]:
    encode = tokenizer.with_picture if has_picture else tokenizer
    pairs = zip(values[::2], values[1::2], strict=True)
    text = SYSTEM + " " + "".join(f"USER: {picture_first(question)} ASSISTANT: {answer}{END}" for question, answer in pairs)
    ids = encode(text)
    labels = [IGNORED]
    for round_ in text.split(END)[:-1]:
        question, separator, answer = round_.partition(" ASSISTANT: ")
        if not separator or " ASSISTANT: " in answer:
            break
        learned_from = len(labels) + len(encode(question + separator)) - 2
        stop = len(labels) + len(encode(round_))
        labels += [IGNORED] * (learned_from - len(labels)) + ids[learned_from:stop]
    return ids, labels if len(labels) == len(ids) else [IGNORED] * len(ids)


def plain(tokenizer: Tokenizer, has_picture: bool, values: list[str]) -> tuple[list[int], list[int]]:
    ids = tokenizer.with_picture(f"{IMAGE}{values[1]}\n")
    return ids, [IGNORED] * 2 + ids[2:]


def make() -> dict:
    model = train_tokenizer()
    cases = {}
    for name, (template, legacy, has_picture, values) in CASES.items():
        ids, labels = {"v1": v1, "plain": plain}[template](Tokenizer(model, legacy), has_picture, values)
        cases[name] = {"template": template, "legacy": legacy, "picture": has_picture, "values": values, "ids": ids, "labels": labels}
    return {"tokenizer": base64.b64encode(model).decode(), "cases": cases}


def connector() -> dict[str, np.ndarray]:
    """Random weights of an mlp2x_gelu from width 6 to 8, features, and their embeddings, computed in double precision."""
    draw = np.random.default_rng(0)
    shapes = {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    features = draw.normal(size=(5, 6)).astype(np.float32)
    hidden = features.astype(np.float64) @ weights["0.weight"].T + weights["0.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    embeddings = hidden @ weights["2.weight"].T + weights["2.bias"]
    named = {f"model.mm_projector.{name}": weight for name, weight in weights.items()}
    return named | {"features": features, "embeddings": embeddings.astype(np.float32)}


if __name__ == "__main__":
    save_file(connector(), CONNECTOR)
    FIXTURE.write_text(json.dumps(make(), ensure_ascii=False) + "\n", encoding="utf-8")
