"""LoRA files are imported as concepts. Our own exports are restored, and unusable files are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.concept import Provenance, attach, capture, export, read, save
from shared.concept.lora_import import concept_name, import_lora
from shared.trainable import Lora
from tests.core.lora_pairs import (
    LORA,
    SD_DOTTED,
    SD_KOHYA,
    SD_ROLES,
    imported,
    kohya,
    low_rank,
    merged,
    output,
    same,
    spelled,
)


@pytest.mark.parametrize("settings", [{"alpha": 2.0}, {"dora": True}], ids=["lora", "dora"])
def test_our_own_export_can_be_imported_again(backbone: Any, tmp_path: Path, settings: Any) -> None:
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


def test_the_strength_scales_the_effect_of_an_imported_file(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("attention",))
    save_file(kohya(pairs, SD_KOHYA), tmp_path / "sks.safetensors")
    attach(import_lora(tmp_path / "sks.safetensors", sd), sd, 0.5)
    half = output(sd)
    sd.remove("sks")
    same(half, merged(sd, {key: (down, up, 0.5 * alpha) for key, (down, up, alpha) in pairs.items()}))


def test_half_precision_tensors_keep_their_exact_values(sd: Any, tmp_path: Path) -> None:
    pairs = {k: (d.half(), u.half(), a) for k, (d, u, a) in low_rank(sd, ("attention",)).items()}
    save_file(kohya(pairs, SD_KOHYA), tmp_path / "sks.safetensors")
    same(imported(sd, tmp_path / "sks.safetensors"), merged(sd, pairs))


@pytest.mark.parametrize("as_stored", [torch.Tensor.int, torch.Tensor.half, lambda alpha: alpha.reshape(1)])
def test_alpha_is_read_in_every_stored_form(sd: Any, tmp_path: Path, as_stored: Any) -> None:
    pairs = {key: (down, up, 2.0) for key, (down, up, _) in low_rank(sd, ("attention",)).items()}
    tensors = {k: as_stored(v) if k.endswith(".alpha") else v for k, v in kohya(pairs, SD_KOHYA).items()}
    save_file(tensors, tmp_path / "sks.safetensors")
    same(imported(sd, tmp_path / "sks.safetensors"), merged(sd, pairs))


def test_the_concept_is_named_after_the_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "my mug").mkdir()
    for file, name in (
        (LORA, "my-mug"),
        ("adapter_model.safetensors", "my-mug"),
        ("a.b.safetensors", "a-b"),
        ("--.safetensors", "lora"),
    ):
        (tmp_path / "my mug" / file).write_bytes(b"")
        assert concept_name(tmp_path / "my mug" / file) == name


# --- files that do not match the model or cannot be read


def test_every_name_without_a_matching_layer_is_reported(sd: Any, tmp_path: Path) -> None:
    tensors = kohya(low_rank(sd, ("attention",)), SD_KOHYA)
    extra = {
        "lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 16),
        "lora_unet_nowhere_to_q.lora_up.weight": torch.ones(16, 2),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
        "bundle_emb.sks.string_to_param.*": torch.ones(1, 16),
    }
    save_file(tensors | extra, tmp_path / "sks.safetensors")
    with pytest.warns(UserWarning, match=r"names that match no layer of this model are ignored \(3\): ") as caught:
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
            r"another architecture \(apparently FLUX\): in tiny \(stable_diffusion\), 1 of the file's 1 layer names match",
        ),
        (
            _sdxl,
            r"\(apparently Stable Diffusion XL\): in tiny .* of a different shape, such as lora_unet_\w+ \(\[1280, 640\] in",
        ),
    ],
)
def test_a_file_for_another_architecture_causes_one_error(sd: Any, tmp_path: Path, build: Any, message: str) -> None:
    save_file(build(sd), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        import_lora(tmp_path / "x.safetensors", sd, "sks mug")
    assert not sd.adapters and not sd.placeholders


def test_the_model_named_in_the_header_takes_precedence(sd: Any, tmp_path: Path) -> None:
    save_file(_flux(sd), tmp_path / "x.safetensors", metadata={"ss_base_model_version": "flux1"})
    with pytest.raises(ValueError, match=r"\(apparently flux1"):
        import_lora(tmp_path / "x.safetensors", sd)


class _Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "short"])
def test_a_file_that_is_not_safetensors_is_refused_without_running_its_code(
    sd: Any, tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sks.safetensors"
    if kind == "torch":
        torch.save({"x": _Trap()}, file)
    else:
        file.write_bytes({"pickle": pickle.dumps(_Trap()), "text": b"not a LoRA at all", "short": b"x"}[kind])
    message = "is a pickle, which can contain code" if kind in ("pickle", "torch") else "not a safetensors file"
    with pytest.raises(ValueError, match=message):
        import_lora(file, sd, "sks mug")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}, r"half a pair \(the up matrix is missing\)"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}, "contains LoHa .*only LoRA and DoRA are supported"),
        ({"lora_unet_conv_in.lokr_w1": torch.ones(1, 1)}, "contains LoKr"),
        ({"lora_unet_conv_in.diff": torch.ones(1, 1)}, "contains full weights"),
        ({"lora_unet_conv_in.lora_up.bias": torch.ones(1)}, "contains LoRA with a bias"),
        ({"a.weight": torch.ones(1)}, "is not a LoRA: it contains no pair"),
        ({"x.lora_down.weight": torch.ones(2, 3), "x.lora_up.weight": torch.ones(3, 4)}, "which do not form a pair"),
        (
            {"x.lora_down.weight": torch.ones(1, 1), "x.lora_up.weight": torch.ones(1, 1), "x.alpha": torch.ones(2)},
            r"has an alpha of shape \[2\] instead of one number",
        ),
        ({"x.lora_down.weight": torch.full((1, 1), float("nan"))}, "NaN or Inf"),
    ],
)
def test_the_error_says_why_a_file_cannot_be_read(sd: Any, tmp_path: Path, tensors: Any, message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        import_lora(tmp_path / "x.safetensors", sd)


def test_a_layer_that_occurs_twice_is_an_error(sd: Any, tmp_path: Path) -> None:
    pairs = low_rank(sd, ("cross_attention.q",))
    both = kohya(pairs, SD_KOHYA) | spelled(pairs, SD_DOTTED, ("lora_A", "lora_B"), flat=False, alphas=False)
    save_file({key: tensor.clone() for key, tensor in both.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"contains unet\.\S+ twice, as '\S+' and as '\S+'"):
        import_lora(tmp_path / "x.safetensors", sd)


def test_settings_that_contradict_the_rank_are_an_error(sd: Any, make_tiny_sd: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_tiny_sd().unet, LoraConfig(r=4, target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="has rank 2, but its settings state 4"):
        import_lora(tmp_path, sd)
