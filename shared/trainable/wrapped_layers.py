"""Recognizes layers that peft has wrapped, without importing peft, which takes seconds and is not needed to read a recipe."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeGuard

from torch import nn


class WrappedLayer(Protocol):
    """What is used here of peft's `BaseTunerLayer`."""

    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    _active_adapter: Any

    def get_base_layer(self) -> nn.Module: ...
    def delete_adapter(self, adapter_name: str) -> None: ...


def is_wrapped(module: Any) -> TypeGuard[WrappedLayer]:
    """Returns whether peft has wrapped this module. None can be wrapped before peft has been imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
