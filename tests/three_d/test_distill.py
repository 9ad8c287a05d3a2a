"""Tests score distillation in the training loop: adapters, trained parameters, interruptions and NaNs."""

from __future__ import annotations

import pytest
import torch

from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.guidance.scores import Ask
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.modifiers.learnable import LearnableToken
from shared.recipe.resolve import load
from shared.train import checkpoint
from shared.train.memory import recomputed
from shared.train.optim import NotFinite
from shared.train.phase import Interrupted
from shared.train.training_run import TASKS, TrainingRun
from shared.trainable import Lora
from tests.three_d.distilling import SMALL, finish, recipe, session
from tests.three_d.picture_scenes import PictureRecipe
from tests.three_d.test_guidance import looked

GROWS = ("field.grows=true", "background.random=1.0")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def teach(backbone: StableDiffusionBackbone, strength: float = 1.0) -> None:
    """Attaches a concept named `mug`, with a token and a LoRA that has an effect."""
    LearnableToken(vectors=1).attach(backbone, "mug", "mug", 0)
    Lora(rank=2).inject(backbone, "mug", "lora", 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.placeholders["mug"].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        for parameter in [p for a in backbone.adapters["mug"] for p in a.parameters()]:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
            parameter.requires_grad_(False)
    backbone.set_strength("mug", strength)


# --- interruption ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("name", ["dreamfusion", "prolificdreamer"])
def test_an_interrupted_run_equals_an_uninterrupted_one(new_sd, tmp_path, name, stop):
    """The field and the student are equal bit for bit, although the field's parameters are replaced at step 3."""
    whole = finish(session(new_sd(), recipe(name, *GROWS), tmp_path / "whole"))
    run = session(new_sd(), recipe(name, *GROWS, f"train.checkpoint_every={stop}"), tmp_path / "run")
    steps = run.steps()
    for _ in range(stop):
        next(steps)
    steps.close()
    assert checkpoint.load(tmp_path / "run") is not None
    again = session(new_sd(), recipe(name, *GROWS, f"train.checkpoint_every={stop}"), tmp_path / "run")
    assert same(finish(again, resume=True), whole)
    assert whole["field/raw"].shape[-1] == 32


PHASES = """
base: dreamfusion
phases:
  coarse: {task: distill, train: {steps: 2}}
  fine: {task: distill, train: {steps: 3}, guidance: {scale: 5.0}}
"""


def test_the_field_continues_in_the_next_phase_and_a_run_resumes_between_phases(new_sd, tmp_path):
    (tmp_path / "two.yaml").write_text(PHASES)
    small = [s for s in SMALL if not s.startswith("train.steps")]
    two, one = (
        load(str(tmp_path / "two.yaml"), [*small, *more], "3d", PictureRecipe)
        for more in ([], ["phases.fine.train.steps=0"])
    )
    whole = finish(session(new_sd(), two, tmp_path / "whole"))
    steps = session(new_sd(), two, tmp_path / "run").steps()
    assert [next(steps)[0] for _ in range(3)] == ["coarse", "coarse", "fine"]
    steps.close()
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and (state.phase, state.step) == (1, 0) and set(state.carried) == {"field/raw"}
    assert same(finish(session(new_sd(), two, tmp_path / "run"), resume=True), whole)
    coarse = finish(session(new_sd(), one, tmp_path / "coarse"))
    assert same(coarse, dict(state.carried)) and not same(coarse, whole)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(new_sd, tmp_path):
    class Broken(Distill):
        def updates(self, step, micro):
            if step == 4:
                with torch.no_grad():
                    self.field.raw.fill_(torch.nan)
            yield from super().updates(step, micro)

    how = recipe("dreamfusion")
    run = session(new_sd(), how, tmp_path / "run", tasks={**TASKS, DistillTask: Broken})
    with pytest.raises(NotFinite, match=r"the loss at step 5 is nan.* Lower the learning rate \(field.lr\)"):
        finish(run)
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.step == 3 and bool(state.learned["field/raw"].isfinite().all())
    assert same(
        finish(session(new_sd(), how, tmp_path / "run"), resume=True),
        finish(session(new_sd(), how, tmp_path / "other")),
    ), "the resumed run equals a run that never failed"


def test_ctrl_c_saves_a_checkpoint_after_the_step(new_sd, tmp_path):
    import os
    import signal

    run = session(new_sd(), recipe("dreamfusion"), tmp_path / "run")
    with pytest.raises(Interrupted):
        for _, record in run.steps():
            if record.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.step == 2


# --- the adapters behind each prediction, and trained parameters -----------------------------


def first_step(backbone, how, folder) -> Distill:
    """Returns the task of a run just before its first step."""
    run = session(backbone, how, folder, loaded_strengths={n: s for n, s in backbone.strengths.items()})
    return Distill(run.context(0, run._unfreeze(run.phases[0][1])))


def gradient(task: Distill) -> torch.Tensor:
    updates = task.updates(0, 0)
    loss = next(updates).loss
    (grad,) = torch.autograd.grad(loss, [task.field.raw])
    updates.close()
    return grad


def test_a_concept_changes_the_gradient_only_while_it_is_active(new_sd, tmp_path):
    plain = gradient(first_step(new_sd(), recipe("dreamfusion"), tmp_path / "a"))
    backbone = new_sd()
    teach(backbone)
    loaded = gradient(first_step(backbone, recipe("dreamfusion", "prompt=a photo of a <mug>"), tmp_path / "b"))
    unnamed = gradient(first_step(backbone, recipe("dreamfusion"), tmp_path / "c"))
    half_backbone = new_sd()
    teach(half_backbone, 0.5)
    half = gradient(first_step(half_backbone, recipe("dreamfusion"), tmp_path / "d"))
    backbone.set_strength("mug", 0.0)
    off = gradient(first_step(backbone, recipe("dreamfusion"), tmp_path / "e"))
    assert (
        not torch.allclose(loaded, plain) and not torch.allclose(loaded, unnamed) and not torch.allclose(unnamed, plain)
    )
    assert not torch.allclose(half, plain) and not torch.allclose(half, unnamed)
    assert torch.equal(off, plain)


def test_the_student_adds_adapters_to_the_teachers_and_starts_with_the_same_predictions(new_sd, tmp_path):
    backbone = new_sd()
    teach(backbone)
    task = first_step(backbone, recipe("prolificdreamer", "prompt=a photo of a <mug>"), tmp_path / "run")
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([300, 700])

    views = looked(10.0, 170.0)
    told = "plain_prompt"
    ask = lambda adapters: task.scores.eps([Ask(told, adapters)], z, t, views)[0]  # noqa: E731
    assert torch.equal(ask("teacher"), ask("student")), "the student has not learned anything yet"
    assert not torch.allclose(ask("teacher"), ask("base"))
    with task.scores.under("student"):
        assert backbone.strengths == {"mug": 1.0, "student": 1.0}
    with task.scores.under("teacher"):
        assert backbone.strengths == {"mug": 1.0, "student": 0.0}
    with torch.no_grad():
        for parameter in [p for a in backbone.adapters["student"] for p in a.parameters()]:
            parameter.add_(0.1)
    teacher, student, other_view = ask("teacher"), ask("student"), None
    assert not torch.allclose(teacher, student)
    other_view = task.scores.eps([Ask(told, "student")], z, t, looked(90.0, 170.0))[0]
    assert not torch.allclose(other_view[0], student[0]) and torch.allclose(other_view[1], student[1], atol=1e-5)
    assert torch.allclose(task.scores.eps([Ask(told)], z, t, looked(90.0, 170.0))[0], teacher, atol=1e-5)


def test_a_step_trains_the_field_and_the_student_with_separate_losses(new_sd, tmp_path):
    backbone = new_sd()
    frozen = {k: v.clone() for k, v in backbone.denoiser.state_dict().items()}
    run = session(backbone, recipe("prolificdreamer", "train.steps=2"), tmp_path / "run")
    records = [record for _, record in run.steps()]
    assert set(records[0].parts) == {"guidance", "student"} and set(records[0].lr) >= {"pictures", "student_lora"}
    after = backbone.denoiser.state_dict()
    assert all(torch.equal(v, after[k.replace(".weight", ".base_layer.weight")] if k not in after else after[k])
               for k, v in frozen.items() if k in after or k.replace(".weight", ".base_layer.weight") in after)  # fmt: skip
    changed = [
        v for a in backbone.adapters["student"] for k, v in a.state_dict().items() if "lora_B" in k or "2.weight" in k
    ]
    assert changed and all(bool(v.abs().sum() > 0) for v in changed)


def test_the_student_of_views_that_attend_to_each_other_has_the_same_gradient_with_checkpointing(new_sd, tmp_path):
    found = []
    for checkpointing in (False, True):
        backbone = new_sd()
        how = recipe("prolificdreamer", "guidance.joint_views=2", "cameras.ring=2")
        task = first_step(backbone, how, tmp_path / str(checkpointing))
        with recomputed(backbone, checkpointing):
            updates = task.updates(0, 0)
            next(updates)
            parameters = [p for group in task.groups()["student"] for p in group.parameters]
            found.append(torch.autograd.grad(next(updates).loss, parameters))
            updates.close()
    assert any(bool(grad.abs().sum() > 0) for grad in found[0])
    for stored, computed_again in zip(*found, strict=True):
        assert torch.allclose(stored, computed_again, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["guidance.student.group=other"], "nothing is trained in the optimizer group"),
        (["trainable.more={kind: lora}"], "a distill phase trains only the field"),
        (["cameras.ring=4"], "must be a multiple of cameras.ring"),
    ],
)  # fmt: skip
def test_incompatible_settings_are_refused_before_the_first_step(new_sd, tmp_path, settings, why):
    with pytest.raises(ValueError, match=why):
        finish(session(new_sd(), recipe("prolificdreamer", *settings), tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run") is None


def test_teachers_of_every_parameterization_predict_the_noise(new_sd, make_tiny_sd_v, flux, tmp_path):
    """Epsilon, v and flow predictions are converted to noise predictions, each with its own formula."""
    for i, backbone in enumerate((new_sd(), StableDiffusionBackbone(make_tiny_sd_v(), "tiny"), flux)):
        side = f"train.resolution={32}"
        task = first_step(backbone, recipe("dreamfusion", side, "guidance.resolution=32"), tmp_path / str(i))

        z = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
        t = torch.tensor([400]) if backbone.discrete_time else torch.tensor([400.0])
        (eps,) = task.scores.eps([Ask("null")], z, t, looked(0.0))
        prediction = backbone.predict(z, t, backbone.encode([""]))
        alpha, sigma = (v.reshape(()) for v in backbone.alpha_sigma(t))
        expected = {
            "epsilon": prediction,
            "v_prediction": sigma * z + alpha * prediction,
            "flow": z + alpha * prediction,
        }
        assert torch.allclose(eps, expected[backbone.prediction_type], atol=1e-5)
        assert gradient(task).abs().sum() > 0, "the gradient passes through the encoder"


@pytest.mark.parametrize("teacher", ["v", "flow"])
def test_v_and_flow_teachers_train_a_field(make_tiny_sd_v, flux, tmp_path, teacher):
    backbone = flux if teacher == "flow" else StableDiffusionBackbone(make_tiny_sd_v(), "tiny")
    how = recipe("dreamfusion", "train.steps=2", "guidance.resolution=32")
    raw = finish(session(backbone, how, tmp_path / "run"))["field/raw"]
    assert bool(raw.isfinite().all()) and not torch.equal(raw, how.field.build(3, 0).state_dict()["raw"])


def test_a_run_without_concepts_needs_no_subject(new_sd, tmp_path):
    run: TrainingRun = session(new_sd(), recipe("sjc", "train.resolution=null", "field.side=8"), tmp_path / "run")
    found = finish(run)
    assert found["field/raw"].shape == (4, 4, 8, 8)
