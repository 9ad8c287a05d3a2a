"""The commands `pcs concept show | export | import | merge | evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from shared.commands import numbers
from shared.commands.paths import PATH

app = typer.Typer(help="Inspect, export, merge and evaluate concepts.", no_args_is_help=True)


@app.command()
def show(
    path: Path = typer.Argument(help="a concept folder", **PATH),
    as_json: bool = typer.Option(False, "--json", help="print everything as JSON"),
) -> None:
    """Show what a concept is, how it was learned, how well it scored, and how to use it."""
    from rich.console import Console

    from shared.concept import as_json as to_json
    from shared.concept import describe, read

    concept = read(path)
    if as_json:
        import json

        print(json.dumps(to_json(concept), indent=1))
    else:
        Console().print(describe(concept))


@app.command()
def export(
    path: Path = typer.Argument(help="a concept folder", **PATH),
    out: Path = typer.Option(help="folder for the export", **PATH),
    format: str = typer.Option("diffusers", help="file format: diffusers"),
    strength: float = typer.Option(
        1.0, help="strength folded into the weights and the learned tokens", **numbers.STRENGTH
    ),
    backbone: str = typer.Option(None, help="folder, file or hub id; default: the model the concept was learned on"),
    motion_adapter: Path = typer.Option(
        None, help="folder of a diffusers MotionAdapter, for motion concepts; default: the backbone's own", **PATH
    ),
    download: bool = typer.Option(
        False, "--download", help="download files from the hub if they are not in the local cache"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """Export a concept in another program's format, load it back with that program, and compare the results numerically."""
    from shared.backbones.built_on import built_on
    from shared.concept import export as write
    from shared.concept import load_backbone_of, read
    from shared.io.outputs import check_output
    from shared.runner.open_runner import read_by

    check_output(out, overwrite, read_by([path], backbone, motion_adapter))
    concept = read(path)
    prepare = built_on(concept.meta.backbone.family, motion_adapter)
    model = load_backbone_of(concept, backbone, download=download, prepare=prepare)
    result = write(concept, out, format=format, backbone=model, strength=strength, overwrite=overwrite)
    for name, check in result["checks"].items():
        found, limit = check["max_abs_difference"], check["limit"]
        print(f"{name}: results agree to within rounding error (largest difference {found:.2g}, limit {limit:.2g})")
    print(out)


