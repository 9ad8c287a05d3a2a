"""Lean layers give the same gradients as PyTorch's own, bit for bit, and store less for the backward pass."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from shared.backbones import load_backbone
from shared.train.frozen_layers import lean
from tests.core.runs import paint, session, small

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def adapted(make_tiny_sd, targets: list[str]) -> Any:
    """Returns a frozen U-Net in training mode whose LoRA does not start at zero."""
    unet = make_tiny_sd().unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return unet.train()


def backward(unet: Any, half: bool = False) -> tuple[dict[str, Tensor], Tensor, int]:
    """Returns the parameters' and the input's gradients, and the number of bytes stored for the backward pass."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw).requires_grad_()
    words, t = torch.randn(2, 5, 16, generator=draw), torch.tensor([3, 700])
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    stored: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            stored[tensor.untyped_storage()._cdata] = tensor
        return tensor

    unet.zero_grad()
    precision = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        loss = unet(x, t, words).sample.float().square().mean()
    size = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    loss.backward()
    assert x.grad is not None
    return {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}, x.grad, size


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, ["conv1", "conv_shortcut", "ff.net.0.proj", "to_v"]])
def test_lean_layers_give_the_same_gradients_and_store_less(make_tiny_sd, targets, half):
    unet = adapted(make_tiny_sd, targets)
    expected, of_x, whole = backward(unet, half)
    with lean([unet]):
        found, of_x_now, less = backward(unet, half)
    assert found.keys() == expected.keys() and len(found) > 8
    assert all(torch.equal(found[n], expected[n]) for n in expected) and torch.equal(of_x_now, of_x)
    assert less < 0.85 * whole
    assert backward(unet, half)[2] == whole


def test_the_layers_own_trainable_weights_have_the_same_gradients(make_tiny_sd):
    unet = make_tiny_sd().unet.train().requires_grad_(True)
    expected, _, _ = backward(unet)
    with lean([unet]):
        found, _, _ = backward(unet)
    assert found.keys() == expected.keys() == dict(unet.named_parameters()).keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_copy_made_inside_the_context_uses_its_own_weights(make_tiny_sd):
    unet = make_tiny_sd().unet.requires_grad_(False)
    with lean([unet]):
        other = copy.deepcopy(unet)
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert backward(other)[1].abs().max() > 0 and backward(unet)[1].abs().max() == 0


def test_the_layers_are_restored_after_an_error(make_tiny_sd):
    unet = make_tiny_sd().unet
    before = [type(m) for m in unet.modules()]
    with pytest.raises(RuntimeError, match="stop"), lean([unet]):
        assert [type(m) for m in unet.modules()] != before
        raise RuntimeError("stop")
    assert [type(m) for m in unet.modules()] == before


def test_an_autoencoder_passes_the_same_gradient_to_the_picture(make_tiny_sd):
    vae = make_tiny_sd().vae.requires_grad_(False)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad(vae.encode(picture).latent_dist.mean.square().sum(), picture)
        return found

    expected = gradient()
    with lean([vae]):
        assert torch.equal(gradient(), expected)


def test_layers_are_lean_during_a_phase_and_ordinary_afterwards(make_tiny_sd, tmp_path):
    make_tiny_sd().save_pretrained(tmp_path / "model")
    backbone = load_backbone(tmp_path / "model")
    networks = (backbone.denoiser, backbone.vae)
    before = [[type(m) for m in network.modules()] for network in networks]
    run = session(backbone, small("textual_inversion"), paint(tmp_path / "photos"), tmp_path / "run")
    steps = run.steps()
    next(steps)
    assert all({"_FrozenConv2d", "_GroupNorm"} <= {type(m).__name__ for m in n.modules()} for n in networks)
    list(steps)
    assert [[type(m) for m in network.modules()] for network in networks] == before
