"""Assets in the demo: the thing that was learned from pictures, as a mesh to open."""

from __future__ import annotations

from collections.abc import Iterator

from pcs_3d.assets import AssetFiles, create, write_turning
from pcs_3d.cameras import turntable
from pcs_3d.extra import check_installed
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.demo import Asked, Bars, Exhibit
from shared.recipe.resolve import load
from shared.runner.open_runner import open_runner

_SHOTS, _SIDE = 5, 128  # of the overview: renders, and pixels


def check(asked: Asked) -> None:
    """ValueError for an unknown recipe, or where a package that assets need is not installed."""
    check_installed()
    load(asked.asset_recipe, [], "3d", Recipe3D)


def show(asked: Asked, bars: Bars) -> Iterator[str | Exhibit]:
    """Makes an asset of the thing where it was learned in pictures, else of its class."""
    known = asked.concept.is_dir()
    prompt = f"a photo of a {f'<{asked.concept.stem}>' if known else asked.thing.thing.class_name}"
    recipe = load(asked.asset_recipe, [f"prompt={prompt}"], "3d", Recipe3D)
    runner = open_runner(
        Runner3D, "toybox", [str(asked.concept)] if known else [], "cpu", recipe.train.mixed_precision, False
    )
    out = asked.out / "asset"
    with bars.bar() as progress:
        asset = create(runner, recipe, AssetFiles(out), progress=progress)
    yield f"asset        {out / 'asset.glb'} ({asset.costs['training_seconds']:.0f} s)"
    turning = write_turning(asset, out / "turntable.webp")
    around = 2 * asset.views(turntable(_SHOTS), _SIDE).pixels - 1  # [N, 3, H, W]
    files = {"the mesh (GLB)": out / "asset.glb", "the turntable": out / "turntable.mp4"}
    yield Exhibit("In space", turning, f"“{prompt}”, by {recipe.title}", more=files, shots=around)
