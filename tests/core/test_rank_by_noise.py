"""Compares T-LoRA, whose rank decreases as the noise increases, with a plain LoRA that has rows of A set to 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.concept import Provenance, attach, capture, export, read, save
from shared.config import validate
from shared.train.memory import recomputed
from shared.trainable import Lora
from shared.trainable.rank_by_noise import rank_at

ROLES = ("attention", "feed_forward", "proj")
TIMES = torch.tensor([990, 250])


def learned(backbone: Any, name: str = "mug", **settings: Any) -> list[Any]:
    """Injects a LoRA of rank 4, gives it random values as if it had been trained, and returns its adapters."""
    roles = (*ROLES, "conv") if "conv" in backbone.roles() else ROLES
    group = Lora(**{"roles": roles, "rank": 4, "min_rank": 1, **settings}).inject(backbone, name, "lora", 0)
    draw = torch.Generator().manual_seed(7)
    for parameter in group.parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return backbone.adapters[name]


def predict(backbone: Any, t: Tensor = TIMES) -> Tensor:
    text = backbone.encode(["a photo of a mug"] * len(t))
    x = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(3))
    return backbone.predict(x.expand(len(t), *x.shape[1:]), t, text)


def plain_with_rows(backbone: Any, state: dict[str, Tensor], rows: int, t: Tensor) -> Tensor:
    """Returns the prediction of a plain LoRA with the values in `state`, keeping only the first `rows` rows of A."""
    (adapter,) = learned(backbone, "plain", min_rank=None)
    cut = {
        k: v * (torch.arange(len(v)) < rows).view(-1, *[1] * (v.ndim - 1)) if "lora_A" in k else v
        for k, v in state.items()
    }
    adapter.load_state_dict(cut)
    with torch.no_grad():
        out = predict(backbone, t)
    backbone.remove("plain")
    return out


def test_the_rank_follows_the_formula_in_the_paper() -> None:
    t = torch.tensor([0, 1, 125, 499, 500, 875, 999])
    assert rank_at(t, 16, 8).tolist() == [16, 15, 15, 12, 12, 9, 8]  # floor(8 (1000 - t) / 1000) + 8
    assert rank_at(torch.tensor([1000.0]), 64, 32).tolist() == [32] and rank_at(t, 4, 4).tolist() == [4] * 7


def test_each_picture_uses_the_rank_for_its_own_timestep(backbone: Any) -> None:
    (adapter,) = learned(backbone)
    state = adapter.state_dict()
    with torch.no_grad():
        both = predict(backbone)
        one = predict(backbone, TIMES[:1])
    torch.testing.assert_close(one[0], both[0], atol=1e-5, rtol=1e-4)
    backbone.remove("mug")
    rows = rank_at(TIMES, 4, 1).tolist()
    assert rows == [1, 3]
    for i, count in enumerate(rows):
        oracle = plain_with_rows(backbone, state, count, TIMES[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], oracle, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(oracle, plain_with_rows(backbone, state, 4, TIMES[i : i + 1]), atol=1e-4)


def test_the_rank_also_depends_on_the_noise_under_guidance(sd: Any) -> None:
    (adapter,) = learned(sd)
    state, t = adapter.state_dict(), torch.tensor(700)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    positive, negative = sd.encode(["a mug", "a dog"]), sd.encode(["", "bad"])
    with torch.no_grad():
        guided = sd.predict_guided(x, t, positive, negative, 5.0)
        assert rank_at(t[None], 4, 1).tolist() == [1]
        adapter.load_state_dict({k: v * (torch.arange(len(v)) < 1).view(-1, *[1] * (v.ndim - 1)) if "lora_A" in k else v
                                 for k, v in state.items()})  # fmt: skip
        torch.testing.assert_close(sd.predict_guided(x, t, positive, negative, 5.0), guided, atol=1e-5, rtol=1e-4)


def test_the_lora_starts_without_an_effect_and_leaves_no_trace_when_removed(backbone: Any) -> None:
    with torch.no_grad():
        before, printed = predict(backbone), repr(backbone.denoiser)
        Lora(roles=ROLES, rank=4, min_rank=0, orthogonal=True).inject(backbone, "mug", "lora", 0)
        assert torch.equal(predict(backbone), before)
        backbone.remove("mug")
        learned(backbone)
        assert not torch.equal(predict(backbone), before)
        backbone.remove("mug")
        assert torch.equal(predict(backbone), before) and repr(backbone.denoiser) == printed


def test_masked_rows_learn_nothing(sd: Any) -> None:
    (adapter,) = learned(sd)
    predict(sd, torch.tensor([999])).square().mean().backward()
    for key, parameter in sd.unet.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and ("lora_A" in key or "lora_B" in key)
            masked = parameter.grad[1:] if "lora_A" in key else parameter.grad[:, 1:]
            assert not masked.any(), key
        else:
            assert parameter.grad is None
    assert any(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_recomputed_layers_use_the_timesteps_of_their_own_prediction(backbone: Any) -> None:
    (adapter,) = learned(backbone)
    gradients = []
    for on in (False, True):
        backbone.denoiser.train()
        with recomputed(backbone, on):
            loss = predict(backbone).square().mean() + predict(backbone, torch.tensor([600])).square().mean()
            with torch.no_grad():
                predict(backbone, torch.tensor([10]))
            loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        for parameter in adapter.parameters():
            parameter.grad = None
        backbone.denoiser.eval()
    assert len(gradients[0]) == len(gradients[1]) > 0 and backbone.prediction_time is None
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_saved_concept_keeps_the_noise_dependent_rank(new_sd: Callable[..., Any], tmp_path: Path) -> None:
    backbone = new_sd()
    learned(backbone)
    with torch.no_grad():
        expected = predict(backbone)
    concept = capture(backbone, "mug", Provenance(class_noun="mug"))
    backbone.remove("mug")
    save(concept, tmp_path / "mug.concept")
    loaded = read(tmp_path / "mug.concept")
    attach(loaded, backbone)
    with torch.no_grad():
        assert torch.equal(predict(backbone), expected)
    again = capture(backbone, "mug", Provenance(class_noun="mug"))
    assert again.meta.adapters == concept.meta.adapters and again.meta.adapters["lora"]["unet"]["min_rank"] == 1
    backbone.remove("mug")
    with pytest.raises(
        ValueError,
        match="decreases as the noise increases, down to 1, but diffusers' LoRA files have a fixed rank.*dreambooth_lora or "
        "trainable",
    ):
        export(loaded, tmp_path / "out", backbone=backbone)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("least", [5, -1, 1.5, "many", True])
def test_the_minimum_rank_in_a_file_is_checked(new_sd: Callable[..., Any], tmp_path: Path, least: Any) -> None:
    backbone = new_sd()
    learned(backbone)
    path = tmp_path / "mug.concept"
    save(capture(backbone, "mug", Provenance(class_noun="mug")), path)
    said = json.loads((path / "concept.json").read_text())
    assert said["adapters"]["lora"]["unet"]["min_rank"] == 1
    said["adapters"]["lora"]["unet"]["min_rank"] = least
    (path / "concept.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="min_rank"):
        read(path)


def test_impossible_settings_are_refused(sd: Any) -> None:
    with pytest.raises(ValueError, match="min_rank = 9 must not exceed rank = 8"):
        validate(Lora, {"rank": 8, "min_rank": 9})
    with pytest.raises(ValueError, match="min_rank does not work with dora"):
        validate(Lora, {"min_rank": 2, "dora": True})
    with pytest.raises(ValueError, match="text_encoder has no noise level"):
        Lora(roles=("attention", "text_encoder"), min_rank=1).inject(sd, "mug", "lora", 0)
    assert not sd.adapters and not hasattr(sd.unet, "peft_config")


def test_an_orthogonal_lora_starts_with_orthonormal_rows(sd: Any) -> None:
    Lora(roles=("attention", "conv"), rank=4, orthogonal=True).inject(sd, "mug", "lora", 3)
    state: dict[str, Tensor] = sd.adapters["mug"][0].state_dict()
    downs = [v.flatten(1) for k, v in state.items() if "lora_A" in k]
    assert len(downs) > 10 and not torch.equal(downs[0], downs[1])
    for down in downs:
        torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-5, rtol=0)
