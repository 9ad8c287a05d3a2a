"""Evaluates one asset. The asset is rendered from all sides, and the instruments score the renders. If the real object
is known, its renders are compared with the asset's."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.asset_files import Judged, read_judged
from pcs_3d.evaluation.asset_report import RENDERS, TRUTH, AssetReport, Placed, ViewRow
from pcs_3d.evaluation.headline import Arm, Arms, curves, headline
from pcs_3d.evaluation.looks import Looks
from pcs_3d.evaluation.shape_scores import Compared, compared, geometry
from pcs_3d.evaluation.views import Views, angle_name, as_model_pixels, draw
from pcs_3d.evaluation.yardstick import Against, Yardstick, plain, with_shape
from pcs_3d.meshes.viewer import viewer_html
from shared.evaluation.picture_rows import pngs
from shared.metrics.report import Instrument

__all__ = ["Against", "Yardstick", "evaluate", "measure", "plain"]


def evaluate(asset: Path | str, against: Against, progress: Callable[[str], None] = lambda _: None) -> AssetReport:
    """Measures the asset in a folder or the mesh in a file.

    Raises ValueError if the asset, the truth, the pictures or a model folder is missing or invalid.
    """
    judged = read_judged(asset)
    progress("instruments")
    named, plainly = judged.said("prompt"), judged.said("plain_prompt")
    prompt = named if against.class_noun else plainly or named
    return measure(judged, Yardstick.of(against, prompt, judged.said("backbone")), progress)


@torch.no_grad()
def measure(judged: Judged, by: Yardstick, progress: Callable[[str], None] = lambda _: None) -> AssetReport:
    """Returns the report on one asset. The yardstick can be reused for all assets of the same object and prompt."""
    judge, tools = by.judge, by.judge.tools
    progress("renders")
    renders = draw(judged.mesh, by.around)
    arms, placed = _arms(judged, renders, by, progress)
    shape = geometry(judged.mesh)
    files, rows = _files(renders, by.true, arms.asset.looks, by.around)
    pictures = {} if by.shown is None else {f"references/{i:02d}.png": png for i, png in enumerate(pngs(by.shown))}
    return AssetReport(
        name=judged.name,
        file=judged.file.name,
        prompt=judge.prompt,
        truth="" if by.truth is None else by.truth.name,
        backbone=judged.said("backbone"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        toybox=tools.toybox,
        scores=headline(arms, shape),
        views=rows,
        curves=curves(arms, by.around.azimuth_deg.tolist()),
        geometry=shape,
        placed=None if placed is None else Placed(scale=placed.mesh.scale, offset=placed.mesh.offset),
        references=list(pictures),
        instruments=[
            Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy))
            for i in tools.infos()
        ],
        costs=judged.costs,
        notes=_notes(judged, by),
        files={**files, **pictures},
        viewer=viewer_html(judged.mesh.pieces),
    )


def _arms(
    judged: Judged, renders: Views, by: Yardstick, progress: Callable[[str], None]
) -> tuple[Arms, Compared | None]:
    """Measures the asset and, for comparison, the real object and a sphere in that object's mean colour, in the same
    way."""
    chance = None if by.judge.verifier is None else by.judge.verifier.chance
    looks = by.judge.look(renders, by.true)
    if by.true is None:
        return Arms(Arm(looks), chance=chance), None
    progress("outlines")
    mine = compared(judged.mesh, by.true, by.around)
    asset = Arm(with_shape(looks, mine.iou.tolist(), mine.psnr.tolist()), mine.psnr_of_all)
    return Arms(asset, by.truth_arm, by.sphere_arm, chance), mine


def _files(renders: Views, true: Views | None, looks: Looks, around: Cameras) -> tuple[dict[str, bytes], list[ViewRow]]:
    names = [angle_name(a) for a in around.azimuth_deg.tolist()]
    files = {f"{RENDERS}/{n}.png": png for n, png in zip(names, pngs(as_model_pixels(renders)), strict=True)}
    if true is not None:
        files |= {f"{TRUTH}/{n}.png": png for n, png in zip(names, pngs(as_model_pixels(true)), strict=True)}
    rows = []
    for i, (azimuth, name) in enumerate(zip(around.azimuth_deg.tolist(), names, strict=True)):
        rows.append(
            ViewRow(
                azimuth_deg=azimuth,
                file=f"{RENDERS}/{name}.png",
                truth_file="" if true is None else f"{TRUTH}/{name}.png",
                scores={key: column[i] for key, column in looks.scores.items()},
                seen=looks.seen[i] if looks.seen else {},
            )
        )
    return files, rows


def _notes(judged: Judged, by: Yardstick) -> list[str]:
    """Returns notes on what was not measured, and why."""
    judge, tools, prompt = by.judge, by.judge.tools, by.judge.prompt
    said = []
    if by.truth is None:
        said.append(
            "Silhouettes, colours and identity are not measured; pass --truth NAME or --truth FILE to measure them."
        )
    elif judge.verifier is None:
        said.append(
            "Identity is not verified: look-alikes and a threshold exist only for the toybox's subjects. If an encoder "
            "is available, the similarity to the real object, seen from the same side, is reported instead."
        )
    if tools.attributes is None:
        said.append(
            "View directions are not estimated: only the toybox's own instruments can tell front, side and back apart."
        )
    if tools.text_image is None:
        said.append("CLIP-T and CLIP-I are not measured; pass --clip FOLDER to measure them.")
    elif not prompt:
        said.append("CLIP-T is not measured because the prompt is unknown; pass --prompt to measure it.")
    if judge.references is None:
        said.append(
            "Similarity to reference pictures (CLIP-I, DINO-I) is not measured; pass --references FOLDER to measure it."
        )
    if re.search(r"<[^<>]*>", judged.said("prompt")) and "thing" in prompt.split():
        said.append(
            "The learned name in the prompt was replaced with “thing”; pass --class-noun to use a class noun instead."
        )
    return said
