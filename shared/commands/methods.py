"""`pcs methods`: the recipes there are, in the survey's taxonomy."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="The recipes there are, in the taxonomy of the survey arXiv 2405.05538.", invoke_without_command=True
)


@app.callback()
def methods(context: typer.Context) -> None:
    """List every recipe: what it modifies, what it trains, how it keeps what the model knew."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.table import Table

    from shared.config import read_yaml, validate
    from shared.recipe.catalog import Taxonomy, recipe_files

    columns = ("recipe", "modifier", "trains", "prompts", "attention", "masks", "regularization")
    rows: dict[str, list[tuple[str, ...]]] = {}
    for modality in ("image", "video", "3d"):
        for name, path in recipe_files(modality).items():
            data = read_yaml(path)
            where = validate(Taxonomy, data.get("taxonomy", {}), where=path.name)
            row = (
                name,
                where.modifier,
                where.trains,
                where.prompt_engineering,
                where.attention,
                where.mask,
                where.regularization,
            )
            rows.setdefault(f"{modality}: {where.scheme}", []).append(row)
    for heading, found in rows.items():
        used = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in found)]
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), title=heading, title_justify="left")
        for i in used:
            table.add_column(columns[i], no_wrap=i == 0)
        for row in found:
            table.add_row(*(row[i] for i in used))
        Console().print(table)
    print("\npcs methods show NAME prints the whole recipe, with its papers.")


@app.command()
def show(
    name: str,
    settings: list[str] = typer.Argument(None, help="key=value, as for personalize"),
    modality: str = typer.Option("image", help="image, video or 3d"),
) -> None:
    """The resolved recipe, as it would run (on the toybox, unless backbone=… says otherwise)."""
    import yaml

    from shared.recipe.resolve import dump, load

    print(yaml.safe_dump(dump(load(name, settings or [], modality)), sort_keys=False, allow_unicode=True, width=120))
