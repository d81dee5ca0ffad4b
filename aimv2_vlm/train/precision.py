"""Which number format a run computes in: `precision: auto` asks the device; bf16 without its instructions crawls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aimv2_vlm.config import PRECISIONS, UserError

if TYPE_CHECKING:
    import torch

# Without one of these a CPU emulates bf16: autocast was measured at 6 images/s against 93 in fp32.
CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction-set flags of the first processor as Linux names them; empty where they cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def explain_precision(device: str | None = None, flags: frozenset[str] | None = None) -> tuple[str, str]:
    """What `auto` means here: (`bf16` or `fp32`, the reason). `device` is `cuda`, `cpu` or null for the one in use."""
    if device is None or device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16", f"{torch.cuda.get_device_name()} computes in bf16"
            return "fp32", f"{torch.cuda.get_device_name()} has no bf16 arithmetic"
        if device is not None:
            raise UserError(f"precision for {device}: this process sees no CUDA device; run `aimv2-vlm doctor`")
    flags = cpu_flags() if flags is None else flags
    found = [flag for flag in CPU_BF16_FLAGS if flag in flags]
    if found:
        return "bf16", f"the CPU has {' and '.join(found)}"
    return "fp32", f"the CPU has neither {' nor '.join(CPU_BF16_FLAGS)}; emulated bf16 would be many times slower"


def choose_precision(requested: str = "auto", device: str | None = None) -> str:
    """`bf16` or `fp32`: `requested` itself, or for `auto` what the device computes fast. UserError for another word.

    What `fp8` leaves alone (see `convert_to_fp8`) is computed in bf16.
    """
    if requested == "fp8":
        return "bf16"
    if requested not in PRECISIONS:
        raise UserError(f"precision: {requested!r} is none of {', '.join(PRECISIONS)}")
    return explain_precision(device)[0] if requested == "auto" else requested


FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with 8-bit floating-point products


def convert_to_fp8(model: torch.nn.Module) -> int:
    """Let the trained linear layers inside `model`'s blocks multiply in 8 bits, in place; returns how many there are.

    Each operand is scaled by its own largest value when it is used (torchao's dynamic scaling of whole tensors: e4m3 for inputs and weights, e5m2 for
    gradients), so nothing is kept between steps: weights stay fp32 under their names, and checkpoints are those of any other precision. Heads, the
    connector, embeddings, norms and attention are left in bf16, and layers whose sides are no multiples of 16. Without a GPU the products are emulated:
    the same roundings, slowly. Raises UserError where torchao or the GPU's arithmetic is missing.
    """
    import torch

    from aimv2_vlm.train.distributed import blocks

    emulate = not torch.cuda.is_available()
    if not emulate and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise UserError(f"precision: {torch.cuda.get_device_name()} has no 8-bit products (compute capability "
                        f"{'.'.join(map(str, torch.cuda.get_device_capability()))}, needed 8.9); write bf16")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"precision: fp8 needs torchao ({error}); pip install 'aimv2-vlm[fp8]', or write bf16") from None
    # The products of a gradient add over tokens, of which there may be any number: they are padded to 16.
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    chosen = {id(layer) for block in blocks(model) for layer in block.modules() if isinstance(layer, torch.nn.Linear)
              and layer.weight.requires_grad and layer.in_features % 16 == 0 and layer.out_features % 16 == 0}
    if not chosen:
        raise UserError("precision: fp8, but no trained linear layer of the blocks has sides that are multiples of 16; write bf16")
    convert_to_float8_training(model, config=settings, module_filter_fn=lambda layer, _: id(layer) in chosen)
    return len(chosen)
