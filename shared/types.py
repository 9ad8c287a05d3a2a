"""The frozen dataclasses that the parts of the suite exchange. Comments give the shapes of tensors.

Legend: B batch, C channels, H and W pixels, h and w latent cells, L text tokens, D width of the text context, F frames,
f latent frames. An axis in parentheses exists only for clips, so [3, (F), H, W] is a picture [3, H, W] or a clip
[3, F, H, W]. Pixels are float32 in [-1, 1] unless a name says otherwise, and masks are float32 in [0, 1]. `t` is the
model's own training time, in [0, 1000). For epsilon and v models it is a timestep, and for flow matching it is
1000 * sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from shared.backbones.protocol import Backbone

Role = Literal["instance", "prior"]


@dataclass(frozen=True)
class Subject:
    """The user's input: pictures or clips of one subject (or of one motion), and the subject's class."""

    images: tuple[Path, ...] = ()  # files; `shared.io.find_pictures.list_pictures` finds those in a folder
    class_noun: str = ""  # "mug"; empty for concepts without one (a style, a motion)
    captions: Mapping[Path, str] = field(default_factory=dict)  # optional; keyed by picture or clip
    masks: Mapping[Path, Path] = field(default_factory=dict)  # optional; keyed by picture or clip
    clips: tuple[Path, ...] = ()  # files, or folders of frames

    @property
    def files(self) -> tuple[Path, ...]:
        """All pictures and clips to learn from."""
        return (*self.images, *self.clips)


@dataclass(frozen=True)
class Example:
    """One picture or clip on its way into a batch. It may show several subjects, each with its own mask.

    Raises ValueError if it has no owners, or if the shapes of the pixels, masks and valid area do not match.
    """

    pixels: Tensor  # [3, (F), H, W] in [-1, 1]
    caption: str  # may contain {concept}, {class_noun} or <name>; resolved by the prompt part
    owners: tuple[str, ...]  # the subjects that it shows; the subject named in the caption comes first
    role: Role = "instance"
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # owner -> its mask [1, (F), H, W] in [0, 1]
    valid: Tensor | None = None  # [1, (F), H, W] in [0, 1]: where the picture is real (not padding)
    source: str = ""  # the file that it came from; used to look up the file's own adapters
    user_caption: bool = False  # whether the caption is the user's own, which templates do not replace

    def __post_init__(self) -> None:
        if not self.owners:
            raise ValueError(f"{self.source}: an example needs at least one owner")
        if self.pixels.ndim not in (3, 4) or self.pixels.shape[0] != 3:
            shape = list(self.pixels.shape)
            raise ValueError(f"{self.source}: pixels must be [3, H, W], or [3, F, H, W] for a clip, not {shape}")
        planes = {**{f"the mask of {n}": m for n, m in self.masks.items()}, "the valid area": self.valid}
        for what, plane in planes.items():
            if plane is not None and self.pixels.numel() and plane.shape != (1, *self.pixels.shape[1:]):
                size = list(self.pixels.shape[1:])
                raise ValueError(f"{self.source}: {what} has shape {list(plane.shape)}, but its picture is {size}")

    @property
    def owner(self) -> str:
        """The subject that the caption names."""
        return self.owners[0]

    @property
    def is_clip(self) -> bool:
        return self.pixels.ndim == 4

    def frames(self) -> list[Example]:
        """Returns a clip's frames as pictures with masks. The clip must still have its pixels."""
        return [
            replace(
                self,
                pixels=self.pixels[:, i],
                masks={owner: mask[:, i] for owner, mask in self.masks.items()},
                valid=None if self.valid is None else self.valid[:, i],
            )
            for i in range(self.pixels.shape[1])
        ]

    @staticmethod
    def clip(frames: Sequence[Example]) -> Example:
        """Joins pictures of the same size into a clip. All other fields are copied from the first picture."""
        valid = [f.valid for f in frames if f.valid is not None]
        return replace(
            frames[0],
            pixels=torch.stack([f.pixels for f in frames], dim=1),
            masks={owner: torch.stack([f.masks[owner] for f in frames], dim=1) for owner in frames[0].masks},
            valid=torch.stack(valid, dim=1) if len(valid) == len(frames) else None,
        )

    @property
    def mask(self) -> Tensor | None:
        """The union of the masks, [1, (F), H, W], or None if there are none."""
        return torch.stack(list(self.masks.values())).amax(0) if self.masks else None

    def with_(self, **changes: Any) -> Example:
        """Returns a copy with some fields changed."""
        return replace(self, **changes)

    def with_masks(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Returns a copy with `change` applied to each frame ([1, H, W]) of every mask.

        If there are no masks, returns the example itself.
        """
        if not self.masks:
            return self

        def all_frames(mask: Tensor) -> Tensor:
            return torch.stack([change(m) for m in mask.unbind(1)], dim=1) if self.is_clip else change(mask)

        return replace(self, masks={owner: all_frames(mask) for owner, mask in self.masks.items()})


@dataclass(frozen=True)
class Batch:
    """A batch of training examples. Raises ValueError if the fields' lengths differ."""

    captions: tuple[str, ...]  # B, fully expanded
    owners: tuple[tuple[str, ...], ...]  # B; as in `Example`
    role: tuple[Role, ...]  # B
    latents: Tensor  # [B, C, (f), h, w]
    # owner -> [B, 1, (f), h, w]; all 0 for examples that do not show the owner
    owner_masks: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None  # [B, 1, (f), h, w] in [0, 1]: the union of an example's masks; all 1 if it has none
    valid: Tensor | None = None  # [B, 1, (f), h, w]
    pixels: Tensor | None = None  # [B, 3, (F), H, W], only if a part declares the need "pixels"
    sources: tuple[str, ...] = ()  # B: the source of each example

    def __post_init__(self) -> None:
        counts = {"captions": len(self.captions), "owners": len(self.owners), "role": len(self.role)}
        counts |= {"latents": len(self.latents), **{f"owner_masks.{n}": len(m) for n, m in self.owner_masks.items()}}
        counts |= {k: len(v) for k in ("mask", "valid", "pixels") if (v := getattr(self, k)) is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the fields of a batch have different numbers of examples: {counts}")

    @property
    def size(self) -> int:
        return len(self.captions)

    def with_role(self, role: Role) -> Tensor:
        """Returns a bool mask [B], on the CPU, of the examples with this role."""
        return torch.tensor([r == role for r in self.role])


@dataclass(frozen=True)
class ImageTokens:
    """An extra stream of keys and values alongside the text (IP-Adapter and similar methods)."""

    tokens: Tensor  # [B, N, D]
    scale: float = 1.0
    region: Tensor | None = None  # [B, 1, h, w] in [0, 1]


@dataclass(frozen=True)
class SiteContext:
    """The text context of one attention site, with separate K and V (P+, NeTI, Perfusion)."""

    key: Tensor  # [B, L, D]
    value: Tensor  # [B, L, D]


@dataclass(frozen=True)
class Conditioning:
    """The network's inputs besides the noisy picture and the time."""

    context: Tensor | Mapping[str, SiteContext]  # [B, L, D], or one per site name (see `Backbone.sites`)
    pooled: Tensor | None = None  # [B, P]: FLUX and SDXL
    image_tokens: tuple[ImageTokens, ...] = ()
    token_positions: Mapping[str, Tensor] = field(default_factory=dict)  # concept -> bool [B, L]
    size_ids: Tensor | None = None  # [B, 6]: SDXL's sizes and crops
    regions: Mapping[str, Tensor] = field(default_factory=dict)  # concept -> [B, 1, h, w]
    context_mask: Tensor | None = None  # bool [B, L], False at padding; used if the network must not attend to it (LTX)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates conditionings along the batch axis, as needed for classifier-free guidance.

        Raises ValueError if the parts do not have the same streams.
        """
        first = parts[0]
        sites = [set() if isinstance(p.context, Tensor) else set(p.context) for p in parts]
        if any(s for s in sites) and any(s != sites[0] for s in sites):
            parts = [p.per_site(sorted(set().union(*sites))) for p in parts]
            first = parts[0]
        if isinstance(first.context, Tensor):
            context: Any = torch.cat([p.context for p in parts])  # type: ignore[misc]
        else:
            context = {
                k: SiteContext(
                    torch.cat([p.context[k].key for p in parts]),  # type: ignore[index]
                    torch.cat([p.context[k].value for p in parts]),  # type: ignore[index]
                )
                for k in first.context
            }
        for name in ("image_tokens", "regions"):
            if len({len(getattr(p, name)) for p in parts}) > 1:
                raise ValueError(f"cannot batch conditionings with different {name}")
        tokens = tuple(
            ImageTokens(
                torch.cat([p.image_tokens[i].tokens for p in parts]),
                stream.scale,
                _cat([p.image_tokens[i].region for p in parts]),
            )
            for i, stream in enumerate(first.image_tokens)
        )
        return Conditioning(
            context=context,
            context_mask=_cat([p.context_mask for p in parts]),
            pooled=_cat([p.pooled for p in parts]),
            image_tokens=tokens,
            token_positions=_cat_positions(parts),
            size_ids=_cat([p.size_ids for p in parts]),
            regions={k: torch.cat([p.regions[k] for p in parts]) for k in first.regions},
        )

    def per_site(self, sites: Sequence[str]) -> Conditioning:
        """Returns the conditioning with its context repeated for each site, unless it already has one per site."""
        if not isinstance(self.context, Tensor):
            return self
        return replace(self, context={s: SiteContext(self.context, self.context) for s in sites})

    @property
    def batch_size(self) -> int:
        context = self.context if isinstance(self.context, Tensor) else next(iter(self.context.values())).key
        return context.shape[0]


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    if all(t is None for t in tensors):
        return None
    if any(t is None for t in tensors):
        raise ValueError("cannot batch conditionings: an optional input is set for only some of them")
    return torch.cat([t for t in tensors if t is not None])


def _cat_positions(parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    names = {n for p in parts for n in p.token_positions}
    out = {}
    for name in sorted(names):
        like = next(p.token_positions[name] for p in parts if name in p.token_positions)
        parts_positions = [
            p.token_positions.get(name, torch.zeros(p.batch_size, like.shape[1], dtype=torch.bool, device=like.device))
            for p in parts
        ]
        out[name] = torch.cat(parts_positions)
    return out


@dataclass(frozen=True)
class Step:
    """One training step, as passed to penalties. A part reads its declared needs with `need`."""

    batch: Batch
    backbone: Backbone
    conditioning: Conditioning
    noise: Tensor  # [B, C, (f), h, w]
    t: Tensor  # [B]; [B, f] if a clip's frames have different times
    x_t: Tensor  # [B, C, (f), h, w]
    prediction: Tensor  # [B, C, (f), h, w], in the backbone's own parametrization
    target: Tensor  # [B, C, (f), h, w]
    draw: torch.Generator  # this micro-batch's own generator, on the CPU, for parts that draw random numbers
    lazy: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def need(self, name: str) -> Any:
        """Returns a declared need ("base_prediction", "attention_maps", …), which is computed only once."""
        if name not in self.lazy:
            raise AssertionError(f"the part did not declare the need {name!r}; it declared {sorted(self.lazy)}")
        return self.lazy[name]()
