"""Wan (with one or two experts) and LTX learn from pictures and clips, and export their concepts to diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pcs_video.recipe import VideoRecipe
from shared.concept import Provenance, attach, capture, export, read, save
from shared.io.clips.write_clip import write_clip
from shared.modifiers import LearnableToken
from shared.recipe.resolve import load
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from shared.train.batches import Data
from shared.types import Example
from tests.core.runs import finish, paint, session, small
from tests.video.conftest import moving_square
from tests.video.transformer_runs import FAMILIES, ask, frames_of, learn, networks, noise, run_on_clips


@pytest.fixture(params=FAMILIES)
def new(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Returns a function that builds the tiny backbone of a family."""
    return FAMILIES[request.param]


@pytest.fixture
def backbone(new: Callable[[], Any]) -> Any:
    return new()


# --- training ---------------------------------------------------------------------------------------------------


def snapshot(backbone: Any) -> dict[str, Tensor]:
    modules = {**backbone.components, "vae": backbone.vae}
    return {f"{c}.{n}": p.detach().clone() for c, m in modules.items() for n, p in m.named_parameters()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


@pytest.fixture(scope="module")
def longer_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    for i in range(2):
        write_clip(folder / f"{i}", moving_square(i, frames=9, side=40), 8)
    return folder


def test_a_step_on_pictures_changes_only_the_adapter(backbone: Any, photos: Path, tmp_path: Path) -> None:
    before = snapshot(backbone)
    settings = ("sources.class_pictures=null", "regularize.prior=null", "train.steps=1", "trainable.lora.rank=2")
    learned = finish(session(backbone, small("dreambooth_lora", *settings), photos, tmp_path / "run"))
    assert {k.split(".")[0] for k in learned} == {f"adapter/lora/{n}" for n in networks(backbone)}
    ups = [v for k, v in learned.items() if "lora_B" in k]
    assert ups and any(bool(v.abs().max() > 0) for v in ups)
    after = snapshot(backbone)
    for key, value in before.items():
        name = key if key in after else ".base_layer.".join(key.rsplit(".", 1))
        assert torch.equal(after[name], value), key


def test_a_step_on_clips_changes_only_the_adapter(backbone: Any, longer_clips: Path, tmp_path: Path) -> None:
    before = snapshot(backbone)
    run = run_on_clips(backbone, longer_clips, tmp_path, frames_of(backbone))
    learned = finish(run)
    assert any("lora_B" in k and bool(v.abs().max() > 0) for k, v in learned.items())
    assert all(".attn1." in k for k in learned) and any("self_attention" in note for note in run.ports)
    after = snapshot(backbone)
    for key, value in before.items():
        name = key if key in after else ".base_layer.".join(key.rsplit(".", 1))
        assert torch.equal(after[name], value), key


def test_a_motion_is_learned_in_the_queries_and_keys_of_joint_attention(
    backbone: Any, longer_clips: Path, tmp_path: Path
) -> None:
    """MotionDirector has a port for networks without temporal layers.

    Adapters on Q and K of the chosen blocks learn the motion. Other adapters learn the clips' appearance and are
    discarded.
    """
    settings = (
        "task.skip=0",
        "trainable.temporal.blocks=1",
        "noise.kind=uniform",
        "noise.low=0.8",
        "trainable.spatial.rank=2",
    )
    run = run_on_clips(backbone, longer_clips, tmp_path, frames_of(backbone), "motion_director_joint", *settings)
    finish(run)
    touched = {m for a in backbone.adapters["m"] for m in a.modules()}
    assert touched and all(".1.attn1.to_" in name and name[-1] in "qk" for name in touched)
    looks = {m for name in run.per_source.values() for s in name for a in backbone.adapters[s] for m in a.modules()}
    assert looks and not any("attn1" in name for name in looks)
    moved = {
        n for a in backbone.adapters["m"] for n, v in a.state_dict().items() if "lora_B" in n and v.abs().max() > 0
    }
    assert moved and all(n.startswith(networks(backbone)[0] + ".") for n in moved)  # only the high-noise expert learns
    assert any("self_attention" in note for note in run.ports)


def test_a_motion_can_be_limited_to_one_expert() -> None:
    backbone = FAMILIES["wan 2.2"]()
    learn(backbone, networks=("transformer",))
    assert {key.split(".")[0] for a in backbone.adapters["my-mug"] for key in a.state_dict()} == {"transformer"}


def test_the_spatial_path_learns_from_the_first_latent_frame(
    backbone: Any, longer_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first latent frame encodes a single picture, so MotionDirector's spatial path always uses it."""
    shown: list[Tensor] = []
    add_noise = type(backbone).add_noise

    def watched(self: Any, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        shown.append(x0)
        return add_noise(self, x0, noise, t)

    monkeypatch.setattr(type(backbone), "add_noise", watched)
    all_blocks = ("trainable.temporal.roles=[temporal_attention]", "trainable.temporal.blocks=")  # both blocks
    settings = (*all_blocks, "task.skip=0", "train.steps=3")
    finish(run_on_clips(backbone, longer_clips, tmp_path, frames_of(backbone), "motion_director", *settings))
    assert [x.ndim for x in shown] == [4, 5] * 3
    stills = backbone.encode_pixels(torch.stack([moving_square(i, 9, 40)[:, 0, :32, :32] for i in range(2)]))
    assert stills.shape[1:] == shown[0].shape[1:]
    for picture, clip in zip(shown[::2], shown[1::2], strict=True):
        assert torch.equal(picture, clip[:, :, 0])


def test_clip_masks_are_averaged_over_the_frames_of_each_latent_frame(backbone: Any, tmp_path: Path) -> None:
    """The mask covers part of the second frame and nothing else.

    In that part, the averaged mask is 0 in the first latent frame and 1/r in the second, which represents r frames.
    """
    frames = frames_of(backbone)
    mask = torch.zeros(1, frames, 32, 32)
    mask[:, 1, :16] = 1
    example = Example(moving_square(0, frames), "a toy", ("m",), masks={"m": mask})
    recipe = load("animatediff_motion_lora", ["backbone=tiny", "output=m.concept"], "video", VideoRecipe)
    batch = Data([example], recipe, backbone, {"m": "toy"}, {"m": "toy"}).batch(0, 0)
    expected = torch.zeros(1, 1, 2, 4, 4)
    expected[:, :, 1, :2] = 1 / (frames - 1)
    assert batch.mask is not None and batch.latents.shape[2:] == (2, 4, 4)
    torch.testing.assert_close(batch.mask, expected)
    torch.testing.assert_close(batch.owner_masks["m"], expected)


def test_a_window_with_an_unsupported_frame_count_is_refused(longer_clips: Path, tmp_path: Path) -> None:
    backbone = FAMILIES["wan"]()
    with pytest.raises(ValueError, match="a clip of 4 frames does not fit wan, .*nearest: 1 and 5"):
        finish(run_on_clips(backbone, longer_clips, tmp_path, 4))


# --- concepts and exports ---------------------------------------------------------------------------------------


def test_a_concept_is_saved_and_loaded(new: Callable[[], Any], tmp_path: Path) -> None:
    backbone = new()
    modifier = LearnableToken(vectors=2)
    words = modifier.attach(backbone, "my-mug", "mug").words
    learn(backbone)
    for parameter in backbone.placeholders["my-mug"].parameters():
        parameter.data += 0.5
    prompts = (f"a photo of a {words}", "a dog")
    expected = ask(backbone, prompts)
    path = save(capture(backbone, "my-mug", Provenance(class_noun="mug", modifier=modifier)), tmp_path / "m").path
    fresh = new()
    attach(read(Path(str(path))), fresh)
    assert torch.equal(ask(fresh, prompts), expected)
    assert read(Path(str(path))).meta.backbone.family == backbone.family


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_the_exported_files(new: Callable[[], Any], tmp_path: Path, dora: bool) -> None:
    """A diffusers pipeline that loads the files as the README describes generates the same clip as our sampler."""
    backbone = new()
    modifier = LearnableToken(vectors=2)
    words = modifier.attach(backbone, "Cup_2", "mug").words
    for parameter in backbone.placeholders["Cup_2"].parameters():
        parameter.data += 0.5 * noise(*parameter.shape, seed=5)
    learn(backbone, "Cup_2", alpha=2.0, dora=dora)
    frames, prompt = frames_of(backbone), f"a photo of a {words}"
    settings = SamplingSettings("", 4.0, 3, height=32, width=32, frames=frames)
    ours = sample(backbone, [prompt], seeds=[3], settings=settings)
    concept = capture(backbone, "Cup_2", Provenance(class_noun="mug", modifier=modifier))
    backbone.remove("Cup_2")
    report = export(concept, tmp_path / "out", backbone=backbone)
    names = [f"denoiser {n}" for n in networks(backbone)] if len(networks(backbone)) > 1 else ["denoiser"]
    assert set(report["checks"]) == {*names, "text"}
    assert all(c["ok"] and c["effect"] > 0.01 for c in report["checks"].values())
    assert all(
        {k.split(".")[0] for k in load_file(tmp_path / "out" / f)} == {"transformer"} for f in report["lora"]["files"]
    )
    assert len(report["lora"]["files"]) == len(networks(backbone))
    backbone.pipeline().save_pretrained(tmp_path / "model")
    lines = (tmp_path / "out/README.txt").read_text().split("\n\n")[1].splitlines()
    lines = [line.strip().replace("{folder}", str(tmp_path / "out")) for line in lines]
    assert json.dumps(prompt) in lines[-1]
    scope: dict[str, Any] = {}
    exec("\n".join(lines[:-1]).replace('"tiny"', json.dumps(str(tmp_path / "model"))), scope)
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt, negative_prompt="", height=32, width=32, num_frames=frames, num_inference_steps=3, guidance_scale=4.0,
        max_sequence_length=48, output_type="pt", generator=[torch.Generator().manual_seed(3)],
    ).frames  # fmt: skip
    theirs = torch.as_tensor(made).transpose(1, 2).float() * 2 - 1
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_exporting_layers_that_diffusers_cannot_load_is_refused(backbone: Any, tmp_path: Path) -> None:
    learn(backbone, roles=("text_encoder",))
    concept = capture(backbone, "my-mug", Provenance(class_noun="mug"))
    with pytest.raises(ValueError, match=f"diffusers loads LoRA for {backbone.family} into .*not into text_encoder"):
        export(concept, tmp_path / "out", backbone=backbone)
    assert not (tmp_path / "out").exists()
