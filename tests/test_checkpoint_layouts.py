"""Checkpoints: every known layout opens by its keys, nothing opens by halves, and what is written is stock."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, copy_golden
from safetensors.torch import load_file, save_file

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints
from aimv2_vlm.models.encoder import build_encoder, encode, load_encoder, resize_positions
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining

POSITIONS = "embeddings.position_embedding.weight"
SIZES = {"image_size": 56, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}


def make_encoder(**changes):
    return build_encoder(**SIZES | changes, generator=torch.Generator().manual_seed(0))


def make_model():
    return AIMv2ForPreTraining(
        make_encoder(),
        decoder_hidden_size=24,
        decoder_intermediate_size=40,
        decoder_num_layers=1,
        decoder_num_heads=2,
        vocab_size=30,
        context_length=7,
        generator=torch.Generator().manual_seed(1),
    )


def pixels(size=56, rows=2):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# What is written


def test_a_saved_model_is_a_stock_encoder_with_the_rest_beside_it(tmp_path):
    from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor

    model = make_model()
    extra = tmp_path / "tokenizer.model"
    extra.write_bytes(b"words")
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56, image_mean=[0.1, 0.2, 0.3])
    model.save_pretrained(tmp_path / "final", image_processor=processor, extra_files=[extra])

    encoder, info = AutoModel.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert type(encoder) is type(model.encoder)
    assert not any(info.values()), info  # no missing, unexpected or misfitting key: nothing is random
    assert_same_weights(encoder, model.encoder)
    with torch.no_grad():
        out = encoder(pixels(), output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, encode(model.encoder, pixels()))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)  # what Llava reads is normalised
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "final").image_mean) == [0.1, 0.2, 0.3]

    assert (tmp_path / "final" / "pretraining" / "tokenizer.model").read_bytes() == b"words"
    again = AIMv2ForPreTraining.from_pretrained(tmp_path / "final")
    assert_same_weights(again, model)
    batch = (pixels(), torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([3, 2]), torch.tensor([1, 9]))
    with torch.no_grad():
        assert torch.equal(again(*batch).loss, model(*batch).loss)


def test_gathered_weights_are_written_instead_of_the_models_own(tmp_path):
    model = make_model()
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = AIMv2ForPreTraining.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == gathered.keys()
    assert all(torch.equal(saved[name], gathered[name]) for name in gathered)


def test_an_encoder_in_shards_is_the_same_encoder(tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(load_encoder(tmp_path), encoder)


def test_half_precision_weights_open_in_float32(tmp_path):
    encoder = make_encoder()
    encoder.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.dtype == torch.float32
    assert_same_weights(loaded.to(torch.bfloat16), encoder)


# What is recognised


@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        ("encoder_fixed", "apple_encoder"),
        ("encoder_native", "apple_encoder"),
        ("two_tower", "apple_two_tower"),
        ("pretraining", "apple_trainer"),
    ],
)
def test_apples_layouts_are_recognised_by_their_keys(folder, layout, tmp_path):
    state = load_file(GOLDEN / folder / "weights.safetensors")
    assert checkpoints.detect_layout(state).name == layout
    encoder = load_encoder(copy_golden(folder, tmp_path))
    encoder.save_pretrained(tmp_path / "stock")
    stock = load_encoder(tmp_path / "stock")  # in transformers' layout now
    written = {"architectures", "dtype"}  # by saving, into the model that is saved
    configs = [{k: v for k, v in model.config.to_dict().items() if k not in written} for model in (stock, encoder)]
    assert configs[0] == configs[1]
    assert_same_weights(stock, encoder)


def test_the_image_tower_of_transformers_two_tower_model_opens(tmp_path):
    from transformers import Aimv2Config, Aimv2Model

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = Aimv2Model(Aimv2Config(vision_config=dict(tower, image_size=56), text_config=dict(tower, vocab_size=20)))
    both.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = both.vision_model(pixels()).last_hidden_state
        assert torch.equal(encode(load_encoder(tmp_path), pixels()), expected)


def test_heads_are_128_wide_where_no_config_says_otherwise(tmp_path):
    make_encoder(hidden_size=256, num_heads=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_encoder(tmp_path).config.num_attention_heads == 2

    with pytest.raises(UserError, match="config.json with num_attention_heads"):
        load_encoder(copy_golden("encoder_fixed", tmp_path, config=False))


# What is refused


def without(key):
    return lambda state: state.pop(key)


def with_extra(key):
    return lambda state: state.update({key: torch.zeros(1)})


def reshaped(key):
    return lambda state: state.update({key: torch.zeros(3, 5)})


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        (
            "encoder_fixed",
            without("trunk.blocks.1.mlp.fc3.weight"),
            "missing keys: encoder.layers.1.ffn.up_proj.weight",
        ),
        ("encoder_fixed", without("trunk.post_trunk_norm.weight"), "missing keys: rms_norm.weight"),
        ("encoder_fixed", with_extra("trunk.blocks.1.attn.qkv.bias"), "unexpected keys.*trunk.blocks.1.attn.qkv.bias"),
        (
            "encoder_fixed",
            with_extra("trunk.blocks.2.norm_1.weight"),
            "unexpected keys: encoder.layers.2.rms_norm1.weight",
        ),
        ("encoder_fixed", reshaped("trunk.blocks.0.norm_1.weight"), r"encoder.layers.0.rms_norm1.weight \(3, 5\)"),
        ("encoder_fixed", reshaped("preprocessor.pos_embed"), "embeddings.position_embedding.weight"),
        ("encoder_native", without("trunk.blocks.0.mlp.fc1.weight"), "encoder.layers.0.ffn.gate_proj.weight"),
        ("two_tower", with_extra("text_encoder.head.weight"), "unexpected keys.*text_encoder.head.weight"),
        ("pretraining", with_extra("models.text_decoder.head.blocks.2.linear.weight"), "head.blocks.2.linear.weight"),
    ],
)
def test_an_encoder_never_opens_by_halves(folder, change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        load_encoder(copy_golden(folder, tmp_path, change))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("models.text_decoder.head.blocks.1.linear.weight", "missing keys: pixel_head.weight"),
        ("models.text_decoder.preprocessor.text_preprocessor.cls_token", "missing keys: bos"),
        ("models.text_decoder.preprocessor.text_preprocessor.text_embedding.weight", "token_embedding.weight"),
        ("models.text_decoder.trunk.blocks.1.mlp.fc1.weight", "missing keys: decoder.layers.1.ffn.gate_proj.weight"),
    ],
)
def test_a_trainer_checkpoint_never_opens_by_halves(key, named, tmp_path):
    with pytest.raises(UserError, match=named):
        AIMv2ForPreTraining.from_pretrained(copy_golden("pretraining", tmp_path, without(key)))


@pytest.mark.parametrize("key", ["pixel_head.weight", "decoder.layers.0.rms_norm1.weight"])
def test_a_saved_model_never_opens_by_halves(key, tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "pretraining" / "model.safetensors"
    state = load_file(file)
    weight = state.pop(key)
    save_file(state, file)
    with pytest.raises(UserError, match=f"pretraining.*missing keys: {key}"):
        AIMv2ForPreTraining.from_pretrained(tmp_path)
    save_file(state | {key: weight, "stray": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="pretraining.*unexpected keys: stray"):
        AIMv2ForPreTraining.from_pretrained(tmp_path)
    config = file.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"decoder_widht": 3}))
    with pytest.raises(UserError, match="decoder_widht"):
        AIMv2ForPreTraining.from_pretrained(tmp_path)


def test_a_stock_encoder_without_a_weight_is_refused(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in (POSITIONS, "encoder.layers.1.attention.k_proj.weight"):
        save_file({name: tensor for name, tensor in state.items() if name != key}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"missing keys: {key}"):
            load_encoder(tmp_path)


def test_an_encoder_alone_is_no_pretraining_checkpoint(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an encoder only"):
        AIMv2ForPreTraining.from_pretrained(tmp_path)


def test_foreign_and_broken_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_encoder(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="only .safetensors"):
        load_encoder(tmp_path / "pytorch_model.bin")
    save_file({"visual.class_embedding": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="visual.class_embedding"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{truncated")
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("one", "two"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="one.safetensors, two.safetensors"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["../one.safetensors", "absent.safetensors", ""])
def test_an_index_reaches_no_file_outside_its_folder(name, tmp_path):
    make_encoder().save_pretrained(tmp_path / "one")
    shutil.move(tmp_path / "one" / "model.safetensors", tmp_path / "one.safetensors")
    (tmp_path / "one" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(UserError, match="weight_map"):
        load_encoder(tmp_path / "one")


@pytest.mark.parametrize(
    ("config", "named"),
    [("{", "config.json"), ("[]", "config.json"), ('{"num_attention_heads": "two"}', "num_attention_heads")],
)
def test_a_config_that_makes_no_sense_is_refused(config, named, tmp_path):
    folder = copy_golden("encoder_fixed", tmp_path, config=False)
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=named):
        load_encoder(folder)


# Positions


def test_positions_of_the_same_grid_are_untouched():
    positions = torch.randn(16, 8)
    assert resize_positions(positions, 4) is positions


def test_resized_positions_keep_what_is_smooth():
    """A constant stays; a ramp along one axis stays one along that axis, in the same direction."""
    rows = torch.arange(8.0).repeat_interleave(8)
    positions = torch.stack([torch.full((64,), 3.0), rows], dim=1)
    for side in (4, 6, 12):
        constant, ramp = resize_positions(positions, side).T.reshape(2, side, side)
        torch.testing.assert_close(constant, torch.full((side, side), 3.0))
        assert (ramp.diff(dim=0) > 0).all()
        torch.testing.assert_close(ramp.std(dim=1), torch.zeros(side), atol=1e-5, rtol=0)
        assert ramp.mean().item() == pytest.approx(rows.mean().item(), abs=1e-4)


@pytest.mark.parametrize("image_size", [28, 84])
def test_an_encoder_opens_for_another_image_size(image_size, tmp_path):
    folder = copy_golden("encoder_fixed", tmp_path)
    original, resized = load_encoder(folder), load_encoder(folder, image_size=image_size)
    assert resized.config.image_size == image_size
    with torch.no_grad():
        features = encode(resized, pixels(image_size))
    assert features.shape == (2, (image_size // 14) ** 2, 64) and features.isfinite().all()
    for name, tensor in original.state_dict().items():
        assert name == POSITIONS or torch.equal(tensor, resized.state_dict()[name]), name
    resized.save_pretrained(tmp_path / "saved")
    assert_same_weights(load_encoder(tmp_path / "saved"), resized)
    with pytest.raises(UserError, match="image_size"):
        load_encoder(folder, image_size=image_size + 1)


def test_pretraining_goes_on_at_another_image_size(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = AIMv2ForPreTraining.from_pretrained(tmp_path, image_size=84)
    out = model(pixels(84), torch.tensor([[3, 4], [6, 7]]), torch.tensor([2, 2]), torch.tensor([1, 9]))
    assert out.patch_predictions.shape == (2, 36, 588) and out.loss.isfinite()


def test_a_native_encoder_takes_any_shape_and_has_no_positions_to_resize(tmp_path):
    encoder = load_encoder(copy_golden("encoder_native", tmp_path), image_size=84)
    assert encoder.config.is_native and POSITIONS not in encoder.state_dict()
    with torch.no_grad():
        assert encode(encoder, torch.zeros(1, 3, 28, 70)).shape == (1, 10, 64)
