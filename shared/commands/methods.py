"""`pcs methods`: the recipes there are, in the survey's taxonomy."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="List the available recipes, in the taxonomy of the survey arXiv 2405.05538.", invoke_without_command=True
)
_COLUMNS = {
    "modifier": "modifier",
    "trains": "trains",
    "prompt_engineering": "prompts",
    "attention": "attention",
    "mask": "masks",
    "augmentation": "augmentation",
    "regularization": "regularization",
}


@app.callback()
def methods(context: typer.Context) -> None:
    """List every recipe: what it modifies, what it trains, how it preserves prior knowledge."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.table import Table

    from shared.recipe.catalog import recipe_files
    from shared.recipe.resolve import written
    from shared.recipe.taxonomy import taxonomy_of

    tables: dict[str, list[tuple[str, ...]]] = {}
    for modality in ("image", "video", "3d"):
        for name in recipe_files(modality):
            place = taxonomy_of(written(name, modality))
            tables.setdefault(f"{modality}: {place.scheme}", []).append((name, *(getattr(place, k) for k in _COLUMNS)))
    columns = ("recipe", *_COLUMNS.values())
    for heading, entries in tables.items():
        used = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in entries)]
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=heading, title_justify="left")
        for i in used:
            table.add_column(columns[i], no_wrap=i == 0)
        for row in entries:
            table.add_row(*(row[i] for i in used))
        Console().print(table)
    print("\npcs methods show NAME prints the whole recipe, with its papers.")


@app.command()
def show(
    name: str = typer.Argument(help="a recipe's name or a YAML file"),
    settings: list[str] = typer.Argument(None, help="key=value, as for personalize"),
    modality: str = typer.Option("image", help="image, video or 3d"),
) -> None:
    """Print the resolved recipe, as it would run (on the toybox, unless backbone=… says otherwise)."""
    import yaml

    from shared.recipe.resolve import load
    from shared.recipe.schema import dump
    from shared.recipe.taxonomy import taxonomy_of

    recipe = load(name, settings or [], modality)
    place = taxonomy_of(recipe)
    for key, words in _COLUMNS.items():
        if getattr(place, key):
            print(f"# {words}: {getattr(place, key)}")
    print(yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True, width=120))
