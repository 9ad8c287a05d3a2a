"""Prefetched batches, larger batches and compiled blocks, which speed up the training of the denoising networks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from shared.pretrain.prefetch import Prefetch
from shared.pretrain.task import Compute
from shared.pretrain.toybox import models, stages
from shared.pretrain.toybox.denoising_loss import UnetTraining
from shared.pretrain.toybox.motion_module import MotionTraining


def test_prefetched_batches_belong_to_the_right_steps() -> None:
    drawn: list[tuple[int, bool]] = []

    def draw(step: int) -> int:
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        if step == 7:
            raise ValueError("no picture 7")
        return 10 * step

    ahead = Prefetch(draw, torch.device("meta"))
    assert [ahead(step) for step in (3, 4, 5, 9)] == [30, 40, 50, 90]  # a resumed run jumps ahead like this
    assert dict(drawn)[3] and not dict(drawn)[4] and dict(drawn)[9]
    assert ahead(6) == 60
    with pytest.raises(ValueError, match="no picture 7"):
        ahead(7)
    drawn.clear()
    # on a CPU, nothing is prefetched, because the cores are busy training
    assert Prefetch(draw, torch.device("cpu"))(1) == 10 and drawn == [(1, True)]


@pytest.mark.parametrize(("usual", "batch"), [(UnetTraining(), 32), (MotionTraining(), 4)])
def test_the_averaging_time_shrinks_with_the_square_root_of_the_batch_size(usual: Any, batch: int) -> None:
    assert stages.Pace().of(usual) == usual
    found = stages.Pace(batch=16 * batch, lr=1e-4).of(usual)
    assert (found.batch, found.lr, found.ema) == (16 * batch, 1e-4, pytest.approx(0.999**4))
    assert (1 - found.ema) / (1 - usual.ema) == pytest.approx(4, rel=0.01)


def test_compiled_blocks_give_the_same_results_and_keep_their_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", **options))
    torch.manual_seed(0)
    unet: Any = models.build_unet(16, models.UnetSize((8, 16), heads=2, groups=4, sample_size=8))
    x, t, context = torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 16)
    expected, seen = unet(x, t, context).sample, []
    unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    models.lay_out(unet, Compute(compiled=True))
    torch.testing.assert_close(unet(x, t, context).sample, expected, atol=1e-5, rtol=1e-4)
    assert seen == [(2, 16, 4, 4)] and unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
