"""What each pre-training objective is, written out from the paper: plain tensor operations, one sample at a time, no padding.

Nothing of `aimv2_vlm.models` or transformers is used. A function takes the weights under the project's names and a batch
as the data loader makes it, and returns the loss of the whole batch; one caption is one sequence of its own length, one
picture one sequence of its own patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

State = dict[str, torch.Tensor]
Batch = dict[str, Any]


class Sizes(NamedTuple):
    """What weights do not show."""

    encoder_heads: int
    decoder_heads: int
    patch: int
    mean: list[float]
    std: list[float]


# ------------------------------------------------------------------------------------------------------------------ blocks


def rms_norm(x_SD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    return x_SD / (x_SD.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight_D


def attention(x_SD: torch.Tensor, state: State, name: str, num_heads: int, can_attend_SS: torch.Tensor) -> torch.Tensor:
    query, key, value = (x_SD @ state[f"{name}.{part}_proj.weight"].T for part in "qkv")
    heads = []
    for q, k, v in zip(*(t.chunk(num_heads, dim=1) for t in (query, key, value)), strict=True):
        scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(~can_attend_SS, -math.inf)
        heads.append(scores.softmax(1) @ v)
    return torch.cat(heads, dim=1) @ state[f"{name}.out_proj.weight"].T


def swiglu(x_SD: torch.Tensor, state: State, name: str) -> torch.Tensor:
    gate, up = x_SD @ state[f"{name}.gate_proj.weight"].T, x_SD @ state[f"{name}.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ state[f"{name}.down_proj.weight"].T


def transformer(x_SD: torch.Tensor, state: State, name: str, num_heads: int, can_attend_SS: torch.Tensor) -> torch.Tensor:
    layer = 0
    while f"{name}.layers.{layer}.rms_norm1.weight" in state:
        block = f"{name}.layers.{layer}"
        x_SD = x_SD + attention(rms_norm(x_SD, state[f"{block}.rms_norm1.weight"]), state, f"{block}.attention", num_heads, can_attend_SS)
        x_SD = x_SD + swiglu(rms_norm(x_SD, state[f"{block}.rms_norm2.weight"]), state, f"{block}.ffn")
        layer += 1
    assert layer
    return x_SD


def mask(length: int, allowed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(query, key) -> True where the query may attend to the key; `allowed` gets their places as (S, 1) and (1, S)."""
    place = torch.arange(length)
    return allowed(place[:, None], place[None, :])


def bidirectional(length: int) -> torch.Tensor:
    return mask(length, lambda q, k: (k >= 0) & (q >= 0))


def causal(length: int) -> torch.Tensor:
    return mask(length, lambda q, k: k <= q)


def prefix(length: int, prefix_length: int) -> torch.Tensor:
    return mask(length, lambda q, k: (k < prefix_length) | (k <= q))


# ---------------------------------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """Patches in raster order, each as the values that the embedding sees and as those that are predicted."""

    embedded_NP: torch.Tensor  # (channel, row, column)
    predicted_NP: torch.Tensor  # (row, column, channel)
    places: list[tuple[int, int]]  # row and column of each patch
    num_real: int  # the rest is padding


