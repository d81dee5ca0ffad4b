"""Zero-shot: classification and retrieval with every two-tower class, and the text tower that must be causal."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import run_cli
from PIL import Image
from test_probe import COLORS, picture

from aimv2_vlm.config import TextTower, UserError, ZeroShotConfig, ZeroShotData
from aimv2_vlm.data.captions import train_clip_tokenizer
from aimv2_vlm.data.labelled import Picture, file_digest
from aimv2_vlm.evaluation import zeroshot
from aimv2_vlm.models.contrastive import TwoTowerForPreTraining
from aimv2_vlm.models.encoder import build_encoder
from aimv2_vlm.train.distributed import Placement

CONTEXT = 12
WORDS = ["a photo of a red shirt", "the blue hat on a green field", "a drawing of shoes", "green green green grass", "one small dog"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_clip_tokenizer(WORDS * 5, folder, 560)
    return folder


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Random models of every class, each with a processor."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    stock = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    ids = {"bos_token_id": stock.bos_token_id, "eos_token_id": stock.eos_token_id, "pad_token_id": stock.pad_token_id, "vocab_size": len(stock)}
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    encoder = build_encoder(image_size=28, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
    tower = TextTower(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, projection_size=16)
    ours = TwoTowerForPreTraining(encoder, tower, vocab_size=len(stock), context_length=CONTEXT, eos_token_id=stock.eos_token_id)
    with torch.no_grad():  # the small initial positions would hide most of what an order of words changes
        ours.towers.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
    own = transformers.CLIPTokenizer.from_pretrained(tokenizer, model_max_length=CONTEXT + 1)
    ours.save_pretrained(root / "aimv2", processor=transformers.CLIPProcessor(image_processor=image, tokenizer=own))
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=SIZES | ids | {"max_position_embeddings": CONTEXT}, vision_config=vision, projection_dim=16))
    clip.save_pretrained(root / "clip")
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=SIZES | ids | {"max_position_embeddings": CONTEXT}, vision_config=vision))
    siglip.save_pretrained(root / "siglip")
    squashing = transformers.SiglipImageProcessor(size={"height": 28, "width": 28}, resample=3)
    for kind, its in (("clip", image), ("siglip", squashing)):
        transformers.CLIPProcessor(image_processor=its, tokenizer=stock).save_pretrained(root / kind)
    return {kind: root / kind for kind in ("aimv2", "clip", "siglip")}


def towers_of(path: Path) -> zeroshot.TwoTowers:
    return zeroshot.TwoTowers(path, Placement("single", "fp32"))


def test_an_unpadded_text_is_read_causally(models):
    """The stock text tower sees the future exactly then; eager attention with a mask is right in both."""
    towers = towers_of(models["aimv2"])
    texts = [WORDS[1], "a " * 40]  # the second fills the tower: nothing is padded
    ids = towers.tokens(texts[1:])["input_ids"]
    assert ids.shape == (1, CONTEXT) and ids[0, -1] == towers.tokenizer.eos_token_id
    exact = transformers.Aimv2Model.from_pretrained(models["aimv2"], attn_implementation="eager").eval()
    stock = transformers.Aimv2Model.from_pretrained(models["aimv2"], attn_implementation="sdpa").eval()
    with torch.no_grad():
        wanted = exact.text_projection(exact.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output)
        leaking = stock.text_projection(stock.text_model(input_ids=ids).pooler_output)
    found = towers.texts(texts)[1:]
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=-1), rtol=0, atol=1e-5)
    assert (found - torch.nn.functional.normalize(leaking, dim=-1)).abs().max() > 1e-3
    torch.testing.assert_close(towers.texts(texts[1:]), found, rtol=0, atol=1e-6)  # whoever stands beside it


@pytest.mark.parametrize("kind", ["aimv2", "clip", "siglip"])
def test_embeddings_are_the_stock_models(kind, models):
    towers = towers_of(models[kind])
    pixels = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    model = transformers.AutoModel.from_pretrained(models[kind]).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(models[kind])
    given = tokens(WORDS[:3], padding="max_length", truncation=True, max_length=CONTEXT + (kind == "aimv2"), return_tensors="pt")
    if kind == "siglip":
        del given["attention_mask"]
    with torch.no_grad():
        out = model(pixel_values=towers.normalize(pixels), **given)
    torch.testing.assert_close(towers.pictures(pixels), out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(towers.texts(WORDS[:3]), out.text_embeds, rtol=0, atol=1e-5)
    assert len(towers.tokens(["<|endoftext|> red"])["input_ids"][0]) > 4  # a special token typed in a text is text


@pytest.mark.parametrize("kind", ["aimv2", "clip", "siglip"])
def test_pictures_are_prepared_as_the_checkpoints_own_processor_does(kind, models, tmp_path):
    """SigLIP's squashes the whole picture; a crop would hide what lies left and right."""
    for number, size in enumerate([(80, 40), (35, 70)]):  # no middle between two pixels: torchvision and transformers round that to different ones
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        image.paste((200, 30, 60), (0, 0, 9, 9))
        image.save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    stock = transformers.AutoImageProcessor.from_pretrained(models[kind])
    wanted = stock([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    towers, seen = towers_of(models[kind]), []
    towers.model.vision_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    pictures = [Picture(file.name, "", file, file_digest(file)) for file in files]
    zeroshot.embed_pictures(towers, pictures, ZeroShotConfig())
    levels = 255 * torch.tensor(stock.image_std).view(3, 1, 1)
    assert ((seen[0] - wanted) * levels).abs().max() <= 1.01  # of 255: resize rounds once here
    cropped = zeroshot.embed_pictures(towers, pictures, ZeroShotConfig(crop_fraction=1.0)) and seen[-1]
    assert (cropped - seen[0]).abs().max() > 1 if kind == "siglip" else torch.equal(cropped, seen[0])


class FixedTowers:
    """Stands for a model that knows colours: embeddings are given, everything around them is the real thing."""

    kind, image_size, canonical, placement, whole_pictures = "clip", 28, False, Placement("single", "fp32"), False

    def pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.float().mean((2, 3)) - 110, dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor(COLORS[next(c for c in COLORS if c in text)]).float() - 110 for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    root, seed = tmp_path_factory.mktemp("colors"), 0
    for name in COLORS:
        (root / "test" / name).mkdir(parents=True)
        for number in range(6):
            seed += 1
            (root / "test" / name / f"{number}.png").write_bytes(picture(COLORS[name], seed))
    return root


def test_classes_are_found_by_their_names_and_wrong_names_are_not(colors, tmp_path):
    config = ZeroShotConfig()
    data = ZeroShotData(path=str(colors))
    columns, samples = zeroshot.classify(FixedTowers(), data, ["a {} thing", "{}"], config)
    assert columns["score"] == 100 and columns["num_classes"] == 3 and columns["num_questions"] == 18 and columns["interval"] == [pytest.approx(100 * 18 / (18 + 1.96**2), abs=0.01), 100]
    (tmp_path / "names.json").write_text(json.dumps({"red": "red", "green": "blue", "blue": "green"}))
    data.class_names = str(tmp_path / "names.json")
    columns, samples = zeroshot.classify(FixedTowers(), data, ["{}"], config)
    assert columns["score"] == pytest.approx(100 / 3, abs=1e-3) and columns["interval"][0] < 100 / 3 < columns["interval"][1]
    assert sum(s["right"] for s in samples) == 6 and columns["majority_score"] == pytest.approx(100 / 3, abs=1e-3)
    (colors / "test" / "red" / "bad.png").write_bytes(b"no picture")
    try:
        columns, _ = zeroshot.classify(FixedTowers(), data, ["{}"], config)
        assert columns["num_errors"] == 1 and not columns["complete"] and columns["num_questions"] == 18
    finally:
        (colors / "test" / "red" / "bad.png").unlink()


def test_ranks_equal_a_plain_sort_and_ties_count_against():
    torch.manual_seed(2)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=-1) for n in (7, 17))
    owner = torch.tensor([*range(7), *range(7), 0, 3, 3])
    to_text, to_image = zeroshot.retrieval_ranks(images, texts, owner, chunk=3)
    scores = images @ texts.T
    for i in range(7):
        order = scores[i].argsort(descending=True).tolist()
        assert to_text[i] == next(rank for rank, t in enumerate(order) if owner[t] == i)
    for t in range(17):
        assert to_image[t] == scores[:, t].argsort(descending=True).tolist().index(int(owner[t]))
    one = torch.ones(7, 8) / math.sqrt(8)
    same = zeroshot.retrieval_ranks(one, torch.ones(17, 8) / math.sqrt(8), owner)
    assert (same[0] == 17 - owner.bincount()).all() and (same[1] == 6).all()  # a collapsed model finds nothing
    assert zeroshot.ranks_of(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([1])).tolist() == [1]


