"""The ground truth, evaluators and baselines that assets of one object are measured against. Each is computed only
once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.headline import Arm, Arms, headline
from pcs_3d.evaluation.looks import Judge, Looks
from pcs_3d.evaluation.shape_scores import BEST_DB, compared, differences
from pcs_3d.evaluation.truths import TrueToy, Truth, mean_color, read_truth
from pcs_3d.evaluation.views import Views, cameras, sphere
from shared.backbones.load import TOYBOX, WORLDS
from shared.io.read_subject import plain_noun, read_subject
from shared.metrics.encoders import Instruments
from shared.metrics.instruments import load_instruments
from shared.metrics.scorer import fill
from shared.runner.judging import references
from shared.toybox.reference_sets import shown_in

_SIDE = 64  # side length of the reference pictures in pixels, as the toybox's own instruments expect


@dataclass(frozen=True)
class Against:
    """What the user wants an asset to be compared with, and how.

    truth: the name of a toybox subject, or a mesh file.
    references: a folder of pictures.
    prompt: the prompt. If empty, the asset's own prompt is used.
    class_noun: the noun that replaces concept names in the prompt. If empty, the toybox subject's class noun is used.
    clip, dino: model folders.
    """

    truth: str | None = None
    references: Path | None = None
    prompt: str = ""
    class_noun: str = ""
    clip: Path | None = None
    dino: Path | None = None
    device: str = "cpu"


@dataclass
class Yardstick:
    """The instruments and references that assets of one object are measured against.

    truth: the real object, or None if unknown.
    true: views of the truth from the judge's cameras.
    shown: the reference pictures, [R, 3, H, W] in [-1, 1].
    """

    judge: Judge
    truth: Truth | None
    true: Views | None
    shown: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(against: Against, prompt: str = "", backbone: str = "") -> Yardstick:
        """Loads the truth, the pictures and the instruments. `prompt` and `backbone` are those recorded in the assets.

        Raises ValueError if the truth, the pictures or a model folder is missing or invalid.
        """
        truth = None if against.truth is None else read_truth(against.truth)
        shown, truth = _references(against, truth)
        toy = truth if isinstance(truth, TrueToy) else None
        noun = plain_noun(against.class_noun) or (toy.class_noun if toy else "")
        around = cameras()
        judge = Judge(
            _instruments(against, toy is not None or backbone == TOYBOX), around, plain(against.prompt or prompt, noun),
            shown, toy,
        )  # fmt: skip
        return Yardstick(judge, truth, None if truth is None else truth.views(around), shown)

    @property
    def around(self) -> Cameras:
        return self.judge.around

    @cached_property
    def truth_arm(self) -> Arm:
        """The measurements of the real object. Requires ground truth."""
        assert self.true is not None
        same = [1.0] * len(self.true.masks), [BEST_DB] * len(self.true.masks)
        return Arm(with_shape(self.judge.look(self.true, self.true), *same), BEST_DB)

    @cached_property
    def sphere_arm(self) -> Arm:
        """The measurements of a sphere in the truth's mean colour, aligned in the same way as assets. Requires ground
        truth."""
        assert self.true is not None
        ball = compared(sphere(mean_color(self.true)), self.true, self.around)
        looks = self.judge.look(ball.views, self.true)
        return Arm(with_shape(looks, ball.iou.tolist(), ball.psnr.tolist()), ball.psnr_of_all)

    @cached_property
    def generic_scores(self) -> dict[str, float | None]:
        """The scores, by key, of a generic object of the class (`TrueToy.plain`). This object is not aligned. The
        dictionary is empty if the truth is not a toybox subject."""
        if self.true is None or not isinstance(self.truth, TrueToy):
            return {}
        with torch.no_grad():
            views = self.truth.plain.views(self.around)
            iou, psnr, psnr_of_all = differences(views, self.true)
            looks = with_shape(self.judge.look(views, self.true), iou.tolist(), psnr.tolist())
        return {s.key: s.value for s in headline(Arms(Arm(looks, psnr_of_all), self.truth_arm))}


def with_shape(looks: Looks, iou: list[float], psnr: list[float]) -> Looks:
    """Adds the shape scores to `looks`."""
    return replace(looks, scores={"iou": iou, "psnr": psnr, **looks.scores})


def plain(prompt: str, class_noun: str) -> str:
    """Replaces learned names in a prompt with the class noun, because instruments do not know these names. For example,
    "a photo of a <my-mug>" becomes "a photo of a mug"."""
    return fill(re.sub(r"<[^<>]*>", "{concept}", prompt), class_noun, class_noun).strip()


def _references(against: Against, truth: Truth | None) -> tuple[Tensor | None, Truth | None]:
    """Returns the reference pictures and the truth. If no truth is given but the pictures are a toybox album, the truth
    is the object that they show."""
    if against.references is None:
        return None, truth
    subject = read_subject(against.references, against.class_noun)
    held = shown_in(subject.images)
    return references(subject, _SIDE), truth or (None if held is None else TrueToy(held))


def _instruments(against: Against, own: bool) -> Instruments:
    if not (own or against.clip or against.dino):
        return Instruments()
    world = WORLDS[TOYBOX].instruments if own else None
    return load_instruments(against.clip, against.dino, world, against.device)
