"""The forward process and prediction parametrisations, as pure functions of (alpha, sigma).

The forward process is `x_t = alpha * x_0 + sigma * noise`. Variance-preserving models (epsilon, v, sample) have
alpha^2 + sigma^2 = 1, and flow-matching models have alpha = 1 - sigma. The networks predict p:

    epsilon   Ho et al., DDPM, arXiv 2006.11239, eq. 14:         p = noise
    v         Salimans & Ho, arXiv 2202.00512, appendix D:       p = alpha * noise - sigma * x_0
    sample    p = x_0
    flow      Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206:  p = noise - x_0
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def times(t: Tensor | float, batch: int | None = None, device: torch.device | None = None) -> Tensor:
    """Converts `t` to a tensor of training times. If `batch` is given, expands the tensor to one time per example ([B]).
    Integers stay integers.

    Args:
        t: a scalar or [B]. Without `batch`, [B, f] is also accepted, with one time per frame of a clip
        batch: B, if known

    Raises:
        ValueError: when `t` has any other shape, which would silently broadcast against the examples
    """
    t = torch.as_tensor(t, device=device)
    if batch is None and t.ndim <= 2:
        return t
    if t.ndim > 1 or (t.ndim == 1 and batch not in (None, len(t))):
        size = "B" if batch is None else batch
        raise ValueError(
            f"t has shape {list(t.shape)}, but must be a scalar or [{size}], with one time per example of the batch"
        )
    return t if batch is None else t.expand(batch)


def frame_times(t: Tensor | float, latents: Tensor) -> Tensor:
    """Returns the training times of `latents`: [B], or [B, f] if `t` has one time per frame of the clips ([B, C, f, h, w]).

    Like `times`, raises ValueError when `t` has any other shape.
    """
    t = torch.as_tensor(t, device=latents.device)
    if t.ndim != 2 or latents.ndim != 5:
        return times(t, len(latents), latents.device)
    frames = (len(latents), latents.shape[2])
    if t.shape != frames:
        raise ValueError(
            f"t has shape {list(t.shape)}, but must be a scalar, [{frames[0]}], or {list(frames)} with one time per frame"
        )
    return t


def per_row(t: Tensor) -> Tensor:
    """Returns one time per example ([B]). If `t` has one time per frame ([B, f]), each clip gets the time of its
    noisiest frame."""
    return t.amax(1) if t.ndim == 2 else t


class ForwardProcess:
    """The diffusion part of a backbone. Each family sets `prediction_type` and implements `alpha_sigma`."""

    prediction_type: str  # one of PREDICTIONS

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma of x_t = alpha * x_0 + sigma * noise, each with the shape of `t`. Raises ValueError unless
        `t` is a scalar, [B] or [B, f]."""
        raise NotImplementedError

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma, shaped [B, 1, 1, 1…] or [B, 1, f, 1, 1] to broadcast against `like`. They are on the
        device of `like` and have at least float32 precision."""
        t = frame_times(t, like)
        alpha, sigma = self.alpha_sigma(t)
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = (len(t), 1, -1, 1, 1) if t.ndim == 2 else (-1, *([1] * (like.ndim - 1)))
        return alpha.to(wide).reshape(shape), sigma.to(wide).reshape(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t ([B, C, (f), h, w]) at training times `t`. These are a scalar or [B]; for clips, [B, f] is also
        accepted."""
        alpha, sigma = self._coefficients(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the network's training target. It has the shape of `x0` and `noise`, [B, C, (f), h, w]; `t` is as in
        `add_noise`."""
        alpha, sigma = self._coefficients(t, x0)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "flow":
            return noise - x0
        return (alpha * noise - sigma * x0).to(x0.dtype)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the clean latents implied by a prediction at x_t. All three are [B, C, (f), h, w]; `t` is as in
        `add_noise`."""
        alpha, sigma = self._coefficients(t, x_t)
        if self.prediction_type == "sample":
            out = prediction
        elif self.prediction_type == "epsilon":
            out = (x_t - sigma * prediction) / alpha
        elif self.prediction_type == "v_prediction":
            out = alpha * x_t - sigma * prediction
        else:
            out = x_t - sigma * prediction
        return out.to(x_t.dtype)

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the noise implied by a prediction at x_t. All three are [B, C, (f), h, w]; `t` is as in `add_noise`."""
        alpha, sigma = self._coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            out = prediction
        elif self.prediction_type == "sample":
            out = (x_t - alpha * prediction) / sigma
        elif self.prediction_type == "v_prediction":
            out = sigma * x_t + alpha * prediction
        else:
            out = x_t + alpha * prediction
        return out.to(x_t.dtype)


class FlowMatching(ForwardProcess):
    """A forward process along straight lines from clean latents to noise, with sigma = t / 1000 and alpha = 1 - sigma (Liu et
    al., arXiv 2209.03003)."""

    prediction_type = "flow"
    discrete_time = False

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma of x_t = alpha * x_0 + sigma * noise for `t` (a scalar, [B] or [B, f]) in [0, 1000]."""
        t = times(t)
        sigma = (t if t.is_floating_point() else t.float()) / 1000
        return 1 - sigma, sigma
