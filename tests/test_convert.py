"""Conversion of checkpoints: it only renames, proves it by running both sides, and leaves a receipt or nothing."""

import hashlib
import json

import pytest
import torch
from conftest import GOLDEN, copy_golden, run_cli
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPImageProcessor

from aimv2_vlm.config import UserError
from aimv2_vlm.models import checkpoints, convert
from aimv2_vlm.models.contrastive import make_text_causal
from aimv2_vlm.models.encoder import build_encoder, encode, load_encoder
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining

LAYOUT = {"encoder_fixed": "apple_encoder", "encoder_native": "apple_encoder", "two_tower": "apple_two_tower", "pretraining": "apple_trainer"}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

each_golden = pytest.mark.parametrize("name", LAYOUT)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Golden folder -> (its folder in transformers' layout, the receipt), made once each."""
    root, made = tmp_path_factory.mktemp("converted"), {}

    def make(name):
        if name not in made:
            receipt = convert.convert(copy_golden(name, root), root / f"{name}.stock", versions={"python": "3"})
            made[name] = root / f"{name}.stock", receipt
        return made[name]

    return make


def assert_same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def assert_nothing_at(destination):
    assert not destination.exists() and not list(destination.parent.glob(f".{destination.name}*"))


# There and back


@each_golden
def test_apples_layout_comes_back_bit_for_bit(name, converted, tmp_path):
    stock, _ = converted(name)
    convert.convert(stock, tmp_path / "back", LAYOUT[name])
    assert_same_tensors(tmp_path / "back" / "model.safetensors", GOLDEN / name / "weights.safetensors")
    # its config.json says what it takes to open it again: the same stock files
    again = tmp_path / "again"
    convert.convert(tmp_path / "back", again)
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (stock / file).read_bytes()


@pytest.mark.parametrize("name", ["encoder_fixed", "encoder_native"])
def test_plain_transformers_computes_apples_features(name, converted):
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    model, info = AutoModel.from_pretrained(converted(name)[0], output_loading_info=True)
    assert not any(info.values()), info
    shapes = ("_wide", "_tall", "_square") if name == "encoder_native" else ("",)
    with torch.no_grad():
        for shape in shapes:
            out = model(pixel_values=tensors[f"pixel_values{shape}"], output_hidden_states=True)
            torch.testing.assert_close(out.last_hidden_state, tensors[f"features{shape}"], **TOLERANCE)
            assert torch.equal(out.hidden_states[-1], out.last_hidden_state)  # what Llava reads


def test_plain_transformers_computes_apples_embeddings(converted):
    tensors = load_file(GOLDEN / "two_tower" / "tensors.safetensors")
    folder, receipt = converted("two_tower")
    model = make_text_causal(AutoModel.from_pretrained(folder))
    with torch.no_grad():
        out = model(pixel_values=tensors["pixel_values"], input_ids=tensors["input_ids"])
    torch.testing.assert_close(out.image_embeds, tensors["image_embeds"], **TOLERANCE)
    torch.testing.assert_close(out.text_embeds, tensors["text_embeds"], **TOLERANCE)
    torch.testing.assert_close(out.logits_per_image, tensors["logits_per_image"], atol=1e-4, rtol=1e-5)
    assert any("causal mask" in note for note in receipt["notes"])  # the stock model alone does not


def test_a_trainer_checkpoint_becomes_an_encoder_and_a_pretraining_folder(converted):
    tensors = load_file(GOLDEN / "pretraining" / "tensors.safetensors")
    expected = json.loads((GOLDEN / "pretraining" / "expected.json").read_text())["expected"]
    folder, _ = converted("pretraining")
    with torch.no_grad():
        features = AutoModel.from_pretrained(folder)(pixel_values=tensors["image"]).last_hidden_state
        out = AIMv2ForPreTraining.from_pretrained(folder)(
            tensors["image"], tensors["text"], tensors["text_lengths"], tensors["prefix_lengths"]
        )
    torch.testing.assert_close(features, tensors["encoder_features_bidirectional"], **TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["total"], abs=1e-5)
    torch.testing.assert_close(out.patch_predictions, tensors["image_preds"], **TOLERANCE)


@each_golden
def test_the_proofs_own_forward_is_apples(name):
    """What conversions are measured against gives the golden outputs from the golden weights."""
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    state, config = checkpoints.read_safetensors(GOLDEN / name / "weights.safetensors")

    def outputs(pixels, prefixes=None, ids=None, lengths=None):
        ones = torch.ones(len(pixels), dtype=torch.int64)
        probe = convert.Probe(pixels, ones if prefixes is None else prefixes, ids, ids, lengths, "")
        return convert.apple_outputs(state, config, LAYOUT[name], probe)

    if name == "encoder_fixed":
        out = outputs(tensors["pixel_values"], tensors["prefix_lengths"])
        wanted = {convert.FEATURES: "features", convert.PREFIX_FEATURES: "features_prefix"}
    elif name == "encoder_native":
        out = {shape: outputs(tensors[f"pixel_values_{shape}"])[convert.FEATURES] for shape in ("wide", "tall", "square")}
        wanted = {shape: f"features_{shape}" for shape in out}
    elif name == "two_tower":
        out = outputs(tensors["pixel_values"], ids=tensors["input_ids"])
        wanted = {"image embeddings": "image_embeds", "text embeddings, no row padded": "text_embeds"}
        torch.testing.assert_close(out["logits"], tensors["logits_per_image"], atol=1e-4, rtol=1e-5)
    else:
        out = outputs(tensors["image"], tensors["prefix_lengths"], tensors["text"], tensors["text_lengths"])
        wanted = {"patch predictions": "image_preds", "text logits": "text_logits", convert.PREFIX_FEATURES: "encoder_features_prefix"}
        expected = json.loads((GOLDEN / name / "expected.json").read_text())["expected"]
        assert out["pixel loss"].item() == pytest.approx(expected["mse_norm_pix"], abs=1e-5)
        assert out["text loss"].item() == pytest.approx(expected["cross_entropy"], abs=1e-5)
    for key, golden_key in wanted.items():
        torch.testing.assert_close(out[key], tensors[golden_key], **TOLERANCE)


@pytest.mark.parametrize("name", ["two_tower", "pretraining"])
def test_the_encoder_alone_comes_out_of_either(name, converted, tmp_path):
    stock, _ = converted(name)
    receipt = convert.convert(stock, tmp_path / "encoder", "apple_encoder")
    assert any(note.startswith("left out") for note in receipt["notes"]) or name == "pretraining"
    assert receipt["proof"]["control"]["relative_difference"] > 1e-3
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (encode(load_encoder(folder), pixels) for folder in (tmp_path / "encoder", stock))
    assert torch.equal(one, other)


def test_a_run_goes_to_apples_trainer_and_back(tiny_encoder, tmp_path):
    done = run_cli("convert", tiny_encoder, tmp_path / "apple", "--to", "apple_trainer")
    assert "transformers_encoder -> apple_trainer" in done.stdout and "of the largest output" in done.stdout
    assert checkpoints.detect_layout(load_file(tmp_path / "apple" / "model.safetensors")).name == "apple_trainer"
    done = run_cli("convert", tmp_path / "apple", tmp_path / "back")
    assert "mean and deviation" not in done.stdout  # they came along
    for file in ("preprocessor_config.json", "pretraining/tokenizer.model"):
        assert (tmp_path / "back" / file).read_bytes() == (tiny_encoder / file).read_bytes()
    for file in ("model.safetensors", "pretraining/model.safetensors"):
        assert_same_tensors(tmp_path / "back" / file, tiny_encoder / file)


def test_shards_types_and_the_image_processor_are_kept(tmp_path):
    encoder = build_encoder(image_size=28, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
    encoder.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "shards")
    receipt = convert.convert(tmp_path / "shards", tmp_path / "whole")
    assert "model.safetensors.index.json" in receipt["source"]["files"] and len(receipt["source"]["files"]) > 4
    model = AutoModel.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.bfloat16
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    carried = "preprocessor_config.json"
    assert (tmp_path / "whole" / carried).read_bytes() == (tmp_path / "shards" / carried).read_bytes()


# The receipt


@each_golden
def test_the_receipt_accounts_for_every_file_and_tensor(name, converted):
    folder, receipt = converted(name)
    assert json.loads((folder / "conversion.json").read_text()) == receipt
    for place, files in ((folder.with_suffix(""), receipt["source"]["files"]), (folder, receipt["target"]["files"])):
        assert set(files) == {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} - {"conversion.json"}
        for file, digest in files.items():
            assert hashlib.sha256((place / file).read_bytes()).hexdigest() == digest
    source = load_file(GOLDEN / name / "weights.safetensors")
    written = {**load_file(folder / "model.safetensors")}
    if name == "pretraining":
        written |= {f"pretraining/{key}": tensor for key, tensor in load_file(folder / "pretraining" / "model.safetensors").items()}
    assert receipt["keys"].keys() == source.keys()
    assert sorted(key for entry in receipt["keys"].values() for key in entry["to"]) == sorted(written)
    for key, entry in receipt["keys"].items():
        assert entry["shape"] == list(source[key].shape)
        assert torch.equal(torch.cat([written[to].flatten() for to in entry["to"]]), source[key].flatten())
    assert receipt["parameters"] == sum(tensor.numel() for tensor in written.values())
    assert (receipt["source"]["layout"], receipt["target"]["layout"]) == (LAYOUT[name], "transformers")
    assert receipt["versions"] == {"python": "3"}

    proof = receipt["proof"]
    assert 0 <= proof["largest_relative_difference"] == proof["relative_differences"][proof["at"]] < 1e-5
    assert proof["control"]["relative_difference"] > 1e-3  # it would have seen exchanged queries and keys
    measured = {"pretraining": "text loss", "two_tower": "text embeddings, one row padded"}.get(name, convert.PREFIX_FEATURES)
    assert measured in proof["relative_differences"]
    assert not (folder / "preprocessor_config.json").exists()
    assert any("mean and deviation" in note for note in receipt["notes"])


# The proof sees what is wrong


def exchanging(one, other):
    """A renaming after which two names stand for each other's tensors."""
    def wrong(state, *arguments):
        layout, named = right(state, *arguments)
        swap = {key: key.replace(one, other) if one in key else key.replace(other, one) for key in named}
        return layout, {swap[key]: tensor for key, tensor in named.items()}

    right = checkpoints.to_transformers
    return wrong


@pytest.mark.parametrize("name", ["encoder_fixed", "two_tower", "pretraining"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("attention.q_proj", "attention.k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("rms_norm1", "rms_norm2")],
)
def test_a_wrong_renaming_is_caught(name, one, other, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "to_transformers", exchanging(one, other))
    with pytest.raises(UserError, match="does not compute what the source does"):
        convert.convert(copy_golden(name, tmp_path), tmp_path / "out")
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize("side", ["text_model", "decoder"])
def test_a_wrong_renaming_beside_the_encoder_is_caught(side, tmp_path, monkeypatch):
    name = {"text_model": "two_tower", "decoder": "pretraining"}[side]
    prefix = {"text_model": "text_model.encoder", "decoder": "decoder"}[side]
    one, other = (f"{prefix}.layers.0.attention.{letter}_proj" for letter in "qk")
    monkeypatch.setattr(checkpoints, "to_transformers", exchanging(one, other))
    with pytest.raises(UserError, match="does not compute what the source does"):
        convert.convert(copy_golden(name, tmp_path), tmp_path / "out")


def test_a_wrong_renaming_to_apples_names_is_caught(converted, tmp_path, monkeypatch):
    """Queries and keys exchanged in one rule, so that reading and writing still agree with each other."""
    right = checkpoints.transformers_names
    monkeypatch.setattr(checkpoints, "transformers_names", lambda layout, key: [
        name.translate(str.maketrans("qk", "kq")) if is_query_or_key(name) else name for name in right(layout, key)
    ] if layout.rules else right(layout, key))  # fmt: skip
    with pytest.raises(UserError, match="does not compute what the source does"):
        convert.convert(converted("encoder_fixed")[0], tmp_path / "out", "apple_encoder")
    assert_nothing_at(tmp_path / "out")


def is_query_or_key(name):
    return name.endswith(("q_proj.weight", "k_proj.weight"))


@pytest.mark.parametrize("damage", ["heads", "eps", "norm"])
def test_a_damaged_result_is_caught(damage, tmp_path, monkeypatch):
    """A wrong number of heads, a wrong epsilon, a norm left at ones: nothing in shapes or names tells."""
    def write(folder, *arguments):
        placed = right(folder, *arguments)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config |= {"heads": {"num_attention_heads": 4}, "eps": {"rms_norm_eps": 1e-2}}.get(damage, {})
        file.write_text(json.dumps(config))
        if damage == "norm":
            state = load_file(folder / "model.safetensors")
            state["encoder.layers.1.rms_norm2.weight"] = torch.ones(64)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return placed

    right = convert._write_transformers
    monkeypatch.setattr(convert, "_write_transformers", write)
    with pytest.raises(UserError, match="does not compute what the source does"):
        convert.convert(copy_golden("encoder_fixed", tmp_path), tmp_path / "out")
    assert_nothing_at(tmp_path / "out")


def test_numbers_that_are_none_are_no_proof(tmp_path):
    source = copy_golden("encoder_fixed", tmp_path, lambda state: state["trunk.post_trunk_norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        convert.convert(source, tmp_path / "out")


def test_weights_that_blind_the_proof_are_named(tmp_path):
    def deaden(state):
        for key in state:
            if key.endswith("attn.proj.weight"):
                state[key].zero_()

    receipt = convert.convert(copy_golden("encoder_fixed", tmp_path, deaden), tmp_path / "out")
    assert any("blind" in note for note in receipt["notes"])


# What is refused


def without(key):
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("name", "change", "to", "named"),
    [
        ("encoder_fixed", lambda s: s.update(stray=torch.zeros(1)), "transformers", "unexpected keys.*stray"),
        ("encoder_fixed", without("trunk.blocks.1.norm_2.weight"), "transformers", "missing keys: encoder.layers.1.rms_norm2"),
        ("encoder_fixed", lambda s: s.update({"trunk.blocks.0.attn.qkv.weight": torch.zeros(190, 64)}), "transformers", r"\(190, 64\)"),
        ("encoder_fixed", lambda s: s.update({"preprocessor.pos_embed": torch.zeros(2, 16, 64)}), "transformers", "position_embedding"),
        ("encoder_fixed", lambda s: s.update({"trunk.blocks.0.norm_1.weight": torch.zeros(64, dtype=torch.int8)}), "transformers", "int8"),
        ("encoder_fixed", lambda s: None, "apple_trainer", "apple_trainer cannot be made"),
        ("pretraining", lambda s: None, "apple_two_tower", "apple_two_tower cannot be made"),
        ("two_tower", without("text_projector.weight"), "transformers", "text_projection.weight"),
        ("two_tower", without("image_encoder.head.k.weight"), "transformers", "vision_model.head.k_proj.weight"),
        ("encoder_fixed", lambda s: None, "onnx", "choose transformers, apple_encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(name, change, to, named, tmp_path):
    with pytest.raises(UserError, match=named):
        convert.convert(copy_golden(name, tmp_path, change), tmp_path / "out", to)
    assert_nothing_at(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"eos_token_id": None}, "eos_token_id"), ({"eos_token_id": 90}, "eos_token_id"), ({"num_attention_heads": 3}, "do not divide"),
     ({"num_attention_heads": "two"}, "num_attention_heads"), ({"rms_norm_eps": "small"}, "rms_norm_eps")],
)  # fmt: skip
def test_a_text_tower_needs_its_numbers(change, named, tmp_path):
    source = copy_golden("two_tower", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["text"] |= change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=named):
        convert.convert(source, tmp_path / "out")


def test_heads_are_never_guessed_in_silence(tmp_path):
    with pytest.raises(UserError, match="number of heads is unknown"):
        convert.convert(copy_golden("encoder_fixed", tmp_path, config=False), tmp_path / "out")
    build_encoder(image_size=28, hidden_size=256, intermediate_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "config.json").unlink()
    receipt = convert.convert(tmp_path / "wide", tmp_path / "guessed")
    assert any("128 wide" in note for note in receipt["notes"])
    assert AutoModel.from_pretrained(tmp_path / "guessed").config.num_attention_heads == 2


def test_bad_places_are_one_line(tmp_path):
    def error(*words):
        done = run_cli("convert", *words, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    source = copy_golden("encoder_fixed", tmp_path)
    assert "no such file" in error(tmp_path / "absent", tmp_path / "out")
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("precious")
    assert "nothing is overwritten" in error(source, used)
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    assert "nothing is overwritten" in error(source, source)
    assert "cannot be made" in error(source, used / "mine.txt" / "out")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").write_bytes(b"never opened")
    assert "pickles" in error(pickles, tmp_path / "out")
    assert "hub" in error("owner/absent-model", tmp_path / "out")
    assert_nothing_at(tmp_path / "out")


def test_a_conversion_that_stops_half_way_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    source, out = copy_golden("encoder_native", tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "prove", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, out)
    assert_nothing_at(out)
    killed = tmp_path / ".out.tmp"  # what a kill leaves
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    out.mkdir()  # an empty folder is as good as none
    convert.convert(source, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "conversion.json"}
    assert not killed.exists()
