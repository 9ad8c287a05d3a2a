"""Optimizers and their schedules; a rate is a pure function of the step, so nothing of it has to be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from shared.recipe import Optimizer
from shared.trainable import Woken


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

    def __init__(self, groups: Mapping[str, Sequence[Woken]], settings: Optimizer, accelerator: Accelerator) -> None:
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

    def set_step(self, step: int, steps: int) -> None:
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

    def step(self, group: str, accelerator: Accelerator, index: int) -> float:
        """Clip, check, step, clear; the gradient's norm. Raises NotFinite and leaves the parameters as they were."""
        from shared.train.loop import NotFinite

        parameters = [p for part in self.woken[group] for p in part.parameters]
        limit = self.settings.max_grad_norm
        accelerator.unscale_gradients(self.prepared[group])  # fp16; of this optimizer alone: phases share parameters
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf))
        scaled = accelerator.scaler is not None  # fp16: the scaler itself skips steps that overflow
        if not math.isfinite(norm) and not scaled:
            self.zero_grad()
            raise NotFinite(f"the gradient of step {index + 1} is not finite")
        self.prepared[group].step()
        self.prepared[group].zero_grad()
        return norm

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
