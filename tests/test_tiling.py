"""Token counts and pixels of every grid are the stock processor's and the stock model's."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from aimv2_vlm.config import UserError
from aimv2_vlm.data.chat import train_chat_tokenizer
from aimv2_vlm.data.tiling import Tiling, image_processor, picture_views, prepare_picture

MEAN, STD = [0.48, 0.45, 0.41], [0.27, 0.26, 0.28]
GRIDS = [(1, 1), (2, 2), (3, 3), (1, 2), (3, 2)]
sides = st.one_of(st.integers(1, 4000), st.integers(1, 60), st.sampled_from([335, 336, 337, 672, 750, 1008]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_chat_tokenizer(["a word"], tmp_path_factory.mktemp("tokenizer"), 300)


@cache
def stock_processor(tiling, tokenizer):
    kind = LlavaProcessor if tiling.single else LlavaNextProcessor
    return kind(
        image_processor(tiling, MEAN, STD),
        tokenizer,
        patch_size=tiling.patch_size,
        vision_feature_select_strategy="full",
    )


@settings(max_examples=250, deadline=None)
@given(sides, sides, st.sampled_from(GRIDS), st.booleans(), st.sampled_from([(336, 14), (224, 14), (56, 14)]))
def test_token_count_is_the_stock_processors(tokenizer, height, width, grid, pad_square, sizes):
    tiling = Tiling(grid, *sizes, pad_square=pad_square)
    if tiling.shows_something(height, width):
        counted = stock_processor(tiling, tokenizer)._get_num_multimodal_tokens([tiling.processed_size(height, width)])
        assert tiling.num_image_tokens(height, width) == counted.num_image_tokens[0]


@pytest.fixture(scope="module")
def tiled_models():
    def model(grid, tile_size):
        vision = dict(
            model_type="aimv2_vision_model",
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=tile_size,
            patch_size=14,
            use_head=False,
        )
        text = dict(
            model_type="llama",
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=8,
        )
        pinpoints = [[grid[0] * tile_size, grid[1] * tile_size]]
        return LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=pinpoints)
        ).model

    return {(grid, size): model(grid, size) for grid in GRIDS[1:] for size in (56, 336)}


@settings(max_examples=120, deadline=None)
@given(sides, sides, st.sampled_from(GRIDS[1:]), st.booleans(), st.sampled_from([56, 336]))
def test_placeholders_are_the_models_features(tiled_models, height, width, grid, pad_square, tile_size):
    tiling = Tiling(grid, tile_size, 14, pad_square)
    model = tiled_models[grid, tile_size]
    features = torch.zeros(tiling.num_views, tiling.patches_per_view, 4)
    size = torch.tensor([tiling.processed_size(height, width)])
    packed, _ = model.pack_image_features([features], size, "full", image_newline=model.image_newline)
    assert len(packed[0]) == tiling.num_image_tokens(height, width)


def test_counts_that_the_paper_and_llava_next_give():
    assert Tiling((1, 1)).num_image_tokens(123, 999) == 576
    assert Tiling((2, 2)).num_image_tokens(700, 700) == 2928
    assert Tiling((3, 3)).num_image_tokens(700, 700) == 5832
    assert (
        Tiling((2, 2), pad_square=False).num_image_tokens(1280, 480)
        < Tiling((2, 2)).num_image_tokens(1280, 480)
        == 2928
    )


def picture(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(
        2, 0, 1
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("height,width", [(1, 1), (1, 9), (56, 56), (97, 97), (40, 133), (210, 90)])
def test_pixels_are_the_stock_processors(grid, height, width):
    """On any picture without pad_square and with one view; with tiles after padding by hand, as documented."""
    pixels = picture(height, width)
    by_hand = Image.new("RGB", (max(height, width),) * 2, tuple(int(255 * m) for m in MEAN))
    by_hand.paste(
        Image.fromarray(pixels.permute(1, 2, 0).numpy()),
        ((max(height, width) - width) // 2, (max(height, width) - height) // 2),
    )
    for pad_square in (False, True):
        tiling = Tiling(grid, 56, 14, pad_square)
        stock = image_processor(tiling, MEAN, STD)
        views, size = picture_views(pixels, tiling, stock)
        shown = by_hand if pad_square and not tiling.single else Image.fromarray(pixels.permute(1, 2, 0).numpy())
        expected = stock(shown, return_tensors="pt")
        assert views.shape == (tiling.num_views, 3, 56, 56)
        assert torch.equal(views, expected["pixel_values"] if tiling.single else expected["pixel_values"][0])
        assert tiling.single or expected["image_sizes"].tolist() == [list(size)]
        assert size == tiling.processed_size(height, width)


def test_square_pictures_need_no_padding_so_stock_users_see_the_training_pixels():
    pixels = picture(90, 90)
    for grid in GRIDS:
        padded, plain = (Tiling(grid, 56, 14, pad_square) for pad_square in (True, False))
        assert torch.equal(
            picture_views(pixels, padded, image_processor(padded, MEAN, STD))[0],
            picture_views(pixels, plain, image_processor(plain, MEAN, STD))[0],
        )


def test_nothing_is_cropped_away():
    """A mark in each corner of a long picture is seen by the single view."""
    pixels = torch.full((3, 60, 600), 255, dtype=torch.uint8)
    pixels[:, :, :60] = 0
    pixels[:, :, -60:] = 0
    views, _ = picture_views(
        pixels, Tiling((1, 1), 56, 14), image_processor(Tiling((1, 1), 56, 14), [0.0] * 3, [1.0] * 3)
    )
    row = views[0, 0, 28]
    assert row[1] < 0.2 and row[-2] < 0.2 and row[28] > 0.8


def test_source_size_changes_pixels_but_not_tokens():
    plain, upsampled = Tiling((2, 2), 56, 14), Tiling((2, 2), 56, 14, source_size=56)
    pixels = picture(300, 200)
    stock = image_processor(plain, MEAN, STD)
    assert plain.num_image_tokens(300, 200) == upsampled.num_image_tokens(300, 200)
    (sharp, _), (soft, size) = picture_views(pixels, plain, stock), picture_views(pixels, upsampled, stock)
    assert size == (56, 56) and soft[1:].std() < 0.8 * sharp[1:].std()


def test_source_size_cuts_the_tiles_from_the_single_views_picture():
    """The overview of the "upsampled" arm holds the very pixels of the 1x1 arm."""
    pixels = picture(300, 200)
    single, upsampled = Tiling((1, 1), 56, 14), Tiling((2, 2), 56, 14, source_size=56)
    one = picture_views(pixels, single, image_processor(single, MEAN, STD))[0]
    many = picture_views(pixels, upsampled, image_processor(upsampled, MEAN, STD))[0]
    assert torch.equal(one[0], many[0])


def test_source_size_never_enlarges():
    small = picture(20, 30)
    assert torch.equal(prepare_picture(small, Tiling((2, 2), 56, 14, pad_square=False, source_size=56), MEAN), small)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pad_square", [True, False])
@pytest.mark.parametrize("height,width", [(160, 160), (120, 200), (200, 110)])
def test_boxes_tell_which_view_shows_a_spot(grid, pad_square, height, width):
    tiling = Tiling(grid, 56, 14, pad_square)
    stock = image_processor(tiling, [0.0] * 3, [1.0] * 3)
    boxes = tiling.views(height, width)
    assert len(boxes) == tiling.num_views
    for y, x in [(20, 24), (height - 30, 25), (height // 3, width - 20), (height - 22, width - 24)]:
        pixels = torch.zeros(3, height, width, dtype=torch.uint8)
        pixels[:, y - 8 : y + 8, x - 8 : x + 8] = 255
        views, _ = picture_views(pixels, tiling, stock)
        for view, box in zip(views, boxes, strict=True):
            left, top, right, bottom = box.box
            covered = max(0, min(right, x + 8) - max(left, x - 8)) * max(0, min(bottom, y + 8) - max(top, y - 8))
            bright = float(view[0].clamp(0, 1).sum()) * (right - left) * (bottom - top) / 56**2
            assert abs(bright - covered) < 60, (box, covered, bright)


def test_a_saved_processor_tells_its_tiling(tokenizer, tmp_path):
    for number, tiling in enumerate(
        [Tiling((2, 2), 56, 14, True), Tiling((2, 1), 56, 14, False), Tiling((1, 1), 56, 14, True)]
    ):
        stock_processor(tiling, tokenizer).save_pretrained(tmp_path / str(number))
        kind = LlavaProcessor if tiling.single else LlavaNextProcessor
        assert Tiling.from_processor(kind.from_pretrained(tmp_path / str(number))) == tiling
        assert type(AutoImageProcessor.from_pretrained(tmp_path / str(number))) is type(
            image_processor(tiling, MEAN, STD)
        )


def test_pictures_whose_tiles_vanish_are_known():
    assert not Tiling((2, 2), pad_square=False).shows_something(4000, 40)
    assert Tiling((2, 2), pad_square=True).shows_something(4000, 40)
    assert Tiling((2, 2), pad_square=False).shows_something(4000, 400)


@pytest.mark.parametrize("text", ["", "2", "2x", "x2", "2x2x2", "0x2", "2x0", "-1x2", "a"])
def test_a_grid_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match="tiling"):
        Tiling.parse(text, tile_size=336)


def test_tiles_are_whole_patches():
    with pytest.raises(UserError, match="multiple"):
        Tiling((1, 1), 100, 14)
