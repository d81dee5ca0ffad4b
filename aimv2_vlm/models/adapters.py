"""Low-rank adapters (LoRA, DoRA) and quantised weights of an assistant's decoder, and the plan that says what they touch.

Only linear layers inside the decoder's blocks are quantised or adapted; the encoder, the connector (with LlavaNext's bare
`image_newline`), embeddings and `lm_head` never are. Layers are exchanged in place, so the assistant stays the stock
class with its names; what is written is stock again: merged, or base and adapter side by side.

A quantised base is merged, and written, with the values that it computed with (dequantised), not with those it was made
from: the adapter learned beside the former, and only they give the tuned assistant's answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2_vlm.config import Adapter, LanguageModel, UserError
from aimv2_vlm.models.assistant import ADAPTER_PIECES, encoder_parameters_read, is_adapter, part_of
from aimv2_vlm.models.checkpoints import name_some, read_json, read_safetensors
from aimv2_vlm.models.llava_format import load_connector

ADAPTER = "adapter"  # folder in final/
WEIGHTS, CONFIG, CONNECTOR, BASE = "adapter_model.safetensors", "adapter_config.json", "connector.safetensors", "base.json"
_IN_BLOCK = re.compile(r"model\.language_model\.(?:.*\.)?\d+\.")  # names below an element of a ModuleList of the decoder
PEFT_PREFIX = "base_model.model."  # of the names in WEIGHTS, as peft writes them
OUTLIERS = 6.0  # inputs beyond this are multiplied unquantised (LLM.int8())


def block_linears(assistant: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the decoder's blocks by name, also where they carry an adapter."""
    return {
        name.removesuffix(".base_layer"): module for name, module in assistant.named_modules()
        if isinstance(module, nn.Linear) and _IN_BLOCK.match(name) and not is_adapter(name)
    }  # fmt: skip


def _linears(assistant: nn.Module, key: str) -> dict[str, nn.Linear]:
    """`block_linears`, or a UserError where there are none."""
    if found := block_linears(assistant):
        return found
    raise UserError(f"{key}: the blocks of {type(assistant.model.language_model).__name__} have no linear layers (torch.nn.Linear); write none")


def targeted(assistant: nn.Module, targets: list[str]) -> list[str]:
    """Names of the linear layers that `adapter.targets` means; UserError for one that means none."""
    linears = _linears(assistant, "adapter.kind")
    there = {name.rsplit(".", 1)[-1] for name in linears}
    if unknown := sorted(set(targets) - there):
        raise UserError(f"adapter.targets: {', '.join(unknown)}: no linear layer of the decoder's blocks; there are {', '.join(sorted(there))}")
    return [name for name in linears if not targets or name.rsplit(".", 1)[-1] in targets]


# ------------------------------------------------------------------------------------------------------------ quantised


def is_quantized(module: nn.Module) -> bool:
    """Whether this layer's weight is stored in 4 or 8 bits (not: that of the layer below an adapter, which shows it too)."""
    return not hasattr(module, "base_layer") and _format(getattr(module, "weight", None)) is not None


def _format(parameter: Any) -> str | None:
    """nf4 | int8 of a parameter of bitsandbytes (known by its class, so that it need not be imported), else None."""
    return {"Params4bit": "nf4", "Int8Params": "int8"}.get(type(parameter).__name__)


