"""Other programs' LoRA files for Stable Diffusion give the same results as diffusers, peft and merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.concept import attach
from shared.concept.lora_import import import_lora
from tests.core.lora_pairs import (
    LORA,
    SD_DOTTED,
    SD_KOHYA,
    SD_ROLES,
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


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions around attention", "linear layers"])
@pytest.mark.parametrize("text", [(), TEXT], ids=["network", "text too"])
def test_files_with_kohya_key_names_are_read(
    new_sd: Callable[..., Any], make_tiny_sd: Any, tmp_path: Path, text: Any, linear: bool
) -> None:
    backbone, path = new_sd(linear=linear), tmp_path / "sks.safetensors"
    roles = ("attention", "feed_forward", "proj", *text)
    pairs = low_rank(backbone, roles)
    save_file(kohya(pairs, SD_KOHYA), path)
    same(imported(backbone, path), merged(backbone, pairs))
    # If the alphas differ between layers, diffusers looks for them under its old names and does not find them, so
    # all alphas are equal here.
    pairs = {key: (down, up, 1.5) for key, (down, up, _) in low_rank(backbone, roles, ranks=(4,)).items()}
    save_file(kohya(pairs, SD_KOHYA), path)
    ours = imported(backbone, path)
    same(ours, merged(backbone, pairs))
    same(ours, by_diffusers(backbone, make_tiny_sd(linear=linear), path))


def test_kohya_convolutions_of_every_kind_are_read(sd: Any, tmp_path: Path) -> None:
    """Includes the network's first and last convolutions, those between blocks, and one in LyCORIS' Tucker form."""
    pairs = low_rank(sd, ("denoiser",))
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < {path for _, path in pairs}
    tensors = kohya(pairs, SD_KOHYA)
    save_file(tensors, tmp_path / "all.safetensors")
    ours = imported(sd, tmp_path / "all.safetensors")
    same(ours, merged(sd, pairs))
    key = ("unet", "mid_block.resnets.0.conv1")
    rank, inputs, draw = 3, pairs[key][0].shape[1], torch.Generator().manual_seed(2)
    outer, mid = torch.randn(rank, inputs, 1, 1, generator=draw), torch.randn(rank, rank, 3, 3, generator=draw)
    up = 0.3 * torch.randn(len(pairs[key][1]), rank, 1, 1, generator=draw)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors |= {f"{name}.lora_down.weight": outer, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.5)}, tmp_path / "tucker.safetensors")
    x = torch.randn(1, inputs, 8, 8, generator=draw)
    convolve = torch.nn.functional.conv2d
    one = convolve(x, torch.einsum("abij,bc->acij", mid, outer[:, :, 0, 0]), padding=1)
    assert torch.allclose(one, convolve(convolve(x, outer), mid, padding=1), atol=1e-3), (
        "this test must compose the kernels correctly"
    )
    pairs[key] = torch.einsum("abij,bc->acij", mid, outer[:, :, 0, 0]), up, 1.5
    same(imported(sd, tmp_path / "tucker.safetensors"), merged(sd, pairs))


@pytest.mark.parametrize(
    ("ends", "prefixes"),
    [
        (("lora_A", "lora_B"), SD_DOTTED),
        (("lora_A.default", "lora_B.default"), SD_DOTTED),
        (("lora.down", "lora.up"), SD_DOTTED),
        (("lora_linear_layer.down", "lora_linear_layer.up"), SD_DOTTED),
        (("lora_A", "lora_B"), {"unet": "", "text_encoder": ""}),
    ],
    ids=["diffusers", "an adapter's name", "older", "oldest", "without a prefix"],
)
def test_key_names_from_every_diffusers_version_are_read(sd: Any, tmp_path: Path, ends: Any, prefixes: Any) -> None:
    pairs = low_rank(sd, (*SD_ROLES, *TEXT), scaled=False)
    save_file(spelled(pairs, prefixes, ends, flat=False, alphas=False), tmp_path / LORA)
    same(imported(sd, tmp_path / LORA), merged(sd, pairs))


def test_attention_processor_names_from_the_first_training_scripts_are_read(
    sd: Any, make_tiny_sd: Any, tmp_path: Path
) -> None:
    pairs = low_rank(sd, ("attention",), ranks=(4,), scaled=False)
    tensors = {}
    for (_, path), (down, up, _) in pairs.items():
        layer, leaf = path.removesuffix(".0").rsplit(".", 1)
        name = f"unet.{layer}.processor.{leaf}_lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    save_file(tensors, tmp_path / LORA)
    ours = imported(sd, tmp_path / LORA)
    same(ours, merged(sd, pairs))
    same(ours, by_diffusers(sd, make_tiny_sd(), tmp_path / LORA))


def test_key_names_from_the_original_ldm_checkpoints_are_read(sd: Any, tmp_path: Path) -> None:
    """The tiny U-Net's block names are written out with the numbers that the original repository would use."""
    pairs = low_rank(sd, ("attention",), ranks=(2,))
    theirs = {
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "up_blocks.2.attentions.0": "output_blocks.4.1",
        "up_blocks.2.attentions.1": "output_blocks.5.1",
    }
    named: Pairs = {}
    for (component, path), pair in pairs.items():
        ours = next(o for o in theirs if path.startswith(o + "."))
        named[component, theirs[ours] + path.removeprefix(ours)] = pair
    draw = torch.Generator().manual_seed(4)
    for original, path in {
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
        "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.3.2.conv": "up_blocks.1.upsamplers.0.conv",
        "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
        "out.2": "conv_out",
    }.items():
        weight = sd.unet.get_submodule(path).weight
        down = 0.3 * torch.randn(2, *weight.shape[1:], generator=draw)
        up = 0.3 * torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=draw)
        named["unet", original] = pairs["unet", path] = down, up, 1.0
    save_file(kohya(named, SD_KOHYA), tmp_path / "ldm.safetensors")
    same(imported(sd, tmp_path / "ldm.safetensors"), merged(sd, pairs))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_files_saved_by_diffusers_itself_are_read(sd: Any, make_tiny_sd: Any, tmp_path: Path, settings: Any) -> None:
    """The files also contain a LoRA for the text encoder, and their headers contain the settings, including alpha."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = make_tiny_sd()
    unet = {"rank_pattern": {"mid_block.attentions.0.proj_in": 2}, "alpha_pattern": {"to_k": 7}}
    pipe.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "proj_in", "conv1"], **unet, **settings)
    )
    pipe.text_encoder.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "fc1"], **settings))
    draw = torch.Generator().manual_seed(5)
    for network in (pipe.unet, pipe.text_encoder):
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    expected = output(type(sd)(pipe, "theirs"))
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **_collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}),
    )
    same(imported(sd, tmp_path), expected)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_files_saved_by_peft_itself_are_read(sd: Any, make_tiny_sd: Any, tmp_path: Path, settings: Any) -> None:
    from peft import LoraConfig, get_peft_model

    pipe = make_tiny_sd()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv2"], rank_pattern={"to_q": 2}, **settings
    )
    model = get_peft_model(pipe.unet, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
    expected = output(type(sd)(pipe, "theirs"))
    model.save_pretrained(tmp_path / "mug-lora")
    same(imported(sd, tmp_path / "mug-lora"), expected)
    (tmp_path / "mug-lora" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json, which contains the LoRA's scale, is not next to it"):
        import_lora(tmp_path / "mug-lora", sd, "sks mug")


def test_a_text_encoder_saved_by_peft_is_read(sd: Any, make_tiny_sd: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    pipe = make_tiny_sd()
    model = get_peft_model(pipe.text_encoder, LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "fc1"]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
    expected = output(type(sd)(pipe, "theirs"))
    model.save_pretrained(tmp_path / "text")
    concept = import_lora(tmp_path / "text", sd, "sks mug")
    attach(concept, sd)
    same(output(sd), expected)
