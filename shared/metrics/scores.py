"""Scores as pure functions of embeddings `[N, D]`. All arithmetic is in float64.

CLIP-T, CLIP-I and DINO-I follow DreamBooth (arXiv 2208.12242, section 4.1); KID follows arXiv 1801.01401.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_SCORE_WEIGHT = 2.5
"""CLIPScore's factor (arXiv 2104.08718, eq. 1). It stretches CLIP's cosines, which are rarely above 0.4, to [0, 1]."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns the float64 cosines `[N, M]` between `a` (`[N, D]`) and `b` (`[M, D]`). A zero vector has cosine 0."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"embeddings: expected [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    return F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T


def clip_t(images: Tensor, texts: Tensor) -> Tensor:
    """Returns CLIP-T (`[N]`), which is the cosine between each picture and its own text. Both inputs are `[N, D]`."""
    if images.shape != texts.shape:
        raise ValueError(f"expected one text per picture, got {list(images.shape)} and {list(texts.shape)}")
    return (F.normalize(images.double(), dim=1) * F.normalize(texts.double(), dim=1)).sum(1)


def clip_i(outputs: Tensor, references: Tensor) -> Tensor:
    """Returns CLIP-I (`[N]`), which is the mean cosine between each output (`[N, D]`) and the references (`[R, D]`)."""
    if len(references) == 0:
        raise ValueError("no references to compare with")
    return cosine(outputs, references).mean(1)


def dino_i(outputs: Tensor, references: Tensor) -> Tensor:
    """Returns DINO-I, which is `clip_i` on DINO embeddings."""
    return clip_i(outputs, references)


def leave_one_out(references: Tensor) -> Tensor:
    """Returns the mean cosine between each reference and the others (`[R]`). This is the value that `clip_i` would
    return for a real picture of the subject. The result is empty for fewer than two references."""
    count = len(references)
    if count < 2:
        return torch.zeros(0, dtype=torch.float64)
    between = cosine(references, references)
    return (between.sum(1) - between.diagonal()) / (count - 1)


def text_score(cosines: Tensor, weight: float = CLIP_SCORE_WEIGHT) -> Tensor:
    """Returns CLIP-T scaled to [0, 1], as `min(1, weight * max(cos, 0))`. CLIPScore (arXiv 2104.08718) uses a weight of
    2.5.

    weight: the instrument's own factor (`InstrumentInfo.text_weight`), chosen so that matching pairs stay below 1
    """
    return (weight * cosines.double().clamp_min(0)).clamp_max(1)


@dataclass(frozen=True)
class Retrieval:
    """The gallery entry that each output resembles most."""

    nearest: tuple[str, ...]  # N names of gallery entries
    hits: Tensor  # bool [N]: whether that entry is the subject
    margin: Tensor  # float64 [N]: similarity to the subject minus similarity to the nearest other entry
    chance: float  # accuracy of a random guess, which is 1 / number of entries

    @property
    def accuracy(self) -> float:
        return float(self.hits.double().mean()) if len(self.hits) else math.nan


def retrieve(outputs: Tensor, gallery: Mapping[str, Tensor], subject: str) -> Retrieval:
    """Finds the gallery entry nearest to each output (`[N, D]`). An entry consists of several pictures of one thing
    (`[n, D]`), of which only the two that are most similar to the output count (see `similarities`).

    Raises ValueError if the gallery does not contain the subject, or contains only the subject.
    """
    if subject not in gallery or len(gallery) < 2:
        raise ValueError(
            f"the gallery must contain {subject!r} and at least one other entry; it contains "
            f"{', '.join(gallery) or 'nothing'}"
        )
    names = list(gallery)
    similarity = similarities(outputs, [gallery[n] for n in names])
    column = names.index(subject)
    others = similarity.clone()
    others[:, column] = -torch.inf
    margin = similarity[:, column] - others.max(1).values
    # A tie is not a hit, because a gallery entry identical to the subject would also tie.
    nearest = torch.where(margin > 0, torch.full_like(margin, column, dtype=torch.long), others.argmax(1))
    return Retrieval(tuple(names[i] for i in nearest.tolist()), margin > 0, margin, 1 / len(names))


