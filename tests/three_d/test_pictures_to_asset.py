"""Tests recipes that learn a subject from pictures and make an asset of it, all in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_3d.cameras import turntable
from pcs_3d.distill.distill import Distill, shown
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, restored, under
from pcs_3d.distill.pseudo_views import PseudoViews
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.guidance.scores import Ask
from pcs_3d.recipe import Recipe3D
from pcs_3d.regularize.reference import border_color
from pcs_3d.runner import Runner3D
from pcs_3d.view_prompts import ScenePrompts, Views
from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.tasks import TuneTask
from shared.sources.phase_pictures import read_kept
from shared.train import checkpoint
from shared.train.learned_state import gather
from shared.train.training_run import TrainingRun
from shared.train.tune import Tune
from tests.core.runs import paint

SMALL = ("backbone=tiny", "prompt=a photo of a <mug>", "train.mixed_precision=no", "train.checkpoint_every=0",
         "field.resolution=10", "renderer.samples=16", "guidance.resolution=32", "sampling.steps=4", "setting=")  # fmt: skip
TUNED = ("sources.class_pictures.num_images=2", "sources.class_pictures.steps=1", "phases.partial.train.steps=2",
         "phases.full.train.steps=1", "phases.final.train.steps=1", "phases.views.task.num=4", "phases.views.task.batch_size=3",
         *(f"phases.{p}.train.resolution=32" for p in ("partial", "full", "views", "final")),
         *(f"phases.{p}.train={{steps: 1, batch_size: 1, resolution: 16}}" for p in ("first", "second")))  # fmt: skip
LORAS = tuple(
    f"phases.{p}.trainable.{n}.rank=2" for p, n in (("partial", "partial"), ("full", "full"), ("final", "partial"))
)


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Any]:
    return {"mug": read_subject(paint(tmp_path / "photos"), "mug")}


def dreambooth3d(*more: str) -> Recipe3D:
    return load("dreambooth3d", [*SMALL, *TUNED, *LORAS, *more], "3d", Recipe3D)


class Watched(PseudoViews):
    """A task that records the inputs of each call that generates pictures."""

    seen: list[Any] = []

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        make = context.make

        def watched(texts: Any, seeds: Any, recipe: Any, start: Any = None) -> Tensor:
            self.seen.append((context, texts, start, dict(context.backbone.strengths)))
            return make(texts, seeds, recipe, start)

        object.__setattr__(context, "make", watched)


def watched_runner(backbone: Any) -> tuple[Runner3D, dict[str, dict[str, float]]]:
    """Returns a runner, and a dictionary that the runner fills with each phase's active adapters and strengths."""
    on: dict[str, dict[str, float]] = {}

    class Tuned(Tune):
        def updates(self, step: int, micro: int) -> Any:
            on[self.context.name] = {k: v for k, v in self.backbone.strengths.items() if v}
            yield from super().updates(step, micro)

    class Grown(Distill):
        def updates(self, step: int, micro: int) -> Any:
            with self.scores.under("teacher"):
                on[self.context.name] = {k: v for k, v in self.context.backbone.strengths.items() if v}
            yield from super().updates(step, micro)

    made = Runner3D(backbone)
    made.tasks = {**made.tasks, TuneTask: Tuned, DistillTask: Grown, PseudoViewsTask: Watched}  # type: ignore[misc]
    return made, on


def test_the_phases_of_dreambooth3d_use_the_right_adapters_views_and_cameras(new_sd, tmp_path, subject):
    """Views are generated from renders of the asset. The last phase compares the asset with these views, from the same
    cameras.

    The `full` adapter is active while the views are generated, but not in later phases.
    """
    how, backbone, Watched.seen = dreambooth3d(), new_sd(), []
    watched, on = watched_runner(backbone)
    asset = watched.create(how, tmp_path / "run", subject, tensorboard=False)
    phases = dict(expand_phases(how))
    both, one = {"mug": 1.0, "full": 1.0}, {"mug": 1.0}
    assert on == {"partial": one, "first": one, "full": both, "final": one, "second": one}
    assert [len(texts) for _, texts, _, _ in Watched.seen] == [3, 1]
    context, texts, start, strengths = Watched.seen[0]
    assert texts[0] == "a photo of a sks mug, front view" and texts[1] == "a photo of a sks mug, side view"
    assert strengths == both
    field = restored(phases["first"].field, 3, how.seed, under(context.carried, FIELD))
    cameras = phases["views"].task.cameras()  # type: ignore[attr-defined]
    renders = shown(phases["first"], field, cameras, 32, lambda latents: latents).pixels
    with torch.no_grad():
        assert torch.equal(start.latents, backbone.encode_pixels(2 * renders[:3] - 1)) and start.strength == 0.5
    folder = tmp_path / "run" / "phases" / "views"
    kept = read_kept(folder)
    assert [entry["caption"] for entry in kept][:2] == [
        "a photo of a {concept}, front view",
        "a photo of a {concept}, side view",
    ]
    second = phases["second"]
    assert second.references is not None and second.task.off == ("full",)
    known = second.references.pictures(subject, 32, {"views": folder})
    assert all(torch.equal(a, b) for a, b in zip(vars(known.cameras).values(), vars(cameras).values(), strict=True))
    for entry, pixels in zip(kept, known.pixels, strict=True):
        assert torch.equal((read_picture(folder / entry["file"]).pixels + 1) / 2, pixels)
    assert bool(asset.field.raw_density.isfinite().all())
    assert not backbone.adapters and not backbone.placeholders


