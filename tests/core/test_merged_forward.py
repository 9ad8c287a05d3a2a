"""LoRA layers that compute with W + s B A give what peft's own forward gives, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from shared.trainable import Lora
from shared.trainable import merged_forward as merging

ROLES = ("self_attention", "cross_attention", "feed_forward", "conv", "proj", "text_encoder")
EXACT = {"atol": 1e-10, "rtol": 1e-8}


def inject(backbone: Any, name: str, rank: int, roles: tuple[str, ...] = ROLES, **changes: Any) -> list[Tensor]:
    """An adapter with random weights in both factors."""
    group = Lora(roles=roles, rank=rank, **changes).inject(backbone, name, "lora", seed=rank)
    draw = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return list(group.parameters)


def double(backbone: Any) -> Any:
    return backbone.to(dtype=torch.float64)


def computed(backbone: Any, parameters: list[Tensor], rows: int = 16) -> list[Tensor]:
    """The prediction, and the gradients of x and of the parameters; float64."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, 8, 8, generator=draw, dtype=torch.float64).requires_grad_(True)
    t = torch.linspace(1, 999, rows).long()
    out = backbone.predict(x, t, backbone.encode(["a photo of a mug on the beach"] * rows))
    wanted = [p for p in parameters if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().mean(), [x, *wanted])]


@contextmanager
def peft_s_own(backbone: Any) -> Iterator[None]:
    """Inside, layers compute as peft has them."""
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
    """The shapes of the weights that were merged."""
    seen: list[tuple[int, ...]] = []
    plain: Callable[..., Tensor] = merging._merged

    def noted(weight: Tensor, pairs: Any) -> Tensor:
        seen.append(tuple(weight.shape))
        return plain(weight, pairs)

    monkeypatch.setattr(merging, "_merged", noted)
    return seen


@pytest.mark.parametrize("rank", [2, 24])  # gradients through r columns; through the whole weight
@pytest.mark.parametrize("by_autograd", [True, False])
def test_output_and_gradients_are_peft_s(
    sd: Any, merges: list[Any], monkeypatch: pytest.MonkeyPatch, rank: int, by_autograd: bool
) -> None:
    monkeypatch.setattr(merging, "_OVERHEAD", 2**62 if by_autograd else -(2**62))
    parameters = inject(sd, "mug", rank)
    found = computed(double(sd), parameters)
    kinds = {(len(shape), shape[-1]) for shape in merges}
    assert {kind for kind in kinds if kind[0] == 4} == {(4, 1), (4, 3)} and any(kind[0] == 2 for kind in kinds)
    with peft_s_own(sd):
        expected = computed(sd, parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert len(found) == 2 + len(parameters) and all(bool(grad.abs().sum() > 0) for grad in found)


@pytest.mark.parametrize("overhead", [-(2**62), 2**62])
def test_several_adapters_with_strengths_and_one_in_training(
    sd: Any, merges: list[Any], monkeypatch: pytest.MonkeyPatch, overhead: int
) -> None:
    monkeypatch.setattr(merging, "_OVERHEAD", overhead)
    loaded = inject(sd, "loaded", 3)
    for parameter in loaded:
        parameter.requires_grad_(False)
    trained = inject(sd, "mug", 4, ("self_attention", "conv"), alpha=2.0)
    double(sd)
    for strengths in ({"loaded": 0.7, "mug": 1.0}, {"mug": 0.3}, {"loaded": 1.0}, {}):
        merges.clear()
        with sd.active(strengths):
            found = computed(sd, trained) if "mug" in strengths else [sd_output(sd)]
            assert bool(merges) == bool(strengths)
            with peft_s_own(sd):
                expected = computed(sd, trained) if "mug" in strengths else [sd_output(sd)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    assert all(p.grad is None for p in loaded)


@torch.no_grad()
def sd_output(backbone: Any, dtype: torch.dtype = torch.float64, rows: int = 16, time: int = 500) -> Tensor:
    x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return backbone.predict(x, torch.full((rows,), time), backbone.encode(["a photo of a mug"] * rows))


def test_what_stands_between_the_factors_is_left_to_peft(sd: Any, merges: list[Any]) -> None:
    for changes in ({"dropout": 0.5}, {"dora": True}):
        inject(sd, "mug", 4, ROLES[:-1], **changes)
        sd_output(sd, torch.float32)
        assert not merges, changes
        sd.remove("mug")


def test_a_rank_that_falls_with_the_noise_is_merged_where_all_rows_have_the_same(sd: Any, merges: list[Any]) -> None:
    parameters = inject(sd, "mug", 8, ROLES[:-1], min_rank=0)
    double(sd)
    seen = []
    for time in (0, 500, 800, 999):
        merges.clear()
        seen.append(sd_output(sd, time=time))
        assert bool(merges) == (time < 900)  # nothing acts at full noise
        with peft_s_own(sd):
            torch.testing.assert_close(seen[-1], sd_output(sd, time=time), **EXACT)
    assert not torch.equal(seen[0], seen[1])
    merges.clear()
    computed(sd, parameters)  # rows of several times, in training
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


def test_a_layer_whose_weight_is_trained_too_is_left_to_peft(sd: Any, merges: list[Any]) -> None:
    inject(sd, "mug", 4, ("conv",))
    layers = [m for m in sd.unet.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.get_base_layer().weight.requires_grad_(True)
    sd.predict(torch.randn(16, 4, 8, 8), torch.tensor(5), sd.encode(["a mug"] * 16)).square().mean().backward()
    assert not merges and all(bool(layer.get_base_layer().weight.grad.abs().sum() > 0) for layer in layers)


def test_few_rows_are_left_to_peft(sd: Any, merges: list[Any]) -> None:
    inject(sd, "mug", 4, ("conv",))
    sd_output(sd, torch.float32, rows=1)
    few = set(merges)
    merges.clear()
    sd_output(sd, torch.float32, rows=16)
    assert few < set(merges)


def test_a_start_is_the_base_bit_for_bit_and_ejecting_leaves_no_trace(sd: Any) -> None:
    before = sd_output(sd, torch.float32)
    Lora(roles=ROLES, rank=4).inject(sd, "mug", "lora", seed=0)
    assert torch.equal(sd_output(sd, torch.float32), before)
    sd.remove("mug")
    assert torch.equal(sd_output(sd, torch.float32), before)
    assert not any("forward" in vars(m) for c in sd.components.values() for m in c.modules())


def test_recomputed_layers_give_the_same_gradients(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.train.memory import recomputed

    monkeypatch.setattr(merging, "_OVERHEAD", -(2**62))
    parameters = inject(sd, "mug", 4, ROLES[:-1])
    expected = computed(double(sd), parameters)
    with recomputed(sd, True):
        sd.unet.train()
        for a, b in zip(computed(sd, parameters), expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
