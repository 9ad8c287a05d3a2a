"""Sparse-causal attention matches its formula, is saved with its concept, and is active only while the concept is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.attention import SparseCausal
from shared.backbones import load_backbone
from shared.backbones.attention_processors import Plan, UNetProcessor
from shared.backbones.attention_rows import PredictionRows
from shared.backbones.attention_sites import Site
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import export, lines, read
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from shared.train.training_run import TrainingRun
from tests.video.clip_models import build_animatediff
from tests.video.conftest import FAST
from tests.video.transformer_runs import FAMILIES

CLIPS, FRAMES, PLACES, HEADS, WIDTH = 2, 4, 3, 2, 4
SETTINGS = SamplingSettings("", 3.0, 2, height=32, width=32, frames=4)


@pytest.fixture
def clips(make_tiny_sd: Callable[..., Any]) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


@torch.no_grad()
def ask(backbone: Any, frames: int = 4) -> Tensor:
    x = torch.randn(2, 4, *([frames] if frames else []), 8, 8, generator=torch.Generator().manual_seed(0))
    return backbone.predict(x, torch.tensor(300), backbone.encode(["a mug", "a dog"]))


def turn_on(backbone: Any, name: str, part: SparseCausal = SparseCausal()) -> None:
    """Adds an untrained concept that uses sparse-causal attention."""
    from shared.trainable import Lora

    Lora(roles=("cross_attention",), rank=2).inject(backbone, name, "lora", 0)
    backbone.keep_attending(name, *part.edits(backbone))


@pytest.mark.parametrize("seen", [("first", "previous"), ("first",), ("own", "previous")])
@torch.no_grad()
def test_each_frame_attends_as_in_the_paper(seen: Any) -> None:
    """The output for frame i equals softmax(Q_i [K_first, K_previous]^T / sqrt(d)) [V_first, V_previous].

    Other choices of frames are tested as well.
    """
    torch.manual_seed(0)
    grown: dict[str, Any] = {"heads": HEADS, "dim_head": WIDTH, "processor": AttnProcessor2_0()}
    layer = Attention(HEADS * WIDTH, **grown).eval().double()
    x = torch.randn(CLIPS * FRAMES, PLACES, HEADS * WIDTH, dtype=torch.float64)
    predictions = PredictionRows()
    layer.processor = UNetProcessor(Plan(Site("layer", "self", 1), predictions, (SparseCausal(frames=seen),)))  # type: ignore[assignment]
    with predictions.under_way(CLIPS):
        made = layer(x)
    number = {"first": lambda i: 0, "previous": lambda i: max(0, i - 1), "own": lambda i: i}
    for clip in range(CLIPS):
        frames = x[clip * FRAMES : (clip + 1) * FRAMES]
        for i in range(FRAMES):
            source = torch.cat([frames[number[name](i)] for name in seen])
            q, k, v = frames[i] @ layer.to_q.weight.T, source @ layer.to_k.weight.T, source @ layer.to_v.weight.T  # type: ignore
            heads = []
            for h in range(HEADS):
                part = slice(h * WIDTH, (h + 1) * WIDTH)
                heads.append(((q[:, part] @ k[:, part].T) / WIDTH**0.5).softmax(-1) @ v[:, part])
            expected = torch.cat(heads, -1) @ layer.to_out[0].weight.T + layer.to_out[0].bias  # type: ignore
            torch.testing.assert_close(made[clip * FRAMES + i], expected, atol=1e-12, rtol=0)


def test_a_bias_on_the_scores_stays_with_its_keys() -> None:
    from shared.backbones.attention_rows import Rows

    k, rows = torch.randn(CLIPS * FRAMES, HEADS, PLACES, WIDTH), Rows((0, 1), (False, False), FRAMES)
    bias = torch.arange(CLIPS * FRAMES * PLACES).view(-1, 1, 1, PLACES).float()
    *_, seen = SparseCausal()(Site("layer", "self", 1), k, k, k, bias, rows)
    assert seen is not None and seen[6, 0, 0].tolist() == [*bias[4, 0, 0].tolist(), *bias[5, 0, 0].tolist()]
    *_, seen = SparseCausal()(Site("layer", "self", 1), k, k, k, bias[:1], rows)
    assert seen is not None and seen.tolist() == torch.cat([bias[:1]] * 2, -1).tolist()


def test_the_attention_is_active_only_with_its_concept_and_is_removed_without_a_trace(
    clips: AnimateDiffBackbone,
) -> None:
    before, pictures = ask(clips), ask(clips, 0)
    processors = [clips.unet.get_submodule(s.name).processor for s in clips.sites()]
    turn_on(clips, "a")
    changed = ask(clips)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(ask(clips, 0), pictures)  # a picture has no other frames
    with clips.active({}):
        assert torch.equal(ask(clips), before)
    turn_on(clips, "b")
    assert torch.equal(ask(clips), changed)  # if two concepts request the attention, it is applied only once
    clips.remove("a")
    assert torch.equal(ask(clips), changed)
    clips.set_strength("b", 0.0)
    assert torch.equal(ask(clips), before)
    clips.remove("b")
    assert all(clips.unet.get_submodule(s.name).processor is p for s, p in zip(clips.sites(), processors, strict=True))


def learn(model: Path, given: Path, out: Path, *settings: str) -> VideoRunner:
    asked = [f"backbone={model}", f"output={out}", f"subject.clips={given}", *FAST, *settings]
    recipe: Any = load("tune_a_video", asked, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
    personalize(plan(recipe), runner)
    return runner


def made(runner: VideoRunner, **how: Any) -> Tensor:
    return runner.generate(["a mug on the beach"], [0], SETTINGS, must_name=False, **how)


def test_a_concept_is_trained_and_sampled_with_its_attention(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    runner = learn(clip_model, clip_folder, tmp_path / "slide.concept")
    shown = made(runner)
    fresh = VideoRunner(load_backbone(clip_model))
    before = made(fresh)
    concept = read(tmp_path / "slide.concept")
    assert "sparse-causal attention" in "\n".join(lines(concept))
    fresh.load(concept)
    assert torch.equal(made(fresh), shown) and not torch.allclose(shown, before, atol=1e-3)
    assert torch.equal(made(fresh, base=True), before)
    with pytest.raises(ValueError, match=r"changes the model's attention \(sparse-causal attention\), which diffusers"):
        export(concept, tmp_path / "files", backbone=fresh.backbone)
    fresh.unload("slide")
    assert torch.equal(made(fresh), before)
    learn(clip_model, clip_folder, tmp_path / "plain.concept", "attention=null")
    plain = read(tmp_path / "plain.concept")
    assert not plain.meta.attention
    assert any(not torch.equal(t, concept.of("weights")[k]) for k, t in plain.of("weights").items())


def test_gradient_checkpointing_does_not_change_the_result(
    make_tiny_sd: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    learned = []
    for on in ("false", "true"):
        folder = tmp_path / on
        asked = [f"subject.clips={clip_folder}", f"output={folder / 'm.concept'}", *FAST]
        asked += [f"train.gradient_checkpointing={on}", "trainable.queries.lr=0.01"]
        planned = plan(load("tune_a_video", asked, "video", VideoRecipe))
        backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
        run = TrainingRun(backbone, planned.recipe, planned.subjects, planned.workdir, folder, tensorboard=False)
        list(run.steps())
        learned.append({k: v for a in backbone.adapters["m"] for k, v in a.state_dict().items()})
    for key, plain in learned[0].items():
        torch.testing.assert_close(learned[1][key], plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_port_is_noted_if_every_position_already_attends_to_all_frames(family: str) -> None:
    backbone = FAMILIES[family]()
    part = SparseCausal()
    assert f"unchanged in {family.split()[0]}, where every position attends to all frames" in part.port(backbone)
    assert not part.edits(backbone)


def test_image_models_and_phases_with_their_own_attention_are_refused(
    make_tiny_sd: Any, clips: AnimateDiffBackbone, clip_folder: Path, tmp_path: Path
) -> None:
    assert not SparseCausal().port(clips)
    asked = [f"subject.clips={clip_folder}", f"output={tmp_path / 'm.concept'}", *FAST]
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    for name, settings, backbone, message in (
        ("tune_a_video", (), pictures, "tiny generates pictures, which have no previous frame"),
        (
            "set_then_sequence",
            ("phases.set.attention.sparse_causal={}",),
            clips,
            "phases.set.attention: all phases share the same attention",
        ),
    ):
        planned = plan(load(name, [*asked, *settings], "video", VideoRecipe))
        with pytest.raises(ValueError, match=message):
            TrainingRun(backbone, planned.recipe, planned.subjects, planned.workdir, tmp_path, tensorboard=False)
