"""The toybox's own small CLIP, stored as an ordinary transformers folder with a model, a tokenizer and an image
processor.

`CLIPModel.from_pretrained(folder)` and `CLIPProcessor.from_pretrained(folder)` load it without this project's code.
CLIP-T and CLIP-I are therefore computed by exactly the same code as for a full-size CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from shared.io.model_folders import load_network, load_tokenizer
from shared.io.outputs import take_place
from shared.io.temporary_names import beside
from shared.toybox.evaluators.convnet import WEIGHTS

MEAN = STD = (0.5, 0.5, 0.5)


class ClipConfig(BaseModel):
    """The sizes of the two transformers. `patch` is in pixels. `length` is in tokens, including the start and end
    tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int = 64
    patch: int = 16
    vision_width: int = 192
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 2
    heads: int = 2
    dimensions: int = 128
    length: int = 32


def new_clip(config: ClipConfig, tokenizer: Any) -> Any:
    """Creates an untrained `CLIPModel` for the vocabulary of `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {"num_attention_heads": config.heads, "hidden_act": "relu", "projection_dim": config.dimensions}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_width,
        "intermediate_size": 3 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "max_position_embeddings": config.length,
        **shared,
        **ids,
    }
    vision = {
        "image_size": config.size,
        "patch_size": config.patch,
        "hidden_size": config.vision_width,
        "intermediate_size": 3 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        **shared,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.dimensions))


def new_processor(config: ClipConfig, tokenizer: Any) -> Any:
    """Creates the matching `CLIPProcessor`, whose image processor uses Pillow instead of torchvision."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": config.size},
        crop_size={"height": config.size, "width": config.size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return CLIPProcessor(pictures, tokenizer)


def save_clip(model: Any, processor: Any, folder: Path | str) -> None:
    """Writes the transformers folder with fp16 weights. An existing folder is replaced as a whole."""
    from transformers import CLIPModel

    from shared.toybox import tokenizer as tokenizer_files

    folder = Path(folder)
    temporary = beside(folder)
    half = CLIPModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(str(temporary), safe_serialization=True)
    processor.save_pretrained(str(temporary))
    processor.image_processor.save_pretrained(str(temporary))
    tokenizer_files.save(processor.tokenizer, temporary)
    _state_float32(temporary / "config.json")
    for file in temporary.iterdir():
        file.chmod(0o644)
    take_place(temporary, folder)


@lru_cache(maxsize=4)
def load_clip(folder: Path | str = WEIGHTS / "clip") -> tuple[Any, Any]:
    """Loads a frozen float32 `CLIPModel` and its `CLIPProcessor`, by default from the shipped CLIP folder. Each folder
    is loaded once per process.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"clip: no config.json in {folder}; create it with `pcs toybox train clip`")
    model = load_network(CLIPModel, Path(folder))
    pictures = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    tokenizer = load_tokenizer(CLIPTokenizer, Path(folder), model.config.text_config.vocab_size)
    return model.eval().requires_grad_(False), CLIPProcessor(pictures, tokenizer)


def image_features(model: Any, pixels: Tensor, batch_size: int = 128) -> Tensor:
    """Embeds pictures as unit vectors `[B, D]`. `pixels` (`[B, 3, H, W]` in [0, 1]) must match the model's input
    size."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1).to(pixels) for v in (MEAN, STD))
    parts = [
        _projected(model.get_image_features(pixel_values=(chunk - mean) / std)) for chunk in pixels.split(batch_size)
    ]
    return F.normalize(torch.cat(parts).float(), dim=1)


def text_features(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Embeds captions as unit vectors `[B, D]`. Captions longer than the model's `length` are truncated."""
    parts = []
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        limit = model.config.text_config.max_position_embeddings
        tokens = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
        parts.append(_projected(model.get_text_features(**tokens)))
    return F.normalize(torch.cat(parts).float(), dim=1)


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Returns CLIP's symmetric contrastive loss (Radford et al., arXiv 2103.00020, fig. 3) for B pairs of unit vectors.
    `images` and `texts` are both `[B, D]`, and the loss is a scalar."""
    logits = logit_scale.exp().clamp(max=100.0) * images @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _state_float32(path: Path) -> None:
    """Sets the dtype in `config.json` to float32, so that transformers 5 computes in float32 although the stored
    weights are fp16."""
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", "utf-8")


def _projected(output: Any) -> Tensor:
    """Returns the projected features. In transformers 5, the model returns an object that stores them as
    `pooler_output`. In transformers 4, it returns the tensor itself."""
    return output if isinstance(output, Tensor) else output.pooler_output
