"""A given first frame, prefix or region of a clip is kept, as in diffusers' image-to-video pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, WanImageToVideoPipeline
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.backbones.ltx import LTXBackbone
from pcs_video.backbones.wan import WanBackbone
from shared.io.clips.write_clip import write_clip
from shared.io.decode import read_picture
from shared.noise import Uniform
from shared.sampling import denoise
from shared.sampling.given_files import encoded, picture_latents, read_given
from shared.sampling.given_frames import GivenFrames
from shared.sampling.settings import SamplingSettings
from shared.train.tune import Tune, without_given
from tests.core.runs import finish, paint
from tests.video.clip_models import build_animatediff
from tests.video.conftest import moving_square
from tests.video.transformer_models import build_ltx, build_wan
from tests.video.transformer_runs import noise, run_on_clips


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return paint(tmp_path / "photos") / "0.png"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Writes a lossless clip of nine frames."""
    write_clip(tmp_path / "clip", moving_square(0, 9), 8)
    return tmp_path / "clip"


def latents(backbone: Any, settings: SamplingSettings, prompt: str = "a red mug") -> Tensor:
    *_, last = denoise(backbone, [prompt], seeds=[3], settings=settings)
    return last.latents


def test_ltx_gets_timestep_0_for_a_given_first_frame(photo: Path) -> None:
    """The result equals that of `LTXImageToVideoPipeline` if the pipeline starts from the same latents."""
    ltx = LTXBackbone(build_ltx(), "tiny")
    given = GivenFrames(path=photo)
    ours = latents(ltx, SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=9, hooks=(given,)))
    parts = {k: v for k, v in ltx.pipeline().components.items()}
    pipe: Any = LTXImageToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    start[:, :, 0] = picture_latents(ltx, photo, (32, 32))
    packed = pipe(
        image=None, prompt="a red mug", negative_prompt="blurry", height=32, width=32, num_frames=9, guidance_scale=4.0,
        num_inference_steps=4, latents=pipe._pack_latents(start), output_type="latent", max_sequence_length=48,
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, pipe._unpack_latents(packed, 2, 4, 4), atol=2e-5, rtol=0)
    plain = latents(ltx, SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=9))
    assert (ours - plain)[:, :, 1].abs().max() > 1e-3  # the other frames depend on the first


def test_wan_with_a_timestep_per_token_gets_timestep_0_for_a_given_first_frame(photo: Path) -> None:
    wan = WanBackbone(build_wan(time_per_token=True), "tiny")
    given = GivenFrames(path=photo)
    ours = latents(wan, SamplingSettings("blurry", 4.0, 4, height=32, width=32, frames=5, hooks=(given,)))
    plain = wan.pipeline()
    kept = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    parts = {k: v for k, v in plain.components.items() if k in kept}
    pipe: Any = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    pixels, (text, unwanted) = (read_picture(photo).pixels + 1) / 2, (wan.encode([p]) for p in ("a red mug", "blurry"))
    theirs = pipe(
        pixels[None], None, None, 32, 32, 5, 4, 4.0, generator=[torch.Generator().manual_seed(3)], output_type="latent",
        prompt_embeds=text.context, negative_prompt_embeds=unwanted.context,
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=0)


#: For each family, the clip's frame count, the prefix's frame count, and the prefix's latent frame count.
FRAMES = {
    "animatediff": (6, 3, 3),
    "wan": (9, 5, 2),
    "ltx": (17, 9, 2),
}


def make(family: str, make_tiny_sd: Callable[..., Any]) -> Any:
    if family == "animatediff":
        return AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    return WanBackbone(build_wan(), "tiny") if family == "wan" else LTXBackbone(build_ltx(), "tiny")


