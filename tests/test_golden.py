"""Features, predictions, losses and gradients equal those of Apple's own code (see tests/golden)."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from aimv2_vlm.models import checkpoints
from aimv2_vlm.models.encoder import encode, load_encoder
from aimv2_vlm.models.masks import ATTENTION_IMPLEMENTATIONS
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

each_attention = pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)


@each_attention
def test_fixed_encoder_features(attention):
    tensors = load_file(GOLDEN / "encoder_fixed" / "tensors.safetensors")
    encoder = load_encoder(GOLDEN / "encoder_fixed" / "weights.safetensors", attention=attention)
    with torch.no_grad():
        bidirectional = encode(encoder, tensors["pixel_values"])
        prefix = encode(encoder, tensors["pixel_values"], tensors["prefix_lengths"])
    torch.testing.assert_close(bidirectional, tensors["features"], **TOLERANCE)
    torch.testing.assert_close(prefix, tensors["features_prefix"], **TOLERANCE)


@each_attention
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_native_encoder_features(attention, shape):
    tensors = load_file(GOLDEN / "encoder_native" / "tensors.safetensors")
    encoder = load_encoder(GOLDEN / "encoder_native" / "weights.safetensors", attention=attention)
    with torch.no_grad():
        features = encode(encoder, tensors[f"pixel_values_{shape}"])
    torch.testing.assert_close(features, tensors[f"features_{shape}"], **TOLERANCE)


def test_encoder_of_a_trainer_checkpoint():
    tensors = load_file(GOLDEN / "pretraining" / "tensors.safetensors")
    encoder = load_encoder(GOLDEN / "pretraining" / "weights.safetensors")
    with torch.no_grad():
        features = encode(encoder, tensors["image"])
    torch.testing.assert_close(features, tensors["encoder_features_bidirectional"], **TOLERANCE)


@each_attention
@pytest.mark.parametrize("return_predictions", [True, False])
def test_pretraining_losses_and_gradient(attention, return_predictions):
    tensors = load_file(GOLDEN / "pretraining" / "tensors.safetensors")
    expected = json.loads((GOLDEN / "pretraining" / "expected.json").read_text())
    losses, weights = expected["expected"], expected["config"]
    model = AIMv2ForPreTraining.from_pretrained(GOLDEN / "pretraining" / "weights.safetensors", attention=attention)
    out = model(
        tensors["image"],
        tensors["text"],
        tensors["text_lengths"],
        tensors["prefix_lengths"],
        return_predictions=return_predictions,
        pixel_weight=weights["pixel_weight"],
    )
    assert weights["text_weight"] == 1.0  # what the loss below is made of
    assert out.pixel_loss.item() == pytest.approx(losses["mse_norm_pix"], abs=1e-5)
    assert out.text_loss.item() == pytest.approx(losses["cross_entropy"], abs=1e-5)
    assert out.loss.item() == pytest.approx(losses["total"], abs=1e-5)
    torch.testing.assert_close(out.pixel_sum / out.pixel_count, out.pixel_loss)
    torch.testing.assert_close(out.text_sum / out.text_count, out.text_loss)
    assert int(out.text_count) == sum(losses["text_lengths"])
    assert int(out.pixel_count) == sum(16 - prefix for prefix in losses["prefix_lengths"])

    out.loss.backward()
    grad_norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert grad_norm.item() == pytest.approx(losses["grad_norm"], abs=1e-5)

    if return_predictions:
        torch.testing.assert_close(out.encoder_features, tensors["encoder_features_prefix"], **TOLERANCE)
        torch.testing.assert_close(out.patch_predictions, tensors["image_preds"], **TOLERANCE)
        torch.testing.assert_close(out.text_logits, tensors["text_logits"], **TOLERANCE)
    else:
        assert out.encoder_features is out.patch_predictions is out.text_logits is None


def test_two_tower_embeddings():
    """The renamed tensors fill transformers' two-tower model completely and give Apple's embeddings."""
    from transformers import Aimv2Config, Aimv2Model

    folder = GOLDEN / "two_tower"
    tensors = load_file(folder / "tensors.safetensors")
    state, config = checkpoints.read_safetensors(folder / "weights.safetensors")
    _, renamed = checkpoints.to_transformers(state)
    text = dict(config["text"], max_position_embeddings=config["text"]["max_context_length"])
    del text["max_context_length"]
    model = Aimv2Model(
        Aimv2Config(vision_config=config["vision"], text_config=text, projection_dim=config["projection_dim"])
    )
    checkpoints.load_strictly(model, renamed, folder)
    for layer in model.text_model.encoder.layers:
        layer.attention.is_causal = True  # the stock text tower forgets it whenever no row is padded
    with torch.no_grad():
        out = model(pixel_values=tensors["pixel_values"], input_ids=tensors["input_ids"])
    torch.testing.assert_close(out.image_embeds, tensors["image_embeds"], **TOLERANCE)
    torch.testing.assert_close(out.text_embeds, tensors["text_embeds"], **TOLERANCE)
    torch.testing.assert_close(out.logits_per_image, tensors["logits_per_image"], atol=1e-4, rtol=1e-5)

    encoder = load_encoder(folder / "weights.safetensors")
    with torch.no_grad():
        features = encode(encoder, tensors["pixel_values"])
        stock = model.vision_model(tensors["pixel_values"]).last_hidden_state
    torch.testing.assert_close(features, stock, **TOLERANCE)
