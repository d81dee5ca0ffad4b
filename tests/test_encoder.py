"""Laws of the encoder and of the pre-training model: who sees whom, initialisation, sums that add up."""

import math
import re

import pytest
import torch

from aimv2_vlm.config import UserError
from aimv2_vlm.models.encoder import build_encoder, encode
from aimv2_vlm.models.masks import ATTENTION_IMPLEMENTATIONS, prefix_can_attend
from aimv2_vlm.models.pretraining import AIMv2ForPreTraining, patchify, scored_places

N, T, V, PATCH = 16, 6, 40, 14
SIZES = {"image_size": 56, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}

each_attention = pytest.mark.parametrize("attention", ATTENTION_IMPLEMENTATIONS)


def make_encoder(attention="sdpa", seed=0, **changes):
    return build_encoder(**SIZES | changes, attention=attention, generator=torch.Generator().manual_seed(seed))


def make_model(attention="sdpa", seed=0, num_layers=2):
    return AIMv2ForPreTraining(
        make_encoder(attention, seed, num_layers=num_layers),
        decoder_hidden_size=24,
        decoder_intermediate_size=40,
        decoder_num_layers=num_layers,
        decoder_num_heads=2,
        vocab_size=V,
        context_length=T + 1,
        attention=attention,
        generator=torch.Generator().manual_seed(seed + 1),
    )


