"""The peft methods that `kind: peft` offers, the settings that recipes may change, and why other methods are missing.

Each method was tested on linear layers and convolutions with peft 0.21.2 (see `tests/core/test_trainable_peft.py`). It
starts as the identity, receives a gradient, computes the same outputs after it is saved and loaded, leaves the network
unchanged when it is removed, and works on half-precision networks. Recipes cannot change settings that modify the base
weights, that prevent a start from the identity, or that name code for peft to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AdapterType:
    """One of peft's methods."""

    settings: frozenset[str]  # the settings that a recipe may change
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that make the adapter start as the identity
    exact_start: bool = True  # whether the adapter starts as the exact identity, not just up to rounding
    layers: str = "any"  # "any", "linear", or "linear or 1x1" (also convolutions with 1x1 kernels)


def _type(*settings: str, **more: Any) -> AdapterType:
    return AdapterType(frozenset(settings), **more)


_PATTERNS = ("rank_pattern", "alpha_pattern")
_LYCORIS = ("r", "alpha", *_PATTERNS, "rank_dropout", "module_dropout", "use_effective_conv2d")
_CAYLEY = ("use_cayley_neumann", "num_cayley_neumann_terms")
_ZERO = {"init_weights": True}

#: The available methods, by peft's names for them.
ADAPTER_TYPES: Mapping[str, AdapterType] = {
    "BEFT": _type(layers="linear"),
    "BOFT": _type("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    "C3A": _type("block_size", "block_size_pattern", fixed=_ZERO, layers="linear"),
    "DEFT": _type("r", "alpha", "para", "decomposition_method", layers="linear", exact_start=False),
    "FOURIERFT": _type(
        *("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed"), fixed=_ZERO, layers="linear"
    ),
    "GLORA": _type("r", "config_A_B", "config_C", "config_D_E", layers="linear"),
    "GRALORA": _type("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout", layers="linear"),
    "HIRA": _type("r", "rank_pattern", "hira_dropout"),
    "HRA": _type("r", "apply_GS", exact_start=False),
    "IA3": _type(fixed={"feedforward_modules": []}),
    "LILY": _type("r", "stride_A", "num_B", "scaling", layers="linear"),
    "LOHA": _type(*_LYCORIS),
    "LOKR": _type(*_LYCORIS, "rank_dropout_scale", "decompose_both", "decompose_factor"),
    "LORA": _type("r", "lora_alpha", *_PATTERNS, "lora_dropout", "use_dora", "use_rslora"),
    "MISS": _type("r", "mini_r", "miss_dropout", layers="linear"),
    "OFT": _type("r", "oft_block_size", "coft", "eps", "block_share", *_CAYLEY, layers="linear or 1x1"),
    "PEANUT": _type("r", "depth", "scaling", layers="linear"),
    "PSOFT": _type(
        *("r", "psoft_alpha", "psoft_dropout", "psoft_svd", "psoft_svd_lowrank_niter", "psoft_orth", "psoft_mag_a"),
        *("psoft_mag_b", "random_seed", *_CAYLEY, "cayley_neumann_eps"),
        layers="linear",
    ),
    "RANDLORA": _type(
        *("r", "projection_prng_key", "sparse", "very_sparse", "randlora_alpha", "randlora_dropout"), layers="linear"
    ),
    "ROAD": _type("variant", "group_size", layers="linear"),
    "SHIRA": _type("r", "random_seed", layers="linear"),
    "WAVEFT": _type(
        *("n_frequency", "n_frequency_pattern", "proportional_parameters", "scaling", "wavelet_family", "use_idwt"),
        "random_loc_seed",
        layers="linear",
    ),
}

_PROMPTS = "it learns prompts for a language model and adapts no layers"
_SHARED = "its layers share tensors that peft keeps on a wrapper around the whole model"
_HALF = "peft cannot run it with half-precision weights"
#: peft's other methods, and the reasons why they are not offered.
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), _PROMPTS
    ),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW"), _PROMPTS),
    **dict.fromkeys(("FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA"), _SHARED),
    **dict.fromkeys(("DELORA", "LN_TUNING"), _HALF),
    "ADALORA": "it needs calls between steps to allocate its ranks",
    "ADAMSS": "it needs calls between steps to choose its subspaces",
    "OSF": f"{_HALF}, and it trains nothing on convolutions",
    "POLY": "it needs a task number with every prediction",
    "SUPERTUNING": "it stores the positions of trained weights as numbers that are too large for a concept's tensors",
    "TRAINABLE_TOKENS": "use modifier.kind=learnable_token to learn new words",
    "XLORA": "it mixes adapters of a language model",
}


def why_not(peft_type: str) -> str:
    """Explains why a method is not offered, and lists the methods that are. Returns "" if the method is offered."""
    if peft_type in ADAPTER_TYPES:
        return ""
    reason = UNSUPPORTED.get(peft_type, "it has not been tested with this suite")
    return f"{peft_type!r} cannot be used: {reason}. Available: {', '.join(sorted(ADAPTER_TYPES))}."


def unsuited(peft_type: str, kernels: Mapping[str, Iterable[int]]) -> list[str]:
    """Lists the layers that an adapter of this type cannot wrap.

    Args:
        kernels: the kernel size of each layer, by the layer's name; () for a linear layer
    """
    allowed = ADAPTER_TYPES[peft_type].layers
    sides = {name: list(kernel) for name, kernel in kernels.items()}
    bad = {"any": lambda k: False, "linear": bool, "linear or 1x1": lambda k: any(side != 1 for side in k)}[allowed]
    return [name for name, kernel in sides.items() if bad(kernel)]
