"""Tests the precision used on each device, the fp16 loss scaler, and losses that update only their own parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.optimizers.adamw import AdamW
from shared.train.budget import Budget
from shared.train.last_good_state import LastGood
from shared.train.log import Log
from shared.train.loop import Loop
from shared.train.optim import NotFinite, Optimizers
from shared.train.precision import resolve_precision
from shared.train.task import Update
from shared.trainable import TrainableGroup
from tests.core.runs import finish, paint, sample, session, small


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


# --- choosing the precision --------------------------------------------------------------------


@pytest.mark.parametrize(("amx", "avx", "expected"), [(1, 0, "bf16"), (0, 1, "bf16"), (0, 0, "no"), (None, None, "no")])
def test_auto_selects_bf16_on_a_cpu_that_has_instructions_for_it(monkeypatch, amx, avx, expected):
    for name, value in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx)):
        if value is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda value=value: bool(value), raising=False)
    assert resolve_precision("auto", "cpu") == expected
    assert [resolve_precision(p, "cpu") for p in ("no", "bf16")] == ["no", "bf16"]


def test_auto_selects_bf16_only_on_a_gpu_that_supports_it_natively(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert resolve_precision("auto", "cuda:0") == ("bf16" if native else "fp16")
    assert resolve_precision("fp16", "cuda") == "fp16" and resolve_precision("auto", "meta") == "no"
    with pytest.raises(ValueError, match="fp16 needs a GPU; use bf16, auto or no"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(ValueError, match="'fp8': choose auto, no, bf16 or fp16"):
        resolve_precision("fp8", "cpu")


def test_resuming_warns_if_auto_now_selects_a_different_precision(make_tiny_sd, photos, tmp_path, monkeypatch):
    recipe = small("textual_inversion", "train.mixed_precision=auto", "train.checkpoint_every=1")
    for amx, resume in ((True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
        run_ = session(StableDiffusionBackbone(make_tiny_sd(), "tiny"), recipe, photos, tmp_path)
        steps = run_.steps(resume)
        if resume:
            with pytest.warns(UserWarning, match="auto was 'bf16' when the run began and is 'no' here"):
                next(steps)
        else:
            next(steps)
            next(steps)
        steps.close()


def test_a_run_reports_the_precision_that_auto_chose_and_generates_pictures_with_it(
    make_tiny_sd, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr("shared.train.precision._fast_bf16", lambda: True)
    backbone, seen, encoded = StableDiffusionBackbone(make_tiny_sd(), "tiny"), [], set()
    backbone.vae.encoder.conv_in.register_forward_hook(lambda _, __, out: encoded.add(out.dtype))

    def generate(prompts, seeds, *, guidance: float, steps: int, resolution: int, progress=None):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return sample(
            backbone, prompts, seeds=seeds, guidance=guidance, steps=steps, height=resolution, width=resolution
        )

    def preview(phase: str, step: int):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return sample(backbone, ["a mug"], seeds=[0], steps=1, height=32, width=32), {}

    for asked, dtype in (("auto", torch.bfloat16), ("no", False)):
        recipe = small("dreambooth_lora", f"train.mixed_precision={asked}", "train.validation.every=2", "seed=3")
        one = session(backbone, recipe, photos, tmp_path / asked / "run", class_pictures=generate, preview=preview)
        finish(one)
        backbone.remove("mug")
        assert seen == [dtype, dtype] and one.costs["mixed_precision"] == {"auto": "bf16"}.get(asked, asked)
        seen.clear()
    assert encoded == {torch.float32}, "the autoencoder keeps the precision it was loaded in"


def test_the_autoencoder_keeps_its_precision_under_autocast(make_tiny_sd):
    backbone, seen = StableDiffusionBackbone(make_tiny_sd(), "tiny"), []
    backbone.vae.decoder.conv_in.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(backbone, ["a mug"], seeds=[0], steps=1, height=32, width=32)
    assert seen == [torch.float32]


def test_a_phase_cannot_set_its_own_precision(make_tiny_sd, photos, tmp_path):
    """All phases share one precision, so the setting would otherwise be ignored."""
    with pytest.raises(
        ValueError, match=r"phases\.tune\.train\.mixed_precision = 'bf16': all phases share one precision"
    ):
        recipe = small("pivotal_tuning", "phases.tune.train.mixed_precision=bf16")
        session(StableDiffusionBackbone(make_tiny_sd(), "tiny"), recipe, photos, tmp_path / "run")


# --- the loss scaler for fp16 -----------------------------------------------------------------------


class Line:
    """A task whose gradient overflows at the steps where `bad(step)` is true."""

    def __init__(self, bad=lambda step: False) -> None:
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.bad = bad

    def updates(self, step, micro):
        loss = (self.weight**2).sum()
        if self.bad(step):  # the loss is finite, but its gradient is not
            loss = loss + (self.weight * 0).sum().abs().sqrt()
        yield Update(loss)


def scaled(task: Line) -> tuple[Optimizers, Accelerator]:
    """Returns optimizers and an accelerator that behaves on a CPU as it would on a GPU with fp16."""
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)  # type: ignore[attr-defined]
    group = TrainableGroup("line", [task.weight], lr=0.1, weight_decay=0.0)
    return Optimizers({"main": [group]}, {}, accelerator), accelerator


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(task: Line, steps: int, start: int = 0, state: dict | None = None):
    optimizers, accelerator = scaled(task)
    if state:
        optimizers.load_state_dict(state["optimizer"])
        optimizers.load_scaler_state(state["scaler"])
    good = LastGood(optimizers)
    records = list(Loop(task, optimizers, Budget(steps=steps), 0, accelerator, good=good).run(start))
    return records, optimizers, good


def test_steps_with_an_overflow_are_skipped_and_halve_the_scale():
    task = Line(lambda step: step in (1, 2))
    before = None
    optimizers, accelerator = scaled(task)
    for record in Loop(task, optimizers, Budget(steps=3), 0, accelerator).run():
        if record.step == 1:
            before = task.weight.detach().clone()
        assert before is not None and torch.equal(task.weight, before), "bad gradients change nothing"
        assert math.isfinite(record.grad_norm) == (record.step == 1)
    assert optimizers.skipped == 2 and accelerator.scaler.get_scale() == 2.0**8


def test_twenty_overflows_in_a_row_end_the_run_and_the_last_good_state_can_be_restored():
    task = Line(lambda step: step >= 3)
    optimizers, accelerator = scaled(task)
    good, states, steps = LastGood(optimizers), [], 0
    with pytest.raises(NotFinite, match="the gradient at step 23 is not finite, nor were those of the 19 steps before"):
        for _ in Loop(task, optimizers, Budget(steps=100), 0, accelerator, good=good).run():
            steps += 1
            states.append(task.weight.detach().clone())
    assert steps == 22 and good.put_back() == 2 and torch.equal(task.weight, states[1])


def test_only_consecutive_overflows_count_towards_the_limit():
    records, optimizers, _ = trained(Line(lambda step: step % 4 != 3), 40)
    assert len(records) == 40 and optimizers.skipped == 0


def test_the_scaler_resumes_with_its_saved_state():
    def bad(step: int) -> bool:
        return step == 2

    whole, part = Line(bad), Line(bad)
    _, one, _ = trained(whole, 5)
    _, first, _ = trained(part, 4)
    state = {"optimizer": first.state_dict(), "scaler": json.loads(json.dumps(first.scaler_state()))}
    assert state["scaler"]["scale"] == 2.0**9 and state["scaler"]["_growth_tracker"] == 1
    _, second, _ = trained(part, 5, 4, state)
    assert torch.equal(whole.weight, part.weight) and one.scaler_state() == second.scaler_state()


def test_a_log_contains_null_for_non_finite_values(tmp_path):
    log = Log(tmp_path, tensorboard=False)
    log.scalars(1, {"loss": 0.5, "grad_norm": math.inf, "other": math.nan})
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row == {"step": 1, "loss": 0.5, "grad_norm": None, "other": None}


# --- several groups ------------------------------------------------------------------------------


class Two:
    """A task with two losses per step. Each depends on both weights but trains only one of them."""

    def __init__(self, pieces: int = 1) -> None:
        self.a, self.b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
        self.pieces = pieces

    def updates(self, step, micro):
        yield Update((self.a * self.b).sum() * (micro + 1), ("a",))
        yield Update(((self.a + 3 * self.b) ** 2).sum() * (micro + 1), ("b",))


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_loss_changes_only_its_own_group(pieces):
    """Compares the loop with the same AdamW steps written out by hand."""
    task = Two(pieces)
    accelerator = Accelerator(cpu=True)
    groups = {n: [TrainableGroup(n, [getattr(task, n)], lr=0.1)] for n in ("a", "b")}
    optimizers = Optimizers(groups, dict.fromkeys(groups, AdamW(max_grad_norm=None, weight_decay=0.0)), accelerator)
    norms = []
    a, b = 1.0, 2.0
    ours, theirs = ([nn.Parameter(torch.tensor([v]))] for v in (a, b))
    plain = [torch.optim.AdamW(p, lr=0.1, weight_decay=0.0) for p in (ours, theirs)]
    for record in Loop(task, optimizers, Budget(steps=3), 0, accelerator, pieces).run():
        norms.append(record.grad_norm)
        weight = sum(m + 1 for m in range(pieces)) / pieces
        before = ours[0].detach().clone()
        grad_a = weight * theirs[0].detach()
        share = [(m + 1) / pieces for m in range(pieces)]
        ours[0].grad = grad_a.clone()
        plain[0].step()
        # the earlier pieces of the second loss saw the first weight before its update
        seen = [before] * (pieces - 1) + [ours[0].detach()]
        grad_b = sum(s * 6 * (x + 3 * theirs[0].detach()) for s, x in zip(share, seen, strict=True))
        theirs[0].grad = torch.as_tensor(grad_b)
        plain[1].step()
        assert torch.allclose(task.a, ours[0], atol=1e-6) and torch.allclose(task.b, theirs[0], atol=1e-6)
        assert record.grad_norm == pytest.approx(float(torch.as_tensor(grad_b).norm()), rel=1e-5)
