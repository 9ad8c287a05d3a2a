"""Random low-rank pairs under the key names that trainers use, and two references to compare an import with.

One reference adds the pairs to the weights, and the other uses diffusers' own loader.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.concept import attach
from shared.concept.lora_import import import_lora

LORA = "pytorch_lora_weights.safetensors"
PROMPT = "a photo of a sks mug"
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
#: Roles that together cover every kind of layer.
SD_ROLES = ("attention", "feed_forward", "proj", "conv")
FLUX_ROLES = ("attention", "feed_forward", "proj")
TEXT = ("text_encoder", "text_encoder.mlp")

Pairs = dict[tuple[str, str], tuple[Tensor, Tensor, float]]  # (component, path) -> (down, up, alpha)


def low_rank(backbone: Any, roles: tuple[str, ...], ranks: tuple[int, ...] = (4, 2, 3), scaled: bool = True) -> Pairs:
    """Returns random pairs for every layer of the given roles, with ranks that cycle through `ranks`.

    If `scaled`, the alphas vary from layer to layer. Otherwise, each alpha equals the rank, which gives a scale of 1.
    """
    draw = torch.Generator().manual_seed(1)
    out: Pairs = {}
    for group in (group for role in roles for group in backbone.group(role)):
        for path in group.modules:
            weight = backbone.components[group.component].get_submodule(path).weight
            rank = ranks[len(out) % len(ranks)]
            down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
            up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
            alpha = (rank, 1.0, 0.7 * rank)[len(out) % 3] if scaled else rank
            out[group.component, path] = down, up, alpha
    return out


def output(backbone: Any) -> tuple[Tensor, Tensor]:
    """Returns the denoiser's output and the text context, both computed with all attached concepts in effect."""
    with torch.no_grad():
        text = backbone.encode([PROMPT])
        x = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(3))
        return backbone.predict(x, torch.tensor([300]), text), text.context


def merged(backbone: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Returns the outputs after adding each pair's product to its layer's weight, which is what a LoRA amounts to."""
    weights = {key: backbone.components[key[0]].get_submodule(key[1]).weight for key in pairs}
    before = {key: weight.data.clone() for key, weight in weights.items()}
    for key, (down, up, alpha) in pairs.items():
        delta = up.flatten(1).double() @ down.flatten(1).double() * (alpha / len(down))
        weights[key].data = (before[key].double() + delta.view(before[key].shape)).float()
    try:
        return output(backbone)
    finally:
        for key, weight in weights.items():
            weight.data = before[key]


def imported(backbone: Any, path: Path, token: str = "sks mug") -> tuple[Tensor, Tensor]:
    """Imports the file, attaches the concept and returns the outputs.

    Checks that no warning is issued and that removing the concept restores the backbone.
    """
    before = output(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = import_lora(path, backbone, token)
        attach(concept, backbone)
    after = output(backbone)
    assert (after[0] - before[0]).abs().max() > 0.01
    backbone.remove(concept.name)
    assert all(torch.equal(a, b) for a, b in zip(before, output(backbone), strict=True))
    return after


def by_diffusers(backbone: Any, pipe: Any, path: Path) -> tuple[Tensor, Tensor]:
    """Returns the same outputs after diffusers itself has loaded the file into a pipeline with the same weights."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    return output(type(backbone)(pipe, "theirs"))


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def spelled(
    pairs: Pairs, prefixes: Mapping[str, str], ends: tuple[str, str], flat: bool, alphas: bool
) -> dict[str, Tensor]:
    """Returns the pairs' tensors by key. Keys of CLIP layers have the prefix `text_model.`, as in real files."""
    out: dict[str, Tensor] = {}
    for (component, path), (down, up, alpha) in pairs.items():
        clip = component == "text_encoder" and not path.startswith("text_model.")
        full = ("text_model." if clip else "") + path
        name = prefixes[component] + (full.replace(".", "_") if flat else full)
        out |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        out |= {f"{name}.alpha": torch.tensor(float(alpha))} if alphas else {}
    return {key: tensor.contiguous() for key, tensor in out.items()}


def kohya(pairs: Pairs, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    return spelled(pairs, prefixes, ("lora_down", "lora_up"), flat=True, alphas=True)


SD_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SD_DOTTED = {"unet": "unet.", "text_encoder": "text_encoder."}
FLUX_DOTTED = {"transformer": "transformer.", "text_encoder": "text_encoder."}
