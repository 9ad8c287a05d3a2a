"""Makes schedulers by name. Their configuration comes from the backbone's own scheduler, as with
`X.from_config(pipe.scheduler.config)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.backbones.protocol import Backbone
from shared.config import unknown

#: For each name, the diffusers class of the scheduler and the settings that override the backbone's configuration.
DIFFUSION: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),  # Song et al., arXiv 2010.02502
    "ddpm": ("DDPMScheduler", {}),  # Ho et al., arXiv 2006.11239
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # Liu et al., arXiv 2202.09778
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al., arXiv 2206.00364, algorithm 2
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al., second order
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al., arXiv 2211.01095
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),  # Zhang & Chen, arXiv 2204.13902
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al., arXiv 2302.04867
}
FLOW: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),  # Esser et al., arXiv 2403.03206
    "flow_euler_sde": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
}


def scheduler_names(backbone: Backbone) -> tuple[str, ...]:
    """Lists the names that `make_scheduler` accepts for this backbone."""
    return tuple(sorted(FLOW if backbone.prediction_type == "flow" else DIFFUSION))


def make_scheduler(backbone: Backbone, name: str | None = None) -> Any:
    """Makes the diffusers scheduler called `name`. If `name` is None, makes a scheduler of the same class as the
    backbone's.

    Raises:
        ValueError: if the name is unknown. The message lists the valid names.
    """
    default = backbone.scheduler
    if name is None:
        return type(default).from_config(default.config)
    choices = FLOW if backbone.prediction_type == "flow" else DIFFUSION
    if name not in choices:
        raise ValueError(f"{backbone.family}: {unknown(name, choices, 'scheduler')}")
    return named_scheduler(name, default.config)


def adds_noise(solver: Any) -> bool:
    """Returns whether a diffusers scheduler adds new noise at each step, as ancestral and stochastic schedulers do."""
    kind, config = type(solver).__name__, solver.config
    stochastic = "Ancestral" in kind or kind in ("DDPMScheduler", "LCMScheduler", "TCDScheduler")
    return stochastic or "sde" in str(config.get("algorithm_type", "")) or bool(config.get("stochastic_sampling"))


def named_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Makes a new diffusers scheduler by name, with `from_config` and another scheduler's configuration."""
    import diffusers

    kind, settings = {**DIFFUSION, **FLOW}[name]
    # UniPC calls this setting `flow_shift`, whereas Euler calls it `shift`.
    if "flow_shift" in config and "shift" not in config:
        settings = {**settings, "shift": config["flow_shift"]}
    return getattr(diffusers, kind).from_config(config, **settings)
