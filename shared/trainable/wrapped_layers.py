"""Recognizes layers that peft has wrapped, without importing peft.

Importing peft takes seconds, and reading a recipe does not need it.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeGuard

from torch import nn


class WrappedLayer(Protocol):
    """The attributes of peft's `BaseTunerLayer` that are used here."""

    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    _active_adapter: Any

    def get_base_layer(self) -> nn.Module: ...
    def delete_adapter(self, adapter_name: str) -> None: ...


def is_wrapped(module: Any) -> TypeGuard[WrappedLayer]:
    """Returns whether peft has wrapped this module. No module can be wrapped before peft is imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
