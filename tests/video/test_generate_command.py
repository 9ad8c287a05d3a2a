"""`pcs video generate` writes clips, accepts steering options, and refuses invalid ones before it loads a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pcs_video.backbones.frame_grid import frame_check
from pcs_video.clips import ClipFiles, generate
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from pcs_video.steering import ClipSteering
from shared.backbones import load as loading
from shared.backbones import load_backbone
from shared.cli import build, run
from shared.concept import Provenance, capture, save
from shared.io.clips.clip_metadata import read_clip_metadata
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import write_clip
from shared.io.contact_sheets import read_metadata
from shared.modifiers import PlainText
from shared.recipe.resolve import load
from shared.runner.plan import Plan, plan
from shared.sampling.settings import SamplingSettings
from tests.core.runs import paint
from tests.video.conftest import moving_square
from tests.video.transformer_models import build_ltx, build_wan
from tests.video.transformer_runs import FAMILIES, learn

Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Returns a function that runs `pcs video generate …` and returns its exit code and standard error."""

    def call(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = run(build(), ["video", "generate", *map(str, arguments)])
        return code, capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes pictures, a 6-frame clip, masks for the clip, and a file of boxes."""
    folder = tmp_path_factory.mktemp("given")
    paint(folder / "photos")
    write_clip(folder / "clip", moving_square(0, 6), 8)
    masks = moving_square(0, 6).sign()
    write_clip(folder / "masks", masks, 8)
    (folder / "boxes.json").write_text(json.dumps({"red mug": {"0": [0, 0, 0.5, 0.5], "3": [0.5, 0.5, 1, 1]}}))
    return folder


@pytest.fixture(scope="module")
def concepts(clip_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Saves a subject and a motion with random LoRAs."""
    folder, backbone = tmp_path_factory.mktemp("concepts"), load_backbone(clip_model)
    for name, noun, role in (("thing", "mug", "cross_attention"), ("motion", "", "temporal_attention")):
        PlainText().attach(backbone, name, noun)
        learn(backbone, name, roles=(role,))
        about = Provenance(class_noun=noun, kind="subject" if noun else "motion", modifier=PlainText())
        save(capture(backbone, name, about), folder / f"{name}.concept")
        backbone.remove(name)
    return [folder / "thing.concept", folder / "motion.concept"]


@pytest.mark.parametrize(
    ("out", "more", "written"),
    [
        ("clip.gif", ("--sheet",), ["clip.gif", "clip-sheet.png"]),
        ("clip.webp", (), ["clip.webp"]),
        ("clips", ("--format", "frames", "--sheet"), ["clips/000-seed5", "clips/sheet.png"]),
    ],
)
def test_a_clip_of_a_subject_and_a_motion_is_written_in_the_requested_format(
    out: str, more: tuple[str, ...], written: list[str], concepts: list[Path], pcs: Callable[..., Any], tmp_path: Path
) -> None:
    prompt, small = "a photo of a <thing> <motion>", ("--height", 32, "--width", 32, "--steps", 1, "--frames", 3)
    loaded = [word for path in concepts for word in ("--concept", path)]
    ran = pcs("video", "generate", prompt, *loaded, "--out", tmp_path / out, *more, *small, "--seed", 5, "--fps", 5)
    assert ran.code == 0, ran.err
    assert ran.out.split() == [str(tmp_path / name) for name in written]
    clip = read_clip(tmp_path / written[0], ClipWindow(length=3))
    assert clip.fps == 5 and clip.frames.std() > 0
    stored = [read_clip_metadata(tmp_path / written[0]), *(read_metadata(tmp_path / name) for name in written[1:])]
    for about in (json.loads(text["pcs"]) for text in stored):
        assert (about["prompt"], about["expanded"]) == (prompt, "a photo of a mug")
        assert (about["seed"], about["frames"], about["steps"], about["height"]) == (5, 3, 1, 32)
        assert about["concepts"] == {"thing": 1, "motion": 1} and about["named"] == ["thing", "motion"]


def test_all_steering_options_can_be_combined(ask: Ask, given: Path, clip_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.mp4"
    steered = ("--invert", given / "clip", "--invert-share", 0.5, "--boxes", given / "boxes.json", "--pan", "0.5,0")
    code, error = ask(
        "a red mug", "--backbone", clip_model, "--out", out, "--frames", 4, "--steps", 2, "--fps", 6, *steered,
        "--first-frame", given / "photos" / "0.png", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, error
    about = json.loads(read_clip_metadata(out)["pcs"])
    assert [hook["kind"] for hook in about["hooks"]] == ["noise_prior", "subject_boxes", "camera_pan", "given_frames"]
    assert about["hooks"][0]["share"] == 0.5 and about["hooks"][2]["boxes"]["red mug"]["3"] == [0.5, 0.5, 1.0, 1.0]
    assert read_clip(out, ClipWindow(length=4)).fps == 6


def test_a_first_frame_also_replaces_the_kept_region_and_a_warning_is_given(given: Path) -> None:
    clip, photo = given / "clip", given / "photos" / "0.png"
    with pytest.warns(UserWarning, match="--keep applies only to the later frames"):
        hooks = ClipSteering(first_frame=photo, keep=clip, keep_mask=clip).hooks()
    assert [hook.path for hook in hooks] == [clip, photo]


def test_invalid_steering_options_are_refused_before_a_model_is_loaded(ask: Ask, given: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("not a clip")
    (tmp_path / "boxes.json").write_text('{"mug": [0, 0, 5, 1]}')
    clip, photo = given / "clip", given / "photos" / "0.png"
    for options, message in [
        (("--invert", tmp_path / "gone.mp4"), r"--invert: .*gone.mp4 does not exist"),
        (("--keep", clip), "--keep and --keep-mask must be given together"),
        (("--keep", tmp_path / "text.txt", "--keep-mask", clip), "--keep: .*text.txt is not a clip"),
        (("--keep", clip, "--keep-mask", tmp_path / "gone"), "--keep: .*gone does not exist"),
        (("--boxes", tmp_path / "boxes.json"), "--boxes: .* is not a box"),
        (("--pan", "a,b"), "--pan 'a,b': give RIGHT,DOWN"),
        (("--pan", "2,0"), "--pan '2,0': give RIGHT,DOWN as fractions of the width and height, each between -1 and 1"),
        (("--first-frame", clip), "--first-frame: .*clip is a clip; give it as --prefix"),
        (("--prefix", photo), "--prefix: .*0.png is a picture; use --first-frame"),
        (("--prefix", clip, "--first-frame", photo), "both set how the clip begins"),
        (("--prefix-frames", 2), "--prefix-frames sets how much of --prefix is used"),
        (("--fps", "1e300"), "--fps.* 1e300 is not a number between 0.1 and 1000"),
        (("--fps", "nan"), "--fps.* nan is not a number between 0.1 and 1000"),
        (("--guidance", "1e300"), "--guidance.* 1e300 is not a number between -1000 and 1000"),
        (("--concept", "a.concept:1e300"), r"--concept 'a.concept:1e300': the strength must be between -100 and 100"),
        (("--concept", "a.concept:nan"), r"--concept 'a.concept:nan': the strength must be between -100 and 100"),
        (("--strength", "a=1e300@0"), "--strength: .*a: strengths must be between -100 and 100"),
        (("--prefix", clip, "--prefix-frames", 9), "--prefix: .*clip has only 6 frames, but its first 9"),
        (("--out", given / "clip", "--invert", given / "clip" / "0.png", "--overwrite"), "clip"),
    ]:
        code, error = ask("a mug", "--backbone", tmp_path / "no-model", *options)
        assert code == 2 and "no-model" not in error.replace("\n", " "), (options, error)
        assert re.search(message, " ".join(error.split())), (options, error)


# --- frame counts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saves tiny Wan and LTX models, each in its own folder."""
    root = tmp_path_factory.mktemp("transformers")
    for name, pipe in (("wan", build_wan()), ("ltx", build_ltx())):
        pipe.save_pretrained(root / name)
    return {name: root / name for name in ("wan", "ltx")}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test fail if any model is loaded."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(loading, "load_network", refuse)


def said(ask: Callable[[int], Any], frames: int) -> str:
    """Returns the error message for this frame count, or "" if the count is accepted."""
    try:
        ask(frames)
    except ValueError as error:
        return str(error)
    return ""


def test_supported_frame_counts_are_determined_from_the_model_folder(
    folders: dict[str, Path], clip_model: Path, picture_model: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    """The check reads only the folder, but gives the same results as the loaded model."""
    cases = [(folders["wan"], None), (folders["ltx"], None), (clip_model, None), (picture_model, adapter_folder)]
    for source, adapter in cases:
        check = frame_check(source, adapter)
        backbone = VideoRunner.prepared(load_backbone(source), adapter)
        assert check is not None
        for frames in (1, 2, 5, 8, 9, 16, 17, 33):
            assert said(check, frames) == said(partial(backbone.latent_shape, 32, 32), frames)
    assert frame_check(picture_model) is None and frame_check(tmp_path) is None and frame_check("owner/name") is None


@pytest.mark.usefixtures("unloaded")
def test_unsupported_frame_counts_are_refused_before_anything_is_loaded(
    folders: dict[str, Path], clip_folder: Path, tmp_path: Path, ask: Ask
) -> None:
    for family, length, nearest in (("wan", 6, "5 and 9"), ("ltx", 6, "1 and 9")):
        given = [f"backbone={folders[family]}", f"subject.clips={clip_folder}", f"output={tmp_path / 'm.concept'}"]
        settings = [*given, f"sources.clips.window.length={length}"]
        planned = plan(load("motion_director", settings, "video", VideoRecipe))
        message = rf"sources\.clips\.window\.length = 6: a clip of 6 frames does not fit {family}.* {nearest}"
        with pytest.raises(ValueError, match=message):
            VideoRunner.check_plan(planned, str(folders[family]))
        code = run(build(), ["video", "personalize", "motion_director", *settings])
        assert code == 2 and not (tmp_path / "m.concept").exists()
        code, error = ask("a mug", "--backbone", folders[family], "--frames", 16)
        assert code == 2 and "--frames: a clip of 16 frames does not fit" in " ".join(error.split())


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("recipe", "setting", "key"),
    [
        ("still_moving", "sources.class_stills.length=17", "sources.stills.length"),  # of a later phase
        ("motion_booth", "sampling.frames=17", "sources.class_pictures.frames"),
        ("motion_inversion", "sources.clips.window.length=17", "trainable.embeddings.frames"),
        ("set_then_sequence", "phases.set.sources.clips.window.length=6", "sources.clips.window.length"),
    ],
)
def test_every_part_that_sets_a_frame_count_is_checked_before_anything_is_loaded(
    recipe: str, setting: str, key: str, folders: dict[str, Path], given: Path, clip_folder: Path, tmp_path: Path
) -> None:
    medium = f"clips={clip_folder}" if "clips.window" in setting else f"images={given / 'photos'}"
    settings = [f"backbone={folders['wan']}", f"subject.{medium}", "subject.class_noun=mug", setting]
    planned = load(recipe, [*settings, f"output={tmp_path / 'm.concept'}"], "video", VideoRecipe)
    clip = rf"^{re.escape(key)} = (16|24): a clip of \1 frames does not fit wan, .*nearest: "
    with pytest.raises(ValueError, match=clip):
        VideoRunner.check_plan(Plan(planned, {}, {}, tmp_path), str(folders["wan"]))
    with pytest.raises(ValueError, match=clip):  # a model whose files do not show its frame counts
        VideoRunner(FAMILIES["wan"]()).personalize({}, planned, tmp_path)


def test_the_frame_rate_is_passed_to_networks_that_use_it(folders: dict[str, Path], ask: Ask, tmp_path: Path) -> None:
    how = ("--backbone", folders["ltx"], "--frames", 9, "--steps", 1, "--height", 32, "--width", 32, "--device", "cpu")
    for name, fps in (("own.mp4", ()), ("said.mp4", ("--fps", 12))):
        assert ask("a mug", *how, *fps, "--out", tmp_path / name)[0] == 0
    own, said = (read_clip(tmp_path / name, ClipWindow(length=9)) for name in ("own.mp4", "said.mp4"))
    assert (own.fps, said.fps) == (25, 12) and not own.frames.equal(said.frames)
    recipe = load(
        "motion_director", ["sources.clips.window.fps=24", "sources.clips.window.stride=2"], "video", VideoRecipe
    )
    assert recipe.opening() == {"fps": 12.0}
    rates = ["sources.clips.window.fps=24", "sources.more.kind=clips", "sources.more.window.fps=8"]
    two = load("motion_director", rates, "video", VideoRecipe)
    with pytest.warns(UserWarning, match=r"clips have different frame rates \(8, 24 per second\)"):
        assert two.opening() == {}


def test_clips_are_written_before_the_next_ones_are_made(clip_model: Path, tmp_path: Path) -> None:
    runner, written = VideoRunner(load_backbone(clip_model)), []
    small = SamplingSettings(steps=1, height=32, width=32, frames=2)
    paths = generate(
        runner, ["a red mug"], ClipFiles(tmp_path / "out", kind="frames", with_sheet=True), small, seeds=range(9),
        progress=lambda done, of: written.append(len([*tmp_path.rglob("frame_0001.png")])),
    )  # fmt: skip
    assert written == [0, 8]
    assert len(paths) == 10 and all(path.exists() for path in paths)


def test_a_sheet_too_large_for_memory_is_refused_before_any_clip_is_made(clip_model: Path, tmp_path: Path) -> None:
    large = SamplingSettings(steps=1, height=512, width=512, frames=4)
    made: list[int] = []
    with pytest.raises(ValueError, match=r"--sheet: 1,028 pictures of 512x512 pixels"):
        generate(
            VideoRunner(load_backbone(clip_model)), ["a mug"], ClipFiles(tmp_path / "out", with_sheet=True), large,
            seeds=range(257), progress=lambda *_: made.append(1),
        )  # fmt: skip
    assert not made and list(tmp_path.iterdir()) == []
