"""Optimizers and their schedules; a rate is a pure function of the step, so nothing of it has to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shared.recipe.schema import Optimizer
from shared.trainable import TrainableGroup

_SKIPPED = 20  # steps in a row whose fp16 gradients overflow: halving the scale has not helped, nor will it


class NotFinite(RuntimeError):
    """The loss or the gradient is no number; parameters are those that gave it."""


def schedule(kind: str, step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step` of `steps` (both counted from 0)."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1 - done
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


class Optimizers:
    """One AdamW per group of updates; a parameter group per trainable part, each with its own rate."""

    def __init__(
        self, groups: Mapping[str, Sequence[TrainableGroup]], settings: Optimizer, accelerator: Accelerator
    ) -> None:
        self.settings = settings
        self.woken = groups
        self.raw = {
            name: torch.optim.AdamW(
                [
                    {
                        "params": w.parameters,
                        "lr": w.lr,
                        "weight_decay": settings.weight_decay if w.weight_decay is None else w.weight_decay,
                    }
                    for w in parts
                ],
                betas=settings.betas,
                eps=settings.eps,
            )
            for name, parts in groups.items()
        }
        self.prepared = {name: accelerator.prepare_optimizer(o, device_placement=False) for name, o in self.raw.items()}

        self._scaler: Any = accelerator.scaler
        self.skipped = 0  # fp16: overflowing steps in a row

    def parameters(self, group: str | None = None) -> list[nn.Parameter]:
        """All that is trained, or what one group of updates trains."""
        groups = self.woken.values() if group is None else [self.woken[group]]
        return [p for parts in groups for part in parts for p in part.parameters]

    def states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter with what its optimizer keeps of it: moments and step count, empty before the first step."""
        for optimizer in self.raw.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state[parameter]

    def backward(self, loss: Tensor, group: str, accelerator: Accelerator) -> None:
        """Adds the loss's gradient to the parameters of its own group: another group's are not this loss's business."""
        own = {"inputs": self.parameters(group)} if len(self.woken) > 1 else {}
        accelerator.backward(loss, **own)

    def set_step(self, step: int, steps: int) -> None:
        """Sets the rates of this step; nothing is left of gradients that led to none."""
        self.zero_grad()
        factor = schedule(self.settings.schedule, step, steps, self.settings.warmup)
        for name, parts in self.woken.items():
            for group, part in zip(self.raw[name].param_groups, parts, strict=True):
                group["lr"] = part.lr * factor

    def rates(self) -> dict[str, float]:
        return {
            part.slot: group["lr"]
            for name, parts in self.woken.items()
            for group, part in zip(self.raw[name].param_groups, parts, strict=True)
        }

    def step(self, group: str, accelerator: Accelerator, index: int, before: Callable[[], None] | None = None) -> float:
        """Clip, check, step, clear; the gradient's norm. Raises NotFinite and leaves the parameters as they were.

        `before` is called when all is well and the parameters are about to change. With fp16 the scaler skips a step
        whose gradient overflows, and halves its scale; that is said when it never ends.
        """
        limit = self.settings.max_grad_norm
        accelerator.unscale_gradients(self.prepared[group])  # fp16; of this optimizer alone: phases share parameters
        parameters = self.parameters(group)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf))
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (0 if self._scaler is None else _SKIPPED - 1):
            self.zero_grad()
            many = f", and those of the {self.skipped - 1} steps before" if self.skipped > 1 else ""
            raise NotFinite(f"the gradient of step {index + 1} is not finite{many}")
        if before and not self.skipped:
            before()
        self.prepared[group].step()
        self.prepared[group].zero_grad()
        return norm

    def scaler_state(self) -> dict[str, float]:
        """What the fp16 scaler has found out, as plain numbers; empty without one."""
        return {} if self._scaler is None else {**self._scaler.state_dict(), "skipped": self.skipped}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if self._scaler is not None and state:
            self.skipped = int(state.get("skipped", 0))
            self._scaler.load_state_dict({k: v for k, v in state.items() if k != "skipped"})

    def zero_grad(self) -> None:
        for optimizer in self.raw.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """`group.index.name` -> tensor: AdamW's two moments and its step count, for safetensors."""
        out = {}
        for name, optimizer in self.raw.items():
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    out[f"{name}.{index}.{key}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
        return out

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """ValueError when the tensors do not fit these parameters."""
        for name, optimizer in self.raw.items():
            full = optimizer.state_dict()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in flat.items():
                group, index, field = key.rsplit(".", 2)
                if group == name:
                    state.setdefault(int(index), {})[field] = value
            for index, entry in state.items():
                if index >= len(parameters) or any(
                    v.shape != parameters[index].shape for v in entry.values() if v.ndim
                ):
                    raise ValueError(f"the optimizer state of {name} does not fit this recipe; start anew")
            optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})
