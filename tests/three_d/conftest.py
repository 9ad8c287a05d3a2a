"""Fixtures for the asset tests: tiny backbones and the `threestudio` module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.three_d.threestudio_checkouts import CHECKOUT, CONTRACT, registry


@pytest.fixture
def new_sd(make_tiny_sd: Callable[..., Any]) -> Callable[..., StableDiffusionBackbone]:
    return lambda seed=0, **changes: StableDiffusionBackbone(make_tiny_sd(seed, **changes), "tiny")


@pytest.fixture
def sd(new_sd: Callable[..., StableDiffusionBackbone]) -> StableDiffusionBackbone:
    return new_sd()


@pytest.fixture
def flux(tiny_flux: Any) -> FluxBackbone:
    return FluxBackbone(tiny_flux, "tiny")


@pytest.fixture(scope="module", params=["contract", "checkout"])
def threestudio(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yields the `threestudio` module of the stand-in or of a real checkout, with the extension registered."""
    if request.param == "checkout" and not CHECKOUT:
        pytest.skip("no threestudio checkout: set PCS_THREESTUDIO=DIR")
    with registry(str(CONTRACT if request.param == "contract" else CHECKOUT)) as found:
        yield found
