"""peft layers injected into a backbone under a concept's name, and taken out again without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.io.adapter_settings import check_adapter, recordable
from shared.trainable.merged_forward import merge_in_forward
from shared.trainable.rank_by_noise import RankByNoise


class PeftAdapter:
    """One peft adapter in one component; satisfies `shared.backbones.protocol.Adapter`.

    peft's own switches act on all adapters of a model at once, and `set_adapter` makes what it names trainable again;
    so strength is set here layer by layer, and training is switched by `requires_grad_` alone.
    """

    def __init__(self, model: nn.Module, component: str, slot: str, peft_name: str, config: PeftConfig) -> None:
        self.model, self.component, self.slot, self.peft_name, self.config = model, component, slot, peft_name, config
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and _holds(m, peft_name)]
        self.seed = 0  # of the start; what is drawn there and not trained comes from it again
        self.min_rank: int | None = None  # of a LoRA whose rank falls with the noise
        # LoRA and kin keep a factor per adapter; what has none (OFT) can only be on or off
        self._chances: dict[tuple[Any, str], float] = {
            (layer, key): getattr(layer, key)[peft_name]
            for layer in self.layers
            for key in ("rank_dropout", "module_dropout")
            if peft_name in getattr(layer, key, {})
        }
        self._scaling = [dict(getattr(m, "scaling", {})).get(peft_name) for m in self.layers]

    @classmethod
    def inject(
        cls, backbone: Backbone, name: str, slot: str, component: str, config: PeftConfig, seed: int
    ) -> PeftAdapter:
        """Wrap the target modules of `component`, register the adapter under `name`; it starts frozen and active at 1.

        Raises ValueError when nothing matches, when a layer cannot be wrapped by this kind of adapter, and for settings
        that no concept can keep: now, and not after the training.
        """
        check_adapter(recordable(config_to_dict(config), [], seed), f"{slot}.{component}")
        model = backbone.components[component]
        peft_name = f"{name}__{slot}"
        while peft_name in getattr(
            model, "peft_config", {}
        ):  # an adapter that concepts share outlives the first of them
            peft_name += "_"
        trainable = {id(p): p.requires_grad for p in model.parameters()}
        active: dict[Any, list[str]] = {
            m: list(m._active_adapter) if isinstance(m._active_adapter, list) else [m._active_adapter]
            for m in model.modules()
            if isinstance(m, BaseTunerLayer)
        }
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # several concepts are meant here
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, model, adapter_name=peft_name)
            except (ValueError, TypeError, NotImplementedError) as error:
                cls(model, component, slot, peft_name, config).eject()  # what was wrapped before it failed
                _restore(model, trainable, active)
                raise ValueError(f"cannot put {config.peft_type} on {component}: {error}") from None
        adapter = cls(model, component, slot, peft_name, config)
        adapter.seed = seed
        for layer in adapter.layers:
            merge_in_forward(layer)
            active[layer] = [*active.get(layer, []), peft_name]
        _restore(model, trainable, active)
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()  # rounded away in half precision otherwise
        backbone.add_adapter(name, adapter)
        return adapter

    def modules(self) -> list[str]:
        """Dotted names of the layers that this adapter is on."""
        ids = {id(layer) for layer in self.layers}
        return sorted(name for name, module in self.model.named_modules() if id(module) in ids)

    def let_rank_fall(self, backbone: Backbone, min_rank: int) -> None:
        """The rank is `min_rank` at full noise and all of it at none (see `RankByNoise`); this leaves with the adapter.

        Raises ValueError where nothing knows the noise (text encoders), for DoRA, and for more than the rank.
        """
        recorded = recordable(config_to_dict(self.config), [], self.seed, min_rank)
        check_adapter(recorded, f"{self.slot}.{self.component}")
        if self.component not in backbone.noise_ranges:
            raise ValueError(f"{self.slot}: the rank cannot fall with the noise in {self.component}, which sees none")
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
        """Dropout of this adapter alone; the model itself stays in eval mode."""
        for layer in self.layers:
            for table in layer._modules.values():
                if isinstance(table, nn.ModuleDict) and self.peft_name in table:
                    table[self.peft_name].train(mode)
        for (layer, key), chance in self._chances.items():  # LoHa's and LoKr's is a number beside each adapter
            getattr(layer, key)[self.peft_name] = chance if mode else 0.0

    def set_strength(self, strength: float) -> None:
        for layer, scaling in zip(self.layers, self._scaling, strict=True):
            if scaling is None and strength not in (0.0, 1.0):
                raise ValueError(f"{self.config.peft_type} has no strength between off and on; asked for {strength}")
            on = {n for n in layer.active_adapters if n != self.peft_name} | ({self.peft_name} if strength else set())
            layer._active_adapter = [n for n in _names(layer) if n in on]  # in this order they are summed
            if scaling is not None and strength:
                layer.scaling[self.peft_name] = scaling * strength

    def state_dict(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.model, adapter_name=self.peft_name)
        return {f"{self.component}.{k}": v.detach().float().cpu().contiguous().clone() for k, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        current = self.state_dict()
        missing, extra = sorted(current.keys() - state.keys()), sorted(state.keys() - current.keys())
        if missing or extra:
            raise ValueError(
                f"adapter does not fit {self.component}: {len(missing)} tensors missing, {len(extra)} unknown, "
                f"for example {(missing + extra)[0]!r}"
            )
        for key, tensor in state.items():
            if tensor.shape != current[key].shape:
                raise ValueError(
                    f"adapter tensor {key!r} is {list(tensor.shape)}, this model needs {list(current[key].shape)}"
                )
        cut = len(self.component) + 1
        set_peft_model_state_dict(self.model, {k[cut:]: v for k, v in state.items()}, adapter_name=self.peft_name)

    def eject(self) -> None:
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, BaseTunerLayer) or not _holds(module, self.peft_name):
                continue
            # peft would switch on and make trainable whatever else is there, were this one still active
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
    """JSON-safe settings that rebuild the adapter: only what differs from peft's defaults, and its type."""
    plain = type(config)()
    out: dict[str, Any] = {"peft_type": getattr(config.peft_type, "value", config.peft_type)}
    for key, value in config.to_dict().items():
        if value != getattr(plain, key, None) and key != "peft_type":
            out[key] = sorted(value) if isinstance(value, set) else value
    return out


def config_from_dict(data: Mapping[str, Any]) -> PeftConfig:
    """The inverse of `config_to_dict`. ValueError on a type or a key that peft does not have."""
    kinds = {k.value if hasattr(k, "value") else str(k): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = data.get("peft_type")
    if kind not in kinds:
        raise ValueError(f"adapter type {kind!r} is unknown to this version of peft")
    try:
        return kinds[kind](**{k: v for k, v in data.items() if k != "peft_type"})
    except TypeError as error:
        raise ValueError(f"adapter settings do not fit {kind}: {error}") from None


def _restore(model: nn.Module, trainable: Mapping[int, bool], active: Mapping[Any, list[str]]) -> None:
    """What peft changes on its way: who is active, and who is trainable (new parameters start frozen)."""
    for layer, names in active.items():
        layer._active_adapter = names
    for parameter in model.parameters():
        parameter.requires_grad_(trainable.get(id(parameter), False))


def _names(layer: BaseTunerLayer) -> list[str]:
    """The adapters on a layer in the order of their injection."""
    return list(dict.fromkeys(n for attr in layer.adapter_layer_names for n in getattr(layer, attr, {}) or {}))


def _holds(layer: BaseTunerLayer, name: str) -> bool:
    return name in _names(layer)