def fixed_picture(pixels_CHW: torch.Tensor, sizes: Sizes, dtype: torch.dtype) -> Picture:
    p = sizes.patch
    mean, std = torch.tensor(sizes.mean, dtype=dtype)[:, None, None], torch.tensor(sizes.std, dtype=dtype)[:, None, None]
    values = (pixels_CHW.to(dtype) / 255 - mean) / std
    places = [(row, column) for row in range(values.shape[1] // p) for column in range(values.shape[2] // p)]
    patches = [values[:, row * p : (row + 1) * p, column * p : (column + 1) * p] for row, column in places]
    embedded, predicted = [patch.flatten() for patch in patches], [patch.permute(1, 2, 0).flatten() for patch in patches]
    return Picture(torch.stack(embedded), torch.stack(predicted), places, len(places))


def native_picture(batch: Batch, row: int, sizes: Sizes, dtype: torch.dtype) -> Picture:
    """The picture that a native row's patches were cut from, filled up with zeros, over which there is no mask."""
    (rows, columns), p = batch["grids"][row].tolist(), sizes.patch
    pixels = torch.zeros(3, rows * p, columns * p, dtype=torch.uint8)
    for number in range(rows * columns):
        r, c = number // columns, number % columns
        pixels[:, r * p : (r + 1) * p, c * p : (c + 1) * p] = batch["patches"][row, number].view(3, p, p)
    picture = fixed_picture(pixels, sizes, dtype)
    padding = torch.zeros(batch["patches"].shape[1] - rows * columns, 3 * p * p, dtype=dtype)
    values = [torch.cat([patches, padding]) for patches in (picture.embedded_NP, picture.predicted_NP)]
    return Picture(*values, picture.places + [(0, 0)] * len(padding), rows * columns)


def sincos_position(place: tuple[int, int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """[sin of column | cos of column | sin of row | cos of row], a quarter of the width each."""
    row, column = place
    angles = [1 / 10_000 ** (i / (width // 4)) for i in range(width // 4)]
    parts = [f(at * angle) for at in (column, row) for f in (math.sin, math.cos) for angle in angles]
    return torch.tensor(parts, dtype=dtype)


def embed_patches(picture: Picture, state: State, name: str) -> torch.Tensor:
    weight = state[f"{name}.patch_embed.weight"].flatten(1)
    x_ND = rms_norm(picture.embedded_NP @ weight.T + state[f"{name}.patch_embed.bias"], state[f"{name}.rms_norm.weight"])
    learned = state.get(f"{name}.position_embedding.weight")
    if learned is not None:
        return x_ND + learned
    return x_ND + torch.stack([sincos_position(place, x_ND.shape[1], x_ND.dtype) for place in picture.places])


def encode(picture: Picture, state: State, name: str, num_heads: int, can_attend_NN: torch.Tensor) -> torch.Tensor:
    x_ND = embed_patches(picture, state, f"{name}.embeddings")
    return rms_norm(transformer(x_ND, state, f"{name}.encoder", num_heads, can_attend_NN), state[f"{name}.rms_norm.weight"])


# ------------------------------------------------------------------------------------------------------------------ losses


def pixel_loss(outputs_ND: torch.Tensor, head_PD: torch.Tensor, picture: Picture, prefix_length: int) -> tuple[torch.Tensor, int]:
    """(sum over the real patches behind the prefix, their number); patch i is predicted by the output at patch i - 1."""
    values = picture.predicted_NP[prefix_length : picture.num_real]
    centered = values - values.mean(1, keepdim=True)
    targets = centered / (centered.pow(2).sum(1, keepdim=True) / (values.shape[1] - 1) + 1e-6).sqrt()
    predictions = outputs_ND[prefix_length - 1 : picture.num_real - 1] @ head_PD.T
    return (predictions - targets).pow(2).mean(1).sum(), len(targets)


def caption_loss(outputs_TD: torch.Tensor, head_VD: torch.Tensor, caption: list[int]) -> tuple[torch.Tensor, int]:
    """(sum over the tokens, their number); output t predicts token t."""
    log_shares_TV = (outputs_TD @ head_VD.T).log_softmax(1)
    return -sum(log_shares_TV[t, token] for t, token in enumerate(caption)), len(caption)


def caption_of(batch: Batch, row: int) -> list[int]:
    return batch["input_ids"][row, : int(batch["text_lengths"][row])].tolist()


def embed_caption(caption: list[int], state: State, parallel: bool = False) -> torch.Tensor:
    """What the decoder reads to predict the tokens of `caption`: [BOS] and all tokens but the last, or [MASK] only."""
    if parallel:
        inputs = torch.stack([state["mask_embedding"]] * len(caption))
    else:
        inputs = torch.cat([state["bos"][None], state["token_embedding.weight"][caption[:-1]]])
    return inputs + state["text_position_embedding.weight"][: len(caption)]


def decode(x_SD: torch.Tensor, state: State, name: str, num_heads: int, can_attend_SS: torch.Tensor) -> torch.Tensor:
    return rms_norm(transformer(x_SD, state, name, num_heads, can_attend_SS), state[f"{name}_norm.weight"])


def generative(
    state: State, batch: Batch, sizes: Sizes, *, alpha: float | None = None, text: bool = True, encoder_bidirectional: bool = False,
    separate: bool = False, parallel: torch.Tensor | None = None, kept: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """loss, and `pixel` and `text` apart: everything that has an encoder and a decoder.

    alpha: weight of the pixel loss, None without. parallel (B,): captions decoded from [MASK]s. kept (B, N): patches that
    captions are decoded from.
    """
    dtype = state["encoder.rms_norm.weight"].dtype
    zero = torch.zeros((), dtype=dtype)
    pixels, num_pixels, words, num_words = zero, 0, zero, 0
    for row in range(len(batch["weights"])):
        if not batch["weights"][row]:
            continue
        picture = native_picture(batch, row, sizes, dtype) if "patches" in batch else fixed_picture(batch["pixels"][row], sizes, dtype)
        n, m = len(picture.places), int(batch["prefix_lengths"][row])
        can_attend = bidirectional(n) if encoder_bidirectional else prefix(n, m)
        features_ND = encode(picture, state, "encoder", sizes.encoder_heads, can_attend)
        image_ND = features_ND @ state["image_projection.weight"].T + state["image_projection.bias"]
        outputs_SD = image_ND[:0]
        if text:
            caption, in_parallel = caption_of(batch, row), parallel is not None and bool(parallel[row])
            seen_ND = image_ND if kept is None else image_ND[kept[row]]
            seen, inputs_SD = len(seen_ND), torch.cat([seen_ND, embed_caption(caption, state, in_parallel)])
            allowed = mask(len(inputs_SD), lambda q, k, seen=seen, p=in_parallel: (k <= q) | ((q >= seen) & p))
            outputs_SD = decode(inputs_SD, state, "decoder", sizes.decoder_heads, allowed)
            total, number = caption_loss(outputs_SD[seen:], state["text_head.weight"], caption)
            words, num_words = words + total, num_words + number
        if alpha is not None:
            if separate:
                image_ND = features_ND @ state["pixel_projection.weight"].T + state["pixel_projection.bias"]
                outputs_SD = decode(image_ND, state, "pixel_decoder", sizes.decoder_heads, causal(n))
            elif not text:
                outputs_SD = decode(image_ND, state, "decoder", sizes.decoder_heads, causal(n))
            total, number = pixel_loss(outputs_SD[:n], state["pixel_head.weight"], picture, m)
            pixels, num_pixels = pixels + total, num_pixels + number
    parts = ({"text": words / num_words} if text else {}) | ({"pixel": pixels / num_pixels} if alpha is not None else {})
    weights = {"text": 1.0, "pixel": alpha if text else 1.0}
    return parts | {"loss": sum(weights[name] * value for name, value in parts.items())}


def genlip(state: State, batch: Batch, sizes: Sizes) -> dict[str, torch.Tensor]:
    """One transformer: patches see all patches, a word sees all patches and the words before it."""
    dtype = state["encoder.rms_norm.weight"].dtype
    words, num_words = torch.zeros((), dtype=dtype), 0
    for row in range(len(batch["weights"])):
        if not batch["weights"][row]:
            continue
        picture, caption = fixed_picture(batch["pixels"][row], sizes, dtype), caption_of(batch, row)
        n = len(picture.places)
        x_SD = torch.cat([embed_patches(picture, state, "encoder.embeddings"), embed_caption(caption, state)])
        x_SD = transformer(x_SD, state, "encoder.encoder", sizes.encoder_heads, prefix(len(x_SD), n))
        outputs_TD = rms_norm(x_SD, state["encoder.rms_norm.weight"])[n:]
        total, number = caption_loss(outputs_TD, state["text_head.weight"], caption)
        words, num_words = words + total, num_words + number
    return {"loss": words / num_words}


def two_tower_embeddings(state: State, batch: Batch, sizes: Sizes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Unit vectors of the pictures and captions that count. The begin token of a caption is its first, the end its last."""
    dtype = state["towers.logit_scale"].dtype
    images, texts = [], []
    for row in range(len(batch["weights"])):
        if not batch["weights"][row]:
            continue
        picture, caption = fixed_picture(batch["pixels"][row], sizes, dtype), caption_of(batch, row)
        tower = "towers.vision_model"
        features_ND = encode(picture, state, tower, sizes.encoder_heads, bidirectional(len(picture.places)))
        query, key, value = (state[f"{tower}.head.cls_token"].view(1, -1), features_ND @ state[f"{tower}.head.k_proj.weight"].T,
                             features_ND @ state[f"{tower}.head.v_proj.weight"].T)
        heads = [(q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v for q, k, v in
                 zip(*(t.chunk(sizes.encoder_heads, dim=1) for t in (query, key, value)), strict=True)]
        pooled = state[f"{tower}.head.output_proj.weight"] @ torch.cat(heads, 1)[0] + state[f"{tower}.head.output_proj.bias"]
        image = state["towers.visual_projection.weight"] @ pooled

        tower = "towers.text_model"
        x_TD = state[f"{tower}.embeddings.token_embedding.weight"][caption]
        x_TD = x_TD + state[f"{tower}.embeddings.position_embedding.weight"][: len(caption)]
        x_TD = transformer(x_TD, state, f"{tower}.encoder", sizes.decoder_heads, causal(len(caption)))
        text = state["towers.text_projection.weight"] @ rms_norm(x_TD, state[f"{tower}.rms_norm.weight"])[-1]
        images.append(image / image.pow(2).sum().sqrt())
        texts.append(text / text.pow(2).sum().sqrt())
    return images, texts


def contrastive(state: State, batch: Batch, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Symmetric softmax; rows with the same caption are each other's positives, in equal parts."""
    images, texts = two_tower_embeddings(state, batch, sizes)
    captions = [tuple(caption_of(batch, row)) for row in range(len(batch["weights"])) if batch["weights"][row]]
    scale = state["towers.logit_scale"].exp().clamp(max=100)
    total = torch.zeros_like(scale)
    for queries, keys in ((images, texts), (texts, images)):
        log_shares = (scale * torch.stack(queries) @ torch.stack(keys).T).log_softmax(1)
        for i, caption in enumerate(captions):
            positives = [j for j, other in enumerate(captions) if other == caption]
            total = total - log_shares[i, positives].mean()
    return {"loss": total / (2 * len(images))}


# --------------------------------------------------------------------------------------------------------------- optimizer


def decays(name: str, tensor: torch.Tensor) -> bool:
    """Matrices are decayed: token embeddings, the patch projection and heads among them. Norms, biases, positions, single
    vectors (BOS, [MASK], the pooling query) and the logit scale are not."""
    return "position_embedding" not in name and sum(side > 1 for side in tensor.shape) > 1


class DecoupledAdamW:
    """The definition (Loshchilov and Hutter): Adam's step and, apart from it, a decay of `weight_decay * lr / peak`."""

    def __init__(self, weights: State, *, peak: float, weight_decay: float, betas: tuple[float, float], eps: float, clip: float):
        self.weights, self.peak, self.weight_decay, self.betas, self.eps, self.clip = weights, peak, weight_decay, betas, eps, clip
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: State, lr: float) -> float:
        """Changes the weights in place; returns the norm of all gradients before clipping to `clip`."""
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        factor = min(1.0, self.clip / (norm + 1e-6))
        self.count += 1
        (a, b), decay = self.betas, self.weight_decay * lr / self.peak
        for name, gradient in gradients.items():
            w, g = self.weights[name], gradient * factor
            self.first[name] = a * self.first[name] + (1 - a) * g
            self.second[name] = b * self.second[name] + (1 - b) * g * g
            first, second = self.first[name] / (1 - a**self.count), self.second[name] / (1 - b**self.count)
            old = w.clone()
            w -= lr * first / (second.sqrt() + self.eps)
            if decays(name, w):
                w -= decay * old
        return norm
