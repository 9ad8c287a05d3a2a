"""The convolutional trunk of the toybox's evaluators, and functions that read and write their folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shared.io.failures import of_the_machine
from shared.io.model_folders import check_state, first_line

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
Model = TypeVar("Model", bound=nn.Module)


class TrunkConfig(BaseModel):
    """The width and the number of residual blocks of each stage. The resolution of stage `i` is `size / 2^(i+1)`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    widths: tuple[int, ...] = (24, 64, 128, 224)
    blocks: tuple[int, ...] = (1, 1, 1, 1)


class Block(nn.Module):
    """A residual block (He et al., arXiv 1512.03385) with two 3×3 convolutions, batch normalization and a skip
    connection.

    Maps `[B, inputs, H, W]` to `[B, outputs, H / stride, W / stride]`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.skip(x))


class Trunk(nn.Module):
    """A network that maps pictures (`[B, 3, H, W]` in [0, 1]) to features `[B, features]`.

    The features are statistics of each channel: the mean of every stage's output, the maximum of the last stage's
    output and, for all stages except the first, the mean over the thing alone. The `where` layer predicts the thing's
    position from the output of the third stage (8×8 for a 64×64 picture). This layer is trained on the renderer's
    masks.
    """

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.ModuleList()
        inputs = first
        for index, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            stride = 1 if index == 0 else 2
            blocks = [Block(inputs if n == 0 else width, width, stride if n == 0 else 1) for n in range(count)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = width
        self.looks = min(2, len(config.widths) - 1)
        self.where = nn.Conv2d(config.widths[self.looks], 1, 1)
        self.features = sum(config.widths) + config.widths[-1] + sum(config.widths[1:])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.read(pixels)[0]

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features `[B, features]` and the logits `[B, 1, H/8, W/8]` of the thing's position."""
        return self.pooled(self.maps(pixels))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Returns the outputs of all stages. The output of stage `i` is `[B, width, H / 2^(i+1), W / 2^(i+1)]`."""
        x = self.stem(((pixels - 0.5) * 4.0).contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pooled(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Computes the result of `read` from the stages' outputs."""
        where = self.where(maps[self.looks]).float()
        pooled = [m.mean((2, 3)) for m in maps] + [maps[-1].amax((2, 3))]
        pooled += [_mean_at(m, where.sigmoid()) for m in maps[1:]]
        return torch.cat(pooled, 1).float(), where


def _mean_at(features: Tensor, weights: Tensor) -> Tensor:
    """Averages features `[B, C, H, W]` over their pixels. The weights `[B, 1, h, w]` are first resampled to the
    features' size. Returns `[B, C]`."""
    weights = F.adaptive_avg_pool2d(weights, features.shape[2:])  # pyright: ignore[reportArgumentType]
    weights = (weights / (weights.sum((2, 3), keepdim=True) + 1e-2)).to(features.dtype)
    return (features * weights).sum((2, 3))


def check_pixels(pixels: Tensor) -> None:
    """Raises `ValueError` unless `pixels` is a batch of float pictures `[B, 3, 64, 64]`. Their range is not checked."""
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, 64, 64):
        raise ValueError(
            f"pixels: expected [B, 3, 64, 64], got {list(pixels.shape)}; resize the pictures to 64×64 RGB first"
        )
    if not pixels.is_floating_point():
        raise ValueError(f"pixels: expected floats in [0, 1], got {pixels.dtype}; divide bytes by 255")


def save_model(model: nn.Module, config: BaseModel, folder: Path | str) -> None:
    """Writes `config.json` and fp16 `model.safetensors` into `folder`, each file atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _half(tensor) for name, tensor in model.state_dict().items()}
    temporary = folder / (WEIGHTS_FILE + ".tmp")
    save_file(state, str(temporary), metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, config.model_dump(mode="json"))


def load_state(model: Model, folder: Path) -> Model:
    """Loads `model.safetensors` from `folder` into the model in float32. The model is frozen and set to eval mode.
    Raises ValueError unless the tensors' names and shapes match the model's exactly."""
    state = read_state(folder / WEIGHTS_FILE)
    check_state(state, model.state_dict(), folder / WEIGHTS_FILE)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the tensors in a file. Floating-point tensors are converted to float32. Raises ValueError if the file
    cannot be read."""
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def adopt_state(model: nn.Module, folder: Path) -> bool:
    """Loads `model.safetensors` from `folder` into the model, in order to train it further. If names or shapes differ,
    loads nothing and returns False."""
    state, expected = read_state(folder / WEIGHTS_FILE), model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
        return False
    model.load_state_dict(state)
    return True


def read_config(folder: Path | str, name: str) -> tuple[Path, dict[str, Any]]:
    """Returns the folder and its parsed `config.json`. Raises FileNotFoundError, naming the command that creates the
    folder, if that file or the weights file is missing."""
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{name}: no {file} in {folder}; create it with `pcs toybox train {name}`")
    return folder, json.loads((folder / CONFIG_FILE).read_text("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(temporary, path)


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
