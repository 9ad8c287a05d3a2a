"""Evaluation of one asset: renders from all around, compared with the truth and read by instruments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.asset_files import Judged, read_judged
from pcs_3d.evaluation.asset_report import RENDERS, TRUTH, AssetReport, Placed, ViewRow
from pcs_3d.evaluation.headline import Arm, Arms, curves, headline
from pcs_3d.evaluation.looks import Judge, Looks
from pcs_3d.evaluation.shape_scores import BEST_DB, Compared, compared, geometry
from pcs_3d.evaluation.truths import TrueToy, Truth, mean_color, read_truth
from pcs_3d.evaluation.views import Views, angle_name, as_model_pixels, cameras, draw, sphere
from pcs_3d.meshes.viewer import viewer_html
from shared.backbones.load import TOYBOX, WORLDS
from shared.evaluation.picture_rows import pngs
from shared.io.read_subject import read_subject
from shared.metrics.encoders import Instruments
from shared.metrics.instruments import load_instruments
from shared.metrics.report import Instrument
from shared.metrics.scorer import fill
from shared.runner.judging import references
from shared.toybox.reference_sets import shown_in

_SIDE = 64  # pixels of the references, as those of the toybox's own instruments


@dataclass(frozen=True)
class Against:
    """What an asset is compared with. truth: a subject of the toybox or a mesh file; references: a folder of pictures;
    prompt: default that of the asset; class_noun: takes the place of names in it; clip, dino: model folders."""

    truth: str | None = None
    references: Path | None = None
    prompt: str = ""
    class_noun: str = ""
    clip: Path | None = None
    dino: Path | None = None
    device: str = "cpu"


@torch.no_grad()
def evaluate(asset: Path | str, against: Against, progress: Callable[[str], None] = lambda _: None) -> AssetReport:
    """Measure the asset in a folder or the mesh in a file.

    Raises ValueError for an asset, a truth, pictures or model folders that are not there or are none.
    """
    judged = read_judged(asset)
    truth = None if against.truth is None else read_truth(against.truth)
    shown, truth = _references(against, truth)
    toy = truth if isinstance(truth, TrueToy) else None
    tools = _instruments(judged, against, toy)
    noun = against.class_noun or (toy.class_noun if toy else "")
    prompt = plain(against.prompt or judged.said("prompt"), noun)
    around = cameras()
    progress("renders")
    renders = draw(judged.mesh, around)
    true = None if truth is None else truth.views(around)
    progress("instruments")
    judge = Judge(tools, around, prompt, shown, toy)
    arms, placed = _arms(judged, renders, true, judge, progress)
    shape = geometry(judged.mesh)
    files, rows = _files(renders, true, arms.asset.looks, around)
    pictures = {} if shown is None else {f"references/{i:02d}.png": png for i, png in enumerate(pngs(shown))}
    return AssetReport(
        name=judged.name,
        file=judged.file.name,
        prompt=prompt,
        truth="" if truth is None else truth.name,
        backbone=judged.said("backbone"),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        toybox=tools.toybox,
        scores=headline(arms, shape),
        views=rows,
        curves=curves(arms, around.azimuth_deg.tolist()),
        geometry=shape,
        placed=None if placed is None else Placed(scale=placed.mesh.scale, offset=placed.mesh.offset),
        references=list(pictures),
        instruments=[
            Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy))
            for i in tools.infos()
        ],
        costs=judged.costs,
        notes=_notes(tools, judged, truth, prompt, judge),
        files={**files, **pictures},
        viewer=viewer_html(judged.mesh.pieces),
    )


def plain(prompt: str, class_noun: str) -> str:
    """A prompt in the words of an instrument, which knows no learned names: "a photo of a <my-mug>" -> "a photo of a mug"."""
    return fill(re.sub(r"<[^<>]*>", "{concept}", prompt), class_noun, class_noun).strip()


def _references(against: Against, truth: Truth | None) -> tuple[Tensor | None, Truth | None]:
    """The pictures; and the thing that they show, where they are an album of the toybox and no truth is named."""
    if against.references is None:
        return None, truth
    subject = read_subject(against.references, against.class_noun)
    held = shown_in(subject.images)
    return references(subject, _SIDE), truth or (None if held is None else TrueToy(held))


def _instruments(judged: Judged, against: Against, toy: TrueToy | None) -> Instruments:
    own = toy is not None or judged.said("backbone") == TOYBOX
    if not (own or against.clip or against.dino):
        return Instruments()
    world = WORLDS[TOYBOX].instruments if own else None
    return load_instruments(against.clip, against.dino, world, against.device)


def _arms(
    judged: Judged, renders: Views, true: Views | None, judge: Judge, progress: Callable[[str], None]
) -> tuple[Arms, Compared | None]:
    """The asset, and beside it the truth and a sphere in its mean colour, all looked at in the same way."""
    chance = None if judge.verifier is None else judge.verifier.chance
    looks = judge.look(renders, true)
    if true is None:
        return Arms(Arm(looks), chance=chance), None
    progress("outlines")
    mine = compared(judged.mesh, true, judge.around)
    ball = compared(sphere(mean_color(true)), true, judge.around)
    same = [1.0] * len(renders.masks), [BEST_DB] * len(renders.masks)
    return Arms(
        Arm(_with(looks, mine.iou.tolist(), mine.psnr.tolist()), mine.psnr_of_all),
        Arm(_with(judge.look(true, true), *same), BEST_DB),
        Arm(_with(judge.look(ball.views, true), ball.iou.tolist(), ball.psnr.tolist()), ball.psnr_of_all),
        chance,
    ), mine


def _with(looks: Looks, iou: list[float], psnr: list[float]) -> Looks:
    return replace(looks, scores={"iou": iou, "psnr": psnr, **looks.scores})


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


def _notes(tools: Instruments, judged: Judged, truth: Truth | None, prompt: str, judge: Judge) -> list[str]:
    """What was not measured, and why."""
    said = []
    if truth is None:
        said.append("No truth was given: outlines, colours and identity are not measured (--truth NAME or FILE).")
    elif judge.verifier is None:
        said.append(
            "Identity is not verified: look-alikes and a bar are known of the toybox's things alone. "
            "Likeness to the truth from the same side stands in its place where there is an encoder."
        )
    if tools.attributes is None:
        said.append("Views are not read: only the toybox's own instruments know front, side and back.")
    if tools.text_image is None:
        said.append("CLIP-T and CLIP-I are not measured: give --clip FOLDER.")
    elif not prompt:
        said.append("CLIP-T is not measured: no prompt is known (--prompt).")
    if judge.references is None:
        said.append("Likeness to pictures is not measured by azimuth: none were given (--references).")
    if re.search(r"<[^<>]*>", judged.said("prompt")) and "thing" in prompt.split():
        said.append("The prompt's learned name was read as “thing”: say what it is with --class-noun.")
    return said
