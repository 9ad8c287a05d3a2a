"""The command `pcs demo`, which runs the whole workflow on the toybox in minutes."""

from __future__ import annotations

from pathlib import Path

import typer

from shared.commands.paths import PATH

app = typer.Typer(
    help="Learn a toybox subject from five pictures, show it in new scenes, in clips and in 3D, and measure the results.",
    invoke_without_command=True,
)


@app.callback()
def demo(
    out: Path = typer.Option(Path("demo"), help="folder for everything that the demo writes", **PATH),
    subject: str = typer.Option("development-robot", help="a held-out toybox subject (`pcs toybox subjects`)"),
    recipe: str = typer.Option("t_lora", help="recipe to learn the subject with"),
    motion: str = typer.Option("development-zigzag", help="a held-out toybox motion (`pcs toybox subjects`)"),
    motion_recipe: str = typer.Option("motion_trajectory", help="recipe to learn the motion with"),
    asset_recipe: str = typer.Option("reference_reconstruction", help="recipe to generate the asset with"),
    part: list[str] = typer.Option(
        ["image"], help="part to run: image, video or 3d (video and 3d add a few minutes each); can be repeated"
    ),
    overwrite: bool = typer.Option(False, help="replace an existing demo"),
) -> None:
    """Write references, concepts, a contact sheet, clips, a mesh, scores and a page that shows them all."""
    from shared.commands.progress import Bar, Lines
    from shared.demo import Asked, Bars, run

    for line in run(
        Asked(out, subject, recipe, motion, motion_recipe, asset_recipe), part, overwrite, Bars(Bar, Lines)
    ):
        print(line)
