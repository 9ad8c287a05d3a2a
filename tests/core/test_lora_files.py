"""LoRA files of other programs: diffusers' own `load_lora_weights`, peft's own model and merged weights are the oracles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.concept import Provenance, attach, capture, export, read, save
from shared.concept.lora_import import concept_name, import_lora
from shared.trainable import Lora

LORA = "pytorch_lora_weights.safetensors"
PROMPT = "a photo of a sks mug"
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
#: Layers of every kind: with several ranks, some with a scale that is not 1.
SD_ROLES = ("attention", "feed_forward", "proj", "conv")
FLUX_ROLES = ("attention", "feed_forward", "proj")
TEXT = ("text_encoder", "text_encoder.mlp")

Pairs = dict[tuple[str, str], tuple[Tensor, Tensor, float]]  # component, path -> down, up, alpha


def low_rank(backbone: Any, roles: tuple[str, ...], ranks: tuple[int, ...] = (4, 2, 3), scaled: bool = True) -> Pairs:
    """Random matrices for the layers of the roles, of several ranks and (`scaled`) with several alphas."""
    draw = torch.Generator().manual_seed(1)
    out: Pairs = {}
    for group in (group for role in roles for group in backbone.group(role)):
        for path in group.modules:
            weight = backbone.components[group.component].get_submodule(path).weight
            rank = ranks[len(out) % len(ranks)]
            down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
            up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
            alpha = (rank, 1.0, 0.7 * rank)[len(out) % 3] if scaled else rank
            out[group.component, path] = down, up, alpha
    return out


def output(backbone: Any) -> tuple[Tensor, Tensor]:
    """(the denoiser's output, the text's context), both with what is attached."""
    with torch.no_grad():
        text = backbone.encode([PROMPT])
        x = torch.randn(1, *backbone.latent_shape(32, 32), generator=torch.Generator().manual_seed(3))
        return backbone.predict(x, torch.tensor([300]), text), text.context


def merged(backbone: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The outputs with each pair added to its weight: the closed form."""
    weights = {key: backbone.components[key[0]].get_submodule(key[1]).weight for key in pairs}
    before = {key: weight.data.clone() for key, weight in weights.items()}
    for key, (down, up, alpha) in pairs.items():
        delta = up.flatten(1).double() @ down.flatten(1).double() * (alpha / len(down))
        weights[key].data = (before[key].double() + delta.view(before[key].shape)).float()
    try:
        return output(backbone)
    finally:
        for key, weight in weights.items():
            weight.data = before[key]


