"""Every pre-training objective equals its oracle (tests/oracles.py): one step, and curves with the project's optimizer.

And laws of each: what may depend on what, which part learns from which loss.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import oracles
import pytest
import torch
from conftest import TINY_PRETRAINING, run_cli
from objective_cases import (
    CASES,
    CONTEXT,
    NUM_PATCHES,
    ROWS,
    SHARE,
    SIZES,
    VOCAB,
    curves,
    cut,
    gradients_of,
    kept_patches,
    loop_gradients,
    oracle_step,
    parallel_rows,
)  # fmt: skip
from PIL import Image

from aimv2_vlm.config import ImageInput, Objective, Optimizer, PairSource, UserError
from aimv2_vlm.data import scenes
from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
from aimv2_vlm.data.order import draws
from aimv2_vlm.data.pairs import PairDataset
from aimv2_vlm.data.shards import write_shards
from aimv2_vlm.models.encoder import build_encoder, encode
from aimv2_vlm.models.masks import ATTENTION_IMPLEMENTATIONS
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.objectives import GenerativeObjective
from aimv2_vlm.train.optim import build_optimizer, parameter_groups

each_case = pytest.mark.parametrize("name", CASES)
each_attention = pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)
CURVE_20 = Optimizer(lr=1e-3, min_lr=1e-4, warmup_lr=1e-6, warmup_steps=4, steps=20, weight_decay=0.05, clip=1.0)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ----------------------------------------------------------------------------------------------------- equal to the oracle


@each_case
@each_attention
def test_one_step_equals_the_oracle(name, attention, monkeypatch):
    """In float64 every weight's gradient to 1e-6; in float32, which alone leaves up to 2e-6 of a gradient open, to 4e-6.

    The stock network's norms go through what torch calls float32; for the first part that name means float64.
    """
    case = dataclasses.replace(CASES[name], attention=attention)
    model, batch = case.model(), case.batch(3)
    wanted, gradients = oracle_step(case, {key: tensor.double() for key, tensor in model.state_dict().items()}, batch)
    for precision, tolerance in ((torch.float32, 4e-6), (torch.float64, 1e-6)):
        model.to(precision).zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "float32", precision)
            found = loop_gradients(case, model, [batch])
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        for term in ("text", "pixel") if len(wanted) == 3 else ():
            assert found[f"{term}_loss"] == pytest.approx(wanted[term], rel=1e-5)
        ours = gradients_of(model)
        assert ours.keys() == gradients.keys()  # every trained weight learns, and no other
        for key, gradient in gradients.items():
            assert relative(ours[key], gradient) <= tolerance, (key, precision)


@each_case
@each_attention
def test_one_step_in_bf16_stays_near_the_step_in_fp32(name, attention):
    case = dataclasses.replace(CASES[name], attention=attention)
    batch, found = case.batch(3), {}
    for precision in ("fp32", "bf16"):
        model = case.model()
        with Placement("single", precision).autocast():
            found[precision] = loop_gradients(case, model, [batch]), gradients_of(model)
    (wanted, gradients), (losses, halved) = found["fp32"], found["bf16"]
    assert losses == pytest.approx(wanted, rel=3e-2) and losses != wanted
    assert halved.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert halved[key].dtype == gradient.dtype == torch.float32 and relative(halved[key], gradient) <= 0.1, key


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("clip", "lit")])
def test_the_cut_into_micro_batches_changes_nothing(name):
    case = CASES[name]
    batch, found = case.batch(3), []
    for sizes in ([ROWS], [2, 3], [1, 3, 1]):
        model = case.model()
        loss = loop_gradients(case, model, cut(batch, sizes))["loss"]
        found.append((loss, gradients_of(model)))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert gradients.keys() == found[0][1].keys()
        assert all(relative(gradients[key], wanted) <= 3e-6 for key, wanted in found[0][1].items())


@each_case
def test_curves_over_20_steps_equal_the_oracle_under_the_written_out_optimizer(name):
    ours, theirs = curves(dataclasses.replace(CASES[name], layers=1), CURVE_20)
    assert max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)) <= 2e-6
    assert len(set(ours)) == 20  # weights move


@pytest.mark.parametrize("name", ["aimv2", "clip"])
def test_curves_over_200_steps_stay_with_the_oracle(name):
    """All objectives: benchmarks/objective_curves.py."""
    ours, theirs = curves(dataclasses.replace(CASES[name], layers=1), dataclasses.replace(CURVE_20, warmup_steps=20, steps=200), rows=4)
    assert max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)) <= 1e-3


def test_fused_adamw_is_fully_decoupled_with_the_decay_divided_by_the_peak():
    """torch takes lr_t * (wd / lr_peak) off a weight = the definition's wd * lr_t / lr_peak; what has no role to decay stays."""
    optim = Optimizer(lr=3e-3, weight_decay=0.3, clip=0.0)
    generator = torch.Generator().manual_seed(1)
    weights = {"matrix.weight": torch.randn(5, 4, generator=generator), "norm.weight": torch.randn(4, generator=generator)}
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    groups = parameter_groups(parameters.items(), {"matrix.weight": "weight", "norm.weight": "norm"}, optim, {})
    optimizer = build_optimizer(groups, optim)
    assert {g["names"][0]: g["weight_decay"] for g in groups} == {"matrix.weight": 0.3 / 3e-3, "norm.weight": 0.0}
    definition = oracles.DecoupledAdamW({k: w.double() for k, w in weights.items()}, peak=3e-3, weight_decay=0.3, betas=(0.9, 0.95), eps=1e-8, clip=1e9)
    for step in range(30):
        rate = 3e-3 * (step % 7 + 1) / 7
        gradients = {name: torch.randn(w.shape, generator=generator) * 10 ** (step % 3 - 2) for name, w in weights.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        definition.step({name: g.double() for name, g in gradients.items()}, rate)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), definition.weights[name], rtol=1e-5, atol=1e-6)
    # Without any gradient the decay alone is left: a factor (1 - wd * lr_t / lr_peak) a step, whatever the peak.
    for peak in (1e-4, 1e-2):
        alone = torch.nn.Parameter(torch.ones(2, 2))
        alone.grad = torch.zeros(2, 2)
        stepped = build_optimizer(parameter_groups([("w", alone)], {"w": "weight"}, Optimizer(lr=peak, weight_decay=0.3), {}), Optimizer(lr=peak))
        stepped.param_groups[0]["lr"] = peak / 2
        stepped.step()
        torch.testing.assert_close(alone.detach(), torch.full((2, 2), 1 - 0.3 / 2))


