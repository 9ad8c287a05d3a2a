"""Objectives compute the loss of a prediction."""

from shared.objective.denoising import Denoising

Objective = Denoising

__all__ = ["Denoising", "Objective"]
