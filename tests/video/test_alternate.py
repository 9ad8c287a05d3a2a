"""Training can alternate between pictures of a subject and clips of its class, and can use temporary adapters.

A temporary adapter is active only during training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.train.training_run import TrainingRun
from tests.core.runs import CLASS, paint
from tests.core.runs import sample as sampled
from tests.video.clip_models import build_animatediff


@pytest.fixture
def clips(make_tiny_sd: Callable[..., Any]) -> AnimateDiffBackbone:
    return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


ALTERNATE = (
    "task.kind=alternate", "sources.class_pictures.kind=generated_clips", "sources.class_pictures.frames=4",
    "sources.class_pictures.num_images=2", "sources.class_pictures.steps=1", "sources.class_pictures.batch_size=2",
)  # fmt: skip
TEMPORARY = (
    "trainable.still.kind=lora", "trainable.still.roles=[temporal_attention]", "trainable.still.temporary=true",
    "trainable.still.adapter_set=frozen", "trainable.still.rank=2",
)  # fmt: skip


def run(backbone: Any, photos: Path, folder: Path, *settings: str) -> TrainingRun:
    fixed = ("backbone=tiny", "train.resolution=32", "train.steps=4", "train.batch_size=1")
    recipe = load("subject_lora", [*fixed, *settings], "video", VideoRecipe)
    subjects = {"mug": read_subject(photos, "mug")}

    def made(prompts: Any, seeds: Any, *, resolution: int, frames: int = 0, progress: Any = None, **how: Any) -> Any:
        return sampled(backbone, prompts, seeds=seeds, height=resolution, width=resolution, frames=frames, **how)

    return TrainingRun(
        backbone, recipe, subjects, folder / "run", folder / "cache", class_pictures=made, tensorboard=False,
        tasks=VideoRunner.tasks,
    )  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[str]]]:
    """Records the number of latent axes and the active adapter sets for each prediction made with gradients enabled."""
    out: list[tuple[int, set[str]]] = []
    predict = AnimateDiffBackbone.predict

    def watched(self: Any, x_t: Any, t: Any, conditioning: Any) -> Any:
        if torch.is_grad_enabled():
            out.append((x_t.ndim, {name for name, s in self.strengths.items() if s and name in self.adapters}))
        return predict(self, x_t, t, conditioning)

    monkeypatch.setattr(AnimateDiffBackbone, "predict", watched)
    return out


def test_pictures_and_clips_take_turns(clips: Any, photos: Path, tmp_path: Path, seen: Any) -> None:
    records = [record for _, record in run(clips, photos, tmp_path, *ALTERNATE, "task.every=3").steps()]
    assert [axes for axes, _ in seen] == [4, 4, 5, 4]
    assert [set(record.parts) for record in records] == [{"denoising"}, {"denoising"}, {"prior"}, {"denoising"}]


def test_subject_tokens_do_not_change_at_prior_preservation_steps(clips: Any, photos: Path, tmp_path: Path) -> None:
    """Not even the optimizer's momentum changes the tokens at these steps."""
    words = ("modifier.kind=learnable_token", "trainable.words.kind=tokens", "trainable.words.group=words")
    started = run(clips, photos, tmp_path, *ALTERNATE, *words, "task.subject_only=[words]")
    values, loras = [], []
    for _ in started.steps():
        values.append(torch.cat([p.detach().flatten() for p in clips.placeholders["mug"].parameters()]))
        loras.append(torch.cat([p.detach().flatten() for a in clips.adapters["mug"] for p in a.parameters()]))
    assert [torch.equal(x, y) for x, y in zip(values[1:], values, strict=False)] == [True, False, True]
    assert not any(torch.equal(x, y) for x, y in zip(loras[1:], loras, strict=False))
    clips.remove("mug")
    for group, message in (("others", "unknown optimizer group 'others'"), ("main", "leaves no optimizer group")):
        settings = [*ALTERNATE, f"task.subject_only=[{group}]"]
        with pytest.raises(ValueError, match=message):
            list(run(clips, photos, tmp_path / group, *settings).steps())
        clips.remove("mug")


def test_a_temporary_adapter_is_off_between_steps_and_during_steps_that_disable_it(
    clips: Any, photos: Path, tmp_path: Path, seen: Any
) -> None:
    session = run(clips, photos, tmp_path, *ALTERNATE, *TEMPORARY, "task.rest=[frozen]")
    assert session.kept_sets == ("mug",) and "frozen" in session.sets_of_the_run
    for _ in session.steps():
        assert clips.strengths["frozen"] == 0.0  # because pictures can be generated between steps
    assert [sets for _, sets in seen] == [{"mug", "frozen"}, {"mug"}] * 2


def test_a_temporary_adapter_learns(clips: Any, photos: Path, tmp_path: Path) -> None:
    frozen = ("sources.references.kind=frozen_clips", "sources.references.length=4")
    no_prior = ("sources.class_pictures=null", "regularize.prior=null", "trainable.still.lr=0.01")
    list(run(clips, photos, tmp_path, *frozen, *no_prior, *TEMPORARY).steps())
    ups = [v for a in clips.adapters["frozen"] for k, v in a.state_dict().items() if "lora_B" in k]
    assert ups and any(bool(v.abs().max() > 0) for v in ups)


def test_an_interrupted_run_equals_an_uninterrupted_one(
    make_tiny_sd: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    """The adapters are bit-identical even with alternating steps, a temporary adapter and branches."""
    settings = (*ALTERNATE, *TEMPORARY, "task.rest=[frozen]", "train.checkpoint_every=2")
    settings += ("trainable.side.kind=bottleneck", "trainable.side.width=2", "trainable.side.lr=0.01")

    def fresh(folder: str) -> TrainingRun:
        backbone = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
        return run(backbone, photos, tmp_path / folder, *settings)

    whole = fresh("whole")
    list(whole.steps())
    steps = fresh("parts").steps()
    for _ in range(3):
        next(steps)
    steps.close()
    again = fresh("parts")
    list(again.steps(resume=True))
    for name in whole.sets_of_the_run:
        for a, b in zip(whole.backbone.adapters[name], again.backbone.adapters[name], strict=True):
            state = b.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in a.state_dict().items()), (name, a.slot)
    side = next(a for a in whole.backbone.adapters["mug"] if a.slot == "side")
    assert any(bool(v.abs().max() > 0) for k, v in side.state_dict().items() if k.endswith(".up"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("task.kind=alternate", "regularize.prior=null", "sources.class_pictures=null"),
            "no penalty needs class examples",
        ),
        (
            (*ALTERNATE, *TEMPORARY, "task.rest=[frozn]"),
            r"task\.rest: unknown adapter set 'frozn'. Did you mean 'frozen'",
        ),
        (
            (*CLASS, *TEMPORARY, "trainable.lora.adapter_set=frozen"),
            r"trainable\.lora\.adapter_set = 'frozen': temporary parts use this name",
        ),
    ],
)
def test_invalid_settings_for_alternating_training_are_refused(
    clips: Any, photos: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(run(clips, photos, tmp_path, *settings).steps())


def test_a_temporary_part_needs_its_own_adapter_set() -> None:
    with pytest.raises(ValueError, match="a temporary part needs its own adapter set; set adapter_set=NAME"):
        load("subject_lora", ["trainable.lora.temporary=true"], "video", VideoRecipe)