@each_case
def test_what_is_decayed(name):
    """Token embeddings, patch projection and heads are; biases, norms, positions, BOS, [MASK], pooling query and logit scale are not."""
    model = CASES[name].model()
    for key, parameter in model.named_parameters():
        assert (model.parameter_roles()[key] == "weight") == oracles.decays(key, parameter), key


# ------------------------------------------------------------------------------------------------------------------- CapPa


@pytest.fixture(scope="module")
def cappa() -> SimpleNamespace:
    case = CASES["cappa"]
    batch = case.batch(3)
    pixels = case.objective().normalize(batch["pixels"])

    def logits(model, ids, pixel_values=pixels, parallel=None):
        parallel = parallel_rows(batch) if parallel is None else parallel
        with torch.no_grad():
            return model(pixel_values, ids, batch["text_lengths"], batch["prefix_lengths"], parallel=parallel).text_logits

    return SimpleNamespace(case=case, batch=batch, pixels=pixels, model=case.model(), logits=logits)


def test_parallel_captions_see_no_input_token(cappa):
    parallel, ids = torch.tensor([True, False, True, False, True]), cappa.batch["input_ids"]
    before = cappa.logits(cappa.model, ids, parallel=parallel)
    after = cappa.logits(cappa.model, ids.flip(1), parallel=parallel)
    assert torch.equal(before[parallel], after[parallel])
    changed = ids.clone()
    changed[:, 1] = (changed[:, 1] + 1) % VOCAB
    after = cappa.logits(cappa.model, changed, parallel=parallel)
    for row in (1, 3):  # a sequential row: exactly the places behind the changed token
        same = (before[row] == after[row]).all(-1)
        assert same[:2].all() and not same[2:].any()


