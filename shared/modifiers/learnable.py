"""New tokens whose input embeddings are learned (Textual Inversion, https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.config import Part
from shared.modifiers.base import PlainNaming, spoken


class LearnableToken(Part):
    """`vectors` new tokens per concept; they start as the embedding of `init` (the class noun where none is given)."""

    kind: Literal["learnable_token"] = "learnable_token"
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    init: str = ""  # words; "" is the class noun; "<rand>" is noise with the table's own spread
    with_class_noun: bool = False

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> LearnedNaming:
        """Adds `<name>`, `<name>_1`, … to the tokenizers. ValueError when there is no word to start from."""
        init = self.init or class_noun
        if not init:
            raise ValueError(
                "modifier.init is empty and there is no class noun: give subject.class_noun or modifier.init"
            )
        tokens = tuple(f"<{name}>" + (f"_{i}" if i else "") for i in range(self.vectors))
        start = {
            component: _start(backbone, component, init, self.vectors, seed)
            for component in backbone.components
            if component.startswith("text_encoder")
        }
        words = spoken(" ".join(tokens), class_noun, self.with_class_noun)
        naming = LearnedNaming(name, words, tokens, {c: v.to(backbone.device) for c, v in start.items()})
        backbone.add_naming(naming)
        return naming


class LearnedNaming(PlainNaming):
    """The rows themselves: one parameter `[n, d]` per text encoder, in fp32, outside the embedding table."""

    def __init__(self, name: str, words: str, tokens: tuple[str, ...], start: Mapping[str, Tensor]) -> None:
        super().__init__(name, words)
        self.tokens = tokens
        self.table = nn.ParameterDict({c: nn.Parameter(v.clone(), requires_grad=False) for c, v in start.items()})

    def rows(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        return self.table[component]

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.table.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {c: p.detach().float().cpu().clone() for c, p in self.table.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.table):
            raise ValueError(f"embeddings are for {sorted(state)}, this model's text encoders are {sorted(self.table)}")
        for component, rows in state.items():
            have = self.table[component]
            if rows.shape != have.shape:
                raise ValueError(
                    f"embeddings of {component} are {list(rows.shape)}, this model needs {list(have.shape)}"
                )
            have.data.copy_(rows)


def _start(backbone: Backbone, component: str, init: str, vectors: int, seed: int) -> Tensor:
    """[vectors, d]: the words' rows, repeated or cut; extra rows get a little noise so that they can part ways."""
    generator = torch.Generator().manual_seed(seed)
    words = backbone.word_rows(component, "a" if init == "<rand>" else init).float().cpu()
    if init == "<rand>":
        spread = words.std()
        return torch.randn(vectors, words.shape[1], generator=generator) * spread
    rows = words[torch.arange(vectors) % len(words)]
    repeated = (torch.arange(vectors) >= len(words)).float()[:, None]
    return rows + repeated * 0.1 * words.std() * torch.randn(rows.shape, generator=generator)
