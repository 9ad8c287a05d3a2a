"""The commands `pcs toybox train | evaluate | evaluate-clips | calibrate | curve | sheet | motions | subjects`, for the
built-in world and its model."""

from __future__ import annotations

from pathlib import Path

import typer

from shared.commands import numbers
from shared.commands.paths import PATH
from shared.pretrain.toybox import stages as pipeline

app = typer.Typer(help="Train, evaluate and look at the built-in toy world and its model.", no_args_is_help=True)

_WORK = typer.Option(
    Path(".toybox"), help="folder for rendered pictures and checkpoints; training resumes from it", **PATH
)


@app.command()
def train(
    stage: list[str] = typer.Argument(None, help=f"any of: {', '.join(pipeline.STAGES)}; default: all, in this order"),
    work: Path = _WORK,
    pictures: int = typer.Option(112_000, min=64, max=10_000_000, help="number of pictures to render"),
    clips: int = typer.Option(6_000, min=10, max=1_000_000, help="number of clips to render, for the motion module"),
    minutes: float = typer.Option(
        None, help="time limit in minutes for each training stage; default: none", **numbers.number(0, 1e6)
    ),
    device: str = typer.Option("cpu", help="cpu or cuda"),
    threads: int = typer.Option(2, min=1, max=1024, help="CPU threads"),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    fresh: bool = typer.Option(False, help="start from random weights instead of the shipped ones"),
    more: int = typer.Option(
        None,
        min=1,
        max=100_000_000,
        help="unet: number of additional pictures to train on, while the learning rate falls to 0",
    ),
    lr: float = typer.Option(None, help="unet, motion: peak learning rate", **numbers.number(0, 100)),
    batch: int = typer.Option(
        None, min=1, max=4096, help="unet, motion: pictures or clips per step; use more on a GPU"
    ),
    steps: int = typer.Option(None, min=1, max=10_000_000, help="motion: number of steps"),
    compiled: bool = typer.Option(False, help="unet, motion: compile the U-Net's blocks; faster on a GPU"),
) -> None:
    """Improve the toybox's weights, or train them from scratch (hours on a CPU, minutes on a GPU). Training can be resumed."""
    from shared.config import unknown
    from shared.io.locks import hold
    from shared.train.device import pick_device

    for name in stage or ():
        if name not in pipeline.STAGES:
            raise ValueError(unknown(name, pipeline.STAGES, "stage"))
    pick_device(device)  # before anything is written
    hold(work)
    pace = pipeline.Pace(batch, lr, steps, compiled)
    given = pipeline.Work(work, pictures, minutes, device, threads, seed, fresh, clips, more, pace)
    pipeline.run(stage or list(pipeline.STAGES), given)


@app.command()
def evaluate(
    out: Path = typer.Option(None, help="also write the results to this JSON file", **PATH),
    pictures: int = typer.Option(256, min=8, max=10_000, help="number of captions to generate pictures for"),
    guidance: float = typer.Option(None, help="default: the guidance stated in the model card", **numbers.GUIDANCE),
    steps: int = typer.Option(25, min=1, max=10_000),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    backbone: str = typer.Option(None, help="a folder; default: the shipped one"),
    scheduler: str = typer.Option(None, help="ddim, dpm++ …; default: the backbone's own"),
    card: bool = typer.Option(False, help="write the model card (shared/toybox/weights/CARD.md)"),
    overwrite: bool = typer.Option(False, help="replace an existing JSON file"),
) -> None:
    """Measure the evaluators on fresh renders, and the shipped model on random captions."""
    from shared.pretrain.toybox.evaluate_backbone import JudgeSettings
    from shared.pretrain.toybox.evaluate_backbone import evaluate as measure

    for line in measure(JudgeSettings(pictures, guidance, steps, seed, backbone, scheduler), out, card, overwrite):
        print(line)


@app.command()
def evaluate_clips(
    out: Path = typer.Option(None, help="also write the results to this JSON file", **PATH),
    clips: int = typer.Option(128, min=10, max=10_000, help="number of captions to generate clips for"),
    guidance: float = typer.Option(None, help="default: the guidance stated in the model card", **numbers.GUIDANCE),
    steps: int = typer.Option(25, min=1, max=10_000),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    backbone: str = typer.Option(None, help="a folder; default: the shipped one"),
    work: Path = typer.Option(None, help="evaluate the motion module being trained in this folder", **PATH),
    motion_adapter: Path = typer.Option(None, help="a motion module's folder; default: the shipped one", **PATH),
    overwrite: bool = typer.Option(False, help="replace an existing JSON file"),
) -> None:
    """Measure the motion module on random captions of clips."""
    from shared.pretrain.toybox.evaluate_backbone import JudgeSettings
    from shared.pretrain.toybox.evaluate_backbone import evaluate_clips as measure

    if work is not None and motion_adapter is not None:
        raise ValueError("--work and --motion-adapter both name the motion module to evaluate: give only one of them")
    for line in measure(JudgeSettings(clips, guidance, steps, seed, backbone), work, out, overwrite, motion_adapter):
        print(line)


