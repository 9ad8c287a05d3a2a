"""The base class of all model families. It manages concepts' placeholders, adapters and strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared.backbones.added_tokens import TokenOverlay
from shared.backbones.attending import Attending
from shared.backbones.attention_rows import PredictionRows, Rows
from shared.backbones.attention_sites import Site
from shared.backbones.built_on import AddedNetwork
from shared.backbones.checkpoint_identity import checkpoint_identity
from shared.backbones.forward_process import ForwardProcess, frame_times
from shared.backbones.latents import LatentCodec
from shared.backbones.module_roles import RoleSpec, resolve, there_are
from shared.backbones.placement import Placement
from shared.backbones.protocol import Adapter, Group, Placeholder
from shared.backbones.synthetic_world import World
from shared.backbones.text import TextEncoding
from shared.types import Conditioning


class BaseBackbone(TextEncoding, LatentCodec, ForwardProcess, Attending):
    """The components of a frozen pipeline, with the adapters and placeholders attached to them. Each family implements the
    abstract methods.

    Args:
        name: the model's name as the user gave it
        components: the networks that concepts can change, by name, with the denoiser first
        tokenizers: the base tokenizers, by text-encoder name
        max_length: the maximum number of tokens per prompt, by text-encoder name
        vae: an AutoencoderKL
        scheduler: the family's own scheduler; sampling schedulers are built from its configuration
    """

    family: str = ""
    role_table: Mapping[str, Sequence[RoleSpec]] = {}
    default_guidance: float = 7.5
    default_steps: int = 50
    discrete_time: bool = True  # whether the model was trained on integer timesteps
    time_per_frame: bool = False  # whether `predict` accepts one time per frame of a clip, t [B, f]
    world: World | None = None
    frames: int | None = None  # default frame count of a clip; None if the model generates pictures
    frame_rate: float | None = None  # frames per second, for networks that take it as input
    frames_apart: bool = False  # whether self-attention processes each frame of a clip separately

    def __init__(
        self,
        *,
        name: str,
        components: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        max_length: Mapping[str, int],
        vae: nn.Module,
        scheduler: Any,
    ) -> None:
        self.name = name
        self._components = dict(components)
        self.tokens = TokenOverlay(tokenizers, max_length)
        self.vae: Any = vae
        self.scheduler = scheduler
        self.placement: Placement | None = None  # set only while networks take turns on the device
        self.added: tuple[AddedNetwork, ...] = ()
        self.adapters: dict[str, list[Adapter]] = {}
        self.placeholders: dict[str, Placeholder] = {}
        self._strengths: dict[str, float] = {}  # strengths of the adapters, by concept
        self._placeholder_strengths: dict[str, float] = {}
        self._warned: set[str] = set()
        self._predictions = PredictionRows()
        self._kept_edits, self._replaced = {}, []
        for module in (*self._components.values(), vae):
            module.requires_grad_(False)
            module.eval()
        networks = {**self._components, "vae": vae}
        self.checkpoint = checkpoint_identity(networks)
        self.autoencoder = checkpoint_identity({"vae": vae})

    # --- components ----------------------------------------------------------------------------------------

    @property
    def reads(self) -> frozenset[str]:
        """The families whose concepts can fit this model: its own and, if it is built on another family, that one as well."""
        return frozenset({self.family})

    @property
    def denoiser(self) -> nn.Module:
        return next(iter(self._components.values()))

    @property
    def noise_ranges(self) -> Mapping[str, tuple[float, float]]:
        """The names of the denoising networks, each with its time range [from, to). Together, the ranges cover all times."""
        return {next(iter(self._components)): (0.0, 1000.0)}

    @property
    def device(self) -> torch.device:
        """The device used for computation. If networks take turns on it, some may currently be in main memory."""
        return self.placement.device if self.placement else next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_dtype(self) -> torch.dtype:
        """The dtype of latents during sampling, as in the family's diffusers pipeline."""
        return self.dtype

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return self._components

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BaseBackbone:
        """Moves every network in place. If `device` is given, all networks stay on it from now on."""
        if self.placement and device is not None:
            self.placement.close()
            self.placement = None
        target: dict[str, Any] = {"device": device} if device is not None else {}
        if dtype is not None:  # diffusers warns about any `dtype` argument, even None
            target["dtype"] = dtype
        for module in (*self._components.values(), self.vae):
            module.to(**target)
        return self

    def roles(self) -> tuple[str, ...]:
        """Returns the roles for which this network has modules."""
        return there_are(self.role_table, self._components)

    def group(self, role: str) -> tuple[Group, ...]:
        """Returns the modules of a role, as one Group per component. Raises ValueError, listing the available roles, if this
        network does not have the role."""
        return resolve(role, self.role_table, self._components, self.family)

    def sites(self) -> tuple[Site, ...]:
        """Returns the attention layers, in the order of the forward pass."""
        raise NotImplementedError

    def text_sites(self) -> tuple[str, ...]:
        """Returns the names of the sites that can each take a separate text context."""
        return tuple(s.name for s in self.sites() if s.kind == "cross")

    # --- attached concepts ---------------------------------------------------------------------------------

    def add_placeholder(self, placeholder: Placeholder) -> None:
        """Adds the placeholder's tokens to every tokenizer and registers the placeholder. Raises ValueError when a token or the
        name is taken."""
        if placeholder.name in self.placeholders:
            raise ValueError(f"a concept named {placeholder.name!r} is already attached; remove it first")
        self.tokens.check_new(placeholder.tokens)
        self.placeholders[placeholder.name] = placeholder
        self._placeholder_strengths[placeholder.name] = 1.0
        self._refresh_tokens()

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Registers an injected adapter under a concept's name. It gets that name's current strength (1 for a new name)."""
        self.adapters.setdefault(name, []).append(adapter)
        adapter.set_strength(self._strengths.setdefault(name, 1.0))

    def remove(self, name: str) -> None:
        """Removes everything attached under this name. Raises ValueError if nothing is attached under it."""
        if name not in self.adapters and name not in self.placeholders:
            raise ValueError(self._unknown([name]))
        self.keep_attending(name)
        for adapter in reversed(self.adapters.pop(name, [])):
            adapter.eject()
        self._strengths.pop(name, None)
        self._placeholder_strengths.pop(name, None)
        if self.placeholders.pop(name, None) is not None:
            self._refresh_tokens()

    def _refresh_tokens(self) -> None:
        self.tokens.set([t for n in self.placeholders.values() for t in n.tokens])
        self._warned.clear()  # check again, because truncated text may now contain a concept's name

    # --- strengths -----------------------------------------------------------------------------------------

    @property
    def strengths(self) -> dict[str, float]:
        """A new dictionary with the current strength of each concept's adapters, or of its learned words if it has no
        adapters. 0 means off."""
        learned = {name: s for name, s in self._placeholder_strengths.items() if self.placeholders[name].components}
        return {**learned, **self._strengths}

    @contextmanager
    def active(self, strengths: Mapping[str, float]) -> Iterator[None]:
        """Inside the context, only the adapters of these concepts are on, each with the given strength.

        Learned words take the strength given for their concept. The words of other concepts keep their strength, because they
        take effect only if the prompt contains them. The previous strengths are restored at the end, even in nested contexts
        and after exceptions. Listing a concept that learned nothing has no effect. Raises ValueError for names that are not
        attached.
        """
        missing = [n for n in strengths if n not in self.adapters and n not in self.placeholders]
        if missing:
            raise ValueError(self._unknown(missing))
        adapters, words = dict(self._strengths), dict(self._placeholder_strengths)
        try:
            self._switch({name: float(strengths.get(name, 0.0)) for name in self.adapters})
            self._say({name: float(s) for name, s in strengths.items()})
            yield
        finally:
            self._switch(adapters)
            self._say(words)

    def set_strength(self, name: str, strength: float) -> None:
        """Sets the strength of one concept's adapters and learned words. Unlike `active`, this lasts. Raises ValueError if the
        name is unknown or the concept has nothing that a strength can scale."""
        if name not in self.strengths:
            known = name in self.placeholders
            words = f"{name!r} learned nothing that a strength could scale: it uses only words the model already knows"
            raise ValueError(words if known else self._unknown([name]))
        self._say({name: float(strength)})
        self._switch({name: float(strength)})

    def _switch(self, strengths: Mapping[str, float]) -> None:
        for name, strength in strengths.items():
            if name in self.adapters and self._strengths[name] != strength:
                self._strengths[name] = strength
                for adapter in self.adapters[name]:
                    adapter.set_strength(strength)

    def _say(self, strengths: Mapping[str, float]) -> None:
        for name, strength in strengths.items():
            if name in self.placeholders and self._placeholder_strengths[name] != strength:
                self.placeholders[name].set_strength(strength)
                self._placeholder_strengths[name] = strength

    def _unknown(self, names: Sequence[str]) -> str:
        loaded = ", ".join(sorted({*self.adapters, *self.placeholders})) or "none"
        return f"nothing named {', '.join(map(repr, names))} is loaded. Loaded: {loaded}."

    # --- prediction ----------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's output for x_t ([B, C, h, w]). The output has the same shape and is in the network's own
        parametrisation."""
        raise NotImplementedError

    def _refuse_unread(self, conditioning: Conditioning, batch: int) -> None:
        """Raises ValueError for conditioning that this family does not support, and for a wrong batch size."""
        if conditioning.batch_size != batch:
            raise ValueError(
                f"{self.family}: the batch size is {batch}, but the conditioning is for {conditioning.batch_size}"
            )
        if conditioning.image_tokens:
            raise ValueError(f"{self.family}: image tokens need layers that attend to them, but none are attached")
        if conditioning.regions:
            names = ", ".join(sorted(conditioning.regions))
            raise ValueError(
                f"{self.family}: regions ({names}) need attention restricted to them, but no such attention is attached"
            )
        if conditioning.size_ids is not None:
            raise ValueError(f"{self.family}: size_ids are for models that take picture sizes, and this one does not")
        if (conditioning.context_mask is not None) != self.masks_context:
            why = "is missing: this network needs" if self.masks_context else "is only for networks that need"
            raise ValueError(f"{self.family}: context_mask {why} to know where the text is padding")

    def _told(self, t: Tensor | float, x_t: Tensor) -> Tensor:
        """Returns the times to pass to the network: [B], or [B, f] if `t` has one time per frame and the network accepts that.

        Raises ValueError if the network takes one time per clip but the frames have different times.
        """
        t = frame_times(t, x_t)
        if t.ndim == 1 or self.time_per_frame:
            return t
        if not bool((t == t[:, :1]).all()):
            raise ValueError(
                f"{self.family} takes one timestep for all frames of a clip, but these frames have different ones"
            )
        return t[:, 0]

    def needs_negative(self, guidance: float) -> bool:
        """Whether sampling with this guidance uses the negative prompt."""
        return guidance > 1

    def predict_guided(
        self, x_t: Tensor, t: Tensor, positive: Conditioning, negative: Conditioning | None, guidance: float
    ) -> Tensor:
        """Predicts with classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6), with both prompts in one batch. If
        `negative` is None, predicts without guidance.

        Args:
            x_t: [B, C, h, w]
            t: a scalar or [B]; if `time_per_frame` is set, [B, f] is also accepted
            guidance: the guidance scale. As in diffusers, the result is negative + guidance * (positive - negative), so a
                scale of 1 means no guidance
        """
        t = self._told(t, x_t)
        if negative is None:
            return self.predict(x_t, t, positive)
        with self._predictions.holding(Rows.guided(len(x_t))):
            both = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([negative, positive]))
        off, on = both.chunk(2)
        return off + guidance * (on - off)

    def set_timesteps(self, scheduler: Any, steps: int, latent_shape: Sequence[int]) -> None:
        """Sets a scheduler's timesteps in the same way as the family's diffusers pipeline."""
        scheduler.set_timesteps(steps, device=self.device)

    def pipeline(self) -> Any:
        """Returns the family's diffusers pipeline, built around the same networks."""
        raise NotImplementedError
