"""LLaVA's formats: its projector read, its checkpoints written and read back bit for bit, its ids and labels, no pickle elsewhere."""

import ast
import base64
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import llava_cases
import pytest
import sentencepiece
import torch
from conftest import run_cli
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel, CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import aimv2_vlm
from aimv2_vlm.config import FrozenEncoder, LanguageModel, SftRecipe, UserError
from aimv2_vlm.data.chat import IGNORED, VICUNA_SYSTEM, ChatFormat, chat_template, prepare_tokenizer, train_chat_tokenizer
from aimv2_vlm.data.conversations import parse_row
from aimv2_vlm.models import llava_format
from aimv2_vlm.models.assistant import build_assistant
from aimv2_vlm.models.convert import TARGETS, convert
from aimv2_vlm.models.llava_format import load_connector, read_connector
from aimv2_vlm.train.run import build_from_recipe

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
LLAMA = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
FIXTURE = json.loads(llava_cases.FIXTURE.read_text(encoding="utf-8"))
PICTURE = llava_cases.PICTURE


def make_encoder(width=32):
    torch.manual_seed(0)
    config = Aimv2VisionConfig(image_size=28, patch_size=14, hidden_size=width, intermediate_size=48, num_hidden_layers=1,
                               num_attention_heads=2, use_head=False, tie_last_hidden_states=True, initializer_range=0.2)  # fmt: skip
    return Aimv2VisionModel(config).eval()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("vicuna", "llama3"):
        train_chat_tokenizer([*llava_cases.TEXTS, "user assistant system yes no"] * 10, root / kind, 600, kind)
    return root


def build(tokenizers, grid="1x1", kind="vicuna", **llama):
    torch.manual_seed(1)
    return build_assistant(make_encoder(), None, grid, tokenizer=str(tokenizers / kind), llm_config=LLAMA | llama, image_mean=MEAN,
                           image_std=STD, template=kind)  # fmt: skip


def save(assistant, folder, dtype=torch.float32):
    model, processor = assistant
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def final(tokenizers, tmp_path_factory):
    """Saved assistants by (grid, template)."""
    root = tmp_path_factory.mktemp("final")
    return {(grid, kind): save(build(tokenizers, grid, kind), root / f"{grid}_{kind}") for grid, kind in (("1x1", "vicuna"), ("1x2", "llama3"))}


@pytest.fixture(scope="module")
def as_llava(final, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "llava-7b"
    return folder, convert(final["1x1", "vicuna"], folder, "llava")


def mlp(encoder=32, decoder=24, prefix="model.mm_projector."):
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Linear(encoder, decoder), nn.GELU(), nn.Linear(decoder, decoder))
    return layers, {f"{prefix}{name}": tensor.detach() for name, tensor in layers.named_parameters()}


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "conversion.json"}


# ---------------------------------------------------------------------------------------------------------- the projector


@pytest.mark.parametrize("prefix", ["mm_projector.", "model.mm_projector.", "base_model.model.model.mm_projector.", "module.model.mm_projector."])
def test_llavas_projector_computes_the_same_as_the_stock_connector(tokenizers, tmp_path, prefix):
    model, _ = build(tokenizers)
    layers, state = mlp(prefix=prefix)
    torch.save(state, tmp_path / "mm_projector.bin")
    load_connector(model, tmp_path / "mm_projector.bin")
    features = torch.randn(3, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.model.multi_modal_projector(features), layers(features), atol=1e-6, rtol=1e-6)


def test_the_stock_connector_computes_the_fixtures_embeddings():
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    stored = load_file(llava_cases.CONNECTOR)
    features, wanted = stored.pop("features"), stored.pop("embeddings")
    text = LlamaConfig(hidden_size=8, num_attention_heads=1)
    config = LlavaConfig(vision_config=Aimv2VisionConfig(hidden_size=6), text_config=text, vision_feature_layer=-1)
    connector = LlavaMultiModalProjector(config)
    connector.load_state_dict(llava_format._connector_named(stored, llava_cases.CONNECTOR))
    with torch.no_grad():
        torch.testing.assert_close(connector(features), wanted, atol=1e-6, rtol=1e-6)


