"""Optimizers and their schedules. A learning rate is a pure function of the step, so no schedule has to be saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.config import unknown
from shared.optimizers import AdamW, OptimizerPart
from shared.train.budget import Budget
from shared.trainable import TrainableGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

_SKIPPED = 20  # number of consecutive fp16 overflows after which halving the scale further will not help


class NotFinite(RuntimeError):
    """Raised when a loss, a gradient or a parameter is NaN or infinite."""


class Optimizers:
    """One optimizer per group, with one parameter group per trainable part, each with its own rate.

    Args:
        groups: the trainable parts of each optimizer, by group name
        settings: the settings of each optimizer, by group name. A group without settings uses AdamW; settings without a
            group are ignored
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[TrainableGroup]],
        settings: Mapping[str, OptimizerPart],
        accelerator: Accelerator,
    ) -> None:
        self.given = dict(settings)
        self._build(groups, accelerator)
        self._scaler: Any = accelerator.scaler
        self.skipped = 0  # with fp16, the number of steps in a row whose gradient overflowed
        self.average(False)

    def _build(self, groups: Mapping[str, Sequence[TrainableGroup]], accelerator: Accelerator) -> None:
        self.groups = {name: list(parts) for name, parts in groups.items()}
        self.settings: dict[str, OptimizerPart] = {name: self.given.get(name, AdamW()) for name in groups}
        self.raw = {
            name: self.settings[name].build(
                [
                    {
                        "params": part.parameters,
                        "lr": part.lr,
                        "weight_decay": self.settings[name].weight_decay
                        if part.weight_decay is None
                        else part.weight_decay,
                    }
                    for part in parts
                ]
            )
            for name, parts in groups.items()
        }
        self.prepared = {name: accelerator.prepare_optimizer(o, device_placement=False) for name, o in self.raw.items()}

    def regroup(
        self,
        groups: Mapping[str, Sequence[TrainableGroup]],
        accelerator: Accelerator,
        came_from: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] | None = None,
    ) -> None:
        """Trains these groups from now on.

        Parameters that are still trained keep their optimizer state. A parameter that replaces another takes over the
        other's state row by row (see `shared.train.task.Regrouped`). All others start without state.
        """
        known = came_from or {}
        progress = self.progress()
        before = {id(parameter): (parameter, dict(state)) for parameter, state in self.states()}
        self.zero_grad()
        self._build(groups, accelerator)
        for optimizer in self.raw.values():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                former, rows = known.get(parameter, (parameter, None))
                state = before.get(id(former), (former, {}))[1]
                if state:
                    kept = state if rows is None else {k: _rows_of(v, former, rows) for k, v in state.items()}
                    optimizer.state[parameter].update(kept)
        self.load_progress(progress)
        self.average(False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the optimizer groups, in order."""
        return tuple(self.groups)

    def parameters(self, names: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Returns all trained parameters, or only those of these groups."""
        chosen = self.names if names is None else names
        return [p for name in chosen for part in self.groups[name] for p in part.parameters]

    def needs_closure(self, group: str) -> bool:
        """Whether this group's optimizer evaluates the loss itself."""
        return self.settings[group].needs_closure

    def states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yields each parameter with its optimizer state (moments and step count; empty before the first step)."""
        for optimizer in self.raw.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state[parameter]

    def backward(self, loss: Tensor, names: Sequence[str] | None, accelerator: Accelerator) -> None:
        """Accumulates the gradient of the loss in the parameters of these groups only (all groups if None)."""
        options = {"inputs": self.parameters(names)} if names is not None and len(self.groups) > len(names) else {}
        accelerator.backward(loss, **options)

    def set_step(self, step: int, budget: Budget) -> None:
        """Sets the learning rates for this step, and clears leftover gradients."""
        self.zero_grad()
        for name, parts in self.groups.items():
            settings = self.settings[name]
            factor = settings.factor(step, budget.spent(step, settings.warmup))
            for group, part in self._rated(name, parts):
                group["lr"] = settings.rate(part.lr, factor)

    def _rated(self, name: str, parts: Sequence[TrainableGroup]) -> Iterator[tuple[dict[str, Any], TrainableGroup]]:
        groups = self.raw[name].param_groups
        return zip(groups, parts if len(groups) == len(parts) else parts[:1], strict=True)

    def rates(self) -> dict[str, float]:
        return {part.slot: group["lr"] for n, parts in self.groups.items() for group, part in self._rated(n, parts)}

    def average(self, on: bool) -> None:
        """Switches the parameters of schedule-free optimizers to their averages, or back if `on` is False.

        The averages are used for pictures, scores and the saved concept. Training continues from the original values.
        """
        for name, optimizer in self.raw.items():
            if self.settings[name].averages:
                switched: Any = optimizer
                switched.eval() if on else switched.train()

    @property
    def averages(self) -> bool:
        """Whether `average` changes anything."""
        return any(self.settings[name].averages for name in self.raw)

    def step(
        self,
        group: str,
        accelerator: Accelerator,
        index: int,
        before: Callable[[], None] | None = None,
        closure: Callable[[], Tensor] | None = None,
    ) -> float:
        """Clips and checks the gradient, takes a step, clears the gradient, and returns its norm.

        Raises NotFinite, leaving the parameters unchanged, when the gradient is not finite. With fp16, however, a step
        whose gradient overflows is skipped and the scaler halves its scale. Only a long series of such steps raises
        NotFinite.

        Args:
            index: the step's number, for the error message
            before: called just before the parameters change, but only if the gradient is finite
            closure: recomputes the loss and its gradients, for optimizers that need this
        """
        limit = self.settings[group].max_grad_norm
        # for fp16; unscales only this group's optimizer, because optimizers of earlier phases may share its parameters
        accelerator.unscale_gradients(self.prepared[group])
        parameters = self.parameters([group])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (0 if self._scaler is None else _SKIPPED - 1):
            self.zero_grad()
            many = f", nor were those of the {self.skipped - 1} steps before" if self.skipped > 1 else ""
            raise NotFinite(f"the gradient at step {index + 1} is not finite{many}")
        if before and not self.skipped:
            before()
        if closure is not None:
            with torch.enable_grad():
                self.raw[group].step(closure)  # type: ignore[arg-type]
        else:
            self.prepared[group].step()
        self.prepared[group].zero_grad()
        return norm

    def check_finite(self, step: int) -> None:
        """Raises NotFinite when the update that ended step `step` left non-finite parameters."""
        sums = [p.detach().sum() for p in self.parameters()]
        if sums and not bool(torch.stack([s.float().cpu() for s in sums]).isfinite().all()):
            for p in self.parameters():
                if not bool(p.detach().isfinite().all()):  # a sum could overflow even if every value is finite
                    raise NotFinite(f"the update at step {step} left parameters that are not finite")

    def scaler_state(self) -> dict[str, float]:
        """Returns the fp16 scaler's state as plain numbers, or an empty dict if there is no scaler."""
        return {} if self._scaler is None else {**self._scaler.state_dict(), "skipped": self.skipped}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if self._scaler is not None and state:
            self.skipped = int(state.get("skipped", 0))
            self._scaler.load_state_dict({k: v for k, v in state.items() if k != "skipped"})

    def zero_grad(self, group: str | None = None) -> None:
        """Clears the gradients of all groups, or of one."""
        for name, optimizer in self.raw.items():
            if group in (None, name):
                optimizer.zero_grad()

    # --- saving and loading --------------------------------------------------------------------------------

    def progress(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the numbers that optimizers store per parameter group, such as an estimated rate or a count."""
        return {
            name: [
                {k: group[k] for k in self.settings[name].progress if k in group} for group in optimizer.param_groups
            ]
            for name, optimizer in self.raw.items()
        }

    def load_progress(self, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Restores what `progress` returned."""
        for name, groups in state.items():
            for group, kept in zip(self.raw[name].param_groups if name in self.raw else (), groups, strict=False):
                group.update(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns moments and step counts as tensors, with keys of the form `group.index.name`.

        A suffix on the key marks values that were not tensors, such as lists.
        """
        out: dict[str, Tensor] = {}
        for name, optimizer in self.raw.items():
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    out.update(_flat(f"{name}.{index}.{key}", value))
        return out

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned. Raises ValueError when the tensors do not match these parameters."""
        for name in {key.split(".", 1)[0] for key in flat} - self.raw.keys():
            raise ValueError(
                f"the saved optimizer state does not match this recipe: {unknown(name, self.raw, 'group')} Start over."
            )
        for name, optimizer in self.raw.items():
            full = optimizer.state_dict()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            for key, value in flat.items():
                group, index, place = key.split(".", 2)
                if group == name:
                    _put(state.setdefault(int(index), {}), place, value)
            for index, entry in state.items():
                if index >= len(parameters) or any(
                    v.shape != parameters[index].shape
                    for k, v in entry.items()
                    if isinstance(v, Tensor) and k in ("exp_avg", "exp_avg_sq", "z")
                ):
                    raise ValueError(f"the saved optimizer state of {name} does not match this recipe; start over")
            optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def _rows_of(value: Any, former: Tensor, rows: Tensor) -> Any:
    """Rearranges optimizer state for a parameter that replaces `former`.

    For each new row, `rows` contains the index of the former row that the new one continues, or -1 if its
    state starts at 0.
    """
    if not isinstance(value, Tensor) or value.shape != former.shape:  # for example a step count
        return value
    at = rows.to(value.device)
    return value[at.clamp_min(0)] * (at >= 0).view(-1, *[1] * (value.ndim - 1)).to(value.dtype)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields one value of an optimizer's state as tensors. If it is not a tensor, the key records its type."""
    if isinstance(value, Tensor):
        yield key, value.detach().cpu().clone().contiguous()
    elif isinstance(value, list):
        yield f"{key}/list", torch.tensor(len(value))
        for i, item in enumerate(value):
            yield from _flat(f"{key}/{i}", item)
    else:
        plain = json.dumps(value).encode()
        yield f"{key}/json", torch.frombuffer(bytearray(plain), dtype=torch.uint8).clone()


def _put(state: dict[str, Any], place: str, value: Tensor) -> None:
    """Puts a value from `_flat` back into one parameter's state. The items of a list may arrive in any order."""
    key, _, rest = place.partition("/")
    if not rest:
        state[key] = value
    elif rest == "json":
        state[key] = json.loads(bytes(value.tolist()))
    else:
        items = state.setdefault(key, [])
        if rest == "list":
            items += [None] * (int(value) - len(items))
            return
        number, _, kind = rest.partition("/")
        items += [None] * (int(number) + 1 - len(items))
        items[int(number)] = json.loads(bytes(value.tolist())) if kind == "json" else value