def test_parallel_places_see_all_patches_and_the_whole_caption(cappa):
    parallel, length = torch.ones(ROWS, dtype=torch.bool), int(cappa.batch["text_lengths"][0])
    before = cappa.logits(cappa.model, cappa.batch["input_ids"], parallel=parallel)[0, :length]
    side = cappa.pixels.shape[-1] // SIZES.patch
    for patch in range(NUM_PATCHES):
        r, c = (p * SIZES.patch for p in divmod(patch, side))
        pixels = cappa.pixels.clone()
        pixels[0, :, r : r + SIZES.patch, c : c + SIZES.patch] += 1
        after = cappa.logits(cappa.model, cappa.batch["input_ids"], pixels, parallel)[0, :length]
        assert (before != after).any(-1).all(), patch
    # The last place's position is an input of the first: in a sequential row it is not.
    model = cappa.case.model()
    with torch.no_grad():
        model.text_position_embedding.weight[length - 1] += 1
    assert (cappa.logits(model, cappa.batch["input_ids"], parallel=parallel)[0, 0] != before[0]).any()
    sequential = cappa.logits(cappa.model, cappa.batch["input_ids"], parallel=~parallel)[0]
    assert torch.equal(cappa.logits(model, cappa.batch["input_ids"], parallel=~parallel)[0, : length - 1], sequential[: length - 1])


def test_three_of_four_captions_are_parallel_and_which_depends_on_seed_and_position_alone():
    """Seen through the model's argument: what the objective hands over for rows drawn as the data loader draws them."""
    objective = GenerativeObjective(Objective(name="cappa"), SIZES.patch, SIZES.mean, SIZES.std)

    def parallel(seed: int, positions: range) -> torch.Tensor:
        bits = [draws(seed, position, "objective").bits() >> 1 for position in positions]  # as PairDataset does
        seen = {}

        def model(pictures, ids, lengths, prefixes, **arguments):
            seen.update(arguments)
            return SimpleNamespace(text_sum=torch.zeros(()), pixel_sum=None, mean_color_sum=None)

        batch = {"pixels": torch.zeros(len(bits), 3, 16, 16, dtype=torch.uint8), "input_ids": torch.ones(len(bits), 2, dtype=torch.int64),
                 "text_lengths": torch.full((len(bits),), 2), "prefix_lengths": torch.ones(len(bits), dtype=torch.int64),
                 "weights": torch.ones(len(bits)), "draws": torch.tensor(bits)}
        objective.sums(model, batch, torch.device("cpu"))
        return seen["parallel"]

    drawn = parallel(0, range(20_000))
    assert float(drawn.double().mean()) == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 20_000) ** 0.5)
    assert torch.equal(drawn[3000:3100], parallel(0, range(3000, 3100)))  # whatever else is in the batch
    assert not torch.equal(drawn[:100], parallel(1, range(100)))


def test_without_parallel_captions_every_weight_still_has_a_gradient():
    """DDP waits for the gradient of every weight."""
    case = CASES["cappa"]
    for fraction in (0.0, 1.0):
        objective = GenerativeObjective(Objective(name="cappa", parallel_fraction=fraction), SIZES.patch, SIZES.mean, SIZES.std)
        model = case.model()
        objective.sums(model, case.batch(1), torch.device("cpu"))["text"].backward()
        assert gradients_of(model).keys() == dict(model.named_parameters()).keys()


# -------------------------------------------------------------------------------------------------------------- captioning


def test_captions_from_some_patches_are_blind_to_the_others():
    """Through the decoder: features of other patches change nothing, those of every kept one do."""
    case = CASES["captioning some patches"]
    model, batch = case.model(), case.batch(3)
    pixels, kept = case.objective().normalize(batch["pixels"]), kept_patches(case, batch)
    indices = torch.stack([row.nonzero()[:, 0] for row in kept])
    length = int(batch["text_lengths"][0])

    def logits(patch: int | None) -> torch.Tensor:
        def move(module, inputs, output):
            if patch is not None:
                output.last_hidden_state = output.last_hidden_state.index_add(1, torch.tensor([patch]), torch.ones(len(pixels), 1, 32))
            return output

        handle = model.encoder.register_forward_hook(move)
        with torch.no_grad():
            out = model(pixels, batch["input_ids"], batch["text_lengths"], batch["prefix_lengths"], caption_patches=indices)
        handle.remove()
        return out.text_logits[0, :length]

    before = logits(None)
    for patch in range(NUM_PATCHES):
        changed = (logits(patch) != before).any(-1)
        assert changed.all() if kept[0, patch] else not changed.any(), patch


