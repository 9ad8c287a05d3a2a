"""The device that a run computes on."""

from __future__ import annotations

import torch

from shared.io.failures import of_the_machine


def pick_device(name: str | None) -> torch.device:
    """Returns the device called `name`. If `name` is None, returns the GPU if there is one, and the CPU otherwise.

    Raises:
        ValueError: if this machine has no such device. The message lists the available devices
    """
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if of_the_machine(error):
            raise
        why = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name!r} cannot be used here ({why}). Available: {', '.join(available)}.") from None
    return device
