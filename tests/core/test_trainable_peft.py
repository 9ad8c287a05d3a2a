"""Every peft method either works or is refused with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from shared.concept import attach, capture
from shared.config import Part, validate
from shared.trainable import Peft
from shared.trainable.peft_types import ADAPTER_TYPES, UNSUPPORTED

PROMPT = "a photo of a mug on the beach"
LINEAR = ("self_attention", "cross_attention", "feed_forward", "text_encoder")
#: Settings suitable for layers with 16 to 80 columns. All other settings keep peft's defaults.
SMALL: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_dropout": 0.2},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "FOURIERFT": {"n_frequency": 16, "scaling": 20.0},
    "GRALORA": {"r": 4, "alpha": 4, "gralora_dropout": 0.5},
    "HIRA": {"r": 4, "hira_dropout": 0.5},
    "HRA": {"r": 4},
    "LILY": {"r": 4},
    "LOHA": {"r": 4, "module_dropout": 0.5},
    "LOKR": {"r": 64, "alpha": 64, "decompose_factor": 4, "rank_dropout": 0.5},
    "LORA": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "use_rslora": True},
    "MISS": {"r": 4, "miss_dropout": 0.5},
    "OFT": {"oft_block_size": 4, "use_cayley_neumann": False},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4, "psoft_dropout": 0.5},
    "RANDLORA": {"r": 4, "randlora_dropout": 0.5},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 1},
    "WAVEFT": {"n_frequency": 16},
}
DROPS = {name for name, settings in SMALL.items() if any("dropout" in key for key in settings)}
WITH_CONVOLUTIONS = sorted(name for name, known in ADAPTER_TYPES.items() if known.layers == "any")


def part(name: str, roles: tuple[str, ...] = LINEAR, **changes: Any) -> Peft:
    return Peft(type=name, roles=roles, settings={**SMALL.get(name, {}), **changes})


def predict(backbone: Any) -> Tensor:
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return backbone.predict(x_t, torch.tensor([500]), backbone.encode([PROMPT]))


@torch.no_grad()
def output(backbone: Any) -> Tensor:
    return predict(backbone)


@torch.no_grad()
def stir(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    for p in parameters:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))


def trace(backbone: Any) -> Any:
    return {
        c: (repr(m), sorted(vars(m)), [n for n, _ in (*m.named_buffers(), *m.named_parameters())])
        for c, m in backbone.components.items()
    }


def test_every_method_of_the_installed_peft_is_either_offered_or_refused():
    known = {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert ADAPTER_TYPES.keys() | UNSUPPORTED.keys() >= known and not ADAPTER_TYPES.keys() & UNSUPPORTED.keys()
    configs = {getattr(kind, "value", kind): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    for name, offered in ADAPTER_TYPES.items():
        fields = {f.name for f in dataclasses.fields(configs[name])}
        assert offered.settings | offered.fixed.keys() <= fields, name


@pytest.mark.parametrize(
    ("name", "roles"),
    [(name, LINEAR) for name in sorted(ADAPTER_TYPES)] + [(name, ("conv", "proj")) for name in WITH_CONVOLUTIONS],
    ids=[*sorted(ADAPTER_TYPES), *(f"{name} on convolutions" for name in WITH_CONVOLUTIONS)],
)
def test_each_method_can_be_trained_switched_off_saved_loaded_and_removed(new_sd, name, roles):
    backbone = new_sd()
    before, look = output(backbone), trace(backbone)
    group = part(name, roles).inject(backbone, "mug", "x", seed=0)
    adapters = backbone.adapters["mug"]
    for adapter in adapters:
        adapter.train(False)
    if ADAPTER_TYPES[name].exact_start:
        assert torch.equal(output(backbone), before)
    else:
        assert torch.allclose(output(backbone), before, atol=5e-6) and not torch.equal(output(backbone), before)
    ids = {id(p) for p in group.parameters}
    everything = [p for m in backbone.components.values() for p in m.parameters()]
    assert group.parameters and {id(p) for p in everything if p.requires_grad} == ids
    predict(backbone).square().mean().backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in group.parameters if p.grad is not None)
    stir(group.parameters)
    for adapter in adapters:
        adapter.train(True)
    assert torch.equal(output(backbone), output(backbone)) == (name not in DROPS)
    for adapter in adapters:
        adapter.train(False)
    learned = output(backbone)
    assert torch.equal(output(backbone), learned) and not torch.allclose(learned, before, atol=1e-4)
    with backbone.active({}):
        assert torch.equal(output(backbone), before)
    elsewhere = new_sd()
    attach(capture(backbone, "mug"), elsewhere)
    assert torch.equal(output(elsewhere), learned)
    for used in (backbone, elsewhere):
        used.remove("mug")
        assert torch.equal(output(used), before) and trace(used) == look


@pytest.mark.parametrize("name", sorted(ADAPTER_TYPES))
def test_each_method_can_be_trained_and_used_on_half_precision_networks(new_sd, name):
    backbone = new_sd().to(dtype=torch.bfloat16)
    group = part(name).inject(backbone, "mug", "x", seed=0)
    assert all(p.dtype == torch.float32 for p in group.parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = predict(backbone).float().square().mean()
    loss.backward()
    assert any(p.grad is not None for p in group.parameters)
    assert torch.isfinite(output(backbone)).all()


@pytest.mark.parametrize("name", sorted({*ADAPTER_TYPES} - {*WITH_CONVOLUTIONS}))
def test_layers_that_a_method_cannot_adapt_are_refused(sd, name):
    look = trace(sd)
    with pytest.raises(
        ValueError, match=rf"trainable\.x: {name} adapts only linear.*2[29] of the 57 .* for example .*conv"
    ):
        part(name, ("cross_attention", "conv")).inject(sd, "mug", "x", seed=0)
    assert trace(sd) == look and not sd.adapters


def test_orthogonal_finetuning_can_adapt_1x1_convolutions(sd):
    before = output(sd)
    group = part("OFT", ("proj",)).inject(sd, "mug", "x", seed=0)
    assert torch.equal(output(sd), before)
    stir(group.parameters)
    assert not torch.allclose(output(sd), before, atol=1e-4)


class Holder(Part):
    trainable: Peft


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"type": "OTF"}, r"unknown adapter type 'OTF'\. Did you mean 'OFT'\? Available: BEFT, BOFT"),
        (
            {"type": "PREFIX_TUNING"},
            r"'PREFIX_TUNING' cannot be used: it learns prompts for a language model.*Available:",
        ),
        ({"type": "OSF"}, "'OSF' cannot be used: .*it trains nothing on convolutions"),
        ({"type": "LOKR", "settings": {"rank": 4}}, r"settings of LOKR: unknown key 'rank'.*Available: alpha, .*\br\b"),
        ({"type": "LORA", "settings": {"bias": "all"}}, "settings of LORA: unknown key 'bias'"),
        (
            {"type": "LOKR", "settings": {"r": "four"}},
            r"settings\.r = 'four' must be of the same type as peft's default, 8",
        ),
        (
            {"type": "LOKR", "settings": {"decompose_both": 1}},
            "decompose_both = 1 must be of the same type as peft's default, False",
        ),
        (
            {"type": "HRA", "settings": {"r": 3}},
            r"settings\.r = 3: HRA starts as the identity only if r is even",
        ),
    ],
)
def test_errors_are_reported_before_anything_is_injected(parts, message):
    with pytest.raises(ValueError, match=message):
        validate(Holder, {"trainable": parts})


def test_settings_incompatible_with_the_layers_are_refused_and_leave_nothing_behind(sd):
    look = trace(sd)
    with pytest.raises(ValueError, match=r"trainable\.x: cannot add .*ROAD to unet: .*divisible"):
        part("ROAD", group_size=64).inject(sd, "mug", "x", seed=0)
    assert trace(sd) == look and not any(sd.adapters.values())
