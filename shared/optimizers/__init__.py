"""All optimizers come from libraries. To add an optimizer, write a module and add its class to the union."""

from typing import Annotated

from pydantic import Field

from shared.config import default_kind
from shared.optimizers.adamw import AdamW, AdamW8bit
from shared.optimizers.base import OptimizerPart
from shared.optimizers.lbfgs import Lbfgs
from shared.optimizers.prodigy import Prodigy
from shared.optimizers.schedule_free import ScheduleFree

Optimizer = Annotated[
    AdamW | AdamW8bit | Prodigy | ScheduleFree | Lbfgs, Field(discriminator="kind"), default_kind("adamw")
]

__all__ = ["AdamW", "AdamW8bit", "Lbfgs", "Optimizer", "OptimizerPart", "Prodigy", "ScheduleFree"]
