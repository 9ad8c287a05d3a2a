"""Tests what parts need from a step, which errors are found before the first step, and a run's costs and memory use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from shared.config import Part
from shared.regularize.base import Penalty
from shared.sampling import sampler
from shared.train import checkpoint
from shared.train.costs import Clock
from shared.train.memory import Offloaded
from shared.train.tune import Tune
from shared.types import Step
from tests.core.runs import CLASS, finish, learned, predicted, same, sample, session, small, tuning

# --- declared needs ----------------------------------------------------------------------------


class Asks(Penalty):
    """A penalty that uses the need named by `asks`, which a subclass may or may not declare."""

    kind: str = "asks"
    asks: str = "example_loss"

    def __call__(self, step: Step) -> Tensor:
        return step.need(self.asks).mean()


class Declares(Asks):
    needs: ClassVar[frozenset[str]] = frozenset({"class_prediction"})


class Unserved(Asks):
    needs: ClassVar[frozenset[str]] = frozenset({"example_loss", "attention_maps"})


def task(backbone: Any, photos: Path, folder: Path, *settings: str, **parts: Part) -> Tune:
    recipe = small("textual_inversion", *settings)
    recipe = recipe.model_copy(update={"regularize": {**recipe.regularize, **parts}})
    run = session(backbone, recipe, photos, folder)
    return tuning(run)


def test_a_declared_need_is_provided(tiny, photos, tmp_path):
    tuned = task(tiny(), photos, tmp_path, mine=Declares(asks="class_prediction"))
    assert tuned.needs == {"class_prediction"}
    (update,) = tuned.updates(0, 0)
    step = predicted(tuned)
    assert sorted(step.lazy) == ["class_prediction", "example_loss"], "undeclared needs are not provided"
    assert float(update.parts["mine"]) == pytest.approx(float(step.need("class_prediction").mean()), rel=1e-5)


def test_a_need_that_nothing_provides_is_an_error_when_the_task_is_built(tiny, photos, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"regularize\.mine needs 'attention_maps', which nothing here provides\. Available: base_class.*example_loss",
    ):
        task(tiny(), photos, tmp_path, mine=Unserved())


@pytest.mark.parametrize("asks", ["example_loss", "token_drift"])
def test_using_a_need_that_only_other_parts_declare_is_an_error(tiny, photos, tmp_path, asks):
    anchor = ("regularize.anchor.kind=embedding_anchor",)
    tuned = task(tiny(), photos, tmp_path, *anchor, mine=Declares(asks=asks))
    with pytest.raises(AssertionError, match=f"did not declare the need '{asks}'"):
        list(tuned.updates(0, 0))


def test_class_prompts_for_the_base_model_are_encoded_once(tiny, photos, tmp_path):
    """This is true even while tokens are trained, because the text that the base model reads never changes."""
    backbone, runs = tiny(), []
    prior = ("regularize.prior.kind=prior_prediction", "prompts.set=plain", "train.batch_size=1")
    kept, anew = (
        task(b, photos, tmp_path / n, *prior, f"train.cache={c}")
        for b, n, c in ((backbone, "a", "true"), (tiny(), "b", "false"))
    )
    assert not kept.text_frozen
    backbone.components["text_encoder"].register_forward_hook(lambda *_: runs.append(1))
    losses = [[float(next(t.updates(step, 0)).loss.detach()) for step in range(4)] for t in (kept, anew)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(runs) == 4 * 2 + 1, (
        "two texts with the trained concept per step, and one text for the base model in total"
    )


# --- errors before the first step ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of a mug", r"'a photo of a mug' has no \{concept\}"),
        ("a {concept} and a <dog>", r"names <dog>, which is not loaded"),
        ("a {concept}" + " and a mug" * 20, "too long"),
    ],
)
def test_validation_prompts_are_checked_before_the_first_step(tiny, photos, tmp_path, prompt, message):
    phase = ("phases.tune.train.validation.every=1", f'phases.tune.train.validation.prompts=["{prompt}"]')
    run = session(tiny(), small("pivotal_tuning", *phase), photos, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.validation\.prompts \(phase tune\): .*" + message):
        next(run.steps())
    assert not (tmp_path / "run").exists()
    off = (phase[0].replace("=1", "=0"), phase[1])
    finish(session(tiny(), small("pivotal_tuning", *off), photos, tmp_path / "off"))


def test_class_pictures_match_the_resolution_of_each_phase(tiny, photos, tmp_path):
    """If a phase changes the resolution, its class pictures have the new size."""
    settings = ("phases.a.train.resolution=16", "phases.b.train.steps=1", "phases.a.train.steps=1")
    (tmp_path / "own.yaml").write_text("base: dreambooth_lora\nphases: {a: {trainable: {}}, b: {trainable: {}}}")
    finish(session(tiny(), small(str(tmp_path / "own.yaml"), *CLASS, *settings), photos, tmp_path / "run"))
    from PIL import Image

    sizes = {Image.open(p).size for p in (tmp_path / "cache").rglob("*.png")}
    assert sizes == {(16, 16), (32, 32)}


# --- costs ---------------------------------------------------------------------------------------


def test_a_clock_times_each_kind_of_work_separately(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("shared.train.costs.time.perf_counter", lambda: now[0])
    clock = Clock({"a": 100.0})
    with clock.on("a"):
        now[0] += 1
        with clock.on("b"):
            now[0] += 10
            assert clock.spent == {"a": 101.0, "b": 10.0}
        now[0] += 2
        with clock.on(None):
            now[0] += 50
    now[0] += 1000
    assert clock.spent == {"a": 103.0, "b": 10.0}


def test_training_seconds_exclude_class_pictures_validation_and_the_caller(tiny, photos, tmp_path, monkeypatch):
    slept, real = [0.0], time.perf_counter
    monkeypatch.setattr("shared.train.costs.time.perf_counter", lambda: real() + slept[0])
    recipe = small("dreambooth_lora", "train.validation.every=1", "train.steps=1")

    def costs(name: str) -> dict[str, Any]:
        def generate(prompts, seeds, *, guidance: float, steps: int, resolution: int, progress=None) -> Tensor:
            slept[0] += 1e3
            return torch.zeros(len(seeds), 3, resolution, resolution)

        def preview(phase: str, step: int):
            slept[0] += 1e4
            return torch.zeros(1, 3, 8, 8), {}

        run = session(tiny(), recipe, photos, tmp_path / name, class_pictures=generate, preview=preview)
        for _ in run.steps():
            slept[0] += 1e5
        return run.costs

    first, second = costs("first"), costs("second")
    assert first["class_pictures_seconds"] >= 1e3 > second["class_pictures_seconds"]
    for batch in (first, second):
        assert 1e4 <= batch["validation_seconds"] < 2e4 and 0 < batch["training_seconds"] < 1e3
        assert batch["training_peak_memory"] > 2**20 and batch["training_peak_memory_of"] == "process"


def test_costs_continue_to_add_up_after_an_interruption(tiny, photos, tmp_path):
    recipe = small("textual_inversion", "train.checkpoint_every=1")
    steps = session(tiny(), recipe, photos, tmp_path / "run").steps()
    next(steps)
    steps.close()
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.info["peak"] > 2**20 and state.info["seconds"]["optimisation"] > 0
    checkpoint.amend(tmp_path / "run", seconds={"optimisation": 1e6, "validation": 5.0}, peak=2**60)
    run = session(tiny(), recipe, photos, tmp_path / "run")
    finish(run, resume=True)
    assert 1e6 < run.costs["training_seconds"] < 1e6 + 1e3 and run.costs["validation_seconds"] == 5.0
    assert run.costs["training_peak_memory"] == 2**60


# --- memory --------------------------------------------------------------------------------------


def test_the_autoencoder_processes_a_limited_number_of_pixels_at_a_time(tiny, photos, tmp_path, monkeypatch):
    """The limit applies to both encoding and decoding. It does not change the result."""
    whole = finish(session(tiny(), small("textual_inversion"), photos, tmp_path / "a"))
    pictures = sample(tiny(), ["a mug"], seeds=[0, 1, 2], steps=1)
    for limit in ("shared.train.batches._ENCODE_PIXELS", "shared.sampling.sampler.DECODE_PIXELS"):
        monkeypatch.setattr(limit, 32 * 32)
    backbone, rows = tiny(), []
    for network in (backbone.vae.encoder, backbone.vae.decoder):
        network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    alone = finish(session(backbone, small("textual_inversion"), photos, tmp_path / "b"))
    again = sample(tiny(), ["a mug"], seeds=[0, 1, 2], steps=1)
    assert rows == [1, 1, 1] and all(torch.allclose(v, whole[k], atol=1e-5) for k, v in alone.items())
    assert torch.allclose(again, pictures, atol=1e-5)
    backbone.remove("mug")
    sample(backbone, ["a mug"], seeds=[0, 1], steps=1)
    assert rows == [1] * 5


@pytest.mark.parametrize(("pixels", "limit", "rows"), [(64 * 64, 2**18, 8), (512 * 512, 2**18, 1), (2048**2, 2**20, 1)])
def test_the_pixel_limit_determines_the_number_of_pictures_per_batch(pixels, limit, rows):
    assert sampler.images_per_batch(pixels, limit) == rows


class Traveller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.where = ["device"]

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.where.append(str(device))
        return self


def test_offloaded_networks_return_to_the_device():
    device = torch.device("meta")
    one, two = Traveller(), Traveller()
    offloaded = Offloaded({"vae": one, "text": two}, device, on=True)
    offloaded.offload("vae")
    with offloaded.on_device():
        assert one.where == ["device", "cpu", "meta"]
    assert one.where[-1] == "cpu"
    offloaded.offload("text")
    offloaded.restore()
    assert one.where == ["device", "cpu", "meta", "cpu", "meta"] and two.where == ["device", "cpu", "meta"]
    idle = Offloaded({"vae": one}, torch.device("cpu"))
    idle.offload("vae")
    idle.restore()
    assert len(one.where) == 5 and not idle.on


def test_a_run_that_offloads_networks_learns_the_same_weights(tiny, photos, tmp_path):
    recipe = small("dreambooth_lora", "train.steps=3", "train.validation.every=2")
    whole = finish(session(tiny(), recipe, photos, tmp_path / "a"))
    backbone = tiny()

    def preview(phase: str, step: int):
        assert not run.offloaded._away
        return sample(backbone, ["a mug"], seeds=[0], steps=1, height=32, width=32), {}

    run = session(backbone, recipe, photos, tmp_path / "b", preview=preview)
    run.offloaded.on = True
    used = {"vae": backbone.vae.encoder, "text_encoder": backbone.components["text_encoder"]}
    for name, network in used.items():
        network.register_forward_hook(lambda *_, name=name: check(name))
    seen = []

    def check(name: str) -> None:
        assert name not in run.offloaded._away
        seen.append(name)

    for _ in run.steps():
        assert run.offloaded._away == {"vae", "text_encoder"}
    assert set(seen) == set(used) and not run.offloaded._away
    assert same(whole, learned(run))
