"""`pcs demo`: the whole path on the toybox, in minutes."""

from __future__ import annotations

from pathlib import Path

import typer

from shared.commands.paths import PATH

app = typer.Typer(
    help="Learn a toybox subject from five pictures, show it in new scenes, and measure it.",
    invoke_without_command=True,
)


@app.callback()
def demo(
    out: Path = typer.Option(Path("demo"), help="folder for everything the demo makes", **PATH),
    subject: str = typer.Option("development-robot", help="a held-out toybox subject (`pcs toybox subjects`)"),
    recipe: str = typer.Option("pivotal_tuning", help="recipe to learn it with"),
    overwrite: bool = typer.Option(False, help="replace an existing demo"),
) -> None:
    """Write references, the concept, a contact sheet (references | new scenes | without the concept), scores, index.html."""
    from pcs_image.demo import run
    from shared.commands.progress import Bar, Lines

    for line in run(out, subject, recipe, overwrite, Bar, Lines):
        print(line)
