"""`pcs image personalize | generate | evaluate | benchmark`."""

from __future__ import annotations

from pathlib import Path

import typer

from shared.commands import numbers, steering
from shared.commands.paths import PATH

app = typer.Typer(help="Personalized pictures.", no_args_is_help=True)

_CONCEPT = typer.Option([], "--concept", help="a concept folder, PATH or PATH:STRENGTH; can be repeated")
_LORA = typer.Option(
    [], "--lora", help="a LoRA file from another program (diffusers, peft, kohya), FILE or FILE:STRENGTH; repeatable"
)
_TOKEN = typer.Option([], help='the words the LoRA was trained with ("sks mug"); one --token for each --lora')
_SEEDS = 2**62
_DEVICE = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one")
_PRECISION = typer.Option("auto", help="no (float32), bf16, fp16, or auto (half precision on a GPU, else float32)")
_DOWNLOAD = typer.Option(False, "--download", help="download files from the hub if they are not in the local cache")
_CLIP = typer.Option(None, help="a local CLIP folder to score with; the toybox uses its own by default", **PATH)
_DINO = typer.Option(None, help="a local DINO or DINOv2 folder to score with", **PATH)


@app.command()
def personalize(
    recipe: str = typer.Argument(help="a recipe's name (see `pcs methods`) or a YAML file"),
    settings: list[str] = typer.Argument(
        None, help="key=value, such as subject.images=photos/ subject.class_noun=mug output=my-mug.concept"
    ),
    resume: bool = typer.Option(False, help="resume an interrupted run"),
    overwrite: bool = typer.Option(False, help="replace an existing concept, and the state of an interrupted run"),
    concept: list[str] = _CONCEPT,
    device: str = _DEVICE,
    clip: Path = _CLIP,
    dino: Path = _DINO,
    download: bool = _DOWNLOAD,
) -> None:
    """Learn a concept from pictures. The concept is a folder; training state and logs are written next to it."""
    from pcs_image.runner import ImageRunner
    from shared.commands.learning import Learning, Medium, learn
    from shared.recipe.schema import Recipe

    asked = Learning(resume, overwrite, concept, device, download, clip, dino)
    learn(Medium("image", Recipe, ImageRunner), recipe, settings or [], asked)


@app.command()
def generate(
    prompts: list[str] = typer.Argument(help='"a photo of a <my-mug> on the beach"; can be repeated'),
    concept: list[str] = _CONCEPT,
    lora: list[str] = _LORA,
    token: list[str] = _TOKEN,
    out: Path = typer.Option(Path("out"), help="folder for the pictures", **PATH),
    num: int = typer.Option(1, min=1, max=10_000, help="pictures per prompt"),
    seed: int = typer.Option(
        0, min=0, max=_SEEDS, help="seed of each prompt's first picture; each further picture uses the next seed"
    ),
    strength: list[str] = typer.Option(
        [], help="a concept's strength schedule; my-mug=0@0,1@0.2 leaves my-mug out of the first fifth of the steps"
    ),
    invert: Path = typer.Option(None, help=steering.INVERT, **PATH),
    invert_share: float = typer.Option(0.3, help=steering.SHARE, **numbers.SHARE),
    invert_prompt: str = typer.Option("", help=steering.PROMPT),
    keep: Path = typer.Option(None, help=steering.KEEP, **PATH),
    keep_mask: Path = typer.Option(None, help=steering.MASK, **PATH),
    boxes: Path = typer.Option(None, help=steering.BOXES, **PATH),
    negative: str = typer.Option("", help="negative prompt, which describes what should not appear"),
    guidance: float = typer.Option(
        None, help="classifier-free guidance scale; default: as in the first concept's recipe", **numbers.GUIDANCE
    ),
    steps: int = typer.Option(
        None, min=1, max=10_000, help="denoising steps; default: as in the first concept's recipe"
    ),
    scheduler: str = typer.Option(None, help="ddim, dpm++, euler, unipc … (an unknown name lists all choices)"),
    height: int = typer.Option(None, min=1, max=8192, help="height in pixels"),
    width: int = typer.Option(None, min=1, max=8192, help="width in pixels"),
    grid: bool = typer.Option(False, help="also write all pictures as one grid"),
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the first concept was learned on"
    ),
    device: str = _DEVICE,
    precision: str = _PRECISION,
    download: bool = _DOWNLOAD,
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """Generate pictures with any number of concepts. Each PNG records everything needed to reproduce it."""
    from pcs_image.pictures import PictureFolder
    from pcs_image.pictures import generate as paint
    from pcs_image.runner import ImageRunner
    from shared.commands.progress import Lines
    from shared.io.denoising_progress import named
    from shared.io.outputs import check_output
    from shared.runner.open_runner import (
        check_precision,
        check_prompts,
        check_strengths,
        open_runner,
        parse_loras,
        read_by,
    )
    from shared.sampling.settings import SamplingSettings

    loras = parse_loras(lora, token)
    steered = steering.Steering(invert, invert_share, invert_prompt, keep, keep_mask, boxes)
    check_output(out, overwrite, [*read_by(concept, backbone), *(asked.path for asked in loras), *steered.files])
    hooks = (*check_strengths(strength), *steered.hooks())
    check_prompts(prompts, concept, loras)
    runner = open_runner(ImageRunner, backbone, concept, device, check_precision(precision), download, loras)
    settings = SamplingSettings(negative, guidance, steps, scheduler, height, width, hooks=hooks)
    seeds = range(seed, seed + num)
    with Lines() as counter:
        on_progress = named(counter, "pictures")
        folder = PictureFolder(out, overwrite, grid)
        paths = paint(runner, prompts, folder, settings, seeds=seeds, progress=on_progress)
    print("\n".join(map(str, paths)))