def test_retrieval_puts_captions_of_a_picture_together(tmp_path):
    lines = []
    for seed, name in enumerate(COLORS):
        (tmp_path / f"{name}.png").write_bytes(picture(COLORS[name], seed))
        lines += [{"image": f"{name}.png", "captions": [f"a {name} one", f"{name}"], "split": "val"}, {"image": f"{name}.png", "caption": f"very {name}", "split": "val"}]
    lines.append({"image": "nowhere.png", "caption": "red", "split": "train"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ZeroShotData(path=str(tmp_path), captions=str(tmp_path / "captions.jsonl"), split="val")
    columns, samples = zeroshot.retrieve(FixedTowers(), data, ZeroShotConfig())
    assert columns["num_questions"] == 3 and columns["num_texts"] == 9 and columns["score"] == 100 and columns["split"] == "val"
    assert columns["recalls"]["text_to_picture@1"]["score"] == 100 and columns["recalls"]["picture_to_text@10"]["score"] == 100
    assert samples[0]["captions"] == ["a red one", "red", "very red"] and samples[0]["first_own_caption"] == 0


def test_templates_and_names_are_checked(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}.\n\nmany {}s\n")
    assert zeroshot.read_templates(str(tmp_path / "templates.txt")) == ["a {}.", "many {}s"]
    (tmp_path / "names.txt").write_text("n01\tgoldfish\nn02\ttench\nn03\tshark\n")
    assert zeroshot.read_class_names(str(tmp_path / "names.txt"), ["n01", "n02"])["n03"] == "shark"
    assert zeroshot.read_class_names(None, ["apple_pie"]) == {"apple_pie": "apple pie"}
    (tmp_path / "list.json").write_text('["goldfish", "tench"]')
    assert zeroshot.read_class_names(str(tmp_path / "list.json"), ["n01", "n02"]) == {"n01": "goldfish", "n02": "tench"}
    # the first of a list is the first number, not the first word
    (tmp_path / "twelve.json").write_text(json.dumps([f"name of {i}" for i in range(12)]))
    assert zeroshot.read_class_names(str(tmp_path / "twelve.json"), sorted(map(str, range(12)))) == {str(i): f"name of {i}" for i in range(12)}
    for wordless in ("17", "n01440764"):
        with pytest.raises(UserError, match=f"class_names: null, but {wordless} of the classes says nothing to a text tower; give a file"):
            zeroshot.read_class_names(None, ["apple_pie", wordless])
    (tmp_path / "cranes.txt").write_text("n1\tcrane\nn2\tCrane\n")
    for source, twins in ((None, ["ice-cream", "ice_cream"]), (str(tmp_path / "cranes.txt"), ["n1", "n2"])):
        with pytest.raises(UserError, match=f"classes {twins[0]} and {twins[1]} are both called"):
            zeroshot.read_class_names(source, twins)
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "captions": []}\n')
    for call, word in ((lambda: zeroshot.read_templates(["a photo"]), "holds no {}"), (lambda: zeroshot.read_templates([]), "templates"),
                       (lambda: zeroshot.read_class_names(str(tmp_path / "names.txt"), ["n09"]), "no name for n09"),
                       (lambda: zeroshot.read_class_names(str(tmp_path / "list.json"), ["a"]), "2 names, but the pictures have 1"),
                       (lambda: zeroshot.read_captions(ZeroShotData(path=str(tmp_path), captions=str(tmp_path / "rows.jsonl"))), "line 1"),
                       (lambda: zeroshot.read_captions(ZeroShotData(path=str(tmp_path), captions=str(tmp_path / "no.jsonl"))), "cannot be read")):
        with pytest.raises(UserError, match=word):
            call()


def test_eval_judges_every_class_of_model_into_a_ledger(models, colors, tmp_path):
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps({"image": f"test/{c}/{n}.png", "captions": [f"{c} {n}"]}) for c in COLORS for n in range(2)))
    config = tmp_path / "zero.yaml"
    listed = "\n".join(f"  - {{name: {kind}, path: {path}}}" for kind, path in models.items())
    config.write_text(f"""
kind: zero_shot
out: {tmp_path}/out
precision: fp32
models:
{listed}
  - {{name: an encoder alone, path: {tmp_path}}}
data_sets:
  - {{title: colours, path: {colors}, templates: ["a {{}}"]}}
  - {{title: captions, path: {colors}, captions: {tmp_path}/captions.jsonl}}
""", encoding="utf-8")
    done = run_cli("eval", config, check=False)
    assert done.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [(row["encoder_kind"], row["benchmark"]) for row in rows] == [(kind, name) for kind in models for name in ("colours", "captions")]
    assert rows[0]["templates"] == ["a {}"] and rows[0]["num_questions"] == 18 and rows[1]["num_texts"] == 6 and set(rows[1]["recalls"]) == {
        f"{a}@{k}" for a in ("picture_to_text", "text_to_picture") for k in (1, 5, 10)}
    for row in rows:
        assert (tmp_path / "out" / row["samples"]).read_text().count("\n") == row["num_questions"] and row["versions"]["transformers"] and row["data_hash"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "picture to text@5" in report and "have no scores" not in report and "None" not in report
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert {row["model"] for row in failed} == {"an encoder alone"} and len(failed) == 2
    ledger = (tmp_path / "out" / "ledger.jsonl").read_text()
    run_cli("eval", config, check=False)
    assert (tmp_path / "out" / "ledger.jsonl").read_text() == ledger
    refused = run_cli("eval", config, "data_sets.0.duplicates=drop", check=False)
    assert refused.returncode == 2 and "colours: duplicates means nothing where nothing is trained" in refused.stderr
    refused = run_cli("eval", config, "--processes", 2, check=False)
    assert refused.returncode == 2 and "kind zero_shot runs in one process" in refused.stderr


def test_a_picture_that_cannot_be_decoded_makes_its_cell_incomplete_until_the_data_is_whole(models, colors, tmp_path):
    data = shutil.copytree(colors, tmp_path / "colours")
    broken = min((data / "test").rglob("*.png"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    config = tmp_path / "zero.yaml"
    config.write_text(f"kind: zero_shot\nout: {tmp_path}/out\nprecision: fp32\nmodels: [{{name: clip, path: {models['clip']}}}]\ndata_sets: [{{path: {data}}}]\n")
    for content, status, num_errors, said in ((whole[:60], 1, 1, "0 finished before"), (whole[:60], 1, 1, "1 finished before"), (whole, 0, 0, "0 finished before")):
        broken.write_bytes(content)
        done = run_cli("eval", config, check=False)
        (row,) = map(json.loads, (tmp_path / "out" / "ledger.jsonl").read_text().splitlines())
        assert done.returncode == status and row["num_errors"] == num_errors and said in done.stdout + done.stderr
        assert ("incomplete: clip / colours: 1 pictures cannot be decoded" in done.stdout + done.stderr) == bool(status)
