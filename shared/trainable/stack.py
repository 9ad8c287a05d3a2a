"""Manages the values of one parameter.

They are the sum of the original values, saved changes, and a change that is being trained.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_delta_stack"


class Owner(Protocol):
    """An adapter that changes parameters.

    Changes are summed in order of `number`, so that switching an adapter off and on again restores the weights exactly.
    """

    number: int


class Stack:
    """The changes to one parameter, W = W_0 + sum of strength * delta.

    The stack stays attached to the parameter as long as there are any changes.

    The parameter object is kept, and only its tensor is swapped. The original bytes can therefore be restored exactly,
    and an autograd graph keeps the tensor that it was built on.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.original = parameter.data
        self.parts: dict[Any, tuple[Tensor, float]] = {}  # delta and strength of the active saved changes, by owner
        self.training: Training | None = None

    def put(self, owner: Owner, delta: Tensor, strength: float) -> None:
        """Applies a saved change at this strength, in addition to other changes. Strength 0 removes the change."""
        self.parts.pop(owner, None)
        if strength:
            self.parts[owner] = (delta, strength)
        self.show()

    def below(self, parts: dict[Any, tuple[Tensor, float]]) -> Tensor:
        """Returns W_0 plus these changes, in fp32."""
        total = self.original.to(self.parameter.device).float()
        for _, (delta, strength) in sorted(parts.items(), key=lambda part: part[0].number):
            total = total + strength * delta.to(total.device)
        return total

    @torch.no_grad()
    def show(self) -> None:
        """Updates the parameter to reflect the current changes and strengths."""
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
    """The fp32 values (W_0 + other changes + delta) of one parameter being trained. The optimizer updates them.

    Delta is not stored. It is computed by subtracting W_0 and the other changes from the values. `settle` rounds the
    values so that adding delta back reproduces them bit for bit, which makes the saved change exact. (`settle` is
    idempotent in fp32; this was checked for every exponent that occurs in weights.)

    The parameter has these values only while the strength is 1 and the other changes are the same as during training.
    Otherwise, the parameter is set to a computed sum and has no gradient.
    """

    def __init__(self, stack: Stack, owner: Owner) -> None:
        self.stack, self.owner, self.strength, self.full_precision = stack, owner, 0.0, True
        # the other changes during training; they equal the stack's parts until another adapter is changed
        self.reference = dict(stack.parts)
        self.values = stack.below(self.reference).clone()
        self._shown, self._settled = False, -1
        self._wants_grad = stack.parameter.requires_grad

    def delta(self) -> Tensor:
        """Returns the change that is being trained, in fp32, on the parameter's device."""
        self.settle()
        return self.current() - self.stack.below(self.reference)

    def current(self) -> Tensor:
        """Returns the values that are being trained, on the parameter's device."""
        if self._shown and self.stack.parameter.dtype == torch.float32:
            return self.stack.parameter.data  # valid even if the network has been moved in the meantime
        return self.values.to(self.stack.parameter.device)

    @torch.no_grad()
    def settle(self, again: bool = True) -> None:
        """Rounds the values so that their fp32 difference from W_0 + other changes represents them exactly.

        Repeating this changes nothing. If `again` is False, does nothing unless the parameter has been written to since
        the last call.
        """
        version = self.stack.parameter._version
        if version == self._settled and not again:
            return
        self._settled = version
        values, below = self.current(), self.stack.below(self.reference)
        values.copy_(below + (values - below))
        self.values = values

    @torch.no_grad()
    def load(self, delta: Tensor) -> None:
        """Sets the values that are being trained to W_0 + other changes + `delta`."""
        below = self.stack.below(self.reference)
        values = self.current()
        values.copy_(below + delta.to(below.device))
        self.values = values
        torch.clear_autocast_cache()  # autocast caches casts of weights that require a gradient
        self.stack.show()

    def enter(self) -> None:
        """Puts the values into the parameter: in fp32 in training mode, otherwise in the network's own precision."""
        self.values, self._shown = self.values.to(self.stack.parameter.device), True
        self._expose()
        self.stack.parameter.requires_grad_(self._wants_grad)

    def train(self, mode: bool) -> None:
        """Switches the parameter to fp32 for training (under autocast) and to the network's own precision otherwise."""
        if mode != self.full_precision:
            self.settle()
            self.values, self.full_precision = self.current(), mode
            if self._shown:
                self._expose()

    def _expose(self) -> None:
        self.stack.parameter.data = self.values if self.full_precision else self.values.to(self.stack.original.dtype)

    def leave(self) -> None:
        """Takes the values out of the parameter, which is then set to a computed sum, and turns off its gradient.

        With the gradient off, autocast does not use its cached cast of the values.
        """
        if self._shown:
            self.values = self.current()
            self._shown, self._wants_grad = False, self.stack.parameter.requires_grad
            self.stack.parameter.requires_grad_(False)


def _same(a: dict[Any, tuple[Tensor, float]], b: dict[Any, tuple[Tensor, float]]) -> bool:
    """Returns whether both mappings contain the same tensors at the same strengths."""
    return a.keys() == b.keys() and all(
        delta.data_ptr() == b[owner][0].data_ptr() and strength == b[owner][1] for owner, (delta, strength) in a.items()
    )


def stack_of(parameter: nn.Parameter) -> Stack:
    """Returns the parameter's stack, or a new one if it has none."""
    stack: Stack | None = getattr(parameter, _ATTRIBUTE, None)
    if stack is None:
        stack = Stack(parameter)
        setattr(parameter, _ATTRIBUTE, stack)
    return stack
