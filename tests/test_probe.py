"""The attentive probe: head, data, augmentation, loop, choice of hyper-parameters."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aimv2_vlm.config import FrozenEncoder, LabelledData, Loop, Optimizer, ProbeAugmentation, ProbeRecipe, UserError
from aimv2_vlm.data import augmentation
from aimv2_vlm.data.labelled import FrozenFeatures, LabelledDataset, open_splits, read_split, training_transform
from aimv2_vlm.data.native import WholePicture
from aimv2_vlm.data.order import Draws
from aimv2_vlm.data.transforms import EvalTransform, decode_image, normalize
from aimv2_vlm.evaluation import probing
from aimv2_vlm.models.backbone import load_backbone
from aimv2_vlm.models.encoder import build_encoder, encode, load_encoder
from aimv2_vlm.models.probe import AttentiveHead, AttentiveProbe, TokenNorm
from aimv2_vlm.train.loop import Stopped
from aimv2_vlm.train.objectives import ProbeObjective

SIZE, WIDTH, HEADS = 28, 32, 2
COLORS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


def picture(color: tuple[int, int, int], seed: int) -> bytes:
    """A noisy patch of colour, as PNG."""
    noise = np.random.default_rng(seed).integers(-40, 41, (40, 36, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, per_class: dict[str, int], shuffled: bool = False) -> Path:
    """`root/<split>/<class>/<number>.png`; shuffled: the class says nothing about the colour."""
    seed, draws = 0, random.Random(0)
    for split, count in per_class.items():
        for name in COLORS:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                seed += 1
                color = COLORS[draws.choice(list(COLORS)) if shuffled else name]
                (root / split / name / f"{number}.png").write_bytes(picture(color, seed))
    return root


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("colors"), {"train": 30, "test": 15})


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    build_encoder(image_size=SIZE, hidden_size=WIDTH, intermediate_size=48, num_layers=1, num_heads=HEADS,
                  generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}))
    return folder


def a_recipe(encoder: Path, data: Path, out: Path, *, policy: str = "none", steps: int = 40, lr: float = 2e-3, cache: str = "auto", **more) -> ProbeRecipe:
    return ProbeRecipe(
        out=str(out), precision="fp32", encoder=FrozenEncoder(path=str(encoder), cache=cache), data=LabelledData(path=str(data), **more),
        augment=ProbeAugmentation(policy=policy),
        optim=Optimizer(lr=lr, min_lr=1e-5, warmup_lr=0.0, warmup_steps=0, steps=steps, batch_size=24, micro_batch_size=24, betas=[0.9, 0.999],
                        weight_decay=0.05, decoupled=False, clip=3.0),
        train=Loop(num_workers=0, log_every=1, save_every=7, trackers=[]),
    )


# ------------------------------------------------------------------------------------------------------------------- head


def oracle(state: dict[str, torch.Tensor], features: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The head of the paper in plain operations: statistics of all tokens, one query, a linear classifier."""
    tokens = features.reshape(-1, features.shape[-1])
    normed = (features - tokens.mean(0)) / torch.sqrt(((tokens - tokens.mean(0)) ** 2).mean(0) + 1e-6)
    rows, size = [], features.shape[-1] // num_heads
    for picture_ND in normed:
        keys, values = picture_ND @ state["key.weight"].T, picture_ND @ state["value.weight"].T
        pooled = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = (keys[:, part] @ state["query"][part]) / math.sqrt(size)
            shares = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            pooled.append((shares[:, None] * values[:, part]).sum(0))
        rows.append(torch.cat(pooled) @ state["classifier.weight"].T + state["classifier.bias"])
    return torch.stack(rows)


