"""Which number format a run computes in: `precision: auto` asks the device; bf16 without its instructions crawls."""

from __future__ import annotations

from pathlib import Path

from aimv2_vlm.config import PRECISIONS, UserError

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
    """`bf16` or `fp32`: `requested` itself, or for `auto` what the device computes fast. UserError for another word."""
    if requested not in PRECISIONS:
        raise UserError(f"precision: {requested!r} is none of {', '.join(PRECISIONS)}")
    return explain_precision(device)[0] if requested == "auto" else requested
