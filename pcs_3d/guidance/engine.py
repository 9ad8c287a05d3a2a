"""The engine that all guidance methods share. It computes grad = w(t) (sum_i a_i eps_i - target)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pcs_3d.guidance.noisers import Noised
from pcs_3d.guidance.perp_neg import PerpNeg, perpendicular
from pcs_3d.guidance.scores import Ask, Scores, coefficients, spread
from pcs_3d.guidance.settings import Guidance, Term
from pcs_3d.schedules import Moment
from pcs_3d.view_prompts import ScenePrompts, Views

_AWAY = (Ask("away_near"), Ask("away_far"))
#: A noise level ("t" or "s"), and the kind of prediction made there.
Place = tuple[str, Ask]
_PROMPT: Place = ("t", Ask("prompt"))


@dataclass(frozen=True)
class Guided:
    """The gradient with respect to the latents of B views, and the values from which it was computed.

    grad: [B, C, h, w].
    eps: the guided prediction at (z_t, t).
    x0: the clean latents that eps implies.
    """

    grad: Tensor
    noised: Noised
    eps: Tensor
    x0: Tensor


@torch.no_grad()
def guide(
    settings: Guidance,
    scores: Scores,
    z: Tensor,
    views: Views,
    prompts: ScenePrompts,
    moment: Moment,
    generator: Generator,
) -> Guided:
    """Computes the gradient of one step with respect to the clean latents of B views (`z`, `[B, C, h, w]`).

    Raises:
        ValueError: a schedule's value is out of range, or the number of views is not a multiple of `rescale_over`
            or `joint_views`
    """
    noised = settings.noiser(z, settings.times, scores, views, moment, generator)
    weights = _weights(settings, noised, moment, z)
    known = _predictions(settings, scores, noised, views, weights)
    eps = sum((weight * known[_place(settings.terms[n])] for n, weight in weights.items()), torch.zeros_like(z))
    if settings.perp_neg is not None:
        # Perp-Neg's s is the total coefficient of the prompt. It depends on the terms and can differ from the guidance
        # scale.
        share = sum(weight for n, weight in weights.items() if _place(settings.terms[n]) == _PROMPT)
        eps = eps + share * _away(settings.perp_neg, known, prompts, views, z)
    alpha, sigma = coefficients(scores, noised.t, z)
    if settings.rescale:
        plain = known[_PROMPT]
        x0 = (noised.z_t - sigma * eps) / alpha
        x0 = rescaled(x0, (noised.z_t - sigma * plain) / alpha, settings.rescale, settings.rescale_over)
        eps = (noised.z_t - alpha * x0) / sigma
    difference = eps - noised.target if settings.target == "noise" else eps
    grad = moment.of(settings.weight) * time_weight(settings, scores, noised.t, z) * difference
    if settings.clip is not None:
        limit = moment.of(settings.clip)
        grad = grad.clamp(-limit, limit)
    if settings.normalize == "mean":
        grad = grad / z[0].numel()
    return Guided(grad, noised, eps, (noised.z_t - sigma * eps) / alpha)


def surrogate(z: Tensor, grad: Tensor) -> Tensor:
    """Returns ½ |z - sg(z - grad)|² / B, a scalar whose gradient with respect to `z` (`[B, C, h, w]`) is grad / B. The
    gradient flows back through the computation of `z`, but not through the networks that `grad` was computed with."""
    return 0.5 * (z - (z - grad).detach()).square().sum() / len(z)


def time_weight(settings: Guidance, scores: Scores, t: Tensor, like: Tensor) -> Tensor:
    """Returns w(t) as `[B, 1, 1, 1]` (see `Guidance`)."""
    alpha, sigma = coefficients(scores, t, like)
    match settings.weighting:
        case "sds":
            return sigma**2
        case "fantasia3d":
            return alpha * sigma**2
        case "noise_to_signal":
            return sigma / alpha
        case _:
            return torch.ones_like(sigma)


def rescaled(x0: Tensor, plain: Tensor, share: float, together: int) -> Tensor:
    """Rescales `x0` (`[B, C, h, w]`) so that its standard deviation moves towards that of the unguided `plain`, by a
    fraction `share` of the difference. The standard deviations are computed over each group of `together` consecutive
    views. Raises ValueError unless B is a multiple of `together`."""
    if len(x0) % together:
        raise ValueError(
            f"guidance.rescale_over = {together}: the number of views in a step ({len(x0)}) must be a multiple of "
            "this value"
        )
    groups = (-1, together, *x0.shape[1:])
    factor = plain.reshape(groups).flatten(1).std(1) / x0.reshape(groups).flatten(1).std(1)
    factor = spread(factor.repeat_interleave(together), x0)
    return share * x0 * factor + (1 - share) * x0


def _weights(settings: Guidance, noised: Noised, moment: Moment, like: Tensor) -> dict[str, Tensor]:
    """Returns the coefficient of each term, `[B, 1, 1, 1]`. Unless another setting needs them, terms whose
    coefficient is 0 for every view are left out, so that no prediction is made for them."""
    scale, share = moment.of(settings.scale), noised.t.double() / 1000
    out = {}
    for name, term in settings.terms.items():
        weight = moment.of(term.plain) + moment.of(term.scaled) * scale
        inside = (share >= term.from_t) & (share < term.until_t)
        needed = bool(settings.rescale and _place(term) == _PROMPT)
        if (weight != 0 and bool(inside.any())) or needed or settings.perp_neg is not None:
            out[name] = spread(weight * inside.double(), like)
    return out


def _place(term: Term) -> Place:
    return term.at, term.ask


def _predictions(
    settings: Guidance, scores: Scores, noised: Noised, views: Views, weights: dict[str, Tensor]
) -> dict[Place, Tensor]:
    """Makes each needed prediction exactly once."""
    known: dict[Place, Tensor] = {}
    for point in ("t", "s"):
        asks = [term.ask for name, term in settings.terms.items() if name in weights and term.at == point]
        asks = list(dict.fromkeys([*asks, *(_AWAY if settings.perp_neg is not None and point == "t" else ())]))
        if asks:
            z_t, t = noised.at(point)
            answers = scores.eps(asks, z_t, t, views)
            known.update({(point, ask): eps for ask, eps in zip(asks, answers, strict=True)})
    return known


def _away(part: PerpNeg, known: dict[Place, Tensor], prompts: ScenePrompts, views: Views, like: Tensor) -> Tensor:
    """Returns the sum over Perp-Neg's negatives, sum_i w_i perp(e_i, e_pos)."""
    nothing = known["t", Ask("null")]
    positive = known[_PROMPT] - nothing
    weights = part.weights(prompts, views.cameras)
    parts = (
        spread(weights[:, i], like) * perpendicular(known["t", ask] - nothing, positive) for i, ask in enumerate(_AWAY)
    )
    return sum(parts, torch.zeros_like(like))