def quantize(assistant: nn.Module, llm: LanguageModel, compute_dtype: torch.dtype) -> None:
    """Store the linear layers of the decoder's blocks as `llm.quantization` says, in place, on the CPU.

    compute_dtype: what their products are computed in. Raises UserError without bitsandbytes.
    """
    if llm.quantization == "none":
        return
    bnb = import_bitsandbytes("llm.quantization")
    if llm.quantization == "int8":  # it would tell each layer anew that inputs are rounded to 16 bits first
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, linear in _linears(assistant, "llm.quantization").items():
        sizes = {"bias": linear.bias is not None, "device": "meta"}
        if llm.quantization == "nf4":
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **sizes, compute_dtype=compute_dtype)
            layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4",
                                             compress_statistics=llm.double_quantization).to("cpu")
            # On CPUs with avx512_bf16 a forward pass without gradients would repack the weight and round its scales to bf16, for good.
            layer.support_avx512bf16_for_cpu = False
        else:
            layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, **sizes, has_fp16_weights=False, threshold=OUTLIERS)
            layer.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False).to("cpu")
        layer.bias = linear.bias
        assistant.set_submodule(name, layer.train(linear.training))


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model.to(device)`, with what 8-bit layers hold beside their parameters: it stays behind where a parent is moved."""
    model.to(device)
    for module in model.modules():
        if is_quantized(module) and _format(module.weight) == "int8":
            for holder in (module.weight, module.state):
                if holder.CB is not None:
                    holder.CB = module.weight.data
                if holder.SCB is not None:
                    holder.SCB = holder.SCB.to(device)
    return model


def stored_weight(linear: nn.Linear) -> torch.Tensor:
    """The weight (outputs, inputs) that a layer computes with, dequantised where it is quantised."""
    if not is_quantized(linear):
        return linear.weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    state = getattr(linear, "state", None)  # of 8 bits: where the scales go at the first forward pass
    return dequantize_bnb_weight(linear.weight, state=state)


def dequantize(assistant: nn.Module) -> None:
    """Ordinary layers in the place of quantised ones (adapters must have been taken off), with the weights they computed with."""
    for name, layer in list(assistant.named_modules()):
        if is_quantized(layer):
            assistant.set_submodule(name, _ordinary(layer))


def _ordinary(layer: nn.Linear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(stored_weight(layer), requires_grad=False), layer.bias
    return linear.train(layer.training)


def num_elements(parameter: torch.Tensor) -> int:
    """Weights that a parameter stands for: two in each byte of 4-bit ones."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def import_bitsandbytes(key: str) -> Any:
    """bitsandbytes; UserError naming `key` where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key}: needs bitsandbytes ({error}); pip install 'aimv2-vlm[quantization]'") from None
    return bitsandbytes


# ------------------------------------------------------------------------------------------------------------- adapters


def add_adapter(assistant: nn.Module, adapter: Adapter) -> None:
    """Put fresh adapters (their product is 0) beside the targeted layers, in place; their weights are fp32. Raises UserError."""
    if adapter.kind == "none":
        return
    if adapter.rank < 1 or adapter.alpha <= 0:
        raise UserError(f"adapter.rank: {adapter.rank} and adapter.alpha: {adapter.alpha}; both must be positive")
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout: {adapter.dropout:g} is no probability below 1")
    _inject(assistant, _peft_config(assistant, adapter))


def _peft_config(assistant: nn.Module, adapter: Adapter) -> Any:
    from peft import LoraConfig

    kinds = sorted({name.rsplit(".", 1)[-1] for name in targeted(assistant, adapter.targets)})
    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, use_rslora=adapter.rslora, use_dora=adapter.kind == "dora",
        target_modules=rf"model\.language_model\.(.*\.)?\d+\.(.*\.)?({'|'.join(map(re.escape, kinds))})",
    )  # fmt: skip


def _inject(assistant: nn.Module, config: Any) -> None:
    from peft import inject_adapter_in_model

    learned = {parameter for parameter in assistant.parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, assistant)
    for name, parameter in assistant.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
        else:  # peft freezes everything else; `set_trainable` alone decides
            parameter.requires_grad_(parameter in learned)


def has_adapter(assistant: nn.Module) -> bool:
    return any(is_adapter(name) for name, _ in assistant.named_parameters())


def _layers(assistant: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """peft's layers, each with the name of the layer in whose place it stands."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in list(assistant.named_modules()) if isinstance(module, BaseTunerLayer))


def take_off(assistant: nn.Module) -> None:
    """The decoder without adapters, in place: the base as it was."""
    for name, layer in _layers(assistant):
        assistant.set_submodule(name, layer.get_base_layer())
    assistant.__dict__.pop("peft_config", None)


def merge(assistant: nn.Module) -> None:
    """The adapters added to the weights beside which they learned, in place; no layer is quantised or adapted afterwards."""
    if has_adapter(assistant):
        config, state = assistant.peft_config["default"], adapter_state(assistant)
        take_off(assistant)
        dequantize(assistant)
        _inject(assistant, config)
        _fill(assistant, state)
        with torch.no_grad():
            for _, layer in _layers(assistant):
                layer.merge(safe_merge=True)
        take_off(assistant)
    dequantize(assistant)


# ------------------------------------------------------------------------------------------------- an adapter by itself


def adapter_state(assistant: nn.Module) -> dict[str, torch.Tensor]:
    """Adapter weights under the names that peft gives them in a file."""
    return {
        PEFT_PREFIX + name.replace(".default", ""): parameter.detach() for name, parameter in assistant.named_parameters() if is_adapter(name)
    }  # fmt: skip


def _fill(assistant: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = adapter_state(assistant)
    odd = [name for name in sorted(own.keys() | state.keys()) if name not in own or name not in state or own[name].shape != state[name].shape]
    if odd:
        raise UserError(f"adapter.path: its weights do not fit: {name_some(odd)}")
    with torch.no_grad():
        for name, tensor in own.items():  # shares the memory of the parameters
            tensor.copy_(state[name])


def base_digest(assistant: nn.Module) -> dict[str, str]:
    """Digests of the encoder's and the decoder's weights as they are computed with, without connector and adapters.

    The same for a quantised decoder and its dequantised copy, and for every type that holds the values exactly.
    """
    digests = {part: hashlib.sha256() for part in ("encoder", "llm")}
    linears = {f"{name}.weight": linear for name, linear in block_linears(assistant).items()}
    named = {name.replace(".base_layer", ""): p for name, p in assistant.named_parameters(remove_duplicate=True) if not is_adapter(name)}
    for name in sorted(named):
        if (part := part_of(name)) in digests:
            values = (stored_weight(linears[name]) if name in linears else named[name].detach()).float().cpu().contiguous()
            digests[part].update(f"{name} {tuple(values.shape)}".encode())
            digests[part].update(values.view(-1).numpy())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def save_adapter(folder: Path, assistant: nn.Module) -> None:
    """The adapter, loadable with peft and beside it the connector (`image_newline` too) and the digests of its base."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = assistant.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(folder)
    contiguous = lambda state: {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}  # noqa: E731
    save_file(contiguous(adapter_state(assistant)), folder / WEIGHTS, metadata={"format": "pt"})
    connector = {name: p for name, p in assistant.named_parameters() if part_of(name) == "connector"}
    save_file(contiguous(connector), folder / CONNECTOR, metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps(base_digest(assistant), indent=1), encoding="utf-8")


def load_adapter(assistant: nn.Module, folder: str | Path, adapter: Adapter | None = None) -> None:
    """Put a saved adapter and its connector onto the base it was made for, in place.

    assistant: stock, or with fresh adapters. adapter: the recipe's, which must be of the same kind and sizes. Raises
    UserError for another base or other sizes.
    """
    from peft import LoraConfig

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, CONNECTOR, BASE):
        if not (folder / name).is_file():
            raise UserError(f"adapter.path: {folder}: holds no {name}; name final/{ADAPTER} of a run with adapter.merge: false")
    made_for, here = read_json(folder / BASE), base_digest(assistant)
    if others := [part for part in here if made_for.get(part) != here[part]]:
        what = " and ".join({"encoder": "another encoder", "llm": "another decoder (or another llm.quantization)"}[part] for part in others)
        raise UserError(f"adapter.path: {folder}: was made for {what}; use the base it was trained on")
    try:
        config = LoraConfig(**{key: value for key, value in read_json(folder / CONFIG).items() if key in LoraConfig.__dataclass_fields__})
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter.path: {folder / CONFIG}: not an adapter's configuration ({error})") from None
    if adapter is not None:
        wanted = _peft_config(assistant, adapter)
        keys = {"adapter.kind": "use_dora", "adapter.rank": "r", "adapter.alpha": "lora_alpha", "adapter.rslora": "use_rslora", "adapter.targets": "target_modules"}
        if odd := [f"{key} ({getattr(config, name)!r} there)" for key, name in keys.items() if getattr(config, name) != getattr(wanted, name)]:
            raise UserError(f"adapter.path: {folder}: differs from the recipe in {', '.join(odd)}")
    elif not has_adapter(assistant):
        _inject(assistant, config)
    _fill(assistant, read_safetensors(folder / WEIGHTS)[0])
    load_connector(assistant, folder / CONNECTOR)


# -------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Group:
    """One row of the plan: parameters of one kind and what becomes of them."""

    name: str
    stored: str  # number format
    quantized: bool
    adapted: int  # layers with an adapter
    parameters: int
    trainable: int


def group_of(name: str) -> str:
    """The plan's row that a parameter belongs to, by its name."""
    part = part_of(name)
    if is_adapter(name):
        return "llm: adapters"
    if name.endswith("image_newline"):
        return "image_newline"
    if part != "llm":
        return part
    if ".lm_head." in f".{name}":
        return "lm_head"
    return "llm: blocks" if _IN_BLOCK.match(name) else "llm: embeddings and norm"


def plan(assistant: nn.Module) -> list[Group]:
    """What every group of parameters is stored as, and how much of it learns. Tied weights count once."""
    linears = block_linears(assistant)
    layers = {name for name, _ in _layers(assistant)}
    rows: dict[tuple[str, str, bool], list[int]] = {}
    for name, parameter in assistant.named_parameters():
        plain = name.replace(".base_layer", "")
        group = group_of(name)
        if group == "llm: blocks":
            group += ", linear" if plain.rsplit(".", 1)[0] in linears else ", other"
        stored = _format(parameter) or str(parameter.dtype).removeprefix("torch.")
        row = rows.setdefault((group, stored, _format(parameter) is not None), [0, 0, 0])
        row[0] += plain.endswith(".weight") and plain.rsplit(".", 1)[0] in layers
        row[1] += num_elements(parameter)
        row[2] += num_elements(parameter) if parameter.requires_grad else 0
    return [Group(*key, *counts) for key, counts in rows.items()]


def table(groups: list[Group]) -> list[str]:
    """The plan as lines of equal columns, a header first."""
    rows = [("part", "stored", "quantised", "with adapter", "parameters", "trainable")]
    for g in groups:
        adapted = f"{g.adapted} layers" if g.adapted else "no"
        rows.append((g.name, g.stored, "yes" if g.quantized else "no", adapted, f"{g.parameters:,}", f"{g.trainable:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(w) if i > 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def check_plan(assistant: nn.Module, adapter: Adapter, llm: LanguageModel, trainable: list[str]) -> None:
    """Raises UserError where the model is not what the recipe says: what is quantised, adapted, learned and saved."""
    def demand(what: str, found: set[str], wanted: set[str]) -> None:
        if found != wanted:
            told = [f"{word} {name_some(sorted(names))}" for word, names in (("lacks", wanted - found), ("has", found - wanted)) if names]
            raise UserError(f"plan: {what}: the model {' and '.join(told)} against the recipe; nothing was trained")

    named = dict(assistant.named_parameters())
    linears = set(block_linears(assistant))
    adapted = set(targeted(assistant, adapter.targets)) if adapter.kind != "none" else set()
    # Any number format that is no floating point, wherever it stands: not only the layers that this file exchanged.
    compressed = {name.replace(".base_layer", "").rsplit(".", 1)[0] for name, p in named.items() if not p.dtype.is_floating_point or _format(p)}
    demand(f"quantised layers (llm.quantization: {llm.quantization})", compressed, linears if llm.quantization != "none" else set())
    found = {name.rsplit(f".{piece}.", 1)[0] for name in named for piece in ADAPTER_PIECES if f".{piece}." in name}
    demand(f"adapters (adapter.kind: {adapter.kind})", found, adapted)
    read = encoder_parameters_read(assistant) if "encoder" in trainable else set()
    learns: Callable[[str], bool] = lambda name: part_of(name) in trainable and {  # noqa: E731
        "encoder": named[name] in read, "connector": True, "llm": adapter.kind == "none" or is_adapter(name)}[part_of(name)]
    demand("trainable parameters", {n for n, p in named.items() if p.requires_grad}, {n for n in named if learns(n)})
    newline = {"model.image_newline"} if getattr(assistant.model, "image_newline", None) is not None else set()
    kept = assistant.state_dict().keys()
    demand("image_newline among the saved weights", {name for name in named if name.endswith("image_newline") and name in kept}, newline)

