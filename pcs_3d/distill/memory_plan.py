"""Fits a run into a memory budget. Small steps are measured, and the recipe is changed until the run fits."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pcs_3d.cameras import turntable
from pcs_3d.distill.distill import view_side
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.pseudo_views import blank_views
from pcs_3d.distill.pseudo_views_task import PseudoViewsTask
from pcs_3d.distill.reference_cameras_task import ReferenceCamerasTask
from shared.config import merge, validate
from shared.metrics.html import size
from shared.recipe.schema import dump
from shared.train.last_good_state import MOST
from shared.train.measure_memory import in_use, peak_during
from shared.train.training_run import TrainingRun

_SMALL = 128  # side length in pixels; steps on views up to this size are measured at full size
_LEAST = 16  # side length in pixels of the smallest renders
_RAYS = 2048  # largest number of rays rendered at a time if the renderer recomputes activations
_MOMENTS = 2  # number of values that Adam keeps per parameter
#: Settings that a plan may change in a recipe.
_PLANNED = {
    "train": ("batch_size", "gradient_accumulation", "gradient_checkpointing", "resolution"),
    "renderer": ("recompute", "rays"),
}


@dataclass(frozen=True)
class Levers:
    """Settings that save memory.

    views: the number of views per pass through the networks, out of `of` views per step.
    recompute: the activations that are recomputed: 0 for none, 1 for those of the networks, 2 for those of the renderer
    as well.
    side: the side length of a view in pixels. If None, the one that the recipe requests is kept.
    """

    views: int
    of: int
    recompute: int = 0
    side: int | None = None

    def changes(self, phase: DistillRecipe) -> dict[str, Any]:
        """Returns the changes to a phase's recipe."""
        train: dict[str, Any] = {
            "batch_size": self.views,
            "gradient_accumulation": phase.train.gradient_accumulation * (self.of // self.views),
        }
        if self.recompute:
            train["gradient_checkpointing"] = True
        if self.side is not None:
            train["resolution"] = self.side
        out: dict[str, Any] = {"train": train}
        if self.recompute > 1 and "recompute" in type(phase.renderer).model_fields:
            out["renderer"] = {"recompute": True, "rays": min(phase.renderer.rays, _RAYS)}
        return out

    def __str__(self) -> str:
        whole = f"{self.of} views at once" if self.of > 1 else "one view"
        parts = [f"{self.views} of {self.of} views at a time" if self.views < self.of else whole]
        parts += ["activations of networks are recomputed"] if self.recompute == 1 else []
        parts += ["activations of networks and renderer are recomputed"] if self.recompute > 1 else []
        parts += [f"renders of {self.side}×{self.side}"] if self.side is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class MemoryPlan:
    """A recipe that fits into the memory budget.

    budget, estimate: the limit and the estimated use, in bytes.
    how: the levers of each phase.
    """

    recipe: Any
    budget: int
    estimate: int
    how: Mapping[str, Levers]
    of: str  # which memory is counted, "gpu" or "process"

    @property
    def costs(self) -> dict[str, int]:
        """The entries that the plan adds to an asset's costs."""
        return {"memory_budget": self.budget, "estimated_memory": self.estimate}

    def __str__(self) -> str:
        where = "of the GPU" if self.of == "gpu" else "of main memory, for the whole process"
        how = "; ".join(f"{name}: {levers}" if len(self.how) > 1 else str(levers) for name, levers in self.how.items())
        return f"memory: about {size(self.estimate)} of {size(self.budget)} ({where}): {how}"


def plan_memory(run: TrainingRun, recipe: Any, budget: int, sides_fixed: bool = False) -> MemoryPlan:
    """Changes the recipe so that each phase that makes an asset stays within `budget` bytes.

    The estimate is the sum of three parts: the memory already in use (that of the networks or, on a CPU, of the whole
    process); the field with its gradients, optimizer moments and saved copy; and the memory of the views in a step,
    extrapolated from steps at two small sizes. The first change is to pass fewer views through the networks at a time,
    which affects only the order of random draws. The next is to recompute activations. The last, unless `sides_fixed`
    is set, is to make renders smaller.

    Args:
        run: a run of this recipe that has not begun. Planning attaches names and adapters to the backbone; the caller
        must remove them.

    Raises:
        ValueError: no plan fits. The message states the smallest budget that would be enough.
    """
    run._attach_names()
    how: dict[str, Levers] = {}
    estimate = 0
    try:
        for index, (name, phase) in enumerate(run.phases):
            trained = run._unfreeze(phase)
            if not isinstance(phase.task, DistillTask):
                continue
            tries = Tries(run, index, trained)
            how[name], needed = fitting(tries, budget, sides_fixed)
            estimate = max(estimate, needed)
    finally:
        run.offloaded.restore()
    run._freeze()
    data = dump(recipe)
    for name, levers in how.items():
        changes = levers.changes(dict(run.phases)[name])  # type: ignore[arg-type]
        if data["phases"]:
            data["phases"][name] = merge(data["phases"][name] or {}, changes)
        else:
            data = merge(data, changes)
    of = "gpu" if run.backbone.device.type == "cuda" else "process"
    return MemoryPlan(validate(type(recipe), data), budget, estimate, how, of)


def fitting(tries: Tries, budget: int, sides_fixed: bool) -> tuple[Levers, int]:
    """Returns the first settings that fit the budget, and the bytes that they need. If none fit, raises ValueError with
    the smallest budget that would be enough."""
    least: tuple[int, Levers] | None = None
    for levers in tries.ladder(sides_fixed):
        fixed, per_view = tries.costs(levers)
        for views in range(levers.of, 0, -1):
            if levers.of % views or views % tries.together:
                continue
            needed, now = fixed + views * per_view, replace(levers, views=views)
            if needed <= budget:
                return now, needed
            if least is None or needed < least[0]:
                least = needed, now
    assert least is not None
    raise ValueError(
        f"--vram {size(budget)} is not enough: the run needs about {size(least[0])} ({least[1]}); set --vram "
        f"{-(-least[0] // 2**20)}M or more, or choose a smaller model or field (field.resolution)"
    )


class Tries:
    """Runs small steps of one phase and measures the memory that they use."""

    def __init__(self, run: TrainingRun, index: int, trained: Any) -> None:
        self.run, self.index, self.trained = run, index, trained
        recipe = run.phases[index][1]
        assert isinstance(recipe, DistillRecipe)
        self.recipe = recipe
        self.device = run.backbone.device
        self.side = view_side(recipe, run.backbone)
        own = run.backbone.resolution
        self.seen = self.side if recipe.guidance.space == "latents" else recipe.guidance.resolution or own
        rescaled = recipe.guidance.rescale_over if recipe.guidance.rescale else 1
        self.together = math.lcm(recipe.cameras.ring, rescaled)  # number of views that must stay together
        self._warm = False
        self._known: dict[tuple[int, int | None], tuple[int, int]] = {}

    def ladder(self, sides_fixed: bool) -> Iterator[Levers]:
        """Yields settings in increasing order of what they cost in time and quality."""
        views = self.recipe.train.batch_size
        for recompute in range(3):
            yield Levers(views, views, recompute)
        side = self.side // 2
        while not sides_fixed and side >= _LEAST and self.recipe.guidance.space == "pixels":
            yield Levers(views, views, 2, side)
            side //= 2

    def costs(self, levers: Levers) -> tuple[int, int]:
        """Returns the bytes that do not depend on the number of views, and the bytes per view."""
        key = levers.recompute, levers.side
        if key not in self._known:
            large = 1.0 if self.seen <= _SMALL else 0.5
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not self._warm:
                    self._peak(levers, large / 2)  # a warm-up that imports libraries and caches kernels and texts
                    self._warm = True
                state, more = self._peak(levers, large)
                less = self._peak(levers, large / 2)[1]
            gc.collect()
            share = large**2 - (large / 2) ** 2
            together = max(0, round((more - less) / share))
            fixed, per_view = max(0, round(more - together * large**2)), together // self.together
            self._known[key] = in_use(self.device) + state + fixed, per_view
        return self._known[key]

    def _views(self, folder: Path) -> dict[str, Path]:
        """Makes blank stand-ins for the views that earlier phases will write, because penalties compare renders with
        these views. Returns the folder of each such phase."""
        made = [(name, phase.task) for name, phase in self.run.phases[: self.index]]
        views = {name: task.cameras() for name, task in made if isinstance(task, PseudoViewsTask)}
        pictures = sum(len(subject.images) for subject in self.run.subjects.values())
        views |= {name: turntable(pictures) for name, task in made if isinstance(task, ReferenceCamerasTask)}
        return {name: blank_views(cameras, folder / name) for name, cameras in views.items()}

    def _peak(self, levers: Levers, share: float) -> tuple[int, int]:
        """Returns the bytes of the field with its gradients, optimizer moments and saved copy, and the bytes of one
        step. The step has the fewest possible views, and their side length is `share` times the usual one."""
        unit = self.run.backbone.vae_factor * self.run.backbone.latent_multiple  # type: ignore[attr-defined]
        changes = replace(levers, views=self.together, of=self.together).changes(self.recipe)
        side = max(_LEAST // 2, round((levers.side or self.side) * share))
        changes["train"] |= {"resolution": side, "gradient_accumulation": 1}
        if self.recipe.guidance.space == "pixels":
            changes["guidance"] = {"resolution": max(unit, round(self.seen * share / unit) * unit)}
        recipe = validate(type(self.recipe), merge(dump(self.recipe), changes))
        context = replace(self.run.context(self.index, self.trained, resumed_step=1), recipe=recipe)
        with TemporaryDirectory() as folder:
            context = replace(context, phase_folders=self._views(Path(folder)))
            task: Any = self.run.tasks[DistillTask](context)
        self.run.offloaded.keep_only(task.networks_in_steps)  # the same networks as when the phase runs
        parts = [p for groups in task.groups().values() for group in groups for p in group.parameters]
        numbers = sum(p.numel() for p in parts)
        copies = 1 + _MOMENTS + (1 + _MOMENTS if numbers <= MOST else 0)
        peak = peak_during(lambda: step_once(self.run, task), self.device)
        for parameter in parts:
            parameter.grad = None
        return 4 * numbers * copies, peak


def step_once(run: TrainingRun, task: Any) -> None:
    """Performs the last step of a run, and adds the step's gradients to the existing gradients."""
    updates = task.updates(max(0, task.steps - 1), 0)
    while True:
        with run.accelerator.autocast():
            update = next(updates, None)
        if update is None:
            return
        update.loss.backward()


def as_begun(recipe: Any, saved: Mapping[str, Any]) -> Any:
    """Applies the changes that a plan made when an interrupted run began. Memory is not measured again, because a new
    measurement could lead to different changes."""
    data = dump(recipe)

    def copied(mine: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        for section, keys in _PLANNED.items():
            known = {k: theirs[section][k] for k in keys if k in (theirs.get(section) or {})}
            if known:
                mine = merge(mine, {section: known})
        return mine

    data = copied(data, saved)
    for name, overlay in (saved.get("phases") or {}).items():
        if name in data["phases"]:
            data["phases"][name] = copied(data["phases"][name] or {}, overlay or {})
    return validate(type(recipe), data)