def test_kept_patches_are_an_even_share_in_raster_order_and_a_function_of_the_draw():
    objective = GenerativeObjective(Objective(name="captioning", caption_patches=1 / 3), SIZES.patch, SIZES.mean, SIZES.std)
    bits = torch.tensor([draws(0, position, "objective").bits() >> 1 for position in range(4000)])
    drawn = objective._drawn_patches({"draws": bits}, 36)
    assert drawn.shape == (4000, 12) and (drawn.diff(dim=1) > 0).all() and drawn.min() == 0 and drawn.max() == 35
    counts = torch.bincount(drawn.flatten(), minlength=36)
    assert (counts - 4000 / 3).abs().max() < 4.5 * (4000 * 2 / 9) ** 0.5
    assert torch.equal(objective._drawn_patches({"draws": bits[70:75]}, 36), drawn[70:75])


def test_kept_patches_of_native_rows_are_real_ones_where_there_are_enough():
    case = CASES["captioning some patches native"]
    batch = case.batch(3)
    kept = kept_patches(case, batch)
    assert (kept.sum(1) == round(SHARE * 14)).all()
    assert all(not kept[row, real:].any() for row, real in enumerate(batch["num_real"].tolist()) if real >= 6)


@pytest.mark.parametrize("name, sees_later", [("captioning", False), ("captioning bidirectional", True), ("cappa bidirectional", True), ("genlip", True)])
def test_which_patches_an_encoder_sees_while_it_is_trained(name, sees_later):
    """Changing the last patch changes the features of the first behind the prefix, or not, in the pass that is trained."""
    case = CASES[name]
    model, batch, objective = case.model(), case.batch(3), case.objective()
    batch["prefix_lengths"][:] = 3
    found = []
    for step in (0, 1):
        batch["pixels"][:, :, -SIZES.patch :, -SIZES.patch :] += step
        handle = model.encoder.rms_norm.register_forward_hook(lambda module, inputs, output: found.append(output.detach()[:, 5]))
        with torch.no_grad():
            objective.sums(model, batch, torch.device("cpu"))
        handle.remove()
    assert len(found) == 2 and bool((found[0] != found[1]).any()) == sees_later


# ------------------------------------------------------------------------------------------------------------------ GenLIP


def test_genlips_patches_are_the_stock_encoders_whatever_the_text():
    case = CASES["genlip"]
    model, batch = case.model(), case.batch(3)
    pixels = case.objective().normalize(batch["pixels"])
    with torch.no_grad():
        stock = model.encoder(pixels).last_hidden_state
        outs = [model(pixels, ids, batch["text_lengths"]) for ids in (batch["input_ids"], batch["input_ids"].flip(1))]
    assert torch.equal(outs[0].encoder_features, outs[1].encoder_features) and not torch.equal(outs[0].text_logits, outs[1].text_logits)
    torch.testing.assert_close(outs[0].encoder_features, stock, rtol=1e-5, atol=1e-5)


def test_genlips_text_is_causal_and_sees_every_patch():
    case = CASES["genlip"]
    model, batch = case.model(), case.batch(3)
    pixels = case.objective().normalize(batch["pixels"])

    def logits(ids, pixel_values):
        with torch.no_grad():
            return model(pixel_values, ids, batch["text_lengths"]).text_logits[0]

    before, ids, other = logits(batch["input_ids"], pixels), batch["input_ids"].clone(), pixels.clone()
    ids[0, 3] = (ids[0, 3] + 1) % VOCAB
    same = (logits(ids, pixels) == before).all(-1)
    assert same[:4].all() and not same[4:].any()
    other[0, :, -1, -1] += 1
    assert (logits(batch["input_ids"], other) != before).any(-1).all()


# ------------------------------------------------------------------------------------------------- parts that are not there


