"""Networks that do not all fit on a device take turns on it, which does not change the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.backbones import load_backbone
from shared.backbones.placement import Placement, check_budget, place, size_of, to_evict
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from tests.core.runs import finish, learned, same, session, small

DEVICE = torch.device("cpu:0")  # stands in for the compute device, as "cpu" does for main memory
SIZES = {"transformer": 24, "text_encoder_2": 10, "text_encoder": 1, "vae": 1}


@pytest.mark.parametrize(
    ("present", "needed", "budget", "pinned", "leave"),
    [
        ([], "transformer", 30, [], []),
        (["text_encoder", "text_encoder_2"], "transformer", 36, [], []),
        (["text_encoder", "text_encoder_2"], "transformer", 35, [], []),
        (["text_encoder", "text_encoder_2"], "transformer", 34, [], ["text_encoder"]),
        (["text_encoder", "text_encoder_2"], "transformer", 30, [], ["text_encoder", "text_encoder_2"]),
        (["text_encoder_2", "text_encoder"], "transformer", 30, [], ["text_encoder_2"]),
        (["text_encoder_2", "text_encoder"], "transformer", 30, ["text_encoder_2"], ["text_encoder"]),
        (["transformer"], "vae", 10, ["transformer"], []),
        (["text_encoder", "transformer"], "transformer", 24, [], ["text_encoder"]),
        (["vae", "text_encoder"], "transformer", 5, [], ["vae", "text_encoder"]),
    ],
)
def test_the_least_recently_used_networks_leave_first_and_no_more_leave_than_necessary(
    present, needed, budget, pinned, leave
):
    assert to_evict(present, SIZES, needed, budget, pinned) == leave


def test_the_error_for_a_network_larger_than_the_device_states_both_sizes():
    sizes = {"transformer": 24 * 2**30, "vae": 2**28}
    check_budget(sizes, 24 * 2**30, "cuda:0")
    with pytest.raises(ValueError, match=r"the transformer takes 24\.0 GiB, but cuda:0 has only 15\.5 GiB free"):
        check_budget(sizes, int(15.5 * 2**30), "cuda:0")


class Recorded(Placement):
    """A placement that records every move of a network."""

    moves: list[tuple[str, str]]

    def _move(self, name: str, device: torch.device) -> None:
        self.moves.append((name, "in" if device == self.device else "out"))
        super()._move(name, device)


def taking_turns(backbone: Any, budget: int) -> Recorded:
    """Places the backbone on DEVICE with a memory budget of `budget` bytes. Returns the placement."""
    backbone.placement = Recorded({**backbone.components, "vae": backbone.vae}, DEVICE, budget)
    backbone.placement.moves = []
    backbone.placement.watch()
    return backbone.placement


def largest(backbone: Any) -> int:
    return max(size_of(m) for m in (*backbone.components.values(), backbone.vae))


SETTINGS = SamplingSettings(steps=3, height=32, width=32)


def test_sampling_a_picture_moves_each_network_to_the_device_once(new_flux):
    """FLUX needs both text encoders, then the transformer for three steps, then the autoencoder."""
    whole, parts = new_flux(), new_flux()
    expected = sample(whole, ["a mug"], seeds=[0], settings=SETTINGS)
    placement = taking_turns(parts, largest(parts))
    assert torch.equal(sample(parts, ["a mug"], seeds=[0], settings=SETTINGS), expected)
    came = [name for name, where in placement.moves if where == "in"]
    assert sorted(came[:2]) == ["text_encoder", "text_encoder_2"] and came[2:] == ["transformer", "vae"]
    held: list[str] = []
    for name, where in placement.moves:
        (held.append if where == "in" else held.remove)(name)
        assert sum(size_of(placement.networks[n]) for n in held) <= largest(parts)
    assert parts.device == DEVICE


def test_a_network_moves_again_only_if_it_had_to_leave(new_sd):
    backbone = new_sd()
    placement = taking_turns(backbone, 10**9)
    for seed in range(2):
        sample(backbone, ["a mug"], seeds=[seed], settings=SETTINGS)
    backbone.latent_moments(torch.zeros(1, 3, 32, 32))
    assert [name for name, _ in placement.moves] == ["text_encoder", "unet", "vae"]
    backbone.to("cpu")
    sample(backbone, ["a mug"], seeds=[0], settings=SETTINGS)
    assert len(placement.moves) == 3 and backbone.placement is None, "all networks now stay on the device"


@pytest.mark.parametrize("recipe", ["dreambooth_lora", "textual_inversion"])
def test_networks_that_take_turns_learn_the_same_weights_and_trained_networks_stay_on_the_device(
    tiny, photos, tmp_path, recipe
):
    settings = small(recipe, "train.steps=3", "train.cache=false")  # each step encodes pictures and text again
    expected = finish(session(tiny(), settings, photos, tmp_path / "a"))
    backbone = tiny()
    placement = taking_turns(backbone, largest(backbone))
    run = session(backbone, settings, photos, tmp_path / "b")
    for count, _ in enumerate(run.steps()):
        trained = {n for n, m in placement.networks.items() if any(p.requires_grad for p in m.parameters())}
        assert trained <= set(placement.present)
        if not count:
            placement.moves.clear()
    assert not {(n, "out") for n in trained} & set(placement.moves)
    assert same(expected, learned(run))


def test_networks_take_turns_only_if_they_do_not_all_fit_on_the_device(new_sd, saved_sd):
    backbone = new_sd()
    total = sum(size_of(m) for m in (*backbone.components.values(), backbone.vae))
    place(backbone, DEVICE)
    assert backbone.placement is None
    place(backbone, DEVICE, free=lambda device: 2 * total)
    assert backbone.placement is None
    place(backbone, DEVICE, free=lambda device: total)
    assert backbone.placement is not None and backbone.placement.budget == int(0.7 * total)
    with pytest.raises(ValueError, match="GiB free"):
        place(new_sd(), DEVICE, free=lambda device: 10)
    loaded = load_backbone(saved_sd, device="cpu", memory=1)
    assert loaded.placement is not None and not loaded.placement.present
    assert load_backbone(saved_sd, device="cpu").placement is None


@pytest.fixture
def saved_sd(make_tiny_sd, tmp_path):
    make_tiny_sd().save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"
