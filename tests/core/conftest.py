"""Fixtures that provide tiny backbones of both families, and photos to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.core.runs import paint


@pytest.fixture
def sd(tiny_sd: Any) -> StableDiffusionBackbone:
    return StableDiffusionBackbone(tiny_sd, "tiny")


@pytest.fixture
def flux(tiny_flux: Any) -> FluxBackbone:
    return FluxBackbone(tiny_flux, "tiny")


@pytest.fixture(params=["sd", "flux"])
def backbone(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def new_sd(make_tiny_sd: Callable[..., Any]) -> Callable[..., StableDiffusionBackbone]:
    return lambda seed=0, **changes: StableDiffusionBackbone(make_tiny_sd(seed, **changes), "tiny")


@pytest.fixture
def new_flux(make_tiny_flux: Callable[..., Any]) -> Callable[..., FluxBackbone]:
    return lambda seed=0: FluxBackbone(make_tiny_flux(seed), "tiny-flux")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


@pytest.fixture
def tiny(make_tiny_sd):
    return lambda: StableDiffusionBackbone(make_tiny_sd(), "tiny")
