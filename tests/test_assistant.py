"""The assistant is a stock checkpoint, learns what the stock loss says, and batches, caches and cuts change nothing."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aimv2_vlm.config import UserError
from aimv2_vlm.data import collate
from aimv2_vlm.data.chat import IGNORED, ChatFormat, train_chat_tokenizer
from aimv2_vlm.data.collate import FeatureCache, InstructionDataset, distinct_pictures
from aimv2_vlm.data.conversations import IMAGE, ConversationSet
from aimv2_vlm.data.tiling import Tiling, picture_views
from aimv2_vlm.data.transforms import normalize
from aimv2_vlm.models.assistant import (
    AssistantForTraining,
    build_assistant,
    check_context,
    encode_views,
    parameter_groups_by_part,
    part_of,
    see_rows_apart,
    set_trainable,
)

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=1024
)
GRIDS = ["1x1", "2x2", "1x1/2", "2x2/2"]  # behind the stroke: patches a side that become one token


def make_encoder(seed=0):
    torch.manual_seed(seed)
    return Aimv2VisionModel(
        Aimv2VisionConfig(
            image_size=28,
            patch_size=14,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            use_head=False,
            tie_last_hidden_states=True,
            initializer_range=0.2,
        )
    ).eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_chat_tokenizer(["What is shown? a red circle 12", "user assistant yes no"] * 10, out, 400)
    return out


def build(tokenizer_folder, grid, seed=0, **more):
    encoder = make_encoder(seed)
    grid, _, unshuffle = grid.partition("/")
    return build_assistant(
        encoder, None, grid, unshuffle=int(unshuffle or 1), tokenizer=str(tokenizer_folder), llm_config=LLAMA, image_mean=MEAN, image_std=STD, **more
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations: one picture, text only, several turns, several pictures; wide, tall and square pictures."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, (height, width) in {"wide": (20, 50), "tall": (70, 31), "square": (40, 40), "dot": (1, 1)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    rows = [
        (["wide"], "What?", "a red circle"),
        ([], "Hello", "yes"),
        (["tall"], f"And {IMAGE} this?", "no", "Sure?", "yes, 12"),
        (["square", "wide"], f"{IMAGE}{IMAGE}\nSame?", "no"),
        (["dot"], "What?", "a circle"),
        (["square"], "Red?", "yes"),
        ([], "One", "two", "Three", "four"),
        (["tall"], "What?", "a long answer of many words, 12 12 12"),
    ]
    rows = [
        {
            "id": i,
            "image": [f"{n}.png" for n in names],
            "conversations": [{"from": ("human", "gpt")[j % 2], "value": v} for j, v in enumerate(values)],
        }
        for i, (names, *values) in enumerate(rows)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def open_rows(folder):
    return ConversationSet([SimpleNamespace(path=str(folder / "rows.json"), images=str(folder), take="all")])


def dataset(folder, processor, features=None, max_length=None, **tiling):
    chat = ChatFormat(processor.tokenizer, processor.chat_template, processor.image_token)
    return InstructionDataset(
        open_rows(folder),
        chat,
        Tiling.from_processor(processor, **tiling),
        processor.image_processor,
        features,
        max_length,
    )


def arguments(batch):
    kept = {key: value for key, value in batch.items() if key not in ("bad", "num_rows", "num_truncated")}
    return kept | ({"pixel_values": pixels_of(batch)} if "pixel_values" in batch else {})


def pixels_of(batch):
    """As the encoder sees them; a batch hands them over as uint8 (without a picture it has none to hand over)."""
    pixels = batch["pixel_values"]
    assert pixels.dtype == torch.uint8 or not len(pixels)
    return normalize(pixels, MEAN, STD) if len(pixels) else pixels


def num_supervised(batch):
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def padded(batch):
    """(ids, attention mask, labels) of a concatenated batch as the stock model takes them: a row each, padded on the right."""
    rows = [[t[0, at] for at in torch.arange(batch["input_ids"].shape[1]).split(batch["row_lengths"])] for t in (batch["input_ids"], batch["labels"])]
    (ids, labels), longest = rows, max(batch["row_lengths"])
    fill = lambda parts, value: torch.stack([torch.nn.functional.pad(p, (0, longest - len(p)), value=value) for p in parts])  # noqa: E731
    return fill(ids, 0), fill([torch.ones_like(p) for p in ids], 0), fill(labels, IGNORED)


def stock_loss(model, batch, num_views):
    """Sum of the stock model's own loss; views folded as its processor gives them."""
    extra = {}
    if len(batch["pixel_values"]):
        pixels = pixels_of(batch)
        if num_views > 1 and model.config.model_type == "llava_next":
            pixels = pixels.view(-1, num_views, *pixels.shape[1:])
            extra["image_sizes"] = torch.tensor(batch["image_sizes"])
        extra["pixel_values"] = pixels
    ids, mask, labels = padded(batch)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, **extra)
    return out.loss * num_supervised(batch)