def make_batch(size, seed=0):
    """pixels, token ids, text lengths (uneven), prefix lengths."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 56, 56, generator=generator),
        torch.randint(V, (size, T), generator=generator),
        torch.randint(1, T + 1, (size,), generator=generator),
        torch.randint(1, N, (size,), generator=generator),
    )


def change_each_patch(image_CHW):
    """N copies of a picture; copy i differs in patch i only."""
    pixels = image_CHW.repeat(N, 1, 1, 1)
    for i in range(N):
        row, column = divmod(i, 4)
        pixels[i, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1.0
    return pixels


def changed(values, reference):
    """bool (rows, places): where a row's vector differs from the reference row's."""
    return (values - reference).abs().amax(-1) > 1e-5


# Who sees whom


def test_prefix_mask_is_its_definition():
    lengths = torch.tensor([1, 5, 15])
    mask = prefix_can_attend(lengths, N)
    assert mask.shape == (3, 1, N, N) and mask.dtype == torch.bool
    for b, length in enumerate(lengths.tolist()):
        for q in range(N):
            for k in range(N):
                assert mask[b, 0, q, k].item() == (k < length or k <= q)


@each_attention
@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_encoder_is_causal_outside_the_prefix(attention, prefix):
    encoder = make_encoder(attention)
    image = make_batch(1)[0]
    with torch.no_grad():
        reference = encode(encoder, image, torch.tensor([prefix]))
        seen = changed(encode(encoder, change_each_patch(image[0]), torch.full((N,), prefix)), reference)
    for i in range(N):
        first_that_sees = i if i >= prefix else 0  # the prefix sees itself as a whole, later patches see all before
        assert not seen[i, :first_that_sees].any(), f"patch {i} leaked to an earlier one"
        assert seen[i, first_that_sees:].all(), f"patch {i} is not seen where it may be"


@each_attention
def test_encoder_without_prefix_is_bidirectional(attention):
    encoder = make_encoder(attention)
    image = make_batch(1)[0]
    with torch.no_grad():
        assert changed(encode(encoder, change_each_patch(image[0])), encode(encoder, image)).all()


@each_attention
def test_whole_model_is_causal(attention):
    model = make_model(attention)
    image, ids, _, _ = make_batch(1)
    prefix = 4

    def run(pixels, tokens):
        rows = len(pixels)
        with torch.no_grad():
            return model(pixels, tokens, torch.full((rows,), T), torch.full((rows,), prefix))

    reference = run(image, ids)
    by_patch = run(change_each_patch(image[0]), ids.repeat(N, 1))
    patches, text = (
        changed(by_patch.patch_predictions, reference.patch_predictions),
        changed(by_patch.text_logits, reference.text_logits),
    )
    for i in range(prefix, N):
        assert not patches[i, :i].any() and patches[i, i:].all()
    assert text.all()  # every text place sees every patch

    other_ids = ids.repeat(T, 1)
    for t in range(T):
        other_ids[t, t] = (other_ids[t, t] + 1) % V
    by_token = run(image.repeat(T, 1, 1, 1), other_ids)
    assert torch.equal(
        changed(by_token.text_logits, reference.text_logits),  # token t enters at place t + 1
        torch.arange(T + 1) > torch.arange(T)[:, None],
    )
    assert not changed(by_token.patch_predictions, reference.patch_predictions).any()


def test_attention_implementations_agree():
    image, ids, text_lengths, prefix_lengths = make_batch(4)
    outputs = [make_model(name)(image, ids, text_lengths, prefix_lengths) for name in ATTENTION_IMPLEMENTATIONS]
    for out in outputs[1:]:
        torch.testing.assert_close(out.patch_predictions, outputs[0].patch_predictions, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.text_logits, outputs[0].text_logits, atol=1e-5, rtol=1e-5)


def test_eager_layers_never_get_a_boolean_mask():
    """Eager attention would add it as 0/1, and the future would leak."""
    model = make_model("eager")
    seen = []

    def note(_, args, kwargs):
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        seen.append(mask.dtype)

    for layer in (*model.encoder.encoder.layers, *model.decoder.layers):
        layer.register_forward_pre_hook(note, with_kwargs=True)
    model(*make_batch(2))
    assert len(seen) == 4 and all(dtype.is_floating_point for dtype in seen)


def test_other_attention_implementations_are_refused_by_name():
    with pytest.raises(UserError, match="flash_attention_2"):
        make_encoder("flash_attention_2")
    with pytest.raises(UserError, match="flex_attention"):
        make_model("flex_attention")
    encoder = make_encoder()
    encoder.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="flex_attention"):
        encode(encoder, make_batch(1)[0])


# What is built


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 57}, "image_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"position_embedding": "rotary"}, "rotary"),
        ({"hidden_size": 34, "position_embedding": "sincos"}, "hidden_size"),
    ],
)
def test_impossible_sizes_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        make_encoder(**changes)


def xavier(weight):
    return math.sqrt(2 / sum(weight.shape))


def test_initialisation_is_apples():
    width, decoder_layers = 256, 3
    encoder = build_encoder(
        image_size=224,
        hidden_size=width,
        intermediate_size=320,
        num_layers=1,
        num_heads=2,
        generator=torch.Generator().manual_seed(0),
    )
    model = AIMv2ForPreTraining(
        encoder,
        decoder_hidden_size=192,
        decoder_intermediate_size=320,
        decoder_num_layers=decoder_layers,
        decoder_num_heads=2,
        vocab_size=400,
        context_length=76,
        generator=torch.Generator().manual_seed(1),
    )
    head_std = math.sqrt(1 / ((1 + decoder_layers) * 192))
    expected_std = {  # the first pattern that matches
        r"norm|patch_embed\.bias": lambda w: 0.0,
        r"encoder\.embeddings\.position_embedding": lambda w: 0.02,
        r"text_position_embedding": lambda w: 0.01,
        r"token_embedding|bos": lambda w: 0.02,
        r"pixel_head|text_head": lambda w: head_std,
        r"image_projection": lambda w: 1 / math.sqrt(3 * width),  # uniform within 1/sqrt(fan in), torch's default
        r"patch_embed\.weight": lambda w: xavier(w.flatten(1)),
        r"layers": xavier,
    }
    for name, parameter in model.named_parameters():
        std = next(rule for pattern, rule in expected_std.items() if re.search(pattern, name))(parameter)
        constant = 1.0 if "norm" in name else 0.0
        if std == 0:
            assert (parameter == constant).all(), name
        else:
            error = 4 / math.sqrt(parameter.numel())  # four standard errors of a mean, generous for a deviation
            assert abs(parameter.mean().item()) < error * std, name
            assert parameter.std().item() == pytest.approx(std, rel=error), name
        if name.endswith(("_proj.weight", "patch_embed.weight")):
            assert parameter.abs().max() <= math.sqrt(3) * std * (1 + 1e-6), name  # uniform has a sharp edge


def test_a_random_encoder_is_no_identity():
    encoder = make_encoder(hidden_size=192, intermediate_size=512, num_heads=3)
    with torch.no_grad():
        embedded = encoder.embeddings(make_batch(2)[0])
        after = encoder.encoder(embedded).last_hidden_state
    assert (after - embedded).norm() > 0.5 * embedded.norm()


def test_initialisation_follows_its_generator_or_the_global_one():
    before = torch.get_rng_state()
    first, again, other = make_model(seed=3), make_model(seed=3), make_model(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.text_head.weight, other.text_head.weight)
    assert not torch.equal(first.encoder.embeddings.patch_embed.weight, other.encoder.embeddings.patch_embed.weight)

    torch.manual_seed(5)
    drawn = build_encoder(**SIZES)
    torch.manual_seed(5)
    for parameter, same in zip(drawn.parameters(), build_encoder(**SIZES).parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_published_sizes_have_their_parameter_counts():
    """Table of spec sizes: AIMv2-L 309 M, H 681 M, 1B 1,235 M, 3B 2,721 M (built on the meta device)."""
    sizes = [(1024, 2816, 8, 309), (1536, 4096, 12, 681), (2048, 5632, 16, 1235), (3072, 8192, 24, 2721)]
    for width, intermediate, heads, millions in sizes:
        with torch.device("meta"):
            encoder = build_encoder(
                image_size=224, hidden_size=width, intermediate_size=intermediate, num_layers=24, num_heads=heads
            )
        assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_decay_roles():
    model = make_model()
    roles = model.parameter_roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    named = {role: sorted(name for name in roles if roles[name] == role) for role in set(roles.values())}
    assert named["position"] == ["encoder.embeddings.position_embedding.weight", "text_position_embedding.weight"]
    assert named["bos"] == ["bos"]
    assert named["bias"] == ["encoder.embeddings.patch_embed.bias", "image_projection.bias"]
    assert len(named["norm"]) == 2 + 2 * 2 + 2 * 2 + 1 and all("norm" in name for name in named["norm"])
    decayed = {
        "token_embedding.weight",
        "encoder.embeddings.patch_embed.weight",
        "pixel_head.weight",
        "text_head.weight",
    }
    assert decayed <= set(named["weight"])
    assert all(model.get_parameter(name).dim() > 1 for name in named["weight"])


# Losses


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(model, expected):
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


SUMS = ("pixel_sum", "text_sum", "mean_color_sum")
COUNTS = ("pixel_count", "text_count")


@pytest.mark.parametrize("sizes", [(4, 4), (1, 4, 3), (7, 1), (1,) * 8])
def test_sums_counts_and_gradient_do_not_depend_on_the_split(sizes):
    model = make_model()
    batch = make_batch(8)
    weights = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0])
    whole = model(*batch, weights=weights, return_predictions=False)
    (whole.text_sum / whole.text_count + 0.4 * whole.pixel_sum / whole.pixel_count).backward()
    expected = gradients(model)
    model.zero_grad()

    totals = dict.fromkeys(SUMS + COUNTS, 0)
    for parts in zip(*(tensor.split(sizes) for tensor in (*batch, weights)), strict=True):
        out = model(*parts, return_predictions=False)
        (out.text_sum / whole.text_count + 0.4 * out.pixel_sum / whole.pixel_count).backward()
        totals = {name: total + out[name].detach() for name, total in totals.items()}
    for name in COUNTS:
        assert totals[name].dtype == torch.int64 and totals[name] == whole[name], name
    for name in SUMS:
        torch.testing.assert_close(totals[name], whole[name].detach(), atol=0, rtol=1e-6)
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("return_predictions", [True, False])
def test_a_row_of_weight_zero_contributes_nothing(return_predictions):
    model = make_model()
    batch = make_batch(4)
    kept = torch.tensor([True, False, True, True])
    without = model(*(tensor[kept] for tensor in batch), return_predictions=return_predictions)
    without.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for hole_value in (0.0, 7.0):
        batch[0][1] = hole_value
        out = model(*batch, weights=kept.int(), return_predictions=return_predictions)
        out.loss.backward()
        for name in SUMS + COUNTS:
            torch.testing.assert_close(out[name], without[name], atol=0, rtol=1e-6)
        assert_same_gradients(model, expected)
        model.zero_grad()


def test_a_batch_of_holes_is_zero_and_reaches_every_parameter():
    model = make_model()
    out = model(*make_batch(2), weights=torch.zeros(2), return_predictions=False)
    out.loss.backward()
    assert out.loss == 0 and out.pixel_count == 0 and out.text_count == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_training_computes_the_same_sums_as_looking_at_everything():
    model = make_model()
    batch = make_batch(5)
    full = model(*batch)
    full.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    training = model(*batch, return_predictions=False)
    training.loss.backward()
    for name in SUMS + COUNTS:
        torch.testing.assert_close(training[name], full[name], atol=0, rtol=1e-6)
    assert_same_gradients(model, expected)


def test_padding_ids_change_nothing():
    model = make_model()
    image, ids, text_lengths, prefix_lengths = make_batch(5)
    padded = ids.masked_fill(torch.arange(T) >= text_lengths[:, None], 1)
    padded = torch.cat([padded, torch.ones(5, 1, dtype=torch.long)], dim=1)  # a column that no row uses
    for return_predictions in (True, False):
        sums = [
            model(image, tokens, text_lengths, prefix_lengths, return_predictions=return_predictions).text_sum
            for tokens in (ids, padded)
        ]
        torch.testing.assert_close(*sums, atol=0, rtol=1e-6)


def test_losses_are_their_definition():
    """Against plain loops over rows, patches and tokens."""
    model = make_model()
    image, ids, text_lengths, prefix_lengths = make_batch(3)
    with torch.no_grad():
        out = model(image, ids, text_lengths, prefix_lengths)
    pixel_sum = text_sum = color_sum = 0.0
    for b in range(3):
        for i in range(prefix_lengths[b], N):
            row, column = divmod(i, 4)
            patch = image[b, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            patch = patch.permute(1, 2, 0).double()
            target = (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
            pixel_sum += (out.patch_predictions[b, i - 1].double() - target.flatten()).square().mean().item()
            color_sum += (target - target.mean((0, 1))).square().mean().item()
        log_probabilities = out.text_logits[b].double().log_softmax(-1)
        text_sum -= sum(log_probabilities[t, ids[b, t]].item() for t in range(text_lengths[b]))
    assert out.pixel_sum.item() == pytest.approx(pixel_sum, rel=1e-5)
    assert out.mean_color_sum.item() == pytest.approx(color_sum, rel=1e-5)
    assert out.text_sum.item() == pytest.approx(text_sum, rel=1e-5)


def test_a_picture_of_plain_patches_has_no_error_beyond_its_mean_color():
    color = torch.randn(1, 3, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    out = make_model()(color, torch.zeros(1, T, dtype=torch.long), torch.tensor([T]), torch.tensor([1]))
    assert out.mean_color_sum.item() == pytest.approx(0, abs=1e-4)
    assert patchify(color, PATCH).unflatten(-1, (-1, 3)).std(-2).max() < 1e-6


def test_texts_that_do_not_fit_are_refused():
    model = make_model()
    image, ids, text_lengths, prefix_lengths = make_batch(2)
    with pytest.raises(ValueError, match="context_length"):
        model(image, ids.repeat(1, 2), text_lengths, prefix_lengths)
    with pytest.raises(ValueError, match="text_lengths"):
        model(image, ids, text_lengths + T, prefix_lengths, return_predictions=False)


def test_builds_and_trains_on_the_meta_device():
    """Nothing reads a value: the training step waits for no device."""
    real = make_batch(3)
    places = scored_places(N, *real[2:])
    with torch.device("meta"):
        model = make_model()
        batch = [torch.empty_like(tensor, device="meta") for tensor in real]
        out = model(*batch, places=places.to("meta"), return_predictions=False)
        out.loss.backward()
    assert out.loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_whole():
    """One graph without a break, the same sums and gradient."""
    model = make_model(num_layers=1)
    batch = make_batch(3)
    eager = model(*batch, return_predictions=False)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    places = scored_places(N, *batch[2:])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch, places=places, return_predictions=False)
    compiled.loss.backward()
    for name in SUMS + COUNTS:
        torch.testing.assert_close(compiled[name], eager[name], atol=0, rtol=1e-6)
    assert_same_gradients(model, expected)
