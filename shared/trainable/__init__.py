"""Parts that add or unfreeze parameters and train them.

To add a part, write a module and add its class to the union `Trainable`.
"""

from typing import Annotated

from pydantic import Field

from shared.trainable.base import TrainableGroup
from shared.trainable.bottleneck import Bottleneck
from shared.trainable.lora import Lora
from shared.trainable.peft import Peft
from shared.trainable.tokens import Tokens
from shared.trainable.weights import Weights

Trainable = Annotated[Bottleneck | Lora | Peft | Tokens | Weights, Field(discriminator="kind")]

__all__ = ["Bottleneck", "Lora", "Peft", "Tokens", "Trainable", "TrainableGroup", "Weights"]
