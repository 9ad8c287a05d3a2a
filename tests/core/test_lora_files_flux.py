"""Other programs' LoRA files for FLUX, and DoRA files, give the same results as merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.concept import attach
from shared.concept.lora_import import import_lora
from tests.core.lora_pairs import (
    FLUX_DOTTED,
    FLUX_ROLES,
    LORA,
    SD_KOHYA,
    TEXT,
    Pairs,
    by_diffusers,
    imported,
    kohya,
    low_rank,
    merged,
    output,
    same,
    spelled,
)


def test_flux_files_with_diffusers_key_names_are_read(flux: Any, make_tiny_flux: Any, tmp_path: Path) -> None:
    pairs = low_rank(flux, (*FLUX_ROLES, *TEXT), scaled=False)
    save_file(spelled(pairs, FLUX_DOTTED, ("lora_A", "lora_B"), flat=False, alphas=False), tmp_path / LORA)
    ours = imported(flux, tmp_path / LORA)
    same(ours, merged(flux, pairs))
    same(ours, by_diffusers(flux, make_tiny_flux(), tmp_path / LORA))


#: The name of each matrix in Black Forest Labs' files, and the diffusers layers that share the matrix.
BFL = {
    "double_blocks.{i}.img_attn.qkv": tuple(f"transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{i}.txt_attn.qkv": tuple(f"transformer_blocks.{{i}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{i}.img_attn.proj": ("transformer_blocks.{i}.attn.to_out.0",),
    "double_blocks.{i}.txt_attn.proj": ("transformer_blocks.{i}.attn.to_add_out",),
    "double_blocks.{i}.img_mlp.0": ("transformer_blocks.{i}.ff.net.0.proj",),
    "double_blocks.{i}.img_mlp.2": ("transformer_blocks.{i}.ff.net.2",),
    "double_blocks.{i}.txt_mlp.0": ("transformer_blocks.{i}.ff_context.net.0.proj",),
    "double_blocks.{i}.txt_mlp.2": ("transformer_blocks.{i}.ff_context.net.2",),
    "double_blocks.{i}.img_mod.lin": ("transformer_blocks.{i}.norm1.linear",),
    "double_blocks.{i}.txt_mod.lin": ("transformer_blocks.{i}.norm1_context.linear",),
    "single_blocks.{i}.linear1": (
        *(f"single_transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{i}.proj_mlp",
    ),
    "single_blocks.{i}.linear2": ("single_transformer_blocks.{i}.proj_out",),
    "single_blocks.{i}.modulation.lin": ("single_transformer_blocks.{i}.norm.linear",),
}


def fused(flux: Any) -> tuple[dict[str, tuple[Tensor, Tensor, float]], Pairs]:
    """Returns pairs keyed by Black Forest Labs' names, and the same pairs keyed by diffusers' layers."""
    draw = torch.Generator().manual_seed(6)
    theirs: dict[str, tuple[Tensor, Tensor, float]] = {}
    ours: Pairs = {}
    for i in range(2):
        for name, paths in BFL.items():
            weights = [flux.transformer.get_submodule(path.format(i=i)).weight for path in paths]
            rows = [len(w) for w in weights]
            down = 0.3 * torch.randn(3, weights[0].shape[1], generator=draw)
            up = 0.3 * torch.randn(sum(rows), 3, generator=draw)
            theirs[name.format(i=i)] = down, up, 1.5
            for path, part in zip(paths, up.split(rows), strict=True):
                ours["transformer", path.format(i=i)] = down, part, 1.5
    return theirs, ours


def _rank(tensors: dict[str, Tensor], key: str) -> int:
    return len(tensors[key.partition(".")[0] + ".lora_down.weight"])


def test_flux_files_with_kohya_key_names_are_read(flux: Any, make_tiny_flux: Any, tmp_path: Path) -> None:
    theirs, pairs = fused(flux)
    clip = low_rank(flux, TEXT)
    prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}
    tensors = kohya({("transformer", name): pair for name, pair in theirs.items()} | clip, prefixes)
    save_file(tensors, tmp_path / "sks.safetensors")
    same(imported(flux, tmp_path / "sks.safetensors"), merged(flux, pairs | clip))
    # diffusers assumes FLUX.1's width for the joint matrix of a single-stream block, and one alpha for all of CLIP
    known = {key: tensor for key, tensor in tensors.items() if "linear1" not in key}
    known |= {key: torch.tensor(1.5) for key in known if key.endswith(".alpha")}
    known = {key: tensor for key, tensor in known.items() if "lora_te1" not in key or _rank(known, key) == 4}
    save_file(known, tmp_path / "known.safetensors")
    ours = imported(flux, tmp_path / "known.safetensors")
    same(ours, by_diffusers(flux, make_tiny_flux(), tmp_path / "known.safetensors"))


def test_flux_files_with_comfyui_key_names_are_read_including_t5_and_the_first_and_last_layers(
    flux: Any, tmp_path: Path
) -> None:
    theirs, pairs = fused(flux)
    t5, ends = (
        low_rank(flux, ("text_encoder_2",)),
        {"img_in": "x_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1"},
    )
    draw = torch.Generator().manual_seed(8)
    for name, path in {**ends, "final_layer.adaLN_modulation.1": "norm_out.linear"}.items():
        out, inputs = flux.transformer.get_submodule(path).weight.shape
        down, up = 0.3 * torch.randn(2, inputs, generator=draw), 0.3 * torch.randn(out, 2, generator=draw)
        theirs[name] = down, up, 2.0
        # the last layer returns the shift before the scale in the original, but after the scale in diffusers
        pairs["transformer", path] = down, torch.cat([up[out // 2 :], up[: out // 2]]) if "final" in name else up, 2.0
    tensors = {}
    for name, (down, up, alpha) in theirs.items():
        key = f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor([alpha])}
    tensors |= kohya(t5, {"text_encoder_2": "lora_te3_"})
    save_file(tensors, tmp_path / "comfy.safetensors")
    same(imported(flux, tmp_path / "comfy.safetensors"), merged(flux, pairs | t5))


# --- DoRA


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_kohya_dora_files_are_read(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Checks W' = m (W + s B A) / |W + s B A|, normalized per output row (https://arxiv.org/abs/2402.09353, eq. 5)."""
    backbone = request.getfixturevalue(kind)
    draw = torch.Generator().manual_seed(9)
    if kind == "flux":
        named, _ = fused(backbone)
        places = {
            name.format(i=i): tuple(p.format(i=i) for p in paths) for name, paths in BFL.items() for i in range(2)
        }
    else:
        pairs = low_rank(backbone, ("attention", "conv"))
        named = {path: pair for (_, path), pair in pairs.items()}
        places = {path: (path,) for path in named}
    tensors = kohya({("net", name): pair for name, pair in named.items()}, {"net": "lora_unet_"})
    before = {}
    for name, (down, up, alpha) in named.items():
        size = (0.5 + torch.rand(len(up), generator=draw)).view(-1, *[1] * (down.ndim - 1))
        tensors["lora_unet_" + name.replace(".", "_") + ".dora_scale"] = size
        weights = [backbone.denoiser.get_submodule(path).weight for path in places[name]]
        whole = torch.cat([w.data for w in weights])
        changed = whole + (up.flatten(1) @ down.flatten(1) * (alpha / len(down))).view(whole.shape)
        norm = changed.flatten(1).norm(dim=1).view(size.shape)
        new = (size * changed / norm).split([len(w) for w in weights])
        before |= {w: (w.data, n) for w, n in zip(weights, new, strict=True)}
    save_file(tensors, tmp_path / "dora.safetensors")
    ours = imported(backbone, tmp_path / "dora.safetensors")
    for weight, (_, changed) in before.items():
        weight.data = changed.contiguous()
    theirs = output(backbone)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_dora_and_lora_in_one_network_become_two_slots(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("cross_attention", "self_attention"), ranks=(2,))
    tensors = kohya(pairs, SD_KOHYA)
    dora = [path for _, path in pairs if "attn2" in path]
    for path in dora:
        name = "lora_unet_" + path.replace(".", "_")
        tensors[f"{name}.dora_scale"] = sd.unet.get_submodule(path).weight.norm(dim=1, keepdim=True)
    save_file(tensors, tmp_path / "both.safetensors")
    concept = import_lora(tmp_path / "both.safetensors", sd, "sks mug")
    counts = {slot: len(parts["unet"]["target_modules"]) for slot, parts in concept.meta.adapters.items()}
    assert counts == {"lora": len(pairs) - len(dora), "dora": len(dora)}
    attach(concept, sd)
    sd.remove(concept.name)


def test_dora_with_a_scale_per_input_is_refused(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("attention",))
    tensors = kohya(pairs, SD_KOHYA)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for shape in ([1, 32], [32]):
        save_file(tensors | {f"{name}.dora_scale": torch.ones(shape)}, tmp_path / "x.safetensors")
        with pytest.raises(
            ValueError, match=r"DoRA scale of shape \[(1, )?32\] on a layer with 32 outputs and 32 inputs"
        ):
            import_lora(tmp_path / "x.safetensors", sd, "sks mug")