@pytest.mark.parametrize("pad_square", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_loss_is_the_stock_models(tokenizer_folder, data, grid, pad_square):
    model, processor = build(tokenizer_folder, grid, pad_square=pad_square)
    rows = dataset(data, processor)
    wrapper = AssistantForTraining(model)
    for batch in rows.microbatches(range(len(rows)), 3):
        out = wrapper(**arguments(batch))
        expected = stock_loss(model, batch, rows.tiling.num_views)
        assert abs(out["text_sum"] - expected) <= 1e-5 * abs(expected)
        assert out["text_count"] == num_supervised(batch)


def gradients(model, batches, weigh=True):
    model.zero_grad()
    total = sum(map(num_supervised, batches))
    wrapper = AssistantForTraining(model).train()
    for batch in batches:
        (wrapper(**arguments(batch))["text_sum"] / (total if weigh else 1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= tolerance * max(one[name].norm(), 1e-4), name


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gradient_is_the_stock_models(tokenizer_folder, data, grid):
    """Rows concatenated, the head on supervised tokens, the last block where it is read: all of it changes nothing."""
    model, processor = build(tokenizer_folder, grid)
    set_trainable(model, ["connector", "llm"])
    rows = dataset(data, processor)
    [batch] = rows.microbatches(range(len(rows)), len(rows))
    ours = gradients(model, [batch], weigh=False)
    model.zero_grad()
    see_rows_apart(model, False)
    stock_loss(model, batch, rows.tiling.num_views).backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, ours, 1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_cut_into_micro_batches_changes_no_gradient(tokenizer_folder, data, grid):
    model, processor = build(tokenizer_folder, grid)
    set_trainable(model, ["connector", "llm"])
    rows = dataset(data, processor)
    whole = gradients(model, rows.microbatches(range(8), 8))
    assert ("model.image_newline" in whole) == (grid == "2x2") and all(g.abs().sum() > 0 for g in whole.values())
    for size in (1, 3, 5):
        assert_same_gradients(whole, gradients(model, rows.microbatches(range(8), size)))
    assert_same_gradients(
        whole, gradients(model, rows.microbatches([3, 1, 0, 2], 2) + rows.microbatches([7, 4, 6, 5], 3))
    )


@pytest.mark.parametrize("kept", [0, 1, 8])
def test_rows_met_again_are_the_same_and_as_many_as_may_stay_are_not_assembled_again(tokenizer_folder, data, kept, monkeypatch):
    _, processor = build(tokenizer_folder, "2x2")
    rows = dataset(data, processor)
    lengths = [rows.length(index) for index in range(8)]
    rows = dataset(data, processor)
    monkeypatch.setattr(collate, "KEPT_TOKENS", {0: 0, 1: lengths[0], 8: sum(lengths)}[kept])
    calls = []
    monkeypatch.setattr(rows.chat, "assemble", lambda *args, real=rows.chat.assemble: calls.append(args) or real(*args))
    first, again = (rows.microbatches(range(8), 3) for _ in range(2))
    assert len(calls) == 16 - kept
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "labels", "pixel_values"))
    assert rows.fetch(0) is not rows.fetch(0) and isinstance(rows.fetch(0).input_ids, list)


@pytest.mark.parametrize("grid", GRIDS)
def test_cached_features_give_the_same_batches(tokenizer_folder, data, grid, tmp_path):
    model, processor = build(tokenizer_folder, grid)
    set_trainable(model, ["connector", "llm"])
    plain = dataset(data, processor)
    cache = open_cache(model, plain, tmp_path)
    cached = dataset(data, processor, cache)
    one, other = (rows.microbatches(range(8), 3) for rows in (plain, cached))
    for a, b in zip(one, other, strict=True):
        assert (
            "pixel_values" not in b
            and torch.equal(a["input_ids"], b["input_ids"])
            and a["image_sizes"] == b["image_sizes"]
        )
        x, y = (AssistantForTraining(model)(**arguments(batch))["text_sum"] for batch in (a, b))
        assert abs(x - y) <= 1e-5 * abs(x)
    assert_same_gradients(gradients(model, one), gradients(model, other), 1e-5)


def open_cache(model, rows, folder, encode=None, **more):
    return FeatureCache.open(
        folder,
        rows.conversations,
        rows.tiling,
        rows.image_processor,
        encode or (lambda pixels: encode_views(model, pixels)),
        model.model.vision_tower.state_dict(),
        **more,
    )


def test_a_cache_is_used_only_for_what_it_was_made_for(tokenizer_folder, data, tmp_path):
    model, processor = build(tokenizer_folder, "2x2")
    rows = dataset(data, processor)
    calls = []

    def encode(pixels):
        calls.append(len(pixels))
        return encode_views(model, pixels)

    done = []
    open_cache(model, rows, tmp_path, encode, batch_size=10, progress=lambda *state: done.append(state))
    assert calls == [10, 10] and done == [(2, 4), (4, 4)] and len(distinct_pictures(rows.conversations)) == 4
    assert (tmp_path / "features.bin").stat().st_size == FeatureCache.num_bytes(rows.conversations, rows.tiling, 32)
    first = (tmp_path / "features.bin").read_bytes()
    open_cache(model, rows, tmp_path, encode)
    assert len(calls) == 2

    with torch.no_grad():
        model.model.vision_tower.rms_norm.weight[3] += 1e-3
    open_cache(model, rows, tmp_path, encode)
    assert len(calls) > 2 and (tmp_path / "features.bin").read_bytes() != first
    for change in (dict(source_size=14), {}):
        calls.clear()
        open_cache(model, dataset(data, processor, **change), tmp_path, encode)
        assert calls


def test_a_cache_whose_making_was_cut_short_is_made_again(tokenizer_folder, data, tmp_path):
    model, processor = build(tokenizer_folder, "1x1")
    rows = dataset(data, processor)
    open_cache(model, rows, tmp_path / "whole", batch_size=2)

    def dies(pixels):
        if rows_seen:
            raise KeyboardInterrupt
        rows_seen.append(1)
        return encode_views(model, pixels)

    rows_seen = []
    with pytest.raises(KeyboardInterrupt):
        open_cache(model, rows, tmp_path / "cut", dies, batch_size=2)
    with pytest.raises(OSError):
        FeatureCache(tmp_path / "cut")
    open_cache(model, rows, tmp_path / "cut", batch_size=2)
    for name in ("features.bin", "cache.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("cached", [False, True])
def test_what_only_decoding_shows_keeps_its_position_with_weight_0(tokenizer_folder, data, tmp_path, cached):
    model, processor = build(tokenizer_folder, "2x2", pad_square=False)
    set_trainable(model, ["connector", "llm"])
    for name in ("wide", "tall", "square", "dot"):
        (tmp_path / f"{name}.png").write_bytes((data / f"{name}.png").read_bytes())
    rows = json.loads((data / "rows.json").read_text())
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((data / "tall.png").read_bytes()[:-200])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (600, 1)).save(tmp_path / "thin.png")
    bad = [
        {"id": name, "image": f"{name}.png", "conversations": rows[0]["conversations"]}
        for name in ("text", "cut", "empty", "thin")
    ]
    bad.append(
        {"id": "long", "conversations": [{"from": "human", "value": "word " * 300}, {"from": "gpt", "value": "a"}]}
    )
    (tmp_path / "rows.json").write_text(json.dumps(bad[:2] + rows + bad[2:]))

    mixed = dataset(tmp_path, processor, max_length=300)
    if cached:
        mixed.features = open_cache(model, mixed, tmp_path / "cache")
        assert sorted(os.path.basename(path) for path in mixed.features.bad) == [
            "cut.png",
            "empty.png",
            "text.png",
            "thin.png",
        ]
    assert len(mixed) == 13
    batches = mixed.microbatches(range(13), 4)
    named = [reason for batch in batches for reason in batch["bad"]]
    assert len(named) == 5 and all("rows.json: row" in reason for reason in named)
    for name, word in [
        ("text.png", "picture"),
        ("cut.png", "picture"),
        ("empty.png", "empty"),
        ("thin.png", "thin"),
        ("row 12", "too_long"),
    ]:
        assert any(name in reason and word in reason for reason in named), (name, named)
    assert sum(float((1 - batch["weights"]).sum()) for batch in batches) == 5

    plain = dataset(data, processor, max_length=300)
    assert_same_gradients(
        gradients(model, plain.microbatches(range(8), 8)), gradients(model, batches), 1e-5 if cached else 1e-6
    )


def test_rows_of_weight_0_count_nothing(tokenizer_folder, data):
    model, processor = build(tokenizer_folder, "1x1")
    rows = dataset(data, processor)
    batch = rows.collate([rows.fetch(0), rows.fetch(5)])
    alone = AssistantForTraining(model)(**arguments(rows.collate([rows.fetch(0)])))
    batch["weights"][1] = 0
    out = AssistantForTraining(model)(**arguments(batch))
    assert out["text_count"] == alone["text_count"] and abs(out["text_sum"] - alone["text_sum"]) < 1e-4


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_batch_without_pictures_still_reaches_every_trainable_parameter(
    tokenizer_folder, data, grid, cached, tmp_path
):
    """Otherwise a rank with text only leaves out a collective and the others wait forever."""
    model, processor = build(tokenizer_folder, grid)
    set_trainable(model, ["encoder", "connector", "llm"] if not cached else ["connector", "llm"])
    rows = dataset(data, processor)
    rows.features = open_cache(model, rows, tmp_path) if cached else None
    found = gradients(model, rows.microbatches([1, 6], 2))
    assert {part_of(name) for name in found} == {"connector", "llm"} | (set() if cached else {"encoder"})
    assert all(g.isfinite().all() for g in found.values())
    assert all(g.abs().sum() == 0 for name, g in found.items() if part_of(name) != "llm")
    nothing_learned = rows.collate([rows._bad(0, "x")])
    assert all(g.abs().sum() == 0 for g in gradients(model, [nothing_learned], weigh=False).values())


def test_only_the_parts_named_learn_and_the_encoder_keeps_every_bit(tokenizer_folder, data):
    model, processor = build(tokenizer_folder, "2x2")
    original = {name: tensor.clone() for name, tensor in make_encoder().state_dict().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counts = set_trainable(model, ["connector"])
    assert counts["encoder"] == counts["llm"] == 0 < counts["connector"]
    groups = parameter_groups_by_part(model)
    assert list(groups) == ["connector"] and "model.image_newline" in dict(groups["connector"])
    rows = dataset(data, processor)
    optimizer = torch.optim.AdamW([p for _, p in groups["connector"]], lr=1e-2, weight_decay=0.1)
    gradients(model, rows.microbatches(range(8), 4))
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(dict(groups["connector"]))
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    counts = set_trainable(model, ["encoder", "llm"])
    assert counts["connector"] == 0 and sum(counts.values()) + sum(before[n].numel() for n in changed) == sum(
        t.numel() for t in before.values()
    )


@pytest.mark.parametrize("parts,message", [(["llm", "vision"], "vision"), ([], "empty")])
def test_parts_that_are_not_there_are_refused(tokenizer_folder, parts, message):
    with pytest.raises(UserError, match=message):
        set_trainable(nn.Linear(1, 1), parts)


def test_a_frozen_encoder_stays_in_evaluation_mode(tokenizer_folder):
    model, _ = build(tokenizer_folder, "1x1")
    wrapper = AssistantForTraining(model)
    set_trainable(wrapper, ["connector", "llm"])
    wrapper.train()
    assert not model.model.vision_tower.training and model.model.language_model.training
    set_trainable(wrapper, ["encoder"])
    assert model.model.vision_tower.training


@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_the_normalised_ones_of_all_patches(tokenizer_folder, grid):
    model, processor = build(tokenizer_folder, grid)
    pixels = torch.rand(5, 3, 28, 28)
    expected = make_encoder()(pixel_values=pixels).last_hidden_state
    assert torch.equal(encode_views(model, pixels), expected)
    assert torch.allclose(encode_views(model, pixels, batch_size=2), expected, atol=1e-6)
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sizes = {"image_sizes": torch.tensor([[28, 28]])} if grid == "2x2" else {}
    model.model.get_image_features(pixels[None] if grid == "2x2" else pixels, **sizes)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(("kind", "layer", "grid"), [("clip", -2, "1x1"), ("clip", -2, "2x2"), ("siglip", None, "2x2"), ("siglip", -2, "1x1"), ("dinov2", -1, "2x2"), ("siglip", None, "2x2/2")])
def test_a_comparison_encoder_makes_a_stock_assistant_too(tokenizer_folder, data, tmp_path, kind, layer, grid):
    """What is trained on, what the stock class reads and what the encoder gives are the same features; also after saving."""
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=31, patch_size=14)  # 2 x 2 patches, a strip left over
    torch.manual_seed(4)
    tower = {
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, intermediate_size=48)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, intermediate_size=48)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2)),
    }[kind]()
    tower.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}), encoding="utf-8")
    grid, _, unshuffle = grid.partition("/")
    model, processor = build_assistant(
        tmp_path / "encoder", None, grid, unshuffle=int(unshuffle or 1), tokenizer=str(tokenizer_folder), llm_config=LLAMA, layer=layer, tokens="all" if kind == "siglip" else "patches")
    rows = dataset(data, processor)
    batch = rows.microbatches(range(len(rows)), 8)[0]
    loss = AssistantForTraining(model)(**arguments(batch))["text_sum"]
    expected = stock_loss(model, batch, rows.tiling.num_views)
    assert abs(loss - expected) <= 1e-5 * abs(expected)
    pixels = torch.rand(2, 3, 31, 31)
    out = tower.eval()(pixel_values=pixels, output_hidden_states=True)
    wanted = out.last_hidden_state if layer is None else out.hidden_states[layer]
    assert torch.allclose(encode_views(model, pixels), wanted[:, 0 if kind == "siglip" else 1 :], atol=1e-6)
    names = {name for name, _ in model.named_parameters() if part_of(name) == "encoder"}
    learned = sum(p.numel() for p in model.parameters()) - sum(p.numel() for n, p in model.named_parameters() if n in names)
    counts = set_trainable(model, ["encoder", "connector", "llm"])
    found = gradients(model, [batch])  # of what is trainable: DDP would wait for the others'
    assert all(gradient.abs().sum() > 0 for name, gradient in found.items() if name in names)
    unread = {name.split("vision_tower.")[1] for name in names - found.keys()}
    last = {"clip": "encoder.layers.2.", "siglip": "encoder.layers.2.", "dinov2": "encoder.layer.2."}[kind]
    assert any(name.startswith(last) for name in unread) == (layer == -2) and counts["connector"] + counts["llm"] == learned
    assert all(name.startswith((last, "post_layernorm", "layernorm", "embeddings.mask_token")) for name in unread)
    model.save_pretrained(tmp_path / "final")
    again = type(model).from_pretrained(tmp_path / "final").eval()
    assert torch.allclose(stock_loss(again, batch, rows.tiling.num_views), expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "keys", "message"), [
    ("CLIPVision", {}, "encoder.tokens: all, but CLS"), ("CLIPVision", {"tokens": "patches"}, "write -1, or -2"),
    ("CLIPVision", {"tokens": "patches", "layer": 7}, "has 2 blocks"), ("CLIPVision", {"tokens": "patches", "layer": -2, "image_size": 56}, "of its own 28 px"),
    ("CLIPVision", {"tokens": "patches", "unshuffle": 2}, "CLS of a clip_vision_model encoder"), ("SiglipVision", {"layer": -2, "unshuffle": 2}, "layer -2 of"),
    ("ViTMAE", {"tokens": "patches", "layer": -1}, "shuffles its patches"), ("Dinov2WithRegisters", {"tokens": "patches", "layer": -1}, "registers"),
])  # fmt: skip
def test_what_a_stock_llava_cannot_read_is_refused(tokenizer_folder, kind, keys, message):
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    encoder = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    with pytest.raises(UserError, match=message):
        build_assistant(encoder, None, "1x1", tokenizer=str(tokenizer_folder), llm_config=LLAMA, image_mean=MEAN, image_std=STD, **keys)


