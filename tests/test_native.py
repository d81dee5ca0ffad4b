"""Native-resolution mini-batches: the paper's distribution of sizes, places by arithmetic, patches in the embedding's order."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from statistics import NormalDist

import pytest
import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.data.native import STRATA, NativePairs, NativeSchedule, collate_native, fit_grid, native_patches, patch_budgets, patchify


def test_budgets_follow_the_truncated_normal():
    exponents = [math.log2(a) for a in patch_budgets()]
    assert len(exponents) == STRATA and 2**7 <= patch_budgets()[0] and patch_budgets()[-1] <= 2**12
    # Mean and standard deviation of 9.5 + 2.5 z, z ~ N(0, 1) on [-1, 1]: variance 1 - 2 pdf(1) / (cdf(1) - cdf(-1)).
    normal = NormalDist()
    deviation = 2.5 * math.sqrt(1 - 2 * normal.pdf(1) / (normal.cdf(1) - normal.cdf(-1)))
    mean = sum(exponents) / STRATA
    assert mean == pytest.approx(9.5, abs=0.01)
    assert math.sqrt(sum((e - mean) ** 2 for e in exponents) / STRATA) == pytest.approx(deviation, rel=0.01)


def test_a_block_uses_every_stratum_once_in_an_order_of_its_own():
    schedule = NativeSchedule(3, capacity=8192)
    orders = [[schedule.stratum(b * STRATA + s) for s in range(STRATA)] for b in range(4)]
    assert all(sorted(order) == list(range(STRATA)) for order in orders) and len({tuple(o) for o in orders}) == 4
    assert orders != [[NativeSchedule(4, 8192).stratum(b * STRATA + s) for s in range(STRATA)] for b in range(4)]


def test_positions_follow_each_other_without_gaps_and_are_found_again():
    schedule = NativeSchedule(7, capacity=8192)
    expected = 0
    for minibatch in range(3 * STRATA):
        positions, budget = schedule.locate(minibatch)
        assert positions.start == expected and len(positions) == 8192 // budget >= 1
        assert schedule.minibatch_of(positions[0]) == schedule.minibatch_of(positions[-1]) == minibatch
        expected = positions.stop
    assert expected == 3 * schedule.samples_per_block
    far = 10**12 * STRATA + 17  # found without going through what lies before
    assert schedule.minibatch_of(schedule.locate(far)[0].start) == far


def test_worlds_divide_a_step_and_read_the_same_samples():
    schedule = NativeSchedule(0, capacity=4096)
    whole = list(schedule.numbers(5, 8))
    assert whole == list(range(40, 48))
    for world in (1, 2, 4, 8):
        assert [m for rank in range(world) for m in schedule.numbers(5, 8, rank, world)] == whole
    with pytest.raises(UserError, match="8 a step are not a multiple of 3"):
        schedule.numbers(0, 8, 0, 3)


def test_small_models_limit_the_patches_and_impossible_sizes_are_refused():
    small = NativeSchedule(0, capacity=512, center=5.0, spread=1.0)
    assert 16 <= small.budgets[0] < 18 and 60 < small.budgets[-1] <= 64 and sorted(small.budgets) == small.budgets
    limited = NativeSchedule(0, capacity=256, patch_limit=64)
    assert set(limited.budgets) == {64} and limited.sizes == [4] * STRATA
    with pytest.raises(UserError, match="capacity: 1024 patches do not hold one picture of 3944"):
        NativeSchedule(0, capacity=1024)
    with pytest.raises(UserError, match="patch_limit: 1 leaves"):
        NativeSchedule(0, capacity=8192, patch_limit=1)


@pytest.mark.parametrize("size", [(480, 640), (333, 500), (1, 5000), (5000, 1), (224, 224), (99, 1000)])
@pytest.mark.parametrize("budget", [2, 16, 132, 576, 3944])
def test_grids_fill_the_budget_and_keep_the_aspect(size, budget):
    rows, columns = fit_grid(*size, budget)
    assert 1 <= rows * columns <= budget
    if budget >= 132 and max(size) / min(size) < 11:
        assert rows * columns >= 0.85 * budget
        assert abs(math.log((rows / columns) / (size[0] / size[1]))) < 0.1 + 0.5 / min(rows, columns)  # sides are whole patches


def test_squares_stay_squares_at_every_budget():
    """r x r with patches left over and r x (r + 1) cost the same, so rounding would choose between them."""
    assert all(fit_grid(side, side, budget) == (math.isqrt(budget),) * 2 for side in (1, 56, 112, 333) for budget in range(2, 4000))


def test_patches_are_those_of_the_stock_embedding(tmp_path):
    """Patch by patch through the embedding's weights = the convolution of the stock model."""
    from aimv2_vlm.models.encoder import build_encoder

    encoder = build_encoder(image_size=56, patch_size=14, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
    convolution = encoder.embeddings.patch_embed
    picture = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    stock_ND = convolution(picture[None].float()).flatten(2).transpose(1, 2)[0]
    ours_ND = patchify(picture, 14).float() @ convolution.weight.flatten(1).T + convolution.bias
    assert torch.allclose(stock_ND, ours_ND, rtol=1e-5, atol=1e-3)


def test_collated_rows_carry_grids_positions_and_zeros_behind():
    pictures = [torch.randint(1, 256, (3, 60, 200), dtype=torch.uint8), torch.randint(1, 256, (3, 150, 100), dtype=torch.uint8)]
    made = [native_patches(picture, 40, 14) for picture in pictures]
    batch = collate_native([patches for patches, _ in made], [grid for _, grid in made], 40)
    assert batch["patches"].shape == (2, 40, 588) and batch["patches"].dtype == torch.uint8
    for row, (patches, (rows, columns)) in enumerate(made):
        real = int(batch["num_real"][row])
        assert real == rows * columns == len(patches) and batch["grids"][row].tolist() == [rows, columns]
        assert torch.equal(batch["patches"][row, :real], patches) and not batch["patches"][row, real:].any()
        places = [tuple(p) for p in batch["positions"][row, :real].tolist()]
        assert places == [(r, c) for r in range(rows) for c in range(columns)] and max(Counter(places).values()) == 1


def test_minibatches_hold_the_samples_of_their_positions_and_name_bad_ones(scenes_root, tmp_path):
    from aimv2_vlm.config import ImageInput, PairSource
    from aimv2_vlm.data.captions import CaptionTokenizer, train_tokenizer
    from aimv2_vlm.data.pairs import PairDataset

    shards = tmp_path / "shards"
    shutil.copytree(scenes_root / "shards", shards)
    sources = [PairSource(path=str(shards / "*.tar"), name="scenes")]
    image = ImageInput(size=28, flip=0.0)
    train_tokenizer(PairDataset(sources, 0, image, None, 4).texts(), tmp_path / "t.model", 300)
    data = PairDataset(sources, 5, image, CaptionTokenizer(tmp_path / "t.model", 32), 4)
    pairs = NativePairs(data, capacity=64, patch_size=14, patch_limit=16)
    seen = []
    for number in range(6):
        batch = pairs.minibatch(number)
        positions, _ = pairs.schedule.locate(number)
        assert batch["keys"] == [data.fetch(p)["key"] for p in positions] and not batch["bad"]
        assert [ids[:n].tolist() for ids, n in zip(batch["input_ids"], batch["text_lengths"], strict=True)] == [
            data.fetch(p)["input_ids"][: data.fetch(p)["text_length"]].tolist() for p in positions]
        assert ((batch["prefix_lengths"] >= 1) & (batch["prefix_lengths"] < batch["num_real"])).all()
        assert batch["patches"].shape == (4, 16, 588) and (batch["num_real"] == 16).all()  # square pictures: 4 x 4
        seen += batch["keys"]
    assert len(set(seen)) == len(seen)

    # A picture damaged after indexing: its row stays, with weight 0 and a name.
    place = data.order.locate(pairs.schedule.locate(0)[0][1])
    path = data.shards[place.source].paths[place.shard]
    content = bytearray(path.read_bytes())
    at = content.index(data.shards[place.source].read(place.shard, place.sample).image_bytes)
    content[at + 200] ^= 255
    path.write_bytes(content)
    data.shards[place.source]._reset()  # forget open files and what was read
    batch = pairs.minibatch(0)
    assert batch["weights"].tolist() == [1, 0, 1, 1] and len(batch["bad"]) == 1 and seen[1] in batch["bad"][0]
    assert batch["text_lengths"][1] == 0 and not batch["patches"][1].any()
