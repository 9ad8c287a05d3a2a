"""Maps the spellings of layer names in trainers' LoRA files to the layers of a backbone.

A single index covers all spellings. Dots and underscores are treated as equal, because names in kohya's files contain
no dots. Four spellings of a path are known: those of diffusers (which peft and kohya also use for Stable Diffusion),
Black Forest Labs (for FLUX), Wan, and the original (LDM) checkpoints of Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared.backbones.module_roles import leaf_names
from shared.backbones.protocol import Backbone
from shared.concept.diffusers_format import public_path

PEFT = "base_model.model."  # prefix of every name in peft's own files


@dataclass(frozen=True)
class Place:
    """The layers that one name in a file stands for. If there are several, the output rows in the file are split among
    them in order."""

    component: str
    paths: tuple[str, ...]
    halves_swapped: bool = False  # whether the file stores shift before scale (the layer stores scale before shift)


def layer_index(backbone: Backbone, file: str = "") -> dict[str, set[Place]]:
    """Maps every known spelling, flattened by `flat`, to the layers that it can stand for. An ambiguous spelling is
    mapped to several `Place`s.

    Args:
        file: the LoRA's file name. If it contains the name of an expert other than the first, the LoRA is for that
            expert, even if its layer names begin with the first expert's name
    """
    index: dict[str, set[Place]] = {}
    first, *others = backbone.noise_ranges
    named = next((expert for expert in others if f".{expert}." in file), None)
    for component, network in backbone.components.items():
        denoiser = component in backbone.noise_ranges
        if named and denoiser and component != named:
            continue
        before = ("", f"{component}.", *(_DENOISER if denoiser else _text_prefixes(component)))
        before += (f"{first}.",) if component == named else ()
        names = [(path, Place(component, (path,))) for path in leaf_names(network)]
        spelled = [(s, place) for path, place in names for s in _spellings(backbone, component, path)]
        if denoiser:
            spelled += list(_original(backbone, component, {path for path, _ in names}))
        for name, place in spelled:
            for prefix in before:
                index.setdefault(flat(prefix + name), set()).add(place)
    return index


def flat(name: str) -> str:
    """Returns a name without peft's prefix and without `.processor`, and with dots replaced by underscores."""
    return name.removeprefix(PEFT).replace(".processor.", ".").replace(".", "_")


#: The prefixes that kohya, OneTrainer and ComfyUI use for the denoiser.
_DENOISER = ("lora_unet_", "lora_transformer_", "diffusion_model.", "model.diffusion_model.")


def _text_prefixes(component: str) -> tuple[str, ...]:
    """Returns the prefixes for a text encoder. FLUX's T5 is encoder 3 in kohya and ComfyUI, but 2 in other programs."""
    if component == "text_encoder":
        return ("lora_te_", "lora_te1_")
    return ("lora_te2_", "lora_te3_") if component == "text_encoder_2" else ()


def _spellings(backbone: Backbone, component: str, path: str) -> set[str]:
    names = {path, public_path(backbone, component, path)}
    # older versions of diffusers omit the ".0" of "to_out.0"
    return names | {name.removesuffix(".0") for name in names if name.endswith(".to_out.0")}


def _original(backbone: Backbone, component: str, paths: set[str]) -> Iterator[tuple[str, Place]]:
    """Yields the layer names in a family's original checkpoints, except those of layers that this backbone lacks."""
    spell = next((_ORIGINAL[family] for family in sorted(backbone.reads) if family in _ORIGINAL), None)
    for name, *layers in spell(backbone.components[component]) if spell else ():
        if all(layer in paths for layer in layers):
            yield name, Place(component, tuple(layers), name.endswith("adaLN_modulation.1"))


