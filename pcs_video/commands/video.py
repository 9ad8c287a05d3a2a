"""`pcs video personalize | generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from shared.commands.paths import PATH

app = typer.Typer(help="Personalized clips.", no_args_is_help=True)

_CONCEPT = typer.Option([], "--concept", help="a concept folder, PATH or PATH:STRENGTH; can be repeated")
_SEEDS = 2**62
_DEVICE = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one")
_PRECISION = typer.Option("auto", help="no (float32), bf16, fp16, or auto: bf16 on a GPU that computes it fast")
_DOWNLOAD = typer.Option(False, "--download", help="download from the hub what is not in the local cache")
_MOTION = typer.Option(
    None, "--motion-adapter", help="a folder with a diffusers MotionAdapter; default: what the backbone has", **PATH
)


@app.command()
def personalize(
    recipe: str = typer.Argument(help="a recipe's name (see `pcs methods`) or a YAML file"),
    settings: list[str] = typer.Argument(None, help="key=value: subject.clips=clips/ output=zigzag.concept"),
    resume: bool = typer.Option(False, help="resume an interrupted run"),
    overwrite: bool = typer.Option(False, help="replace an existing concept, and the state of an interrupted run"),
    concept: list[str] = _CONCEPT,
    device: str = _DEVICE,
    download: bool = _DOWNLOAD,
) -> None:
    """Learn a motion from clips, or a thing from pictures for use in clips. The concept is a folder."""
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
        Path("clip.mp4"), help="a file (.mp4, .gif, .webp), or a folder where there are several clips", **PATH
    ),
    num: int = typer.Option(1, min=1, help="clips per prompt"),
    seed: int = typer.Option(0, min=0, max=_SEEDS, help="seed of the first clip; each further clip adds one"),
    frames: int = typer.Option(None, min=1, help="frames per clip; default: the model's own"),
    fps: float = typer.Option(8.0, min=0.1, help="frames per second"),
    kind: str = typer.Option("mp4", "--format", help="mp4, gif, webp or frames, where `out` is a folder"),
    sheet: bool = typer.Option(False, help="also write a contact sheet: a row of frames for each clip"),
    strength: list[str] = typer.Option(
        [], help="a concept's strength by step: my-mug=0.4@0,0.8@0.1 lets motion be decided before the thing is"
    ),
    negative: str = typer.Option("", help="negative prompt: what should not appear"),
    guidance: float = typer.Option(None, help="classifier-free guidance scale; default: the model's own"),
    steps: int = typer.Option(None, min=1, help="denoising steps"),
    scheduler: str = typer.Option(None, help="ddim, dpm++, euler, unipc … (an unknown name lists them)"),
    height: int = typer.Option(None, min=1, help="pixels"),
    width: int = typer.Option(None, min=1, help="pixels"),
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the first concept was learned on"
    ),
    motion_adapter: Path = _MOTION,
    device: str = _DEVICE,
    precision: str = _PRECISION,
    download: bool = _DOWNLOAD,
    overwrite: bool = typer.Option(False, help="replace an existing file or folder"),
) -> None:
    """Generate clips with any number of concepts, subjects and motions together. Each file records what made it."""
    from pcs_video.clips import ClipFiles
    from pcs_video.clips import generate as film
    from pcs_video.runner import VideoRunner
    from shared.commands.progress import Lines
    from shared.io.denoising_progress import named
    from shared.runner.open_runner import check_precision, check_strengths, open_runner, read_by
    from shared.sampling.sampler import check_guidance
    from shared.sampling.settings import SamplingSettings

    files = ClipFiles(out, fps, kind, sheet, overwrite)
    files.check(len(prompts) * num, read_by(concept, backbone))
    check_guidance(guidance, "--guidance")
    by_step = tuple(check_strengths(strength))
    how: dict[str, Any] = {} if motion_adapter is None else {"motion_adapter": motion_adapter}
    runner = open_runner(VideoRunner, backbone, concept, device, check_precision(precision), download, **how)
    settings = SamplingSettings(negative, guidance, steps, scheduler, height, width, frames, by_step)
    with Lines() as counter:
        paths = film(runner, prompts, files, settings, seeds=range(seed, seed + num), progress=named(counter, "clips"))
    print("\n".join(map(str, paths)))
