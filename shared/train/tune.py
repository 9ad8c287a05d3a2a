"""Trains concepts on pictures of their subjects. This is the task of every test-time fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from shared.backbones.forward_process import per_row
from shared.prompts import without
from shared.train.batches import Data
from shared.train.loop import generator
from shared.train.needs import Computed, Need, Needing, check_needs, needs_by_name
from shared.train.phase_context import ConceptTask, PhaseContext
from shared.train.preflight import check_masks
from shared.train.task import Update, Updates
from shared.types import Batch, Conditioning, Step

_NOISE = 2**42  # makes the random stream for noise differ from the one that draws examples


class Tune(ConceptTask):
    """Trains the concepts on one backbone with a denoising loss plus penalties.

    Raises ValueError when nothing can provide what a part needs, or when the recipe trains nothing.
    """

    def __init__(self, context: PhaseContext) -> None:
        super().__init__(context)
        self.backbone, self.recipe, self.steps = context.backbone, context.recipe, context.recipe.train.steps
        if not context.trained and self.steps:
            raise ValueError("the recipe trains nothing: add a part under trainable, for example trainable.lora.rank=8")
        self.class_nouns = context.class_nouns
        words = {name: self.backbone.placeholders[name].words for name in self.class_nouns}
        self._name_of = {text: name for name, text in words.items()}
        if self.recipe.noise.clean_first_frame and not self.backbone.time_per_frame:
            raise ValueError(
                f"noise.clean_first_frame = {self.recipe.noise.clean_first_frame:g}: {self.backbone.family} takes one timestep "
                "for all frames of a clip, so the first frame cannot be noise-free; leave this setting out"
            )
        parts = {f"regularize.{k}": r for k, r in self.recipe.regularize.items()}
        self.served = needs_by_name(self._own_needs(), parts)
        self.needs = check_needs(parts, self.served)
        anchored = [place for place, part in parts.items() if "token_drift" in part.needs]
        if anchored and not any(context.initial_parameters.values()):
            raise ValueError(
                f"{anchored[0]} keeps learned tokens near their initial values, but the modifier learns none"
            )
        self.data = Data(
            context.examples(), self.recipe, self.backbone, words, self.class_nouns, "pixels" in self.needs
        )
        check_masks(self.recipe, self.data.has_masks)
        varies = any(p.varies_with for p in self.backbone.placeholders.values())
        frozen = not varies and not any(group.touches_text for group in context.trained)
        self.text_frozen = self.recipe.train.cache and frozen
        self._text: dict[str, Conditioning] = {}
        self._base_text: dict[str, Conditioning] = {}  # without the concepts being trained, so it never changes

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """The networks that the steps use, out of the autoencoder and the text encoders."""
        vae = frozenset({"vae"})
        text = super().networks_in_steps - vae
        return (frozenset() if self.data.cached else vae) | (frozenset() if self.text_frozen else text)

    def _own_needs(self) -> list[Need]:
        """Returns the needs that a penalty may declare in this task, each with the function that computes it."""
        return [
            Computed("pixels", lambda step: step.batch.pixels),  # [B, 3, H, W] in [-1, 1]
            Computed("example_loss", self._example_loss),  # [B], the objective per example
            Computed("loss_weight", self._loss_weight),  # [B, 1, (f), h, w], the weight of each location, or None
            # [I, C, h, w], the prediction for instance examples with the class noun in their prompts
            Computed("class_prediction", self._class_prediction),
            # the same prediction, but without the concepts being trained
            Computed("base_class_prediction", self._base_class_prediction),
            # [n], squared distances of token vectors from their initial values
            Computed("token_drift", self._token_drift),
        ]

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss per micro-batch: the objective on instance examples plus every penalty.

        The loss is yielded inside all contexts that the needs keep open around the prediction.
        """
        with self.state(step, micro) as state:
            parts = self.losses(state)
            loss = torch.stack(list(parts.values())).sum()
            yield Update(loss, parts={k: v.detach() for k, v in parts.items()})

    def of_one_role(
        self,
        step: int,
        micro: int,
        batch: Batch,
        own: float = 1.0,
        resting: Sequence[str] = (),
        groups: tuple[str, ...] | None = None,
    ) -> Updates:
        """Yields one loss on examples of one role.

        Use this for examples that cannot share a batch or that need different active adapters. For instance examples,
        the loss is the objective plus the penalties that do not need class examples. For class examples, it is the sum
        of the penalties that need them.

        Args:
            own, resting: see `state`
            groups: the optimizer groups that the loss trains; all if None
        """
        of_class = "instance" not in batch.role
        penalties = {k: part for k, part in self.recipe.regularize.items() if part.needs_class_examples == of_class}
        needs = frozenset[str]().union(*(part.needs for part in penalties.values()))
        with self.state(step, micro, batch, own, needs, resting) as state:
            parts = {} if of_class else {"denoising": self.denoising(state)}
            parts |= self.penalties(state, penalties)
            loss = torch.stack(list(parts.values())).sum()
            yield Update(loss, groups, {k: v.detach() for k, v in parts.items()})

    def losses(self, state: Step) -> dict[str, Tensor]:
        """Returns the terms of the loss as scalars: the objective on instance examples, and every penalty."""
        return {"denoising": self.denoising(state), **self.penalties(state, self.recipe.regularize)}

    def denoising(self, state: Step) -> Tensor:
        """Returns the objective on instance examples, a scalar."""
        losses = state.need("example_loss")
        return losses[state.batch.with_role("instance").to(losses.device)].mean()

    @staticmethod
    def penalties(state: Step, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the values of these penalties as scalars."""
        return {name: part(_for(part, state)) for name, part in parts.items()}

    @contextmanager
    def state(
        self,
        step: int,
        micro: int,
        batch: Batch | None = None,
        own: float = 1.0,
        needs: frozenset[str] | None = None,
        resting: Sequence[str] = (),
    ) -> Iterator[Step]:
        """Yields the prediction for one micro-batch, with the requested needs.

        The prediction is yielded inside the contexts that the needs keep open around it.

        Args:
            batch: the examples; if None, those of this step
            own: the strength of the adapters that belong to these examples' file
            needs: the names of the needs; if None, those of all penalties
            resting: adapter sets to switch off
        """
        batch = self.data.batch(step, micro) if batch is None else batch
        with ExitStack() as stack:
            asked = self.needs if needs is None else needs
            active_needs = [self.served[name] for name in sorted(asked | {"example_loss"})]
            stack.enter_context(self.learning_from(batch.sources, own, resting))
            entered = {n.name: stack.enter_context(n.around(self.backbone, batch)) for n in active_needs}
            state = self._predict(batch, step, micro)
            yield replace(state, lazy={n.name: cache(partial(n.value, state, entered[n.name])) for n in active_needs})

    def _predict(self, batch: Batch, step: int, micro: int) -> Step:
        backbone, recipe = self.backbone, self.recipe
        draw = generator(recipe.seed, _NOISE + step, micro)
        noise = recipe.noise.draw_noise(batch.latents, draw)
        t = recipe.noise.draw_times(batch.size, draw, backbone.discrete_time).to(batch.latents.device)
        conditioning = self.encode(batch.captions, t)
        t = recipe.noise.of_frames(t, batch.latents, draw)
        x_t = backbone.add_noise(batch.latents, noise, t)
        prediction = backbone.predict(x_t.to(backbone.dtype), t, conditioning)
        target = backbone.target(batch.latents, noise, t)
        return Step(batch, backbone, conditioning, noise, t, x_t, prediction, target, draw)

    def encode(self, captions: Sequence[str], t: Tensor | None) -> Conditioning:
        """Encodes the captions, or takes their encodings from the cache if training does not change them."""
        if not self.text_frozen:
            return self.backbone.encode(list(captions), t)
        return self._kept(captions, self._text)

    def _kept(self, captions: Sequence[str], kept: dict[str, Conditioning]) -> Conditioning:
        """Encodes the captions with the model in its current state, except those that are already in `kept`."""
        for caption in captions:
            if caption not in kept:
                with torch.no_grad(), self.context.text_on_device():
                    kept[caption] = self.backbone.encode([caption])
        return Conditioning.cat([kept[c] for c in captions])

    def _loss_weight(self, state: Step) -> Tensor | None:
        return without_given(self.recipe.objective.weight(state.batch.mask, state.batch.valid), state.t)

    def _example_loss(self, state: Step) -> Tensor:
        objective = self.recipe.objective
        losses = objective.example_losses(state.prediction, state.target, self._loss_weight(state))
        return losses * objective.time_weight(self.backbone, per_row(state.t))

    def _class_step(self, state: Step) -> tuple[Tensor, Tensor, list[str]]:
        """Returns the noisy latents, times and class prompts of the instance examples."""
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
        return self.backbone.predict(x_t, t, self.encode(prompts, per_row(t)))

    def _base_class_prediction(self, state: Step) -> Tensor:
        x_t, t, prompts = self._class_step(state)
        with torch.no_grad(), self.backbone.active(self.context.loaded_strengths):
            if self.recipe.train.cache and not self.backbone.varies_with(prompts):
                return self.backbone.predict(x_t, t, self._kept(prompts, self._base_text))
            return self.backbone.predict(x_t, t, self.backbone.encode(prompts, per_row(t)))

    def _token_drift(self, state: Step) -> Tensor:
        initial = self.context.initial_parameters
        pairs = [
            (now, start)
            for name in self.class_nouns
            for now, start in zip(self.backbone.placeholders[name].parameters(), initial[name], strict=True)
        ]
        return torch.cat([((now - start) ** 2).sum(-1).flatten() for now, start in pairs])

    def _class_prompt(self, caption: str) -> str:
        """Returns the caption for the base model, with the concept's words replaced by its class noun."""
        for words, name in sorted(self._name_of.items(), key=lambda pair: -len(pair[0])):
            if words:
                caption = caption.replace(words, f"<{name}>")
        return without(caption, self.class_nouns)


def without_given(weight: Tensor | None, t: Tensor) -> Tensor | None:
    """Returns the objective's weight ([B, 1, (f), h, w]) with zeros on noise-free frames, where t ([B, f]) is 0."""
    if t.ndim < 2:
        return weight
    asked = (t != 0).float()[:, None, :, None, None]
    return asked if weight is None else weight * asked


def _for(part: Needing, state: Step) -> Step:
    """Returns the step as one part sees it, with only the needs that it declared."""
    lazy: Mapping[str, Callable[[], Any]] = {name: serve for name, serve in state.lazy.items() if name in part.needs}
    return replace(state, lazy=lazy)
