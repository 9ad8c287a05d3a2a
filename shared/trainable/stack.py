"""What acts on one parameter: its original values, saved changes on top of them, and values that are in training."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_delta_stack"


class Owner(Protocol):
    """An adapter that changes parameters. Sums run in the order of `number`, so that what was off comes back exactly."""

    number: int


class Stack:
    """W = W_0 + sum of strength * delta. It lives on the parameter for as long as anything changes it.

    The parameter object stays; the tensor that it shows is exchanged, so the original bytes come back as they were, and a
    graph that was built on one tensor keeps that one.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.original = parameter.data
        self.parts: dict[Any, tuple[Tensor, float]] = {}  # saved changes that act now: owner -> delta, strength
        self.training: Training | None = None

    def put(self, owner: Owner, delta: Tensor, strength: float) -> None:
        """Let a saved change act with this strength (0: not any more), beside the others that do."""
        self.parts.pop(owner, None)
        if strength:
            self.parts[owner] = (delta, strength)
        self.show()

    def below(self, parts: dict[Any, tuple[Tensor, float]]) -> Tensor:
        """W_0 with these changes, fp32."""
        total = self.original.to(self.parameter.device).float()
        for _, (delta, strength) in sorted(parts.items(), key=lambda part: part[0].number):
            total = total + strength * delta.to(total.device)
        return total

    @torch.no_grad()
    def show(self) -> None:
        """The parameter becomes what the changes and strengths now make of it."""
        training = self.training
        if training is not None:
            training.leave()
            if training.strength == 1 and _same(training.reference, self.parts):
                training.enter()
                return
        parts = dict(self.parts)
        if training is not None and training.strength:
            parts[training.owner] = (training.delta(), training.strength)
        original = self.original.to(self.parameter.device)
        self.parameter.data = self.below(parts).to(original.dtype) if parts else original
        if not self.parts and training is None:
            delattr(self.parameter, _ATTRIBUTE)


class Training:
    """Values of one parameter that are in training: fp32, what the optimizer changes, W_0 + other changes + delta.

    They are the only copy beside the original: delta is their difference, and `settle` keeps them where the sum of the
    original and that difference falls, so that what is saved is what was trained, bit for bit. They are shown at strength
    1 on top of the changes they were trained on; in any other state the parameter shows a sum and has no gradient.
    (`settle` is idempotent in fp32: measured over all exponents that weights have.)
    """

    def __init__(self, stack: Stack, owner: Owner) -> None:
        self.stack, self.owner, self.strength, self.full_precision = stack, owner, 0.0, True
        self.reference = dict(stack.parts)  # equal to the stack's parts while nobody else changes anything
        self.values = stack.below(self.reference).clone()
        self._shown, self._settled = False, -1
        self._wants_grad = stack.parameter.requires_grad

    def delta(self) -> Tensor:
        """fp32, on the parameter's device."""
        self.settle()
        return self.current() - self.stack.below(self.reference)

    def current(self) -> Tensor:
        """The values in training; on the parameter's device."""
        if self._shown and self.stack.parameter.dtype == torch.float32:
            return self.stack.parameter.data  # also when the network was moved meanwhile
        return self.values.to(self.stack.parameter.device)

    @torch.no_grad()
    def settle(self, again: bool = True) -> None:
        """Round to what an fp32 difference from the original can say. Doing it again changes nothing; without `again` it is
        done only when the parameter was written to since."""
        version = self.stack.parameter._version
        if version == self._settled and not again:
            return
        self._settled = version
        values, below = self.current(), self.stack.below(self.reference)
        values.copy_(below + (values - below))
        self.values = values

    @torch.no_grad()
    def load(self, delta: Tensor) -> None:
        """The inverse of `delta`."""
        below = self.stack.below(self.reference)
        values = self.current()
        values.copy_(below + delta.to(below.device))
        self.values = values
        torch.clear_autocast_cache()  # it keeps casts of weights that require a gradient
        self.stack.show()

    def enter(self) -> None:
        """Show the values themselves; rounded to the network's own precision when they are not being trained."""
        self.values, self._shown = self.values.to(self.stack.parameter.device), True
        self._expose()
        self.stack.parameter.requires_grad_(self._wants_grad)

    def train(self, mode: bool) -> None:
        """Full precision while they are trained, under autocast; else the network's own, which needs none."""
        if mode != self.full_precision:
            self.settle()
            self.values, self.full_precision = self.current(), mode
            if self._shown:
                self._expose()

    def _expose(self) -> None:
        self.stack.parameter.data = self.values if self.full_precision else self.values.to(self.stack.original.dtype)

    def leave(self) -> None:
        """Take the values off the parameter, which then learns nothing: a sum of changes is no leaf.

        Nor does autocast, which keeps casts of weights that require a gradient, then use its cast of the values.
        """
        if self._shown:
            self.values = self.current()
            self._shown, self._wants_grad = False, self.stack.parameter.requires_grad
            self.stack.parameter.requires_grad_(False)


def _same(a: dict[Any, tuple[Tensor, float]], b: dict[Any, tuple[Tensor, float]]) -> bool:
    """Whether the same tensors act with the same strengths."""
    return a.keys() == b.keys() and all(
        delta.data_ptr() == b[owner][0].data_ptr() and strength == b[owner][1] for owner, (delta, strength) in a.items()
    )


def stack_of(parameter: nn.Parameter) -> Stack:
    """The parameter's stack; a new one where nothing changes it yet."""
    stack: Stack | None = getattr(parameter, _ATTRIBUTE, None)
    if stack is None:
        stack = Stack(parameter)
        setattr(parameter, _ATTRIBUTE, stack)
    return stack
