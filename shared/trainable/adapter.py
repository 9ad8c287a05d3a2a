"""Injects peft layers into a backbone under a concept's name, and removes them without leaving a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.io.adapter_settings import check_adapter, recordable
from shared.trainable.merged_forward import merge_in_forward
from shared.trainable.rank_by_noise import RankByNoise
from shared.trainable.wrapped_layers import WrappedLayer, is_wrapped

if TYPE_CHECKING:
    from peft import PeftConfig


class PeftAdapter:
    """An adapter (`shared.backbones.protocol.Adapter`) that consists of one peft adapter in one component.

    peft's own switches affect all of a model's adapters at once, and `set_adapter` makes the adapters that it activates
    trainable. This class therefore sets strengths layer by layer, and turns training on and off only with `requires_grad_`.
    """

    def __init__(self, model: nn.Module, component: str, slot: str, peft_name: str, config: PeftConfig) -> None:
        self.model, self.component, self.slot, self.peft_name, self.config = model, component, slot, peft_name, config
        self.layers: list[Any] = [m for m in model.modules() if is_wrapped(m) and _holds(m, peft_name)]
        self.seed = 0  # the seed of the initial values; random tensors that are not trained are recreated from it
        self.min_rank: int | None = None  # the rank at full noise, if this is a LoRA whose rank depends on the noise
        self._chances: dict[tuple[Any, str], float] = {
            (layer, key): getattr(layer, key)[peft_name]
            for layer in self.layers
            for key in ("rank_dropout", "module_dropout")
            if peft_name in getattr(layer, key, {})
        }
        # LoRA and similar types have a scale per adapter; types without a scale, such as OFT, can only be on or off
        self._scaling = [dict(getattr(m, "scaling", {})).get(peft_name) for m in self.layers]

    @classmethod
    def inject(
        cls, backbone: Backbone, name: str, slot: str, component: str, config: PeftConfig, seed: int
    ) -> PeftAdapter:
        """Wraps the target modules of `component` and registers the adapter under `name`.

        The adapter starts frozen, at strength 1 unless `name` already has another strength.

        Raises ValueError if no module matches, if this type of adapter cannot wrap one of the layers, or if the
        settings cannot be saved in a concept (which would otherwise be noticed only after training).
        """
        from peft import inject_adapter_in_model

        check_adapter(recordable(config_to_dict(config), [], seed), f"{slot}.{component}")
        model = backbone.components[component]
        peft_name = f"{name}__{slot}"
        # an adapter that several concepts share may still be named after a concept that has been removed
        while peft_name in getattr(model, "peft_config", {}):
            peft_name += "_"
        trainable = {id(p): p.requires_grad for p in model.parameters()}
        active: dict[Any, list[str]] = {
            m: list(m._active_adapter) if isinstance(m._active_adapter, list) else [m._active_adapter]
            for m in model.modules()
            if is_wrapped(m)
        }
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, model, adapter_name=peft_name)
            except (ValueError, TypeError, NotImplementedError) as error:
                cls(model, component, slot, peft_name, config).eject()  # unwraps layers wrapped before the failure
                _restore(model, trainable, active)
                raise ValueError(f"cannot add {config.peft_type} to {component}: {error}") from None
        adapter = cls(model, component, slot, peft_name, config)
        adapter.seed = seed
        for layer in adapter.layers:
            merge_in_forward(layer)
            active[layer] = [*active.get(layer, []), peft_name]
        _restore(model, trainable, active)
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()  # in half precision, updates would be rounded away
        backbone.add_adapter(name, adapter)
        return adapter

    def modules(self) -> list[str]:
        """Returns the dotted names of the layers that this adapter wraps."""
        ids = {id(layer) for layer in self.layers}
        return sorted(name for name, module in self.model.named_modules() if id(module) in ids)

    def let_rank_fall(self, backbone: Backbone, min_rank: int) -> None:
        """Makes the rank depend on the noise until the adapter is removed (see `RankByNoise`).

        The full rank is used without noise, and `min_rank` at full noise.

        Raises ValueError if the component's input has no noise (as in text encoders), if the adapter is a DoRA, or if
        `min_rank` exceeds the rank.
        """
        recorded = recordable(config_to_dict(self.config), [], self.seed, min_rank)
        check_adapter(recorded, f"{self.slot}.{self.component}")
        if self.component not in backbone.noise_ranges:
            raise ValueError(
                f"{self.slot}: the rank cannot depend on the noise in {self.component}, whose input has no noise"
            )
        self.min_rank = min_rank
        for layer in self.layers:
            layer.lora_A[self.peft_name].register_forward_hook(RankByNoise(backbone, min_rank))

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers:
            for key, parameter in layer.named_parameters():
                if f".{self.peft_name}." in f".{key}." and "base_layer" not in key:
                    yield parameter

    def requires_grad_(self, on: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(on)

    def train(self, mode: bool) -> None:
        """Turns this adapter's dropout on or off. The model itself stays in eval mode."""
        for layer in self.layers:
            for table in layer._modules.values():
                if isinstance(table, nn.ModuleDict) and self.peft_name in table:
                    table[self.peft_name].train(mode)
        for (layer, key), chance in self._chances.items():  # LoHa and LoKr store their dropout as a plain number
            getattr(layer, key)[self.peft_name] = chance if mode else 0.0

    def set_strength(self, strength: float) -> None:
        for layer, scaling in zip(self.layers, self._scaling, strict=True):
            if scaling is None and strength not in (0.0, 1.0):
                raise ValueError(f"{self.config.peft_type} can only be off (0) or on (1), not at strength {strength}")
            on = {n for n in layer.active_adapters if n != self.peft_name} | ({self.peft_name} if strength else set())
            layer._active_adapter = [n for n in _names(layer) if n in on]  # adapters are summed in this order
            if scaling is not None and strength:
                layer.scaling[self.peft_name] = scaling * strength

    def state_dict(self) -> dict[str, Tensor]:
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, adapter_name=self.peft_name)
        return {f"{self.component}.{k}": v.detach().float().cpu().contiguous().clone() for k, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        from peft.utils import set_peft_model_state_dict

        current = self.state_dict()
        missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
        if missing or extra:
            raise ValueError(
                f"the adapter does not fit {self.component}: {len(missing)} tensors missing, {len(extra)} unknown, "
                f"for example {(missing + extra)[0]!r}"
            )
        for key, tensor in state.items():
            if tensor.shape != current[key].shape:
                raise ValueError(
                    f"adapter tensor {key!r} has shape {list(tensor.shape)}, but this model needs {list(current[key].shape)}"
                )
        cut = len(self.component) + 1
        set_peft_model_state_dict(self.model, {k[cut:]: v for k, v in state.items()}, adapter_name=self.peft_name)

    def eject(self) -> None:
        for name, module in list(self.model.named_modules()):
            if not is_wrapped(module) or not _holds(module, self.peft_name):
                continue
            # if this adapter were still active, peft would activate the other adapters and make them trainable
            module._active_adapter = [n for n in module.active_adapters if n != self.peft_name]
            module.delete_adapter(self.peft_name)
            if not any(_names(module)):
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, module.get_base_layer())
        configs: Any = getattr(self.model, "peft_config", None)
        if isinstance(configs, dict):
            configs.pop(self.peft_name, None)
            if not configs:
                del self.model.peft_config
        self.layers, self._scaling, self._chances = [], [], {}


