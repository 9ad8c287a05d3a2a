"""Makes the demo's asset, which shows the subject or an ordinary object of its class."""

from __future__ import annotations

from collections.abc import Iterator

from pcs_3d.assets import AssetFiles, create, write_turning
from pcs_3d.cameras import turntable
from pcs_3d.distill.reference_cameras import check_uses_concept, compares_with_subject
from pcs_3d.extra import check_installed
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.demo import Asked, Bars, Exhibit
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.open_runner import open_runner
from shared.toybox.reference_sets import write_album

_SHOTS, _SIDE = 5, 128  # number of renders in the overview, and their side length in pixels


def check(asked: Asked) -> None:
    """Raises ValueError if the recipe is unknown or learns the subject itself, or if a package that assets need is
    missing."""
    check_installed()
    check_uses_concept(asked.asset_recipe, load(asked.asset_recipe, [], "3d", Recipe3D))


def show(asked: Asked, bars: Bars) -> Iterator[str | Exhibit]:
    """Makes an asset. It shows the subject if the subject was learned from pictures, and an ordinary object of the
    class otherwise. In both cases, a recipe that compares renders with the subject's pictures gets these pictures."""
    known = asked.concept.is_dir()
    prompt = f"a photo of a {f'<{asked.concept.stem}>' if known else asked.thing.thing.class_name}"
    recipe = load(asked.asset_recipe, [f"prompt={prompt}"], "3d", Recipe3D)
    subjects = {}
    if compares_with_subject(recipe):
        if not asked.references.is_dir():
            write_album(asked.subject, asked.references)
        subjects = {asked.subject: read_subject(asked.references, class_noun=asked.thing.thing.class_name)}
    runner = open_runner(
        Runner3D, "toybox", [str(asked.concept)] if known else [], "cpu", recipe.train.mixed_precision, False
    )
    out = asked.out / "asset"
    with bars.bar() as progress:
        asset = create(runner, recipe, AssetFiles(out), subjects, progress=progress)
    yield f"asset        {out / 'asset.glb'} ({asset.costs['training_seconds']:.0f} s)"
    turning = write_turning(asset, out / "turntable.webp")
    around = 2 * asset.views(turntable(_SHOTS), _SIDE).pixels - 1  # [N, 3, H, W]
    files = {"the mesh (GLB)": out / "asset.glb", "the turntable": out / "turntable.mp4"}
    yield Exhibit("In 3D", turning, f"“{prompt}”, by {recipe.title}", more=files, shots=around)
