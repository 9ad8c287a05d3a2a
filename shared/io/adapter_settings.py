"""Checks the settings of a peft adapter. A file may contain only settings that describe the adapter's form.

The allowed settings are plain numbers, switches and names. Any other setting could import modules, read files, replace
layers or change base weights. It is refused when a file is read, and also before training, because the result could not
be saved. Importing this module loads no model library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

SEED = "seed"  # not a peft setting; seeds the random tensors that some adapter types draw and never train
MIN_RANK = "min_rank"  # not a peft setting; the lowest rank of a LoRA whose rank decreases as the noise increases
OWN = frozenset({SEED, MIN_RANK})

#: Settings used only to create or train an adapter. They do not describe the result and are left out of files.
_OF_THE_MAKING = frozenset(
    (
        *("task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "progressbar", "runtime_offload_base_weight"),
        *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "target_r"),
    )
)
#: Settings that describe the form of the layers, for every adapter type that wraps layers.
_FORM = frozenset(
    (
        *("peft_type", "target_modules", "feedforward_modules", "bias", "fan_in_fan_out", *OWN),
        *("r", "rank_pattern", "alpha", "alpha_pattern", "module_dropout", "rank_dropout", "scaling", "init_weights"),
        *("lora_alpha", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "init_lora_weights"),
        *("use_effective_conv2d", "rank_dropout_scale", "decompose_both", "decompose_factor"),  # LoHa, LoKr
        *("oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
        *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "apply_GS"),  # BOFT, HRA
        *("projection_prng_key", "save_projection", "d_initial", "vera_dropout", "init_ia3_weights"),  # VeRA, IA3
        *("pvera_dropout", "sample_at_inference", "generator_seed", "frod_dropout", "sparse_rate"),
        *("regularization_alpha", "sparse", "very_sparse", "randlora_dropout", "randlora_alpha"),
        *("n_frequency", "n_frequency_pattern", "random_loc_seed", "wavelet_family", "use_idwt"),  # Fourier, wavelets
        *("proportional_parameters", "random_seed", "mask_type", "block_size", "block_size_pattern"),
        *("delora_lambda", "lambda_pattern", "hira_dropout", "hybrid_r", "gralora_dropout", "gralora_k", "init_r"),
        *("decomposition_method", "init_scale", "para", "deft_dropout", "config_A_B", "config_C", "config_D_E"),
        *("stride_A", "num_B", "miss_dropout", "mini_r", "effective_rank", "depth", "act_fn"),
        *("poly_type", "n_tasks", "n_skills", "n_splits", "variant", "group_size", "sparsity", "select_top"),
        *("psoft_alpha", "psoft_dropout", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "psoft_orth"),
        *("psoft_mag_a", "psoft_mag_b", "cayley_neumann_eps", "save_precomputed_indices", "save_indices"),
        *("num_subspaces", "subspace_rank", "use_dynamic_rank", "svd_threshold", "use_asa", "asa_target_subspaces"),
        *("init_warmup", "final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta"),
        *("asa_schedule_exponent", "u", "weight_tying", "projection_seed", "init_v_bound", "tinylora_dropout"),
        *("proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "num_vectors", "vector_length"),
        *("topk", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
    )
)
_CHANGES_BASE = re.compile(r"(?i)pissa|olora|corda|loftq|eva|lora_ga")  # initializations that rewrite the base weights
_MAX_RANK, _MAX_LOKR_RANK = 4096, 10**6  # in LoKr, a rank above the layer's size means full matrices
_MAX_NUMBER = 2**24  # the limit for any number that could be a size
_PATTERN = re.compile(r"[\w.^$-]{1,256}")  # peft reads the keys of its patterns as regular expressions


def check_adapter(settings: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless every setting is allowed and is a plain number, a switch or a name of limited size."""
    for key, value in settings.items():
        if key not in _FORM:
            raise ValueError(f"{where} has the adapter setting {key!r}, which is not accepted from a file")
        if not (_names(value) if key in ("target_modules", "feedforward_modules") else _plain(key, value)):
            raise ValueError(
                f"{where}.{key} must be a number, a switch, or a list of module names; got {str(value)[:80]!r}"
            )
        if key.startswith(("init", "ab_svd")) and isinstance(value, str) and _CHANGES_BASE.search(value):
            raise ValueError(f"{where}.{key}={value!r} rewrites the base model's weights, which a concept cannot store")
    if settings.get("bias", "none") != "none":
        raise ValueError(
            f"{where}.bias trains the base model's own biases, which an adapter cannot store; use a `weights` part for them"
        )
    pattern = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    most = _MAX_LOKR_RANK if settings.get("peft_type") == "LOKR" else _MAX_RANK
    if any(r is not None and (not isinstance(r, int) or not 0 <= r <= most) for r in ranks):
        raise ValueError(f"{where}: ranks must be whole numbers up to {most}; got {ranks[:4]}")
    least = settings.get(MIN_RANK, 0)
    falls = MIN_RANK in settings
    if falls and not (type(least) is int and 0 <= least <= min((r for r in ranks if r is not None), default=8)):
        raise ValueError(f"{where}.{MIN_RANK} must be a whole number up to the rank; got {least!r}")
    if falls and (settings.get("peft_type") != "LORA" or settings.get("use_dora")):
        raise ValueError(f"{where}.{MIN_RANK}: only a plain LoRA can have a rank that depends on the noise")
    if not isinstance(settings.get("target_modules"), list):
        raise ValueError(f"{where}.target_modules must be a list of module names")


def recordable(
    settings: Mapping[str, Any], modules: list[str], seed: int, min_rank: int | None = None
) -> dict[str, Any]:
    """Returns the settings of an adapter on `modules` in the form in which a file stores them. Leaves out the settings
    used only to create or train it."""
    kept = {k: v.value if isinstance(v, Enum) else v for k, v in settings.items() if k not in _OF_THE_MAKING}
    own = {SEED: seed or None, MIN_RANK: min_rank}
    return {**kept, "target_modules": modules, **{key: value for key, value in own.items() if value is not None}}


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and 0 < len(v) <= 512 and v.isprintable() for v in value)


def _plain(key: str, value: Any) -> bool:
    if isinstance(value, str):
        return _PATTERN.fullmatch(value) is not None
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _PATTERN.fullmatch(k) and _number(k, v) for k, v in value.items())
    return value is None or _number(key, value)


def _number(key: str, value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    free = key == "r" or "seed" in key or "key" in key  # ranks are checked separately, and a seed may be any integer
    return isinstance(value, int) and (free or abs(value) <= _MAX_NUMBER)
