"""A mistake with clips results in one clear message and exit code 2, without a traceback or half-written output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcs_image.runner import ImageRunner
from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.clips import ClipFiles, generate
from pcs_video.runner import VideoRunner
from shared.backbones import load as loading
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.cli import build, run
from shared.concept import Provenance, capture, save
from shared.io.clips.write_clip import write_clip
from shared.io.contact_sheets import write_picture
from tests.core.test_locks import locked_elsewhere
from tests.image.refusing import refusing
from tests.video.clip_models import build_animatediff
from tests.video.conftest import FAST, moving_square
from tests.video.transformer_runs import FAMILIES, learn

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Returns a function that runs a command and returns its error message.

    The command must fail before a network is loaded, and it must not change any files.
    """

    def unexpected(*_: Any, **__: Any) -> Any:
        raise AssertionError("a network was loaded")

    def pcs(*arguments: Any) -> Any:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_network", unexpected)
            code = run(build(), [str(a) for a in arguments])
        done = capsys.readouterr()
        return type("Ran", (), {"code": code, "out": done.out, "err": " ".join(done.err.split())})

    return refusing(pcs, tmp_path)


@pytest.fixture
def learning(refused: Refused, clip_model: Path, tmp_path: Path) -> Refused:
    def call(clips: Path, *settings: str, recipe: str = "animatediff_motion_lora") -> str:
        given = (f"backbone={clip_model}", f"subject.clips={clips}", f"output={tmp_path / 'm.concept'}")
        return refused("video", "personalize", recipe, *FAST, *given, *settings)

    return call


