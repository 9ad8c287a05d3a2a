"""Tiny backbones for the tests of assets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone


@pytest.fixture
def new_sd(make_tiny_sd: Callable[..., Any]) -> Callable[..., StableDiffusionBackbone]:
    return lambda seed=0, **changes: StableDiffusionBackbone(make_tiny_sd(seed, **changes), "tiny")


@pytest.fixture
def sd(new_sd: Callable[..., StableDiffusionBackbone]) -> StableDiffusionBackbone:
    return new_sd()


@pytest.fixture
def flux(tiny_flux: Any) -> FluxBackbone:
    return FluxBackbone(tiny_flux, "tiny")