STOCK = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
answers = {}
for folder in sys.argv[2:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for name in ("square", "wide", "tall"):
        picture = Image.open(f"{sys.argv[1]}/{name}.png").convert("RGB")
        if getattr(processor.image_processor, "pad_square", False):
            side, ground = max(picture.size), tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
            padded = Image.new("RGB", (side, side), ground)
            padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = padded
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=12)
        answers[f"{folder} {name}"] = processor.decode(out[0, inputs["input_ids"].shape[1]:])
print(json.dumps({"answers": answers, "ours": sorted(name for name in sys.modules if name.startswith("aimv2_vlm"))}))
"""


def own_answers(model, processor, folder):
    """Answers from our own ids and our own views: greedy steps through the training wrapper's model."""
    chat = ChatFormat(processor.tokenizer, processor.chat_template, processor.image_token)
    tiling = Tiling.from_processor(processor)
    from aimv2_vlm.data.conversations import Turn

    answers = {}
    for name in ("square", "wide", "tall"):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"{name}.png").convert("RGB"))).permute(2, 0, 1)
        views, size = picture_views(pixels, tiling, processor.image_processor)
        ids = chat.prompt_ids([Turn("user", f"{IMAGE}\nWhat?")], [tiling.num_image_tokens(*pixels.shape[-2:])])
        folded = model.config.model_type == "llava_next"
        extra = {"image_sizes": torch.tensor([size])} if folded else {}
        pixel_values = views[None] if folded else views
        out = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixel_values, max_new_tokens=12, **extra)
        answers[name] = processor.tokenizer.decode(out[0, len(ids) :])
    return answers


