"""Defines the instruments, which are models that embed pictures and texts or read what a picture shows.

All instruments take pixels `[N, 3, H, W]` in [-1, 1] of any size, and each resizes them with its own processor.
Pictures are rounded to 8 bits first, so that a tensor and the PNG saved from it get the same score. Nothing here needs
torchvision or network access.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from shared.config import expanded
from shared.io.model_folders import load_network, load_tokenizer
from shared.metrics.scores import CLIP_SCORE_WEIGHT

BATCH = 64  # pictures encoded per batch
TEXT_AND_LIKENESS = "text alignment and likeness (CLIP-T, CLIP-I)"


@dataclass(frozen=True)
class InstrumentInfo:
    """The description of an instrument, and how accurate it is."""

    name: str  # "CLIP (clip-vit-base-patch32)"
    measures: str  # "text alignment"
    toybox: bool = False
    accuracy: Mapping[str, float] = field(default_factory=dict)  # on fresh renders, if a card states it; in [0, 1]
    text_weight: float = CLIP_SCORE_WEIGHT  # factor that scales picture–text cosines to [0, 1]
    fingerprint: str = ""  # hash of the weights; "" if measurements may not be cached


@runtime_checkable
class ImageEncoder(Protocol):
    """Maps pictures to unit vectors whose dot product is a similarity."""

    info: InstrumentInfo

    def images(self, pixels: Tensor) -> Tensor:
        """Returns the unit vectors `[N, D]`, float32 on the CPU, of pictures `[N, 3, H, W]` in [-1, 1]."""
        ...


@runtime_checkable
class TextImageEncoder(ImageEncoder, Protocol):
    """Maps pictures and texts to a common space."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns the unit vectors `[N, D]`, float32 on the CPU, of N texts."""
        ...


@runtime_checkable
class AttributeReader(Protocol):
    """Reads named attributes (background, view, …) from pictures."""

    info: InstrumentInfo

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        """Maps each attribute to the values seen in N pictures, `[N, 3, H, W]` in [-1, 1]."""
        ...


@runtime_checkable
class SoftReader(AttributeReader, Protocol):
    """A reader that returns probabilities, so that one misread picture cannot dominate the mean of a few pictures."""

    def chances(self, pixels: Tensor, asked: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
        """Returns, for each of N pictures, the probability that each requested attribute has the requested value.

        pixels: the pictures, `[N, 3, H, W]` in [-1, 1]
        asked: the requested values of each picture
        """
        ...


@runtime_checkable
class FaceFinder(Protocol):
    """Finds the pictures in which an identity can be judged."""

    def faces(self, pixels: Tensor) -> Tensor:
        """Returns, as bool `[N]`, whether each picture shows a face and not just the back of a head."""
        ...


@runtime_checkable
class Locator(Protocol):
    """Finds the thing in a picture."""

    def where(self, pixels: Tensor) -> Tensor:
        """Returns the probability that a cell shows the thing, `[N, h, w]`, for pictures `[N, 3, H, W]` in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Typical:
    """Typical readings of `Instruments`, taken on things that no test uses. They set the scale of scores that may use
    neither look-alikes nor true pictures of the thing.
    """

    same: float  # likeness of new pictures of a thing to its references
    other: float  # likeness of another thing of the same class and colours to the same references
    free: float  # distance between crops of a thing from random views
    fixed: float  # distance between crops of a thing in one pose and place


@dataclass(frozen=True)
class CropSettings:
    """Settings for cropping pictures to the thing before poses are compared."""

    margin: float = 1.35  # side of the crop as a multiple of the thing's side
    cells: int | None = None  # cells per side of the grid that the crop is reduced to; None keeps all detail


@dataclass(frozen=True)
class Instruments:
    """The instruments of an evaluation. If one is None, its scores are left out, and the report says so."""

    text_image: TextImageEncoder | None = None
    identity: ImageEncoder | None = None
    attributes: AttributeReader | None = None
    locator: Locator | None = None
    pose: ImageEncoder | None = None  # tells poses apart in crops aligned with `locator`
    crops: CropSettings = CropSettings()
    typical: Typical | None = None
    face_finder: FaceFinder | None = None

    @property
    def toybox(self) -> bool:
        return any(i.toybox for i in self.infos())

    def infos(self) -> tuple[InstrumentInfo, ...]:
        return tuple(i.info for i in (self.text_image, self.identity, self.attributes) if i is not None)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Converts `[N, 3, H, W]` in [-1, 1] to N 8-bit RGB pictures.

    Raises ValueError for any other shape or non-finite values.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected [N, 3, H, W], got {list(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("pixels: not finite (NaN or infinity); the model that generated these pictures diverged")
    array = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array.permute(0, 2, 3, 1).numpy()]


def to_bytes(pixels: Tensor) -> bytes:
    """Returns the 8-bit values of pictures `[N, 3, H, W]` in [-1, 1] as bytes, for comparing or hashing."""
    return b"".join(picture.tobytes() for picture in to_pil(pixels))


def resize01(pixels: Tensor, size: int) -> Tensor:
    """Crops pictures in [-1, 1] to a square and resizes them to `[N, 3, size, size]` in [0, 1], in 8-bit steps."""
    parts = []
    for picture in to_pil(pixels):
        if picture.size != (size, size):
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        parts.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(parts).float() / 255 if parts else torch.zeros(0, 3, size, size)


class ClipEncoder:
    """A `CLIPModel` (Radford et al., arXiv 2103.00020), for text–image and image–image cosines (CLIP-T, CLIP-I)."""

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, info: InstrumentInfo) -> None:
        self.model, self.image_processor, self.tokenizer, self.info = model, image_processor, tokenizer, info

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        pictures = to_pil(pixels)
        parts = []
        for start in range(0, len(pictures), BATCH):
            values = self.image_processor(pictures[start : start + BATCH], return_tensors="pt")["pixel_values"]
            parts.append(_unit(self.model.get_image_features(pixel_values=values.to(self.model.device))))
        return _stack(parts, self.model.config.projection_dim)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        limit = int(self.model.config.text_config.max_position_embeddings)
        parts = []
        for start in range(0, len(texts), BATCH):
            chunk = list(texts[start : start + BATCH])
            for text, ids in zip(chunk, self.tokenizer(chunk)["input_ids"], strict=True):
                if len(ids) > limit:
                    warnings.warn(
                        f"{self.info.name} reads at most {limit} tokens; the end of {text!r} is not scored",
                        stacklevel=2,
                    )
            tokens = self.tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            ids, mask = (tokens[k].to(self.model.device) for k in ("input_ids", "attention_mask"))
            parts.append(_unit(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        return _stack(parts, self.model.config.projection_dim)


class DinoEncoder:
    """The CLS embedding of a DINO or DINOv2 vision transformer (arXiv 2104.14294, 2304.07193), for DINO-I."""

    def __init__(self, model: Any, image_processor: Any, info: InstrumentInfo) -> None:
        self.model, self.image_processor, self.info = model, image_processor, info

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        pictures = to_pil(pixels)
        parts = []
        for start in range(0, len(pictures), BATCH):
            values = self.image_processor(pictures[start : start + BATCH], return_tensors="pt")["pixel_values"]
            hidden = self.model(pixel_values=values.to(self.model.device)).last_hidden_state
            parts.append(F.normalize(hidden[:, 0].float(), dim=1).cpu())
        return _stack(parts, self.model.config.hidden_size)


def _unit(output: Any) -> Tensor:
    """Normalises the projection, which transformers 5 returns as an object's `pooler_output` and transformers 4 as a tensor."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()


def _stack(parts: Sequence[Tensor], dimensions: int) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dimensions)