def diversity(embeddings: Tensor, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """Returns 1 − the mean cosine over pairs of outputs, for each group (the outputs of one prompt with several seeds).
    Groups with only one output are left out.
    """
    if len(groups) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings and {len(groups)} groups")
    out: dict[Hashable, float] = {}
    for group in dict.fromkeys(groups):
        members = embeddings[torch.tensor([g == group for g in groups])]
        if (n := len(members)) > 1:
            similarity = cosine(members, members)
            out[group] = 1 - float((similarity.sum() - similarity.diagonal().sum()) / (n * (n - 1)))
    return out


def drift(base: Tensor, loaded: Tensor) -> Tensor:
    """Returns, for each pair of pictures, 1 − the cosine between them (`[N]`). One picture was generated without the
    concept, and the other with the concept loaded. Both have the same seed and the same prompt, which does not name the
    concept.

    A drift of 0 means that loading the concept does not change the results of other prompts. peft's image benchmark
    uses the same measure.
    """
    return (1 - clip_t(base, loaded)).clamp_min(0)  # rounding can put a cosine above 1


def attribute_hits(expected: Sequence[Mapping[str, str]], seen: Mapping[str, Sequence[str]]) -> list[dict[str, bool]]:
    """Returns, for each picture, whether each attribute that its prompt asks for was seen with the expected value.

    Raises ValueError if a prompt asks for an attribute that the reader does not support.
    """
    out = []
    for i, attributes in enumerate(expected):
        for name in attributes:
            if name not in seen:
                raise ValueError(f"unknown attribute {name!r}; the reader supports: {', '.join(sorted(seen))}")
        out.append({name: seen[name][i] == value for name, value in attributes.items()})
    return out


def kid(x: Tensor, y: Tensor, degree: int = 3) -> float:
    """Returns the Kernel Inception Distance between two samples of features of any kind. It is the unbiased estimate of
    MMD² with the kernel `(x·y / D + 1)^degree` (arXiv 1801.01401, eqs. 3–4).

    The shapes are `[N, D]` for x and `[M, D]` for y, with N and M at least 2. Because the estimate is unbiased, it is
    close to 0, and may be negative, for two samples of the same distribution.
    """
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "kid needs two samples with the same number of columns and at least 2 rows each; "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    a, b = x.double(), y.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** degree

    kxx, kyy, kxy = kernel(a, a), kernel(b, b), kernel(a, b)
    n, m = len(a), len(b)
    within = (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(within - 2 * kxy.mean())


def trade_off(*terms: float) -> float:
    """Returns the harmonic mean of competing scores in [0, 1]. It is 0 if any score is 0, for example because the
    pictures copy a reference, ignore the prompt, or show the same pose for every seed.
    """
    values = [min(1.0, max(0.0, v)) for v in terms]
    return len(values) / sum(1 / v for v in values) if values and min(values) > 0 else 0.0


def bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    rounds: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean (Efron 1979), ignoring NaNs. Returns (nan, nan) if no
    values are left.

    If all values are 0 or all are 1, resampling shows no spread. Wilson's interval is then returned, with the number of
    clusters as the number of trials.

    clusters: the cluster of each value. Values in one cluster (all pictures of one prompt and subject) are drawn
        together. If None, each value is its own cluster
    """
    data = np.asarray(values, dtype=np.float64)
    labels = list(range(len(data))) if clusters is None else list(clusters)
    if len(labels) != len(data):
        raise ValueError(f"{len(data)} values and {len(labels)} clusters")
    keep = ~np.isnan(data)
    data, labels = data[keep], [c for c, k in zip(labels, keep, strict=True) if k]
    if len(data) == 0:
        return math.nan, math.nan
    index = {c: i for i, c in enumerate(dict.fromkeys(labels))}
    group = np.array([index[c] for c in labels])
    if np.all(data == data[0]) and data[0] in (0.0, 1.0):
        return wilson(int(data[0]) * len(index), len(index), level)
    sums, counts = np.bincount(group, data), np.bincount(group)
    draws = np.random.default_rng(seed).integers(0, len(index), (rounds, len(index)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(hits: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval (1927) for a rate, or (nan, nan) if there are no trials."""
    if trials == 0:
        return math.nan, math.nan
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    p, zz = hits / trials, z * z / trials
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / trials + zz / (4 * trials))
    low, high = (middle - half) / (1 + zz), (middle + half) / (1 + zz)
    return (0.0 if hits == 0 else low), (1.0 if hits == trials else high)


def similarities(queries: Tensor, gallery: Sequence[Tensor]) -> Tensor:
    """Returns the similarity of each query to each gallery entry, as float64 `[Q, G]`, at most 1.

    A similarity is the mean of the two highest cosines between the query and the entry's pictures. The cosine with the
    mean picture would be less suitable, because a thing looks different from each side. Each entry is truncated to the
    size of the smallest one, because the more pictures an entry has, the higher its highest cosines are by chance.

    Args:
        queries: `[Q, D]`
        gallery: entries `[D]` or `[n, D]`, where n is the number of pictures of one thing

    Raises:
        ValueError: if the gallery is empty
    """
    if not len(gallery):
        raise ValueError("the gallery is empty; pass the embeddings of at least one entry")
    entries = [entry.double().reshape(-1, queries.shape[1]) for entry in gallery]
    count = min(len(entry) for entry in entries)
    pictures = F.normalize(torch.stack([entry[:count] for entry in entries]), dim=2)
    cosines = torch.einsum("qd,gnd->qgn", F.normalize(queries.double(), dim=1), pictures)
    return cosines.topk(min(2, count), dim=2).values.mean(2)
