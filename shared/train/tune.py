"""Tuning on pictures: the task behind every test-time fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.prompts import without
from shared.recipe import Recipe
from shared.train.data import Data
from shared.train.loop import Update, generator
from shared.trainable import Woken
from shared.types import Batch, Conditioning, Example, Step

_NOISE = 2**42  # a stream of its own, apart from the one that draws rows


class Tune:
    """Denoising plus penalties on one backbone, for the concepts in training (`run_name` is their adapters' name)."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        examples: Sequence[Example],
        class_nouns: Mapping[str, str],
        woken: Sequence[Woken],
        others: Mapping[str, float] | None = None,
        starts: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """`others`: concepts that were loaded before and stay on, name -> strength. `starts`: what the parameters of each
        concept's name were before training (default: what they are)."""
        self.backbone, self.recipe = backbone, recipe
        self.class_nouns, self.others = dict(class_nouns), dict(others or {})
        words = {name: backbone.namings[name].words for name in class_nouns}
        self.said = {words[n]: n for n in words}
        self.data = Data(examples, recipe, backbone, words, class_nouns)
        varies = any(n.varies_with for n in backbone.namings.values())
        self.text_frozen = recipe.train.cache and not varies and not any(w.touches_text for w in woken)
        self._text: dict[str, Conditioning] = {}
        self._starts = starts or {
            n: [p.detach().clone() for p in backbone.namings[n].parameters()] for n in class_nouns
        }
        anchored = [k for k, r in recipe.regularize.items() if "token_drift" in r.needs]
        if anchored and not any(self._starts.values()):
            raise ValueError(
                f"regularize.{anchored[0]} keeps learned tokens near their start, but the modifier learns none"
            )

    def updates(self, step: int, micro: int) -> Iterator[Update]:
        """One loss per micro-batch: the objective on instance rows, plus every penalty."""
        batch = self.data.batch(step, micro)
        state = self._predict(batch, step, micro)
        rows = state.need("row_loss")
        instance = batch.rows("instance").to(rows.device)
        parts: dict[str, Tensor] = {"denoising": rows[instance].mean()}
        for name, penalty in self.recipe.regularize.items():
            parts[name] = penalty(state)
        loss = torch.stack(list(parts.values())).sum()
        yield Update(loss, parts={k: v.detach() for k, v in parts.items()})

    def _predict(self, batch: Batch, step: int, micro: int) -> Step:
        backbone, recipe = self.backbone, self.recipe
        draw = generator(recipe.seed, _NOISE + step, micro)
        noise = recipe.noise.draw_noise(batch.latents, draw)
        t = recipe.noise.draw_times(batch.size, draw, backbone.discrete_time).to(batch.latents.device)
        x_t = backbone.add_noise(batch.latents, noise, t)
        conditioning = self.encode(batch.captions, t)
        prediction = backbone.predict(x_t.to(backbone.dtype), t, conditioning)
        target = backbone.target(batch.latents, noise, t)
        state = Step(step, batch, backbone, conditioning, noise, t, x_t, prediction, target)
        return Step(**{**vars(state), "lazy": self._lazy(state)})

    def encode(self, captions: Sequence[str], t: Tensor | None) -> Conditioning:
        """The captions' conditioning; from the cache when nothing in training changes it."""
        if not self.text_frozen:
            return self.backbone.encode(list(captions), t)
        for caption in captions:
            if caption not in self._text:
                with torch.no_grad():
                    self._text[caption] = self.backbone.encode([caption])
        return Conditioning.cat([self._text[c] for c in captions])

    def _lazy(self, state: Step) -> Mapping[str, Callable[[], Tensor]]:
        """What penalties may need; computed at most once, and only when asked for."""
        backbone, batch = self.backbone, state.batch
        instance = batch.rows("instance").to(state.x_t.device)

        def row_loss() -> Tensor:
            objective = self.recipe.objective
            weight = objective.weight(batch.mask, batch.valid)
            return objective.rows(state.prediction, state.target, weight) * objective.time_weight(backbone, state.t)

        def class_step() -> tuple[Tensor, Tensor, list[str]]:
            prompts = [
                self._class_prompt(c) for c, r in zip(batch.captions, batch.role, strict=True) if r == "instance"
            ]
            return state.x_t[instance].to(backbone.dtype), state.t[instance], prompts

        def class_prediction() -> Tensor:
            x_t, t, prompts = class_step()
            return backbone.predict(x_t, t, self.encode(prompts, t))

        def base_class_prediction() -> Tensor:
            x_t, t, prompts = class_step()
            with torch.no_grad(), backbone.active(self.others):
                return backbone.predict(x_t, t, backbone.encode(prompts, t))

        def token_drift() -> Tensor:
            pairs = [
                (now, start)
                for name in self.class_nouns
                for now, start in zip(backbone.namings[name].parameters(), self._starts[name], strict=True)
            ]
            return torch.cat([((now - start) ** 2).sum(-1).flatten() for now, start in pairs])

        every = (row_loss, class_prediction, base_class_prediction, token_drift)
        return {f.__name__: cache(f) for f in every}

    def _class_prompt(self, caption: str) -> str:
        """The caption as the base model would be asked: the concept's words replaced by its class noun."""
        for words, name in sorted(self.said.items(), key=lambda pair: -len(pair[0])):
            if words:
                caption = caption.replace(words, f"<{name}>")
        return without(caption, self.class_nouns)
