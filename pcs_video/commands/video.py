"""`pcs video personalize | generate | evaluate | benchmark`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from shared.commands import numbers, steering
from shared.commands.paths import PATH

app = typer.Typer(help="Personalized clips.", no_args_is_help=True)

_CONCEPT = typer.Option([], "--concept", help="a concept folder, PATH or PATH:STRENGTH; can be repeated")
_SEEDS = 2**62
_FPS = "frames per second; default: the model's own if it has one (LTX: 25), else 8"
_DEVICE = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one")
_PRECISION = typer.Option("auto", help="no (float32), bf16, fp16, or auto (half precision on a GPU, else float32)")
_DOWNLOAD = typer.Option(False, "--download", help="download files from the hub if they are not in the local cache")
_MOTION = typer.Option(
    None,
    "--motion-adapter",
    help="a folder with a diffusers MotionAdapter, or none (subjects then move only along trajectories); default: the "
    "backbone's own",
    **PATH,
)


@app.command()
def personalize(
    recipe: str = typer.Argument(help="a recipe's name (see `pcs methods`) or a YAML file"),
    settings: list[str] = typer.Argument(None, help="key=value, such as subject.clips=clips/ output=zigzag.concept"),
    resume: bool = typer.Option(False, help="resume an interrupted run"),
    overwrite: bool = typer.Option(False, help="replace an existing concept, and the state of an interrupted run"),
    concept: list[str] = _CONCEPT,
    device: str = _DEVICE,
    download: bool = _DOWNLOAD,
) -> None:
    """Learn a motion from clips, or a subject from pictures for use in clips. The concept is a folder."""
    from pcs_video.recipe import VideoRecipe
    from pcs_video.runner import VideoRunner
    from shared.commands.learning import Learning, Medium, learn

    asked = Learning(resume, overwrite, concept, device, download)
    learn(Medium("video", VideoRecipe, VideoRunner), recipe, settings or [], asked)


@app.command()
def generate(
    prompts: list[str] = typer.Argument(help='"a photo of a <my-mug> <zigzag> on the beach"; can be repeated'),
    concept: list[str] = _CONCEPT,
    out: Path = typer.Option(
        Path("clip.mp4"), help="a file (.mp4, .gif, .webp), or a folder for several clips", **PATH
    ),
    num: int = typer.Option(1, min=1, max=10_000, help="clips per prompt"),
    seed: int = typer.Option(
        0, min=0, max=_SEEDS, help="seed of each prompt's first clip; each further clip uses the next seed"
    ),
    frames: int = typer.Option(None, min=1, max=10_000, help="frames per clip; default: the model's own"),
    fps: float = typer.Option(None, help=_FPS, **numbers.FPS),
    kind: str = typer.Option("mp4", "--format", help="mp4, gif, webp or frames; used if --out is a folder"),
    sheet: bool = typer.Option(False, help="also write a contact sheet with a row of frames for each clip"),
    strength: list[str] = typer.Option(
        [], help="a concept's strength schedule; my-mug=0.4@0,0.8@0.1 lets the motion form before the subject"
    ),
    first_frame: Path = typer.Option(None, help="a picture that the clip begins with", **PATH),
    prefix: Path = typer.Option(None, help="a clip that the new clip begins with and continues", **PATH),
    prefix_frames: int = typer.Option(None, min=1, max=10_000, help="how many frames of --prefix to use; default: all"),
    invert: Path = typer.Option(None, help=steering.INVERT, **PATH),
    invert_share: float = typer.Option(0.3, help=steering.SHARE, **numbers.SHARE),
    invert_prompt: str = typer.Option("", help=steering.PROMPT),
    keep: Path = typer.Option(None, help=steering.KEEP, **PATH),
    keep_mask: Path = typer.Option(None, help=steering.MASK, **PATH),
    boxes: Path = typer.Option(None, help=steering.BOXES, **PATH),
    pan: str = typer.Option(
        "", help="RIGHT,DOWN: how far the camera moves, in fractions of width and height, such as 0.25,0"
    ),
    negative: str = typer.Option("", help="negative prompt, which describes what should not appear"),
    guidance: float = typer.Option(
        None, help="classifier-free guidance scale; default: as in the motion's recipe", **numbers.GUIDANCE
    ),
    steps: int = typer.Option(None, min=1, max=10_000, help="denoising steps; default: as in the motion's recipe"),
    scheduler: str = typer.Option(None, help="ddim, dpm++, euler, unipc … (an unknown name lists all choices)"),
    height: int = typer.Option(None, min=1, max=8192, help="height in pixels"),
    width: int = typer.Option(None, min=1, max=8192, help="width in pixels"),
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the first concept was learned on"
    ),
    motion_adapter: Path = _MOTION,
    device: str = _DEVICE,
    precision: str = _PRECISION,
    download: bool = _DOWNLOAD,
    overwrite: bool = typer.Option(False, help="replace an existing file or folder"),
) -> None:
    """Generate clips with any number of subjects and motions. Each file records everything needed to reproduce it."""
    from pcs_video.clips import ClipFiles
    from pcs_video.clips import generate as film
    from pcs_video.runner import VideoRunner, clip_rate, opening
    from pcs_video.steering import ClipSteering
    from shared.commands.progress import Lines
    from shared.io.denoising_progress import named
    from shared.runner.open_runner import (
        check_precision,
        check_prompts,
        check_strengths,
        model_asked_for,
        open_runner,
        read_by,
    )
    from shared.sampling.settings import SamplingSettings

    steered = ClipSteering(
        invert, invert_share, invert_prompt, keep, keep_mask, boxes, first_frame, prefix, prefix_frames, pan
    )
    files = ClipFiles(out, fps or 1.0, kind, sheet, overwrite)
    files.check(len(prompts) * num, [*read_by(concept, backbone, motion_adapter), *steered.files])
    hooks = (*check_strengths(strength), *steered.hooks())
    check_prompts(prompts, concept)
    VideoRunner.check_frames(model_asked_for(backbone, concept), motion_adapter, frames)
    how = opening(motion_adapter, fps)
    runner = open_runner(VideoRunner, backbone, concept, device, check_precision(precision), download, **how)
    settings = SamplingSettings(negative, guidance, steps, scheduler, height, width, frames, hooks)
    files = replace(files, fps=clip_rate(runner, fps))
    with Lines() as counter:
        paths = film(runner, prompts, files, settings, seeds=range(seed, seed + num), progress=named(counter, "clips"))
    print("\n".join(map(str, paths)))


@app.command()
def evaluate(
    concept: list[str] = _CONCEPT,
    prompts: str = typer.Option(
        "toybox_motion", help="a prompt set for clips, or a file with {concept} and {thing} in its prompts"
    ),
    out: Path = typer.Option(Path("report"), help="folder for index.html, report.json, CSV tables and clips", **PATH),
    references: Path = typer.Option(
        None,
        help="the motion's clips; default: a folder next to the concept, with the same name as the training folder",
        **PATH,
    ),
    pictures: Path = typer.Option(
        None, help="the subject's pictures; default: found in the same way as --references", **PATH
    ),
    gallery: Path = typer.Option(None, help="a folder with a subfolder for each look-alike of the subject", **PATH),
    num: int = typer.Option(2, min=1, max=10_000, help="clips per prompt"),
    seed: int = typer.Option(0, min=0, max=_SEEDS),
    limit: int = typer.Option(None, min=1, max=10_000, help="use only this many prompts from the set"),
    false_motion: str = typer.Option(
        "unnamed",
        help="clips to compare with: unnamed (prompts do not name the loaded motion), off (the motion's strength is 0) "
        "or none",
    ),
    compensate_camera: bool = typer.Option(False, help="measure motion fidelity without the camera's movement"),
    frames: int = typer.Option(None, min=2, max=10_000, help="frames per clip; default: the model's own"),
    fps: float = typer.Option(None, help=_FPS, **numbers.FPS),
    steps: int = typer.Option(None, min=1, max=10_000, help="denoising steps; default: as in the motion's recipe"),
    guidance: float = typer.Option(
        None, help="classifier-free guidance scale; default: as in the motion's recipe", **numbers.GUIDANCE
    ),
    scheduler: str = typer.Option(None, help="ddim, dpm++ …; default: as in the motion's recipe"),
    height: int = typer.Option(None, min=1, max=8192, help="height in pixels"),
    width: int = typer.Option(None, min=1, max=8192, help="width in pixels"),
    clip: Path = typer.Option(
        None, help="a local CLIP folder to score with; the toybox uses its own by default", **PATH
    ),
    dino: Path = typer.Option(None, help="a local DINO or DINOv2 folder to score with", **PATH),
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the first concept was learned on"
    ),
    motion_adapter: Path = _MOTION,
    device: str = _DEVICE,
    precision: str = _PRECISION,
    download: bool = _DOWNLOAD,
    overwrite: bool = typer.Option(False, help="replace an existing report"),
) -> None:
    """Measure a motion, a subject, or one of each in clips. Scores motion, leakage, identity, amount of motion and
    steadiness."""
    from pcs_video.runner import VideoRunner, clip_rate, opening
    from shared.commands.progress import Lines
    from shared.evaluation.clips.prompt_sets import load_clip_prompts
    from shared.io.outputs import check_output
    from shared.runner.judging import check_folders
    from shared.runner.judging_clips import (
        ClipEvaluationSettings,
        check_false_motion,
        clip_score_line,
        evaluate_clips_loaded,
    )
    from shared.runner.open_runner import check_precision, model_asked_for, open_runner, read_by
    from shared.sampling.settings import SamplingSettings

    if not concept:
        raise ValueError("evaluate needs --concept with a motion, a subject, or one of each")
    read = [p for p in (references, pictures, gallery, clip, dino) if p is not None]
    check_output(out, overwrite, [*read_by(concept, backbone, motion_adapter), *read])
    check_folders(clip, dino)
    load_clip_prompts(prompts)
    VideoRunner.check_frames(model_asked_for(backbone, concept), motion_adapter, frames)
    how = opening(motion_adapter, fps)
    settings = ClipEvaluationSettings(
        prompts, tuple(range(seed, seed + num)), limit,
        SamplingSettings("", guidance, steps, scheduler, height, width, frames),
        references, pictures, gallery, clip, dino, None,
        check_false_motion(false_motion), compensate_camera, out, overwrite,
    )  # fmt: skip
    runner = open_runner(VideoRunner, backbone, concept, device, check_precision(precision), download, **how)
    settings = replace(settings, fps=clip_rate(runner, fps))
    with Lines() as counter:
        report = evaluate_clips_loaded(runner, settings, counter)
    for score in report.scores:
        print(f"{score.title:34} {clip_score_line(score)}")
    print(f"{out / 'index.html'}")


@app.command()
def benchmark(
    recipes: list[str] = typer.Argument(
        None,
        help="motion recipes to compare, by name or as YAML files; default: all shipped recipes that learn motions",
    ),
    split: str = typer.Option(
        "development", help="development (for use while tuning) or reporting (for use once, at the end)"
    ),
    motions: str = typer.Option("6", help="how many of the split's motions to use, or their names as NAME,NAME"),
    subjects: str = typer.Option(
        "4", help="how many of the split's subjects to combine each motion with, or their names; 0 for none"
    ),
    subject_recipe: str = typer.Option("dreambooth_lora", help="recipe that learns the subjects from pictures"),
    limit: int = typer.Option(1, min=1, max=10_000, help="number of prompts"),
    num: int = typer.Option(4, min=1, max=10_000, help="clips per prompt"),
    steps: int = typer.Option(None, min=1, max=10_000, help="denoising steps; default: as in the motion's recipe"),
    out: Path = typer.Option(Path("benchmark"), help="output folder; an interrupted benchmark resumes there", **PATH),
    overrides: list[str] = typer.Option(
        [], "--set", help="key=value applied to every motion recipe, for example train.steps=100"
    ),
    subject_overrides: list[str] = typer.Option([], "--set-subject", help="key=value applied to the subject recipe"),
    motion_adapter: Path = _MOTION,
    device: str = _DEVICE,
) -> None:
    """Compare motion recipes on the toybox's held-out motions and subjects, by motion, identity, leakage and time.
    Recipes that learn a subject together with its motion are given clips of the subject in motion."""
    from pcs_video.recipe import VideoRecipe
    from pcs_video.runner import VideoRunner
    from shared.benchmark.experiment import failures_told
    from shared.benchmark.toybox import count_or_names
    from shared.benchmark.toybox_clips import ClipBenchmarkSettings, run

    settings = ClipBenchmarkSettings(
        split, count_or_names(motions, "--motions"), count_or_names(subjects, least=0), subject_recipe, limit, num, out,
        device, tuple(overrides), tuple(subject_overrides), steps, motion_adapter,
    )  # fmt: skip
    comparison = run(VideoRunner, VideoRecipe, recipes or [], settings)
    print(comparison.markdown())
    failures_told(comparison.failures, len(comparison.reports))
