"""Encodes each text only once as long as its meaning stays the same. Encodings are cached by the contents of concepts,
not by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pcs_3d.view_prompts import Mix
from shared.backbones.protocol import Adapter, Backbone
from shared.prompts import expand, names_in
from shared.types import Conditioning, SiteContext


class PromptCache:
    """Encodes texts that can contain `<name>`s, using the active adapters.

    An encoding is reused if nothing has changed in the text, in the words and tensors of the concepts that it names, or
    in the text encoders' active adapters. If a concept has been trained further or replaced by another concept with
    the same name, the texts that name it are encoded again.

    Args:
        on_device: returns a context in which the text encoders can be used
    """

    def __init__(self, backbone: Backbone, on_device: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.backbone, self.on_device = backbone, on_device
        self._kept: dict[tuple[str, str], Conditioning] = {}
        # for each object, by its id: the object, the versions of its tensors, and its hash
        self._hashes: dict[int, tuple[Any, tuple[Any, ...], str]] = {}
        self._touches_text: dict[int, tuple[Adapter, bool]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], t: Tensor) -> Conditioning:
        """Encodes B texts as one conditioning. The times `t` (`[B]`) are used only if a name's embedding varies with
        time."""
        words = [expand(text, self.backbone.placeholders) for text in texts]
        if "time" in self.backbone.varies_with(words):
            with self.on_device():
                return self.backbone.encode(words, t)
        return Conditioning.cat([self._one(text, word) for text, word in zip(texts, words, strict=True)])

    def mixed(self, rows: Sequence[Mix], t: Tensor) -> Conditioning:
        """Returns one conditioning for B rows, each of which is a weighted mix of texts."""
        most = max(len(row) for row in rows)
        padded = [(*row, *(((0.0, row[0][1]),) * (most - len(row)))) for row in rows]
        parts = [self.encode([row[i][1] for row in padded], t) for i in range(most)]
        if most == 1:
            return parts[0]
        weights = [torch.tensor([row[i][0] for row in padded], device=t.device) for i in range(most)]
        return _mixed(parts, weights)

    def _one(self, text: str, words: str) -> Conditioning:
        key = (words, self._meaning(text))
        if key not in self._kept:
            with self.on_device():
                self._kept[key] = self.backbone.encode([words])
        return self._kept[key]

    def _meaning(self, text: str) -> str:
        """Returns a hash of everything that a text's encoding depends on besides its words."""
        backbone, strengths = self.backbone, self.backbone.strengths
        parts = [backbone.checkpoint]
        for name in names_in(text):
            parts.append(f"{strengths.get(name, 1.0)!r}{self._hash(backbone.placeholders[name])}")
        for name, adapters in sorted(backbone.adapters.items()):
            if strengths.get(name, 0.0):
                parts += [f"{strengths[name]!r}{self._hash(a)}" for a in adapters if self._of_text(a)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    def _of_text(self, adapter: Adapter) -> bool:
        if id(adapter) not in self._touches_text:
            of_text = any(key.startswith("text_encoder") for key in adapter.state_dict())
            self._touches_text[id(adapter)] = (adapter, of_text)
        return self._touches_text[id(adapter)][1]

    def _hash(self, holder: Any) -> str:
        """Returns the SHA-256 of an object's tensors. The hash is recomputed only if one of the tensors has changed."""
        versions = tuple((p.data_ptr(), p._version) for p in holder.parameters())
        known = self._hashes.get(id(holder))
        if known is None or known[0] is not holder or known[1] != versions:
            digest = hashlib.sha256()
            for key, tensor in sorted(holder.state_dict().items()):
                digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
            self._hashes[id(holder)] = known = (holder, versions, digest.hexdigest())
        return known[2]


def _mixed(parts: Sequence[Conditioning], weights: Sequence[Tensor]) -> Conditioning:
    """Returns the weighted sum of several conditionings, row by row. The token positions of each name are the union of
    its positions in all conditionings."""

    def total(tensors: Sequence[Tensor]) -> Tensor:
        shaped = [w.to(v.dtype).reshape(-1, *([1] * (v.ndim - 1))) for w, v in zip(weights, tensors, strict=True)]
        return torch.stack([w * v for w, v in zip(shaped, tensors, strict=True)]).sum(0)

    first = parts[0]
    if isinstance(first.context, Tensor) and all(isinstance(p.context, Tensor) for p in parts):
        context: Any = total([p.context for p in parts])  # type: ignore[misc]
    else:
        sites = sorted({site for p in parts if not isinstance(p.context, Tensor) for site in p.context})
        tables: list[Any] = [p.per_site(sites).context for p in parts]
        context = {
            s: SiteContext(total([c[s].key for c in tables]), total([c[s].value for c in tables])) for s in sites
        }
    names = sorted({name for p in parts for name in p.token_positions})
    places = {n: torch.stack([p.token_positions[n] for p in parts if n in p.token_positions]).any(0) for n in names}
    pooled = None if first.pooled is None else total([p.pooled for p in parts])  # type: ignore[misc]
    masks = [p.context_mask for p in parts if p.context_mask is not None]
    mask = torch.stack(masks).any(0) if masks else None
    return Conditioning(context=context, pooled=pooled, token_positions=places, context_mask=mask)