def test_head_and_norm_equal_plain_operations_forward_and_backward():
    torch.manual_seed(0)
    norm, head = TokenNorm(WIDTH), AttentiveHead(WIDTH, 4, 5)
    torch.nn.init.normal_(head.query)  # N(0, 0.02) makes all attention alike
    features, labels = 3 + 2 * torch.randn(6, 9, WIDTH), torch.randint(0, 5, (6,))
    logits = head(norm(features))
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in head.named_parameters()}
    expected = oracle(state, features, 4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    torch.nn.functional.cross_entropy(expected, labels).backward()
    for name, parameter in head.named_parameters():
        wanted = state[name].grad
        assert (parameter.grad - wanted).norm() <= 1e-6 * wanted.norm(), name
    assert set(state) == {"query", "key.weight", "value.weight", "classifier.weight", "classifier.bias"}
    assert 0.01 < AttentiveHead(512, 4, 5).query.std() < 0.03


def test_norm_equals_batch_norm_and_moves_its_statistics_in_training_only():
    torch.manual_seed(1)
    ours, theirs = TokenNorm(WIDTH), torch.nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False)
    for _ in range(3):
        features = 2 + 5 * torch.randn(4, 7, WIDTH)
        torch.testing.assert_close(ours(features), theirs(features.transpose(1, 2)).transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    before = ours.running_mean.clone(), ours.running_var.clone()
    torch.testing.assert_close(ours(features), theirs(features.transpose(1, 2)).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.running_mean, before[0]) and torch.equal(ours.running_var, before[1])


def test_autocast_leaves_the_norm_as_it_is():
    torch.manual_seed(1)
    features, weights = 2 + 5 * torch.randn(4, 7, WIDTH), torch.tensor([1.0, 0.0, 1.0, 1.0])
    plain, halved = TokenNorm(WIDTH), TokenNorm(WIDTH)
    expected = plain(features, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(halved(features, weights), expected)
    assert torch.equal(halved.running_mean, plain.running_mean) and torch.equal(halved.running_var, plain.running_var)


def test_a_hole_and_a_batch_that_is_not_finite_leave_no_trace_in_the_statistics():
    torch.manual_seed(2)
    features, weights = torch.randn(4, 3, WIDTH), torch.tensor([1.0, 0.0, 1.0, 1.0])
    whole, holed = TokenNorm(WIDTH), TokenNorm(WIDTH)
    kept = whole(features[weights > 0])
    torch.testing.assert_close(holed(features, weights)[weights > 0], kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(holed.running_var, whole.running_var)
    before = holed.running_mean.clone(), holed.running_var.clone()
    holed(features, torch.zeros(4))
    holed(torch.full((4, 3, WIDTH), torch.inf))
    assert torch.equal(holed.running_mean, before[0]) and torch.equal(holed.running_var, before[1])


def test_encoder_is_frozen_in_evaluation_mode_and_its_normalised_features_are_used(encoder_path):
    encoder = load_encoder(encoder_path)
    model = AttentiveProbe(load_backbone(encoder_path), 3, batch_size=2).train()
    assert model.head.training and model.norm.training and not any(module.training for module in model.encoder.modules())
    pixels = torch.randn(5, 3, SIZE, SIZE)
    torch.testing.assert_close(model.features(pixels), encode(encoder, pixels), rtol=0, atol=1e-5)
    assert model.head.num_heads == HEADS
    model(pixels).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and all(p.grad is not None for p in model.head.parameters())


def test_objective_counts_good_rows_and_sums_entropy_and_errors(encoder_path):
    model, objective = AttentiveProbe(load_backbone(encoder_path), 3).eval(), ProbeObjective(14, [0.5] * 3, [0.25] * 3)
    batch = {"pixels": torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8), "labels": torch.tensor([0, 1, 2, 0]),
             "weights": torch.tensor([1.0, 1.0, 0.0, 1.0]), "bad": ["x: y"]}
    assert objective.counts(batch) == {"classification": 3, "samples": 4, "tokens": 12}
    sums, logits = objective.sums(model, batch, torch.device("cpu")), model((batch["pixels"] / 255 - 0.5) / 0.25).detach()
    good = [0, 1, 3]
    wanted = -logits.log_softmax(-1)[good, batch["labels"][good]].sum()
    torch.testing.assert_close(sums["classification"].detach(), wanted, rtol=1e-5, atol=1e-5)
    assert sums["zero_one"].item() == (logits[good].argmax(-1) != batch["labels"][good]).sum().item()
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 3, SIZE, SIZE))
    counted = objective.flops(model, batch) - 2 * model.head_flops(3, 4) + 2 * WIDTH**2  # the query's way through the keys
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


