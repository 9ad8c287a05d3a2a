"""A model has the same checkpoint identity in every precision, and different models have different identities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from shared.backbones import load_backbone
from shared.backbones.checkpoint_identity import checkpoint_identity
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone

F16, B16, F32 = torch.float16, torch.bfloat16, torch.float32


def drawn(seed: int) -> nn.Module:
    """Returns a network whose weights span the usual range of float32.

    They include values that underflow or overflow in float16, and zeros of both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    for p in layers.parameters():
        size = torch.randint(-40, 20, p.shape, generator=generator)
        values = torch.randn(p.shape, generator=generator) * 2.0**size
        p.data = torch.where(torch.rand(p.shape, generator=generator) < 0.1, values * 0, values)
    return layers


def test_rounding_does_not_change_the_identity_of_hundreds_of_models():
    for seed in range(300):
        model = drawn(seed)
        whole = checkpoint_identity({"net": model})
        for chain in ((F16,), (B16,), (F16, B16), (B16, F16), (F16, F32, B16), (B16, F32)):
            rounded = copy.deepcopy(model)
            for dtype in chain:
                rounded.to(dtype)
            assert checkpoint_identity({"net": rounded}) == whole, (seed, chain)


def test_a_model_has_one_identity_in_all_file_variants_and_precisions(tiny_sd: Any, tiny_flux: Any, tmp_path):
    for pipe, kind in ((tiny_sd, StableDiffusionBackbone), (tiny_flux, FluxBackbone)):
        whole, half = tmp_path / f"{kind.family}-32", tmp_path / f"{kind.family}-16"
        pipe.save_pretrained(whole)
        copy.deepcopy(pipe).to(F16).save_pretrained(half, variant="fp16")
        identities = {load_backbone(folder, dtype=d).checkpoint for folder in (whole, half) for d in (F32, F16, B16)}
        assert len(identities) == 1


def low_rank(weight: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Returns a rank-4 change whose standard deviation is `share` times that of the weight."""
    draw = torch.Generator().manual_seed(seed)
    change = torch.randn(weight.shape[0], 4, generator=draw) @ torch.randn(4, weight.shape[1], generator=draw)
    return share * weight.std() * change / change.std()


@pytest.mark.parametrize("share", [1e-1, 1e-2])
@pytest.mark.parametrize("role", ["cross_attention.kv", "attention"])
def test_a_low_rank_change_to_some_layers_changes_the_identity(new_sd, share, role):
    for seed in range(5):
        one, other = new_sd(seed), new_sd(seed)
        assert one.checkpoint == other.checkpoint
        for group in other.group(role):
            for name in group.modules:
                weight = other.components[group.component].get_submodule(name).weight.data
                weight += low_rank(weight, share, seed)
        networks = {**other.components, "vae": other.vae}
        assert checkpoint_identity(networks) != one.checkpoint, (seed, share)


def test_a_change_of_one_thousandth_in_one_full_size_layer_changes_the_identity():
    """Among the 65,536 sampled weights, about 65,536 / (1,000 pi) = 21 are expected to change sign."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer = nn.Linear(1280, 640, bias=False)
        before = checkpoint_identity({"net": layer})
        layer.weight.data += low_rank(layer.weight.data, 1e-3, seed)
        assert checkpoint_identity({"net": layer}) != before


def test_a_large_tensor_is_sampled_over_all_its_rows_and_columns():
    table = nn.Embedding(64, 96)
    before = checkpoint_identity({"text": table}, samples=512)
    for place in ((slice(None), slice(0, 16)), (slice(40, 44), slice(None))):
        changed = copy.deepcopy(table)
        changed.weight.data[place] *= -1
        assert checkpoint_identity({"text": changed}, samples=512) != before