def test_a_saved_assistant_answers_the_same_without_this_package(tokenizer_folder, data, tmp_path):
    expected = {}
    for grid, pad_square in [("1x1", True), ("2x2", True), ("2x2", False), ("1x1/2", True), ("3x3/2", False)]:
        torch.manual_seed(3)
        model, processor = build(tokenizer_folder, grid, seed=3, pad_square=pad_square)
        with torch.no_grad():  # answers that differ between pictures
            model.lm_head.weight.normal_(std=1.0)
        folder = tmp_path / f"{grid.replace('/', '-')}-{pad_square}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        expected |= {f"{folder} {name}": answer for name, answer in own_answers(model.eval(), processor, data).items()}
    script = tmp_path / "stock.py"
    script.write_text(textwrap.dedent(STOCK))
    folders = list(dict.fromkeys(key.split()[0] for key in expected))
    done = subprocess.run(
        [sys.executable, str(script), str(data), *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == [] and found["answers"] == expected and len(set(expected.values())) > 3


def test_generation_stops_and_pads_as_saved(tokenizer_folder, tmp_path):
    model, processor = build(tokenizer_folder, "1x1", max_new_tokens=7)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    tokenizer = processor.tokenizer
    assert sorted(tokenizer.convert_ids_to_tokens(config["eos_token_id"])) == ["<|end_of_text|>", "<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(config["pad_token_id"]) == "<|finetune_right_pad_id|>"
    assert config["max_new_tokens"] == 7 and config["do_sample"] is False


def test_a_decoder_without_reserved_tokens_grows_by_mean_rows(tmp_path, data):
    """A given decoder keeps its weights; new rows (a multiple of 64 in all) are the mean of the old ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "What", "?", "yes", ":", "USER", "ASSISTANT", "."])
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=10))
    rows = llm.get_input_embeddings().weight.detach().clone()
    with pytest.raises(
        UserError, match="learned as|prefix"
    ):  # a word-level tokenizer cannot write answers back: refused before use
        build_assistant(make_encoder(), llm, tokenizer=tokenizer, image_mean=MEAN, image_std=STD, template="plain")
    from aimv2_vlm.models.assistant import _grow_embeddings

    _grow_embeddings(llm, 12)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        assert layer.weight.shape[0] == 64 and torch.allclose(
            layer.weight[10:], layer.weight[:10].mean(0).expand(54, -1)
        )
    assert torch.equal(llm.get_input_embeddings().weight[:10], rows)


def test_a_given_decoder_is_used_as_it_is(tokenizer_folder, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(5)
    llm = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=len(tokenizer), tie_word_embeddings=True))
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = build_assistant(make_encoder(), str(tmp_path), "2x2", image_mean=MEAN, image_std=STD)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(input_ids=ids).logits, llm.eval()(input_ids=ids).logits)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight and len(processor.tokenizer) == len(
        tokenizer
    )
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_decoder_in_vicunas_layout_opens(tmp_path, data):
    """Its folder holds a sentencepiece `tokenizer.model` and no `tokenizer.json`; pad becomes a row of its own, never eos."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("What is shown? a red circle 12 USER ASSISTANT yes no.\n" * 20, encoding="utf-8")
    folder = tmp_path / "vicuna"
    torch.manual_seed(5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=320, byte_fallback=True,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=320, pad_token_id=0)).save_pretrained(folder)
    (tmp_path / "tokenizer.model").rename(folder / "tokenizer.model")
    settings = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=False, model_max_length=2048)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")), encoding="utf-8"
    )
    model, processor = build_assistant(make_encoder(), str(folder), template="vicuna", image_mean=MEAN, image_std=STD)
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, 0)
    assert tokenizer.decode(tokenizer("a red circle", add_special_tokens=False)["input_ids"]) == "a red circle"
    assert model.get_input_embeddings().weight.shape[0] == 384


