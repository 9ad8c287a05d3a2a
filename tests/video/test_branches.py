"""Branches have no effect at first, match their formulas, can be saved, and can be removed without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.motion.motion_embeddings import MotionEmbeddings
from pcs_video.recipe import VideoRecipe
from shared.backbones.attention_edits import At
from shared.backbones.attention_sites import Where
from shared.concept import Provenance, as_json, attach, capture, export, lines, read, save
from shared.recipe.resolve import load
from shared.runner.plan import plan
from shared.train.training_run import TrainingRun
from shared.trainable import Bottleneck, Lora
from shared.trainable.branch_forms import differences, resized_frames, resized_places
from tests.video.clip_models import build_animatediff
from tests.video.conftest import FAST
from tests.video.transformer_runs import FAMILIES


@pytest.fixture
def clips(make_tiny_sd: Callable[..., Any]) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ask(backbone: Any, frames: int = 5, rows: int = 8, columns: int = 8) -> Tensor:
    x = noise(2, 4, frames, rows, columns) if frames else noise(2, 4, rows, columns)
    return backbone.predict(x, torch.tensor(300), backbone.encode(["a mug", "a dog"]))


def learn(backbone: Any, part: Any, training: bool = False) -> Any:
    """Injects a part, gives its adapter random parameters, and returns the adapter."""
    part.inject(backbone, "m", "part", 0)
    (adapter,) = backbone.adapters["m"]
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data = 0.3 * noise(*parameter.shape, seed=number)
    adapter.train(training)
    return adapter


PARTS = [MotionEmbeddings(coarsest=None), MotionEmbeddings(values="off"), Bottleneck(width=4), Bottleneck(roles=("temporal_attention", "temporal_feed_forward"), width=4)]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("part", PARTS)
def test_a_new_branch_has_no_effect_and_is_removed_without_a_trace(clips: AnimateDiffBackbone, part: Any) -> None:
    before, names, text = ask(clips), set(clips.unet.state_dict()), repr(clips.unet)
    part.inject(clips, "m", "part", 0)
    torch.testing.assert_close(ask(clips), before, atol=1e-6, rtol=0)
    learn_more = clips.adapters["m"][0]
    for parameter in learn_more.parameters():
        parameter.data += 0.3
    assert not torch.allclose(ask(clips), before, atol=1e-3)
    assert set(clips.unet.state_dict()) == names and repr(clips.unet) == text
    with clips.active({}):
        assert torch.equal(ask(clips), before)
    clips.remove("m")
    assert torch.equal(ask(clips), before) and repr(clips.unet) == text


def test_a_bottleneck_is_added_to_the_output_of_its_layer(clips: AnimateDiffBackbone) -> None:
    part = Bottleneck(roles=("cross_attention",), width=4, blocks="0")
    adapter = learn(clips, part)
    first, branch = next(iter(adapter.branches.items()))
    place: Any = clips.unet.get_submodule(branch.place)
    x, text = noise(2, 9, adapter.branches[first].parameters["down"].shape[1]), noise(2, 7, place.cross_attention_dim)
    p = {key: value.detach() for key, value in branch.parameters.items()}
    added = F.gelu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    with torch.no_grad():
        together = place(x, encoder_hidden_states=text)
        clips.set_strength("m", 0.0)
        alone = place(x, encoder_hidden_states=text)
        clips.set_strength("m", 0.5)
        torch.testing.assert_close(place(x, encoder_hidden_states=text), alone + 0.5 * added)
    torch.testing.assert_close(together, alone + added)


def test_pictures_pass_through_the_same_bottlenecks(clips: AnimateDiffBackbone) -> None:
    before = ask(clips, 0)
    learn(clips, Bottleneck(width=4))
    assert not torch.allclose(ask(clips, 0), before, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_embeddings_are_added_to_queries_keys_and_values_as_in_the_paper(
    clips: AnimateDiffBackbone, training: bool
) -> None:
    """An attention edit that adds W_q e, W_k e and W_v e' after the projections gives the same result.

    Here, e is the embedding for queries and keys, and e' is the embedding for values.
    """
    _, *size = clips.latent_shape(clips.resolution, clips.resolution, clips.frames)
    plain = ask(clips, *size)
    adapter = learn(clips, MotionEmbeddings(coarsest=None), training)
    made = ask(clips, *size)

    def add(site: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, rows: Any) -> Any:
        layer: Any = clips.unet.get_submodule(site.name)
        p = adapter.branches[f"{site.name}.to_q"].parameters
        value = p["v"].detach()
        if not training:
            value = torch.cat([value[..., :1, :], value[..., 1:, :] - value[..., :-1, :]], dim=-2)
        value = value.flatten(0, 1).repeat(2, 1, 1)  # for the two rows of the batch

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (layer.heads, -1)).transpose(-3, -2)

        q = q + heads(F.linear(p["qk"].detach(), layer.to_q.weight))
        k = k + heads(F.linear(p["qk"].detach(), layer.to_k.weight))
        return q, k, v + heads(F.linear(value, layer.to_v.weight)), bias

    with clips.active({}), clips.attending(At(add, Where(kinds=frozenset({"temporal"})))):
        expected = ask(clips, *size)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made, plain, atol=1e-2)


def test_embeddings_are_resized_for_other_frame_counts_and_grids(clips: AnimateDiffBackbone) -> None:
    learn(clips, MotionEmbeddings(frames=6, resolution=64))
    assert ask(clips, 5, 8, 16).shape == (2, 4, 5, 8, 16)
    ramp = torch.linspace(0, 1, 4)[:, None]
    assert torch.equal(resized_frames(ramp, 4), ramp)
    assert resized_frames(ramp, 8).flatten().diff().min() >= 0 and resized_frames(ramp, 8).mean() == pytest.approx(0.5)
    plane = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 2, 3, 5)  # a ramp from the top row to the bottom row
    wide = resized_places(plane, (8, 4), 6)
    assert wide.shape == (8, 4, 6, 5) and torch.equal(wide[:, :1, :1, :1].expand_as(wide), wide)
    steady = torch.arange(3.0)[:, None].expand(3, 2)
    assert torch.equal(differences(steady + 7)[:, 0], torch.tensor([7.0, 1.0, 1.0]))


def test_the_setting_coarsest_selects_only_the_coarsest_grids(clips: AnimateDiffBackbone) -> None:
    temporal = [s for s in clips.sites() if s.kind == "temporal"]
    scales = sorted({s.scale for s in temporal}, reverse=True)
    adapter = learn(clips, MotionEmbeddings(coarsest=1))
    expected = [f"{s.name}.to_q" for s in temporal if s.scale == scales[0]]
    assert 0 < len(expected) < len(temporal) and list(adapter.branches) == expected


def test_a_lora_on_the_same_layer_does_not_see_the_embeddings(clips: AnimateDiffBackbone) -> None:
    """The result does not depend on whether the LoRA or the embeddings are added first."""
    outputs = []
    for order in ("lora first", "lora last"):
        if order == "lora first":
            lora(clips)
        learn(clips, MotionEmbeddings(coarsest=None))
        if order == "lora last":
            lora(clips)
        outputs.append(ask(clips))
        clips.remove("m")
        clips.remove("l")
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


def lora(backbone: Any) -> None:
    group = Lora(roles=("temporal_attention",), rank=2).inject(backbone, "l", "lora", 0)
    for number, parameter in enumerate(group.parameters):
        parameter.data = 0.3 * noise(*parameter.shape, seed=number)


@pytest.mark.parametrize("part", PARTS)
def test_a_concept_stores_its_branches(make_tiny_sd: Callable[..., Any], tmp_path: Path, part: Any) -> None:
    backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    learn(backbone, part)
    made = ask(backbone)
    concept = save(capture(backbone, "m", Provenance(kind="motion")), tmp_path / "m.concept")
    fresh = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    before = ask(fresh)
    attach(read(tmp_path / "m.concept"), fresh)
    assert torch.equal(ask(fresh), made)
    fresh.set_strength("m", 0.0)
    assert torch.equal(ask(fresh), before)
    again = capture(fresh, "m", Provenance(kind="motion"))
    assert again.meta.branches == concept.meta.branches and again.meta.adapter_id == concept.meta.adapter_id
    assert any("layers of unet" in line for line in lines(concept)) and as_json(concept)["parameters"] > 0
    with pytest.raises(ValueError, match="has .*, which diffusers' LoRA files cannot store"):
        export(concept, tmp_path / "out", backbone=fresh)


def test_a_bottleneck_learned_on_pictures_also_affects_clips(make_tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    learn(pictures, Bottleneck(width=4))
    made = ask(pictures, 0)
    save(capture(pictures, "m", Provenance()), tmp_path / "m.concept")
    clips = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    before = ask(clips)
    attach(read(tmp_path / "m.concept"), clips)
    assert torch.equal(ask(clips, 0), made) and not torch.allclose(ask(clips), before, atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [("motion_inversion", "trainable.embeddings.frames=4"), ("dreamvideo_motion", "trainable.temporal.width=4")],
)
def test_gradient_checkpointing_does_not_change_the_result(
    recipe: str, setting: str, make_tiny_sd: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    learned = []
    for on in ("false", "true"):
        folder = tmp_path / on
        asked = [f"subject.clips={clip_folder}", f"output={folder / 'm.concept'}", *FAST, setting]
        planned = plan(load(recipe, [*asked, f"train.gradient_checkpointing={on}"], "video", VideoRecipe))
        backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
        run = TrainingRun(backbone, planned.recipe, planned.subjects, planned.workdir, folder, tensorboard=False)
        list(run.steps())
        learned.append([p.detach() for a in backbone.adapters["m"] for p in a.parameters()])
    assert any(bool(p.abs().max() > 0) for p in learned[0])
    for plain, recomputed in zip(*learned, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


def test_incompatible_branches_are_refused(clips: AnimateDiffBackbone, make_tiny_sd: Any, tmp_path: Path) -> None:
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    learn(clips, MotionEmbeddings())
    concept = save(capture(clips, "m", Provenance(kind="motion")), tmp_path / "m.concept")
    with pytest.raises(ValueError, match=r"does not fit .*it was learned on animatediff"):
        attach(concept, StableDiffusionBackbone(make_tiny_sd(), "tiny"))
    clips.remove("m")
    first = next(iter(concept.of("branches")))
    for change, message in (
        (lambda t: {**t, first: t[first][..., :-1]}, "do not fit a layer of width"),
        (lambda t: {k: v for k, v in t.items() if k != first}, "the branch needs"),
        (lambda t: {**t, "part.unet.nowhere.to_q.qk": t[first]}, "1 branch tensors of 'm' belong to no branch"),
    ):
        tensors = {**concept.tensors, "branches": change(dict(concept.of("branches")))}
        with pytest.raises(ValueError, match=message):
            attach(type(concept)(concept.meta, tensors), clips)
        assert "m" not in clips.adapters
    with pytest.raises(ValueError, match=r"roles=\['conv'\] selects no to_q or net\.0\.proj layer"):
        Bottleneck(roles=("conv",)).inject(clips, "m", "part", 0)


def test_motion_embeddings_are_refused_if_no_layers_attend_only_between_frames() -> None:
    with pytest.raises(
        ValueError, match=r"layers that attend only between frames, but wan has none; .*motion_director_joint"
    ):
        MotionEmbeddings().inject(FAMILIES["wan"](), "m", "part", 0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bottlenecks_take_effect_in_video_transformers(family: str) -> None:
    backbone = FAMILIES[family]()
    x, t = noise(2, 4, 2, 4, 4), torch.tensor([900, 300])
    with torch.no_grad():
        told = backbone.encode(["a mug", "a dog"])
        before = backbone.predict(x, t, told)
        Bottleneck(roles=("cross_attention", "feed_forward"), width=4).inject(backbone, "m", "part", 0)
        torch.testing.assert_close(backbone.predict(x, t, told), before, atol=1e-6, rtol=0)
        for adapter in backbone.adapters["m"]:
            for parameter in adapter.parameters():
                parameter.data += 0.3
        assert not torch.allclose(backbone.predict(x, t, told), before, atol=1e-3)