def test_clips_that_cannot_be_learned_from_are_refused(learning: Refused, tmp_path: Path) -> None:
    """When a run starts, each file causes the error that `tests/core/test_clip_bad_files.py` expects."""
    cases: dict[str, Callable[[Path], Any]] = {
        "found only a.mp4 (empty, 0 bytes)": lambda f: (f / "a.mp4").write_bytes(b""),
        "a.mp4": lambda f: (f / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500)),
        "has 1 frame, but length=4": lambda f: write_clip(f / "a.gif", moving_square(0, 1), 8),
        "has 3 frames, but length=4": lambda f: write_clip(f / "a.mp4", moving_square(0, 3), 8),
    }
    for number, (message, write) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder)
        assert message in learning(folder)
    write_clip(tmp_path / "cut" / "a.mp4", moving_square(0, 40, 128), 8)
    whole = (tmp_path / "cut" / "a.mp4").read_bytes()
    (tmp_path / "cut" / "a.mp4").write_bytes(whole[: len(whole) // 2])
    assert "a.mp4" in learning(tmp_path / "cut")


def test_masks_that_do_not_match_the_frames_are_refused(learning: Refused, tmp_path: Path) -> None:
    """If there are too few masks, or masks of the wrong size, a run says so before it computes any latents."""
    folder = tmp_path / "clips"
    write_clip(folder / "a", moving_square(0, 6), 8)
    write_clip(tmp_path / "few" / "a", moving_square(0, 3).sign(), 8)
    write_clip(tmp_path / "small" / "a", moving_square(0, 6, 16).sign(), 8)
    assert "contains 3 masks, but" in learning(folder, f"subject.masks={tmp_path / 'few'}")
    message = learning(folder, f"subject.masks={tmp_path / 'small'}")
    assert "16x16" in message and "32x32" in message


# --- incompatible concepts and models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motion(clip_model: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("motion") / "slide.concept"
    settings = [*FAST, f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={path}", "preview.num=0"]
    assert run(build(), ["video", "personalize", "animatediff_motion_lora", *settings]) == 0
    return path


def test_an_output_must_not_replace_anything_that_a_command_reads(
    refused: Refused, adapter_folder: Path, tmp_path: Path
) -> None:
    picture = write_picture(moving_square()[:, 0], tmp_path / "clip-sheet.png")
    filmed = ("video", "generate", "a mug", "--overwrite", "--out")
    for arguments in (
        (*filmed, adapter_folder / "clip.mp4"),
        ("video", "evaluate", "--concept", tmp_path / "c", "--out", adapter_folder / "x"),
    ):
        message = refused(*arguments, "--motion-adapter", adapter_folder)
        assert f"lies inside {adapter_folder}, which is an input" in message
    message = refused(*filmed, tmp_path / "clip.mp4", "--sheet", "--first-frame", picture)
    assert f"the output {picture} is {picture}, which is an input" in message
    message = refused("video", "generate", "a mug", "--sheet", "--out", tmp_path / "clip.mp4")
    assert f"{picture} already exists" in message


def test_generating_clips_from_python_locks_the_file(tmp_path: Path) -> None:
    unused: Any = None
    with locked_elsewhere(tmp_path / "clip.mp4") as message, pytest.raises(ValueError, match=message):
        generate(unused, ["a mug"], ClipFiles(tmp_path / "clip.mp4"))


def test_an_image_model_refuses_a_motion(
    motion: Path, picture_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["image", "generate", "a mug", "--concept", motion, "--backbone", picture_model, "--out", tmp_path / "o"]
    code = run(build(), [str(a) for a in asked])
    message = " ".join(capsys.readouterr().err.split())
    assert code == 2 and "'slide' is a motion, and pictures cannot show one" in message
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def learned_on(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_sd: Callable[..., Any], make_tiny_flux: Callable[..., Any]
) -> Callable[[str], Path]:
    """Returns a function that saves a random LoRA for a tiny FAMILY model, under the name on-FAMILY."""
    folder = tmp_path_factory.mktemp("families")
    models: dict[str, Callable[[], Any]] = {
        **FAMILIES,
        "sd": lambda: StableDiffusionBackbone(make_tiny_sd(), "tiny"),
        "flux": lambda: FluxBackbone(make_tiny_flux(), "tiny"),
    }

    def make(family: str) -> Path:
        backbone, name = models[family](), f"on-{family}"
        learn(backbone, name, roles=("self_attention",))
        return Path(str(save(capture(backbone, name, Provenance(class_noun="mug")), folder / name).path))

    return make


def test_concepts_that_no_model_can_load_are_refused_before_a_model_is_loaded(
    refused: Refused, learned_on: Callable[[str], Path], motion: Path, clip_model: Path
) -> None:
    thing, wan, flux = map(learned_on, ("sd", "wan", "flux"))
    message = refused("video", "generate", "a <on-sd> and a <on-wan>", "--concept", thing, "--concept", wan)
    assert "'on-sd' was learned on stable_diffusion, but 'on-wan' on wan: no model can load both" in message
    message = refused(
        "video", "generate", "a <on-wan>", "--concept", wan, "--concept", motion, "--backbone", clip_model
    )
    assert "'on-wan' was learned on wan, but 'slide' on animatediff" in message
    message = refused("video", "generate", "a <on-flux>", "--concept", flux)
    assert "'on-flux' was learned on flux, whose models do not generate clips" in message
    assert "animatediff, ltx, stable_diffusion, wan" in message
    message = refused("image", "generate", "a <on-sd> and a <on-flux>", "--concept", thing, "--concept", flux)
    assert "'on-sd' was learned on stable_diffusion, but 'on-flux' on flux" in message


def test_each_runner_lists_the_families_that_its_models_can_read(
    make_tiny_sd: Callable[..., Any], make_tiny_flux: Callable[..., Any]
) -> None:
    clips = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    assert set(VideoRunner.families) == {clips.reads, FAMILIES["wan"]().reads, FAMILIES["ltx"]().reads}
    pictures = StableDiffusionBackbone(make_tiny_sd(), "tiny"), FluxBackbone(make_tiny_flux(), "tiny")
    assert set(ImageRunner.families) == {model.reads for model in pictures}


# --- killed runs --------------------------------------------------------------------------------------


def test_a_run_killed_during_training_gives_the_same_tensors_when_resumed(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    settings = ["train.steps=10", *FAST[1:], "train.checkpoint_every=1", "preview.num=0"]
    given = [f"backbone={clip_model}", f"subject.clips={clip_folder}"]

    def command(name: str) -> list[str]:
        return ["video", "personalize", "motion_director", *settings, *given, f"output={tmp_path / name / 'm.concept'}"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"env": environment, "cwd": Path(__file__).parents[2], "stdout": subprocess.DEVNULL}
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", "shared.cli", *command("cut")], stderr=errors, **how)
        try:
            end = time.monotonic() + 300
            while not any(
                p.name >= "checkpoint-00-0000003" for p in (tmp_path / "cut/m.training").glob("checkpoint-*")
            ):
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "stderr").read_text()
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "cut" / "m.concept").exists()
    assert run(build(), [*command("cut"), "--resume"]) == 0
    assert run(build(), command("whole")) == 0
    folders = [tmp_path / name / "m.concept" for name in ("cut", "whole")]
    cut, whole = ({p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in folders)
    assert cut == whole and cut
