"""The command `pcs doctor`, which checks whether this machine is ready."""

from __future__ import annotations

import typer

from shared.io.failures import of_the_machine

app = typer.Typer(
    help="Check this machine: versions, devices, the toybox, and one tiny run.", invoke_without_command=True
)

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "pillow")


@app.callback()
def doctor() -> None:
    """Report what works, what is broken, and how to fix it. The exit code is 1 if anything is broken."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    bad = 0

    def line(ok: bool | None, what: str) -> None:
        nonlocal bad
        bad += ok is False
        print({True: "  ok  ", False: "BROKEN", None: "  --  "}[ok], what)

    line(True, f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        try:
            line(True, f"{name} {version(name)}")
        except PackageNotFoundError:
            line(False, f"{name} is missing: pip install -e .")
    _torchvision(line)
    _devices(line)
    _toybox(line)
    raise typer.Exit(1 if bad else 0)


def _torchvision(line) -> None:
    from importlib.util import find_spec

    if find_spec("torchvision") is None:
        line(True, "torchvision is not installed and not needed")
        return
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]

        line(True, "torchvision is installed and imports without errors (it is not needed)")
    except Exception as error:
        if of_the_machine(error):
            raise
        line(
            False,
            f"torchvision is installed but broken, which breaks transformers: pip uninstall torchvision ({error})",
        )


def _devices(line) -> None:
    import torch

    from shared.train.precision import resolve_precision

    line(None, f"CPU threads used by torch: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            auto, free = resolve_precision("auto", f"cuda:{i}"), torch.cuda.mem_get_info(i)[0]
            memory = f"{free / 2**30:.0f} of {about.total_memory / 2**30:.0f} GiB free"
            line(True, f"GPU {i}: {about.name}, {memory}; --device cuda:{i} computes in {auto} by default")
    else:
        line(None, "no GPU: the toybox runs on the CPU, but Stable Diffusion would take minutes per picture")


def _toybox(line) -> None:
    import time

    try:
        from shared.backbones import load_backbone
        from shared.sampling.sampler import sample
        from shared.sampling.settings import SamplingSettings

        backbone = load_backbone()
        start = time.perf_counter()
        pixels = sample(backbone, ["a photo of a red duck"], seeds=[0], settings=SamplingSettings(steps=2))
        fine = bool(pixels.isfinite().all())
        how = f"2 steps in {time.perf_counter() - start:.1f} s"
        line(fine, f"the toybox works: {how}" if fine else f"the toybox generates NaN or infinite pixels: {how}")
    except Exception as error:
        if of_the_machine(error):
            raise
        line(False, f"the toybox does not load: {error}")