def test_every_form_of_a_connector_is_the_same_connector(final, as_llava, tmp_path):
    """A run's final/, its LLaVA form, that folder's projector file, and LLaVA's own kind of folder."""
    source = final["1x1", "vicuna"]
    wanted = {name.split("projector.")[1]: t for name, t in load_file(source / "model.safetensors").items() if "projector" in name}
    (tmp_path / "stage1").mkdir()
    torch.save({f"model.mm_projector.{ {'1': '0', '2': '2'}[name[7]] }{name[8:]}": t for name, t in wanted.items()},
               tmp_path / "stage1" / "mm_projector.bin")  # fmt: skip
    for path in (source, source / "model.safetensors", as_llava[0], as_llava[0] / "mm_projector.safetensors", tmp_path / "stage1"):
        found = read_connector(path)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), path


def test_a_connector_of_tiles_brings_its_newline(tokenizers, final):
    model, _ = build(tokenizers, "2x2", "llama3")
    load_connector(model, final["1x2", "llama3"])
    stored = load_file(final["1x2", "llama3"] / "model.safetensors")
    assert torch.equal(model.model.image_newline, stored["image_newline"])
    single, _ = build(tokenizers)
    load_connector(single, final["1x2", "llama3"])  # one view has no newline: the connector alone


def change(**tensors):
    state = mlp()[1] | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


REFUSED = {
    "empty": (change(model__mm_projector__2__weight=torch.empty(0)), r"model\.mm_projector\.2\.weight: shape \[0\].*ZeRO-3"),
    "linear": ({"model.mm_projector.weight": torch.ones(24, 32), "model.mm_projector.bias": torch.ones(24)}, "single linear layer.*two"),
    "no bias": (change(model__mm_projector__2__bias=None), r"mlp2x_gelu.*lacks linear_2\.bias"),
    "three layers": (change(model__mm_projector__4__weight=torch.ones(2, 2)), r"mlp2x_gelu.*also has 4\.weight"),
    "tokens": (change(model__embed_tokens__weight=torch.ones(2, 24)), "embed_tokens.*mm_use_im_start_end"),
    "other tensor": (change(model__norm__weight=torch.ones(2)), r"model\.norm\.weight: is no tensor of a connector"),
    "other shape": (change(model__mm_projector__0__weight=torch.ones(24)), r"linear_1\.weight: shape \[24\]"),
    "middle": (change(model__mm_projector__0__bias=torch.ones(9)), r"other shapes: linear_1\.bias \(9,\) instead of \(24,\)"),
    "encoder": (mlp(encoder=48)[1], "takes features 48 wide, but the encoder here is 32 wide"),
    "decoder": (mlp(decoder=16)[1], "gives embeddings 16 wide, but the decoder here is 24 wide"),
    "list": ([torch.ones(2)], "expected names with tensors"),
    "number": ({"model.mm_projector.0.weight": 3}, "expected names with tensors"),
}


# safetensors holds nothing but tensors, and of a whole checkpoint in it the connector's alone are looked at
IN_SAFETENSORS = [name for name in REFUSED if name not in ("list", "number", "tokens", "other tensor")]


