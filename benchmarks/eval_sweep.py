"""A benchmark's questions answered: ours against lmms-eval's stock model `llava_hf`, at 1, 4 and 30 questions per picture.

    python benchmarks/eval_sweep.py [--rounds 5] [--new-tokens 16]

Both sides get the same requests of one lmms-eval task (pictures as JPEG bytes of 640 x 480, decoded and resized within the measured time; questions
of 6 to 14 words and the single-word prompt; at most 16 new tokens, as VQAv2, GQA and TextVQA set there) and load the same checkpoint: a stock Llava
with an AIMv2 encoder at 336 px (576 tokens; 256 wide, 4 layers) and a Llama decoder 512 wide with 4 layers and 32,000 words, random weights, fp32. Random
weights hardly ever end an answer, so that nearly all have 16 tokens (`stopped_early` counts the others; a trained model's mostly end earlier, which
brings the ratio at one question per picture down and the others up: see --new-tokens).

Timed is the model's `generate_until`, in turn on each side; times are of the processor, not of the clock, and single-threaded, so that a busy machine
counts less. `equal`: all answers are identical. What a sweep does besides, asking a sample again through plain transformers, is left out. lmms-eval's
module imports decord, which reads videos, even where there is none to read: where it is not installed, an empty module stands in for it in this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import random
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from record import interleaved, record
from tokenizers import Tokenizer, models, pre_tokenizers
from transforms import cover, load_photographs
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from aimv2_vlm.evaluation.benchmarks import SINGLE_WORD, read_benchmark, write_benchmark
from aimv2_vlm.evaluation.sweep import _write_task
from aimv2_vlm.models.encoder import build_encoder

VOCAB, SIZE = 32_000, 336
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
# Content as lmms-eval's llava_hf gives it (one string) and as processors do (a list).
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = ["user", "assistant", ":", ".", *SINGLE_WORD.rstrip(".").split()]


def make_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    words = [*SPECIAL, *WORDS, *(f"w{i}" for i in range(VOCAB))][:VOCAB]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    encoder = build_encoder(image_size=SIZE, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=2)
    llm = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.05,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=encoder.config, text_config=llm, image_token_id=4, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_seq_length=(SIZE // 14) ** 2,
    ))  # fmt: skip
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(30)  # answers depend on the picture
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size), tokenizer=tokenizer, patch_size=14,
        vision_feature_select_strategy="full", chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def jpeg(photograph, draw: random.Random) -> bytes:
    """640 x 480, a part of the photograph that differs from picture to picture."""
    big = cover(photograph, 800, 600)
    left, top = draw.randrange(161), draw.randrange(121)
    buffer = io.BytesIO()
    big.crop((left, top, left + 640, top + 480)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_task(root: Path, per_picture: int, num_pictures: int, new_tokens: int):
    """An lmms-eval task with its requests, and its name."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    draw = random.Random(per_picture)
    photographs, _ = load_photographs(None, 2)
    rows = []
    for p in range(num_pictures):
        data = jpeg(photographs[p % len(photographs)], draw)
        for q in range(per_picture):
            question = " ".join(f"w{draw.randrange(VOCAB - 100)}" for _ in range(draw.randint(6, 14)))
            rows.append({"id": f"{p}-{q}", "picture_id": f"p{p}", "image": {"bytes": data, "path": f"{p}.jpg"}, "question": question,
                         "question_form": "any", "answers": ["none"]})  # fmt: skip
    name = f"questions{per_picture}"
    folder = write_benchmark(root / name, rows, {"metric": "exact_match", "prompt_suffix": SINGLE_WORD})
    tasks = _write_task(read_benchmark(name, folder), name, new_tokens, root / "work")
    task = get_task_dict([name], TaskManager(include_path=[str(tasks)], include_defaults=False))[name]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--only", type=int, help="this many questions per picture only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shimmed = importlib.util.find_spec("decord") is None
    if shimmed:
        sys.modules["decord"] = types.ModuleType("decord")
        sys.modules["decord"].VideoReader = sys.modules["decord"].cpu = None
    from aimv2_vlm.evaluation.lmms_model import AssistantModel  # isort: skip  (first: it keeps Pillow strict)
    from lmms_eval.models.simple.llava_hf import LlavaHf

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = str(make_checkpoint(root / "checkpoint"))
        sides = {
            "ours": AssistantModel(pretrained=folder, device="cpu", precision="fp32", batch_size=16),
            "peer": LlavaHf(pretrained=folder, device="cpu", device_map="cpu", dtype="float32", batch_size=1),
        }
        for per_picture, num_pictures in ((1, 12), (4, 3), (30, 1)):
            if arguments.only not in (None, per_picture):
                continue
            task, name = make_task(root, per_picture, num_pictures, arguments.new_tokens)
            docs = {name: {"test": task.test_docs()}}
            given: dict[str, list[str]] = {}

            def run(side: str, requests: list = task.instances, docs: dict = docs, given: dict = given) -> None:
                sides[side].task_dict = docs
                for request in requests:  # llava_hf empties them of `until` and adds keys
                    request.arguments = (request.args[0], {"max_new_tokens": arguments.new_tokens, "do_sample": False, "until": []}, *request.args[2:])
                given[side] = [str(answer).strip() for answer in sides[side].generate_until(requests)]

            for side in sides:
                run(side, task.instances[:2])  # warms up
            seconds = interleaved({"ours": lambda: run("ours"), "peer": lambda: run("peer")}, [()] * arguments.rounds, time.process_time)
            ratios = [round(peer / ours, 2) for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
            ours, peer = (statistics.median(seconds[side]) for side in ("ours", "peer"))
            lengths = sorted(len(answer.split()) for answer in given["peer"])
            record("eval_sweep", {
                "name": f"eval, {per_picture} questions per picture, {num_pictures} pictures", "ours": round(ours / len(lengths), 4),
                "peer": round(peer / len(lengths), 4), "ratio": round(peer / ours, 2), "unit": "s of one core per question",
                "equal": given["ours"] == given["peer"], "ratios_of_rounds": ratios, "different_answers": len(set(given["peer"])),
                "words_per_answer": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
                "stopped_early": sum(length < arguments.new_tokens for length in lengths), "threads": torch.get_num_threads(),
                "peer_is": "lmms-eval's llava_hf, batch 1 (it takes no other)" + (", empty decord" if shimmed else ""),
            }, ("lmms_eval",))  # fmt: skip


if __name__ == "__main__":
    main()
