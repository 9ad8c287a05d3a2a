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
def methods(
    context: typer.Context,
    long: bool = typer.Option(False, "--long", help="every recipe's whole place in the taxonomy"),
) -> None:
    """List every recipe and what it trains."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.table import Table

    from shared.recipe.catalog import recipe_files
    from shared.recipe.resolve import model_of, written
    from shared.recipe.taxonomy import taxonomy_of

    console = Console(highlight=False)
    for modality in ("image", "video", "3d"):
        by_scheme: dict[str, list[tuple[str, str, dict[str, str]]]] = {}
        for name in recipe_files(modality):
            recipe = written(name, modality, model_of(modality))
            place = taxonomy_of(recipe)
            values = {words: getattr(place, key) for key, words in _COLUMNS.items() if getattr(place, key)}
            by_scheme.setdefault(place.scheme, []).append((name, recipe.title, values))
        for scheme, entries in by_scheme.items():
            console.print(f"[bold]{modality}: {scheme}[/]\n")
            table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_header=not long)
            for column in ("recipe", "method", "trains"):
                table.add_column("" if long else column, overflow="fold", no_wrap=column == "recipe")
            for name, title, values in entries:
                if long:
                    table.add_row(name, "method", title)
                    for words, value in values.items():
                        table.add_row("", words, value)
                else:
                    table.add_row(name, title, values.get("trains", ""))
            console.print(table)
    more = "" if long else "pcs methods --long prints every recipe's place in the taxonomy.\n"
    print(f"\n{more}pcs methods show NAME prints one whole recipe, with its papers.")


@app.command()
def show(
    name: str = typer.Argument(help="a recipe's name or a YAML file"),
    settings: list[str] = typer.Argument(None, help="key=value, as for personalize"),
    modality: str = typer.Option("", help="image, video or 3d; default: the first that has a recipe of this name"),
) -> None:
    """Print the resolved recipe, as it would run (on the toybox, unless backbone=… says otherwise)."""
    import yaml

    from shared.recipe.catalog import recipe_files
    from shared.recipe.resolve import load, model_of
    from shared.recipe.schema import dump
    from shared.recipe.taxonomy import taxonomy_of

    modality = modality or next((m for m in ("image", "video", "3d") if name in recipe_files(m)), "image")
    recipe = load(name, settings or [], modality, model_of(modality))
    place = taxonomy_of(recipe)
    for key, words in _COLUMNS.items():
        if getattr(place, key):
            print(f"# {words}: {getattr(place, key)}")
    print(yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True, width=120))
