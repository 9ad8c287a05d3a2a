"""All tensors in a step are on the same device.

Without a GPU, tensors on the `meta` device reveal most places where devices are mixed. Tests that need a GPU are marked
`cuda`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones import load_backbone
from shared.backbones.flux import FluxBackbone
from shared.backbones.placement import size_of
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Provenance, attach, capture, read, save
from shared.concept.verify import bare_copy
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.trainable import Lora
from shared.types import Conditioning
from tests.core.runs import finish, learned, session, small

FAMILIES = {
    "sd": ("make_tiny_sd", StableDiffusionBackbone),
    "sd_v": ("make_tiny_sd_v", StableDiffusionBackbone),
    "flux": ("make_tiny_flux", FluxBackbone),
}
SETTINGS = SamplingSettings(steps=2, height=32, width=32)
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=FAMILIES)
def new(request: pytest.FixtureRequest) -> Any:
    """A function that makes one family's tiny backbone."""
    make, kind = FAMILIES[request.param]
    return lambda: kind(request.getfixturevalue(make)(), request.param)


# --- without a GPU -----------------------------------------------------------------------------


def one_step(backbone: Any) -> tuple[Conditioning, Tensor]:
    """Encodes pictures and text, adds noise, predicts, and backpropagates. Returns the conditioning and the loss."""
    device = backbone.device
    latents = backbone.latent_moments(torch.zeros(2, 3, 32, 32, device=device))[0]
    noise, t = torch.randn(latents.shape, device=device), torch.tensor([300, 700], device=device)
    text = backbone.encode(["a photo of a mug", "a dog"], t)
    prediction = backbone.predict(backbone.add_noise(latents, noise, t), t, text)
    loss = ((prediction - backbone.target(latents, noise, t)) ** 2).mean()
    loss.backward()
    return text, loss


def test_a_training_step_does_not_mix_devices(new):
    """The step trains a LoRA in the text encoder and the denoiser.

    It cannot train a word, because `meta` tensors have no values, so the word could not be found in the prompt.
    """
    backbone = new()
    Lora(rank=2, roles=("attention", "text_encoder")).inject(backbone, "thing", "lora", 0)
    backbone.to("meta")
    parameters = [p for m in backbone.components.values() for p in m.parameters() if p.requires_grad]
    text, loss = one_step(backbone)
    assert isinstance(text.context, Tensor) and {loss.device.type, text.context.device.type} == {"meta"}
    assert parameters and all(p.grad is not None and p.grad.device.type == "meta" for p in parameters)
    guided = backbone.predict_guided(torch.zeros(2, 4, 8, 8, device="meta"), torch.tensor(5.0), text, text, 3.0)
    assert backbone.decode(guided).device.type == "meta"


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(new):
    return lambda: new().to("cuda")


def marked(function: Any) -> Any:
    for mark in cuda:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_on_a_gpu_learns_finite_weights(on_gpu, photos, tmp_path, precision):
    learned = finish(session(on_gpu(), small("pivotal_tuning", f"train.mixed_precision={precision}"), photos, tmp_path))
    assert learned and all(t.isfinite().all() for t in learned.values())


@marked
def test_pictures_from_the_gpu_and_the_cpu_match(new, on_gpu):
    seen = sample(on_gpu(), ["a mug"], seeds=[0], settings=SETTINGS).cpu()
    assert torch.allclose(seen, sample(new(), ["a mug"], seeds=[0], settings=SETTINGS), atol=2e-2)


@marked
def test_a_concept_learned_on_a_gpu_gives_the_same_pictures_after_saving_and_loading(on_gpu, photos, tmp_path):
    backbone = on_gpu()
    recipe = small("pivotal_tuning")
    run = session(backbone, recipe, photos, tmp_path / "run")
    finish(run)
    prompt = [f"a photo of a {backbone.placeholders['mug'].words}"]
    before = sample(backbone, prompt, seeds=[0], settings=SETTINGS)
    path = save(capture(backbone, "mug", Provenance(class_noun="mug", recipe=recipe)), tmp_path / "mug.concept").path
    again = on_gpu()
    attach(read(Path(str(path))), again)
    assert torch.equal(sample(again, prompt, seeds=[0], settings=SETTINGS), before)


@marked
def test_networks_that_take_turns_on_a_gpu_give_the_same_pictures_and_weights(new, on_gpu, photos, tmp_path):
    """The memory limit is the size of the largest network, so the networks cannot all be on the GPU at once."""
    make, whole = tmp_path / "model", on_gpu()  # `make` is the folder that `whole` is saved to
    whole.pipeline().save_pretrained(make)
    limit = max(size_of(m) for m in (*whole.components.values(), whole.vae))
    parts = load_backbone(make, device="cuda", memory=limit)
    expected = sample(whole, ["a mug"], seeds=[0], settings=SETTINGS)
    assert torch.allclose(sample(parts, ["a mug"], seeds=[0], settings=SETTINGS), expected, atol=1e-4)
    assert parts.placement is not None and len(parts.placement.present) < len(parts.placement.networks)
    copied = bare_copy(parts.components["text_encoder"], own_embeddings=True)
    ids = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    assert torch.equal(copied(ids)[0], parts.components["text_encoder"](ids)[0])
    recipe = small("pivotal_tuning")
    runs = [session(b, recipe, photos, tmp_path / n) for b, n in ((whole, "a"), (parts, "b"))]
    for run in runs:
        finish(run)
    one, other = (learned(run) for run in runs)
    assert one.keys() == other.keys() and all(torch.allclose(t, other[k], atol=1e-4) for k, t in one.items())
