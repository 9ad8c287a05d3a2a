"""Forms of branches beside a network's layers, as they stand in a file. Importing this loads no model library."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.config import Part

#: How value embeddings act outside of training: as differences from frame to frame, as they were learned, or not at all.
Values = Literal["differences", "as_learned", "off"]


class BottleneckForm(Part):
    """out + up(gelu(down(input))) around a layer of attention or feed-forward."""

    kind: Literal["bottleneck"] = "bottleneck"


class FrameEmbeddingsForm(Part):
    """Vectors of each frame, added to what queries and keys, and to what values of an attention between frames are
    computed from."""

    kind: Literal["frame_embeddings"] = "frame_embeddings"
    values: Values = "differences"


BranchForm = Annotated[BottleneckForm | FrameEmbeddingsForm, Field(discriminator="kind")]


class BranchSettings(Part):
    """Branches of one form in one network."""

    form: BranchForm
    layers: tuple[Annotated[str, Field(min_length=1, max_length=512)], ...]  # the first layer of each place
