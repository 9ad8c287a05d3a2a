"""What the trainings share: budget and learning rate, averaged weights, atomic checkpoints, logs, seeded steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.io.outputs import atomic_write

SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True)
class Budget:
    """When a training ends and when its learning rate falls (warm-up, stable, decay: arXiv 2404.06395).

    Either ``steps`` (counted from the run's very beginning) or ``minutes`` (of this session) ends it; the last
    ``decay`` of it, a fraction, brings the rate down linearly to 0. A run that shall go on later has ``decay=0``.
    """

    steps: int | None = None
    minutes: float | None = None
    warmup: int = 200
    decay: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"give either steps or minutes, not both or none: {self.steps=}, {self.minutes=}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is a fraction of the budget in [0, 1], not {self.decay}")

    def progress(self, step: int, seconds: float) -> float:
        """The spent fraction of the budget; 1 or more means that it is over."""
        if self.steps is not None:
            return step / max(self.steps, 1)
        return seconds / (SECONDS_PER_MINUTE * max(self.minutes or 0.0, 1e-9))

    def rate(self, step: int, seconds: float) -> float:
        """The factor on the peak learning rate at a step (0-based)."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        left = max(0.0, 1.0 - self.progress(step, seconds))
        return rise * min(1.0, left / self.decay if self.decay else 1.0)


class Ema:
    """An exponential moving average of a module's floating-point parameters, in fp32.

    The decay warms up as ``(1 + step) / (10 + step)`` and is capped, so early averages are not held back by the start.
    """

    def __init__(self, module: nn.Module, cap: float) -> None:
        self.cap = cap
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards ``module`` after the 0-based ``step``."""
        weight = 1.0 - min(self.cap, (1 + step) / (10 + step))
        current = [p.detach() for _, p in module.named_parameters()]
        torch._foreach_lerp_(list(self.shadow.values()), current, weight)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Takes over a saved average; names must match, their order need not."""
        assert shadow.keys() == self.shadow.keys()
        self.shadow = {name: shadow[name].to(old.device) for name, old in self.shadow.items()}

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into ``module``."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


@dataclass
class Log:
    """One JSON line per record, appended and flushed; ``say`` mirrors it to the terminal."""

    path: Path
    say: bool = True
    started: float = field(default_factory=time.time)

    def write(self, **record: object) -> None:
        """Appends ``record`` with the Unix time ``time`` and the session's ``seconds``."""
        line = json.dumps({**record, "seconds": round(time.time() - self.started, 1), "time": round(time.time())})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            _flush(out, line)
        if self.say:
            print(line, flush=True)


def _flush(out: TextIO, line: str) -> None:
    out.write(line + "\n")
    out.flush()


class Run(Protocol):
    """A training under way."""

    step: int

    def save(self) -> None:
        """Writes its checkpoint."""
        ...


def fit(
    run: Run,
    update: Callable[[float], Mapping[str, float]],
    budget: Budget,
    log: Log,
    log_every: int,
    save_minutes: float,
) -> None:
    """The loop: ``update`` does one step with the learning rate's factor and says what to log; checkpoints by the clock."""
    started = saved = time.time()
    while budget.progress(run.step, time.time() - started) < 1:
        parts = update(budget.rate(run.step, time.time() - started))
        if run.step % log_every == 0:
            log.write(step=run.step, **{k: round(v, 5) for k, v in parts.items()})
        if time.time() - saved > save_minutes * SECONDS_PER_MINUTE:
            run.save()
            saved = time.time()
    run.save()


def save_checkpoint(path: Path, tensors: Mapping[str, Any], facts: Mapping[str, object]) -> None:
    """Writes nested mappings of tensors and numbers as one safetensors file, whole or not at all.

    Args:
        path: the file; a half-written one never takes this name
        tensors: nested ``dict``s with string or integer keys; leaves are tensors or plain numbers
        facts: JSON data kept in the file's header
    """
    flat: dict[str, Tensor] = {}
    for key, leaf in _leaves(tensors, ()):
        # own memory per tensor: safetensors refuses storage that is shared
        flat[json.dumps(key)] = torch.as_tensor(leaf).detach().cpu().contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(flat, str(temporary), metadata={"facts": json.dumps(dict(facts))})


def _leaves(tree: Mapping[Any, Any], prefix: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what ``save_checkpoint`` wrote.

    Returns:
        the nested mapping (leaves are CPU tensors) and the facts
    """
    tree: dict[str, Any] = {}
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads((file.metadata() or {})["facts"])
        for name in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
            *parents, last = json.loads(name)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = file.get_tensor(name)
    return tree, facts


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its tensors."""
    with safe_open(str(path), framework="pt") as file:
        return json.loads((file.metadata() or {})["facts"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's per-parameter state; rates and groups come from the code and the schedule."""
    return optimizer.state_dict()["state"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> None:
    """The inverse of ``optimizer_tensors`` on an optimizer that was built the same way."""
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a CPU generator that depends on seed and step alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77 + 1) % (1 << 63))


def amp(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """bf16 autocast on ``device``, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def pick_device(name: str | None) -> torch.device:
    """``name`` as a device; the GPU if there is one, else the CPU, where it is None.

    ValueError, with the devices that there are, when this machine has none of that name.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} cannot be used here. There are: {', '.join(there)}.") from None
    return device


def set_threads(threads: int | None) -> None:
    """Bounds torch's CPU threads (more threads than cores is ten times slower, not a little)."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices and kernels decay; biases, norms and embeddings do not."""
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    kept = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