# ------------------------------------------------------------------------------------------------------------------- data


def test_folder_and_parquet_give_the_same_pictures(colors, tmp_path):
    import pyarrow
    import pyarrow.parquet

    from_folder = read_split(LabelledData(path=str(colors)), "test")
    assert len(from_folder) == 45 and {p.label for p in from_folder} == set(COLORS) and from_folder[0].name == "test/blue/0.png"
    names = sorted(COLORS)
    metadata = {"huggingface": json.dumps({"info": {"features": {"kind": {"names": names, "_type": "ClassLabel"}}}})}
    rows = {"image": [{"bytes": p.read(), "path": p.name} for p in from_folder], "kind": [names.index(p.label) for p in from_folder],
            "where": ["a"] * 40 + ["b"] * 5}
    pyarrow.parquet.write_table(pyarrow.table(rows).replace_schema_metadata(metadata), tmp_path / "test-00000-of-00001.parquet")
    data = LabelledData(path=str(tmp_path), label_column="kind")
    assert [(p.label, p.digest) for p in read_split(data, "test")] == [(p.label, p.digest) for p in from_folder]
    assert len(read_split(LabelledData(path=str(tmp_path), label_column="kind", where={"where": "b"}), "test")) == 5
    for wrong, word in ((LabelledData(path=str(tmp_path)), "label_column"), (LabelledData(path=str(tmp_path), label_column="kind", image_column="where"), "holds no pictures")):
        with pytest.raises(UserError, match=word):
            read_split(wrong, "test")


def test_a_missing_split_and_a_class_of_test_alone_are_refused_by_name(colors, tmp_path):
    with pytest.raises(UserError, match="no split 'val'.*test, train"):
        read_split(LabelledData(path=str(colors)), "val")
    write_folder(tmp_path, {"train": 2, "test": 2})
    (tmp_path / "train" / "red").rename(tmp_path / "train" / "crimson")
    with pytest.raises(UserError, match="lacks: red"):
        open_splits(LabelledData(path=str(tmp_path)), 0)


def test_splits_share_no_content_and_selection_is_a_stratified_tenth(tmp_path):
    root = write_folder(tmp_path, {"train": 40, "test": 5})
    for number in range(40, 44):  # copies within train stay together
        (root / "train" / "red" / f"{number}.png").write_bytes((root / "train" / "red" / f"{number - 40}.png").read_bytes())
    splits = open_splits(LabelledData(path=str(root)), 3)
    digests = [{p.digest for p in part} for part in (splits.fit, splits.selection, splits.test)]
    assert not digests[0] & digests[1] and not digests[2] & (digests[0] | digests[1])
    assert all(sum(p.digest in digests[1] and p.label == name for p in splits.selection) >= 4 for name in COLORS) and len(digests[1]) == 12
    assert splits.report["copies_within_train"] == 4 and len(splits.train) == 124
    again, other = open_splits(LabelledData(path=str(root)), 3), open_splits(LabelledData(path=str(root)), 4)
    assert [p.name for p in again.selection] == [p.name for p in splits.selection] != [p.name for p in other.selection]
    (root / "train" / "blue" / "leak.png").write_bytes((root / "test" / "red" / "0.png").read_bytes())
    with pytest.raises(UserError, match="1 pictures of train are in test too .first: train/blue/leak.png"):
        open_splits(LabelledData(path=str(root)), 3)
    dropped = open_splits(LabelledData(path=str(root), duplicates="drop"), 3)
    assert dropped.report["duplicates_dropped_from_train"] == ["train/blue/leak.png"] and len(dropped.train) == 124 and len(dropped.test) == 15
    assert dropped.report["contents_with_two_labels"] == 1