def config_to_dict(config: PeftConfig) -> dict[str, Any]:
    """Returns an adapter's type and the settings that differ from peft's defaults, as JSON-compatible data."""
    plain = type(config)()
    out: dict[str, Any] = {"peft_type": getattr(config.peft_type, "value", config.peft_type)}
    for key, value in config.to_dict().items():
        if value != getattr(plain, key, None) and key != "peft_type":
            out[key] = sorted(value) if isinstance(value, set) else value
    return out


def config_from_dict(data: Mapping[str, Any]) -> PeftConfig:
    """Inverts `config_to_dict`. Raises ValueError when peft lacks the type or one of its settings."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {k.value if hasattr(k, "value") else str(k): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = data.get("peft_type")
    if kind not in kinds:
        raise ValueError(f"the installed version of peft has no adapter type {kind!r}")
    try:
        return kinds[kind](**{k: v for k, v in data.items() if k != "peft_type"})
    except TypeError as error:
        raise ValueError(f"invalid settings for adapter type {kind}: {error}") from None


def _restore(model: nn.Module, trainable: Mapping[int, bool], active: Mapping[Any, list[str]]) -> None:
    """Restores the active adapters and `requires_grad`, which peft changes on injection. Freezes new parameters."""
    for layer, names in active.items():
        layer._active_adapter = names
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), False))


def _names(layer: WrappedLayer) -> list[str]:
    """Lists the adapters on a layer, in the order in which they were injected."""
    return list(dict.fromkeys(n for attr in layer.adapter_layer_names for n in getattr(layer, attr, {}) or {}))


def _holds(layer: WrappedLayer, name: str) -> bool:
    return name in _names(layer)