def test_aimv1_has_no_text_parts():
    names = CASES["aimv1"].model().state_dict()
    assert not [name for name in names if any(word in name for word in ("text", "token", "bos", "mask"))]
    assert any(name.startswith("pixel_head") for name in names)


def test_captioning_has_no_pixel_head():
    for name in ("captioning", "cappa", "genlip"):
        assert not [key for key in CASES[name].model().state_dict() if "pixel" in key]


def test_separate_decoders_learn_from_their_own_loss_alone():
    case = CASES["aimv2 separate"]
    batch = case.batch(3)
    text_parts = ("decoder.", "decoder_norm", "image_projection", "bos", "token_embedding", "text_position_embedding", "text_head")
    pixel_parts = ("pixel_decoder.", "pixel_decoder_norm", "pixel_projection", "pixel_head")
    for term, mine, others in (("text", text_parts, pixel_parts), ("pixel", pixel_parts, text_parts)):
        model = case.model()
        case.objective().sums(model, batch, torch.device("cpu"))[term].backward()
        for name, parameter in model.named_parameters():
            moved = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert name.startswith((*mine, *others, "encoder.")) and moved == (not name.startswith(others)), name


# ------------------------------------------------------------------------------------------------------------------ native


@pytest.fixture(scope="module")
def native() -> SimpleNamespace:
    encoder = build_encoder(image_size=16, patch_size=4, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=2, position_embedding="sincos")
    case = CASES["aimv2 native"]
    batch = case.batch(3)
    return SimpleNamespace(encoder=encoder, case=case, batch=batch, pictures=case.objective()._pictures(batch, torch.device("cpu")))


def alone(batch: dict, row: int, length: int | None = None) -> dict:
    """One row as a batch; without padding, or with as much as `length` leaves."""
    one, length = cut(batch, [row, 1])[1], length or int(batch["num_real"][row])
    return one | {key: one[key][:, :length] for key in ("patches", "positions")}


