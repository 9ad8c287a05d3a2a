"""True clips meet the motion module's acceptance thresholds, but clips from an untrained motion module do not."""

from __future__ import annotations

import pytest
import torch

from shared.pretrain.evaluators.judge_clips import BARS, clip_captions, generate, judge_clips
from shared.pretrain.toybox.evaluate_backbone import open_pipeline
from shared.pretrain.toybox.motion_module import build_adapter
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.weights import WEIGHTS


@pytest.fixture(scope="module")
def untrained():
    from diffusers import AnimateDiffPipeline

    torch.set_num_threads(1)
    pipe = open_pipeline(None)
    return AnimateDiffPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, build_adapter(pipe.unet), pipe.scheduler
    )


def test_true_clips_meet_the_thresholds_but_clips_from_an_untrained_module_do_not(untrained):
    found = judge_clips(untrained, 10, guidance=1.0, steps=1)
    assert all(found["instrument"][name] >= bar for name, bar in BARS.items()), found["instrument"]
    assert found["scores"]["motion"] <= 0.4 and not found["bars"]["motion"]["met"] and not found["met"], found
    assert found["instrument"]["still"] == 0
    with pytest.raises(ValueError, match="too few"):
        judge_clips(untrained, 5)


def test_captions_name_every_motion_and_each_clip_has_its_own_seed(untrained):
    moving, texts = clip_captions(2 * len(MOTIONS), 0)
    assert [m.motion.name for m in moving[: len(MOTIONS)]] == list(MOTIONS)
    assert "spinning" in texts[0] and "moving to the left" in texts[1]
    together, single = (generate(untrained, texts[:2], 1.0, 1, 3, batch_size=size) for size in (2, 1))
    assert together[0].shape == (16, 3, 64, 64) and not torch.equal(together[0], together[1])
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(together, single, strict=True))


def test_the_shipped_motion_module_is_small_and_diffusers_own_pipeline_loads_it():
    from diffusers import AnimateDiffPipeline, MotionAdapter

    folder = WEIGHTS / "motion_adapter"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 15e6
    adapter = MotionAdapter.from_pretrained(folder, local_files_only=True)
    pipe = AnimateDiffPipeline.from_pretrained(WEIGHTS / "backbone", motion_adapter=adapter, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    how = {"height": 64, "width": 64, "num_frames": 4, "num_inference_steps": 1, "output_type": "pt"}
    frames = pipe("a photo of a red and blue duck spinning", generator=torch.Generator().manual_seed(0), **how).frames
    assert frames.shape == (1, 4, 3, 64, 64) and bool(frames.isfinite().all()) and float(frames.std()) > 0.05
