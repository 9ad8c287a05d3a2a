"""`pcs concept show | export`."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="Look into concepts, and take them to other programs.", no_args_is_help=True)


@app.command()
def show(
    path: Path = typer.Argument(help="a concept folder"),
    as_json: bool = typer.Option(False, "--json", help="everything, for machines"),
) -> None:
    """What a concept is, how it was learned, how well it scored, and how to use it."""
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
    path: Path = typer.Argument(help="a concept folder"),
    out: Path = typer.Option(help="folder for the export"),
    format: str = typer.Option("diffusers", help="diffusers"),
    strength: float = typer.Option(1.0, help="folded into weights and learned words"),
    backbone: str = typer.Option(None, help="default: what the concept was learned on"),
    download: bool = typer.Option(False, "--download", help="fetch from the hub what is not in its cache"),
    overwrite: bool = typer.Option(False, help="replace an existing folder"),
) -> None:
    """Write the concept as files of another program, load them back with that program, and compare numerically."""
    from shared.concept import export as write
    from shared.concept import load_backbone_of, read
    from shared.io.outputs import check_output

    check_output(out, overwrite, [path])
    concept = read(path)
    model = load_backbone_of(concept, backbone, download=download)
    result = write(concept, out, format=format, backbone=model, strength=strength, overwrite=overwrite)
    for name, check in result["checks"].items():
        print(f"{name}: largest difference {check['max_abs_difference']:.2g} (rounding: {check['limit']:.2g})")
    print(out)
