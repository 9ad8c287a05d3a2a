"""Describes a concept for `pcs concept show`."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

from shared.concept.concept_folder import Concept
from shared.concept.learning_record import LearnedWith
from shared.io.terminal import printable
from shared.io.trajectory_settings import Trajectory


def described(concept: Concept) -> list[tuple[str, str]]:
    """Returns (label, text) pairs in the order in which they are shown. Pairs with an empty text are left out."""
    meta = concept.meta
    texts = [
        ("name", meta.name),
        ("kind", f"{meta.kind} ({meta.class_noun})" if meta.class_noun else meta.kind),
        ("named by", _modifier(meta.modifier)),
        ("learned on", f"{meta.backbone.name} ({meta.backbone.family}, checkpoint {meta.backbone.checkpoint[:12]})"),
        ("adapters", "; ".join(_adapters(concept))),
        (
            "embeddings",
            "; ".join(f"{key}: {' × '.join(map(str, v.shape))}" for key, v in concept.learned_words.items()),
        ),
        ("weights", "; ".join(_weights(concept))),
        ("branches", "; ".join(_branches(concept))),
        ("attention", "; ".join(part.taxonomy for part in meta.attention.values())),
        ("trajectory", _trajectory(meta.learned_with.sampling.trajectory)),
        ("parameters", f"{parameters(concept):,}"),
        ("files", "; ".join(f"{name} {_bytes(size)}" for name, size in sizes(concept).items())),
        ("recipe", _recipe(meta.learned_with)),
        ("stand-ins", "; ".join(meta.ports)),
        ("metrics", "; ".join(f"{k} {_short(v, k)}" for k, v in meta.metrics.items() if v is not None)),
        ("references", _listed([r.file for r in meta.references])),
        ("made", ", ".join(t for t in (meta.created, f"seed {meta.seed}", _versions(meta.versions)) if t)),
        ("use", _use(concept)),
    ]
    return [(label, printable(text, line=True)) for label, text in texts if text]


def lines(concept: Concept) -> list[str]:
    """Describes a concept in lines of plain text."""
    labelled = described(concept)
    width = max(len(label) for label, _ in labelled)
    return [f"{label:<{width}}  {text}" for label, text in labelled]


def describe(concept: Concept) -> Any:
    """Describes a concept in a `rich` table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in described(concept):
        table.add_row(label, Text(text))  # `Text`, so that nothing in the file is parsed as markup
    return table


def as_json(concept: Concept) -> dict[str, Any]:
    """Returns the contents of `concept.json`, the number of parameters and the size of each file in bytes."""
    out = json.loads(concept.meta.model_dump_json())
    return {**out, "parameters": parameters(concept), "bytes": sizes(concept)}


def parameters(concept: Concept) -> int:
    """Returns the number of learned parameters."""
    kept = (t for kind, tensors in concept.tensors.items() if kind != "embeddings" for t in tensors.values())
    return sum(t.numel() for t in (*kept, *concept.learned_words.values()))


def sizes(concept: Concept) -> dict[str, int]:
    """Returns the size in bytes of each file in the concept's folder. The result is empty for an unsaved concept."""
    if concept.path is None:
        return {}
    return {p.name: p.stat().st_size for p in sorted(concept.path.iterdir()) if p.is_file()}


def _modifier(modifier: Mapping[str, Any]) -> str:
    kind = str(modifier.get("kind", "")).replace("_", " ")
    settings = ", ".join(f"{k} {v}" for k, v in modifier.items() if k != "kind" and v not in ("", None, False))
    return f"{kind} ({settings})" if settings else kind


def _adapters(concept: Concept) -> list[str]:
    out = []
    for slot, components in concept.meta.adapters.items():
        for component, settings in components.items():
            kind = "DoRA" if settings.get("use_dora") else str(settings.get("peft_type", "?"))
            rank = f" rank {settings['r']}" if settings.get("r") is not None else ""
            rank += f" (down to {settings['min_rank']} at full noise)" if "min_rank" in settings else ""
            alpha = f" alpha {settings['lora_alpha']}" if settings.get("lora_alpha") is not None else ""
            out.append(
                f"{slot}: {kind}{rank}{alpha} on {len(settings.get('target_modules', []))} layers in {component}"
            )
    return out


def _weights(concept: Concept) -> list[str]:
    return [
        f"{slot}: {len(paths)} changed tensors in {component}"
        for slot, components in concept.meta.weights.items()
        for component, paths in components.items()
    ]


def _branches(concept: Concept) -> list[str]:
    return [
        f"{slot}: {settings.form.kind.replace('_', ' ')} in {len(settings.layers)} layers of {component}"
        for slot, components in concept.meta.branches.items()
        for component, settings in components.items()
    ]


def _trajectory(found: Trajectory | None) -> str:
    if found is None or not found.points:
        return ""
    right, down, _ = (max(column) - min(column) for column in zip(*found.points, strict=True))
    reach = f"{right:.0%} of the width and {down:.0%} of the height"
    layers = ", without a motion module" if found.layers == "image" else ""
    return f"{len(found.points)} points over {reach}, followed from {found.start:.0%} of the steps on{layers}"


def _recipe(learned: LearnedWith) -> str:
    train = learned.train
    steps = f"{train.steps} steps" if train.steps is not None else ""
    if learned.phases:  # a phase without its own number of steps uses the recipe's number
        steps_of = {name: phase.train.steps for name, phase in learned.phases.items()}
        counts = {name: train.steps if n is None else n for name, n in steps_of.items()}
        steps = " then ".join(name if n is None else f"{name} {n} steps" for name, n in counts.items())
    batch = f"batch {train.batch_size}" if train.batch_size is not None else ""
    return ", ".join(f for f in (learned.method, steps, batch) if f)


def _short(value: Any, key: str) -> str:
    if isinstance(value, int | float) and key.endswith("_memory"):
        return f"{value / 2**20:.0f} MiB"
    short = f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return f"{short} s" if key.endswith("_seconds") else short


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _versions(versions: Mapping[str, str]) -> str:
    return " ".join(f"{k} {v}" for k, v in versions.items())


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _use(concept: Concept) -> str:
    """Returns an example command that uses the concept. A style takes effect without being named in the prompt."""
    folder = shlex.quote(concept.path.name if concept.path else f"{concept.meta.name}.concept")
    if concept.meta.kind == "motion":
        return f'pcs video generate "a photo of a mug <{concept.meta.name}> on the beach" --concept {folder} --out clip.mp4'
    named = concept.meta.kind in ("subject", "identity")
    prompt = f"a photo of a <{concept.meta.name}> on the beach" if named else "a photo of a mug on the beach"
    return f'pcs image generate "{prompt}" --concept {folder} --out pictures'
