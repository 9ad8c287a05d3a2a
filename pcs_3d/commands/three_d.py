"""`pcs 3d create`."""

from __future__ import annotations

from pathlib import Path

import typer

from shared.commands.paths import PATH

app = typer.Typer(help="Personalized 3D assets.", no_args_is_help=True)


@app.callback()
def three_d() -> None:
    """Personalized 3D assets."""


@app.command()
def create(
    recipe: str = typer.Argument(help="a recipe's name (see `pcs methods`) or a YAML file"),
    settings: list[str] = typer.Argument(None, help='key=value: prompt="a photo of a <my-mug>" train.steps=1000'),
    concept: list[str] = typer.Option([], "--concept", help="a concept folder, PATH or PATH:STRENGTH; can be repeated"),
    out: Path = typer.Option(Path("asset"), help="folder for the mesh, renders and turntable.mp4", **PATH),
    resume: bool = typer.Option(False, help="resume an interrupted run"),
    overwrite: bool = typer.Option(False, help="replace an existing asset, and the state of an interrupted run"),
    device: str = typer.Option(None, help="cpu, cuda, cuda:1 …; default: the GPU if there is one"),
    download: bool = typer.Option(False, "--download", help="download from the hub what is not in the local cache"),
) -> None:
    """Make a 3D asset of a prompt, with any number of concepts, by score distillation."""
    from pcs_3d.assets import AssetFiles
    from pcs_3d.assets import create as make
    from pcs_3d.distill.hand_over import check_fields
    from pcs_3d.extra import check_installed
    from pcs_3d.recipe import Recipe3D
    from pcs_3d.runner import Runner3D
    from shared.commands.progress import Bar
    from shared.io.outputs import check_output
    from shared.recipe.resolve import load
    from shared.runner.open_runner import open_runner, read_by
    from shared.train import checkpoint

    check_installed()
    resolved = load(recipe, settings or [], "3d", Recipe3D)
    if resolved.output is not None:
        raise ValueError(f"output = {resolved.output}: the folder of an asset is given by --out")
    check_fields(resolved)
    files = AssetFiles(out, overwrite, resume)
    if files.check():
        print(f"already finished: {out}")
        return
    check_output(out, overwrite or resume, read_by(concept, resolved.backbone))
    subjects = {name: subject.read() for name, subject in resolved.subjects.items()}
    if resolved.subject is not None:
        subjects = {resolved.name or "subject": resolved.subject.read()}
    precision = resolved.train.mixed_precision
    runner = open_runner(Runner3D, resolved.backbone, concept, device, precision, download, **resolved.opening())
    with Bar() as bar:
        try:
            make(runner, resolved, files, subjects, bar)
        except KeyboardInterrupt:
            if checkpoint.load(files.workdir) is not None:
                typer.echo(f"the state is in {files.workdir}: continue with --resume", err=True)
            raise
    print(out)
