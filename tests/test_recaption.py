"""Synthetic captions: every member keeps its bytes, every picture gets what the model says of it alone, whatever cannot is named."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import run_cli
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from aimv2_vlm.data.chat import train_chat_tokenizer
from aimv2_vlm.data.shards import ShardSet
from aimv2_vlm.evaluation import recaption as module
from aimv2_vlm.evaluation.generation import Generator, load_assistant
from aimv2_vlm.evaluation.recaption import with_fields
from aimv2_vlm.models.assistant import build_assistant
from aimv2_vlm.models.encoder import build_encoder


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    """A tiny one whose answers depend on the picture."""
    root = tmp_path_factory.mktemp("assistant")
    train_chat_tokenizer(["What is shown? a red circle 12", "one two three four"] * 10, root / "tokenizer", 380)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
             "max_position_embeddings": 256}
    encoder = build_encoder(image_size=28, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2)
    model, processor = build_assistant(
        encoder, None, "1x1", tokenizer=str(root / "tokenizer"), llm_config=sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1.0)
        model.model.multi_modal_projector.linear_2.weight.mul_(30)
    model.save_pretrained(root / "final")
    processor.save_pretrained(root / "final")
    return root / "final"


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tar(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


@pytest.fixture
def shards(tmp_path):
    """Members of every kind: other files, no .txt, no .json, odd JSON, a broken picture, a .json that is none, no picture."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "00000.tar", [
        ("a.png", picture(0)), ("a.txt", b"one"), ("a.json", b'{"n": 1.50, "big": 12345678901234567890123, "n": 2}\n'), ("a.cls", b"\x00\x01"),
        ("b.png", picture(1)), ("c.jpg", picture(2)), ("c.json", b"{}"), ("cut.png", picture(3)[:-300]), ("cut.json", b'{"x": 1}'),
        ("list.png", picture(4)), ("list.json", b"[1]"), ("alone.txt", b"no picture"),
    ])  # fmt: skip
    write_tar(folder / "00001.tar", [(f"k{n}.png", picture(n)) for n in range(3)] + [("sub/dir_long" + "x" * 120 + ".png", picture(9))])
    return folder


def caption(assistant, shards, out, *more, check=True):
    return run_cli("data", "recaption", shards, out, "--model", assistant, "--precision", "fp32", "--batch-size", 4, "--max-new-tokens", 5,
                   "--max-bad-fraction", 1, *more, check=check)


def test_members_keep_their_bytes_and_pictures_get_their_captions(assistant, shards, tmp_path):
    out = tmp_path / "new"
    done = caption(assistant, shards, out, "--prompt", "What is shown?", "--field", "said")
    model, processor = load_assistant(str(assistant), "fp32")
    alone = Generator(model, processor, batch_size=1, max_new_tokens=5)
    expected = {
        name: alone.answer([([Image.open(io.BytesIO(data)).convert("RGB")], "What is shown?")])[0].strip()
        for name, data in [*read_tar(shards / "00000.tar"), *read_tar(shards / "00001.tar")]
        if name in ("a.png", "b.png", "c.jpg") or name.startswith(("k", "sub"))
    }
    assert len(set(expected.values())) > 1 and all(expected.values())
    seen = {}
    for name in ("00000.tar", "00001.tar"):
        old, new = read_tar(shards / name), dict(read_tar(out / name))
        assert [n for n in new if n in dict(old)] == [n for n, _ in old]
        for member, data in old:
            if not member.endswith(".json") or member in ("cut.json", "list.json"):
                assert new[member] == data
            else:
                assert new[member].startswith(data.rstrip()[:-1])
        key_of = {n.rpartition("/")[0] + n.rpartition("/")[2].partition(".")[0]: n for n in expected}
        for member, data in new.items():
            if member.endswith(".json") and "said" in (fields := json.loads(data)):
                seen[key_of[member.rpartition("/")[0] + member.rpartition("/")[2].partition(".")[0]]] = fields["said"]
    assert seen == expected
    assert json.loads(dict(read_tar(out / "00000.tar"))["a.json"]) == {"big": 12345678901234567890123, "n": 2, "said": expected["a.png"]}
    report = json.loads(done.stdout.partition("\nbad: ")[0])
    assert (report["num_captions"], report["num_bad"]) == (7, 3)
    for words in ("cut: picture", "list: metadata is not a JSON object", "alone: no picture"):
        assert f"bad: 00000.tar: {words}" in done.stdout
    # Training reads them by name; where there is none the sample has no position.
    ready = ShardSet(str(out), {"json:said": 1.0})
    assert ready.num_samples == [3, 4] and ready.read(0, 0).caption == expected["a.png"]
    about = json.loads((out / "recaption.json").read_text())
    assert about["settings"]["prompt"] == "What is shown?" and about["settings"]["model"] == str(assistant) and about["settings"]["max_new_tokens"] == 5
    assert about["model"]["class"] == "LlavaForConditionalGeneration" and len(about["model"]["config_sha256"]) == 64 and about["versions"]["torch"]
    assert caption(assistant, shards, tmp_path / "again", "--max-bad-fraction", 0.2, check=False).returncode == 1