@each_attention
def test_native_features_are_the_stock_forwards_for_each_grid(native, attention):
    encoder, batch = native.encoder, native.batch
    encoder.set_attn_implementation(attention)
    with torch.no_grad():
        padded = encode(encoder, native.pictures, batch["prefix_lengths"])
        for row, (rows, columns) in enumerate(batch["grids"].tolist()):
            picture = oracles.native_picture(alone(batch, row), 0, SIZES, torch.float32)
            pixels = picture.embedded_NP.view(rows, columns, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * rows, 4 * columns)
            one = native.case.objective()._pictures(alone(batch, row), torch.device("cpu"))
            for prefix in (None, batch["prefix_lengths"][row : row + 1]):
                torch.testing.assert_close(encode(encoder, one, prefix), encode(encoder, pixels, prefix), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(padded[row : row + 1, : rows * columns], encode(encoder, pixels, prefix), rtol=1e-5, atol=1e-5)
    encoder.set_attn_implementation("sdpa")


def test_native_padding_changes_nothing_for_real_patches_behind_a_prefix(native):
    real, prefixes = native.pictures.num_real_B, native.batch["prefix_lengths"]
    is_padding = torch.arange(14) >= real[:, None]
    patches, positions, _ = native.pictures
    other = native.pictures._replace(patches_BNP=patches + 3 * is_padding[..., None], positions_BN2=positions + is_padding[..., None])
    with torch.no_grad():
        a, b = (encode(native.encoder, pictures, prefixes) for pictures in (native.pictures, other))
    assert is_padding.any() and (a != b).any(-1)[is_padding].all() and torch.equal(a[~is_padding], b[~is_padding])


@pytest.mark.parametrize("name", ["aimv1 native", "aimv2 native"])
def test_a_native_picture_learns_the_same_pixels_alone_and_in_a_padded_batch(name):
    case = CASES[name]
    batch = case.batch(3)
    whole, parts, count = case.model(), case.model(), 0
    found = case.objective().sums(whole, batch, torch.device("cpu"))
    found["pixel"].backward()
    for row in range(ROWS):
        one = alone(batch, row)
        case.objective().sums(parts, one, torch.device("cpu"))["pixel"].backward()
        if batch["weights"][row]:
            count += int(batch["num_real"][row] - batch["prefix_lengths"][row])
    assert count == case.objective().counts(batch)["pixel"]  # real patches only
    wanted = gradients_of(parts)
    for key, gradient in gradients_of(whole).items():
        if (wanted[key] != 0).any():
            assert relative(gradient, wanted[key]) <= 3e-6, key
        else:
            assert not gradient.any()


def test_native_captions_are_read_behind_the_padding(native):
    """The paper has no mask over padding: text sees it, so a caption's loss is that of its row, whatever rows stand beside it."""
    case, batch = native.case, native.batch
    model = case.model()
    with torch.no_grad():
        together = case.objective().sums(model, batch, torch.device("cpu"))["text"]
        rows = [case.objective().sums(model, alone(batch, row, 14), torch.device("cpu"))["text"] for row in range(ROWS)]
        bare = [case.objective().sums(model, alone(batch, row), torch.device("cpu"))["text"] for row in range(ROWS)]
    assert float(together) == pytest.approx(float(sum(rows)), rel=1e-5) and float(together) != pytest.approx(float(sum(bare)), rel=1e-5)


def test_learned_positions_refuse_pictures_of_several_sizes(native):
    encoder = build_encoder(image_size=16, patch_size=4, hidden_size=32, intermediate_size=40, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="position_embedding: sincos"):
        encode(encoder, native.pictures)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("prefix", [0, NUM_PATCHES, NUM_PATCHES + 3])
def test_a_prefix_outside_the_patches_is_refused(prefix):
    case = CASES["aimv2"]
    batch = case.batch(3)
    batch["prefix_lengths"][4] = prefix
    with pytest.raises(ValueError, match=f"prefix_lengths: must be 1 to {NUM_PATCHES - 1}"):
        case.objective().sums(case.model(), batch, torch.device("cpu"))


def test_pixels_without_a_prefix_and_texts_that_do_not_fit_are_refused():
    case = CASES["aimv2"]
    model, batch = case.model(), case.batch(3)
    pixels = case.objective().normalize(batch["pixels"])
    ids, lengths, prefixes = (batch[key] for key in ("input_ids", "text_lengths", "prefix_lengths"))
    with pytest.raises(ValueError, match="prefix_lengths"):
        model(pixels, ids, lengths, None)
    with pytest.raises(ValueError, match=f"context_length {CONTEXT}"):
        model(pixels, torch.cat([ids, ids], 1), lengths, prefixes)
    with pytest.raises(ValueError, match="text_lengths"):
        model(pixels, ids[:, :4], lengths, prefixes)
    # what a GPU or a compiled model does not look at is looked at before
    batch = CASES["aimv2"].batch(1)
    for wrong in (0, NUM_PATCHES):
        batch["prefix_lengths"][1] = wrong
        with pytest.raises(ValueError, match=f"prefix_lengths: must be 1 to {NUM_PATCHES - 1}"):
            CASES["aimv2"].objective().sums(model, batch, torch.device("cpu"))


WRONG_RECIPES = {
    "objective.attention": ["objective.attention=bidirectional"],
    "objective.decoders": ["objective.name=captioning", "objective.decoders=separate"],
    "objective.caption_patches: 0.3": ["objective.caption_patches=0.3"],
    "objective.caption_patches: 0 ": ["objective.name=captioning", "objective.caption_patches=0"],
    "objective.parallel_fraction": ["objective.name=cappa", "objective.parallel_fraction=1.5"],
    "image.size: 30 is not a multiple of encoder.patch_size 14": ["image.size=30"],
    "image.size = 14": ["image.size=14"],  # one patch
    "image.native.capacity: needs": ["image.native.capacity=64", "image.native.patch_limit=9"],
    "image.native.capacity: pictures": ["image.native.capacity=64", "objective.name=genlip", "encoder.position_embedding=sincos"],
    "image.native.capacity: 64 patches": ["image.native.capacity=64", "encoder.position_embedding=sincos"],
    "image.native.patch_limit": ["image.native.capacity=64", "image.native.patch_limit=1", "encoder.position_embedding=sincos"],
    "encoder.path: lit": ["objective.name=lit"],
    "decoder.path: clip": ["objective.name=clip", "decoder.path=somewhere"],
    "text.context_length": ["objective.name=clip", "text.context_length=2"],
    "optim.micro_batch_size: clip": ["objective.name=clip", "text.vocab_size=600"],
    "has hidden_size 32 (here: 64), num_layers 1 (here: 2); write": ["encoder.path=ENCODER", "encoder.hidden_size=64", "encoder.num_layers=2"],
    "has patch_size 14 (here: 7)": ["encoder.path=ENCODER", "encoder.patch_size=7"],
    "image.mean: [0.5, 0.5, 0.5], but": ["encoder.path=ENCODER", "image.mean=[0.5, 0.5, 0.5]"],
    "text.tokenizer: train is another one": ["encoder.path=ENCODER", "decoder.path=ENCODER", "text.canonicalize=false"],
    "train.num_workers: 4 workers": ["train.num_workers=4", "image.size=25200", "optim.batch_size=4096", "optim.micro_batch_size=8"],
    "image.native needs a native": ["encoder.path=ENCODER", "image.native.capacity=64", "image.native.patch_limit=9"],
    "the weights do not fit the model": ["decoder.path=ENCODER", "decoder.hidden_size=48"],
}


@pytest.mark.parametrize("words", WRONG_RECIPES)
def test_keys_that_do_not_go_together_are_one_clear_line_before_any_step(words, scenes_root, tiny_encoder, tmp_path):
    keys = [key.replace("ENCODER", str(tiny_encoder)) for key in WRONG_RECIPES[words]]
    done = run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={tmp_path / 'run'}", *TINY_PRETRAINING, *keys, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert words in line, line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def shards_with(folder: Path, captions: dict[int, str], pictures: dict[int, bytes]) -> None:
    scene = scenes.encode_jpeg(scenes.render(scenes.make_scene("train", 0, "detail")))
    rows = [{"key": f"k{i:03d}", "image_bytes": pictures.get(i, scene), "ext": "jpg", "caption": captions.get(i, f"a caption of {i % 9} words"), "json": {}}
            for i in range(24)]
    write_shards(iter(rows), folder, 12)


def test_long_captions_are_cut_and_counted_and_empty_ones_are_holes(tmp_path):
    shards_with(tmp_path, {3: "word " * 50, 5: "?!", 6: "&nbsp;"}, {})
    sources, image = [PairSource(path=str(tmp_path / "*.tar"), name="s")], ImageInput(size=28)
    train_tokenizer(PairDataset(sources, 0, image, None, 4).texts(), tmp_path / "t.model", 100)
    data = PairDataset(sources, 0, image, CaptionTokenizer(tmp_path / "t.model", 40), 4)
    batch = data.microbatch(range(24))
    assert batch["num_truncated"] == 1 and int(batch["text_lengths"].max()) == 40
    assert sorted(batch["keys"][row] for row in (batch["weights"] == 0).nonzero()[:, 0]) == ["k005", "k006"]
    assert sorted(line.split(": ")[1] for line in batch["bad"]) == ["k005", "k006"] and all("empty" in line for line in batch["bad"])
    objective = GenerativeObjective(Objective(), 14, [0.5] * 3, [0.5] * 3)
    good = batch["weights"] > 0
    assert objective.counts(batch) == {
        "samples": 24, "text": int(batch["text_lengths"].sum()), "pixel": int((4 - batch["prefix_lengths"])[good].sum()),
        "tokens": 22 * 4 + int(batch["text_lengths"].sum())}


def test_a_picture_of_one_pixel_is_trained_on_in_native_mode(scenes_root, tmp_path):
    """It is as good a square as any: laid out on the mini-batch's grid, finite, and no hole."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1), (200, 30, 30)).save(pixel, "png")
    shards_with(tmp_path / "shards", {}, {4: pixel.getvalue(), 11: pixel.getvalue()})
    out = tmp_path / "run"
    run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={out}", "optim.steps=3", *TINY_PRETRAINING,
            f"data.sources=[{{name: s, path: '{tmp_path}/shards/*.tar'}}]", "encoder.position_embedding=sincos", "image.native={capacity: 72, patch_limit: 9}", "data.validation=[]")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and rows[-1]["samples"] == 24 and rows[-1]["bad_samples"] == 0 and all(math.isfinite(row["loss"]) for row in rows)
