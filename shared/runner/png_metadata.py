"""Records in a picture's file how the picture was generated."""

from __future__ import annotations

import json

from shared.concept.provenance import portable, public_name
from shared.prompts import expand, names_in
from shared.runner.loaded_concepts import Painter
from shared.sampling.settings import SamplingSettings


def metadata(prompt: str, seed: int, runner: Painter, settings: SamplingSettings) -> dict[str, str]:
    """Returns the PNG metadata of a picture, with everything needed to generate the picture again. Models and
    files are recorded without their folders, because pictures may be shared. `checkpoint` identifies the model's
    weights."""
    backbone, stated = runner.backbone, settings.stated()
    made = {
        "steps": backbone.default_steps,
        "guidance": backbone.default_guidance,
        "height": backbone.resolution,
        "width": backbone.resolution,
        **stated,
        "negative": settings.negative,
        "hooks": portable([hook.model_dump(mode="json") for hook in settings.hooks]),  # type: ignore[attr-defined]
    }
    about = {
        "prompt": prompt,
        "expanded": expand(prompt, backbone.placeholders),
        "seed": seed,
        "concepts": {name: backbone.strengths.get(name, loaded.reach) for name, loaded in runner.loaded.items()},
        "named": list(names_in(prompt)),
        "backbone": public_name(backbone.name),
        "checkpoint": backbone.checkpoint,
        **made,
    }
    return {"pcs": json.dumps(about), "Software": "pcs", "Description": prompt}
