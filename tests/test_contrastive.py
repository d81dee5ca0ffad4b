"""Two towers: the loss by its definition, over one process and two; LiT; what is written is the stock model; the tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_PRETRAINING, run_cli, run_two_processes
from objective_cases import CASES, CONTEXT, EOS, VOCAB, cut, gradients_of
from safetensors.torch import load_file, save_file

from aimv2_vlm.config import Optimizer, PretrainRecipe, TextTower, UserError
from aimv2_vlm.data.captions import ClipTokenizer, train_clip_tokenizer
from aimv2_vlm.models.contrastive import TwoTowerForPreTraining, TwoTowerOutput, contrastive_sum, make_text_causal
from aimv2_vlm.models.encoder import encode, load_encoder
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.loop import add_counts, run_step
from aimv2_vlm.train.optim import build_optimizer, parameter_groups
from aimv2_vlm.train.run import validate_pairs

TINY_TWO_TOWERS = [*TINY_PRETRAINING, "optim.micro_batch_size=8", "text.vocab_size=600", "data.validation_samples=8",
                   "objective.text_tower={hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2, projection_size: 16}"]


def outputs(rows: int, scale: float = 14.0) -> tuple[TwoTowerOutput, torch.Tensor]:
    """Unit vectors of pictures and texts, with distinct captions."""
    generator = torch.Generator().manual_seed(rows)
    vectors = [F.normalize(torch.randn(rows, 6, generator=generator), dim=-1).requires_grad_() for _ in range(2)]
    return TwoTowerOutput(*vectors, torch.tensor(scale, requires_grad=True)), torch.arange(rows)[:, None].expand(rows, 3)


# ---------------------------------------------------------------------------------------------------------------- the loss


def test_with_distinct_captions_the_loss_is_clips():
    out, ids = outputs(7)
    logits = out.scale * out.image_BE @ out.text_BE.T
    clip = (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2
    torch.testing.assert_close(contrastive_sum(out, ids, torch.ones(7)) / 7, clip)


def test_rows_with_one_caption_are_all_right_for_each_others_picture():
    out, ids = outputs(6)
    ids = ids.clone()
    ids[4] = ids[1]
    logits = out.scale * out.image_BE @ out.text_BE.T
    target = torch.eye(6)
    target[1, 4] = target[4, 1] = target[1, 1] = target[4, 4] = 0.5
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_sum(out, ids, torch.ones(6)) / 6, expected)
    swapped = TwoTowerOutput(out.image_BE, out.text_BE[[0, 4, 2, 3, 1, 5]], out.scale)
    torch.testing.assert_close(contrastive_sum(swapped, ids, torch.ones(6)) / 6, expected)  # which of the two is whose, nobody can tell


def test_rows_of_weight_0_are_nobodys_negatives():
    out, ids = outputs(6)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1])
    good = weights > 0
    found = contrastive_sum(out, ids, weights)
    kept = TwoTowerOutput(out.image_BE[good], out.text_BE[good], out.scale)
    torch.testing.assert_close(found, contrastive_sum(kept, ids[good], torch.ones(4)))
    gradients = torch.autograd.grad(found, [out.image_BE, out.text_BE])
    assert all(not g[~good].any() and g[good].any(1).all() for g in gradients)
    assert float(contrastive_sum(out, ids, torch.zeros(6)).detach()) == 0


def test_the_temperature_starts_at_clips_and_stops_at_100():
    model = CASES["clip"].model(spread=0.0)
    batch = CASES["clip"].batch(3)
    pixels = CASES["clip"].objective().normalize(batch["pixels"])
    assert float(model(pixels, batch["input_ids"]).scale.detach()) == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        model.towers.logit_scale.fill_(20.0)
    scale = model(pixels, batch["input_ids"]).scale
    assert float(scale.detach()) == pytest.approx(100.0, rel=1e-5)
    # beyond the bound a gradient passes that leads back, and none that leads on
    for sign, passed in ((1, 100.0), (-1, 0.0)):
        (gradient,) = torch.autograd.grad(sign * scale, model.towers.logit_scale, retain_graph=True)
        assert float(gradient) == pytest.approx(passed, rel=1e-5)


def test_what_stands_behind_the_end_token_is_not_read():
    case = CASES["clip"]
    model, batch = case.model(), case.batch(3)
    pixels, ids = case.objective().normalize(batch["pixels"]), batch["input_ids"].clone()
    row = int(((batch["text_lengths"] > 0) & (batch["text_lengths"] < CONTEXT)).nonzero()[0])
    with torch.no_grad():
        before = model(pixels, ids).text_BE
        ids[row, int(batch["text_lengths"][row]) :] = 7
        assert torch.equal(model(pixels, ids).text_BE, before)
        ids[row, 0] = (ids[row, 0] + 1) % VOCAB
        assert not torch.equal(model(pixels, ids).text_BE, before)


# ----------------------------------------------------------------------------------------------------------- two processes


def global_batch() -> dict:
    """Eight rows: one bad, two with the same caption that land in different processes."""
    batch = CASES["clip"].batch(3, rows=8)
    batch["input_ids"][6], batch["text_lengths"][6] = batch["input_ids"][0], batch["text_lengths"][0]
    batch["weights"][[0, 6]] = 1
    assert int(batch["weights"].sum()) == 7
    return batch


class HeldOut:
    """Seven held-out rows, which two processes cannot share evenly."""

    num_samples = 7

    def validation(self, positions: list[int]) -> dict:
        batch = global_batch()
        return {name: rows[list(positions)] if isinstance(rows, torch.Tensor) else rows for name, rows in batch.items()}


def one_step(strategy: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss of the global batch, held-out loss, gradients): after one unclipped step AdamW's first moment is 0.1 of the gradient."""
    case, placement = CASES["clip"], Placement(strategy, "fp32")
    optim, objective = Optimizer(lr=1e-3), case.objective()
    model, optimizer = placement.place(case.model(), lambda m: build_optimizer(
        parameter_groups(m.named_parameters(), dict.fromkeys(dict(m.named_parameters()), "weight"), optim, {}), optim))
    share = 8 // placement.world
    batches = [cut(global_batch(), [share] * placement.world)[placement.rank]]
    counts = placement.sum_counts(add_counts(objective, batches))
    sums, _ = run_step(objective, model, optimizer, batches, counts, placement, clip=0.0)
    loss = placement.sum_tensor(sums["contrastive"]) / counts["contrastive"]
    moments = {name: optimizer.state[p]["exp_avg"] * 10 for name, p in placement.unwrap(model).named_parameters()}
    recipe = PretrainRecipe()
    recipe.data.validation_samples, recipe.optim.micro_batch_size = 100, 4 // placement.world  # two batches, the last of three rows in all
    held_out = validate_pairs(objective, model, HeldOut(), recipe, placement)["val_loss"]
    return float(loss), held_out, moments


