"""How a prediction becomes a loss."""

from shared.objective.denoising import Denoising

Objective = Denoising

__all__ = ["Denoising", "Objective"]
