"""Conditions a denoiser on cameras, as variational score distillation does for its student
(https://arxiv.org/abs/2305.16213, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pcs_3d.cameras import Cameras
from pcs_3d.guidance.student import STUDENT
from shared.backbones.protocol import Backbone
from shared.trainable.base import TrainableGroup, TrainablePart


class CameraEmbedding(TrainablePart):
    """Two linear layers that map camera-to-world matrices to vectors, which are added to the time embedding. The second
    layer is initialised to 0, so that the denoiser is initially unchanged."""

    kind: Literal["camera_embedding"] = "camera_embedding"
    adapter_set: str = STUDENT
    group: str = STUDENT

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Adds the layers to the backbone. Raises ValueError if the denoiser has no time embedding to add cameras
        to."""
        adapter = CameraAdapter(backbone, slot, seed)
        backbone.add_adapter(name, adapter)
        return TrainableGroup(slot, list(adapter.parameters()), self.lr, self.weight_decay, group=self.group)


class CameraAdapter:
    """The layers added to one denoiser. This class satisfies the `shared.backbones.protocol.Adapter` protocol."""

    def __init__(self, backbone: Backbone, slot: str, seed: int) -> None:
        self.slot, self.component, self.strength = slot, next(iter(backbone.noise_ranges)), 1.0
        embedding = _time_embedding(backbone, self.component)
        width = [m for m in embedding.modules() if isinstance(m, nn.Linear)][-1].out_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(layers[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[2].bias)  # type: ignore[arg-type]
        self.layers = layers.to(backbone.device)
        self._matrices: Tensor | None = None
        self._hook = embedding.register_forward_hook(self._add)

    @contextmanager
    def seeing(self, cameras: Cameras, blind: bool = False) -> Iterator[None]:
        """Conditions predictions on these cameras within the context. Each row of the batch uses one camera. If there
        are more rows than cameras, the cameras are repeated. If `blind` is set, all matrices are 0."""
        before, self._matrices = self._matrices, matrices(cameras) * (0.0 if blind else 1.0)
        try:
            yield
        finally:
            self._matrices = before

    def _add(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._matrices is None or not self.strength:
            return output
        device = next(self.layers.parameters()).device
        added = self.layers(self._matrices.to(device))
        return output + self.strength * added.repeat(len(output) // len(added), 1).to(output)

    def train(self, mode: bool) -> None:
        self.layers.train(mode)

    def set_strength(self, strength: float) -> None:
        self.strength = strength

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.layers.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        prefix = f"{self.component}.camera_embedding."
        return {prefix + k: v.detach().float().cpu().clone() for k, v in self.layers.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = self.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in mine.items()}:
            raise ValueError(
                f"camera embedding: the names or shapes of its {len(mine)} tensors differ from those of the "
                f"{len(state)} saved tensors"
            )
        cut = len(f"{self.component}.camera_embedding.")
        self.layers.load_state_dict({k[cut:]: v for k, v in state.items()})

    def eject(self) -> None:
        self._hook.remove()


def matrices(cameras: Cameras) -> Tensor:
    """Returns flattened camera-to-world matrices, `[B, 16]`. The columns of each matrix are the picture's right and up
    directions, the direction to the camera, and the camera's position."""
    out = torch.zeros(len(cameras), 4, 4)
    out[:, :3, :3] = cameras.axes.mT
    out[:, :3, 3] = cameras.positions
    out[:, 3, 3] = 1.0
    return out.flatten(1)


def _time_embedding(backbone: Backbone, component: str) -> nn.Module:
    network = backbone.components[component]
    for name in ("time_embedding", "time_text_embed"):
        if isinstance(found := getattr(network, name, None), nn.Module):
            return found
    raise ValueError(f"camera_embedding: the {component} of {backbone.family} has no time embedding to add cameras to")