def test_rows_are_functions_of_seed_and_position_and_each_epoch_visits_all(colors):
    pictures = read_split(LabelledData(path=str(colors)), "train")
    transform = training_transform(ProbeAugmentation(), SIZE, [0.5] * 3)
    rows = LabelledDataset(pictures, sorted(COLORS), 7, EvalTransform(SIZE, 32), transform)
    one, cut = rows.microbatch(range(100, 108)), [rows.microbatch([p]) for p in range(100, 108)]
    torch.rand(3), random.random()  # no generator's state matters
    assert torch.equal(one["pixels"], torch.cat([batch["pixels"] for batch in cut]))
    assert one["pixels"].dtype == torch.uint8 and one["pixels"].shape == (8, 3, SIZE, SIZE)
    for epoch in range(2):
        seen = [rows.order.locate(p).sample for p in range(epoch * 90, epoch * 90 + 90)]
        assert sorted(seen) == list(range(90))
    plain = LabelledDataset(pictures, sorted(COLORS), 7, EvalTransform(SIZE, 32))
    number = plain.order.locate(100).sample
    assert torch.equal(plain.microbatch([100])["pixels"], plain.evaluation([number])["pixels"])
    assert not torch.equal(plain.microbatch([100])["pixels"], rows.microbatch([100])["pixels"])


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre_as_torchvision_does():
    from torchvision.transforms import v2

    image = torch.randint(0, 256, (3, 90, 61), dtype=torch.uint8)
    stock = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(28)])
    assert torch.equal(EvalTransform(28, 32)(image), stock(image))


def test_whole_pictures_keep_their_size_in_patches_and_are_bounded():
    whole = WholePicture(14)
    assert [tuple(whole(torch.zeros(3, h, w, dtype=torch.uint8)).shape[1:]) for h, w in ((28, 42), (30, 50), (1, 1), (6, 90))] == [
        (28, 42), (28, 56), (14, 14), (14, 84)]  # fmt: skip
    same = torch.randint(0, 256, (3, 28, 42), dtype=torch.uint8)
    assert torch.equal(whole(same), same) and whole.max_patches == 3944
    height, width = whole(torch.zeros(3, 2000, 4000, dtype=torch.uint8)).shape[1:]
    assert 3700 < height * width / 14**2 <= 3944 and width / height == pytest.approx(2, rel=0.03)