def test_two_processes_compute_what_one_does(tmp_path):
    """The summed loss and the averaged gradients, with a pair of equal captions and a bad row across the cut."""
    out = tmp_path / "out"
    out.mkdir()
    codes, said = run_two_processes([sys.executable, __file__, str(out)], tmp_path)
    assert codes == [0, 0], [text[-3000:] for text in said]
    loss, held_out, gradients = one_step("single")
    for rank in range(2):
        said = json.loads((out / f"{rank}.json").read_text())
        assert said["loss"] == pytest.approx(loss, rel=1e-6) and said["held_out"] == pytest.approx(held_out, rel=1e-6)
        found = load_file(out / f"{rank}.safetensors")
        assert found.keys() == gradients.keys()
        for name, wanted in gradients.items():
            assert float((found[name] - wanted).norm()) <= 3e-6 * float(wanted.norm()), name


def work(out: Path) -> None:
    """What each of the two processes does."""
    loss, held_out, gradients = one_step("ddp")
    rank = torch.distributed.get_rank()
    (out / f"{rank}.json").write_text(json.dumps({"loss": loss, "held_out": held_out}))
    save_file({name: g.contiguous() for name, g in gradients.items()}, out / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------- runs, and what they write


@pytest.fixture(scope="module")
def lit(scenes_root, tiny_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lit") / "run"
    run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={out}", "optim.steps=3", *TINY_TWO_TOWERS, "objective.name=lit", f"encoder.path={tiny_encoder}")
    return out


def test_lit_leaves_the_encoder_bit_for_bit_and_trains_the_rest(lit, tiny_encoder):
    trained, before = load_file(lit / "final" / "model.safetensors"), load_file(tiny_encoder / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(trained[f"vision_model.{name}"], tensor), name
    rest = {name for name in trained if name.removeprefix("vision_model.") not in before}
    assert {name.split(".")[0] for name in rest} == {"vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"}
    case = CASES["lit"]
    model = case.model()
    frozen = TwoTowerForPreTraining(load_encoder(tiny_encoder), case.recipe().objective.text_tower, vocab_size=VOCAB, context_length=CONTEXT,
                                    eos_token_id=EOS, freeze_encoder=True)
    expected = {name for name, _ in model.named_parameters() if not name.startswith(case.frozen)}
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == expected
    case.objective().sums(model, case.batch(1), torch.device("cpu"))["contrastive"].backward()
    assert gradients_of(model).keys() == expected


def test_the_written_model_is_the_stock_one_and_embeds_alike(lit, scenes_root):
    """Plain transformers, texts padded to context + 1: equal; unpadded rows: equal once the text tower is made causal."""
    from transformers import AutoModel, AutoProcessor

    stock, info = AutoModel.from_pretrained(lit / "final", output_loading_info=True)
    assert type(stock).__name__ == "Aimv2Model" and not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(lit / "final")
    tokenizer, context = processor.tokenizer, stock.config.text_config.max_position_embeddings - 1
    assert tokenizer.model_max_length == context + 1

    tower = stock.config.text_config
    model = TwoTowerForPreTraining(load_encoder(lit / "final"), TextTower(tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers,
                                   tower.num_attention_heads, stock.config.projection_dim), vocab_size=tower.vocab_size,
                                   context_length=context, eos_token_id=tower.eos_token_id)
    model.towers.load_state_dict(load_file(lit / "final" / "model.safetensors"))
    own = ClipTokenizer(lit / "clip_tokenizer", context)
    captions = ["a red circle left of a blue square", "one", "word " * 200]
    rows = [own.encode(caption) for caption in captions]
    assert len(rows[2]) == context
    read = torch.tensor([ids + [own.pad_id] * (context - len(ids)) for ids in rows])
    pixels = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = model(pixels, read)
        padded = tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=context + 1, return_tensors="pt")
        assert padded["input_ids"].shape[1] == context + 1 and not padded["attention_mask"][:, -1].any()
        theirs = stock(pixel_values=pixels, **padded)
        torch.testing.assert_close(theirs.image_embeds, ours.image_BE, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.text_embeds, ours.text_BE, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.logits_per_image, ours.scale * ours.image_BE @ ours.text_BE.T, rtol=1e-5, atol=1e-4)

        unpadded = {"input_ids": torch.tensor([rows[0]]), "attention_mask": torch.ones(1, len(rows[0]), dtype=torch.int64)}
        # as the card says, from text: a long caption is cut where training cuts it
        card = (lit / "final" / "README.md").read_text(encoding="utf-8")
        names = {"processor": processor, "captions": captions}
        exec("\n".join(line for line in card.splitlines() if line.startswith(("tokenizer, length =", "texts ="))), names)
        torch.testing.assert_close(stock(pixel_values=pixels, **names["texts"]).text_embeds, ours.text_BE, rtol=1e-5, atol=1e-5)

        causal = make_text_causal(stock)(pixel_values=pixels[:1], **unpadded).text_embeds
        torch.testing.assert_close(causal, ours.text_BE[:1], rtol=1e-5, atol=1e-5)
        bare = stock(pixel_values=pixels[:1], input_ids=unpadded["input_ids"]).text_embeds
        torch.testing.assert_close(bare, ours.text_BE[:1], rtol=1e-5, atol=1e-5)
    # The tokenizer that was written is the run's.
    assert tokenizer(captions[0])["input_ids"] == rows[0]

    encoder = load_encoder(lit / "final")
    with torch.no_grad():
        torch.testing.assert_close(encode(encoder, pixels), stock.vision_model(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_tower_is_not_tuned_on_to_another_encoder(scenes_root, tiny_encoder, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, encoder)
    command = ["pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={tmp_path / 'run'}", "optim.steps=3", *TINY_TWO_TOWERS, "objective.name=lit", f"encoder.path={encoder}"]
    run_cli(*command, "train.stop_after=1")
    tensors = load_file(encoder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, encoder / "model.safetensors", metadata={"format": "pt"})
    done = run_cli(*command, check=False)
    assert done.returncode == 2 and "encoder.path: its weights are not those that this run began with" in done.stderr and "Traceback" not in done.stderr
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    run_cli(*command)


def test_clip_trains_the_encoder_too(scenes_root, tmp_path):
    run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={tmp_path / 'run'}", "optim.steps=3", *TINY_TWO_TOWERS, "objective.name=clip")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert load_encoder(tmp_path / "run" / "final").config.hidden_size == 32


@pytest.mark.parametrize("name", ["clip", "lit"])
def test_accumulation_is_refused(name, scenes_root, tiny_encoder, tmp_path):
    done = run_cli("pretrain", "demo_scenes", f"data_root={scenes_root}", f"out={tmp_path / 'run'}", *TINY_TWO_TOWERS, f"objective.name={name}",
                   f"encoder.path={tiny_encoder}", "optim.micro_batch_size=4", check=False)
    assert done.returncode == 2 and "optim.micro_batch_size" in done.stderr and "cannot be accumulated" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_heads_that_do_not_divide_the_text_tower_are_refused():
    recipe = CASES["clip"].recipe()
    recipe.objective.text_tower.num_heads = 3
    with pytest.raises(UserError, match=r"objective.text_tower.num_heads: 3"):
        TwoTowerForPreTraining(CASES["captioning"].model().encoder, recipe.objective.text_tower, vocab_size=VOCAB, context_length=CONTEXT, eos_token_id=EOS)


# --------------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = ["a red circle", "two blue squares, left of it", "Ein grünes Dreieck &amp; a caf\u00e9", "a red square", "<|endoftext|> typed"] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip_tokenizer")
    train_clip_tokenizer(TEXTS, folder, vocab_size=560)
    return folder


def test_captions_begin_and_end_and_are_cut_in_the_middle(tokenizer):
    long, short = ClipTokenizer(tokenizer, context_length=77), ClipTokenizer(tokenizer, context_length=5)
    begin, end = long.stock.bos_token_id, long.eos_id
    ids, cut_off = long.encode_counted(TEXTS[1])
    assert not cut_off and ids[0] == begin and ids[-1] == end and {begin, end}.isdisjoint(ids[1:-1]) and max(ids) < long.vocab_size
    assert short.encode_counted(TEXTS[1]) == ([*ids[:4], end], True) and short.num_truncated == 1
    assert long.encode("  ") == [begin, end]
    assert long.encode("caf&eacute;") == long.encode("caf\u00e9") and long.encode("A  Red circle") == long.encode("a red circle")


def test_special_words_typed_in_captions_stay_text(tokenizer):
    own = ClipTokenizer(tokenizer)
    for word in ("<|endoftext|>", "<|startoftext|>"):
        ids = own.encode(f"a {word} b")
        assert ids.count(own.eos_id) == 1 and ids.count(own.stock.bos_token_id) == 1 and ids[-1] == own.eos_id
        assert own.stock.decode(ids[1:-1]).replace(" ", "") == f"a{word}b"


def test_the_same_texts_give_the_same_files_and_what_transformers_opens(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    contents = {path.name: path.read_bytes() for path in tokenizer.iterdir()}
    for attempt in range(10):  # hash tables come out in another order only now and then
        folder = tmp_path / str(attempt)
        assert train_clip_tokenizer(TEXTS, folder, vocab_size=560) == 560
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    stock = CLIPTokenizer.from_pretrained(str(tokenizer))
    for text in TEXTS[:4]:
        own = ClipTokenizer(tokenizer)
        assert stock(own.prepare(text))["input_ids"] == own.encode(text)


def test_no_tokenizer_and_no_texts_are_refused(tmp_path):
    with pytest.raises(UserError, match="text.tokenizer"):
        ClipTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="text.tokenizer"):
        ClipTokenizer(tmp_path)
    with pytest.raises(UserError, match="text.context_length"):
        ClipTokenizer(tmp_path, context_length=2)
    with pytest.raises(UserError, match="no caption"):
        train_clip_tokenizer(["", "  "], tmp_path)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
