"""`pcs 3d threestudio install | doctor | run`."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from shared.commands.paths import PATH

app = typer.Typer(
    help="Use concepts in threestudio (https://github.com/threestudio-project/threestudio).", no_args_is_help=True
)
_CHECKOUT = typer.Argument(help="the folder of a threestudio checkout", **PATH)


@app.command()
def install(
    checkout: Path = _CHECKOUT,
    overwrite: bool = typer.Option(False, help="replace files from an earlier installation, even if they were changed"),
) -> None:
    """Write an extension and a configuration into a checkout, so that its launch.py can use pcs-guidance and related
    classes."""
    from pcs_3d.extra import check_installed
    from pcs_3d.threestudio.checkout import install as write

    check_installed()
    for path in write(checkout, overwrite):
        print(path)
    typer.echo("to check what works here, run pcs 3d threestudio doctor " + shlex.quote(str(checkout)), err=True)


@app.command()
def doctor(checkout: Path = _CHECKOUT) -> None:
    """Report which parts of a checkout work on this machine, and how to fix the others. The exit status is 1 if any
    part must be fixed."""
    from pcs_3d.threestudio.doctor import findings

    bad = False
    for works, what in findings(checkout):
        print({True: "  ok  ", False: "BROKEN", None: "  --  "}[works], what, flush=True)
        bad |= works is False
    raise typer.Exit(1 if bad else 0)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    checkout: Path = _CHECKOUT,
    arguments: list[str] = typer.Argument(
        None, help="arguments for launch.py, such as --config configs/pcs-dreamfusion.yaml --train …"
    ),
    cpu: bool = typer.Option(False, "--cpu", help="train on the CPU, in full precision"),
) -> None:
    """Run a checkout's launch.py, even without a GPU or without some of the packages that it imports."""
    from pcs_3d.extra import check_installed
    from pcs_3d.threestudio.checkout import check_checkout
    from pcs_3d.threestudio.launch import launch

    check_installed()
    launch(check_checkout(checkout), arguments or [], cpu)
