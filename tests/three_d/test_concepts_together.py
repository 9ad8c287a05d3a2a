"""Tests assets guided by one concept, or by two in one prompt, at various strengths.

One concept changes the weights of the whole network (DreamBooth). The other has a learned word and a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pcs_3d.guidance.scores import Ask
from pcs_3d.runner import Runner3D
from shared.concept import Concept, Provenance, capture
from shared.modifiers import LearnableToken, RareToken
from shared.prompts import expand
from shared.trainable import Lora, Weights
from tests.three_d.distilling import recipe
from tests.three_d.test_distill import first_step, gradient
from tests.three_d.test_guidance import looked

#: Each concept's class noun, modifier and trained part.
PARTS = {
    "mug": ("mug", RareToken(token="sks"), Weights(roles=("denoiser.all",))),
    "dog": ("dog", LearnableToken(vectors=1), Lora(rank=2)),
}
BOTH = "a photo of a <mug> and a <dog>"
VIEW = looked(0.0)
T = torch.tensor([400])


def noisy() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def concepts(new_sd) -> dict[str, Concept]:
    """Returns a concept that changes every weight of the denoiser, and a concept with a token and a LoRA."""
    out, draw = {}, torch.Generator().manual_seed(1)
    for name, (noun, modifier, part) in PARTS.items():
        backbone = new_sd()
        modifier.attach(backbone, name, noun, 0)
        part.inject(backbone, name, "part", 0)
        learned = [
            *backbone.placeholders[name].parameters(),
            *(p for a in backbone.adapters[name] for p in a.parameters()),
        ]
        with torch.no_grad():
            for parameter in learned:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        out[name] = capture(backbone, name, Provenance(class_noun=noun, modifier=modifier))
    assert set(out["mug"].tensors) == {"weights"} and set(out["dog"].tensors) == {"adapter", "embeddings"}
    return out


@pytest.fixture
def guided(new_sd, concepts, tmp_path):
    """Returns a function that loads concepts at given strengths and prepares a run.

    The function returns the model, and the run's task just before its first step.
    """

    def begin(prompt: str, strengths: Mapping[str, float]):
        runner = Runner3D(new_sd())
        for name, strength in strengths.items():
            runner.load(concepts[name], strength)
        return runner.backbone, first_step(runner.backbone, recipe("dreamfusion", f"prompt={prompt}"), tmp_path / "run")

    return begin


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_learned_weights_guide_like_a_model_with_those_weights(guided, new_sd, concepts, strength):
    _, task = guided("a photo of a <mug>", {"mug": strength})
    (eps,) = task.scores.eps([Ask("prompt")], noisy(), T, VIEW)
    model = new_sd()
    with torch.no_grad():
        for key, delta in concepts["mug"].tensors["weights"].items():
            _, component, path = key.split(".", 2)
            model.components[component].get_parameter(path).add_(strength * delta.float())
        expected = model.predict(noisy(), T, model.encode(["a photo of a sks mug, front view"]))
    assert torch.equal(eps, expected) if strength == 0 else torch.allclose(eps, expected, atol=1e-5)


@pytest.mark.parametrize("strengths", [{"mug": 1.0, "dog": 1.0}, {"dog": 0.7, "mug": 0.4}])
def test_two_concepts_guide_with_the_predictions_that_generate_pictures(guided, strengths):
    backbone, task = guided(BOTH, strengths)
    (eps,) = task.scores.eps([Ask("prompt")], noisy(), T, VIEW)
    ((_, text),) = task.prompts.rows("prompt", VIEW)[0]
    assert "<mug>" in text and "<dog>" in text
    with torch.no_grad(), backbone.active(strengths):
        assert torch.allclose(
            eps, backbone.predict(noisy(), T, backbone.encode([expand(text, backbone.placeholders)])), atol=1e-5
        )


def test_a_term_can_name_the_concepts_whose_adapters_are_on(guided, new_sd, concepts, tmp_path):
    strengths = {"mug": 0.4, "dog": 1.0}
    backbone, task = guided(BOTH, strengths)
    asks = [Ask("prompt", adapters) for adapters in ("teacher", ("dog", "mug"), ("mug",), ("dog",))]
    both, named, mug, dog = task.scores.eps(asks, noisy(), T, VIEW)
    assert torch.equal(both, named)
    ((_, text),) = task.prompts.rows("prompt", VIEW)[0]
    for eps, name in ((mug, "mug"), (dog, "dog")):
        with torch.no_grad(), backbone.active({name: strengths[name]}):
            expected = backbone.predict(noisy(), T, backbone.encode([expand(text, backbone.placeholders)]))
        assert torch.allclose(eps, expected, atol=1e-5) and not torch.allclose(eps, both, atol=1e-3)
    term = "guidance.terms.plain={kind: prompt, adapters: %s, plain: 1.0}"
    how = recipe("dreamfusion", f"prompt={BOTH}", term % "[dog]")
    assert how.guidance.terms["plain"].ask == asks[3]
    assert gradient(first_step(backbone, how, tmp_path / "more")).isfinite().all()
    with pytest.raises(ValueError, match=r"guidance.terms.plain.adapters: .*'dgo'. Did you mean 'dog'\? .*: dog, mug"):
        first_step(backbone, recipe("dreamfusion", f"prompt={BOTH}", term % "[dgo]"), tmp_path / "wrong")
    with pytest.raises(
        ValueError, match=r"guidance.terms.plain.adapters: unknown value 'dog'.* base, student, teacher"
    ):
        recipe("dreamfusion", term % "dog")


def test_each_strength_changes_the_gradient_and_strength_0_has_no_effect(guided, new_sd, tmp_path):
    strengths = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
    grads = [gradient(guided(BOTH, {"mug": mug, "dog": dog})[1]) for mug, dog in strengths]
    for i, one in enumerate(grads):
        assert one.abs().sum() > 0 and not any(torch.allclose(one, other) for other in grads[:i]), strengths[i]
    backbone = new_sd()
    for name, (noun, modifier, _) in PARTS.items():
        modifier.attach(backbone, name, noun, 0)
    plain = first_step(backbone, recipe("dreamfusion", f"prompt={BOTH}"), tmp_path / "plain")
    assert torch.equal(gradient(plain), grads[-1])


def test_the_model_is_unchanged_after_an_asset_is_made_with_two_concepts(new_sd, concepts, tmp_path):
    fields = []
    for number, strength in enumerate((1.0, 0.5)):
        runner = Runner3D(new_sd())
        runner.load(concepts["mug"], strength)
        runner.load(concepts["dog"])
        before = {k: v.clone() for k, v in runner.backbone.denoiser.state_dict().items()}
        asset = runner.create(recipe("dreamfusion", f"prompt={BOTH}", "train.steps=2"), tmp_path / str(number))
        assert all(torch.equal(v, before[k]) for k, v in runner.backbone.denoiser.state_dict().items())
        assert runner.strengths == {"mug": strength, "dog": 1.0}
        fields.append(asset.field.state_dict()["raw"])
    assert not torch.equal(*fields)


@pytest.mark.parametrize(
    ("settings", "hears_the_word"),
    [
        (("views.drop_subject=0",), True),
        (("views.drop_subject=1",), False),
        (("guidance.terms.prompt.adapters=base",), False),
    ],
)
def test_back_views_and_the_base_model_read_the_class_noun_of_a_loaded_concept(
    new_sd, concepts, tmp_path, settings, hears_the_word
):
    behind = "cameras.azimuth_deg=[170,190]"
    fields = []
    for number in range(2):
        dog = concepts["dog"]
        words = {name: tensor + number for name, tensor in dog.tensors["embeddings"].items()}
        runner = Runner3D(new_sd())
        runner.load(replace(dog, tensors={**dog.tensors, "embeddings": words}))
        how = recipe("dreamfusion", "prompt=a photo of a <dog>", behind, "train.steps=1", *settings)
        fields.append(runner.create(how, tmp_path / str(number)).field.state_dict()["raw"])
    assert torch.equal(*fields) != hears_the_word


def test_class_nouns_that_do_not_fit_into_a_prompt_are_an_error_before_the_first_step(new_sd, concepts, tmp_path):
    runner, dog = Runner3D(new_sd()), concepts["dog"]
    runner.load(replace(dog, meta=dog.meta.model_copy(update={"class_noun": "dog " * 80})))
    asked = ("dreamfusion", "prompt=a photo of a <dog>")
    runner.check(recipe(*asked), {})
    with pytest.raises(ValueError, match="dog dog"):
        runner.check(recipe(*asked, "views.drop_subject=0.5"), {})
