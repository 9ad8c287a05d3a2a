"""The interface that a model family offers to the rest of the suite.

A backbone is a frozen diffusion model behind one small protocol. It wraps diffusers classes and defines *roles* and *sites*.
It contains no method-specific logic. `t` is the model's own training time, in [0, 1000) (see `shared.types`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared.backbones.attention_edits import At, Edit
from shared.backbones.attention_maps import Record, Watch
from shared.backbones.attention_sites import Site
from shared.backbones.built_on import AddedNetwork
from shared.backbones.placement import Placement
from shared.backbones.synthetic_world import World
from shared.types import Conditioning, SiteContext

Resolution = Literal["exact", "port"]


@dataclass(frozen=True)
class Group:
    """The modules that a role stands for in one component."""

    role: str
    component: str  # "unet", "transformer", "text_encoder", "text_encoder_2"
    # dotted paths of linear and convolution layers; for "denoiser.all", of every module that directly holds parameters
    modules: tuple[str, ...]
    resolution: Resolution = "exact"
    note: str = ""  # for a port, describes the layers that stand in for the role


@runtime_checkable
class Adapter(Protocol):
    """A trainable change that is injected into a backbone under a concept's name and has an adjustable strength."""

    @property
    def slot(self) -> str:
        """The trainable slot of the recipe that the adapter comes from. It distinguishes adapters that share a name."""
        ...

    def train(self, mode: bool) -> None:
        """Turns the adapter's training behaviour, such as dropout, on or off. Does not affect the network itself."""
        ...

    def set_strength(self, strength: float) -> None:
        """Sets the strength. At 0, the adapter has no effect at all; at 1, it works as trained."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the adapter's tensors in fp32 on the CPU. Keys begin with the component (`unet.….lora_A.weight`)."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the tensors. Raises ValueError when keys or shapes do not match exactly."""
        ...

    def eject(self) -> None:
        """Removes the adapter. Restores the modules, their outputs and their repr."""
        ...