def imported(backbone: Any, path: Path, token: str = "sks mug") -> tuple[Tensor, Tensor]:
    """The outputs with the file attached, without a warning; the backbone is the same afterwards."""
    before = output(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept = import_lora(path, backbone, token)
        attach(concept, backbone)
    after = output(backbone)
    assert (after[0] - before[0]).abs().max() > 0.01
    backbone.remove(concept.name)
    assert all(torch.equal(a, b) for a, b in zip(before, output(backbone), strict=True))
    return after


def by_diffusers(backbone: Any, pipe: Any, path: Path) -> tuple[Tensor, Tensor]:
    """The same outputs where diffusers itself loaded the file into a pipeline of the same weights."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    return output(type(backbone)(pipe, "theirs"))


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def spelled(
    pairs: Pairs, prefixes: Mapping[str, str], ends: tuple[str, str], flat: bool, alphas: bool
) -> dict[str, Tensor]:
    """Tensors by key; CLIP's layers with the `text_model.` that files have."""
    out: dict[str, Tensor] = {}
    for (component, path), (down, up, alpha) in pairs.items():
        clip = component == "text_encoder" and not path.startswith("text_model.")
        full = ("text_model." if clip else "") + path
        name = prefixes[component] + (full.replace(".", "_") if flat else full)
        out |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        out |= {f"{name}.alpha": torch.tensor(float(alpha))} if alphas else {}
    return {key: tensor.contiguous() for key, tensor in out.items()}


def kohya(pairs: Pairs, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    return spelled(pairs, prefixes, ("lora_down", "lora_up"), flat=True, alphas=True)


SD_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
SD_DOTTED = {"unet": "unet.", "text_encoder": "text_encoder."}
FLUX_DOTTED = {"transformer": "transformer.", "text_encoder": "text_encoder."}


# --- Stable Diffusion


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions around attention", "linear layers"])
@pytest.mark.parametrize("text", [(), TEXT], ids=["network", "text too"])
def test_kohya_s_names(new_sd: Callable[..., Any], make_tiny_sd: Any, tmp_path: Path, text: Any, linear: bool) -> None:
    backbone, path = new_sd(linear=linear), tmp_path / "sks.safetensors"
    roles = ("attention", "feed_forward", "proj", *text)
    pairs = low_rank(backbone, roles)
    save_file(kohya(pairs, SD_KOHYA), path)
    same(imported(backbone, path), merged(backbone, pairs))
    # diffusers ignores alphas that differ between layers (it looks for them under its old names): one alpha for all
    pairs = {key: (down, up, 1.5) for key, (down, up, _) in low_rank(backbone, roles, ranks=(4,)).items()}
    save_file(kohya(pairs, SD_KOHYA), path)
    ours = imported(backbone, path)
    same(ours, merged(backbone, pairs))
    same(ours, by_diffusers(backbone, make_tiny_sd(linear=linear), path))


def test_kohya_s_convolutions_of_every_kind(sd: Any, tmp_path: Path) -> None:
    """Also those of the checkpoint's ends and between blocks, and in LyCORIS' Tucker form."""
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
    assert torch.allclose(one, convolve(convolve(x, outer), mid, padding=1), atol=1e-3), "the oracle itself"
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
def test_diffusers_names_of_every_age(sd: Any, tmp_path: Path, ends: Any, prefixes: Any) -> None:
    pairs = low_rank(sd, (*SD_ROLES, *TEXT), scaled=False)
    save_file(spelled(pairs, prefixes, ends, flat=False, alphas=False), tmp_path / LORA)
    same(imported(sd, tmp_path / LORA), merged(sd, pairs))


def test_attention_processors_of_the_first_scripts(sd: Any, make_tiny_sd: Any, tmp_path: Path) -> None:
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


def test_the_ldm_checkpoint_s_names(sd: Any, tmp_path: Path) -> None:
    """Of the tiny U-Net's four levels of blocks, written out as the original repository counts them."""
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
def test_what_diffusers_itself_saves(sd: Any, make_tiny_sd: Any, tmp_path: Path, settings: Any) -> None:
    """With the settings in the header, where alpha is, and text encoder."""
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
def test_what_peft_itself_saves(sd: Any, make_tiny_sd: Any, tmp_path: Path, settings: Any) -> None:
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
    with pytest.raises(ValueError, match=r"adapter_config\.json is not beside it: it says how strong"):
        import_lora(tmp_path / "mug-lora", sd, "sks mug")


def test_a_text_encoder_that_peft_saved(sd: Any, make_tiny_sd: Any, tmp_path: Path) -> None:
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


# --- FLUX


def test_flux_by_diffusers_names(flux: Any, make_tiny_flux: Any, tmp_path: Path) -> None:
    pairs = low_rank(flux, (*FLUX_ROLES, *TEXT), scaled=False)
    save_file(spelled(pairs, FLUX_DOTTED, ("lora_A", "lora_B"), flat=False, alphas=False), tmp_path / LORA)
    ours = imported(flux, tmp_path / LORA)
    same(ours, merged(flux, pairs))
    same(ours, by_diffusers(flux, make_tiny_flux(), tmp_path / LORA))


#: Black Forest Labs' names of one layer each, and of several that are one matrix there.
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
    """Pairs by Black Forest Labs' names, and the same as pairs of the layers."""
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


def test_flux_by_kohya_s_names(flux: Any, make_tiny_flux: Any, tmp_path: Path) -> None:
    theirs, pairs = fused(flux)
    clip = low_rank(flux, TEXT)
    prefixes = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}
    tensors = kohya({("transformer", name): pair for name, pair in theirs.items()} | clip, prefixes)
    save_file(tensors, tmp_path / "sks.safetensors")
    same(imported(flux, tmp_path / "sks.safetensors"), merged(flux, pairs | clip))
    # diffusers takes the single blocks' joint matrix for one of FLUX.1's own width, and of CLIP's alphas one for all
    known = {key: tensor for key, tensor in tensors.items() if "linear1" not in key}
    known |= {key: torch.tensor(1.5) for key in known if key.endswith(".alpha")}
    known = {key: tensor for key, tensor in known.items() if "lora_te1" not in key or _rank(known, key) == 4}
    save_file(known, tmp_path / "known.safetensors")
    ours = imported(flux, tmp_path / "known.safetensors")
    same(ours, by_diffusers(flux, make_tiny_flux(), tmp_path / "known.safetensors"))


def test_flux_by_comfyui_s_names_with_t5_and_the_ends(flux: Any, tmp_path: Path) -> None:
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
        # their last layer gives shift and scale, diffusers' scale and shift
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
def test_kohya_s_dora(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """W' = m (W + s B A) / |W + s B A|, a row for each output (https://arxiv.org/abs/2402.09353, eq. 5)."""
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


def test_dora_beside_lora_in_one_network(sd: Any, tmp_path: Path) -> None:
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


def test_dora_of_each_input_is_said(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("attention",))
    tensors = kohya(pairs, SD_KOHYA)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for shape in ([1, 32], [32]):
        save_file(tensors | {f"{name}.dora_scale": torch.ones(shape)}, tmp_path / "x.safetensors")
        with pytest.raises(
            ValueError, match=r"DoRA scale of shape \[(1, )?32\] on a layer of 32 outputs and 32 inputs"
        ):
            import_lora(tmp_path / "x.safetensors", sd, "sks mug")


# --- our own exports, and concepts made of files


@pytest.mark.parametrize("settings", [{"alpha": 2.0}, {"dora": True}], ids=["lora", "dora"])
def test_our_own_export_comes_back(backbone: Any, tmp_path: Path, settings: Any) -> None:
    roles = ("attention", "feed_forward", "text_encoder")
    group = Lora(roles=roles, rank=4, **settings).inject(backbone, "my-mug", "lora", 0)
    for parameter in group.parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = output(backbone)
    concept = capture(backbone, "my-mug", Provenance(class_noun="mug"))
    backbone.remove("my-mug")
    export(concept, tmp_path / "cup", backbone=backbone)
    same(imported(backbone, tmp_path / "cup"), expected)
    back = import_lora(tmp_path / "cup", backbone, "sks mug")
    assert (back.name, back.meta.class_noun, back.meta.kind) == ("cup", "mug", "subject")


def test_an_imported_file_is_a_concept_like_any_other(sd: Any, tmp_path: Path) -> None:
    save_file(kohya(low_rank(sd, SD_ROLES), SD_KOHYA), tmp_path / "My mug (v2).safetensors")
    concept = import_lora(tmp_path / "My mug (v2).safetensors", sd, "ohwx teapot")
    save(concept, tmp_path / "pot.concept")
    attach(read(tmp_path / "pot.concept"), sd)
    assert sd.placeholders["My-mug-v2"].words == "ohwx teapot"
    expected = output(sd)
    sd.remove("My-mug-v2")
    assert export(read(tmp_path / "pot.concept"), tmp_path / "out", backbone=sd)["checks"]["denoiser"]["ok"]
    same(imported(sd, tmp_path / "out"), expected)


def test_a_strength_scales_it(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("attention",))
    save_file(kohya(pairs, SD_KOHYA), tmp_path / "sks.safetensors")
    attach(import_lora(tmp_path / "sks.safetensors", sd), sd, 0.5)
    half = output(sd)
    sd.remove("sks")
    same(half, merged(sd, {key: (down, up, 0.5 * alpha) for key, (down, up, alpha) in pairs.items()}))


def test_half_precision_tensors_keep_their_values(sd: Any, tmp_path: Path) -> None:
    pairs = {k: (d.half(), u.half(), a) for k, (d, u, a) in low_rank(sd, ("attention",)).items()}
    save_file(kohya(pairs, SD_KOHYA), tmp_path / "sks.safetensors")
    same(imported(sd, tmp_path / "sks.safetensors"), merged(sd, pairs))


def test_names(tmp_path: Path) -> None:
    (tmp_path / "my mug").mkdir()
    for file, name in (
        (LORA, "my-mug"),
        ("adapter_model.safetensors", "my-mug"),
        ("a.b.safetensors", "a-b"),
        ("--.safetensors", "lora"),
    ):
        (tmp_path / "my mug" / file).write_bytes(b"")
        assert concept_name(tmp_path / "my mug" / file) == name


# --- what does not fit


def test_every_name_without_a_layer_is_named(sd: Any, tmp_path: Path) -> None:
    tensors = kohya(low_rank(sd, ("attention",)), SD_KOHYA)
    extra = {
        "lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 16),
        "lora_unet_nowhere_to_q.lora_up.weight": torch.ones(16, 2),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
        "bundle_emb.sks.string_to_param.*": torch.ones(1, 16),
    }
    save_file(tensors | extra, tmp_path / "sks.safetensors")
    with pytest.warns(UserWarning, match="3 of its names have no layer here and are left out: ") as caught:
        concept = import_lora(tmp_path / "sks.safetensors", sd, "sks mug")
    text = str(caught[0].message)
    assert all(
        name in text
        for name in ("lora_unet_nowhere_to_q", "lora_unet_conv_in (alpha)", "bundle_emb.sks.string_to_param.*")
    )
    assert concept.meta.metrics["names_without_layer"] == 3


def _sdxl(sd: Any) -> dict[str, Tensor]:
    pairs = low_rank(sd, ("attention",))
    wide = {key: (torch.ones(len(d), 640), torch.ones(1280, len(d)), a) for key, (d, _, a) in pairs.items()}
    return kohya(wide, SD_KOHYA) | {
        "lora_te2_x.lora_down.weight": torch.ones(1, 1),
        "lora_te2_x.lora_up.weight": torch.ones(1, 1),
    }


def _flux(sd: Any) -> dict[str, Tensor]:
    return {
        "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(1, 4),
        "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(4, 1),
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            _flux,
            r"another architecture, by its names for FLUX: on tiny \(stable_diffusion\) 1 of its 1 names are no layer here",
        ),
        (
            _sdxl,
            r"by its names for Stable Diffusion XL: on tiny .* of another shape, such as lora_unet_\w+ \(\[1280, 640\] in",
        ),
    ],
)
def test_another_architecture_is_one_error(sd: Any, tmp_path: Path, build: Any, message: str) -> None:
    save_file(build(sd), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        import_lora(tmp_path / "x.safetensors", sd, "sks mug")
    assert not sd.adapters and not sd.placeholders


def test_the_header_s_own_word_for_its_model_comes_first(sd: Any, tmp_path: Path) -> None:
    save_file(_flux(sd), tmp_path / "x.safetensors", metadata={"ss_base_model_version": "flux1"})
    with pytest.raises(ValueError, match="by its names for flux1"):
        import_lora(tmp_path / "x.safetensors", sd)


class _Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "short"])
def test_a_file_that_is_not_safetensors_is_refused_unopened(
    sd: Any, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sks.safetensors"
    if kind == "torch":
        torch.save({"x": _Trap()}, file)
    else:
        file.write_bytes({"pickle": pickle.dumps(_Trap()), "text": b"not a LoRA at all", "short": b"x"}[kind])
    message = "is a pickle, which can carry code" if kind in ("pickle", "torch") else "not a safetensors file"
    with pytest.raises(ValueError, match=message):
        import_lora(file, sd, "sks mug")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}, "half a pair, its up matrix is missing"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, "holds LoHa .*LoRA and DoRA are read, and nothing else"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(1, 1)}, "holds LoKr"),
        ({"lora_unet_conv_in.diff": torch.ones(1, 1)}, "holds whole weights"),
        ({"lora_unet_conv_in.lora_up.bias": torch.ones(1)}, "holds LoRA with a bias"),
        ({"a.weight": torch.ones(1)}, "is no LoRA: it holds no pair"),
        ({"x.lora_down.weight": torch.ones(2, 3), "x.lora_up.weight": torch.ones(3, 4)}, "which are no pair"),
        ({"x.lora_down.weight": torch.full((1, 1), float("nan"))}, "not numbers"),
    ],
)
def test_files_that_cannot_be_read_are_said(sd: Any, tmp_path: Path, tensors: Any, message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        import_lora(tmp_path / "x.safetensors", sd)


def test_one_layer_twice_is_said(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("cross_attention.q",))
    both = kohya(pairs, SD_KOHYA) | spelled(pairs, SD_DOTTED, ("lora_A", "lora_B"), flat=False, alphas=False)
    save_file({key: tensor.clone() for key, tensor in both.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"has unet\.\S+ twice, as '\S+' and as '\S+'"):
        import_lora(tmp_path / "x.safetensors", sd)


def test_settings_of_another_rank_are_said(sd: Any, make_tiny_sd: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_tiny_sd().unet, LoraConfig(r=4, target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="has rank 2, and its settings say 4"):
        import_lora(tmp_path, sd)
