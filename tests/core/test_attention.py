"""Our attention processors give the same results as diffusers', apply edits in order and record attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from shared.backbones.attention_edits import At
from shared.backbones.attention_maps import Record, Watch
from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.core.motion import ask_motion, motion_unet

PROMPTS = ("a mug", "a dog on the beach")


@pytest.fixture(params=["sd", "sd_v", "flux"])
def backbone(request: pytest.FixtureRequest) -> Any:
    if request.param == "sd_v":
        return StableDiffusionBackbone(request.getfixturevalue("tiny_sd_v"))
    return request.getfixturevalue(request.param)


def ask(backbone: Any, prompts: tuple[str, ...] = PROMPTS, seed: int = 0) -> Tensor:
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return backbone.predict(x, torch.tensor([300, 600, 900])[: len(prompts)], backbone.encode(prompts))


def processors(backbone: Any) -> list[Any]:
    return [backbone.denoiser.get_submodule(s.name).processor for s in backbone.sites()]


def nothing(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows) -> Any:
    """Changes nothing but, like any edit, makes the layer use our processor."""
    return q, k, v, bias


def with_gradients(backbone: Any) -> tuple[Tensor, list[Tensor]]:
    backbone.denoiser.zero_grad()
    prediction = ask(backbone.to(dtype=torch.float64))  # in float32, rounding errors add up across the layers
    prediction.square().mean().backward()
    return prediction.detach(), [p.grad.clone() for p in backbone.denoiser.parameters() if p.grad is not None]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("mode", ["edit", "watch"])
def test_our_processors_match_diffusers(backbone: Any, adapted: bool, mode: str) -> None:
    if adapted:
        targets = [n for g in backbone.group("attention") for n in g.modules]
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), backbone.denoiser
        )
    else:
        backbone.denoiser.requires_grad_(True)
    expected, gradients = with_gradients(backbone)
    edits: dict[str, Any] = {"edit": nothing, "watch": Watch()}
    with backbone.attending(edits[mode]) as record:
        assert not any(type(p) is AttnProcessor2_0 for p in processors(backbone))
        got, ours = with_gradients(backbone)
        assert len(record) == (len(backbone.sites()) if mode == "watch" else 0)
    assert (got - expected).abs().max() <= (0 if mode == "edit" else 1e-12)
    assert len(ours) == len(gradients) > 0
    for a, b in zip(ours, gradients, strict=True):
        assert (a - b).abs().max() <= (0 if mode == "edit" else 1e-12)


def test_an_edit_that_changes_nothing_leaves_the_output_bit_identical(backbone: Any) -> None:
    with torch.no_grad():
        expected = ask(backbone)
        with backbone.attending(nothing):
            assert torch.equal(ask(backbone), expected)


def test_watched_attention_matches_diffusers_bit_for_bit(sd: StableDiffusionBackbone) -> None:
    with torch.no_grad(), sd.attending(Watch()):
        got = ask(sd)
    sd.unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        assert torch.equal(got, ask(sd))


def layer(**options: Any) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    grown: dict[str, Any] = {"query_dim": 8, "heads": 2, "dim_head": 4, "processor": AttnProcessor2_0(), **options}
    return Attention(**grown).eval(), torch.randn(2, 9, 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"qk_norm": "layer_norm", "bias": True},
        {"cross_attention_dim": 6},
        {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_variant_of_the_attention_layer_matches_diffusers(options: dict[str, Any], masked: bool) -> None:
    from shared.backbones.attention_processors import Plan, UNetProcessor
    from shared.backbones.attention_rows import PredictionRows

    attention, x = layer(**options)
    context = torch.randn(2, 5, 6) if "cross_attention_dim" in options else None
    mask = torch.randn(2, 1, 9 if context is None else 5) if masked else None
    grid = x.mT.unflatten(2, (3, 3))
    before = [attention(y, encoder_hidden_states=context, attention_mask=mask) for y in (x, grid)]
    site = Site("layer", "self", 1)
    for records in ((), ((Watch(), Record({})),)):
        attention.processor = UNetProcessor(Plan(site, PredictionRows(), (), records))  # type: ignore[assignment]
        for y, expected in zip((x, grid), before, strict=True):
            got = attention(y, encoder_hidden_states=context, attention_mask=mask)
            assert got.shape == expected.shape and (got - expected).abs().max() <= (1e-6 if records else 0)


def test_maps_are_the_softmax_that_the_layer_computed(sd: StableDiffusionBackbone) -> None:
    site = sd.sites()[1]
    attn: Any = sd.unet.get_submodule(site.name)
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in (attn.to_q, attn.to_k)]
    only = frozenset({site.name})
    with torch.no_grad(), sd.attending(Watch(only)) as mean, sd.attending(Watch(only, heads="all")) as apart:
        ask(sd)
    for hook in hooks:
        hook.remove()
    q, k = (x.double().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in seen)
    expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    assert apart[site.name].shape == expected.shape == (2, attn.heads, 64 // site.scale**2, 32)
    assert (apart[site.name] - expected).abs().max() < 1e-6
    assert (mean[site.name] - expected.mean(1)).abs().max() < 1e-6
    assert list(mean) == [site.name] and "other" not in mean
    with pytest.raises(KeyError, match="this site is not watched"):
        mean["other"]


def test_the_text_map_is_the_picture_to_text_part_of_a_joint_map(flux: FluxBackbone) -> None:
    with torch.no_grad(), flux.attending(Watch()) as record:
        ask(flux)
    length = flux.tokens.max_length["text_encoder_2"]
    for name in record:
        assert record[name].shape == (2, length + 16, length + 16)
        assert torch.equal(record.text_map(name, length), record[name][:, length:, :length])
        assert (record[name].sum(-1) - 1).abs().max() < 1e-5


def test_self_attention_has_no_text_map(sd: StableDiffusionBackbone) -> None:
    with torch.no_grad(), sd.attending(Watch()) as record:
        ask(sd)
    kinds = {s.name: s.kind for s in sd.sites()}
    for name in record:
        if kinds[name] == "cross":
            assert record.text_map(name, 32) is record[name]
        else:
            with pytest.raises(ValueError, match="does not attend to text"):
                record.text_map(name, 32)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_flow_through_maps_and_recomputation_keeps_one_map_per_site(backbone: Any, recompute: bool) -> None:
    """Gradient checkpointing does not change the gradient, and each site has one map, not two."""
    backbone.denoiser.requires_grad_(True)
    backbone.denoiser.train()  # diffusers recomputes only in training mode
    if recompute:
        backbone.denoiser.enable_gradient_checkpointing()
    first = backbone.sites()[1].name
    with backbone.attending(Watch()) as record:
        ask(backbone)
        map_ = record[first]
        loss = map_[..., 1].square().sum()
        loss.backward()
        assert record[first].shape == map_.shape and torch.allclose(record[first], map_, atol=1e-6)
        assert (record[first] is map_) == (not recompute)
    grad = backbone.denoiser.get_submodule(first).to_k.weight.grad
    assert grad is not None and grad.abs().max() > 0
    backbone.denoiser.zero_grad()
    backbone.denoiser.disable_gradient_checkpointing()
    with backbone.attending(Watch()) as record:
        ask(backbone)
        record[first][..., 1].square().sum().backward()
    assert torch.allclose(grad, backbone.denoiser.get_submodule(first).to_k.weight.grad, atol=1e-6)


def test_the_maps_of_the_first_prediction_can_be_kept(backbone: Any) -> None:
    with torch.no_grad(), backbone.attending(Watch(keep="first")) as first, backbone.attending(Watch()) as last:
        ask(backbone)
        maps = dict(first)
        ask(backbone, seed=1)
        assert all(first[n] is maps[n] and not torch.equal(last[n], maps[n]) for n in maps)
    with torch.no_grad(), backbone.attending(Watch()) as other:
        assert len(other) == 0
        with pytest.raises(KeyError, match="nothing has been predicted yet"):
            other[backbone.sites()[0].name]


def test_edits_are_applied_in_order_at_the_sites_they_were_requested_for(sd: StableDiffusionBackbone) -> None:
    calls: list[tuple[str, str]] = []

    def edit(name: str) -> Callable[..., Any]:
        def call(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows) -> Any:
            calls.append((name, site.name))
            assert q.shape[0] == k.shape[0] == 2 and rows == Rows.plain(2)
            return q, k, v, bias

        return call

    cross = Where(kinds=frozenset({"cross"}), scales=frozenset({2}))
    at = [s.name for s in sd.sites() if s in cross]
    before = processors(sd)
    with torch.no_grad(), sd.attending(At(edit("a"), cross), At(edit("b"), cross)), sd.attending(At(edit("c"), cross)):
        ask(sd)
        kept = [p is old for p, old in zip(processors(sd), before, strict=True)]
        assert kept == [s not in cross for s in sd.sites()]
    assert at and calls == [(e, name) for name in at for e in "abc"]


def test_an_edit_changes_the_output_and_the_recorded_maps(backbone: Any) -> None:
    def only_first(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows) -> Any:
        """Appends a copy of the first key, but lets every query attend only to the original."""
        k, v = (torch.cat([x, x[:, :, :1]], dim=2) for x in (k, v))
        away = torch.zeros(1, 1, 1, k.shape[2])
        away[..., 1:] = -torch.inf
        return q, k, v, away if bias is None else bias + away

    with torch.no_grad():
        plain = ask(backbone)
        with backbone.attending(only_first):
            edited = ask(backbone)
        with backbone.attending(only_first, Watch()) as record:
            watched = ask(backbone)
    assert (edited - plain).abs().max() > 1e-4 and (edited - watched).abs().max() < 1e-6
    assert all((m[..., 0] == 1).all() and (m[..., 1:] == 0).all() for m in record.values())


@contextmanager
def noting(backbone: Any) -> Iterator[list[Rows]]:
    seen: list[Rows] = []

    def note(site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows) -> Any:
        seen.append(rows)
        return q, k, v, bias

    with backbone.attending(note):
        yield seen


def test_edits_get_the_right_rows_under_guidance(sd: StableDiffusionBackbone) -> None:
    positive, negative = sd.encode(PROMPTS), sd.encode(["", ""])
    with torch.no_grad(), noting(sd) as seen:
        sd.predict_guided(torch.randn(2, 4, 8, 8), torch.tensor(300), positive, negative, 5.0)
        assert set(seen) == {Rows((0, 1, 0, 1), (True, True, False, False))}
        seen.clear()
        sd.predict_guided(torch.randn(2, 4, 8, 8), torch.tensor(300), positive, None, 5.0)
        assert set(seen) == {Rows.plain(2)}
    rows = Rows.guided(2)
    assert rows.indices(torch.device("cpu")).tolist() == [0, 1, 0, 1]
    assert Rows((0, 1), (True, False), 2).negatives(torch.device("cpu")).tolist() == [True, True, False, False]


def test_edits_get_the_right_rows_when_a_pass_is_recomputed(sd: StableDiffusionBackbone) -> None:
    sd.unet.requires_grad_(True).train()
    sd.unet.enable_gradient_checkpointing()
    positive, negative = sd.encode(PROMPTS), sd.encode(["", ""])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(300)
    with noting(sd) as seen:
        loss = sd.predict_guided(x, t, positive, negative, 5.0).mean()
        count = len(seen)
        loss.backward()
        assert len(seen) > count and set(seen) == {Rows.guided(2)}
    with noting(sd):
        loss = sd.predict_guided(x, t, positive, negative, 5.0).mean()
        loss = (
            loss
            + ask(sd, (*PROMPTS, *PROMPTS)[:3]).mean()
            + sd.predict(torch.cat([x, x]), t, sd.encode(PROMPTS * 2)).mean()
        )
        with pytest.raises(ValueError, match="with and without guidance"):
            loss.backward()


def test_the_same_processor_objects_are_restored(backbone: Any) -> None:
    before = processors(backbone)
    with backbone.attending(Watch()):
        outer = processors(backbone)
        assert not any(a is b for a, b in zip(outer, before, strict=True))
        with pytest.raises(RuntimeError, match="stop"), backbone.attending(nothing, Watch()):
            raise RuntimeError("stop")
        assert all(a is b for a, b in zip(processors(backbone), outer, strict=True))
    assert all(a is b for a, b in zip(processors(backbone), before, strict=True))
    with backbone.attending():
        assert all(a is b for a, b in zip(processors(backbone), before, strict=True))


def test_a_nested_edit_does_not_stop_recording(backbone: Any) -> None:
    with torch.no_grad(), backbone.attending(Watch()) as record, backbone.attending(nothing):
        ask(backbone)
    assert set(record) == {s.name for s in backbone.sites()}


def test_a_foreign_processor_is_refused_at_requested_sites_and_otherwise_kept(sd: StableDiffusionBackbone) -> None:
    names = [s.name for s in sd.sites()]
    odd: Any = sd.unet.get_submodule(names[3])
    odd.processor = strange = AttnProcessor()
    before = processors(sd)
    for edits in ((nothing,), (Watch(),)):
        refused = rf"{names[3]} has the processor AttnProcessor, which is not diffusers' default"
        with pytest.raises(ValueError, match=refused), sd.attending(*edits):
            pass
        assert all(a is b for a, b in zip(processors(sd), before, strict=True))
    with torch.no_grad(), sd.attending(Watch(sites=frozenset(names[:3]))) as record:
        assert odd.processor is strange
        ask(sd)
    assert list(record) == names[:3] and isinstance(record, Record)


def test_a_watch_or_an_edit_that_matches_no_layer_is_refused(sd: StableDiffusionBackbone) -> None:
    for where in (Where(scales=frozenset({16})), Watch(kinds=frozenset({"joint"}))):
        edit: Any = where if isinstance(where, Watch) else At(nothing, where)
        condition = "scale 16" if edit is not where else "kind joint"
        refused = f"no attention layer matches {condition}. Available: cross at scale 1, cross at scale 2"
        with pytest.raises(ValueError, match=refused), sd.attending(edit):
            pass


def test_temporal_attention_can_be_watched_and_edited(tiny_sd: Any) -> None:
    tiny_sd.unet = motion_unet(tiny_sd.unet)
    backbone = StableDiffusionBackbone(tiny_sd)
    plain = ask_motion(backbone, frames=3)
    with backbone.attending(Watch()) as record, noting(backbone) as seen, backbone._predictions.under_way(2):
        assert (ask_motion(backbone, frames=3) - plain).abs().max() < 1e-5
    for site, rows in zip(backbone.sites(), seen, strict=True):
        cells = (8 // site.scale) ** 2
        repeat, shape = (3, (6, cells)) if site.kind != "temporal" else (cells, (2 * cells, 3, 3))
        assert rows == Rows((0, 1), (False, False), repeat) and record[site.name].shape[: len(shape)] == shape
