"""LoRA layers that compute with the merged weight W + s B A give the same results as peft's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.trainable import Lora
from shared.trainable import merged_forward as merging

ROLES = ("self_attention", "cross_attention", "feed_forward", "conv", "proj", "text_encoder")
EXACT = {"atol": 1e-10, "rtol": 1e-8}


def inject(backbone: Any, name: str, rank: int, roles: tuple[str, ...] = ROLES, **changes: Any) -> list[Tensor]:
    """Injects an adapter, sets both of its factors to random values, and returns its parameters."""
    group = Lora(roles=roles, rank=rank, **changes).inject(backbone, name, "lora", seed=rank)
    draw = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return list(group.parameters)


def double(backbone: Any) -> Any:
    return backbone.to(dtype=torch.float64)


@pytest.fixture(autouse=True)
def inside() -> Iterator[None]:
    with merging.merged_layers():
        yield


@contextmanager
def unmerged_peft(backbone: Any) -> Iterator[None]:
    """A context in which layers use peft's own forward pass."""
    ours = {
        m: vars(m).pop("forward") for c in backbone.components.values() for m in c.modules() if "forward" in vars(m)
    }
    assert ours
    try:
        yield
    finally:
        for layer, forward in ours.items():
            layer.forward = forward


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that records the shapes of merged weights."""
    seen: list[tuple[int, ...]] = []
    plain: Callable[..., Tensor] = merging._merged

    def noted(weight: Tensor, pairs: Any) -> Tensor:
        seen.append(tuple(weight.shape))
        return plain(weight, pairs)

    monkeypatch.setattr(merging, "_merged", noted)
    return seen


def test_the_output_matches_peft_and_training_uses_peft_itself(sd: Any, merges: list[Any]) -> None:
    inject(sd, "mug", 4)
    found = sd_output(double(sd))
    assert {(len(s), s[-1]) for s in merges if len(s) == 4} == {(4, 1), (4, 3)} and any(len(s) == 2 for s in merges)
    with unmerged_peft(sd):
        torch.testing.assert_close(found, sd_output(sd), **EXACT)
    merges.clear()
    sd.predict(torch.randn(16, 4, 8, 8).double(), torch.tensor(5), sd.encode(["a mug"] * 16))
    assert not merges


def test_several_adapters_are_merged_with_their_strengths(sd: Any, merges: list[Any]) -> None:
    inject(sd, "loaded", 3)
    inject(sd, "mug", 4, ("self_attention", "conv"), alpha=2.0)
    double(sd)
    for strengths in ({"loaded": 0.7, "mug": 1.0}, {"mug": 0.3}, {"loaded": 1.0}, {}):
        merges.clear()
        with sd.active(strengths):
            found = sd_output(sd)
            assert bool(merges) == bool(strengths)
            with unmerged_peft(sd):
                torch.testing.assert_close(found, sd_output(sd), **EXACT)


@torch.no_grad()
def sd_output(backbone: Any, dtype: torch.dtype = torch.float64, rows: int = 16, time: int = 500) -> Tensor:
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return backbone.predict(x, torch.full((rows,), time), backbone.encode(["a photo of a mug"] * rows))


def test_dropout_and_dora_are_left_to_peft(sd: Any, merges: list[Any]) -> None:
    for changes in ({"dropout": 0.5}, {"dora": True}):
        inject(sd, "mug", 4, ROLES[:-1], **changes)
        sd_output(sd, torch.float32)
        assert not merges, changes
        sd.remove("mug")


def test_an_adapter_with_noise_dependent_rank_is_merged_if_all_rows_share_one_time(sd: Any, merges: list[Any]) -> None:
    inject(sd, "mug", 8, ROLES[:-1], min_rank=0)
    double(sd)
    seen = []
    for time in (0, 500, 800, 999):
        merges.clear()
        seen.append(sd_output(sd, time=time))
        assert bool(merges) == (time < 900)  # close to full noise, the rank is 0
        with unmerged_peft(sd):
            torch.testing.assert_close(seen[-1], sd_output(sd, time=time), **EXACT)
    assert not torch.equal(seen[0], seen[1])
    merges.clear()
    with torch.no_grad():  # the rows have different times
        times = torch.linspace(1, 999, 16).long()
        sd.predict(torch.randn(16, 4, 8, 8).double(), times, sd.encode(["a mug"] * 16))
    assert not merges


def test_half_precision_and_autocast_are_left_to_peft(new_sd: Any, merges: list[Any]) -> None:
    backbone = new_sd().to(dtype=torch.bfloat16)
    inject(backbone, "mug", 4)
    sd_output(backbone, torch.bfloat16)
    full = new_sd()
    inject(full, "mug", 4)
    merges.clear()
    with torch.autocast("cpu", torch.bfloat16):
        sd_output(full, torch.float32)
    assert not merges


def test_small_inputs_are_left_to_peft(sd: Any, merges: list[Any]) -> None:
    inject(sd, "mug", 4, ("conv",))
    sd_output(sd, torch.float32, rows=1)
    few = set(merges)
    merges.clear()
    sd_output(sd, torch.float32, rows=16)
    assert few < set(merges)


def test_a_new_adapter_changes_nothing_and_leaves_no_trace_when_it_is_removed(sd: Any) -> None:
    before = sd_output(sd, torch.float32)
    Lora(roles=ROLES, rank=4).inject(sd, "mug", "lora", seed=0)
    assert torch.equal(sd_output(sd, torch.float32), before)
    sd.remove("mug")
    assert torch.equal(sd_output(sd, torch.float32), before)
    assert not any("forward" in vars(m) for c in sd.components.values() for m in c.modules())


def test_layers_are_merged_only_for_sampling(new_sd: Any, merges: list[Any]) -> None:
    """Outside `merged_layers`, predictions equal those of peft's own forward pass bit for bit."""
    backbone = new_sd()
    inject(backbone, "mug", 4)

    def predictions() -> None:
        found = sd_output(backbone, torch.float32)
        assert not merges
        with unmerged_peft(backbone):
            assert torch.equal(found, sd_output(backbone, torch.float32))
        sample(backbone, ["a mug"] * 4, seeds=[0, 1, 2, 3], settings=SamplingSettings(steps=1))
        assert merges

    Context().run(predictions)