def _flux(network: Any) -> Iterator[tuple[str, ...]]:
    """Yields (Black Forest Labs' name, diffusers' names) for each layer. Black Forest Labs stores queries, keys and
    values in one matrix."""
    for i in range(len(network.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv, out, norm, ff in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm1", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm1_context", "ff_context"),
        ):
            yield f"{theirs}.{stream}_attn.qkv", *(f"{ours}.attn.{leaf}" for leaf in qkv)
            yield f"{theirs}.{stream}_attn.proj", f"{ours}.attn.{out}"
            yield f"{theirs}.{stream}_mod.lin", f"{ours}.{norm}.linear"
            yield f"{theirs}.{stream}_mlp.0", f"{ours}.{ff}.net.0.proj"
            yield f"{theirs}.{stream}_mlp.2", f"{ours}.{ff}.net.2"
    for i in range(len(network.single_transformer_blocks)):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield f"{theirs}.linear1", *(f"{ours}.{leaf}" for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        yield f"{theirs}.linear2", f"{ours}.proj_out"
        yield f"{theirs}.modulation.lin", f"{ours}.norm.linear"
    for name, path in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
        yield name, path
    yield "final_layer.adaLN_modulation.1", "norm_out.linear"
    for name, path in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        yield f"{name}_in.in_layer", f"time_text_embed.{path}_embedder.linear_1"
        yield f"{name}_in.out_layer", f"time_text_embed.{path}_embedder.linear_2"


def _stable_diffusion(network: Any) -> Iterator[tuple[str, ...]]:
    """Yields (LDM's name, diffusers' name) for each layer of the U-Net. LDM numbers its blocks consecutively."""
    yield "input_blocks.0.0", "conv_in"
    yield "out.2", "conv_out"
    for number, leaf in ((0, "linear_1"), (2, "linear_2")):
        yield f"time_embed.{number}", f"time_embedding.{leaf}"
    known = {*leaf_names(network)}
    position = 0
    for i, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            position += 1
            yield from _ldm_layer(known, f"input_blocks.{position}", f"down_blocks.{i}", j)
        if getattr(block, "downsamplers", None):
            position += 1
            yield f"input_blocks.{position}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
    for j, ours in ((0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")):
        yield from _ldm_parts(known, f"middle_block.{j}", f"mid_block.{ours}")
    position = -1
    for i, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            position += 1
            yield from _ldm_layer(known, f"output_blocks.{position}", f"up_blocks.{i}", j)
        if getattr(block, "upsamplers", None):
            after = 2 if getattr(block, "attentions", None) else 1
            yield f"output_blocks.{position}.{after}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def _ldm_layer(known: set[str], theirs: str, ours: str, j: int) -> Iterator[tuple[str, str]]:
    yield from _ldm_parts(known, f"{theirs}.0", f"{ours}.resnets.{j}")
    yield from _ldm_parts(known, f"{theirs}.1", f"{ours}.attentions.{j}")


def _ldm_parts(known: set[str], theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for path in known:
        if path.startswith(f"{ours}."):
            leaf = path.removeprefix(f"{ours}.")
            yield f"{theirs}.{_LDM_RESNET.get(leaf, leaf)}", path


_LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _wan(network: Any) -> Iterator[tuple[str, str]]:
    """Yields (Wan's name, diffusers' name) for each layer."""
    for i in range(len(network.blocks)):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                yield f"blocks.{i}.{theirs}.{a}", f"blocks.{i}.{ours}.{b}"
        for a, b in (("0", "net.0.proj"), ("2", "net.2")):
            yield f"blocks.{i}.ffn.{a}", f"blocks.{i}.ffn.{b}"
    for kind in ("text", "time"):
        for a, b in ((0, 1), (2, 2)):
            yield f"{kind}_embedding.{a}", f"condition_embedder.{kind}_embedder.linear_{b}"
    yield "time_projection.1", "condition_embedder.time_proj"
    yield "head.head", "proj_out"


_ORIGINAL = {"flux": _flux, "stable_diffusion": _stable_diffusion, "wan": _wan}


#: Patterns in layer names that reveal which architecture a file was made for. The first match wins.
_SIGNS = (
    ("FLUX", r"double_blocks|single_blocks|single_transformer_blocks"),
    ("Stable Diffusion XL", r"lora_te2_|text_encoder_2|input_blocks_[78]_1_transformer_blocks_[2-9]"),
    ("Stable Diffusion XL", r"(down|up)_blocks_\d_attentions_\d_transformer_blocks_[2-9]"),
    ("Stable Diffusion 3", r"joint_blocks|transformer_blocks_\d+_attn_(add_|to_add)"),
    ("Wan", r"(^| |lora_unet_|model_)blocks_\d+_(self_attn|cross_attn|attn[12])_|blocks_\d+_ffn_"),
    ("LTX", r"(transformer|model)_transformer_blocks_\d+_attn[12]_"),
    ("Stable Diffusion 1 or 2", r"down_blocks|up_blocks|input_blocks|output_blocks"),
)


def looks_like(names: list[str]) -> str:
    """Returns the architecture that the layer names in a file suggest, or "" if they suggest none."""
    joined = " ".join(map(flat, names))
    return next((family for family, sign in _SIGNS if re.search(sign, joined)), "")
