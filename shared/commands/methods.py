"""The command `pcs methods`, which lists the available recipes by family, using a survey's taxonomy (arXiv 2405.05538)."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="List the available recipes by family, using the taxonomy from arXiv 2405.05538.", invoke_without_command=True
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
    long: bool = typer.Option(False, "--long", help="also show each recipe's place in the taxonomy"),
) -> None:
    """List the families of methods with their equations, uses, costs, key settings and recipes."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    from shared.recipe.families import families
    from shared.recipe.resolve import model_of, written
    from shared.recipe.taxonomy import taxonomy_of

    console = Console(highlight=False)
    for modality in ("image", "video", "3d"):
        for family in families(modality).values():
            places = {name: taxonomy_of(written(name, modality, model_of(modality))) for name in family.recipes}
            schemes = ", ".join(dict.fromkeys(place.scheme for place in places.values()))
            console.print(f"[bold]{modality}: {family.title}[/] ({schemes})\n")
            about = {"": family.equation, "use": family.use, "cost": family.cost, **family.settings}
            for words, text in about.items():
                console.print(Padding(f"{words}: {text}" if words else text, (0, 0, 0, 2)), markup=False)
            table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
            for column in ("recipe", "what", "how"):
                table.add_column(column, overflow="fold", no_wrap=column == "recipe")
            for name, place in places.items():
                title = written(name, modality, model_of(modality)).title
                values = {words: getattr(place, key) for key, words in _COLUMNS.items() if getattr(place, key)}
                if long:
                    table.add_row(name, "method", title)
                    for words, value in values.items():
                        table.add_row("", words, value)
                else:
                    table.add_row(name, title, values.get("trains", ""))
            console.print(Padding(table, (1, 0, 1, 2)))
    more = "" if long else "pcs methods --long adds each recipe's place in the taxonomy.\n"
    print(f"{more}pcs methods show NAME explains one recipe, setting by setting, with its papers.")


@app.command()
def show(
    name: str = typer.Argument(help="a recipe's name or a YAML file"),
    settings: list[str] = typer.Argument(None, help="key=value, as in `pcs image personalize`"),
    modality: str = typer.Option("", help="image, video or 3d; default: the first that has a recipe with this name"),
) -> None:
    """Explain every setting of a recipe, with the value that a run would use (on the toybox unless backbone=… is set)."""
    from shared.backbones.load import WORLDS
    from shared.recipe.catalog import recipe_files
    from shared.recipe.explain import explained
    from shared.recipe.resolve import load, model_of
    from shared.recipe.schema import dump
    from shared.recipe.taxonomy import taxonomy_of

    modality = modality or next((m for m in ("image", "video", "3d") if name in recipe_files(m)), "image")
    recipe = load(name, settings or [], modality, model_of(modality))
    place = taxonomy_of(recipe)
    if str(recipe.backbone) in WORLDS:
        print("# values for the toybox, a small model; add backbone=PATH for the values used on full-size models")
    for key, words in _COLUMNS.items():
        if getattr(place, key):
            print(f"# {words}: {getattr(place, key)}")
    print(explained(recipe, dump(recipe)))
