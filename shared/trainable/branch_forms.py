"""The two forms of branches: bottlenecks in parallel with a layer, and frame embeddings added to a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shared.backbones.attention_sites import Site
from shared.io.branch_settings import BottleneckForm, FrameEmbeddingsForm

Unwrap = Callable[[Any], Any]


class Grid:
    """The size of the current prediction's latent grid, read from the network's most recent call."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites
        self.size = (0, 0)

    def look(self, _network: nn.Module, args: tuple[Any, ...]) -> None:
        """Reads the size, as a pre-hook on the network, whose first argument is the latents ([B, C, (f), h, w])."""
        if args and isinstance(args[0], Tensor) and args[0].ndim >= 4:
            self.size = (args[0].shape[-2], args[0].shape[-1])

    def at(self, site: str) -> tuple[int, int]:
        """Returns the number of rows and the number of columns at this site."""
        return self.sites[site].grid(*self.size)


class Branch:
    """A branch at one attention layer or feed-forward network. Its fp32 parameters have the form's own keys."""

    keys: ClassVar[Mapping[str, int]]  # the number of axes of each tensor

    def __init__(self, form: Any, place: str, grid: Grid) -> None:
        self.form, self.place, self.grid = form, place, grid
        self.parameters: dict[str, nn.Parameter] = {}
        self.strength, self.training = 1.0, False

    def start(self, tensors: Mapping[str, Tensor], width: int, device: torch.device, where: str) -> None:
        """Creates the parameters from copies of the tensors.

        Raises ValueError if the tensors do not match this form or the layer's width.
        """
        for key, axes in self.keys.items():
            if key not in tensors or tensors[key].ndim != axes:
                raise ValueError(f"{where}: the branch needs {key!r} with {axes} axes")
        if tensors.keys() != self.keys.keys() or not self._fits(tensors, width):
            shapes = ", ".join(f"{key} {list(t.shape)}" for key, t in sorted(tensors.items()))
            raise ValueError(f"{where}: tensors {shapes} do not fit a layer of width {width}")
        for key, tensor in tensors.items():
            value = tensor.detach().to(device, torch.float32, copy=True)
            self.parameters[key] = nn.Parameter(value, requires_grad=False)

    def _fits(self, tensors: Mapping[str, Tensor], width: int) -> bool:
        raise NotImplementedError

    def hook(self, place: nn.Module, unwrap: Unwrap) -> Iterator[RemovableHandle]:
        """Registers the branch's hooks on a module and yields their handles."""
        raise NotImplementedError

    def value(self, key: str, like: Tensor) -> Tensor:
        """Returns a parameter on the device of `like`."""
        return self.parameters[key].to(like.device)


class Bottleneck(Branch):
    """Houlsby's adapter in parallel with a module.

    The module's output becomes out + strength * (up gelu(down x + b) + c), where x is the module's input.
    """

    keys: ClassVar[Mapping[str, int]] = {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1}
    form: BottleneckForm

    def _fits(self, tensors: Mapping[str, Tensor], width: int) -> bool:
        down, up = tensors["down"].shape, tensors["up"].shape
        biases = (*tensors["down_bias"].shape, *tensors["up_bias"].shape)
        return down[1] == width and up == (width, down[0]) and biases == (down[0], width)

    def hook(self, place: nn.Module, unwrap: Unwrap) -> Iterator[RemovableHandle]:
        yield place.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, _place: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        if not self.strength:
            return out
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        added = self.strength * self._of(x if x.ndim == 3 else x.movedim(1, -1))
        added = added if x.ndim == 3 else added.movedim(-1, 1)  # some attention layers take [B, C, h, w]
        if isinstance(out, tuple):  # joint attention returns the outputs for the picture and for the text
            return (out[0] + added.to(out[0].dtype), *out[1:])
        return out + added.to(out.dtype)

    def _of(self, x: Tensor) -> Tensor:
        """Applies the bottleneck to x, [..., C] -> [..., C]."""
        down, bias, up, shift = (self.value(key, x) for key in self.keys)
        return F.linear(F.gelu(F.linear(x.to(down.dtype), down, bias)), up, shift)


class FrameEmbeddings(Branch):
    """Vectors added to the inputs of temporal attention (Motion Inversion, https://arxiv.org/abs/2403.20193, section 3.2).

    `qk` ([F, C]) is added to the inputs of the query and key projections, and is the same at every spatial position.
    `v` ([rows, columns, F, C]) is added to the inputs of the value projection. Both are interpolated linearly to other
    frame counts and grids. By default, outside training, the `v` of every frame except the first is replaced with its
    difference from the `v` of the previous frame. The authors do this to keep out appearance.
    """

    keys: ClassVar[Mapping[str, int]] = {"qk": 2, "v": 4}
    form: FrameEmbeddingsForm

    def _fits(self, tensors: Mapping[str, Tensor], width: int) -> bool:
        return (
            tensors["qk"].shape[1] == width == tensors["v"].shape[3] and tensors["qk"].shape[0] == tensors["v"].shape[2]
        )

    def hook(self, place: nn.Module, unwrap: Unwrap) -> Iterator[RemovableHandle]:
        for name in ("to_q", "to_k"):
            yield unwrap(getattr(place, name)).register_forward_pre_hook(self._to_queries_and_keys)
        yield unwrap(place.to_v).register_forward_pre_hook(self._to_values)

    def _to_queries_and_keys(self, _layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.strength:
            return None
        x = args[0]  # [B * rows * columns, F, C]
        return (x + (self.strength * resized_frames(self.value("qk", x), x.shape[1])).to(x.dtype), *args[1:])

    def _to_values(self, _layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.strength or (self.form.values == "off" and not self.training):
            return None
        x = args[0]
        grid = self.grid.at(self.place)
        added = resized_places(self.value("v", x), grid, x.shape[1])
        if self.form.values == "differences" and not self.training:
            added = differences(added)
        rows = len(x) // (grid[0] * grid[1])
        assert rows * grid[0] * grid[1] == len(x), f"{self.place}: {len(x)} rows are not a multiple of {grid}"
        return (x + (self.strength * added.flatten(0, 1)).to(x.dtype).repeat(rows, 1, 1), *args[1:])


def resized_frames(embedding: Tensor, frames: int) -> Tensor:
    """Interpolates linearly in time, [F, C] -> [frames, C]."""
    if len(embedding) == frames:
        return embedding
    return F.interpolate(embedding.T[None], size=frames, mode="linear", align_corners=False)[0].T


def resized_places(embedding: Tensor, grid: tuple[int, int], frames: int) -> Tensor:
    """Interpolates linearly in space and time, [rows, columns, F, C] -> [*grid, frames, C]."""
    size = (*grid, frames)
    if embedding.shape[:3] == size:
        return embedding
    return F.interpolate(embedding.movedim(-1, 0)[None], size=size, mode="trilinear", align_corners=False)[0].movedim(
        0, -1
    )


def differences(embedding: Tensor) -> Tensor:
    """Replaces every frame but the first of [..., F, C] with its difference from the previous frame."""
    return torch.cat([embedding[..., :1, :], embedding.diff(dim=-2)], dim=-2)
