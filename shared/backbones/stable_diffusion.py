"""Stable Diffusion 1.x and 2.x, and the toybox. Each is a U-Net with cross-attention to one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.backbones.attention_sites import Kind, Site
from shared.backbones.base_backbone import BaseBackbone
from shared.backbones.forward_process import PREDICTIONS, times
from shared.backbones.module_roles import RoleSpec, denoiser_roles
from shared.types import Conditioning, SiteContext

_QKVO = r"(to_q|to_k|to_v|to_out\.0)"
_CLIP = r"(text_model\.)?encoder\.layers\.\d+\."
_BLOCK = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
_SPATIAL = _BLOCK + r"attentions\.\d+\."  # excludes motion modules, whose layers have the same names
_LAYER = _SPATIAL + r"transformer_blocks\.\d+\."
_TEMPORAL = _BLOCK + r"motion_modules\.\d+\.transformer_blocks\.\d+\.attn[12]\."


def _unet(pattern: str) -> tuple[RoleSpec, ...]:
    return (RoleSpec("unet", pattern),)


def _self(leaf: str) -> tuple[RoleSpec, ...]:
    """Returns the specs for self-attention layers, which are part of a transformer block or stand alone in a block that
    takes no text (AttnDownBlock2D)."""
    return _unet(rf"({_LAYER}attn1\.|{_SPATIAL}){leaf}")


ROLES = {
    **denoiser_roles("unet"),
    "attention": _unet(rf"({_LAYER}attn[12]\.|{_SPATIAL}){_QKVO}"),
    "self_attention": _self(_QKVO),
    "self_attention.kv": _self("to_[kv]"),
    "self_attention.q": _self("to_q"),
    "cross_attention": _unet(rf"{_LAYER}attn2\.{_QKVO}"),
    "cross_attention.kv": _unet(_LAYER + r"attn2\.to_[kv]"),
    "cross_attention.q": _unet(_LAYER + r"attn2\.to_q"),
    "temporal_attention": _unet(_TEMPORAL + _QKVO),
    "temporal_attention.kv": _unet(_TEMPORAL + "to_[kv]"),
    "temporal_attention.q": _unet(_TEMPORAL + "to_q"),
    "feed_forward": _unet(_LAYER + r"ff\.net\.(0\.proj|2)"),
    "conv": _unet(_BLOCK + r"resnets\.\d+\.conv(1|2|_shortcut)"),
    "proj": _unet(_SPATIAL + r"proj_(in|out)"),
    "text_encoder": (RoleSpec("text_encoder", _CLIP + r"self_attn\.(q|k|v|out)_proj"),),
    "text_encoder.mlp": (RoleSpec("text_encoder", _CLIP + r"mlp\.fc[12]"),),
}


class StableDiffusionBackbone(BaseBackbone):
    """A diffusers `StableDiffusionPipeline` behind the protocol.

    Args:
        pipe: the pipeline; its networks are used in place and frozen, and its tokenizer is left unchanged
        name: the model's name as the user gave it

    Raises:
        ValueError: when this family does not support this kind of U-Net (inpainting, guidance-distilled, …)
    """

    family = "stable_diffusion"
    role_table = ROLES

    def __init__(self, pipe: Any, name: str = "") -> None:
        text = pipe.text_encoder
        limit = min(pipe.tokenizer.model_max_length, text.config.max_position_embeddings)
        super().__init__(
            name=name,
            components={"unet": pipe.unet, "text_encoder": text},
            tokenizers={"text_encoder": pipe.tokenizer},
            max_length={"text_encoder": limit},
            vae=pipe.vae,
            scheduler=pipe.scheduler,
        )
        self.unet: Any = pipe.unet
        _check_unet(self.unet, self.vae.config.latent_channels)
        size = self.unet.config.sample_size
        self.resolution = (size if isinstance(size, int) else max(size)) * self.vae_factor
        self.prediction_type = _prediction_type(self.scheduler)
        self.alphas_cumprod = _alphas_cumprod(self.scheduler)
        self.num_train_timesteps = len(self.alphas_cumprod)
        self._sites = _sites(self.unet)
        self._routes: dict[str, tuple[nn.Module, Any]] = {}

    def pipeline(self) -> Any:
        """Returns a diffusers pipeline around the same networks, with the base tokenizer and a new scheduler."""
        from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

        parts: dict[str, Any] = {**self._components, "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(
            vae=self.vae,
            tokenizer=self.tokens.base["text_encoder"],
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            requires_safety_checker=False,
            **parts,
        )

    def sites(self) -> tuple[Site, ...]:
        return self._sites

    # --- the forward process -------------------------------------------------------------------------------

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma from the scheduler's table, interpolating alpha_bar linearly between integer timesteps.

        Args:
            t: [B] or a scalar, in [0, 1000). For clips, also [B, f], with one time per frame
        """
        t = times(t)
        table = self.alphas_cumprod.to(t.device)
        if not t.is_floating_point():
            bar = table[t]
        else:
            low = t.floor().clamp(0, len(table) - 1)
            high = (low + 1).clamp_max(len(table) - 1)
            bar = torch.lerp(table[low.long()], table[high.long()], (t - low).clamp(0, 1).to(table.dtype))
        return bar.sqrt(), (1 - bar).sqrt()

    # --- the network ---------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the U-Net's output for x_t. The output has the same shape and is in the backbone's own parametrisation.

        Args:
            x_t: [B, C, h, w]
            t: [B] or a scalar
            conditioning: its context is one tensor, or one `SiteContext` for each of `text_sites()`

        Raises:
            ValueError: when the conditioning lacks the context for a site, when it has image tokens, regions or size_ids, or
                when shapes do not match
        """
        self._refuse_unread(conditioning, len(x_t))
        context = conditioning.context
        if not isinstance(context, Tensor):
            context = self._route(context)
        dtype = self.unet.dtype
        t = self._told(t, x_t)
        with self._predictions.under_way(len(x_t), t):
            return self._run_denoiser(x_t.to(dtype), t, context.to(dtype))

    def _run_denoiser(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Runs the network once on x_t [B, C, h, w] at times t [B], with the context [B, L, D]."""
        return self.unet(x_t, t, encoder_hidden_states=context, return_dict=False)[0]

    def _route(self, contexts: Mapping[str, SiteContext]) -> Tensor:
        """Concatenates the keys and values of all S sites into one context [B, L, 2*S*D], and adds hooks that pass each
        `to_k` and `to_v` its own slice of it.

        The context is an ordinary argument of the network and the hooks are stateless, so layers that gradient checkpointing
        reruns in the backward pass see the same inputs as in the forward pass. The hooks leave a plain context (of width D)
        unchanged.
        """
        names = self.text_sites()
        missing = [n for n in names if n not in contexts]
        if missing:
            raise ValueError(f"{self.family}: the conditioning has no context for the sites {', '.join(missing)}")
        width = contexts[names[0]].key.shape[-1]
        for i, name in enumerate(names):
            for j, leaf in enumerate(("to_k", "to_v")):
                self._install(f"{name}.{leaf}", 2 * i + j, width, 2 * len(names) * width)
        return torch.cat([part for n in names for part in (contexts[n].key, contexts[n].value)], dim=-1)

    def _install(self, path: str, index: int, width: int, total: int) -> None:
        module = self.unet.get_submodule(path)
        known = self._routes.get(path)
        if known is not None and known[0] is module:
            return
        if known is not None:  # the layer has since been wrapped or unwrapped
            known[1].remove()

        def take(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if args[0].shape[-1] != total:
                return args
            return (args[0][..., index * width : (index + 1) * width], *args[1:])

        self._routes[path] = (module, module.register_forward_pre_hook(take))

    def remove(self, name: str) -> None:
        """Removes everything attached under this name. Raises ValueError if nothing is attached under it."""
        super().remove(name)
        if not self.placeholders:
            for _, handle in self._routes.values():
                handle.remove()
            self._routes.clear()

    def _run_text(self, component: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        encoder: Any = self._components[component]
        attention_mask = mask if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(ids, attention_mask=attention_mask)[0], None


def _check_unet(unet: Any, channels: int) -> None:
    if unet.config.in_channels != channels:
        raise ValueError(
            f"stable_diffusion: the U-Net expects {unet.config.in_channels} channels but gets {channels} (an inpainting model?)"
        )
    for key in ("time_cond_proj_dim", "addition_embed_type", "class_embed_type"):
        if unet.config.get(key) is not None:
            raise ValueError(f"stable_diffusion: this family does not support U-Nets with {key} ({unet.config[key]!r})")


def _prediction_type(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS[:3]:
        raise ValueError(
            f"stable_diffusion: unknown prediction type {kind!r}. Supported: {', '.join(PREDICTIONS[:3])}."
        )
    return kind


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """Returns the scheduler's alpha_bar for each training timestep, as a float32 tensor [T] on the CPU."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

        same: Any = DDPMScheduler.from_config(scheduler.config)
        table = same.alphas_cumprod
    return torch.as_tensor(table).float().cpu()


def _sites(unet: Any) -> tuple[Site, ...]:
    """Returns the attention layers in the order of the forward pass, with their scales relative to the latents."""
    from diffusers.models.attention_processor import Attention

    scales: dict[str, int] = {}
    scale = 1
    for i, block in enumerate(unet.down_blocks):
        scales[f"down_blocks.{i}."] = scale
        scale *= 2 if getattr(block, "downsamplers", None) else 1
    scales["mid_block."] = scale
    for i, block in enumerate(unet.up_blocks):
        scales[f"up_blocks.{i}."] = scale
        scale //= 2 if getattr(block, "upsamplers", None) else 1
    attention = {n: m for n, m in unet.named_modules() if isinstance(m, Attention)}
    sites = []
    for prefix, size in scales.items():
        # a block calls its attention layers in order, each followed by the motion module with the same index
        inside = sorted((n for n in attention if n.startswith(prefix)), key=lambda n: _turn(n.removeprefix(prefix)))
        sites += [Site(name, _kind(name, attention[name]), size) for name in inside]
    return tuple(sites)


def _turn(name: str) -> tuple[int, bool]:
    """Returns a sort key for the order in which a block calls its attention layers ("attentions.1.…", "motion_modules.1.…")."""
    return int(name.split(".")[1]), name.startswith("motion_modules.")


def _kind(name: str, layer: Any) -> Kind:
    if ".motion_modules." in name:
        return "temporal"
    return "cross" if layer.is_cross_attention else "self"