@pytest.mark.parametrize("family", FRAMES)
def test_a_prefix_is_kept_and_changes_the_frames_after_it(family: str, clip: Path, make_tiny_sd: Any) -> None:
    backbone, (frames, prefix, kept) = make(family, make_tiny_sd), FRAMES[family]
    given = GivenFrames(path=clip, frames=prefix)
    how = SamplingSettings("", 1.0, 3, height=32, width=32, frames=frames)
    made = latents(backbone, SamplingSettings("", 1.0, 3, height=32, width=32, frames=frames, hooks=(given,)))
    assert torch.equal(made[:, :, :kept], encoded(backbone, read_given(clip, prefix, (32, 32)).frames))
    assert (made - latents(backbone, how))[:, :, kept:].abs().max() > 1e-3


def test_a_region_of_a_clip_is_kept(clip: Path, tmp_path: Path, make_tiny_sd: Any) -> None:
    """The region is the upper half of the second and third frames."""
    backbone = make("animatediff", make_tiny_sd)
    masks = torch.full((3, 9, 32, 32), -1.0)
    masks[:, 1:3, :16] = 1
    write_clip(tmp_path / "masks", masks, 8)
    given = GivenFrames(path=clip, mask=tmp_path / "masks")
    made = latents(backbone, SamplingSettings("", 1.0, 3, height=32, width=32, frames=6, hooks=(given,)))
    same = made == encoded(backbone, read_given(clip, 6, (32, 32)).frames)
    expected = torch.zeros_like(same)
    expected[:, :, 1:3, :4] = True
    assert torch.equal(same, expected)


def test_a_first_frame_and_a_region_are_given_together(photo: Path, clip: Path, tmp_path: Path) -> None:
    ltx = LTXBackbone(build_ltx(), "tiny")
    mask = torch.full((3, 9, 32, 32), -1.0)
    mask[:, 1:, :16] = 1
    write_clip(tmp_path / "masks", mask, 8)
    hooks = (GivenFrames(path=photo), GivenFrames(path=clip, mask=tmp_path / "masks"))
    made = latents(ltx, SamplingSettings("", 1.0, 3, height=32, width=32, frames=9, hooks=hooks))
    assert torch.equal(made[:, :, :1], picture_latents(ltx, photo, (32, 32))[:, :, None])
    of_clip = encoded(ltx, read_given(clip, 9, (32, 32)).frames)
    assert torch.equal(made[:, :, 1, :2], of_clip[:, :, 1, :2])
    assert not torch.equal(made[:, :, 1, 2:], of_clip[:, :, 1, 2:])


def test_unsuitable_given_frames_are_refused_with_their_file_name(photo: Path, clip: Path, tmp_path: Path) -> None:
    wan = WanBackbone(build_wan(), "tiny")
    write_clip(tmp_path / "short", moving_square(0, 3), 8)
    for given, message in [
        (GivenFrames(path=clip, frames=4), "a clip of 4 frames does not fit wan, .*nearest: 1 and 5"),
        (GivenFrames(path=clip), "clip would fill 9 frames, but only 9 are generated in all"),
        (GivenFrames(path=clip, frames=12), "clip has only 9 frames, but its first 12 are requested"),
        (GivenFrames(path=tmp_path / "short", mask=photo), "short has 3 frames, but 9 are needed"),
        (GivenFrames(path=clip, mask=tmp_path / "short"), "short contains 3 masks, but .*clip has 9 frames"),
    ]:
        with pytest.raises(ValueError, match=message):
            latents(wan, SamplingSettings("", 1.0, 2, height=32, width=32, frames=9, hooks=(given,)))


# --- the timestep of each frame -------------------------------------------------------------------------------------


