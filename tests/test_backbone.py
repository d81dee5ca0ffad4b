"""Encoders that AIMv2 is compared with: tiny random checkpoints of each stock class, opened by one function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from aimv2_vlm.config import FrozenEncoder, UserError
from aimv2_vlm.models.backbone import KINDS, load_backbone
from aimv2_vlm.models.encoder import build_encoder, encode, load_encoder

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 16}


def stock_model(kind: str) -> torch.nn.Module:
    """A checkpoint as it lies on the hub: for CLIP and SigLIP with the text tower, for MAE with the decoder."""
    torch.manual_seed(3)
    if kind in ("clip", "dfn_clip"):
        act = {"hidden_act": "quick_gelu" if kind == "clip" else "gelu"}
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT | act, vision_config=SIZES | act, projection_dim=16))
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SIZES))
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, mlp_ratio=2))
    if kind == "dinov2_registers":
        sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=4))
    if kind == "mae":
        sizes = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48}
        return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **sizes))
    return build_encoder(image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        model = stock_model(kind)
        with torch.no_grad():  # biases and scales of norms that stand at 0 and 1 would hide a norm that is left out
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return {kind: root / kind for kind in KINDS}


def stock_features(kind: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """The last layer after its norm, by the stock class's own documented outputs."""
    with torch.no_grad():
        if kind in ("clip", "dfn_clip"):
            model = transformers.CLIPVisionModel.from_pretrained(folder).eval()
            return model.post_layernorm(model(pixels, output_hidden_states=True).hidden_states[-1])
        if kind == "siglip":
            return transformers.SiglipVisionModel.from_pretrained(folder).eval()(pixels).last_hidden_state
        if kind.startswith("dinov2"):
            return transformers.AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state
        if kind == "mae":
            model = transformers.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
            out = model(pixels)  # patches in a random order
            order = out.ids_restore[..., None].expand(-1, -1, 32)
            return torch.cat([out.last_hidden_state[:, :1], out.last_hidden_state[:, 1:].gather(1, order)], 1)
        return encode(load_encoder(folder), pixels)


def test_the_key_offers_every_kind():
    assert FrozenEncoder.__dataclass_fields__["kind"].metadata["choices"] == ("auto", *KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_stock_models_last_normalised_layer(kind, checkpoints):
    backbone = load_backbone(checkpoints[kind], kind if kind == "dfn_clip" else "auto")
    assert backbone.kind == kind and not backbone.training
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = backbone(pixels)
    torch.testing.assert_close(found, stock_features(kind, checkpoints[kind], pixels), rtol=0, atol=1e-5)
    prefix = {"aimv2": 0, "siglip": 0, "dinov2_registers": 5}.get(kind, 1)
    assert found.shape == (2, backbone.num_tokens, backbone.width) == (2, 16 + prefix, 32)
    patches = load_backbone(checkpoints[kind], kind, tokens="patches")
    with torch.no_grad():
        torch.testing.assert_close(patches(pixels), found[:, prefix:], rtol=0, atol=1e-6)
    assert patches.num_tokens == 16 and patches.says.startswith("16 patches") and ("CLS" in backbone.says) == (prefix > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_what_its_block_left_and_later_blocks_are_gone(kind, checkpoints):
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    whole, seen = load_backbone(checkpoints[kind], kind), []
    for block in whole.model.get_submodule(whole.about.blocks):
        block.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        last = whole(pixels)
        for layer, wanted in ((2, seen[1]), (-2, seen[1]), (-1, seen[2]), (3, seen[2])):
            cut = load_backbone(checkpoints[kind], kind, layer=layer)
            found = cut.model(pixels, **({"noise": torch.arange(16.0).expand(2, -1)} if kind == "mae" else {})).last_hidden_state
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
            if kind not in ("clip", "dfn_clip"):
                torch.testing.assert_close(cut(pixels), wanted, rtol=0, atol=1e-6)
            assert not torch.allclose(cut(pixels), last) and len(cut.model.get_submodule(cut.about.blocks)) == cut.num_blocks
        assert load_backbone(checkpoints[kind], kind, layer=0)(pixels).shape == last.shape
    for layer in (4, -5):
        with pytest.raises(UserError, match="encoder.layer"):
            load_backbone(checkpoints[kind], kind, layer=layer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_another_size(kind, checkpoints):
    backbone = load_backbone(checkpoints[kind], kind, image_size=42)
    with torch.no_grad():
        found = backbone(torch.randn(1, 3, 42, 42))
    assert found.shape == (1, backbone.num_tokens, 32) and backbone.grid_side == 6 and "36 patches" in backbone.says
    with pytest.raises(UserError, match="image_size"):
        load_backbone(checkpoints[kind], kind, image_size=40)


def test_a_native_encoder_takes_any_size_without_resized_positions(tmp_path):
    build_encoder(image_size=28, patch_size=7, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, position_embedding="sincos").save_pretrained(tmp_path)
    native = load_encoder(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(tmp_path, image_size=56)(pixels), native(pixel_values=pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_operations_are_those_of_the_forward_pass(checkpoints):
    from torch.utils.flop_counter import FlopCounterMode

    for kind in KINDS:
        backbone = load_backbone(checkpoints[kind], kind, attention="eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(torch.zeros(3, 3, 28, 28))
        assert backbone.forward_flops(3) == pytest.approx(counter.get_total_flops(), rel=0.01), kind


def test_what_cannot_be_opened_is_refused_in_one_line(checkpoints, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(checkpoints["clip"], cut)
    from safetensors.torch import load_file, save_file

    state = load_file(cut / "model.safetensors")
    save_file({k: v for k, v in state.items() if "vision_model.encoder.layers.1" not in k}, cut / "model.safetensors", {"format": "pt"})
    pickled = tmp_path / "pickled"
    shutil.copytree(checkpoints["clip"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "resnet"}')
    for folder, arguments, word in ((cut, {}, "not a whole CLIPVisionModel"), (pickled, {}, "pickled"), (other, {}, "'resnet' is none of"),
                                    (checkpoints["clip"], {"kind": "clop"}, "encoder.kind"), (checkpoints["clip"], {"tokens": "cls"}, "encoder.tokens"),
                                    (tmp_path / "nothing", {}, "no such file")):
        with pytest.raises(UserError, match=word) as error:
            load_backbone(folder, **arguments)
        assert "\n" not in str(error.value)