@pytest.mark.parametrize(("name", "kind"), [*((name, "bin") for name in REFUSED), *((name, "safetensors") for name in IN_SAFETENSORS)])
def test_connectors_that_do_not_fit_are_refused_in_one_line(tokenizers, tmp_path, name, kind):
    state, told = REFUSED[name]
    file = tmp_path / f"mm_projector.{kind}"
    if kind == "bin":
        torch.save(state, file)
    else:
        save_file(state, file)
    model, _ = build(tokenizers)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=told) as caught:
        load_connector(model, file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_recipe_starts_from_a_connector(tokenizers, final, tmp_path):
    """LLaVA's two stages: what the first one wrote is where the second begins; everything else is drawn as ever."""
    make_encoder().save_pretrained(tmp_path / "encoder")
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path / "encoder")
    sizes = LanguageModel(template="vicuna", hidden_size=24, intermediate_size=40, num_layers=1, num_heads=2, max_positions=256)
    recipe = SftRecipe(encoder=FrozenEncoder(path=str(tmp_path / "encoder")), llm=sizes)

    def state(**keys):
        for key, value in keys.items():
            setattr(recipe, key, value)
        torch.manual_seed(0)
        return build_from_recipe(recipe, tokenizers / "vicuna")[0].state_dict()

    fresh, tuned = state(), state(connector_path=str(final["1x1", "vicuna"]))
    stored = load_file(final["1x1", "vicuna"] / "model.safetensors")
    for name, tensor in tuned.items():
        wanted = stored[name.removeprefix("model.")] if "projector" in name else fresh[name]
        assert torch.equal(tensor, wanted), name
    recipe.connector_path = str(tmp_path / "encoder")
    with pytest.raises(UserError, match="holds no connector"):
        build_from_recipe(recipe, tokenizers / "vicuna")


# -------------------------------------------------------------------------------------------------------------- no pickle


class Payload:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def watched():
    """What was unpickled or run meanwhile, as (event, arguments)."""
    seen, watching = [], True

    def audit(event, arguments):
        if watching and (event in ("pickle.find_class", "os.mkdir", "os.system") or event.startswith("subprocess")):
            seen.append((event, str(arguments)))

    sys.addaudithook(audit)
    yield seen
    watching = False


@pytest.mark.parametrize("form", ["pickle", "old torch", "torch", "inside the tensors", "text", "nothing", "archive without a pickle"])
def test_a_hostile_or_broken_projector_is_refused_and_runs_nothing(tokenizers, tmp_path, watched, form):
    trace, file = str(tmp_path / "executed"), tmp_path / "mm_projector.bin"
    state = mlp()[1]
    if form == "pickle":
        file.write_bytes(pickle.dumps(Payload(trace)))
    elif form in ("torch", "old torch"):
        torch.save({**state, "x": Payload(trace)}, file, _use_new_zipfile_serialization=form == "torch")
    elif form == "inside the tensors":
        torch.save({"model.mm_projector.0.weight": Payload(trace)}, file)
    elif form == "archive without a pickle":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("mm_projector/version", "3")
    else:
        file.write_bytes(b"nothing like it" if form == "text" else b"")
    model, _ = build(tokenizers)
    watched.clear()
    with pytest.raises(UserError, match="not read as a projector file") as caught:
        load_connector(model, file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and str(file) in str(caught.value)
    assert watched == [] and not os.path.exists(trace)


def test_nothing_else_of_the_package_unpickles(final, as_llava, tmp_path, watched):
    """Neither a conversion in both directions nor a connector from a checkpoint; and pickles beside the weights stay shut."""
    source = shutil.copytree(as_llava[0], tmp_path / "source")
    trace = str(tmp_path / "executed")
    for name in ("mm_projector.bin", "pytorch_model.bin", "vision_tower/pytorch_model.bin"):
        (source / name).write_bytes(pickle.dumps(Payload(trace)))
    watched.clear()
    convert(source, tmp_path / "stock")
    convert(final["1x1", "vicuna"], tmp_path / "llava", "llava")
    read_connector(source)
    assert [seen for seen in watched if seen[0] != "os.mkdir"] == [] and not os.path.exists(trace)

    calls = []
    for file in Path(aimv2_vlm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & {name.split(".")[0] for name in names}, file
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load" and ast.unparse(node.func).startswith("torch"):
                calls.append((file.name, {word.arg: ast.unparse(word.value) for word in node.keywords}))
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", file
    assert [(name, words["weights_only"]) for name, words in calls] == [("llava_format.py", "True")]


# -------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("case", [("1x1", "vicuna"), ("1x2", "llama3")])
def test_a_run_goes_to_llava_and_comes_back_byte_for_byte(case, final, tmp_path, monkeypatch):
    monkeypatch.setattr(llava_format, "SHARD_SIZE", "40KB")  # several shards
    receipt = convert(final[case], tmp_path / "llava", "llava")
    back = convert(tmp_path / "llava", tmp_path / "back")
    assert len(list((tmp_path / "llava").glob("model-*-of-*.safetensors"))) > 1
    assert files_of(tmp_path / "back") == files_of(final[case])
    convert(tmp_path / "back", tmp_path / "again", "llava")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "llava")
    for told in (receipt, back):
        assert told["proof"]["largest_relative_difference"] <= 1e-5
        assert told["proof"]["control"]["relative_difference"] > 1e-3
        assert all(len(entry["to"]) == 1 for entry in told["keys"].values())
        assert told["parameters"] == sum(tensor.numel() for tensor in load_file(final[case] / "model.safetensors").values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_tensors_and_tied_words_survive(tokenizers, tmp_path, dtype):
    source = save(build(tokenizers, tie_word_embeddings=True), tmp_path / "final", dtype)
    convert(source, tmp_path / "llava", "llava")
    convert(tmp_path / "llava", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(source)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.") and config["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "llava" / "model.safetensors")


def test_what_is_written_has_llavas_names_and_keys(as_llava):
    folder, receipt = as_llava
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=config["vocab_size"])).state_dict()
    projector = {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert state.keys() == llama.keys() | projector
    assert load_file(folder / "mm_projector.safetensors").keys() == projector
    wanted = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
              "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "pad", "mm_use_im_start_end": False,
              "mm_use_im_patch_token": False, "use_mm_proj": True, "rope_theta": 10000.0, "hidden_size": 24, "torch_dtype": "float32"}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted and "rope_parameters" not in config
    assert (folder / config["mm_vision_tower"] / "model.safetensors").is_file()
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    notes = "\n".join(receipt["notes"])
    assert "builds CLIP towers only" in notes and "use_fast=False" in notes