def test_a_second_call_goes_on_shard_by_shard(assistant, shards, tmp_path, monkeypatch):
    out, whole = tmp_path / "new", tmp_path / "whole"
    caption(assistant, shards, whole)
    real = module._caption_shard

    def dies(path, *rest):
        if path.name == "00001.tar":
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(module, "_caption_shard", dies)
    assert caption(assistant, shards, out, check=False).returncode == 130
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar"]
    monkeypatch.setattr(module, "_caption_shard", lambda path, *rest: calls.append(path.name) or real(path, *rest))
    calls = []
    (out / "00001.tar").write_bytes(b"left by a crash")
    first = (out / "00000.tar").stat().st_mtime_ns
    again = json.loads(caption(assistant, shards, out).stdout.partition("\nbad: ")[0])
    assert calls == ["00001.tar"] and (again["num_done_before"], again["num_captions"]) == (1, 7)
    assert (out / "00000.tar").stat().st_mtime_ns == first
    for name in ("00000.tar", "00001.tar"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    # All done: no model is needed; another source of the same name is made anew.
    monkeypatch.setattr(module, "_open_generator", None)
    assert json.loads(caption(assistant, shards, out).stdout.partition("\nbad: ")[0])["num_done_before"] == 2
    monkeypatch.undo()
    write_tar(shards / "00001.tar", [("new.png", picture(7))])
    assert [name for name, _ in read_tar(out / "00001.tar")][:1] == ["k0.png"]
    caption(assistant, shards, out)
    assert [name for name, _ in read_tar(out / "00001.tar")] == ["new.png", "new.json"]


def test_a_model_that_was_trained_on_does_not_go_on_with_anothers_captions(assistant, shards, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(assistant, model)
    caption(model, shards / "00001.tar", tmp_path / "new")
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    refused = caption(model, shards, tmp_path / "new", check=False)
    assert refused.returncode == 2 and "was begun with other settings (weights is" in refused.stderr


def test_what_cannot_be_meant_is_refused_in_one_line(assistant, shards, tmp_path):
    out = tmp_path / "new"
    caption(assistant, shards / "00001.tar", out)
    for words, message in (
        ((assistant, shards, out, "--prompt", "Other?"), "was begun with other settings (prompt is 'Other?', was 'Describe the picture.')"),
        ((assistant, shards, shards), "holds the shards that are read"),
        ((assistant, shards / "00000.tar", tmp_path / "x", "--field", "n"), "00000.tar: a: its .json has a field 'n' already"),
        ((tmp_path / "nowhere", shards, tmp_path / "y"), "no checkpoint here"),
        ((assistant, tmp_path / "nothing", tmp_path / "z"), "no file"),
        ((assistant, shards, tmp_path / "v", "--prompt", " "), "must not be empty"),
    ):
        refused = caption(*words, check=False)
        *_, last = refused.stderr.strip().splitlines()
        assert refused.returncode == 2 and last.startswith("error: ") and message in last
    assert not list((tmp_path / "x").glob("*.tar"))


@given(st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3) | st.lists(st.booleans()), max_size=3),
       st.text(max_size=5), st.sampled_from(["", "\n", " \n"]), st.sampled_from([None, 1]))
def test_new_fields_stand_behind_untouched_bytes(old, value, tail, indent):
    data = (json.dumps(old, indent=indent) + tail).encode()
    new = with_fields(data, {"caption of mine": value})
    assert json.loads(new) == {**old, "caption of mine": value} and new.startswith(data.rstrip()[:-1].rstrip())
