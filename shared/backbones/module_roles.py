"""Resolves roles by matching patterns against module names. A role is an architecture-independent name for a group of modules.

Each family provides a table that maps roles to `RoleSpec`s. Module names are those of the unmodified network, without the names
that peft's wrappers add (`to_k.base_layer`, `to_k.lora_A.default`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from shared.backbones.protocol import Group, Resolution
from shared.config import unknown

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BASE = ".base_layer"


@dataclass(frozen=True)
class RoleSpec:
    """The modules of `component` whose full dotted name matches `pattern`.

    By default, only linear and convolution layers are considered, because any adapter can wrap them. With `of="parameters"`,
    all modules that directly hold parameters are considered, including norms and embeddings.
    """

    component: str
    pattern: str
    resolution: Resolution = "exact"
    note: str = ""
    of: Literal["layers", "parameters"] = "layers"


def denoiser_roles(component: str) -> dict[str, tuple[RoleSpec, ...]]:
    """Returns the two roles that every family has. "denoiser" stands for the denoiser's linear and convolution layers, and
    "denoiser.all" for all of its modules that directly hold parameters."""
    return {
        "denoiser": (RoleSpec(component, ".*"),),
        "denoiser.all": (RoleSpec(component, ".*", of="parameters"),),
    }


def leaf_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the dotted names of the linear and convolution layers of `module`, as they were before anything wrapped the
    layers. Layers that an adapter added are not listed.
    """
    return _unwrapped(module, [name for name, child in module.named_modules() if isinstance(child, LEAVES)])


def parameter_holders(module: nn.Module) -> tuple[str, ...]:
    """Returns the dotted names of the modules that directly hold parameters, as they were before anything wrapped the modules.
    Modules that an adapter added are not listed. The network itself is listed as "" if it directly holds parameters."""
    holders = [n for n, child in module.named_modules() if next(child.parameters(recurse=False), None) is not None]
    return _unwrapped(module, holders)


def _unwrapped(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    wrapped = {name.split(_BASE)[0] for name, _ in module.named_modules() if _BASE in name}
    out: list[str] = []
    for name in names:
        plain = name
        while plain.endswith(_BASE):
            plain = plain.removesuffix(_BASE)
        parts = name.split(".")
        inside = plain == name and any(".".join(parts[:i]) in wrapped for i in range(1, len(parts)))
        if not inside:
            out.append(plain)
    return tuple(dict.fromkeys(out))


def there_are(table: Mapping[str, Sequence[RoleSpec]], components: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Returns the roles of a table that match something in these networks, sorted by name."""
    names = _Names(components)
    return tuple(sorted(role for role, specs in table.items() if any(names.of(spec) for spec in specs)))


def resolve(
    role: str, table: Mapping[str, Sequence[RoleSpec]], components: Mapping[str, nn.Module], family: str
) -> tuple[Group, ...]:
    """Returns the groups of a role, one per component.

    Raises:
        ValueError: when the family has no such role, or when the role matches nothing in this network. The message lists
            the available roles.
    """
    if role not in table:
        raise ValueError(f"{family}: {unknown(role, there_are(table, components), 'role')}")
    names = _Names(components)
    matches = [(spec, names.of(spec)) for spec in table[role]]
    groups = [Group(role, spec.component, names, spec.resolution, spec.note) for spec, names in matches if names]
    if not groups:
        where = ", ".join(spec.component for spec in table[role])
        listed = ", ".join(there_are(table, components))
        raise ValueError(f"{family}: role {role!r} matches no layer of this {where}. Available: {listed}.")
    return tuple(groups)


class _Names:
    """Finds the module names that match a spec, and caches the list of names in each network."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components
        self._known: dict[tuple[str, str], tuple[str, ...]] = {}

    def of(self, spec: RoleSpec) -> tuple[str, ...]:
        """Returns the names that match a spec."""
        key = (spec.component, spec.of)
        if key not in self._known:
            list_names = leaf_names if spec.of == "layers" else parameter_holders
            self._known[key] = list_names(self._components[spec.component])
        return tuple(n for n in self._known[key] if re.fullmatch(spec.pattern, n))
