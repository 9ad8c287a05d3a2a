"""`pcs 3d create | evaluate | class-mesh | benchmark | threestudio`."""

from __future__ import annotations

from pathlib import Path

import typer

from pcs_3d.commands import threestudio
from shared.commands.paths import PATH

app = typer.Typer(help="Personalized 3D assets.", no_args_is_help=True)
app.add_typer(threestudio.app, name="threestudio")


@app.callback()
def three_d() -> None:
    """Personalized 3D assets."""


@app.command()
def create(
    recipe: str = typer.Argument(help="a recipe's name (see `pcs methods`) or a YAML file"),
    settings: list[str] = typer.Argument(
        None, help='settings as key=value, such as prompt="a photo of a <my-mug>" train.steps=1000'
    ),
    concept: list[str] = typer.Option([], "--concept", help="a concept folder, PATH or PATH:STRENGTH; can be repeated"),
    out: Path = typer.Option(Path("asset"), help="folder for the mesh, renders and turntable.mp4", **PATH),
    resume: bool = typer.Option(False, help="resume an interrupted run"),
    overwrite: bool = typer.Option(False, help="replace an existing asset and the state of an interrupted run"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one"),
    vram: str = typer.Option(
        None,
        help="limit on GPU memory, such as 8G or 512M (on a CPU, the limit covers the whole process); to stay within "
        "it, fewer views are processed at a time, activations are recomputed, and renders are made smaller unless "
        "train.resolution is set",
    ),
    download: bool = typer.Option(
        False, "--download", help="download files from the hub if they are not in the local cache"
    ),
) -> None:
    """Make a 3D asset from a prompt, with any number of concepts, by score distillation."""
    from pcs_3d.assets import AssetFiles
    from pcs_3d.assets import create as make
    from pcs_3d.distill.hand_over import check_fields
    from pcs_3d.distill.memory_plan import as_begun
    from pcs_3d.export.page import PAGE
    from pcs_3d.extra import check_installed
    from pcs_3d.recipe import Recipe3D
    from pcs_3d.runner import Runner3D, check_asked
    from shared.commands.progress import Bar
    from shared.metrics.html import size
    from shared.recipe.phases import expand_phases
    from shared.recipe.reads import paths_read
    from shared.recipe.resolve import load
    from shared.runner.open_runner import kinds_of, model_asked_for, open_runner, read_by
    from shared.train import checkpoint
    from shared.train.measure_memory import parse_bytes

    check_installed()
    memory = None if vram is None else parse_bytes(vram, "--vram")
    resolved = load(recipe, settings or [], "3d", Recipe3D, model_asked_for(None, concept))
    if resolved.output is not None:
        raise ValueError(f"output = {resolved.output}: set an asset's folder with --out instead")
    check_fields(resolved)
    files = AssetFiles(out, overwrite, resume)
    if files.check([*read_by(concept, resolved.backbone), *paths_read(resolved)]):
        print(f"already finished: {out}")
        return
    subjects = {name: subject.read() for name, subject in resolved.subjects.items()}
    if resolved.subject is not None:
        subjects = {resolved.name or "subject": resolved.subject.read()}
    for subject in subjects.values():
        files.check_apart([*subject.files, *subject.masks.values()])  # unlike the first check, follows links in folders
    kinds = kinds_of(concept)
    if kinds is not None:
        check_asked(resolved, kinds, subjects)
    precision = resolved.train.mixed_precision
    runner = open_runner(Runner3D, resolved.backbone, concept, device, precision, download, **resolved.opening())
    plan = None
    begun = checkpoint.load(files.workdir) if resume and memory is not None else None
    if begun is not None:
        resolved = as_begun(resolved, begun.info["recipe"])
    elif memory is not None:
        sides_fixed = any("train.resolution=" in s for s in settings or [])
        plan = runner.fit(resolved, files.workdir, subjects, memory=memory, sides_fixed=sides_fixed)
        resolved = plan.recipe
        print(plan)
    if any(phase.train.validation.every for _, phase in expand_phases(resolved)):
        print(f"previews: {files.workdir / 'samples'}")
    with Bar() as bar:
        try:
            asset = make(runner, resolved, files, subjects, bar, plan=plan)
        except KeyboardInterrupt:
            if checkpoint.load(files.workdir) is not None:
                typer.echo(f"progress is saved in {files.workdir}; continue with --resume", err=True)
            raise
    if memory is not None:
        used = size(asset.costs["training_peak_memory"])
        print(f"memory: {used} at peak" + ("" if plan is None else f" ({size(plan.estimate)} estimated)"))
    print(f"{out}: open {out / PAGE}")


@app.command()
def evaluate(
    asset: Path = typer.Argument(help="a folder that `create` wrote, or a GLB, OBJ or PLY file", **PATH),
    truth: str = typer.Option(None, help="the real object: a toybox subject (development-car) or a mesh file"),
    references: Path = typer.Option(None, help="a folder of pictures of the object", **PATH),
    prompt: str = typer.Option("", help="what the asset should look like; default: the asset's own prompt"),
    class_noun: str = typer.Option(
        "", help="class noun (such as mug) to replace the learned name in the prompt; default: the noun of --truth"
    ),
    out: Path = typer.Option(
        Path("report"), help="folder for report.html, report.json, CSV tables and renders", **PATH
    ),
    clip: Path = typer.Option(
        None, help="a local CLIP folder to score with (default for toybox assets: the toybox's own CLIP)", **PATH
    ),
    dino: Path = typer.Option(None, help="a local DINO or DINOv2 folder to score with", **PATH),
    device: str = typer.Option("cpu", help="device that --clip and --dino run on"),
    overwrite: bool = typer.Option(False, help="replace an existing report"),
) -> None:
    """Evaluate an asset from 16 viewpoints. The scores cover identity, agreement with the prompt, whether each view
    shows the right side, and geometry. If the real object is given, its shape and colours are compared with the
    asset's."""
    from pcs_3d.evaluation.evaluate import Against
    from pcs_3d.evaluation.evaluate import evaluate as measure
    from pcs_3d.evaluation.headline import line
    from pcs_3d.evaluation.save_asset_report import save_asset_report
    from pcs_3d.extra import check_installed
    from shared.config import expanded
    from shared.io.outputs import check_output
    from shared.runner.judging import check_folders

    check_installed()
    file = expanded(truth) if truth else None
    read = [p for p in (references, clip, dino, file if file and file.exists() else None) if p is not None]
    check_output(out, overwrite, [asset, *read])
    check_folders(clip, dino)
    report = measure(asset, Against(truth, references, prompt, class_noun, clip, dino, device))
    page = save_asset_report(report, out, overwrite)
    for score in report.scores:
        print(f"{score.title:40} {line(score)}")
    for note in report.notes:
        typer.echo(note, err=True)
    print(page)


@app.command("class-mesh")
def class_mesh(
    class_name: str = typer.Argument(help="a class of toybox objects, such as mug", metavar="CLASS"),
    out: Path = typer.Option(None, help="PLY file to write  [default: CLASS.ply]", **PATH),
    overwrite: bool = typer.Option(False, help="replace an existing file"),
) -> None:
    """Write the generic shape of a toybox class as a grey mesh, for trying recipes that start from a mesh."""
    from pcs_3d.evaluation.carving import check_class, write_class_mesh
    from pcs_3d.extra import check_installed
    from shared.io.outputs import check_file

    check_installed()
    check_class(class_name)
    path = out or Path(f"{class_name}.ply")
    if path.suffix.lower() != ".ply":
        raise ValueError(f"--out {path}: give a file name that ends in .ply")
    check_file(path, overwrite).parent.mkdir(parents=True, exist_ok=True)
    print(write_class_mesh(class_name, path))


@app.command()
def benchmark(
    recipes: list[str] = typer.Argument(
        None,
        help="asset recipes to compare, given by name or as YAML files; "
        "default: reference_reconstruction texture_from_views texture_refinement hifa dreamfusion prolificdreamer "
        "lucid_dreamer",
    ),
    split: str = typer.Option(
        "development", help="development (for use while tuning) or reporting (for use once, at the end)"
    ),
    subjects: str = typer.Option("4", help="how many of the split's subjects to use, or their names as NAME,NAME"),
    learn: str = typer.Option(
        "t_lora",
        help="recipe that learns each subject from pictures; the resulting concept is shared by all asset recipes that "
        "do not learn the subject themselves",
    ),
    prompt: str = typer.Option("a photo of a {concept}", help="what to make; {concept} stands for the subject"),
    out: Path = typer.Option(Path("benchmark"), help="output folder; an interrupted benchmark resumes there", **PATH),
    overrides: list[str] = typer.Option(
        [], "--set", help="key=value applied to every asset recipe, for example train.steps=100"
    ),
    learn_overrides: list[str] = typer.Option([], "--set-learn", help="the same for the recipe given by --learn"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one"),
) -> None:
    """Compare asset recipes on the toybox's held-out subjects. The scores cover shape, whether each view shows the
    right side, and identity. Where possible, all scores are also measured without the concept."""
    from pcs_3d.benchmark.toybox_assets import AssetBenchmarkSettings, run
    from pcs_3d.extra import check_installed
    from shared.benchmark.experiment import failures_told
    from shared.benchmark.toybox import count_or_names

    check_installed()
    settings = AssetBenchmarkSettings(
        split, count_or_names(subjects), learn, prompt, out, device, tuple(overrides), tuple(learn_overrides)
    )
    comparison = run(recipes or [], settings)
    print(comparison.markdown())
    failures_told(comparison.failures, len(comparison.reports))