@runtime_checkable
class Placeholder(Protocol):
    """A modifier attached to a backbone for one concept. It defines what replaces `<name>` in prompts and how that text is
    encoded."""

    name: str
    frozen: bool  # loaded from a concept rather than trained
    words: str  # the text that replaces `<name>` in a prompt, e.g. "<my-mug> <my-mug>_1 mug"
    tokens: tuple[str, ...]  # tokens added to the tokenizers; may be empty
    components: tuple[str, ...]  # the text encoders for which it learns vectors; empty if it learns none
    varies_with: frozenset[str]  # subset of {"time", "site"}; if empty, the encoding can be cached

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        """Returns the input embeddings of `tokens` in this text encoder: [n, d], or [B, n, d] if they vary with time. Returns
        None if there are no added tokens."""
        ...

    def edit(self, context: SiteContext, positions: Tensor, t: Tensor | None, site: str | None) -> SiteContext:
        """Returns the text encoder's output with this concept's edits. `positions` is a bool mask [B, L], True at this
        concept's tokens."""
        ...

    def set_strength(self, strength: float) -> None:
        """Sets the strength. Strength 0 is the initial state, and strength 1 is the learned state. A placeholder that cannot
        interpolate raises ValueError for any strength but 1."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the learned tensors in fp32 on the CPU, with keys chosen by the placeholder."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the tensors. Raises ValueError when keys or shapes do not match exactly."""
        ...

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Returns the initial state under the keys of `state_dict`, or an empty dict if the placeholder cannot interpolate."""
        ...

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the initial state. Raises ValueError when keys or shapes do not match exactly."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A frozen diffusion model. The model itself is never trained; trainable parts are attached as `adapters` and
    `placeholders`.

    Pixels are [B, 3, H, W] and latents [B, C, h, w]; a clip model also takes [B, 3, F, H, W] and [B, C, f, h, w].
    """

    family: str  # "stable_diffusion", "flux"
    name: str  # as the user gave it; "toybox" for the embedded model
    checkpoint: str  # identity of the weights; differs between two checkpoints of one architecture
    autoencoder: str  # identity of the autoencoder's weights
    resolution: int  # default picture size in pixels
    frames: int | None  # default frame count of a clip; None if the model generates pictures
    frame_rate: float | None  # frames per second of clips; None if the network does not take it as input
    frames_apart: bool  # whether self-attention processes each frame of a clip separately
    frame_factor: int  # frames per latent frame; if greater than 1, the first latent frame covers only one frame
    prediction_type: str  # "epsilon", "v_prediction", "sample", "flow"
    discrete_time: bool  # whether the model was trained on integer timesteps
    time_per_frame: bool  # whether `predict` accepts one time per frame of a clip, t [B, f]
    world: World | None  # the synthetic world that the model was trained on; None for the real world
    context_component: str  # the text encoder whose hidden states are the context
    vae: Any  # maps between pixels and latents; never trained
    placement: Placement | None  # moves networks that take turns on the device; None if all of them stay there
    added: tuple[AddedNetwork, ...]  # networks that were loaded from other folders and added to the model
    adapters: dict[str, list[Adapter]]
    placeholders: dict[str, Placeholder]

    @property
    def reads(self) -> frozenset[str]:
        """The families whose concepts can fit this model, including its own. A concept fits if the layers that it changes
        have the same shapes here as in the model it was learned on."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def latent_dtype(self) -> torch.dtype:
        """The dtype of latents during sampling."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that makes the predictions, or the first one if there are several."""
        ...

    @property
    def noise_ranges(self) -> Mapping[str, tuple[float, float]]:
        """The names of the denoising networks, each with its time range [from, to). There is either one network for all times,
        or one expert per noise range (Wan 2.2). Experts have the same layers."""
        ...

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """Every network that concepts can change, by name: the denoiser (or one per noise range) and the text encoders."""
        ...

    # text
    @property
    def pooled_component(self) -> str | None:
        """The text encoder whose pooled output is `Conditioning.pooled`, or None."""
        ...

    @property
    def max_length(self) -> Mapping[str, int]:
        """The number of tokens per prompt that each text encoder reads, including special tokens."""
        ...

    def encode(self, prompts: Sequence[str], t: Tensor | None = None) -> Conditioning:
        """Encodes B expanded prompts. The result contains the context [B, L, D] (or one context per site) and, if the model
        uses it, the pooled output [B, P]. `t` ([B]) is required if the encoding of a concept's name varies with time."""
        ...

    def word_positions(self, prompts: Sequence[str], words: str) -> Tensor:
        """Returns a bool mask [B, L] over the context's tokens, True where `words` occur in these prompts, but not inside
        longer words. `words` may be any text, or `shared.backbones.added_tokens.END` for the end-of-text token. Raises
        ValueError if `words` is empty."""
        ...

    def varies_with(self, prompts: Sequence[str]) -> frozenset[str]:
        """Returns what the encoding of these prompts varies with ("time", "site"). If empty, the encoding can be cached."""
        ...

    def check_prompt(self, prompt: str) -> None:
        """Raises ValueError if the context's text encoder would truncate the prompt, or if any text encoder would truncate a
        concept's name. The message quotes the text that would be cut off."""
        ...

    # pictures
    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes pixels [B, 3, H, W] in [-1, 1] to latents [B, C, h, w]. With a generator, samples the latents; without one,
        returns their mean. The result is differentiable."""
        ...

    def latent_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the latents, each [B, C, h, w], so that callers can cache them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents to pixels in [-1, 1]."""
        ...

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Returns the latent shape, which is (C, h, w) for a picture and (C, f, h, w) for a clip of `frames` frames. Raises
        ValueError when the model cannot generate pictures of this size or clips of this length."""
        ...

    # the forward process; every function accepts `t` as [B] or a scalar, and for clips also as [B, f] (one per frame), and
    # raises ValueError for any other shape
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma of x_t = alpha * x_0 + sigma * noise."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mixes clean latents and noise, each [B, C, h, w], into x_t [B, C, h, w]."""
        ...

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the training target of `predict`, [B, C, h, w], in the model's own parametrisation."""
        ...

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the clean latents implied by a prediction at x_t, all [B, C, h, w]."""
        ...

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the noise implied by a prediction at x_t, all [B, C, h, w]."""
        ...

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's output for x_t ([B, C, h, w]). The output has the same shape and is in the network's own
        parametrisation. Raises ValueError when the network does not support something in the conditioning, or when the
        frames of a clip have different times but the network takes only one time per clip."""
        ...

    @property
    def prediction_time(self) -> Tensor | None:
        """The times [B] of the current prediction, for adapters that vary with time. None outside `predict`."""
        ...

    def recomputing(self) -> AbstractContextManager[None]:
        """Returns a context for gradient checkpointing. Layers that are rerun in it see the times of the current prediction."""
        ...

    # sampling
    scheduler: Any  # the family's own diffusers scheduler; others are built from its configuration
    default_guidance: float
    default_steps: int

    def set_timesteps(self, scheduler: Any, steps: int, latent_shape: Sequence[int]) -> None:
        """Sets a scheduler's timesteps in the same way as the family's diffusers pipeline."""
        ...

    def needs_negative(self, guidance: float) -> bool:
        """Whether sampling with this guidance uses the negative prompt."""
        ...

    def predict_guided(
        self, x_t: Tensor, t: Tensor, positive: Conditioning, negative: Conditioning | None, guidance: float
    ) -> Tensor:
        """Predicts with classifier-free guidance, or with the model's distilled guidance. If `negative` is None and the model
        has no distilled guidance, predicts without guidance."""
        ...

    def pipeline(self) -> Any:
        """Returns the family's diffusers pipeline around the same networks, with base tokenizers."""
        ...

    # names of modules
    def roles(self) -> tuple[str, ...]:
        """Returns the roles for which this network has modules."""
        ...

    def group(self, role: str) -> tuple[Group, ...]:
        """Returns the modules of a role, as one Group per component. Raises ValueError, listing the available roles, if this
        network does not have the role.

        Among self_attention, cross_attention, temporal_attention, feed_forward, conv and proj, no layer is in two exact groups
        or in two ports. A port may borrow the layers of one exact group; its note then names that group's role. For
        example, layers that attend jointly over space and time are the exact "self_attention" and also serve as the port
        "temporal_attention". "denoiser" stands for every linear and convolution layer of the denoiser. "denoiser.all", for
        full fine-tuning, stands for every module of the denoiser that directly holds parameters, including norms and
        embeddings.
        """
        ...

    def sites(self) -> tuple[Site, ...]:
        """Returns the attention layers, in the order of the forward pass."""
        ...

    def text_sites(self) -> tuple[str, ...]:
        """Returns the names of the sites that can each take a separate text context. There are no such sites if
        picture and text attend jointly."""
        ...

    def attending(self, *edits: Edit | At | Watch) -> AbstractContextManager[Record]:
        """Returns a context in which attention layers apply these edits and record the watched maps; see
        `shared.backbones.attending`. Raises ValueError when an edit or watch matches no site, or matches a layer with a custom
        processor."""
        ...

    def keep_attending(self, name: str, *edits: At) -> None:
        """Applies these edits from now on, whenever the concept `name` has a nonzero strength. They replace the concept's
        earlier edits; if no edits are passed, the earlier ones are just removed. See `shared.backbones.attending`. Raises
        ValueError under the same conditions as `attending`."""
        ...

    # attached concepts, by name
    def add_placeholder(self, placeholder: Placeholder) -> None:
        """Adds the placeholder's tokens to every tokenizer and registers the placeholder. Raises ValueError when a token or the
        name is taken."""
        ...

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Registers an injected adapter under a concept's name, which several adapters may share. A new name starts at
        strength 1."""
        ...

    def remove(self, name: str) -> None:
        """Removes everything attached under this name. Restores the model's outputs, repr and tokenizers."""
        ...

    def word_embeddings(self, component: str, words: str) -> Tensor:
        """Returns a detached copy of the input embeddings [n, d] of `words` in this text encoder, without special tokens."""
        ...

    def word_pieces(self, component: str, words: str) -> tuple[str, ...]:
        """Returns the sub-tokens into which this text encoder's tokenizer splits `words`."""
        ...

    def table_spread(self, component: str) -> float:
        """Returns the standard deviation of all values in this text encoder's input embeddings."""
        ...

    # strengths
    @property
    def strengths(self) -> dict[str, float]:
        """The current strength of each concept's adapters, or of its learned words if it has no adapters. 0 means off."""
        ...

    def active(self, strengths: Mapping[str, float]) -> AbstractContextManager[None]:
        """Returns a context in which only the adapters of these concepts are on, each with the given strength.

        Learned words take the strength given for their concept. The words of other concepts keep their strength, because they
        take effect only if the prompt contains them.
        """
        ...

    def set_strength(self, name: str, strength: float) -> None:
        """Sets the strength of one concept's adapters and learned words. Unlike `active`, this lasts. Raises ValueError if the
        name is unknown or the concept has nothing that a strength can scale."""
        ...