@app.command()
def evaluate(
    concept: list[str] = _CONCEPT,
    lora: list[str] = _LORA,
    token: list[str] = _TOKEN,
    class_noun: str = typer.Option("", help="class of the LoRA's subject; default: the token without its first word"),
    prompts: str = typer.Option("", help="a prompt set (toybox, dreambench) or a file; default: the backbone's set"),
    out: Path = typer.Option(
        Path("report"), help="folder for index.html, report.json, CSV tables and pictures", **PATH
    ),
    references: Path = typer.Option(
        None,
        help="the subject's pictures; default: a folder next to the concept, with the same name as the training folder",
        **PATH,
    ),
    gallery: Path = typer.Option(
        None, help="a folder with a subfolder for each look-alike of the same class, for identity retrieval", **PATH
    ),
    num: int = typer.Option(2, min=1, max=10_000, help="pictures per prompt"),
    seed: int = typer.Option(0, min=0, max=_SEEDS),
    limit: int = typer.Option(None, min=1, max=10_000, help="use only this many prompts from the set"),
    steps: int = typer.Option(None, min=1, max=10_000, help="denoising steps; default: as in the concept's recipe"),
    guidance: float = typer.Option(
        None, help="classifier-free guidance scale; default: as in the concept's recipe", **numbers.GUIDANCE
    ),
    scheduler: str = typer.Option(None, help="ddim, dpm++ …; default: as in the concept's recipe"),
    clip: Path = _CLIP,
    dino: Path = _DINO,
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the concept was learned on, or the toybox for a LoRA"
    ),
    device: str = _DEVICE,
    precision: str = _PRECISION,
    download: bool = _DOWNLOAD,
    overwrite: bool = typer.Option(False, help="replace an existing report"),
) -> None:
    """Measure a concept, or a LoRA from another program. Scores subject fidelity, prompt following, drift, copying and
    diversity, and reports time and memory."""
    from pcs_image.runner import ImageRunner
    from shared.commands.progress import Lines
    from shared.io.outputs import check_output
    from shared.runner.judging import EvaluationSettings, check_folders, evaluate_loaded, score_line
    from shared.runner.open_runner import (
        check_judged,
        check_precision,
        open_runner,
        parse_concept,
        parse_loras,
        read_by,
    )
    from shared.sampling.settings import SamplingSettings

    loras = parse_loras(lora, token, class_noun)
    check_judged(concept, loras, references)
    judged = loras[0].path if loras else parse_concept(concept[0])[0]
    read = [p for p in (references, gallery, clip, dino) if p is not None]
    check_output(out, overwrite, [*read_by(concept, backbone), judged, *read])
    check_folders(clip, dino)
    runner = open_runner(ImageRunner, backbone, concept, device, check_precision(precision), download, loras)
    settings = EvaluationSettings(
        prompts, tuple(range(seed, seed + num)), limit, SamplingSettings("", guidance, steps, scheduler),
        references, gallery, clip, dino, judged, out, overwrite,
    )  # fmt: skip
    with Lines() as counter:
        report = evaluate_loaded(runner, next(iter(runner.loaded)), settings, counter)
    for score in report.scores:
        print(f"{score.title:28} {score_line(score)}")
    print(f"{out / 'index.html'}")


@app.command()
def benchmark(
    recipes: list[str] = typer.Argument(
        None, help="recipes to compare, by name or as YAML files; default: all shipped recipes"
    ),
    split: str = typer.Option(
        "development", help="development (for use while tuning) or reporting (for use once, at the end)"
    ),
    subjects: str = typer.Option("4", help="how many of the split's subjects to use, or their names as NAME,NAME"),
    limit: int = typer.Option(10, min=1, max=10_000, help="number of prompts"),
    num: int = typer.Option(2, min=1, max=10_000, help="pictures per prompt"),
    out: Path = typer.Option(Path("benchmark"), help="output folder; an interrupted benchmark resumes there", **PATH),
    overrides: list[str] = typer.Option(
        [], "--set", help="key=value applied to every recipe, for example train.steps=100"
    ),
    grid: list[str] = typer.Option(
        [], "--grid", help="key=value,value for one row per value; repeat the option for one row per combination"
    ),
    control: str = typer.Option(None, help="the row to compare the others with, subject by subject"),
    device: str = _DEVICE,
) -> None:
    """Compare recipes on the toybox's held-out subjects, by identity among look-alikes, prompt following, copying and time."""
    from pcs_image.runner import ImageRunner
    from shared.benchmark.experiment import failures_told
    from shared.benchmark.toybox import BenchmarkSettings, count_or_names, run

    settings = BenchmarkSettings(
        split, count_or_names(subjects), limit, num, out, device, tuple(overrides), tuple(grid), control
    )
    comparison = run(ImageRunner, recipes or [], settings)
    print(comparison.markdown())
    failures_told(comparison.failures, len(comparison.reports))
