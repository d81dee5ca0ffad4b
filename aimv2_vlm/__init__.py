"""From image-text shards to a chat assistant built on an AIMv2 encoder. Names below load torch only when they are used."""

from __future__ import annotations

from typing import Any

_WHERE = {
    "load_encoder": "aimv2_vlm.models.encoder",
    "build_encoder": "aimv2_vlm.models.encoder",
    "AIMv2ForPreTraining": "aimv2_vlm.models.pretraining",
    "build_assistant": "aimv2_vlm.models.assistant",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'aimv2_vlm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
