"""What a tuning run does with a start that was refused, with data of which nothing can be used, and with parts that changed under it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import run_cli, run_two_processes
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import assert_same_weights, pretraining, tuning
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from aimv2_vlm.config import ConversationSource, SftRecipe, UserError
from aimv2_vlm.data import collate
from aimv2_vlm.data.conversations import ConversationSet
from aimv2_vlm.data.transforms import BadImage
from aimv2_vlm.evaluation.generation import Generator, Picture, Question, load_assistant
from aimv2_vlm.evaluation.plan import picture_tokens
from aimv2_vlm.recipe import load_recipe
from aimv2_vlm.serve.chat import Chat, Session, describe
from aimv2_vlm.serve.web import picture_note
from aimv2_vlm.train import run


def refusal(words) -> str:
    done = run_cli(*words, check=False)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return line


def test_a_key_that_was_refused_is_mended_without_restart(scenes_root, tiny_encoder, tmp_path):
    """Nothing is trained yet, so nothing is lost; what was made for the old keys is made anew."""
    out = tmp_path / "run"
    assert "adapter.targets: qproj" in refusal(tuning(scenes_root, tiny_encoder, out, "adapter.kind=lora", "adapter.targets=[qproj]"))
    assert len(AutoTokenizer.from_pretrained(out / "tokenizer")) == 360
    words = tuning(scenes_root, tiny_encoder, out, "adapter.kind=lora", "adapter.targets=[q_proj]", "llm.vocab_size=380")
    recipe = load_recipe("sft", words[1], [*words[2:], "adapter.targets=[kproj]"])
    with pytest.raises(UserError, match="kproj") as kept:  # from Python, with the traceback and all that it holds at hand
        run.sft(recipe)
    run_cli(*words, "train.stop_after=2")
    assert kept.value.__traceback__ is not None
    assert len(AutoTokenizer.from_pretrained(out / "tokenizer")) == 380
    assert "another recipe" in refusal([*words, "adapter.rank=3"])  # now there is something to lose
    run_cli(*words, "data.max_bad_fraction=0.5")  # a limit changes nothing that is computed
    assert (out / "final").is_dir()


def test_an_assistant_with_a_quarter_of_the_tokens_is_tuned_asked_and_kept_apart_from_llavas_ways(scenes_root, tiny_encoder, tmp_path):
    out = tmp_path / "run"
    words = tuning(scenes_root, tiny_encoder, out, "tiling.unshuffle=2", grid="2x2")
    run_cli(*words)
    model, processor = load_assistant(out / "final", "fp32", "cpu")
    assert type(model).__name__ == "Cohere2VisionForConditionalGeneration"
    generator = Generator(model, processor, max_new_tokens=4)
    assert generator.tiling == "up to 4 tiles, unshuffled by 2" and generator.shares_prefix
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    questions = [Question("What is shown?", (Picture(n, lambda n=n: Image.new("RGB", (n * side, n * side), "green")),)) for n in (1, 2)]
    answers = generator.answer(questions)
    assert generator.tokens_seen == {1: patches // 4, 2: 5 * patches // 4}
    assert all(generator.check(question, answer).ours == answer for question, answer in zip(questions, answers, strict=True))
    card = (out / "final" / "README.md").read_text(encoding="utf-8")
    assert "as at most 4 tiles and an overview, 4 patches a token" in card and "gated" in card
    with pytest.raises(UserError, match="tiling.source_size: 20 would leave"):
        Generator(model, processor, source_size=20)
    assert picture_tokens(out / "final") == 5 * patches // 4
    with pytest.raises(UserError, match="needs a LlavaNext"):
        picture_tokens(out / "final", "2x2")
    talk, session, said = Chat(model, processor), Session(), []
    for n in (1, 2):
        Image.new("RGB", (n * side, n * side), "green").save(tmp_path / "shown.png")
        talk.show(session, tmp_path / "shown.png")
        said.append((describe(talk, session.shown), picture_note(talk, session).endswith("blue: overview")))
    assert said == [(f"{side} x {side} pixels, {patches // 4} tokens", False), (f"{2 * side} x {2 * side} pixels, 2x2 tiles, {5 * patches // 4} tokens", True)]
    run_cli("data", "check", scenes_root / "conversations" / "conversations.json", "--images", scenes_root / "conversations" / "images",
            "--recipe", out / "recipe.yaml", "--num", "4", "--page", tmp_path / "page.html")
    assert "4 of them a token" in (tmp_path / "page.html").read_text(encoding="utf-8")
    refused = run_cli("convert", out / "final", tmp_path / "llava", "--to", "llava", check=False)
    assert refused.returncode == 2 and "only Llava and LlavaNext" in refused.stderr


def test_a_run_that_could_use_no_row_is_not_published(scenes_root, tiny_encoder, tmp_path):
    words = tuning(scenes_root, tiny_encoder, tmp_path / "run", "data.max_length=5")
    for _ in range(2):  # the second call finds the last step's checkpoint
        assert "every one of the 24 samples of this run is bad" in refusal(words)
    assert not (tmp_path / "run" / "final").exists()


def test_a_frozen_encoder_that_changed_under_a_run_is_refused(scenes_root, tiny_encoder, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, encoder)
    words = tuning(scenes_root, encoder, tmp_path / "run")
    run_cli(*words, "train.stop_after=2")
    weights = load_file(encoder / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, encoder / "model.safetensors", metadata={"format": "pt"})
    assert "frozen.encoder" in refusal(words)
    shutil.copy(tiny_encoder / "model.safetensors", encoder)
    run_cli(*words)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_frozen_connector_that_changed_under_a_run_is_refused(scenes_root, tiny_encoder, tmp_path, form):
    torch.manual_seed(0)
    width = load_file(tiny_encoder / "model.safetensors")["embeddings.patch_embed.weight"].shape[0]
    words = tuning(scenes_root, tiny_encoder, tmp_path / "run", f"connector_path={tmp_path / 'connector'}", "trainable=[llm]")
    hidden = load_recipe("sft", words[1], words[2:]).llm.hidden_size
    sizes = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    tensors = {f"model.mm_projector.{name}": torch.randn(size) for name, size in sizes.items()}
    (tmp_path / "connector").mkdir()
    save_file({"other": torch.zeros(3)}, tmp_path / "connector" / "model.safetensors")  # of a folder that holds more
    save = {"safetensors": save_file, "bin": torch.save}[form]
    path = tmp_path / "connector" / f"mm_projector.{form}"
    save(tensors, path)
    run_cli(*words, "train.stop_after=2")
    save({name: tensor + 1e-3 for name, tensor in tensors.items()}, path)
    assert "frozen.connector" in refusal(words)
    save(tensors, path)
    run_cli(*words)


def test_two_processes_train_an_encoder_up_to_the_layer_that_is_read(scenes_root, tiny_encoder, tmp_path):
    """DDP waits for a gradient of everything that is trainable."""
    words = tuning(scenes_root, tiny_encoder, tmp_path / "run", "trainable=[encoder,connector]", "encoder.layer=-2", "encoder.cache=off", "optim.steps=2")
    codes, logs = run_two_processes([sys.executable, "-m", "aimv2_vlm", *words], tmp_path)
    assert codes == [0, 0], logs
    before, after = load_file(tiny_encoder / "model.safetensors"), load_file(tmp_path / "run" / "final" / "model.safetensors")
    names = {name: next(other for other in after if other.endswith(f"vision_tower.{name}")) for name in before}
    changed = {name for name, other in names.items() if not torch.equal(before[name], after[other])}
    last = max(int(name.split(".")[2]) for name in before if name.startswith("encoder.layers."))
    assert changed == {name for name in before if not name.startswith((f"encoder.layers.{last}.", "rms_norm."))}


def test_a_picture_that_no_row_holds_is_refused_at_the_start(scenes_root, tiny_encoder, tmp_path):
    line = refusal(tuning(scenes_root, tiny_encoder, tmp_path / "run", "data.max_length=20", grid="2x2"))
    assert "data.max_length: rows of 20 tokens, but a picture alone takes 24; raise it" in line


def test_rows_that_hold_no_picture_may_be_shorter_than_one(scenes_root, tiny_encoder, tmp_path):
    rows = [{"id": i, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]} for i in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(rows), encoding="utf-8")
    run_cli(*tuning(scenes_root, tiny_encoder, tmp_path / "run", "tiling.grid=3x3", "data.max_length=40", f"data.sources=[{{path: {tmp_path / 'text.json'}}}]", "optim.steps=2", grid="2x2"))


def test_rows_whose_pictures_come_late_are_cut_before_them(scenes_root, tiny_encoder, tmp_path):
    """Nothing of such a row is left out but what does not fit, and that is counted."""
    folder = scenes_root / "conversations"
    named = [row["image"] for row in json.loads((folder / "conversations.json").read_text(encoding="utf-8")) if isinstance(row.get("image"), str)][:8]
    rows = [{"id": i, "image": [name, name], "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"},
                                                               {"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": "no"}]} for i, name in enumerate(named)]
    (tmp_path / "late.json").write_text(json.dumps(rows), encoding="utf-8")
    words = tuning(scenes_root, tiny_encoder, tmp_path / "run", "tiling.grid=3x3", "data.max_length=40", "optim.steps=2", "train.log_every=1",
                   f"data.sources=[{{path: {tmp_path / 'late.json'}, images: {folder / 'images'}}}]", grid="2x2")
    run_cli(*words)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["bad_samples"] == 0 and first["truncated"] > 0


def test_a_checkpoint_is_compared_by_what_it_knows_of():
    old = {"seed": 0, "rows": 5, "sources": {"a": "x"}}
    assert run.compare_conversations(old, old | {"frozen": {"encoder": "y"}}) == []
    assert run.compare_conversations(old, old | {"rows": 6}) == ["rows: 5 -> 6"]
    older = old | {"frozen": {"encoder": "y"}}
    assert run.compare_conversations(older, old | {"frozen": {"encoder": "y", "connector": "z"}}) == []
    assert run.compare_conversations(older, old | {"frozen": {"encoder": "x", "connector": "z"}}) == ["frozen.encoder: 'y' -> 'x'"]


def test_rows_are_told_apart_by_file_content_and_choice_and_files_are_read_once(scenes_root, tmp_path, monkeypatch):
    folder = scenes_root / "conversations"
    path = shutil.copy(folder / "conversations.json", tmp_path)
    sources = lambda *takes: [ConversationSource(path=path, images=str(folder / "images"), take=take) for take in takes]  # noqa: E731
    first = ConversationSet(sources("random:5", "first:3")).fingerprint()
    with open(path, "rb") as file:
        assert first["sources"][path].split()[1] == hashlib.file_digest(file, "sha256").hexdigest()

    def read_again(*_: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(hashlib, "file_digest", read_again)
    assert ConversationSet(sources("random:5", "first:3")).fingerprint() == first
    others = [ConversationSet(sources("random:5", "first:3"), seed=1), ConversationSet(sources("first:3", "random:5")), ConversationSet(sources("random:5", "first:4"))]
    assert len({json.dumps(rows.fingerprint()["rows_taken"]) for rows in others}) == 3
    assert all(rows.fingerprint()["rows_taken"] != first["rows_taken"] for rows in others)


@pytest.fixture(scope="module")
def decoder(scenes_root, tiny_encoder, tmp_path_factory):
    """A decoder as from the hub, with dropout of its own."""
    folder = tmp_path_factory.mktemp("decoder")
    run_cli(*tuning(scenes_root, tiny_encoder, folder / "run", "train.stop_after=1"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         attention_dropout=0.3, max_position_embeddings=512)
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder / "llm"


def test_a_decoder_with_dropout_of_its_own_goes_on_bit_for_bit(decoder, scenes_root, tiny_encoder, tmp_path):
    for name in "ab":
        words = tuning(scenes_root, tiny_encoder, tmp_path / name, f"llm.path={decoder}", "optim.lr=1e-2")
        if name == "b":
            run_cli(*words, "train.stop_after=3")
        run_cli(*words)
    assert_same_weights(tmp_path / "a" / "final", tmp_path / "b" / "final")


def test_a_decoder_without_some_weights_or_in_pickles_is_refused(decoder, scenes_root, tiny_encoder, tmp_path):
    for name in ("cut", "pickled"):
        shutil.copytree(decoder, tmp_path / name)
        weights = load_file(decoder / "model.safetensors")
        (tmp_path / name / "model.safetensors").unlink()
        if name == "cut":
            del weights["model.layers.0.mlp.up_proj.weight"]
            save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(weights, tmp_path / name / "pytorch_model.bin")
    words = [tuning(scenes_root, tiny_encoder, tmp_path / "run", f"llm.path={tmp_path / name}") for name in ("cut", "pickled")]
    assert "missing or of another shape: model.layers.0.mlp.up_proj.weight" in refusal(words[0])
    assert "pickled: cannot be opened" in refusal(words[1])


def test_8_bit_states_do_not_go_with_sharded_pretraining(scenes_root, tmp_path, monkeypatch):
    _, name, *overrides = pretraining(scenes_root, tmp_path / "run", "optim.states=8bit")
    monkeypatch.setattr(run.Placement, "of", lambda _: SimpleNamespace(strategy="fsdp2"))
    with pytest.raises(UserError, match="^optim.states: 8bit does not go with train.strategy: fsdp2"):
        run.pretrain(load_recipe("pretrain", name, overrides))


@pytest.mark.parametrize("sizes,named", [({"num_heads": 3}, "llm.num_heads: 3"), ({"num_kv_heads": 3}, "llm.num_kv_heads: 3")])
def test_heads_that_do_not_divide_are_named(sizes, named):
    recipe = SftRecipe()
    for key, value in sizes.items():
        setattr(recipe.llm, key, value)
    with pytest.raises(UserError, match=f"^{named} does not divide"):
        run.check_tuning(recipe, SimpleNamespace(strategy="single"))


def test_a_picture_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    huge = tmp_path / "huge.png"
    with open(huge, "wb") as file:
        file.truncate(collate.MAX_BYTES + 1)
    monkeypatch.setattr(collate.Path, "read_bytes", lambda *_: pytest.fail("it was read"))
    for read in (collate.read_size, lambda path: collate.read_views(path, None, None)):
        with pytest.raises(BadImage, match="huge.png: 40000001 bytes, over the limit"):
            read(str(huge))
