"""Scores clips during training and evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from shared.metrics.clips.appearance import (
    PixelEncoder,
    clip_t_per_frame,
    leakage,
    subject_similarity,
    unrelated,
)
from shared.metrics.clips.dynamics import dynamics, frozen
from shared.metrics.clips.flow_fields import FlowFields, check_clip, flow_fields
from shared.metrics.clips.motion_fidelity import motion_fidelity
from shared.metrics.clips.paths import KnownMotion, PathReader, path_error
from shared.metrics.clips.tracks import Tracks, follow
from shared.metrics.encoders import ImageEncoder, Instruments
from shared.metrics.scorer import Scorer
from shared.metrics.scores import attribute_hits

FRAMES = 8  # number of evenly spaced frames per clip that recognizers and identity encoders see
Expects = Mapping[str, str]
Column = dict[str, float]


@dataclass(frozen=True)
class SubjectFrames:
    """The subject in f evenly spaced frames of each clip, as `freedom_of_clips` needs it."""

    crops: Tensor  # [N, f, D], embeddings of the frames cropped to the subject
    verified: Tensor  # bool [N, f]

    @staticmethod
    def joined(parts: Sequence[SubjectFrames | None]) -> SubjectFrames | None:
        """Joins batches in order. Returns None if any batch is None."""
        known = [p for p in parts if p is not None]
        if not known or len(known) < len(parts):
            return None
        return SubjectFrames(torch.cat([p.crops for p in known]), torch.cat([p.verified for p in known]))


@dataclass(frozen=True)
class MeasuredClips:
    """Scores of N clips, as float columns of length N, with NaN where a score does not apply."""

    scores: Mapping[str, list[float]]
    seen: list[dict[str, str]]  # per clip: attribute -> the value seen in most frames
    moves_like: list[str]  # per clip: the motion whose path is nearest to the clip's; "" where no path was read
    embeddings: Tensor  # [N, F, D], of whole frames
    subject: SubjectFrames | None = None  # None unless the subject is known, located and verified

    def mean(self, key: str) -> float:
        """Returns the mean of a column, ignoring NaNs, or NaN if no values are left."""
        values = [v for v in self.scores.get(key, []) if not math.isnan(v)]
        return sum(values) / len(values) if values else math.nan


def joined(parts: Sequence[MeasuredClips]) -> MeasuredClips:
    """Joins the measurements of several batches. If a batch lacks a score, that score is NaN for the batch's clips."""
    keys = dict.fromkeys(k for part in parts for k in part.scores)
    scores = {k: [v for p in parts for v in p.scores.get(k, [math.nan] * len(p.seen))] for k in keys}
    return MeasuredClips(
        scores,
        [s for p in parts for s in p.seen],
        [m for p in parts for m in p.moves_like],
        torch.cat([p.embeddings for p in parts]) if parts else torch.zeros(0, 0, 0),
        SubjectFrames.joined([p.subject for p in parts]),
    )