def test_each_frame_can_have_its_own_timestep_if_the_network_supports_it(make_tiny_sd: Any) -> None:
    ltx = LTXBackbone(build_ltx(), "tiny")
    x0, eps = noise(2, 4, 3, 4, 4), noise(2, 4, 3, 4, 4, seed=1)
    t = torch.tensor([[0.0, 500.0, 900.0], [0.0, 100.0, 100.0]])
    x_t = ltx.add_noise(x0, eps, t)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])
    for row in range(2):
        for frame in range(3):
            one = ltx.add_noise(x0[:, :, frame], eps[:, :, frame], t[row, frame])
            assert torch.equal(x_t[row, :, frame], one[row])
    v = ltx.target(x0, eps, t)
    torch.testing.assert_close(ltx.to_x0(v, x_t, t), x0)
    torch.testing.assert_close(ltx.to_eps(v, x_t, t), eps)
    text = ltx.encode(["a mug", "a dog"])
    with torch.no_grad():
        alike = ltx.predict(x_t, torch.full((2, 3), 500.0), text)
        torch.testing.assert_close(alike, ltx.predict(x_t, torch.tensor(500.0), text))
        assert not torch.allclose(ltx.predict(x_t, t, text), alike, atol=1e-4)


def test_a_network_with_one_timestep_per_clip_refuses_different_timesteps(make_tiny_sd: Any) -> None:
    clips = make("animatediff", make_tiny_sd)
    x, text = noise(1, 4, 3, 8, 8), clips.encode(["a mug"])
    with torch.no_grad():
        alike = clips.predict(x, torch.full((1, 3), 300), text)
    assert torch.equal(alike, clips.predict(x, torch.tensor(300), text).detach())
    with pytest.raises(ValueError, match="animatediff takes one timestep for all frames of a clip"):
        clips.predict(x, torch.tensor([[0, 300, 300]]), text)
    with pytest.raises(ValueError, match=r"t has shape \[1, 2\], but must be a scalar, \[1\], or \[1, 3\]"):
        clips.add_noise(x, x, torch.tensor([[0, 300]]))


def test_a_first_frame_given_in_training_has_no_noise_and_no_loss(tmp_path: Path) -> None:
    """Only the requested share of the clips gets a first frame."""
    part, x = Uniform(clean_first_frame=0.25), noise(400, 1, 3, 1, 1)
    t = part.draw_times(400, torch.Generator().manual_seed(0), False)
    each = part.of_frames(t, x, torch.Generator().manual_seed(1))
    assert each.shape == (400, 3) and 70 < int((each[:, 0] == 0).sum()) < 130
    assert torch.equal(each[:, 1], t) and torch.equal(each[:, 2], t)
    assert part.of_frames(t, x[:, :, 0], torch.Generator()) is t and Uniform().of_frames(t, x, torch.Generator()) is t
    weight = without_given(None, each)
    assert weight is not None and torch.equal(weight.flatten(1), (each > 0).float())
    assert torch.equal(without_given(torch.full((400, 1, 3, 2, 2), 0.5), each)[:, 0, :, 0, 1], 0.5 * (each > 0))  # type: ignore[index]


def test_the_loss_with_a_given_first_frame_is_that_of_the_noisy_frames(
    clip: Path, tmp_path: Path, make_tiny_sd: Any
) -> None:
    """The loss equals one computed by hand from the only noisy latent frame.

    A network with one timestep per clip refuses the setting.
    """
    folder = tmp_path / "clips"
    folder.mkdir()
    clip.rename(folder / "a")
    ltx = LTXBackbone(build_ltx(), "tiny")
    settings = ("noise.clean_first_frame=1", "train.steps=1")
    run = run_on_clips(ltx, folder, tmp_path, 9, "animatediff_motion_lora", *settings)
    run._attach_names()
    task = Tune(run.context(0, run._unfreeze(run.phases[0][1])))
    with torch.no_grad(), task.state(0, 0) as state:
        assert state.t.shape == (1, 2) and state.t[0, 0] == 0 and state.t[0, 1] > 0
        assert torch.equal(state.x_t[:, :, 0], state.batch.latents[:, :, 0])
        by_hand = (state.prediction - state.target)[:, :, 1].square().mean()
        torch.testing.assert_close(task.losses(state)["denoising"], by_hand)
    clips = make("animatediff", make_tiny_sd)
    run = run_on_clips(clips, folder, tmp_path / "other", 4, "animatediff_motion_lora", *settings)
    with pytest.raises(ValueError, match="noise.clean_first_frame = 1: animatediff takes one timestep for all frames"):
        finish(run)
