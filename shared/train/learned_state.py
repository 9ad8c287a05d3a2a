"""Collects what a run learns (token vectors and adapters) into one flat mapping, and restores it from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from shared.backbones.protocol import Adapter, Backbone


def adapters_in(backbone: Backbone, adapter_sets: Sequence[str]) -> list[Adapter]:
    """Returns all adapters in these sets. A set may be empty."""
    return [adapter for name in adapter_sets for adapter in backbone.adapters.get(name, [])]


def gather(backbone: Backbone, names: Sequence[str], adapter_sets: Sequence[str]) -> dict[str, Tensor]:
    """Returns the learned tensors in fp32 on the CPU, as `placeholder/<concept>/<key>` or `adapter/<slot>/<tensor>`."""
    out = {}
    for name in names:
        for key, value in backbone.placeholders[name].state_dict().items():
            out[f"placeholder/{name}/{key}"] = value
    for adapter in adapters_in(backbone, adapter_sets):
        for key, value in adapter.state_dict().items():
            out[f"adapter/{adapter.slot}/{key}"] = value
    return out


def restore(
    backbone: Backbone,
    names: Sequence[str],
    adapter_sets: Sequence[str],
    state: Mapping[str, Tensor],
    fresh: bool = False,
) -> None:
    """Loads the tensors that `gather` returned.

    With `fresh`, which is set when a phase starts, an adapter without saved tensors keeps its initial values, because
    that phase has just added it. Raises ValueError when tensors are missing, unexpected or of the wrong shape.
    """
    left = dict(state)
    for name in names:
        learned = _take(left, f"placeholder/{name}/")
        backbone.placeholders[name].load_state_dict(learned)
    for adapter in adapters_in(backbone, adapter_sets):
        prefix = f"adapter/{adapter.slot}/"
        mine = adapter.state_dict()
        if fresh and not any(prefix + k in left for k in mine):
            continue
        adapter.load_state_dict({k: left.pop(prefix + k) for k in mine if prefix + k in left})
    if left:
        raise ValueError(f"{len(left)} saved tensors match nothing in this recipe, for example {sorted(left)[0]!r}")


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: state.pop(k) for k in sorted(state) if k.startswith(prefix)}