def load_clip(folder: Path | str, device: str = "cpu") -> ClipEncoder:
    """Loads a CLIP model from a local transformers folder. Raises ValueError if the folder contains none."""
    from transformers import CLIPModel, CLIPTokenizer

    path = _check_folder(folder, {"clip"}, "CLIP")
    model = load_network(CLIPModel, path)
    tokenizer = load_tokenizer(CLIPTokenizer, path, model.config.text_config.vocab_size)
    info = InstrumentInfo(f"CLIP ({path.name})", TEXT_AND_LIKENESS)
    return ClipEncoder(model.eval().requires_grad_(False).to(device), _image_processor(path), tokenizer, info)


DINO_TYPES = {"vit", "dinov2", "dinov2_with_registers", "dinov3_vit"}


def load_dino(folder: Path | str, device: str = "cpu") -> DinoEncoder:
    """Loads a DINO or DINOv2 model from a local transformers folder. Raises ValueError if the folder contains neither."""
    from transformers import AutoModel

    path = _check_folder(folder, DINO_TYPES, "DINO")
    model = load_network(AutoModel, path, unused=(r"^pooler\.",))  # DINO's own files have no pooler
    info = InstrumentInfo(f"DINO ({path.name})", "likeness (DINO-I)")
    return DinoEncoder(model.eval().requires_grad_(False).to(device), _image_processor(path), info)


CARD_KEYS = {
    "recognizer": {k: k for k in ("class", "background", "view", "accessory_shown", "style_shown")},
    "identity_reporting": {"retrieval": "held-out things among their look-alikes"},
    "clip": {"caption_of_64": "the right caption of 64", "zero_shot_background": "background"},
}


def _check_folder(folder: Path | str, types: set[str], what: str) -> Path:
    path = expanded(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{what}: {path} is not a model folder (it has no config.json); nothing is downloaded here")
    try:
        kind = json.loads((path / "config.json").read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{what}: {path / 'config.json'} is not readable JSON") from None
    if kind not in types:
        raise ValueError(f"{what}: {path} contains a model of type {kind!r}; expected {', '.join(sorted(types))}")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{what}: {path} contains no .safetensors weights")
    return path.resolve()


def _image_processor(path: Path) -> Any:
    """Loads the folder's own processor with its Pillow backend (`"pil"`), because transformers' default needs torchvision."""
    from transformers import AutoImageProcessor

    if not any((path / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(f"{path} has no preprocessor_config.json; it is needed to resize pictures for this model")
    return AutoImageProcessor.from_pretrained(str(path), backend="pil", local_files_only=True)