@dataclass
class ClipScorer:
    """Compares clips with their prompts and, where available, with a motion's clips and a subject's pictures.

    Args:
        motion_clips: the clips that the motion was learned from, `[3, f, H, W]` in [-1, 1], all the same size
        known: the motion, if it is one of the toybox's motions
        reader: reads the paths of things, from which that motion is recognized
        thing: the picture scorer that has the subject's references
        compensate_camera: as in `motion_fidelity`
        same_subject: whether the motion's clips show the subject itself, which is then supposed to look like it does in
            these clips, so leakage is not measured
    """

    instruments: Instruments = field(default_factory=Instruments)
    motion_clips: Sequence[Tensor] = ()
    known: KnownMotion | None = None
    reader: PathReader | None = None
    thing: Scorer | None = None
    compensate_camera: bool = False
    same_subject: bool = False

    @property
    def whole(self) -> ImageEncoder:
        """The encoder that compares whole frames."""
        return self.instruments.text_image or self.instruments.identity or PixelEncoder()

    @cached_property
    def motion_tracks(self) -> list[Tracks]:
        return [follow(flow_fields(clip)) for clip in self.motion_clips]

    @cached_property
    def motion_looks(self) -> list[Tensor]:
        """The frame embeddings `[f, D]` of each of the motion's clips."""
        return [self.whole.images(clip.transpose(0, 1)) for clip in self.motion_clips]

    @cached_property
    def among_motion(self) -> list[float]:
        """The fidelity of each of the motion's clips to the others. The list is empty for fewer than two clips."""
        tracks = self.motion_tracks
        if len(tracks) < 2:
            return []
        others = [[b for j, b in enumerate(tracks) if j != i] for i in range(len(tracks))]
        return [self._fidelity(a, rest) for a, rest in zip(tracks, others, strict=True)]

    @cached_property
    def unrelated_looks(self) -> list[float]:
        """The leakage between the motion's own clips; see `unrelated`."""
        return unrelated(self.motion_looks)

    def measure(self, clips: Tensor, prompts: Sequence[str], expects: Sequence[Expects] | None = None) -> MeasuredClips:
        """Computes all scores of N clips `[N, 3, F, H, W]` in [-1, 1], given their prompts with the class noun in place of
        the concept. Raises ValueError if the numbers of clips, prompts and expectations differ."""
        expected = [{}] * len(prompts) if expects is None else list(expects)
        if not len(clips) == len(prompts) == len(expected):
            raise ValueError(f"{len(clips)} clips, {len(prompts)} prompts and {len(expected)} expectations")
        each = [self._one(*row) for row in zip(clips, prompts, expected, strict=True)]
        return joined(each)

    def _one(self, clip: Tensor, prompt: str, expects: Expects) -> MeasuredClips:
        check_clip(clip)
        frames = clip.transpose(0, 1)
        fields, looks = flow_fields(clip), self.whole.images(frames)
        scores = self._movement(fields, looks)
        if self.instruments.text_image is not None:
            text = self.instruments.text_image.texts([prompt])[0]
            scores["clip_t"] = float(clip_t_per_frame(looks, text).mean())
        path, like = self._path(clip)
        shown = frames[torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().long()]
        of_subject, subject = self._subject(shown, prompt, expects)
        scores |= path | of_subject
        attributes, seen = self._attributes(shown, expects)
        scores |= attributes
        if "motion_recognised" in scores and "identity" in scores:
            scores["both"] = scores["motion_recognised"] * scores["identity"]
        return MeasuredClips({k: [v] for k, v in scores.items()}, [seen], [like], looks[None], subject)

    def _movement(self, fields: FlowFields, looks: Tensor) -> Column:
        moved, tracks = dynamics(fields, looks), follow(fields)
        scores = {
            "dynamic_degree": moved.degree,
            "temporal_consistency": moved.consistency,
            "consistency_all_pairs": moved.consistency_all_pairs,
            "dynamic": float(moved.dynamic),
            "frozen": float(frozen(fields, tracks)),
        }
        if self.motion_clips:
            scores["motion_fidelity"] = self._fidelity(tracks, self.motion_tracks)
            if not self.same_subject:
                scores["leakage"] = leakage(looks, self.motion_looks)
        return scores

    def _fidelity(self, tracks: Tracks, to: Sequence[Tracks]) -> float:
        return sum(motion_fidelity(tracks, other, self.compensate_camera) for other in to) / len(to)

    def _path(self, clip: Tensor) -> tuple[Column, str]:
        if self.reader is None or self.known is None:
            return {}, ""
        path = self.reader(clip)
        hit, found = self.known.is_shown(path)
        error = path_error(path, self.known.motion.path(len(path)), min(clip.shape[2:]))
        errors = {f"error_{name}": value for name, value in asdict(error).items()}
        return {"motion_recognised": float(hit), "path_distance": found.distance, **errors}, found.name

    def _subject(self, frames: Tensor, prompt: str, expects: Expects) -> tuple[Column, SubjectFrames | None]:
        """Returns the `Scorer` scores and the likeness of crops, all averaged over the frames, as well as the subject's
        crops."""
        if self.thing is None:
            return {}, None
        measured = self.thing.measure(frames, [prompt] * len(frames), [expects] * len(frames))
        kept = {"identity": "identity", "ceiling": "ceiling", "copied": "copied", "recognised": "thing_recognised"}
        kept |= {self.thing.likeness_key: self.thing.likeness_key}
        scores = {new: measured.mean(key) for key, new in kept.items() if key in measured.scores}
        locator, encoder = self.instruments.locator, self.instruments.identity
        if locator is not None and encoder is not None:
            references = self.thing.references
            where = locator.where(references) if self.thing.masks is None else self.thing.masks
            pairs = (frames, locator.where(frames)), (references, where)
            scores["subject_crops"] = float(subject_similarity(encoder, *pairs, self.instruments.crops).mean())
        subject, crops = None, measured.look.crops
        if crops is not None and "verified" in measured.scores:
            subject = SubjectFrames(crops[None], torch.tensor([[v == 1 for v in measured.scores["verified"]]]))
        return scores, subject

    def _attributes(self, frames: Tensor, expects: Expects) -> tuple[Column, dict[str, str]]:
        """Returns the share of frames that show each attribute as expected, and the value of each in most frames."""
        if self.instruments.attributes is None:
            return {}, {}
        read = self.instruments.attributes.read(frames)
        hits = attribute_hits([expects] * len(frames), read)
        scores = {name: sum(h[name] for h in hits) / len(hits) for name in expects}
        return scores, {name: Counter(values).most_common(1)[0][0] for name, values in read.items()}

    def __call__(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Returns each score's mean over the clips, and `score`, which selects the best checkpoint (see `checkpoint_score`).

        A high `frozen`, the share of clips in which nothing moves, is a warning sign.
        """
        measured = self.measure(clips, prompts)
        means = {k: v for k in measured.scores if not math.isnan(v := measured.mean(k))}
        return {**means, "score": checkpoint_score(means)}


def checkpoint_score(means: Mapping[str, float]) -> float:
    """Returns subject × motion × (1 - leakage), in [0, 1]. A factor that was not measured counts as 1.

    The subject's factor is `identity`. The motion's factor is the recognition rate if paths were read, and otherwise
    the fidelity.
    """
    motion = means.get("motion_recognised", means.get("motion_fidelity", 1.0))
    factors = (motion, means.get("identity", 1.0), 1 - max(0.0, means.get("leakage", 0.0)))
    return math.prod(min(1.0, max(0.0, f)) for f in factors)
