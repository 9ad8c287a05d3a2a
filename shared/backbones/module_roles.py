"""Roles: names for groups of modules that hold in every architecture, resolved by patterns over leaf names.

A family gives a table `role -> RoleSpec`s. Names are those of the untouched network: wrappers that peft puts around a
layer (`to_k.base_layer`, `to_k.lora_A.default`) do not show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from shared.backbones.protocol import Group, Resolution
from shared.config import unknown

LEAVES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BASE = ".base_layer"


@dataclass(frozen=True)
class RoleSpec:
    """Leaves of `component` whose dotted name matches `pattern` in full."""

    component: str
    pattern: str
    resolution: Resolution = "exact"
    note: str = ""


def leaf_names(module: nn.Module) -> tuple[str, ...]:
    """Dotted names of the linear and convolution layers of `module`, as they were before anything wrapped them.

    Args:
        module: any network; layers inside an adapter's wrapper are not listed, the wrapped layer is, under its own name
    """
    leaves = [name for name, child in module.named_modules() if isinstance(child, LEAVES)]
    wrapped = {name.split(_BASE)[0] for name in (n for n, _ in module.named_modules()) if _BASE in name}
    out: list[str] = []
    for name in leaves:
        plain = name
        while plain.endswith(_BASE):
            plain = plain.removesuffix(_BASE)
        parts = name.split(".")
        inside = plain == name and any(".".join(parts[:i]) in wrapped for i in range(1, len(parts)))
        if not inside:
            out.append(plain)
    return tuple(dict.fromkeys(out))


def resolve(
    role: str, table: Mapping[str, Sequence[RoleSpec]], components: Mapping[str, nn.Module], family: str
) -> tuple[Group, ...]:
    """The groups of a role, one per component.

    Raises:
        ValueError: when the family has no such role, or it matches nothing in this network; both list the roles
    """
    if role not in table:
        raise ValueError(f"{family}: {unknown(role, table, 'role')}")
    groups = []
    for spec in table[role]:
        names = tuple(n for n in leaf_names(components[spec.component]) if re.fullmatch(spec.pattern, n))
        if names:
            groups.append(Group(role, spec.component, names, spec.resolution, spec.note))
    if not groups:
        where = ", ".join(spec.component for spec in table[role])
        raise ValueError(
            f"{family}: role {role!r} matches no layer of this {where}. There are: {', '.join(sorted(table))}."
        )
    return tuple(groups)