def state_of(run: TrainingRun, resume: bool = False) -> dict[str, Tensor]:
    for _ in run.steps(resume):
        pass
    return {**run.carried, **gather(run.backbone, run.names, run.adapter_sets)}


def run_of(backbone: Any, how: Recipe3D, folder: Path, subjects: dict[str, Any]) -> TrainingRun:
    owner = Runner3D(backbone)
    return TrainingRun(
        backbone, how, subjects, folder, folder.parent / "cache", class_pictures=owner._class_pictures,
        make=owner._made_now(None), tensorboard=False, tasks=owner.tasks,
    )  # fmt: skip


def test_each_phase_can_be_resumed(new_sd, tmp_path, subject):
    """A run that is interrupted between views and again in the next phase equals an uninterrupted one bit for bit."""
    how = dreambooth3d("phases.views.task={num: 2, batch_size: 1}", "phases.final.train.steps=2", "sampling.steps=2",
                       "phases.views.train.checkpoint_every=1", "phases.final.train.checkpoint_every=1")  # fmt: skip
    whole = state_of(run_of(new_sd(), how, tmp_path / "whole", subject))
    assert {key.split("/")[0] for key in whole} == {"field", "adapter"}
    stops = {"views": 1, "final": 1}
    for _ in list(stops):
        steps = run_of(new_sd(), how, tmp_path / "run", subject).steps(checkpoint.load(tmp_path / "run") is not None)
        for phase, record in steps:
            if stops.get(phase) == record.step:
                del stops[phase]
                break
        steps.close()
    again = state_of(run_of(new_sd(), how, tmp_path / "run", subject), resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in whole.items())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["phases.second.task.off=[ful]"], r"phases.second.task.off: .*'ful'.* full"),
        (["phases.second.references.phase=first"], r"references.phase: .*'first'.* views"),
        (["phases.first.task=tune"], r"trains nothing|no earlier phase makes an asset"),
    ],
)
def test_incompatible_phases_are_refused(sd, tmp_path, subject, settings, why):
    with pytest.raises(ValueError, match=why):
        Runner3D(sd).create(dreambooth3d(*settings), tmp_path / "run", subject, tensorboard=False)


def test_pictures_without_masks_are_compared_on_a_background_of_their_border_colour():
    pictures = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    pictures[:, :, [0, -1]], pictures[:, :, :, [0, -1]] = 0.25, 0.25
    pictures[1, :, 0, :6] = 0.9  # part of the object may touch the border
    assert torch.equal(border_color(pictures), torch.full((2, 3, 1, 1), 0.25))


# --- multi-view DreamBooth -------------------------------------------------------------------


def test_views_in_a_ring_attend_only_to_each_other(sd):
    """A different view in the same ring changes the prediction. Identical views and views in other rings do not."""
    prompts = ScenePrompts("a photo of a mug")
    plain, joint = BackboneScores(sd, prompts, {}), BackboneScores(sd, prompts, {}, joint_views=2)
    z = torch.randn(4, *sd.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    t, asks = torch.full((4,), 500), [Ask("prompt"), Ask("null")]

    def asked(scores: BackboneScores, z: Tensor) -> list[Tensor]:
        return scores.eps(asks, z, t[: len(z)], Views(turntable(4)[: len(z)], (False,) * len(z)))

    alone, together = asked(plain, z), asked(joint, z)
    for a, b in zip(alone, together, strict=True):
        assert float((a - b).abs().max()) > 1e-3
    apart = [torch.cat(pair) for pair in zip(asked(joint, z[:2]), asked(joint, z[2:]), strict=True)]
    # in `apart`, the prompts of the second pair name the wrong views, so only unconditional predictions are compared
    assert torch.allclose(apart[1], together[1], atol=1e-5)
    twice = z[[0, 0, 1, 1]]
    assert torch.allclose(asked(joint, twice)[1], asked(plain, twice)[1], atol=1e-5)
    with pytest.raises(ValueError, match=r"joint_views = 2: the number of views in a step \(3\)"):
        joint.eps([Ask("prompt")], z[:3], t[:3], Views(turntable(3), (False,) * 3))


def test_multi_view_dreambooth_takes_two_steps_per_phase(sd, tmp_path, subject):
    few = ("phases.learn.train.steps=2", "phases.learn.train.resolution=32", "phases.learn.trainable.lora.rank=2",
           "phases.grow.train={steps: 2, batch_size: 4, resolution: 16}")  # fmt: skip
    how = load("mv_dreambooth", [*SMALL, *few, "negative="], "3d", Recipe3D)
    asset = Runner3D(sd).create(how, tmp_path / "run", subject, tensorboard=False)
    assert not torch.equal(asset.field.raw_density, how.field.build().raw_density)
    with pytest.raises(ValueError, match="joint_views = 4 but cameras.ring = 2"):
        load("mv_dreambooth", [*SMALL, "cameras.ring=2"], "3d", Recipe3D)
