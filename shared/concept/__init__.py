"""Saved concepts. A concept is one folder, and nothing in it is executed when it is read. Importing this package loads no
model library."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.concept.attaching import attach, detach
    from shared.concept.capturing import capture
    from shared.concept.concept_folder import Concept, read, save
    from shared.concept.export_formats import export
    from shared.concept.fitting import fits
    from shared.concept.lora_import import import_lora
    from shared.concept.open_backbone import load_backbone_of
    from shared.concept.provenance import Provenance
    from shared.concept.schema import ConceptMeta
    from shared.concept.show import as_json, describe, lines

_HOME = {
    **dict.fromkeys(("attach", "detach"), "attaching"),
    "capture": "capturing",
    "export": "export_formats",
    **dict.fromkeys(("Concept", "read", "save"), "concept_folder"),
    "ConceptMeta": "schema",
    "Provenance": "provenance",
    "fits": "fitting",
    "import_lora": "lora_import",
    "load_backbone_of": "open_backbone",
    **dict.fromkeys(("as_json", "describe", "lines"), "show"),
}

__all__ = [
    "Concept",
    "ConceptMeta",
    "Provenance",
    "as_json",
    "attach",
    "capture",
    "describe",
    "detach",
    "export",
    "fits",
    "import_lora",
    "lines",
    "load_backbone_of",
    "read",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
