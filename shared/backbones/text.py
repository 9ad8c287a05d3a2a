"""Encodes text that contains placeholders, by running the text encoders with learned vectors inserted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.backbones.added_tokens import Tokenized, TokenOverlay, join_embeddings, overlaid, same_embeddings, slots
from shared.backbones.forward_process import times
from shared.backbones.protocol import Placeholder
from shared.types import Conditioning, SiteContext

log = logging.getLogger(__name__)


class TextEncoding:
    """The text part of a backbone. A family implements `_run_text` and sets which encoder's output is the context."""

    family: str
    name: str
    context_component: str = "text_encoder"  # the encoder whose hidden states are the text context
    pooled_component: str | None = None  # the encoder whose pooled output is `Conditioning.pooled`
    # whether the network takes a padding mask for the context (`Conditioning.context_mask`)
    masks_context: bool = False
    why_one_context: str = "its text and picture attend jointly"  # explains, in errors, why there are no `text_sites`
    tokens: TokenOverlay
    placeholders: dict[str, Placeholder]
    _components: dict[str, nn.Module]
    _warned: set[str]

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def text_sites(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def max_length(self) -> Mapping[str, int]:
        """The number of tokens per prompt that each text encoder reads, including special tokens."""
        return self.tokens.max_length

    def check_prompt(self, prompt: str) -> None:
        """Raises ValueError if the context's text encoder would truncate the prompt, or if any text encoder would truncate a
        concept's name. The message quotes the text that would be cut off. Other text that a second encoder would cut off
        only causes a warning."""
        cut = self.tokens.overflow(self.context_component, prompt)
        if cut:
            limit = self.tokens.max_length[self.context_component]
            raise ValueError(
                f"the prompt is too long: {self.name or self.family} reads {limit} tokens and would cut off {cut!r}"
            )
        self._warn_cut([prompt])

    def varies_with(self, prompts: Sequence[str]) -> frozenset[str]:
        """Returns what the encoding of these prompts varies with ("time", "site"). If empty, the encoding can be cached."""
        texts = self._tokenize(list(prompts))
        return frozenset().union(*(n.varies_with for n in self._used(texts)))

    def word_embeddings(self, component: str, words: str) -> Tensor:
        """Returns a detached copy of the input embeddings [n, d] of `words` in this text encoder, without special tokens."""
        table = self._embedding(component).weight  # the table may be in main memory
        ids = torch.tensor(self.tokens.word_ids(component, words), device=table.device)
        return table[ids].detach().to(self.device, copy=True)

    def word_pieces(self, component: str, words: str) -> tuple[str, ...]:
        """Returns the sub-tokens into which this text encoder's tokenizer splits `words`, without word-boundary marks."""
        return self.tokens.pieces(component, words)

    def word_positions(self, prompts: Sequence[str], words: str) -> Tensor:
        """Returns a bool mask [B, L] over the tokens of `Conditioning.context`, True where `words` occur in these prompts.

        Args:
            prompts: B texts
            words: for example a class noun, a concept's tokens, or `END` for the end-of-text token

        Raises:
            ValueError: when `words` is empty
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.tokens.find_words(self.context_component, prompts, words).to(self.device)

    def table_spread(self, component: str) -> float:
        """Returns the standard deviation of all values in this text encoder's input embeddings."""
        return float(self._embedding(component).weight.detach().float().std())

    def encode(self, prompts: Sequence[str], t: Tensor | None = None) -> Conditioning:
        """Encodes expanded prompts into the network's conditioning.

        The text encoder runs once or, if a placeholder varies with "site", once for each distinct set of vectors. The result
        is differentiable with respect to the vectors and to the text-encoder adapters.

        Args:
            prompts: B texts
            t: [B] or a scalar; required if a placeholder used in these prompts varies with "time"

        Raises:
            ValueError: when `t` is required but missing, or has the wrong shape; when the prompts need a context per site
                but the family has no such sites; or when a text encoder would truncate a concept's name. Other text that
                would be cut off only causes a warning.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._warn_cut(prompts)
        texts = self._tokenize(prompts)
        used = self._used(texts)
        time = self._time(used, t, len(prompts))
        places = {n.name: self._find(self.context_component, texts, n) for n in used}
        by_site = any("site" in n.varies_with for n in used)
        sites: Sequence[str | None] = self._need_text_sites(used) if by_site else (None,)
        runs: list[tuple[list[Tensor], Tensor]] = []
        contexts: dict[str | None, SiteContext] = {}
        for site in sites:
            hidden = self._hidden(texts, used, time, site, runs)
            context = SiteContext(hidden, hidden)
            for placeholder in used:
                context = placeholder.edit(
                    context, places[placeholder.name], _if(placeholder, "time", time), _if(placeholder, "site", site)
                )
            contexts[site] = context
        pooled = None
        if self.pooled_component:
            vectors = self._vectors(self.pooled_component, texts, used, time, None)
            pooled = self._run(self.pooled_component, texts, used, vectors)[1]
        mask = texts[self.context_component].mask.bool() if self.masks_context else None
        return Conditioning(
            context=self._gather(contexts, used), pooled=pooled, token_positions=places, context_mask=mask
        )

    def _hidden(
        self,
        texts: Mapping[str, Tokenized],
        used: Sequence[Placeholder],
        time: Tensor | None,
        site: str | None,
        runs: list[tuple[list[Tensor], Tensor]],
    ) -> Tensor:
        vectors = self._vectors(self.context_component, texts, used, time, site)
        for known, hidden in runs:
            if same_embeddings(known, vectors):
                return hidden
        hidden = self._run(self.context_component, texts, used, vectors)[0]
        runs.append((vectors, hidden))
        return hidden

    def _gather(
        self, contexts: Mapping[str | None, SiteContext], used: Sequence[Placeholder]
    ) -> Tensor | dict[str, SiteContext]:
        if None not in contexts:
            return {str(k): v for k, v in contexts.items()}
        one = contexts[None]
        if one.key is one.value:
            return one.key
        return {site: one for site in self._need_text_sites(used)}

    def _need_text_sites(self, used: Sequence[Placeholder]) -> tuple[str, ...]:
        sites = self.text_sites()
        if not sites:
            names = ", ".join(repr(n.name) for n in used)
            raise ValueError(
                f"{names}: a text context per attention site (or separate keys and values) needs cross-attention layers "
                f"that can each take their own context, but {self.family} has none, because {self.why_one_context}"
            )
        return sites

    def _time(self, used: Sequence[Placeholder], t: Tensor | None, batch: int) -> Tensor | None:
        t = None if t is None else times(t, batch, self.device)
        timed = [n.name for n in used if "time" in n.varies_with]
        if not timed:
            return None
        if t is None:
            raise ValueError(f"the words of {', '.join(timed)} vary with time, so pass t to encode(prompts, t)")
        return t

    def _readers(self) -> list[str]:
        """Returns the text encoders in use, starting with the one for the context."""
        return list(dict.fromkeys(c for c in (self.context_component, self.pooled_component) if c))

    def _tokenize(self, prompts: Sequence[str]) -> dict[str, Tokenized]:
        return {c: self.tokens.tokenize(c, prompts, self.device) for c in self._readers()}

    def _find(self, component: str, texts: Mapping[str, Tokenized], placeholder: Placeholder) -> Tensor:
        return self.tokens.find(component, texts[component].ids, placeholder.tokens, placeholder.words)

    def _used(self, texts: Mapping[str, Tokenized]) -> list[Placeholder]:
        return [n for n in self.placeholders.values() if any(bool(self._find(c, texts, n).any()) for c in texts)]

    def _vectors(
        self,
        component: str,
        texts: Mapping[str, Tokenized],
        used: Sequence[Placeholder],
        time: Tensor | None,
        site: str | None,
    ) -> list[Tensor]:
        """Returns the vectors of the used placeholders that have tokens, in order. Each is [n, d] or [B, n, d]."""
        out = []
        batch, width = texts[component].ids.shape[0], self._embedding(component).weight.shape[1]
        for placeholder in (n for n in used if n.tokens):
            vectors = placeholder.embeddings(component, _if(placeholder, "time", time), _if(placeholder, "site", site))
            n = len(placeholder.tokens)
            if vectors is None or tuple(vectors.shape) not in ((n, width), (batch, n, width)):
                got = None if vectors is None else list(vectors.shape)
                raise ValueError(
                    f"{placeholder.name!r}: {component} vectors must be [{n}, {width}] or [{batch}, {n}, {width}], not {got}"
                )
            out.append(vectors)
        return out

    def _run(
        self, component: str, texts: Mapping[str, Tokenized], used: Sequence[Placeholder], vectors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        text = texts[component]
        if not vectors:
            return self._run_text(component, text.ids, text.mask)
        added = [t for n in used for t in n.tokens]
        places = slots(text.ids, self.tokens.ids_of(component, added))
        ids = text.ids.masked_fill(places >= 0, self.tokens.filler(component))
        table = join_embeddings([r.to(ids.device) for r in vectors], ids.shape[0])
        with overlaid(self._embedding(component), places, table):
            return self._run_text(component, ids, text.mask)

    def _embedding(self, component: str) -> Any:
        """Returns the token-embedding module that this text encoder's forward pass calls. For T5, `get_input_embeddings`
        returns a different module."""
        module: Any = self._components[component]
        stack = getattr(module, "encoder", None)
        return getattr(stack, "embed_tokens", None) or module.get_input_embeddings()

    def _run_text(self, component: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Runs a text encoder once. Returns its hidden states [B, L, D] and its pooled output [B, P]. The latter is None if
        the model does not use it."""
        raise NotImplementedError

    def _warn_cut(self, prompts: Sequence[str]) -> None:
        """Warns once per prompt about text that an encoder cuts off. Raises ValueError if part of a concept's name is lost."""
        for prompt in prompts:
            if prompt in self._warned:
                continue
            for component in self._readers():
                cut = self.tokens.overflow(component, prompt)
                limit = self.tokens.max_length[component]
                lost = [n.name for n in self.placeholders.values() if cut and _says(n, prompt, cut)]
                if lost:
                    raise ValueError(
                        f"the prompt is too long: {component} of {self.name or self.family} reads {limit} tokens and "
                        f"would cut off {cut!r}, which includes {', '.join(map(repr, lost))}"
                    )
                if cut:
                    log.warning("prompt truncated to %d tokens for %s: %r is ignored", limit, component, cut)
            self._warned.add(prompt)


def _says(placeholder: Placeholder, prompt: str, cut: str) -> bool:
    """Whether part of a concept's name is lost when `cut`, the end of the prompt, is cut off."""
    kept = prompt.rstrip()[: -len(cut)]
    words = [w for w in placeholder.tokens or (placeholder.words,) if w.strip()]
    return any(kept.count(w) < prompt.count(w) for w in words)


def _if(placeholder: Placeholder, what: str, value: Any) -> Any:
    return value if what in placeholder.varies_with else None