def test_pictures_are_judged_at_their_own_size_one_by_one_or_together(tmp_path):
    folder = tmp_path / "native"
    build_encoder(image_size=SIZE, hidden_size=WIDTH, intermediate_size=48, num_layers=1, num_heads=HEADS, position_embedding="sincos",
                  generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    root = write_folder(tmp_path / "data", {"train": 8, "test": 4})
    sizes = [(28, 28), (56, 28), (30, 70), (28, 28)]
    for label, colour in COLORS.items():
        for number, (height, width) in enumerate(sizes):
            path = root / "test" / label / f"{number}.png"
            Image.open(io.BytesIO(picture(colour, 7 * number))).resize((width, height)).save(path)
    (root / "test" / "red" / "0.png").write_bytes(b"no picture")
    recipe = a_recipe(folder, root, tmp_path / "out", policy="none", steps=12, max_bad_fraction=0.5)
    recipe.judge_native, recipe.encoder.batch_size = True, 5
    result = probing.probe(recipe)
    model, classes = probing.load_probe(tmp_path / "out" / "final")
    right, entropy = {}, 0.0
    for label in COLORS:  # each picture by hand
        for path in sorted((root / "test" / label).iterdir()):
            if path.stat().st_size > 20:
                pixels = WholePicture(14)(decode_image(path.read_bytes()))
                logits = model(normalize(pixels, [0.5] * 3, [0.25] * 3)[None])
                entropy -= logits.log_softmax(-1)[0, classes.index(label)].item()
                right[f"test/{label}/{path.name}"] = int(classes[logits.argmax().item()] == label)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {sample["name"]: sample["right"] for sample in samples} == right and len(right) == 11
    assert result["loss"] == pytest.approx(entropy / 11, rel=1e-4)
    patches = [4, 8, 2 * 5, 4] * 3
    assert result["num_tokens"] == round(sum(patches[1:]) / 11, 1) and result["num_bad"] == 1 and "own size" in result["features"]
    fixed = tmp_path / "fixed"
    build_encoder(image_size=SIZE, hidden_size=WIDTH, intermediate_size=48, num_layers=1, num_heads=HEADS).save_pretrained(fixed)
    shutil.copy(folder / "preprocessor_config.json", fixed)
    refused = a_recipe(fixed, root, tmp_path / "refused", max_bad_fraction=0.5)
    refused.judge_native = True
    with pytest.raises(UserError, match="^judge_native: .* positions for one size"):
        probing.probe(refused)


def test_a_bad_picture_is_a_hole_that_is_named(tmp_path, encoder_path):
    root = write_folder(tmp_path / "data", {"train": 4, "test": 3})
    (root / "train" / "red" / "0.png").write_bytes(b"no picture")
    (root / "test" / "red" / "1.png").write_bytes(picture(COLORS["red"], 99)[:200])
    pictures = read_split(LabelledData(path=str(root)), "train")
    rows = LabelledDataset(pictures, sorted(COLORS), 0, EvalTransform(SIZE))
    batch = rows.evaluation(range(12))
    assert batch["bad"] == ["train/red/0.png: not a picture in a known format"] and batch["weights"].tolist().count(0.0) == 1
    for cache in ("on", "off"):
        recipe = a_recipe(encoder_path, root, tmp_path / cache, steps=4, cache=cache, max_bad_fraction=0.5)
        result = probing.probe(recipe)
        assert result["num_samples"] == 8 and result["num_bad"] == 1 and result["bad"][0].startswith("test/red/1.png: ")
        assert result["per_class"]["red"] == {"num_samples": 2, "num_correct": result["per_class"]["red"]["num_correct"], "trained_on": 4}
        report = json.loads((tmp_path / cache / "data_report.json").read_text())
        assert report["bad_samples_in_training"] == 8 and set(report["named"]) == {"train/red/0.png: not a picture in a known format"}


@pytest.mark.parametrize("name", list(augmentation.OPERATIONS))
def test_every_operation_equals_timms(name, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    image, fill = Image.open(io.BytesIO(picture((180, 90, 40), 5))).convert("RGB"), (124, 116, 104)
    increasing = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
    theirs_name = name + "Increasing" * (name in increasing) + "Rel" * name.startswith("Translate")
    assert theirs_name in timm._RAND_INCREASING_TRANSFORMS and len(timm._RAND_INCREASING_TRANSFORMS) == len(augmentation.OPERATIONS)
    assert augmentation.OPERATIONS[name](image, 1.0, 1, fill).size == image.size
    for magnitude in (0.0, 5.3, 9.0, 9.99):
        for sign, drawn in ((1, 0.1), (-1, 0.9)):
            monkeypatch.setattr(timm.random, "random", lambda drawn=drawn: drawn)
            operation = timm.AugmentOp(theirs_name, prob=1.0, magnitude=magnitude, hparams={"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
            ours = augmentation.OPERATIONS[name](image, magnitude / 10, sign, fill)
            assert np.array_equal(np.array(ours), np.array(operation(image))), (magnitude, sign)


def test_policy_draws_half_of_the_operations_with_magnitudes_around_nine(monkeypatch):
    calls = []
    spies = {name: (lambda image, strength, sign, fill, name=name: calls.append((name, strength, sign)) or image) for name in augmentation.OPERATIONS}
    monkeypatch.setattr(augmentation, "OPERATIONS", spies)
    for seed in range(3000):
        augmentation.rand_augment(None, Draws(seed), (0, 0, 0))
    names, strengths, signs = zip(*calls)
    assert len(calls) == pytest.approx(3000, rel=0.06) and np.mean(signs) == pytest.approx(0, abs=0.06)
    assert np.mean(strengths) == pytest.approx(0.9, abs=0.005) and np.std(strengths) == pytest.approx(0.05, abs=0.005) and max(strengths) <= 1
    assert min(names.count(name) for name in spies) > 140


# ------------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("policy", ["none", "rand-m9-mstd0.5-inc1"])
def test_separable_pictures_are_told_apart(colors, encoder_path, tmp_path, policy):
    recipe = a_recipe(encoder_path, colors, tmp_path / "run", policy=policy, lr=1e-2)
    if policy != "none":
        recipe.augment.color_jitter = 0.0
    result = probing.probe(recipe)
    assert result["accuracy"] > 0.95 and result["low"] < result["accuracy"] <= result["high"] <= 1 and result["num_samples"] == 45
    assert result["cached_features"] == ("fp32" if policy == "none" else None) and result["most_frequent_class"] == pytest.approx(1 / 3)
    assert result["split_sizes"] == {"trained_on": 90, "selection": 9, "test": 45}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and rows[-1]["zero_one_loss"] <= rows[0]["zero_one_loss"] and rows[-1]["loss"] == rows[-1]["classification_loss"]
    model, classes = probing.load_probe(tmp_path / "run" / "final")
    pictures = read_split(LabelledData(path=str(colors)), "test")
    batch = LabelledDataset(pictures, classes, 0, EvalTransform(SIZE, 32)).evaluation(range(45))
    right = ProbeObjective(14, [0.5] * 3, [0.25] * 3).logits(model, batch, torch.device("cpu")).argmax(-1) == batch["labels"]
    assert int(right.sum()) == result["num_correct"]
    assert probing.probe(a_recipe(encoder_path, colors, tmp_path / "run", policy=policy, lr=1e-2) if policy == "none" else recipe) == result


def test_shuffled_labels_stay_at_chance(encoder_path, tmp_path):
    root = write_folder(tmp_path / "data", {"train": 30, "test": 60}, shuffled=True)
    result = probing.probe(a_recipe(encoder_path, root, tmp_path / "run"))
    assert result["low"] < 1 / 3 < result["high"] + 0.05 and result["accuracy"] < 0.5


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "probe.safetensors")


@pytest.mark.parametrize("policy", ["none", "rand-m9-mstd0.5-inc1"])
def test_stopping_and_going_on_gives_the_same_probe_bit_for_bit(colors, encoder_path, tmp_path, policy):
    whole = probing.probe(a_recipe(encoder_path, colors, tmp_path / "whole", policy=policy, steps=12))
    recipe = a_recipe(encoder_path, colors, tmp_path / "cut", policy=policy, steps=12)
    recipe.train.stop_after = 5
    with pytest.raises(Stopped):
        probing.probe(recipe)
    assert not (tmp_path / "cut" / "final").exists()
    recipe.train.stop_after = None
    result = probing.probe(recipe)
    assert result == whole
    first, second = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert set(first) == {"norm.running_mean", "norm.running_var", "head.query", "head.key.weight", "head.value.weight", "head.classifier.weight", "head.classifier.bias"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["norm.running_mean"], torch.zeros(WIDTH))


def test_cached_features_give_what_pictures_give(colors, encoder_path, tmp_path):
    cached = probing.probe(a_recipe(encoder_path, colors, tmp_path / "cached", steps=10, cache="on"))
    uncached = probing.probe(a_recipe(encoder_path, colors, tmp_path / "uncached", steps=10, cache="off"))
    assert cached["num_correct"] == uncached["num_correct"] and cached["loss"] == pytest.approx(uncached["loss"], abs=2e-6)
    first, second = state(tmp_path / "cached"), state(tmp_path / "uncached")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)
    halved = a_recipe(encoder_path, colors, tmp_path / "halved", steps=10, cache="on")
    halved.cache_dtype = "fp16"
    assert probing.probe(halved)["loss"] == pytest.approx(cached["loss"], abs=1e-3)
    for cache in ("on", "off"):
        coarse = a_recipe(encoder_path, colors, tmp_path / f"bf16_{cache}", steps=10, cache=cache)
        coarse.precision = "bf16"
        assert probing.probe(coarse)["loss"] == pytest.approx(cached["loss"], abs=2e-2)


def test_the_cache_keeps_its_limit_and_features_of_equal_content_once(colors, encoder_path, tmp_path):
    recipe = a_recipe(encoder_path, colors, tmp_path / "run", steps=2, cache="on")
    recipe.encoder.cache_limit_gb = 1e-6
    with pytest.raises(UserError, match="cache_limit_gb"):
        probing.probe(recipe)
    recipe.encoder.cache = "auto"
    assert probing.probe(recipe)["cached_features"] is None
    pictures = read_split(LabelledData(path=str(colors)), "test")
    encoder, transform = load_encoder(encoder_path), EvalTransform(SIZE)
    features = FrozenFeatures.compute([*pictures, *pictures], transform, lambda pixels: encode(encoder, pixels.float()).detach(), (4, WIDTH), batch_size=7)
    assert len(features.table_KND) == len(pictures)
    alone = encode(encoder, transform(decode_image(pictures[9].read()))[None].float())[0]
    torch.testing.assert_close(features.get(pictures[9]), alone, rtol=1e-4, atol=1e-5)


def test_selection_never_sees_test_and_test_is_judged_by_the_chosen_point(encoder_path, tmp_path):
    root = write_folder(tmp_path / "data", {"train": 20, "test": 10})
    recipe, lrs = a_recipe(encoder_path, root, tmp_path / "a", steps=15), (1e-5, 1e-2)
    first = probing.best_of(recipe, lrs, (0.05,))
    assert first["selected"]["lr"] == 1e-2 and first["selected"]["judged"] == "test" and first["selected"]["split_sizes"]["trained_on"] == 60
    assert [row["lr"] for row in first["selection"]] == list(lrs) and all(row["num_samples"] == 6 for row in first["selection"])
    assert first["best_on_test"]["accuracy"] == max(row["accuracy"] for row in first["on_test"]) and first["test_evaluations"] == 2
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == first
    # Labels of test turned around: the choice and every number behind it stay.
    swap = [(root / "test" / name) for name in ("red", "green")]
    swap[0].rename(tmp_path / "aside"), swap[1].rename(swap[0]), (tmp_path / "aside").rename(swap[1])
    recipe.out = str(tmp_path / "b")
    second = probing.best_of(recipe, lrs, (0.05,), best_on_test=False)
    assert second["selection"] == first["selection"] and second["selected"]["lr"] == 1e-2 and second["test_evaluations"] == 1
    assert second["selected"]["accuracy"] < 0.5 < first["selected"]["accuracy"] and "best_on_test" not in second
    with pytest.raises(ValueError, match="selection share"):
        probing.choose([first["selected"]])


def test_keys_that_do_not_go_together_are_refused_before_anything_is_read(encoder_path, tmp_path):
    good = a_recipe(encoder_path, tmp_path / "nothing", tmp_path / "run")
    for section, key, value, word in (("optim", "micro_batch_size", 8, "batch norm"), ("encoder", "cache", "on", "cache: on"),
                                      ("encoder", "path", "", "encoder.path")):
        recipe = copy.deepcopy(good)
        recipe.augment.policy = "rand-m9-mstd0.5-inc1"
        setattr(getattr(recipe, section), key, value)
        with pytest.raises(UserError, match=word):
            probing.probe(recipe)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no split 'train'"):
        probing.probe(good)


def test_another_encoder_is_refused_for_a_run_and_for_its_probe(colors, encoder_path, tmp_path):
    probing.probe(a_recipe(encoder_path, colors, tmp_path / "run", steps=2))
    other = tmp_path / "other"
    build_encoder(image_size=SIZE, hidden_size=WIDTH, intermediate_size=48, num_layers=1, num_heads=HEADS).save_pretrained(other)
    with pytest.raises(UserError, match="not the encoder"):
        probing.load_probe(tmp_path / "run" / "final", encoder=str(other))
    with pytest.raises(UserError, match="another recipe.*encoder.path"):
        probing.probe(a_recipe(other, colors, tmp_path / "run", steps=2))
