"""Tuning on pictures: the task behind every test-time fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.prompts import without
from shared.recipe.schema import Recipe
from shared.train.data import Data
from shared.train.loop import Update, generator
from shared.train.preflight import check_needs, own_needs
from shared.trainable import TrainableGroup
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
        woken: Sequence[TrainableGroup],
        loaded_strengths: Mapping[str, float] | None = None,
        initial_parameters: Mapping[str, Sequence[Tensor]] | None = None,
        text_on_device: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`loaded_strengths`: concepts that were loaded before and stay on, name -> strength. `initial_parameters`: what the parameters of each
        concept's name were before training (default: what they are). `text_on_device`: inside it, the text encoders are where they
        can be used. ValueError when a part needs what nothing can give it."""
        self.backbone, self.recipe = backbone, recipe
        self.class_nouns, self.loaded_strengths = dict(class_nouns), dict(loaded_strengths or {})
        words = {name: backbone.placeholders[name].words for name in class_nouns}
        self.said = {words[n]: n for n in words}
        self.data = Data(examples, recipe, backbone, words, class_nouns)
        varies = any(n.varies_with for n in backbone.placeholders.values())
        self.text_frozen = recipe.train.cache and not varies and not any(w.touches_text for w in woken)
        self._text_on_device = text_on_device
        self._text: dict[str, Conditioning] = {}
        self._base_text: dict[str, Conditioning] = {}  # by the model without the concepts in training: it never changes
        self._initial_parameters = initial_parameters or {
            n: [p.detach().clone() for p in backbone.placeholders[n].parameters()] for n in class_nouns
        }
        parts = {f"regularize.{k}": r for k, r in recipe.regularize.items()}
        self.needs = check_needs(parts, self.serves)
        anchored = [place for place, part in parts.items() if "token_drift" in own_needs(part)]
        if anchored and not any(self._initial_parameters.values()):
            raise ValueError(f"{anchored[0]} keeps learned tokens near their start, but the modifier learns none")

    @property
    def serves(self) -> Mapping[str, Callable[[Step], Tensor]]:
        """What a penalty may declare as a need, and what computes it."""
        return {
            "example_loss": self._example_loss,  # [B], the objective of each row
            "class_prediction": self._class_prediction,  # [I, C, h, w], of instance rows told the class noun
            "base_class_prediction": self._base_class_prediction,  # the same, without the concepts in training
            "token_drift": self._token_drift,  # [n], squared distances of token rows from their start
        }

    def updates(self, step: int, micro: int) -> Iterator[Update]:
        """One loss per micro-batch: the objective on instance rows, plus every penalty."""
        batch = self.data.batch(step, micro)
        state = self._predict(batch, step, micro)
        rows = state.need("example_loss")
        instance = batch.with_role("instance").to(rows.device)
        parts: dict[str, Tensor] = {"denoising": rows[instance].mean()}
        for name, penalty in self.recipe.regularize.items():
            parts[name] = penalty(_for(penalty, state))
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
        return replace(state, lazy=self._lazy(state))

    def encode(self, captions: Sequence[str], t: Tensor | None) -> Conditioning:
        """The captions' conditioning; from the cache when nothing in training changes it."""
        if not self.text_frozen:
            return self.backbone.encode(list(captions), t)
        return self._kept(captions, self._text)

    def _kept(self, captions: Sequence[str], kept: dict[str, Conditioning]) -> Conditioning:
        """Each caption encoded once, as the model is now."""
        for caption in captions:
            if caption not in kept:
                with torch.no_grad(), self._text_on_device():
                    kept[caption] = self.backbone.encode([caption])
        return Conditioning.cat([kept[c] for c in captions])

    def _lazy(self, state: Step) -> Mapping[str, Callable[[], Tensor]]:
        """What this task and the parts declare; computed at most once, and only when asked for."""
        wanted = {"example_loss", *self.needs}
        return {name: cache(partial(serve, state)) for name, serve in self.serves.items() if name in wanted}

    def _example_loss(self, state: Step) -> Tensor:
        objective = self.recipe.objective
        weight = objective.weight(state.batch.mask, state.batch.valid)
        rows = objective.example_losses(state.prediction, state.target, weight)
        return rows * objective.time_weight(self.backbone, state.t)

    def _class_step(self, state: Step) -> tuple[Tensor, Tensor, list[str]]:
        """Noisy latents, times and class prompts of the instance rows."""
        batch = state.batch
        instance = batch.with_role("instance").to(state.x_t.device)
        captions = [c for c, r in zip(batch.captions, batch.role, strict=True) if r == "instance"]
        return (
            state.x_t[instance].to(self.backbone.dtype),
            state.t[instance],
            [self._class_prompt(c) for c in captions],
        )

    def _class_prediction(self, state: Step) -> Tensor:
        x_t, t, prompts = self._class_step(state)
        return self.backbone.predict(x_t, t, self.encode(prompts, t))

    def _base_class_prediction(self, state: Step) -> Tensor:
        x_t, t, prompts = self._class_step(state)
        with torch.no_grad(), self.backbone.active(self.loaded_strengths):
            if self.recipe.train.cache and not self.backbone.varies_with(prompts):
                return self.backbone.predict(x_t, t, self._kept(prompts, self._base_text))
            return self.backbone.predict(x_t, t, self.backbone.encode(prompts, t))

    def _token_drift(self, state: Step) -> Tensor:
        pairs = [
            (now, start)
            for name in self.class_nouns
            for now, start in zip(
                self.backbone.placeholders[name].parameters(), self._initial_parameters[name], strict=True
            )
        ]
        return torch.cat([((now - start) ** 2).sum(-1).flatten() for now, start in pairs])

    def _class_prompt(self, caption: str) -> str:
        """The caption as the base model would be asked: the concept's words replaced by its class noun."""
        for words, name in sorted(self.said.items(), key=lambda pair: -len(pair[0])):
            if words:
                caption = caption.replace(words, f"<{name}>")
        return without(caption, self.class_nouns)


def _for(part: object, state: Step) -> Step:
    """The step as one part sees it: with the needs that it declared, and no others."""
    own = own_needs(part)
    return replace(state, lazy={name: serve for name, serve in state.lazy.items() if name in own})