@app.command()
def calibrate(
    things: int = typer.Option(12, min=2, max=10_000, help="number of training objects to measure"),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
) -> None:
    """Find the encoder and crop that best tell poses apart, and measure objects' typical scores. Both are written to
    weights/calibration.json."""
    from shared.pretrain.evaluators.calibrate import calibrate as measure

    for line in measure(things, seed):
        print(line, flush=True)


@app.command()
def curve(
    work: Path = _WORK,
    pictures: int = typer.Option(
        64, min=8, max=10_000, help="number of captions to generate pictures for with each snapshot"
    ),
    guidance: float = typer.Option(None, help="default: the guidance stated in the model card", **numbers.GUIDANCE),
) -> None:
    """Evaluate the snapshots of a training run, for the learning curve in the model card."""
    from shared.pretrain.toybox.evaluate_backbone import extend_curve

    for line in extend_curve(work, pictures, guidance):
        print(line)


@app.command()
def sheet(
    out: Path = typer.Argument(help="PNG file to write", **PATH),
    source: str = typer.Option(
        "world",
        help="world (renders), model (the shipped model's pictures) or vae (renders, each next to its reconstruction)",
    ),
    rows: int = typer.Option(4, min=1, max=10_000),
    columns: int = typer.Option(8, min=1, max=10_000),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    guidance: float = typer.Option(
        None, help="for model: guidance; default: as stated in the model card", **numbers.GUIDANCE
    ),
    prompt: list[str] = typer.Option([], help="for model: these prompts instead of random captions"),
    overwrite: bool = typer.Option(False, help="replace an existing file"),
) -> None:
    """Draw a contact sheet of captioned pictures."""
    from shared.pretrain.toybox.draw_sheet import SheetSettings, draw_sheet

    print(draw_sheet(out, SheetSettings(source, rows, columns, seed, guidance, tuple(prompt)), overwrite))


@app.command()
def motions(
    out: Path = typer.Argument(help="PNG file to write", **PATH),
    name: list[str] = typer.Option(
        [], help="a motion to draw (can be repeated); default: all, with captioned motions first"
    ),
    rows: int = typer.Option(1, min=1, max=10_000, help="number of clips per motion"),
    columns: int = typer.Option(8, min=2, max=10_000, help="number of frames shown per clip"),
    frames: int = typer.Option(16, min=2, max=64, help="number of frames per clip"),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    overwrite: bool = typer.Option(False, help="replace an existing file"),
) -> None:
    """Draw a contact sheet of clips, one row per clip, with its frames from left to right."""
    from shared.toybox.motions.clip_sheets import write_motion_sheet

    print(write_motion_sheet(out, name, (rows, columns, frames), seed, overwrite))


@app.command()
def subjects(
    name: str = typer.Argument(None, help="a subject, face, style or motion to write; omit to list them"),
    out: Path = typer.Option(None, help="folder for the references; default: a folder called NAME", **PATH),
    num: int = typer.Option(None, min=1, max=1000, help="number of references; default: 5 pictures, 4 clips"),
    seed: int = typer.Option(0, min=0, max=2**31 - 1),
    frames: int = typer.Option(None, min=2, max=64, help="for motions: number of frames per clip; default: 16"),
    thing: str = typer.Option(
        None, help="for motions: the subject that performs it in all clips; default: a different plain thing in each"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """List the subjects, styles and motions that no caption can describe, or write reference pictures or clips of one
    of them."""
    from shared.config import unknown
    from shared.toybox import reference_sets as album
    from shared.toybox.motions.held_out import motion_names
    from shared.toybox.motions.reference_clips import write_motion
    from shared.toybox.subjects import style_names

    things, styles, motions = _things(), style_names(), motion_names()
    if name is None:
        for title, about in things.items():
            print(f"{title:30} {about}")
        for title, style in styles.items():
            print(f"{title:30} a drawing style: {style}")
        for title, motion in motions.items():
            print(f"{title:30} a motion: {motion.name}")
        return
    if name not in things and name not in styles and name not in motions:
        raise ValueError(unknown(name, [*things, *styles, *motions], "toybox subject, style or motion"))
    if frames is not None and name not in motions:
        raise ValueError(f"--frames {frames} does not apply to {name}, because only motions are written as clips")
    if thing is not None and name not in motions:
        raise ValueError(f"--thing {thing} does not apply to {name}, because only motions are performed by a subject")
    if name in motions:
        written = write_motion(
            name, out or Path(name), num or 4, seed, overwrite, frames or 16, thing="" if thing is None else thing
        )
    else:
        write = album.write_style if name in styles else album.write_album
        written = write(name, out or Path(name), num or 5, seed, overwrite)
    for path in written:
        print(path)


def _things() -> dict[str, str]:
    """Maps the name of each held-out subject and face to its description."""
    from shared.toybox import reference_sets as album
    from shared.toybox.subjects import faces
    from shared.toybox.subjects import subjects as things

    return {
        held.name: f"{held.thing.class_name}, {held.thing.main} and {held.thing.second}; "
        f"{len(held.distractors)} look-alikes"
        for split in album.SPLITS
        for held in (*things(split), *faces(split))
    }
