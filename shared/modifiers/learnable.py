"""New tokens with learned input embeddings (Textual Inversion, https://arxiv.org/abs/2208.01618), optionally with
separate embeddings for each attention layer (P+, https://arxiv.org/abs/2303.09522)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.config import KindPart
from shared.modifiers.base import PlaceholderBase, phrase


class LearnableToken(KindPart):
    """Adds `vectors` new tokens per concept. Their vectors start as the embeddings of the words in `init`, or of the
    class noun by default.

    If these words have more sub-tokens than there are vectors, each vector starts as the mean of several sub-tokens. With
    `per: layer`, each cross-attention layer reads the prompt with its own vectors (P+, section 3.2). The text encoder
    then runs once per layer."""

    kind: Literal["learnable_token"] = "learnable_token"
    vectors: Annotated[int, Field(ge=1, le=64)] = 1
    init: str = ""  # words, or "<rand>" for noise with the spread of the embedding table; if empty, the class noun
    with_class_noun: bool = False  # whether the class noun follows the tokens
    per: Literal["layer"] | None = None  # "layer" gives each layer its own vectors; null gives all layers the same

    @property
    def taxonomy(self) -> str:
        return ("learnable token" if self.vectors == 1 else "learnable tokens") + (
            f" per {self.per}" if self.per else ""
        )

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> LearnedPlaceholder:
        """Adds `<name>`, `<name>_1`, … to the tokenizers.

        Raises:
            ValueError: if there is neither `init` nor a class noun, or if `per` is set for a model without
                cross-attention
        """
        init = self.init or class_noun
        if not init:
            raise ValueError(
                "modifier.init is empty and there is no class noun; set subject.class_noun or modifier.init"
            )
        sites = backbone.text_sites()
        if self.per and not sites:
            raise ValueError(
                f"modifier.per={self.per}: {backbone.family} has no cross-attention layers that can each take their own text; "
                "leave out modifier.per"
            )
        tokens = tuple(f"<{name}>" + (f"_{i}" if i else "") for i in range(self.vectors))
        start = {
            component: _start(backbone, component, init, self.vectors, seed)
            for component in backbone.components
            if component.startswith("text_encoder")
        }
        words = phrase(" ".join(tokens), class_noun, self.with_class_noun)
        start = {component: vectors.to(backbone.device) for component, vectors in start.items()}
        placeholder = (
            LayeredPlaceholder(name, words, tokens, start, sites)
            if self.per
            else LearnedPlaceholder(name, words, tokens, start)
        )
        backbone.add_placeholder(placeholder)
        return placeholder


class LearnedPlaceholder(PlaceholderBase):
    """A placeholder with learned vectors. These form one fp32 parameter [n, d] per text encoder, outside the embedding
    table.

    The initial vectors are kept. At strength s, the vectors are start + s * (learned - start).
    """

    def __init__(self, name: str, words: str, tokens: tuple[str, ...], start: Mapping[str, Tensor]) -> None:
        super().__init__(name, words)
        self.tokens, self.components = tokens, tuple(start)
        self.start = {c: v.detach().clone() for c, v in start.items()}
        self.table = {c: nn.Parameter(v.clone(), requires_grad=False) for c, v in start.items()}
        self.strength = 1.0

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        """Returns the vectors [n, d] at the current strength."""
        return at_strength(self.start[component], self.table[component], self.strength)

    def set_strength(self, strength: float) -> None:
        """Sets the strength. 0 gives the initial vectors and 1 the learned ones; other values interpolate or extrapolate
        linearly."""
        self.strength = strength

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.table.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the learned vectors [n, d] of each component, or of each component and layer if each layer has its
        own vectors."""
        return {c: p.detach().float().cpu().clone() for c, p in self.table.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._load(state, {c: p.data for c, p in self.table.items()}, "embeddings")

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Returns the initial vectors [n, d], with the same keys as `state_dict`."""
        return {c: v.float().cpu().clone() for c, v in self.start.items()}

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._load(state, self.start, "initial embeddings")

    def _load(self, state: Mapping[str, Tensor], into: Mapping[str, Tensor], what: str) -> None:
        if set(state) != set(into):
            raise ValueError(f"{what} are for {_some(state)}, but this model needs {_some(into)}")
        for component, vectors in state.items():
            if vectors.shape != into[component].shape:
                needed = list(into[component].shape)
                raise ValueError(f"{what} of {component} are {list(vectors.shape)}, but this model needs {needed}")
            into[component].copy_(vectors)


class LayeredPlaceholder(LearnedPlaceholder):
    """A placeholder with separate vectors for each attention layer, all of which start from the same values.

    Args:
        start: the initial vectors [n, d] of each text encoder
        sites: the cross-attention layers
    """

    varies_with = frozenset({"site"})

    def __init__(
        self, name: str, words: str, tokens: tuple[str, ...], start: Mapping[str, Tensor], sites: tuple[str, ...]
    ) -> None:
        super().__init__(
            name, words, tokens, {f"{c}.{site}": vectors for c, vectors in start.items() for site in sites}
        )
        self.components, self.sites = tuple(start), sites

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        """Returns one layer's vectors [n, d], or the mean over all layers if `site` is None (for a pooled text embedding)."""
        if site is not None:
            return super().embeddings(f"{component}.{site}", t, site)
        per_site = [super(LayeredPlaceholder, self).embeddings(f"{component}.{s}", t, s) for s in self.sites]
        return torch.stack([r for r in per_site if r is not None]).mean(0)


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return (", ".join(names[:3]) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def at_strength(start: Tensor, learned: Tensor, strength: float) -> Tensor:
    """Interpolates linearly from `start` ([n, d]) at strength 0 to `learned` ([n, d]) at strength 1. At strengths 0 and
    1, returns the given tensor itself, not a copy."""
    if strength in (0.0, 1.0):
        return learned if strength else start
    return start + strength * (learned - start)


def _start(backbone: Backbone, component: str, init: str, vectors: int, seed: int) -> Tensor:
    """Returns the initial vectors, [vectors, d]. They are the embeddings of the sub-tokens of `init`, in order.

    With fewer vectors than sub-tokens, each vector is the mean of an equal share of the sub-tokens. For example, a
    single vector for "coffee mug" is the mean of both words' embeddings. With more vectors than sub-tokens, the
    sub-tokens are repeated with a little noise, so that the copies can diverge. "<rand>" gives noise with the spread of
    the whole embedding table.
    """
    generator = torch.Generator().manual_seed(seed)
    words = backbone.word_embeddings(component, "a" if init == "<rand>" else init).float().cpu()
    if init == "<rand>":
        return torch.randn(vectors, words.shape[1], generator=generator) * backbone.table_spread(component)
    if vectors < len(words):
        return torch.stack([share.mean(0) for share in words.tensor_split(vectors)])
    initial = words[torch.arange(vectors) % len(words)]
    repeated = (torch.arange(vectors) >= len(words)).float()[:, None]
    return initial + repeated * 0.1 * words.std() * torch.randn(initial.shape, generator=generator)
