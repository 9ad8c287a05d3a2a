"""The base class of tasks that train networks on data. A task defines the networks, their moving averages and
optimizers, and the contents of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.io.failures import of_the_machine
from shared.optimizers import OptimizerPart
from shared.train.averages import Averages
from shared.train.task import Updates
from shared.trainable import TrainableGroup

_AVERAGE = "average"


@dataclass(frozen=True)
class Compute:
    """The device of a training run, and whether the run uses bf16 and compiles blocks of the network."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    compiled: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns a bf16 autocast context, or one that does nothing if `bf16` is not set. Every thread must enter its
        own context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class PretrainTask:
    """A task that trains networks on data. It is like a `shared.train.task.Task`, but has no fixed number of steps.

    A subclass builds its networks in its constructor and yields losses from `updates`. All randomness in a step must
    come from `shared.train.loop.generator(seed, step)`. The function `shared.pretrain.run_task.run_task` runs the task.
    """

    batch_size: int  # pictures per step
    seed: int
    compute: Compute
    modules: Mapping[str, nn.Module]  # the modules saved in checkpoints, by name
    optimizers: Mapping[str, OptimizerPart]  # the settings of each optimizer group
    averages: Averages | None = None  # moving averages of parameters, updated after each step
    #: Settings that must not change when a run is resumed. They are saved as JSON with every checkpoint.
    facts: Mapping[str, Any] = {}
    #: Names of modules that are used only in training. A checkpoint made from the shipped weights lacks these modules.
    helpers: ClassVar[frozenset[str]] = frozenset()

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Maps each optimizer group to the parameters that it trains."""
        raise NotImplementedError

    def updates(self, step: int, micro: int) -> Updates:
        """Yields the losses of one step, in order; see `shared.train.task.UpdateSource`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all tensors on the CPU, named `<module>/<tensor>` and `average/<parameter>`."""
        networks = {name: module.state_dict() for name, module in self.modules.items()}
        return state_of(networks, self.averages.state_dict() if self.averages else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a state. Raises ValueError if tensors are missing or unknown, or have the wrong shape."""
        left = dict(state)
        for name, module in self.modules.items():
            own = _take(left, name)
            if not own and name in self.helpers:
                continue
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                if of_the_machine(error):
                    raise
                raise ValueError(f"saved tensors do not match {name}: {str(error).splitlines()[-1].strip()}") from None
        if self.averages is not None:
            self.averages.load_state_dict(_take(left, _AVERAGE))
        if left:
            raise ValueError(f"{len(left)} saved tensors match nothing in this task, for example {sorted(left)[0]!r}")

    def after_step(self, step: int, pictures: int) -> None:
        """Called after each step with the total number of steps done and the total number of pictures seen."""

    def result(self) -> Mapping[str, float]:
        """Writes the trained networks and returns measurements for the log. Called whenever the run ends or pauses."""
        return {}


def state_of(networks: Mapping[str, Mapping[str, Tensor]], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, named `<network>/<tensor>` and `average/<parameter>`. Each tensor owns its
    memory, as safetensors requires."""
    return {
        f"{name}/{key}": tensor.detach().cpu().clone().contiguous()
        for name, state in {**networks, _AVERAGE: average}.items()
        for key, tensor in state.items()
    }


def average_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the averages stored in a checkpoint. The keys are the names of the parameters."""
    return _take(dict(state), _AVERAGE)


def decay_groups(module: nn.Module, lr: float, weight_decay: float) -> list[TrainableGroup]:
    """Groups the trainable parameters by weight decay. Biases, norms and embeddings get no weight decay."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    return [
        TrainableGroup("weights", decayed, lr, weight_decay),
        TrainableGroup("biases_norms_embeddings", others, lr, 0.0),
    ]


def _take(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k[len(name) + 1 :]: state.pop(k) for k in sorted(state) if k.startswith(f"{name}/")}
