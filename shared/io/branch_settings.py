"""Settings of the branches that are added to a network's layers, as files store them.

Importing this module loads no model library.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.config import Part

#: How value embeddings are applied outside training: as differences between frames, as learned, or not at all.
Values = Literal["differences", "as_learned", "off"]


class BottleneckForm(Part):
    """Adds up(gelu(down(input))) to the output of an attention or feed-forward layer."""

    kind: Literal["bottleneck"] = "bottleneck"


class FrameEmbeddingsForm(Part):
    """In temporal attention, adds one vector per frame to the input of the queries and keys, and another vector to the
    input of the values."""

    kind: Literal["frame_embeddings"] = "frame_embeddings"
    values: Values = "differences"


BranchForm = Annotated[BottleneckForm | FrameEmbeddingsForm, Field(discriminator="kind")]


class BranchSettings(Part):
    """Branches of one form in one network."""

    form: BranchForm
    # the first linear layer of each attention layer or feed-forward network that has a branch
    layers: tuple[Annotated[str, Field(min_length=1, max_length=512)], ...]