def test_picture_statistics_come_from_the_encoders_checkpoint(tokenizer_folder, tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    more = dict(tokenizer=str(tokenizer_folder), llm_config=LLAMA)
    with pytest.raises(UserError, match="image_mean"):
        build_assistant(str(tmp_path), **more)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    model, processor = build_assistant(str(tmp_path), **more)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3] and list(
        processor.image_processor.image_std
    ) == [0.4, 0.5, 0.6]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor)


def test_what_cannot_be_built_is_refused(tokenizer_folder):
    more = dict(tokenizer=str(tokenizer_folder), image_mean=MEAN, image_std=STD)
    with pytest.raises(UserError, match="neither a path nor"):
        build_assistant(make_encoder(), **more)
    with pytest.raises(UserError, match="tokenizer"):
        build_assistant(make_encoder(), image_mean=MEAN, image_std=STD)
    with pytest.raises(UserError, match="no tokenizer"):
        build_assistant(make_encoder(), tokenizer="/nowhere/at/all", image_mean=MEAN, image_std=STD)
    with pytest.raises(UserError, match="28 px"):
        build_assistant(make_encoder(), None, Tiling((1, 1), 56, 14), llm_config=LLAMA, **more)
    with pytest.raises(UserError, match="tiling"):
        build_assistant(make_encoder(), None, "2 by 2", llm_config=LLAMA, **more)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grid", ["1x1", "2x2", "1x1/2"])
def test_both_parts_keep_the_attention_that_was_asked_for(tokenizer_folder, tmp_path, grid, attention):
    make_encoder().save_pretrained(tmp_path)
    grid, _, unshuffle = grid.partition("/")
    model, _ = build_assistant(str(tmp_path), None, grid, unshuffle=int(unshuffle or 1), tokenizer=str(tokenizer_folder), llm_config=LLAMA,
                               image_mean=MEAN, image_std=STD, attention=attention)
    for part in (model.model.vision_tower, model.model.language_model, SimpleNamespace(config=model.config.text_config)):
        assert part.config._attn_implementation == attention


def test_a_decoder_whose_embeddings_a_stock_llava_would_not_find_is_refused(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(UserError, match="GPT2LMHeadModel shares its head's weights .* `embed_tokens`"):
        build_assistant(make_encoder(), llm, tokenizer=tokenizer, image_mean=MEAN, image_std=STD)


def test_a_picture_and_prompt_beyond_the_decoders_positions_are_refused(tokenizer_folder):
    model, _ = build(tokenizer_folder, "1x1")
    check_context(model, 1000, 20, 4)
    with pytest.raises(UserError, match="1025.*1024 positions"):
        check_context(AssistantForTraining(model), 1000, 20, 5)
