"""Token counts and pixels of every grid are the stock processor's and the stock model's."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoImageProcessor,
    Cohere2VisionProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from aimv2_vlm.config import UserError
from aimv2_vlm.data.chat import build_processor, train_chat_tokenizer
from aimv2_vlm.data.tiling import Tiling, cut_views, image_processor, picture_views, prepare_picture
from aimv2_vlm.data.transforms import normalize
from aimv2_vlm.models.assistant import AssistantForTraining, build_assistant, set_trainable

MEAN, STD = [0.48, 0.45, 0.41], [0.27, 0.26, 0.28]
GRIDS = [(1, 1), (2, 2), (3, 3), (1, 2), (3, 2)]
ROUNDING = 5e-7  # of normalised pixels, which are at most 3
SPELLINGS = ["1x1", "2x2", "3x3", "1x3", "2x2+1x2+2x1", "1x2+2x1+2x2+3x1+1x3"]
UNSHUFFLED = ["1x1/2", "2x2/2", "3x3/4"]  # behind the stroke: patches a side that become one token
sides = st.one_of(st.integers(1, 4000), st.integers(1, 60), st.sampled_from([335, 336, 337, 672, 750, 1008]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_chat_tokenizer(["a word"], tmp_path_factory.mktemp("tokenizer"), 300)


def parse(spelling, **sizes):
    grid, _, unshuffle = spelling.partition("/")
    return Tiling.parse(grid, unshuffle=int(unshuffle or 1), **sizes)


@cache
def stock_processor(tiling, tokenizer):
    if tiling.unshuffle > 1:
        return build_processor(tokenizer, image_processor(tiling, MEAN, STD), tiling.patch_size, "", "<|image|>")
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


@pytest.mark.parametrize("tile_size,pad_square", [(336, False), (336, True), (70, False)])
@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_2000_token_counts_and_choices_are_the_stock_processors(tokenizer, spelling, tile_size, pad_square):
    """Where stock keeps no token of the tiles, the picture is refused; an odd number of patches always keeps one."""
    tiling = Tiling.parse(spelling, tile_size=tile_size, pad_square=pad_square)
    stock = stock_processor(tiling, tokenizer)
    sizes = np.exp(np.random.default_rng(tile_size).uniform(0, np.log(4000), (2000, 2))).round().astype(int).tolist()
    refused = 0
    for height, width in [*sizes, (750, 504), (1, 4000), (4000, 1)]:
        size = tiling.processed_size(height, width)
        best = select_best_resolution(size, tiling.pinpoints)
        if not tiling.shows_something(height, width):
            refused += 1
            patches = (tile_size // 14,) * 2
            assert stock._get_unpadded_features(*size, *patches, *_grid(best, tile_size))[0] == 0
            continue
        assert tiling.num_image_tokens(height, width) == stock._get_number_of_features(*size, tile_size, tile_size)
        assert tiling.num_image_tokens(height, width) <= tiling.max_image_tokens
        assert tiling.at(height, width).grid == _grid(best, tile_size)
        assert len(tiling.views(height, width)) == tiling.at(height, width).num_views <= tiling.num_views
    may_vanish = not pad_square and (tile_size == 336 or "2" in spelling)
    assert (refused > 0) == may_vanish


@pytest.mark.parametrize("tile_size,pad_square", [(336, False), (336, True), (56, False)])
@pytest.mark.parametrize("spelling", UNSHUFFLED)
def test_2000_unshuffled_token_counts_are_the_stock_processors(tokenizer, spelling, tile_size, pad_square):
    tiling = parse(spelling, tile_size=tile_size, pad_square=pad_square)
    stock = stock_processor(tiling, tokenizer).image_processor
    sizes = np.exp(np.random.default_rng(tile_size).uniform(0, np.log(4000), (2000, 2))).round().astype(int).tolist()
    grids = set()
    for height, width in [*sizes, (750, 504), (1, 4000), (4000, 1)]:
        num_views = stock.get_number_of_image_patches(*tiling.processed_size(height, width))
        chosen = tiling.at(height, width)
        grids.add(chosen.grid)
        assert tiling.num_image_tokens(height, width) == num_views * stock.patch_size**2 <= tiling.max_image_tokens
        assert len(tiling.views(height, width)) == chosen.num_views == num_views <= tiling.num_views
        assert chosen.at(height, width) == chosen and tiling.shows_something(height, width)
    most = max(int(spelling[0]), 1)
    assert grids == {(r, c) for r in range(1, most**2 + 1) for c in range(1, most**2 + 1) if r * c <= most**2 and (r == c or not pad_square)}


def test_an_unshuffled_picture_is_nothing_but_its_image_tokens_for_the_stock_processor(tokenizer, tmp_path):
    """The stock class would write marks around a picture and its tiles; ours has none, also when opened without this package."""
    stock_processor(parse("2x2/2", tile_size=56), tokenizer).save_pretrained(tmp_path)
    opened = Cohere2VisionProcessor.from_pretrained(tmp_path)
    pixels = picture(112, 112)
    ids = opened(images=[pixels], text="<|image|>a word", return_tensors="pt")["input_ids"][0].tolist()
    assert ids == [opened.image_token_id] * 20 + opened.tokenizer("a word")["input_ids"]


@pytest.mark.parametrize(("grid", "unshuffle", "message"), [
    ("2x3", 2, "write 1x1, 2x2, 3x3"), ("2x2+1x2", 2, "write 1x1, 2x2, 3x3"), ("2x2", 5, "5 does not divide the 24 patches"), ("1x1", 0, "0 does not divide"),
])  # fmt: skip
def test_what_cannot_be_unshuffled_is_refused(grid, unshuffle, message):
    with pytest.raises(UserError, match=f"^tiling.unshuffle: .*{message}"):
        Tiling.parse(grid, tile_size=336, unshuffle=unshuffle)


def test_an_unshuffled_picture_is_reduced_as_one_view_only():
    """The stock class would give the reduced picture fewer tiles, so it would be no control for new pixels."""
    with pytest.raises(UserError, match="^tiling.source_size: 336 would leave pictures fewer tiles"):
        Tiling.parse("2x2", tile_size=336, unshuffle=2, source_size=336)
    assert Tiling.parse("1x1", tile_size=336, unshuffle=2, source_size=112).num_image_tokens(900, 500) == 144


def _grid(resolution, tile_size):
    return resolution[0] // tile_size, resolution[1] // tile_size


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
        assert (views - (expected["pixel_values"] if tiling.single else expected["pixel_values"][0])).abs().max() <= ROUNDING
        assert tiling.single or expected["image_sizes"].tolist() == [list(size)]
        assert size == tiling.processed_size(height, width)


def painted(kind, height, width, seed):
    pixels = picture(height, width, seed)
    if kind == "grey":
        return pixels[:1].repeat(3, 1, 1)
    if kind == "black and white":  # bicubic overshoots at every edge
        return (pixels > 127).to(torch.uint8) * 255
    return pixels.contiguous() if kind == "planes" else pixels


def padded_by_hand(pixels):
    height, width = pixels.shape[-2:]
    side, ground = max(height, width), tuple(int(255 * mean) for mean in MEAN)
    square = Image.new("RGB", (side, side), ground)
    square.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def assert_pixels_are_the_stock_processors(pixels, tiling):
    stock = image_processor(tiling, MEAN, STD)
    shown = padded_by_hand(pixels) if tiling.pad_square and (not tiling.single or tiling.unshuffle > 1) else pixels
    expected = stock(shown.contiguous(), return_tensors="pt", input_data_format="channels_first")
    expected_pixels = expected["pixel_values"][0] if "image_sizes" in expected else expected["pixel_values"]
    views, size = picture_views(pixels, tiling, stock)
    assert views.shape == expected_pixels.shape and (views - expected_pixels).abs().max() <= ROUNDING
    assert "image_sizes" not in expected or expected["image_sizes"].tolist() == [list(size)]
    raw, raw_size = cut_views(pixels, tiling, MEAN)
    assert raw.dtype == torch.uint8 and raw_size == size
    assert (normalize(raw, MEAN, STD) - expected_pixels).abs().max() <= 1e-6


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 260),
    st.integers(1, 260),
    st.sampled_from(SPELLINGS + UNSHUFFLED),
    st.booleans(),
    st.sampled_from(["noise", "planes", "grey", "black and white"]),
    st.integers(0, 9),
)
def test_every_pixel_is_the_stock_processors(height, width, spelling, pad_square, kind, seed):
    tiling = parse(spelling, tile_size=56, pad_square=pad_square)
    if tiling.shows_something(height, width):
        assert_pixels_are_the_stock_processors(painted(kind, height, width, seed), tiling)


@pytest.mark.parametrize("spelling", ["1x1", "3x3", "2x2+1x3+3x1", "3x3/2"])
@pytest.mark.parametrize("height,width", [(90, 4000), (1500, 40), (750, 1100), (1008, 1008)])
def test_every_pixel_of_large_and_thin_pictures_is_the_stock_processors(spelling, height, width):
    assert_pixels_are_the_stock_processors(
        painted("noise", height, width, 0), parse(spelling, tile_size=336, pad_square=False)
    )


def test_a_processor_with_other_settings_is_asked_itself():
    tiling = Tiling((2, 2), 56, 14, pad_square=False)
    stock = image_processor(tiling, MEAN, STD)
    stock.do_normalize = False
    pixels = picture(100, 120)
    expected = stock(pixels, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]
    views, _ = picture_views(pixels, tiling, stock)
    assert torch.equal(views, expected) and views.max() > 0.9


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


@pytest.mark.parametrize("spelling", ["1x1", "2x2", "3x3", "1x2", "3x2", "3x3/2"])
@pytest.mark.parametrize("pad_square", [True, False])
@pytest.mark.parametrize("height,width", [(160, 160), (120, 200), (200, 110)])
def test_boxes_tell_which_view_shows_a_spot(spelling, pad_square, height, width):
    tiling = parse(spelling, tile_size=56, pad_square=pad_square)
    stock = image_processor(tiling, [0.0] * 3, [1.0] * 3)
    boxes = tiling.views(height, width)
    assert len(boxes) == tiling.at(height, width).num_views
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
    several = Tiling((2, 2), 56, 14, False, others=((1, 2), (2, 1)))
    unshuffled = [Tiling((2, 2), 56, 14, True, unshuffle=2), Tiling((1, 1), 56, 14, False, unshuffle=4)]
    for number, tiling in enumerate(
        [Tiling((2, 2), 56, 14, True), Tiling((2, 1), 56, 14, False), Tiling((1, 1), 56, 14, True), several, *unshuffled]
    ):
        stock_processor(tiling, tokenizer).save_pretrained(tmp_path / str(number))
        kind = Cohere2VisionProcessor if tiling.unshuffle > 1 else LlavaProcessor if tiling.single else LlavaNextProcessor
        assert Tiling.from_processor(kind.from_pretrained(tmp_path / str(number))) == tiling
        assert type(AutoImageProcessor.from_pretrained(tmp_path / str(number))) is type(
            image_processor(tiling, MEAN, STD)
        )


def test_pictures_whose_tiles_vanish_are_known():
    assert not Tiling((2, 2), pad_square=False).shows_something(4000, 40)
    assert Tiling((2, 2), pad_square=True).shows_something(4000, 40)
    assert Tiling((2, 2), pad_square=False).shows_something(4000, 400)


@pytest.mark.parametrize(
    "text", ["", "2", "2x", "x2", "2x2x2", "0x2", "2x0", "-1x2", "a", "2x2+", "2x2,1x2", "2x2+2x2", "1x1+2x2"]
)
def test_a_grid_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match="tiling"):
        Tiling.parse(text, tile_size=336)


def test_a_tile_holds_whole_patches_and_at_least_one():
    with pytest.raises(UserError, match="holds no patch"):
        Tiling((1, 1), 10, 14)
    assert Tiling((1, 1), 384, 14).num_image_tokens(500, 300) == 27 * 27  # SigLIP So400M: a strip of 6 pixels is left over


@pytest.fixture(scope="module")
def assistants(tokenizer):
    """Makes a small assistant of random weights for a tiling."""
    llm = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    vision = dict(image_size=28, patch_size=14, hidden_size=8, intermediate_size=8, num_hidden_layers=1)

    def make(spelling):
        torch.manual_seed(0)
        encoder = Aimv2VisionModel(Aimv2VisionConfig(num_attention_heads=1, use_head=False, **vision))
        return build_assistant(
            encoder, None, spelling, tokenizer=tokenizer, llm_config=llm, image_mean=MEAN, image_std=STD,
            pad_square=False,
        )  # fmt: skip

    return make


def test_a_frozen_encoder_sees_a_bounded_number_of_views_at_once(assistants):
    """Nine tiles and an overview pass in the memory of four views, and the features stay the same."""
    model, _ = assistants("3x3")
    set_trainable(model, ["connector", "llm"])
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    tiling = Tiling((3, 3), 28, 14, pad_square=False)
    views, size = picture_views(picture(60, 90), tiling, image_processor(tiling, MEAN, STD))
    image_tokens = [model.config.image_token_id] * tiling.num_image_tokens(60, 90)
    ids = torch.tensor([[1, *image_tokens, 2, 3]])
    arguments = dict(
        input_ids=ids, labels=ids.where(ids < 4, -100), position_ids=torch.arange(ids.shape[1])[None],
        row_lengths=[ids.shape[1]], pixel_values=views, image_sizes=[list(size)], views_per_image=[len(views)],
    )  # fmt: skip
    whole = AssistantForTraining(model)(**arguments)["text_sum"]
    parts = AssistantForTraining(model, views_at_once=4)(**arguments)["text_sum"]
    assert seen == [10, 4, 4, 2] and torch.allclose(whole, parts, rtol=1e-5)


def test_each_picture_takes_its_own_resolution_in_the_stock_model(assistants):
    """Views, sizes and token counts of mixed pictures go through the stock class as they are."""
    model, processor = assistants("2x2+1x2+3x1")
    tiling = Tiling.from_processor(processor)
    sizes = [(28, 56), (90, 30), (80, 80)]
    prepared = [picture_views(picture(*size), tiling, processor.image_processor) for size in sizes]
    assert [len(views) for views, _ in prepared] == [3, 4, 5]
    stock = processor.image_processor([picture(*size) for size in sizes], return_tensors="pt")
    with torch.no_grad():
        expected = model.model.get_image_features(stock["pixel_values"], image_sizes=stock["image_sizes"]).pooler_output
        ours = model.model.pack_image_features(
            model.model.multi_modal_projector(
                model.model.vision_tower(torch.cat([views for views, _ in prepared])).last_hidden_state
            ).split([len(views) for views, _ in prepared]),
            [list(size) for _, size in prepared], "full", model.model.image_newline,
        )[0]  # fmt: skip
    for one, other, size in zip(ours, expected, sizes, strict=True):
        assert len(one) == tiling.num_image_tokens(*size) and torch.allclose(one, other, atol=1e-5)
