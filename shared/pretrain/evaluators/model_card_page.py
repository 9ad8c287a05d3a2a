"""Writes the model card as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

AIMS = {"class": 0.97, "background": 0.97, "main": 0.92, "second": 0.92, "view": 0.92, "retrieval": 0.95}
NAMES = {
    "main": "main colour",
    "second": "second colour (on its part)",
    "accessory_shown": "accessory, where there is one",
    "style_shown": "style, where it is not a photo",
    "main_in_photos": "main colour, photos only",
    "second_in_photos": "second colour, photos only",
    "view_in_photos": "view, photos only",
}
HEADER = """# The toybox's weights

These networks were trained from fixed seeds on pictures rendered by `shared/toybox`. They know only the toybox world,
so numbers measured with them apply only to that world. They have the same licence as this repository.
"""
HOW = """
DATA is a folder written by `shared.pretrain.toybox.dataset` or, for `identity`, by
`python -m shared.pretrain.evaluators.data FOLDER`. WORK is the folder of the checkpoint and log. The VAE
reconstructions for `--reconstructions FILE` are written by
`python -m shared.pretrain.evaluators.reconstructions DATA VAE FILE ROWS`.
"""
SWAPS = """`swap` is the share of pictures that are closer to their own caption than to the caption of the same scene
with a different value of the attribute (chance 50%). For `swap binding`, the two colours are exchanged instead.
`caption of 64` is the share of pictures whose own caption is the closest of 64 captions (chance 1.6%).
"""
POSE = {
    "azimuth_near": ("azimuth within 30°", ""),
    "captioned": ("captioned motions recognized", "95.0% clean, 90.0% reconstructed"),
    "held_out_development": ("held-out motions recognized, development", ""),
    "held_out_reporting": ("held-out motions recognized, reporting", ""),
}
MOTIONS = """Position, size, azimuth, elevation and tilt are read from single pictures. An azimuth of 0 is the front, and
azimuths are judged only at elevations below 50°. A clip's path is read from its frames, and the azimuth is tracked over
time. The recognized motion is the motion with the nearest path. Clips of captioned motions are compared with 64 paths
of each captioned motion and with standing still. Clips of held-out motions are compared with their own motion, its
look-alikes, the other motions of the split, and standing still.
"""


def page(card: dict[str, Any]) -> str:
    """Formats a card, as returned by `model_card.write_card`, as Markdown."""
    sizes = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in card["bytes"].items())
    parts = [
        HEADER,
        f"{card['bytes_in_all'] / 1e6:.1f} MB in total, as fp16 safetensors: {sizes}.\n",
        "## Backbone\n",
        _backbone_made(card["trainings"].get("backbone")),
        _backbone(card["judge"]),
        *_curve(card.get("curve")),
        "## Motion module\n",
        _motion_module(card["trainings"].get("motion_adapter"), card.get("clips")),
        "## Evaluators\n",
        _evaluators(card),
        "### CLIP\n",
        SWAPS,
        _clip(card["accuracies"]["clip"]),
        *_pose(card["accuracies"].get("pose")),
        "## How the evaluators were made\n",
        _trainings({name: t for name, t in card["trainings"].items() if "losses" in t}),
        HOW,
    ]
    return "\n".join(parts)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _ways(found: dict[str, Any]) -> list[str]:
    return ["clean" if way == "clean" else "VAE reconstructions" for way in found]


def _row(label: str, name: str, found: dict[str, dict[str, float]]) -> list[str]:
    return [label, *(_percent(way[name]) for way in found.values()), _percent(AIMS.get(name))]


def _backbone(judge: dict[str, Any] | None) -> str:
    if judge is None:
        return "Not judged yet: `pcs toybox evaluate`.\n"
    rows = []
    for name, bar in judge["bars"].items():
        value, least = ((f"{v:.1f} dB" if name.endswith("_db") else _percent(v)) for v in (bar["value"], bar["bar"]))
        ceiling = _percent(judge["instrument"].get(name))
        rows.append([name.replace("_", " "), value, least, "yes" if bar["met"] else "**no**", ceiling])
    scores = judge["scores"]
    kid = ", ".join(
        f"{name} {scores[key]:.4f} ({scores[f'{key}_floor']:.4f})"
        for key, name in (("kid", "recognizer"), ("kid_clip", "CLIP"))
    )
    return (
        f"{judge['n']} random full captions, guidance {judge['guidance']}, {judge['steps']} steps, "
        f"seed {judge['seed']}, one picture per caption, without selection.\n"
        "The last column is the recognizer's accuracy on renders of the same scenes.\n\n"
        + _table(["", "value", "bar", "met", "on renders"], rows)
        + f"\nKID between pictures and new renders, on scaled features (in brackets, between two sets of renders): {kid}.\n"
    )


def _backbone_made(training: dict[str, Any] | None) -> str:
    if training is None:
        return ""
    last = training.get("last", {})
    steps, loss = last.get("decoder", {}).get("step"), last.get("unet", {}).get("loss")
    sentences = [
        f"The text model and the U-Net saw {training['pictures']:,} pictures in training. The pictures were encoded by "
        "the shipped autoencoder.\nAn additional loss came from a reader of noisy latents "
        "(`shared/pretrain/toybox/latent_reader.py`), which none of the judges below uses.",
        f"The decoder was trained for {steps:,} more steps against a discriminator (`shared/pretrain/toybox/decoder.py`)."
        if steps
        else "",
        "All networks were trained in rounds by `pcs toybox train data vae decoder unet assemble`. Each round "
        "continued from the previously shipped weights." + (f" The U-Net's last loss was {loss}." if loss else ""),
        *(f"{name}: {line['note']}." for name, line in last.items() if "note" in line),
    ]
    return "\n".join(line for line in sentences if line) + "\n"


def _curve(curve: dict[str, Any] | None) -> list[str]:
    if not curve:
        return []
    names = [name for name in curve["points"][0] if name not in ("step", "pictures")]
    rows = [
        [f"{p['pictures']:,}", *(f"{p[k]:.4f}" if k == "kid" else _percent(p[k]) for k in names)]
        for p in curve["points"]
    ]
    return [
        "### Over training\n",
        f"{curve.get('of', 'Snapshots of the averaged weights')}, {curve['n']} captions each, guidance "
        f"{curve['guidance']} ({curve.get('by', '`pcs toybox curve`')}).\n",
        _table(["pictures seen", *(name.replace("_", " ") for name in names)], rows),
    ]


def _motion_module(training: dict[str, Any] | None, judge: dict[str, Any] | None) -> str:
    made = f"A diffusers `MotionAdapter`, trained on {training['clips']:,} captioned clips.\n" if training else ""
    if judge is None:
        return made + "Not judged yet: `pcs toybox evaluate-clips`.\n"
    rows = [
        [name.replace("_", " "), _percent(bar["value"]), _percent(bar["bar"]), "yes" if bar["met"] else "**no**", true]
        for name, bar in judge["bars"].items()
        for true in [_percent(judge["instrument"].get(name))]
    ]
    rows.append(["still", _percent(judge["scores"]["still"]), "", "", _percent(judge["instrument"]["still"])])
    return (
        f"{made}{judge['n']} random full captions, guidance {judge['guidance']}, {judge['steps']} steps, seed "
        f"{judge['seed']}, one clip of 16 frames per caption, without selection\n(`pcs toybox evaluate-clips`). "
        "`motion` means that the caption's motion was recognized. `ends agree` means that the first and last frames\n"
        "are at least as similar as in 95% of true clips. `still` means that nothing moves. The last column is for "
        "renders of the same scenes.\n\n"
        + _table(["", "value", "bar", "met", "on renders"], rows)
        + f"\nThe most common errors: {', '.join(judge['confusions']) or 'none'}.\n"
    )


def _evaluators(card: dict[str, Any]) -> str:
    found = card["accuracies"]
    recognizer, facts = found["recognizer"], found["identity_development"]["clean"]
    rows = [_row(NAMES.get(k) or k, k, recognizer) for k, v in recognizer["clean"].items() if isinstance(v, float)]
    for key in (k for k in found if k.startswith(("identity_", "faces_"))):
        kind, split = key.split("_")
        rows.append(_row(f"identity, held-out {kind.replace('identity', 'things')}, {split}", "retrieval", found[key]))
    last = list(recognizer)[-1]
    errors = [f"- {name}: " + (", ".join(pairs) or "none") for name, pairs in recognizer[last]["confusions"].items()]
    return (
        f"The evaluators were measured on {card['fresh_renders']} new renders in all styles, at scales of 0.4–1.1. The "
        f"renders' patterns and identities appear in no training picture.\nIdentities are retrieved from a gallery of "
        f"{facts['gallery']} things (the right thing and its distractors of the same class and palette),\nwith five "
        "reference pictures each. Queries show random views "
        f"(chance {_percent(facts['chance'])}).{_faceless(found)}\n\n"
        + _table(["", *_ways(recognizer), "aim"], rows)
        + f"\nThe recognizer's most common errors ({_ways(recognizer)[-1]}):\n\n"
        + "\n".join(errors)
        + "\n"
    )


def _faceless(found: dict[str, Any]) -> str:
    """Returns a sentence that states how many queries for faces show no face, or "" if these queries were not
    counted."""
    counts = [found[k]["clean"]["no_face"] for k in found if k.startswith("faces_") and "no_face" in found[k]["clean"]]
    judged = [found[k]["clean"]["queries"] for k in found if k.startswith("faces_")]
    if not counts:
        return ""
    return (
        f" Faces are judged only where a face is visible.\n{sum(counts)} of {sum(counts) + sum(judged)} queries show "
        "only hair, from behind or from above, and are left out."
    )


def _clip(found: dict[str, dict[str, float]]) -> str:
    return _table(["", *_ways(found)], [_row(name.replace("_", " "), name, found)[:-1] for name in found["clean"]])


def _pose(found: dict[str, dict[str, Any]] | None) -> list[str]:
    if found is None:
        return []
    units = {"x": " of the width", "y": " of the height", "log_scale": " of its logarithm"}
    first = next(iter(found.values()))
    rows = [
        [
            f"{name.removesuffix('_deg').replace('_', ' ')}, median error",
            *(f"{way['errors'][name]:.3g}{units.get(name, '°')}" for way in found.values()),
            "",
        ]
        for name in first["errors"]
    ]
    rows += [[label, *(_percent(way[name]) for way in found.values()), aim] for name, (label, aim) in POSE.items()]
    last = list(found)[-1]
    return [
        "### Pose\n",
        MOTIONS,
        _table(["", *_ways(found), "aim"], rows),
        f"The most common errors: {', '.join(found[last]['confusions']) or 'none'}.\n",
    ]


def _trainings(trainings: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, t in trainings.items():
        losses = ", ".join(f"{k} {v}" for k, v in t["losses"].items())
        rows.append([name, *(str(t[key]) for key in ("done", "batch_size", "lr", "seed")), losses])
    start = "python -m shared.pretrain.evaluators.train"
    commands = [
        f"{start} {name} --data DATA --work WORK --steps {t['steps']} --lr {t['lr']}" for name, t in trainings.items()
    ]
    commands = [" ".join([c, *t.get("flags", [])]) for c, t in zip(commands, trainings.values(), strict=True)]
    table = _table(["", "steps", "batch", "lr", "seed", "last losses"], rows)
    notes = "".join(f"\n{name}: {t['note']}\n" for name, t in trainings.items() if "note" in t)
    return table + "\n```\n" + "\n".join(commands) + "\n```\n" + notes
