"""Tests what affects a run besides its pictures: penalties, loaded concepts, several subjects and compute options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.io.read_subject import read_subject
from shared.modifiers import RareToken
from shared.trainable import Lora
from shared.types import Subject
from tests.core.runs import finish, predicted, sample, session, small, tuning

# --- penalties and loaded concepts -----------------------------------------------------------


def with_old(backbone: Any, strength: float = 1.0) -> Any:
    """Loads an earlier concept whose adapter has an effect."""
    group = Lora(rank=2).inject(backbone, "old", "lora", seed=9)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in group.parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=draw)).requires_grad_(False)
    backbone._switch({"old": strength})
    return backbone


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_the_base_of_prior_prediction_includes_the_concepts_that_were_already_loaded(tiny, photos, tmp_path, strength):
    recipe = small("pivotal_tuning", "phases=null", "trainable.lora.rank=2", "regularize.prior_prediction.weight=2")
    backbone = with_old(tiny(), strength)
    run = session(backbone, recipe, photos, tmp_path / "run", loaded_strengths={"old": strength})
    draw = torch.Generator().manual_seed(4)
    task = tuning(run)
    step = predicted(task)
    assert torch.equal(step.need("class_prediction"), step.need("base_class_prediction")), "both agree before training"
    with torch.no_grad():
        for p in run.trained["lora"].parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    task = tuning(run)
    step = predicted(task)
    now, base = step.need("class_prediction"), step.need("base_class_prediction")
    assert now.requires_grad and not base.requires_grad and not torch.allclose(now, base, atol=1e-3)
    assert backbone.strengths == {"old": strength, "mug": 1.0}, "the strengths are restored"

    def elsewhere(other: Any) -> Tensor:
        """Returns the prediction of a backbone on which the concept was never trained, for the same inputs."""
        prompts = [c.replace(backbone.placeholders["mug"].words, "mug") for c in step.batch.captions]
        with torch.no_grad():
            return other.predict(step.x_t, step.t, other.encode(prompts))

    loaded, bare = elsewhere(with_old(tiny(), strength)), elsewhere(tiny())
    assert torch.equal(base, loaded)
    assert torch.equal(base, bare) == (strength == 0.0)
    penalty = recipe.regularize["prior_prediction"](step)
    assert penalty.item() == pytest.approx(2 * float(((now - loaded) ** 2).mean()), rel=1e-5)


def test_prior_preservation_weights_class_pictures_separately(tiny, photos, tmp_path):
    recipe = small("dreambooth_lora", "regularize.prior.weight=0.25", "objective.masked=false")
    backbone = tiny()
    run = session(backbone, recipe, photos, tmp_path / "run")
    task = tuning(run)
    step = predicted(task)
    assert step.batch.role == ("instance", "instance", "prior", "prior")
    assert step.batch.captions[2:] == ("a photo of a mug",) * 2
    rows = ((step.prediction - step.target) ** 2).mean((1, 2, 3))
    (update,) = task.updates(0, 0)
    assert float(update.parts["denoising"]) == pytest.approx(float(rows[:2].mean()), rel=1e-5)
    assert float(update.parts["prior"]) == pytest.approx(0.25 * float(rows[2:].mean()), rel=1e-5)
    assert float(update.loss) == pytest.approx(float(rows[:2].mean() + 0.25 * rows[2:].mean()), rel=1e-5)


def test_class_pictures_are_generated_by_the_untrained_model_with_the_loaded_concepts(tiny, photos, tmp_path):
    """Later runs reuse the pictures only if they load the same concepts at the same strengths."""
    recipe = small("dreambooth_lora", "train.steps=1")
    made = []

    def run(name: str, backbone: Any, **changes: Any) -> None:
        def generate(prompts, seeds, *, guidance: float, steps: int, resolution: int, progress=None) -> Tensor:
            made.append((name, backbone.strengths))
            return sample(
                backbone, prompts, seeds=seeds, guidance=guidance, steps=steps, height=resolution, width=resolution
            )

        finish(session(backbone, recipe, photos, tmp_path / name, class_pictures=generate, **changes))

    run("one", tiny())
    run("two", tiny())
    run("three", with_old(tiny()), loaded_strengths={"old": 1.0})
    run("four", with_old(tiny(), 0.5), loaded_strengths={"old": 0.5})
    run("five", with_old(tiny()), loaded_strengths={"old": 1.0})
    assert [name for name, _ in made] == ["one", "three", "four"]
    assert [on.get("old") for _, on in made] == [None, 1.0, 0.5]
    assert all(on["mug"] == 0.0 for _, on in made), "the concept being trained is switched off"


def test_the_anchor_pulls_every_row_towards_its_starting_value(tiny, photos, tmp_path):
    settings = ("train.steps=3", "modifier.vectors=2", "trainable.tokens.lr=0.1")
    anchor = ("regularize.anchor.kind=embedding_anchor", "regularize.anchor.weight=1e4")
    start, free, held = (
        finish(session(tiny(), small("textual_inversion", *s), photos, tmp_path / f"{i}"))[
            "placeholder/mug/text_encoder"
        ]
        for i, s in enumerate([(*settings, "train.steps=0"), settings, (*settings, *anchor)])
    )
    assert (held - start).norm() < 0.8 * (free - start).norm()
    with pytest.raises(ValueError, match=r"regularize\.anchor keeps learned tokens .* the modifier learns none"):
        finish(session(tiny(), small("dreambooth_lora", *anchor), photos, tmp_path / "none"))


def test_masked_training_ignores_the_background(tiny, photos, tmp_path):
    """The gradient of the masked loss with respect to the prediction is 0 outside the mask."""
    recipe = small("textual_inversion", "objective.masked=true")
    backbone = tiny()
    run = session(backbone, recipe, photos, tmp_path / "run")
    task = tuning(run)
    step = predicted(task)
    (slope,) = torch.autograd.grad(step.need("example_loss").sum(), step.prediction)
    assert step.batch.mask is not None
    inside = step.batch.mask.expand_as(slope) > 0
    assert inside.any() and (slope[~inside] == 0).all() and (slope[inside] != 0).all()


# --- several subjects ------------------------------------------------------------------------


def two_subjects(photos: Path) -> dict[str, Subject]:
    return {"mug": read_subject(photos, "mug"), "rex": read_subject(photos.parent / "other", "dog")}


def test_several_subjects_in_one_run_each_have_their_own_token(tiny, photos, tmp_path):
    recipe = small("pivotal_tuning", "train.steps=3")
    backbone = tiny()
    run = session(backbone, recipe, photos, tmp_path / "run", subjects=two_subjects(photos))
    task = tuning(run)
    batches = [task.data.batch(s, 0) for s in range(6)]
    rows = [(o, c) for b in batches for o, c in zip((o[0] for o in b.owners), b.captions, strict=True)]
    assert {o for o, _ in rows} == {"mug", "rex"}
    assert all(f"<{o}> <{o}>_1 {run.class_nouns[o]}" in c for o, c in rows)
    assert not any("<rex>" in c for o, c in rows if o == "mug")
    assert next(task._class_prompt(c) for _, c in rows).count("<") == 0
    for name in ("mug", "rex"):
        backbone.remove(name)
    run = session(tiny(), recipe, photos, tmp_path / "run", subjects=two_subjects(photos))
    backbone = run.backbone
    start = finish(
        session(tiny(), small("pivotal_tuning", "train.steps=0"), photos, tmp_path / "0", subjects=two_subjects(photos))
    )
    after = finish(run)
    for name in ("mug", "rex"):
        assert not torch.equal(after[f"placeholder/{name}/text_encoder"], start[f"placeholder/{name}/text_encoder"])
    assert list(backbone.adapters) == ["mug+rex"]


def test_two_subjects_that_would_have_the_same_words_in_prompts_are_refused(tiny, photos, tmp_path):
    subjects = {"a": read_subject(photos, "mug"), "b": read_subject(photos, "mug")}
    with pytest.raises(ValueError, match="'b' and 'a' would be called 'sks mug' and 'sks mug'"):
        finish(session(tiny(), small("dreambooth_lora"), photos, tmp_path / "run", subjects=subjects))
    backbone = tiny()
    RareToken().attach(backbone, "old", "mug")
    with pytest.raises(ValueError, match="'mug' and 'old' would be called 'sks mug' and 'sks mug'"):
        finish(session(backbone, small("dreambooth_lora"), photos, tmp_path / "run"))
    wordless = small("dreambooth_lora", "modifier.kind=plain_text", "modifier.with_class_noun=false", "train.steps=1")
    finish(session(tiny(), wordless, photos, tmp_path / "two", subjects=two_subjects(photos)))


# --- compute options --------------------------------------------------------------------


def test_gradient_checkpointing_does_not_change_what_is_learned_and_is_switched_off_afterwards(tiny, photos, tmp_path):
    plain = finish(session(tiny(), small("dreambooth_lora"), photos, tmp_path / "a"))
    backbone = tiny()
    saved = finish(
        session(backbone, small("dreambooth_lora", "train.gradient_checkpointing=true"), photos, tmp_path / "b")
    )
    assert all(torch.allclose(v, saved[k], atol=1e-6) for k, v in plain.items())
    assert not backbone.denoiser.is_gradient_checkpointing


def test_learned_parameters_stay_in_fp32_even_if_precision_changes_between_runs(make_tiny_sd, photos, tmp_path):
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        backbone = StableDiffusionBackbone(make_tiny_sd(), "tiny").to(dtype=dtype)
        recipe = small("pivotal_tuning", f"train.mixed_precision={precision}")
        after = finish(session(backbone, recipe, photos, tmp_path / precision))
        assert all(v.isfinite().all() for v in after.values()) and backbone.dtype == dtype
        assert {p.dtype for a in backbone.adapters["mug"] for p in a.parameters()} == {torch.float32}
    finish(session(StableDiffusionBackbone(make_tiny_sd(), "tiny"), small("textual_inversion"), photos, tmp_path / "c"))