@app.command("import")
def import_(
    file: Path = typer.Argument(
        help="a LoRA file from diffusers, peft or kohya, or the folder it was written to", **PATH
    ),
    out: Path = typer.Option(help="the concept folder to write; the concept is named after it", **PATH),
    token: str = typer.Option(
        "",
        help='words that stood for the subject in the training prompts ("sks mug"); default: none, so the LoRA applies to '
        "every prompt",
    ),
    class_noun: str = typer.Option("", help="the subject's class; default: the token without its first word"),
    backbone: str = typer.Option(None, help="the LoRA's base model (folder, file or hub id); default: the toybox"),
    download: bool = typer.Option(
        False, "--download", help="download files from the hub if they are not in the local cache"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """Import a LoRA from another training program as a concept. Names in the file that match no layer are reported."""
    from shared.backbones import load_backbone
    from shared.concept import import_lora, save
    from shared.config import NAME
    from shared.io.outputs import check_output
    from shared.runner.open_runner import read_by

    check_output(out, overwrite, [file, *read_by([], backbone)])
    name = out.name.removesuffix(".concept")
    if not re.fullmatch(NAME, name):
        raise ValueError(f"--out {out}: a concept cannot be called {name!r} (use only letters, digits, - and _)")
    model = load_backbone(backbone, download=download)
    concept = import_lora(file, model, token, class_noun, name=name)
    save(concept, out, overwrite=overwrite)
    print(out)


@app.command()
def merge(
    paths: list[Path] = typer.Argument(
        help="two or more concept folders, learned with recipes that train cross-attention keys and values (custom_diffusion)",
        **PATH,
    ),
    out: Path = typer.Option(help="output folder; it will contain NAME.concept for each merged concept", **PATH),
    method: str = typer.Option("closed_form", help="closed_form or sum"),
    captions: Path = typer.Option(
        None,
        help="text file with one caption per line; the merge preserves the captions' meaning; default: the evaluation "
        "prompts, with the class noun in place of the concept",
        **PATH,
    ),
    backbone: str = typer.Option(
        None, help="folder, file or hub id; default: the model the first concept was learned on"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """Merge separately learned concepts without training, using Custom Diffusion's constrained least squares."""
    from shared.backbones.built_on import built_on
    from shared.concept import load_backbone_of, read, save
    from shared.concept.merge import merge as join
    from shared.io.outputs import atomic_folder, check_output
    from shared.runner.open_runner import read_by

    check_output(out, overwrite, [*read_by(paths, backbone), *([captions] if captions else [])])
    concepts = [read(path) for path in paths]
    listed = _lines(captions) if captions else None
    prepare = built_on(concepts[0].meta.backbone.family)
    model = load_backbone_of(concepts[0], backbone, prepare=prepare)
    sentences = listed if listed is not None else _plain(model, [c.meta.class_noun for c in concepts])
    merged = join(concepts, model, sentences, method)  # type: ignore[arg-type]
    with atomic_folder(out, overwrite) as folder:
        for concept in merged:
            save(concept, folder / f"{concept.name}.concept")
    for concept in merged:
        print(out / f"{concept.name}.concept")


@app.command()
def evaluate(
    concept: str = typer.Argument(help="a subject's concept folder, PATH or PATH:STRENGTH"),
    names: str = typer.Option(
        "", "--in", help="comma-separated modalities (image, video, 3d); default: all that are installed"
    ),
    out: Path = typer.Option(
        Path("report"), help="folder for index.html, report.json, CSV tables and generated files", **PATH
    ),
    prompts: str = typer.Option("", help="a prompt set or a file; default: the model's own set"),
    limit: int = typer.Option(4, min=1, max=10_000, help="number of prompts, counted from the start of the set"),
    num: int = typer.Option(2, min=1, max=10_000, help="number of pictures and of clips per prompt"),
    seed: int = typer.Option(0, min=0, max=2**62),
    steps: int = typer.Option(None, min=1, max=10_000, help="denoising steps; default: as in the concept's recipe"),
    motion: str = typer.Option(None, help="a motion concept for the clips, PATH or PATH:STRENGTH"),
    motion_adapter: Path = typer.Option(None, help="a folder with a diffusers MotionAdapter for clips", **PATH),
    asset_recipe: str = typer.Option("texture_refinement", help="recipe to generate the asset with"),
    set_asset: list[str] = typer.Option(
        [], help="key=value applied to the asset's recipe, for example train.steps=100"
    ),
    floor: bool = typer.Option(False, help="also generate everything without the concept"),
    references: Path = typer.Option(
        None,
        help="the subject's pictures; default: a folder next to the concept, with the same name as the training folder",
        **PATH,
    ),
    gallery: Path = typer.Option(
        None, help="a folder with one subfolder for each look-alike of the same class", **PATH
    ),
    clip: Path = typer.Option(
        None, help="a local CLIP folder to score with (the toybox uses its own by default)", **PATH
    ),
    dino: Path = typer.Option(None, help="a local DINO or DINOv2 folder to score with", **PATH),
    backbone: str = typer.Option(None, help="folder, file or hub id; default: the model the concept was learned on"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one"),
    download: bool = typer.Option(
        False, "--download", help="download files from the hub if they are not in the local cache"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing report"),
) -> None:
    """Score one concept in pictures, clips and an asset with the same metrics, and print one table."""
    from shared.benchmark.cross_modal import evaluate_across, failures_told
    from shared.benchmark.modality import Asked
    from shared.commands.progress import Bar, Lines
    from shared.runner.bars import Bars
    from shared.runner.judging import EvaluationSettings

    asked = Asked(
        concept, out, prompts, limit, tuple(range(seed, seed + num)), steps, motion, motion_adapter, asset_recipe,
        tuple(set_asset), floor, EvaluationSettings(references=references, gallery=gallery, clip=clip, dino=dino),
        backbone, device, download,
    )  # fmt: skip
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    report = evaluate_across(asked, chosen, overwrite, Bars(Bar, Lines))
    print(report.markdown())
    print(out / "index.html")
    failures_told(report)


def _lines(path: Path) -> list[str]:
    """Returns the sentences in a text file, one per line. Raises ValueError if there are none, or if the file is
    unreadable or too large."""
    from shared.io.text_files import read_text_file

    sentences = [line.strip() for line in read_text_file(path, "--captions").splitlines() if line.strip()]
    if not sentences:
        raise ValueError(f"--captions {path} contains no captions")
    return sentences


def _plain(model: Any, nouns: list[str]) -> list[str]:
    """Returns the evaluation prompts and the drift prompts for each class, with the class noun in place of the concept."""
    from shared.evaluation.prompt_sets import REAL, load_prompts

    out = []
    for noun in dict.fromkeys(nouns):
        prompts = load_prompts(model.world.prompts if model.world else REAL, noun)
        out += [p.plain(noun or "thing") for p in (*prompts.prompts, *prompts.drift)]
    return list(dict.fromkeys(out))
