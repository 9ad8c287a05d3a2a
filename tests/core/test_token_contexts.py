"""Tests tokens whose embeddings vary with time and with the attention site that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.types import SiteContext
from tests.core.placeholders import WIDTH, FixedPlaceholder

# --- embeddings that vary with time -------------------------------------------------------------------------


def timed(c: str, t: Tensor | None, s: str | None) -> Tensor:
    assert t is not None and s is None
    return (t[:, None, None] / 1000).expand(-1, 1, WIDTH[c])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_embeddings_can_vary_with_time(family: str, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(family)
    backbone.add_placeholder(FixedPlaceholder("x", ("<x>",), timed, ("time",)))
    assert backbone.varies_with(["a <x>"]) == {"time"} and backbone.varies_with(["a dog"]) == frozenset()
    with pytest.raises(ValueError, match="vary with time"):
        backbone.encode(["a <x>"])
    both = backbone.encode(["a <x>", "a <x>"], torch.tensor([100.0, 900.0]))
    assert not torch.allclose(both.context[0], both.context[1])
    alone = backbone.encode(["a <x>"], torch.tensor(900.0))  # a scalar t applies to all rows
    assert torch.allclose(alone.context[0], both.context[1], atol=1e-6)
    if family == "flux":
        assert torch.allclose(alone.pooled[0], both.pooled[1], atol=1e-6)
    assert torch.equal(backbone.encode(["a dog"]).context, backbone.encode(["a dog"], torch.tensor(3.0)).context)


# --- embeddings that vary with the site ---------------------------------------------------------------------


def by_site(backbone: StableDiffusionBackbone, equal: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(1, 16, generator=generator)
    return {s: one.clone() if equal else torch.randn(1, 16, generator=generator) for s in backbone.text_sites()}


def count_runs(backbone: StableDiffusionBackbone) -> tuple[list[int], Any]:
    runs: list[int] = []
    return runs, backbone.components["text_encoder"].register_forward_hook(lambda *_: runs.append(1))


def test_equal_rows_at_all_sites_give_the_same_prediction_as_the_plain_path(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: next(iter(rows.values()))))
    plain = sd.predict(x, t, sd.encode(["a <x>", "a dog"]))
    sd.remove("x")
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    runs, handle = count_runs(sd)
    conditioning = sd.encode(["a <x>", "a dog"])
    handle.remove()
    assert len(runs) == 1  # equal rows that are not trained need only one run of the text encoder
    assert set(conditioning.context) == set(sd.text_sites())
    assert torch.equal(sd.predict(x, t, conditioning), plain)


def test_each_site_reads_its_own_rows(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=False)
    seen: dict[str, Tensor] = {}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    conditioning = sd.encode(["a <x>"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    first = sd.predict(x, t, conditioning)
    handles = [
        sd.unet.get_submodule(f"{site}.{leaf}").register_forward_hook(
            lambda m, a, out, key=f"{site}.{leaf}": seen.__setitem__(key, out)
        )
        for site in sd.text_sites()
        for leaf in ("to_k", "to_v")
    ]
    assert torch.equal(sd.predict(x, t, conditioning), first)
    for handle in handles:
        handle.remove()
    for site in sd.text_sites():
        sd.remove("x")  # the plain path with only this site's rows gives the expected values
        sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s, site=site: rows[site]))
        context = sd.encode(["a <x>"]).context
        for leaf in ("to_k", "to_v"):
            assert torch.allclose(seen[f"{site}.{leaf}"], sd.unet.get_submodule(f"{site}.{leaf}")(context), atol=1e-6)
    swapped = dict(zip(sd.text_sites(), reversed(list(rows.values())), strict=True))
    sd.remove("x")
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: swapped[s or ""], ("site",)))
    assert not torch.allclose(sd.predict(x, t, sd.encode(["a <x>"])), first, atol=1e-5)


def test_the_rows_of_different_sites_have_different_gradients_even_if_they_start_out_equal(
    sd: StableDiffusionBackbone,
) -> None:
    rows = {s: nn.Parameter(v) for s, v in by_site(sd, equal=True).items()}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    sd.predict(torch.randn(1, 4, 8, 8), torch.tensor(10), sd.encode(["a <x>"])).square().mean().backward()
    gradients = [p.grad for p in rows.values()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert len({tuple(g.flatten().tolist()) for g in gradients if g is not None}) == len(rows)


def test_gradient_checkpointing_does_not_change_the_gradient_of_any_site(sd: StableDiffusionBackbone) -> None:
    rows = {s: nn.Parameter(v) for s, v in by_site(sd, equal=False).items()}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)

    def gradients() -> list[Tensor]:
        prediction = sd.predict(x, t, sd.encode(["a <x>"]))
        sd.predict(x, t, sd.encode(["a dog"]))  # another pass, without the placeholder, before the backward pass
        return list(torch.autograd.grad(prediction.square().mean(), list(rows.values())))

    plain = gradients()
    sd.unet.enable_gradient_checkpointing()
    sd.unet.train()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_site_hooks_are_removed_with_the_last_placeholder_that_needs_them(sd: StableDiffusionBackbone) -> None:
    text = repr(sd.unet)
    rows = by_site(sd, equal=False)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    before = sd.predict(x, t, sd.encode(["a dog"]))
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    sd.predict(x, t, sd.encode(["a <x>"]))
    assert torch.equal(sd.predict(x, t, sd.encode(["a dog"])), before)
    sd.remove("x")
    assert not any(m._forward_pre_hooks for m in sd.unet.modules())
    assert repr(sd.unet) == text and torch.equal(sd.predict(x, t, sd.encode(["a dog"])), before)


def test_keys_and_values_can_differ(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    """As in Perfusion, an edit of V alone gives each site its own context. Joint attention does not support this."""

    def edit(context: SiteContext, positions: Tensor, site: str | None) -> SiteContext:
        return SiteContext(context.key, context.value + positions[..., None].to(context.value))

    sd.add_placeholder(FixedPlaceholder("m", (), words="sks mug", edit=edit))
    conditioning = sd.encode(["a sks mug"])
    assert not isinstance(conditioning.context, Tensor)
    one = conditioning.context[sd.text_sites()[0]]
    moved = (one.key != one.value).any(-1)
    assert torch.equal(moved, conditioning.token_positions["m"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    edited = sd.predict(x, t, conditioning)
    sd.remove("m")
    assert not torch.equal(edited, sd.predict(x, t, sd.encode(["a sks mug"])))
    flux.add_placeholder(FixedPlaceholder("m", (), words="sks mug", edit=edit))
    with pytest.raises(ValueError, match="flux has none"):
        flux.encode(["a sks mug"])


def test_rows_can_vary_with_both_site_and_time(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=False)

    def both(c: str, t: Tensor | None, s: str | None) -> Tensor:
        assert t is not None and s is not None
        return rows[s][None] * t[:, None, None] / 1000

    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), both, ("site", "time")))
    a, b = (sd.encode(["a <x>"], torch.tensor([t])).context for t in (100.0, 800.0))
    sites = sd.text_sites()
    assert not torch.allclose(a[sites[0]].key, b[sites[0]].key) and not torch.allclose(a[sites[0]].key, a[sites[1]].key)


def test_flux_refuses_embeddings_that_vary_with_the_site(flux: FluxBackbone) -> None:
    flux.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: torch.zeros(1, WIDTH[c]), ("site",)))
    with pytest.raises(ValueError, match=r"'x'.*flux has none"):
        flux.encode(["a <x>"])
