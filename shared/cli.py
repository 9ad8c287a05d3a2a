"""The `pcs` command, which collects the commands of the installed packages (entry-point group `pcs.commands`)
and turns errors into messages.

Command modules import only the CLI library at module level. Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from shared.train.signals import exit_code, heed_stops

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import typer

GROUP = "pcs.commands"
_PRINTED: set[str] = set()  # warnings already printed by this command
_STOPPED = 130  # the exit code that typer returns and shells expect after Ctrl-C


def build() -> typer.Typer:
    """Builds the whole command tree. If a package's commands cannot be loaded, reports this and keeps the others."""
    from importlib.metadata import entry_points

    import typer

    app = typer.Typer(
        name="pcs",
        help="Learn a subject from a few pictures, save it as a concept, generate it in new scenes, and measure the result.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        _add(app, entry)
    return app


def _add(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        app.add_typer(entry.load(), name=entry.name)
    except ImportError as error:
        print(f"pcs: the command {entry.name!r} cannot be loaded: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs `pcs`. The exit code is 0 on success, 1 if the run failed, 2 for invalid input, 130 after Ctrl-C, 143 after
    SIGTERM and 129 after SIGHUP.

    Each of these signals ends a command in the same way: half-written files are removed, and training saves its state.
    """
    heed_stops()
    # OpenMP reads this when torch is imported. By default, its threads spin while they wait. On two cores, this makes training
    # up to 1.8 times slower while another program is busy. Sleeping threads have no measurable cost on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = _main(arguments)
    except KeyboardInterrupt:  # Ctrl-C while commands are being collected
        print("stopped", file=sys.stderr)
        code = _STOPPED
    if code == _STOPPED:  # skip Python's own exit, which would report SIGINT if the signal arrived inside an `exec`
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(exit_code())
    sys.exit(code)


def _main(arguments: list[str] | None) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an unprintable file name must not crash a command
            stream.reconfigure(errors="backslashreplace")
    _PRINTED.clear()
    warnings.showwarning = _warn
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    return run(build(), arguments)


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code. User errors become one message without a traceback."""
    import typer

    from shared.io.locks import holding

    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            _check_bytes(argument)
        with holding():
            result: Any = typer.main.get_command(app)(args=arguments, standalone_mode=False)
        if result == _STOPPED:  # Ctrl-C: newer versions of typer return this, older ones raise Abort
            print("stopped", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except Exception as error:
        if type(error).__name__ in ("Exit",):
            return int(getattr(error, "exit_code", 0))
        if type(error).__name__ in ("Abort",):
            print("stopped", file=sys.stderr)
            return _STOPPED
        show = getattr(error, "show", None)
        if callable(show):  # a ClickException; newer versions of typer define this class themselves
            show(file=sys.stderr)
            return int(getattr(error, "exit_code", 2))
        return _failed(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _STOPPED


def _check_bytes(argument: str) -> None:
    """Raises ValueError for bytes that are not UTF-8, unless they are part of the path of an existing file or folder."""
    if argument.isascii():
        return
    from shared.config import expanded
    from shared.io.terminal import check_utf8

    value = argument.partition("=")[2]
    texts = [argument, value, argument.rpartition(":")[0], value.rpartition(":")[0]]
    if not any(text and expanded(text).exists() for text in texts):
        check_utf8(argument)


def _failed(error: Exception) -> int:
    from shared.io.failures import in_words, out_of_memory

    if isinstance(error, ValueError) and not out_of_memory(error):
        print(f"pcs: {_clean(error)}", file=sys.stderr)
        return 2
    words = in_words(error) or (str(error) if isinstance(error, OSError) or type(error).__name__ == "NotFinite" else "")
    if not words:
        raise error
    print(f"pcs: {_clean(words)}", file=sys.stderr)
    return 1


def _warn(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    """Prints each warning only once, wherever it comes from."""
    text = _clean(message)
    if text not in _PRINTED:
        _PRINTED.add(text)
        print(f"warning: {text}", file=sys.stderr)


def _clean(text: Any) -> str:
    from shared.io.terminal import printable  # messages can contain names from other people's files

    return printable(text)


if __name__ == "__main__":
    main()