def test_tiles_are_written_as_anyres_width_first(final, tmp_path):
    receipt = convert(final["1x2", "llama3"], tmp_path / "llava", "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"] == [[56, 28]]  # (width, height); transformers' is [[28, 56]]
    assert "model.image_newline" in load_file(tmp_path / "llava" / "model.safetensors")
    assert any("pad_square" in note for note in receipt["notes"])


def test_the_terminal_says_what_llava_cannot_do_with_it(final, tmp_path):
    done = run_cli("convert", final["1x1", "vicuna"], tmp_path / "llava", "--to", "llava")
    assert "transformers_assistant -> llava" in done.stdout and "builds CLIP towers only" in done.stdout
    assert "gate and up projections of the decoder exchanged would show" in done.stdout


def test_a_checkpoint_of_someone_elses_gets_processor_template_and_rows_for_its_tokens(as_llava, tmp_path):
    """Without a processor and with Llama's bare tokenizer; the tower's tensors among the rest, as a tuned one is saved."""
    source = shutil.copytree(as_llava[0], tmp_path / "source")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "mm_projector.safetensors"):
        (source / name).unlink()
    tokenizer = bare_tokenizer(legacy=True)
    tokenizer.save_pretrained(source)
    state, words = load_file(source / "model.safetensors"), len(tokenizer)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        state[key] = state[key][:words].clone()
    tower = {f"model.vision_tower.vision_tower.{key}": tensor + 1 for key, tensor in load_file(source / "vision_tower" / "model.safetensors").items()}
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(state | tower | inverse, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": words, "pad_token_id": 0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (source / "config.json").write_text(json.dumps(config))

    receipt = convert(source, tmp_path / "stock")
    made = load_file(tmp_path / "stock" / "model.safetensors")
    assert torch.equal(made["vision_tower.rms_norm.weight"], tower["model.vision_tower.vision_tower.rms_norm.weight"])
    grown = made["language_model.model.embed_tokens.weight"]
    assert len(grown) == -(-(words + 2) // 64) * 64 and torch.equal(grown[:words], state["model.embed_tokens.weight"])
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith(f"<s>{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT:")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["text_config"]["rope_parameters"]["factor"] == 2.0
    assert "no chat template" in "\n".join(receipt["notes"]) and "inv_freq" in receipt["notes"][-1]


def test_a_wrong_renaming_is_seen_and_leaves_nothing(final, tmp_path, monkeypatch):
    rules = [(old.replace("layers.0.", "layers.9.").replace("layers.1.", "layers.0.").replace("layers.9.", "layers.1."), *rest)
             for old, *rest in (("model.layers.0.", "model.language_model.layers.0.", "language_model.model.layers.0."),
                                ("model.layers.1.", "model.language_model.layers.1.", "language_model.model.layers.1."))]  # fmt: skip
    monkeypatch.setattr(llava_format, "_RULES", (*rules, *llava_format._RULES))
    with pytest.raises(UserError, match="does not compute what the source does: logits differ"):
        convert(final["1x1", "vicuna"], tmp_path / "llava", "llava")
    assert not list(tmp_path.iterdir())


STOCK_REFUSED = {
    "text_config.mlp_bias": True, "text_config.head_dim": 8, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "projector_hidden_act": "relu", "vision_config.tie_last_hidden_states": False,
}  # fmt: skip


@pytest.mark.parametrize("key", STOCK_REFUSED)
def test_a_stock_model_without_equivalent_is_refused_by_key(final, tmp_path, key):
    source = shutil.copytree(final["1x1", "vicuna"], tmp_path / "source")
    rewrite(source, key, STOCK_REFUSED[key])
    with pytest.raises(UserError, match=rf"config\.json: {key.replace('.', '[.]')}: {STOCK_REFUSED[key]!r}"):
        convert(source, tmp_path / "llava", "llava")
    assert not (tmp_path / "llava").exists()


LLAVA_REFUSED = {
    "model_type": "llava_mistral", "mm_projector_type": "linear", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": True, "image_aspect_ratio": "highres", "mm_hidden_size": 1024, "mm_vision_tower": "clip",
}  # fmt: skip


@pytest.mark.parametrize("key", LLAVA_REFUSED)
def test_llavas_checkpoint_without_equivalent_is_refused_by_key(as_llava, tmp_path, key):
    source = shutil.copytree(as_llava[0], tmp_path / "source")
    (source / "clip").mkdir()
    (source / "clip" / "config.json").write_text('{"model_type": "clip_vision_model"}')
    rewrite(source, key, LLAVA_REFUSED[key])
    with pytest.raises(UserError, match=f"config.json: {key}: .*{LLAVA_REFUSED[key]}"):
        convert(source, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_other_targets_and_sources_are_refused(final, as_llava, tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    assert "llava" in TARGETS
    for source, to, told in ((tmp_path / "encoder", "llava", "holds encoder .*llava cannot be made"),
                             (final["1x1", "vicuna"], "transformers", "in transformers' layout already"),
                             (final["1x1", "vicuna"], "apple_encoder", "assistant .*apple_encoder cannot be made"),
                             (as_llava[0], "llava", "layout llava.*llava cannot be made"),
                             (final["1x1", "vicuna"] / "model.safetensors", "llava", "name that folder")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            convert(source, tmp_path / "new", to)
    source = shutil.copytree(as_llava[0], tmp_path / "source")
    state = load_file(source / "model.safetensors")
    del state["model.mm_projector.2.bias"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks linear_2\.bias"):
        convert(source, tmp_path / "new")


def rewrite(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    *sections, last = key.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[last] = value
    (folder / "config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------------------------------------------------- ids and labels


def bare_tokenizer(legacy):
    """transformers' Llama tokenizer of the fixture's sentencepiece model, as it comes with a decoder."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(FIXTURE["tokenizer"]))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    learned = [piece for piece, i in vocabulary.items() if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i))]
    halves = [(piece[:cut], piece[cut:]) for piece in learned for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)


@pytest.fixture(scope="module")
def formats():
    """(template, legacy) -> ChatFormat around that tokenizer."""
    made = {}
    for kind, legacy in (("vicuna", True), ("vicuna", False), ("plain", False)):
        tokenizer = bare_tokenizer(legacy)
        image_token = prepare_tokenizer(tokenizer)
        made[kind, legacy] = ChatFormat(tokenizer, chat_template(kind, image_token), image_token)
    return made


def ours(format_, values, picture, system=None):
    """(ids with -200 for the picture, labels) as this project assembles the row."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    turns = ([{"from": "system", "value": system}] if system else []) + turns
    row = parse_row({"id": 0, "image": "a.png" if picture else None, "conversations": turns}, 0)
    assembled = format_.assemble(row, [1] * len(row.images))
    ids = [PICTURE if id_ == format_.image_token_id else id_ for id_ in assembled.ids]
    assert ids.count(PICTURE) == picture
    return ids, assembled.labels


def theirs(name):
    case = FIXTURE["cases"][name]
    return case["ids"], case["labels"]


def own(formats, name):
    case = FIXTURE["cases"][name]
    kind = {"v1": "vicuna", "plain": "plain"}[case["template"]]
    return ours(formats[kind, case["legacy"]], case["values"], case["picture"])


def test_the_fixture_is_what_the_derivation_gives():
    model = base64.b64decode(FIXTURE["tokenizer"])
    assert FIXTURE["cases"].keys() == llava_cases.CASES.keys()
    for name, (template, legacy, picture, values) in llava_cases.CASES.items():
        derive = {"v1": llava_cases.v1, "plain": llava_cases.plain}[template]
        assert derive(llava_cases.Tokenizer(model, legacy), picture, values) == theirs(name), name
    for name, array in llava_cases.connector().items():
        torch.testing.assert_close(torch.from_numpy(array), load_file(llava_cases.CONNECTOR)[name], atol=1e-6, rtol=1e-6)


SAME = ["one turn", "picture last", "picture inside", "three turns", "text only", "text only, two turns", "question without spaces behind"]
STRIPPED = {"answer with a newline in front": "one turn", "answer with a space behind": "one turn",
            "question with spaces behind": "question without spaces behind"}  # fmt: skip
NEWER = ["picture, newer tokenizer", "text, newer tokenizer"]
OTHERWISE = ["end token typed in a question", "caption"]


def test_every_case_is_judged():
    assert sorted([*SAME, *STRIPPED, *NEWER, *OTHERWISE]) == sorted(llava_cases.CASES)


@pytest.mark.parametrize("name", SAME)
def test_ids_and_labels_are_llavas(formats, name):
    assert own(formats, name) == theirs(name)


@pytest.mark.parametrize("name", STRIPPED)
def test_difference_1_texts_are_stripped(formats, name):
    """Spaces around an answer or a question are neither shown nor learned: what LLaVA makes of the stripped row."""
    assert own(formats, name) == theirs(STRIPPED[name]) != theirs(name)


def test_difference_2_no_special_id_comes_from_a_rows_text(formats):
    """LLaVA takes a typed "</s>" for the end of the round and then ignores the whole row; here it is text, and the row is learned."""
    (ids, labels), (their_ids, their_labels) = own(formats, "end token typed in a question"), theirs("end token typed in a question")
    assert ids.count(2) == 1 and their_ids.count(2) == 2
    assert set(their_labels) == {IGNORED}
    learned = [id_ for id_ in labels if id_ != IGNORED]
    assert learned == ids[-len(learned) :] == their_ids[-len(learned) :]
    assert formats["vicuna", True].tokenizer.decode(learned) == "the end</s>"


@pytest.mark.parametrize("name", NEWER)
def test_difference_3_a_newer_tokenizer_puts_no_space_behind_a_special_token(formats, name):
    """LLaVA tokenises each text between special tokens as if it were a text's beginning; inference through the stock processor,
    which sees the begin token and the picture in the text, does not. The first word and what follows the picture show it."""
    (ids, labels), (their_ids, their_labels) = own(formats, name), theirs(name)
    pieces = formats["vicuna", False].tokenizer
    assert pieces.convert_ids_to_tokens([their_ids[1], ids[1]]) == ["▁A", "A"]
    wanted, wanted_labels = [their_ids[0], ids[1], *their_ids[2:]], list(their_labels)
    if PICTURE in their_ids:
        space = their_ids.index(PICTURE) + 1
        assert pieces.convert_ids_to_tokens(wanted.pop(space)) == "▁" and wanted_labels.pop(space) == IGNORED
    assert (ids, labels) == (wanted, wanted_labels)


def test_difference_4_plain_keeps_the_question_and_learns_an_end_token(formats):
    """LLaVA drops a caption's question and ends it with a newline, after which nothing stops generation."""
    tokenizer = formats["plain", False].tokenizer
    (ids, labels), (their_ids, their_labels) = own(formats, "caption"), theirs("caption")
    assert ids[:2] == their_ids[:2] == [1, PICTURE]
    learned, their_learned = ([id_ for id_ in some if id_ != IGNORED] for some in (labels, their_labels))
    assert tokenizer.decode(ids[2 : -len(learned)]).strip() == "Describe it." and their_learned == their_ids[2:]
    assert tokenizer.decode(learned) == "A red circle on a table.</s>"
    assert tokenizer.decode(their_learned) == "A red circle on a table.\n"


def test_difference_5_a_system_turn_takes_the_place_of_the_templates_own(formats):
    """LLaVA's v1 knows no speaker but two and stops at a system turn (a KeyError)."""
    values = FIXTURE["cases"]["text only"]["values"]
    assert ours(formats["vicuna", True], values, False, VICUNA_SYSTEM) == theirs("text only")
    ids, _ = ours(formats["vicuna", True], values, False, "Answer with a number.")
    text = formats["vicuna", True].tokenizer.decode(ids)
    assert text.startswith("<s> Answer with a number. USER:") and VICUNA_SYSTEM not in text


def test_llama_3_ids_are_llavas_and_labels_are_without_the_headers(tokenizers):
    """LLaVA-NeXT tokenises message by message and always has a system turn; it learns, beside the answers, their headers
    and every header mark, blank line and end token of the other speakers. Here: the answers and their end tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers / "llama3")
    format_ = ChatFormat(tokenizer, tokenizer.chat_template, "<|image|>")
    system = "The assistant gives helpful answers."
    values = ["<image>\nWhat is shown?", "A red circle.", "How many?", "\n12"]
    start, end, stop, begin = tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"])
    blank = tokenizer.encode("\n\n", add_special_tokens=False)
    marks = {start, end, stop, begin, *(blank if len(blank) == 1 else [])}
    ids, labels = [begin], [begin]
    for role, text in zip(["system", "user", "assistant", "user", "assistant"], [system, *values], strict=True):
        message = [start, *tokenizer.encode(role, add_special_tokens=False), end]
        for number, part in enumerate(("\n\n" + text.strip()).split("<image>")):
            message += [PICTURE] * bool(number) + tokenizer.encode(part, add_special_tokens=False)
        message.append(stop)
        ids += message
        labels += [id_ if role == "assistant" or id_ in marks else IGNORED for id_ in message]
    our_ids, our_labels = ours(format_, values, True, system)
    assert our_ids == ids
    assert all(our in (IGNORED, their) for our, their in zip(our_labels, labels, strict=True))
    more = [id_ for id_, our, their in zip(ids, our_labels, labels, strict=True) if our == IGNORED != their]
    assert set(more) <= marks | set(tokenizer.encode("assistant", add_special_tokens=False)) | set(blank)
    learned = tokenizer.decode([id_ for id_ in our_labels if id_ != IGNORED])
    assert learned == "A red circle.<|eot_id|>12<|eot_id|>"
