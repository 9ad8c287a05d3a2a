"""Makes the sampling hooks of loaded motions. The hooks make clips follow a path or start from another clip's noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from pcs_video.motion.follow_trajectory import FollowTrajectory
from shared.concept import Concept
from shared.io.clips.open_frames import open_frames
from shared.runner.loaded_concepts import Loaded, Painter
from shared.runner.training_clips import motion_clips
from shared.sampling.hooks import SamplingHook, StrengthSchedule
from shared.sampling.inversion import NoisePrior
from shared.sampling.settings import SamplingSettings

HookOfMotion = FollowTrajectory | NoisePrior

MOTION_MODULES = "motion_modules"  # occurs in the names of AnimateDiff's layers for motion


def is_of_motion(hook: SamplingHook) -> TypeGuard[HookOfMotion]:
    """Whether a hook belongs to a motion, and therefore takes effect only if the prompt names that motion."""
    return isinstance(hook, FollowTrajectory) or (isinstance(hook, NoisePrior) and bool(hook.name))


def is_trajectory(concept: Concept) -> bool:
    """Whether a concept consists only of a trajectory."""
    path = concept.meta.learned_with.sampling.trajectory
    return path is not None and bool(path.points) and not any(concept.tensors.values())


def follows(hooks: Sequence[SamplingHook]) -> bool:
    """Whether a clip with these hooks follows a trajectory."""
    return any(isinstance(hook, FollowTrajectory) and hook.trajectory.points for hook in hooks)


def hooks_of_motions(painter: Painter, settings: SamplingSettings) -> list[HookOfMotion]:
    """Returns the hooks that loaded motions add to the settings. A trajectory is scaled by the motion's strength. A
    noise prior uses the motion's first training clip. Hooks that the settings already have for a concept take
    precedence.

    Warns if the first training clip is not found or is too short. Raises ValueError if there is a strength schedule for
    a concept that consists only of a trajectory.
    """
    stepwise = {name for hook in settings.hooks if isinstance(hook, StrengthSchedule) for name in hook.strengths}
    for name, loaded in painter.loaded.items():
        if name in stepwise and is_trajectory(loaded.concept):
            raise ValueError(
                f"{name!r} is a trajectory, which has one strength for all steps; give PATH:STRENGTH instead"
            )
    return [*_trajectories(painter, settings), *_noise_priors(painter, settings)]


def _trajectories(painter: Painter, settings: SamplingSettings) -> list[FollowTrajectory]:
    said = {hook.name for hook in settings.hooks if isinstance(hook, FollowTrajectory)}
    own = []
    for name, loaded in painter.loaded.items():
        path = loaded.concept.meta.learned_with.sampling.trajectory
        strength = _strength(painter, name)
        if path is not None and path.points and strength and name not in said:
            own.append(FollowTrajectory(name=name, trajectory=path.scaled(strength)))
    return own


def _noise_priors(painter: Painter, settings: SamplingSettings) -> list[NoisePrior]:
    said = {hook.name for hook in settings.hooks if isinstance(hook, NoisePrior)}
    frames = painter.backbone.frames if settings.frames is None else settings.frames
    own = []
    for name, loaded in painter.loaded.items():
        how = loaded.concept.meta.learned_with.sampling.noise_prior
        if how is None or not how.share or not _strength(painter, name) or not frames or said & {name, ""}:
            continue
        clip, why = _first_clip(loaded, frames)
        if clip is not None:
            own.append(NoisePrior(path=clip, name=name, **how.model_dump()))
            continue
        warnings.warn(
            f"clips whose prompts name <{name}> should start from the noise of the first clip it was learned from, but "
            f"{why}. They will start from random noise unless you give --invert CLIP.",
            stacklevel=3,
        )
    return own


def _strength(painter: Painter, name: str) -> float:
    return painter.backbone.strengths.get(name, painter.loaded[name].reach)


def _first_clip(loaded: Loaded, frames: int) -> tuple[Path | None, str]:
    """Returns the first clip that a motion was learned from. If it cannot be used for this frame count, returns None
    and the reason."""
    try:
        clip = motion_clips(loaded, None)[0]
    except ValueError:
        return None, "that clip was not found next to the concept"
    there = open_frames(clip).count
    return (clip, "") if there >= frames else (None, f"{clip.name} has only {there} of the {frames} frames needed")


def hooks_for_prompt(
    painter: Painter, prompt: str, hooks: Sequence[HookOfMotion], base: bool
) -> tuple[HookOfMotion, ...]:
    """Returns the hooks for one prompt. If the prompt does not name a loaded motion, or if `base` is set, that motion's
    hooks have no effect.

    Raises ValueError if the prompt names several motions with trajectories or several with noise priors, or if the trajectory
    of one motion skips the layers that another motion uses.
    """
    named = set() if base else {name for name in painter.loaded if f"<{name}>" in prompt}
    own = tuple(hook.resting() if hook.name in painter.loaded.keys() - named else hook for hook in hooks)
    followed = [hook for hook in own if isinstance(hook, FollowTrajectory) and hook.trajectory.points]
    started = [hook for hook in own if isinstance(hook, NoisePrior) and hook.share]
    for some, only in ((followed, "follow only one trajectory"), (started, "start from the noise of only one")):
        if len(some) > 1:
            said = " and ".join(f"<{hook.name}>" for hook in some)
            raise ValueError(f"{prompt!r} names {said}, but a clip can {only}")
    others = sorted(named - {hook.name for hook in followed})
    idle = [f"<{name}>" for name in others if _moves(painter.loaded[name].concept)]
    if idle and painter.backbone.frames_apart and any(hook.trajectory.layers == "image" for hook in followed):
        raise ValueError(
            f"{prompt!r} names {' and '.join(idle)}, but <{followed[0].name}> skips the motion layers; learn "
            f"<{followed[0].name}> with sampling.trajectory.layers=all"
        )
    return own


def _moves(concept: Concept) -> bool:
    """Whether a concept is a motion that changes motion modules."""
    return concept.meta.kind == "motion" and any(
        MOTION_MODULES in key for tensors in concept.tensors.values() for key in tensors
    )
