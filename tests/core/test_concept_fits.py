"""Whether a concept fits a model depends only on the layers that the concept changes.

Therefore, a motion U-Net accepts concepts that were learned on the plain U-Net it is based on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.backbones.load import FAMILIES, families, load_backbone, register_family
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Concept, Provenance, attach, capture, fits, read, save
from shared.concept.layers_identity import layers_identity
from shared.types import Conditioning
from tests.core.runs import finish, paint, session, small

CLIP = (1, 4, 3, 8, 8)  # [B, C, F, h, w]


class ClipBackbone(StableDiffusionBackbone):
    """A backbone with a `UNetMotionModel` instead of the plain U-Net. It predicts clips `[B, C, F, h, w]`."""

    family = "tiny_clips"
    reads = frozenset({"tiny_clips", "stable_diffusion"})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert isinstance(conditioning.context, Tensor)
        frames = conditioning.context.repeat_interleave(x_t.shape[2], 0)
        return self.unet(x_t, t, encoder_hidden_states=frames, return_dict=False)[0]


def clips(pipe: Any) -> ClipBackbone:
    from diffusers import MotionAdapter, UNetMotionModel

    blocks = {"block_out_channels": (16, 32, 32), "motion_layers_per_block": 1, "motion_mid_block_layers_per_block": 1}
    heads = {"motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        pipe.unet = UNetMotionModel.from_unet2d(pipe.unet, MotionAdapter(**blocks, **heads)).eval()
    return ClipBackbone(pipe, "tiny-clips")


@torch.no_grad()
def clip(backbone: Any, prompt: str = "a photo of a mug") -> Tensor:
    noise = torch.randn(CLIP, generator=torch.Generator().manual_seed(3))
    return backbone.predict(noise, torch.tensor([400]), backbone.encode([prompt]))


@pytest.fixture(scope="module")
def concept(make_tiny_sd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Concept:
    """A saved and reloaded concept. Its token and its LoRA were each trained for two steps on the plain U-Net."""
    root, backbone = tmp_path_factory.mktemp("run"), StableDiffusionBackbone(make_tiny_sd(), "tiny")
    rates = ("trainable.tokens.lr=0.5", "phases.tune.trainable.lora.lr=0.05")
    recipe = small("pivotal_tuning", "phases.pivot.train.steps=2", "phases.tune.train.steps=2", *rates)
    run = session(backbone, recipe, paint(root / "photos"), root / "work")
    finish(run)
    concept = capture(backbone, "mug", Provenance(class_noun="mug", recipe=recipe), adapter_sets=run.adapter_sets)
    return read(save(concept, root / "mug.concept").path or root)


def test_a_motion_unet_accepts_concepts_learned_on_its_plain_unet(
    concept: Concept, make_tiny_sd: Callable[..., Any], recwarn: pytest.WarningsRecorder
) -> None:
    backbone = clips(make_tiny_sd())
    base = clip(backbone)
    assert len(concept.meta.layers["unet"]) == len(concept.of("adapter")) // 2 > 20
    assert fits(concept, backbone) is None
    attach(concept, backbone)
    assert not [w for w in recwarn if "checkpoint" in str(w.message)], (
        "there was a warning, even though the layers still have the weights the concept was learned with"
    )
    words = backbone.placeholders["mug"].words
    adapted, named = clip(backbone), clip(backbone, f"a photo of a {words}")
    assert not torch.allclose(adapted, base, atol=1e-4), "the LoRA had no effect"
    with backbone.active({}):
        assert torch.equal(clip(backbone), base)
        learned = clip(backbone, f"a photo of a {words}")
    with backbone.active({"mug": 0.0}):
        assert not torch.allclose(clip(backbone, f"a photo of a {words}"), learned, atol=1e-5), (
            "the token had no effect"
        )
    assert not torch.allclose(named, adapted, atol=1e-5)
    for path in concept.meta.layers["unet"]:  # the concept's layers are all adapted and outside the motion modules
        layer = backbone.unet.get_submodule(path)
        assert isinstance(layer, nn.Module) and hasattr(layer, "lora_A") and "motion_modules" not in path
    backbone.remove("mug")
    assert torch.equal(clip(backbone), base)


def test_the_concept_changes_both_models_in_the_same_way(concept: Concept, make_tiny_sd: Callable[..., Any]) -> None:
    plain, motion = StableDiffusionBackbone(make_tiny_sd(), "tiny"), clips(make_tiny_sd())
    attach(concept, plain)
    attach(concept, motion)
    for path in concept.meta.layers["unet"]:
        a, b = plain.unet.get_submodule(path), motion.unet.get_submodule(path)
        x = torch.randn(2, a.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(a(x), b(x))


def test_different_weights_in_the_same_layers_cause_a_warning(
    concept: Concept, make_tiny_sd: Callable[..., Any]
) -> None:
    with pytest.warns(UserWarning, match="a checkpoint with different weights"):
        attach(concept, clips(make_tiny_sd(1)))


def test_one_missing_layer_is_named_as_the_reason(concept: Concept, make_tiny_sd: Callable[..., Any]) -> None:
    backbone = clips(make_tiny_sd())
    block = backbone.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.to_v = nn.Identity()
    before = clip(backbone)
    gone = r"1 of the \d+ layers of unet that it changes do not exist here \(for example, mid_block\.attentions\.0\.\S+to_v"
    with pytest.raises(ValueError, match=rf"'mug' does not fit tiny-clips: {gone}"):
        attach(concept, backbone)
    assert torch.equal(clip(backbone), before) and not backbone.adapters and not backbone.placeholders


def test_a_family_reads_only_its_own_concepts_unless_it_declares_more(
    concept: Concept, make_tiny_sd: Callable[..., Any]
) -> None:
    class UnknownFamily(ClipBackbone):
        reads = frozenset({"tiny_clips"})

    assert StableDiffusionBackbone(make_tiny_sd()).reads == {"stable_diffusion"}
    backbone = clips(make_tiny_sd())
    backbone.__class__ = UnknownFamily
    assert "learned on stable_diffusion (tiny), but this backbone is tiny_clips" in (fits(concept, backbone) or "")


def test_whether_a_concept_fits_does_not_depend_on_other_attached_concepts(
    new_sd: Callable[..., Any], concept: Concept
) -> None:
    from shared.trainable import Lora
    from shared.trainable.delta import DeltaAdapter

    backbone = new_sd()
    Lora(roles=("attention", "text_encoder")).inject(backbone, "other", "lora", 0)
    path = next(iter(concept.meta.layers["unet"]))
    weight = backbone.unet.get_submodule(path).get_base_layer().weight
    DeltaAdapter.inject(backbone, "other", "weights", {f"unet.{path}.weight": torch.randn(weight.shape)})
    assert fits(concept, backbone) is None
    again = capture(backbone, "other")
    assert again.meta.layers["unet"][path] == tuple(weight.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(concept, backbone)
    identity = layers_identity(backbone, concept.meta.layers, ["text_encoder"])
    assert identity == layers_identity(new_sd(), concept.meta.layers, ["text_encoder"]) == concept.meta.backbone.layers


# --- families from other packages


def test_a_package_can_add_a_family(
    tmp_path: Path, make_tiny_sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_sd().save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"'))
    with pytest.raises(ValueError, match="contains a StableDiffusionImg2ImgPipeline, which no family here supports"):
        load_backbone(tmp_path / "model")
    package = tmp_path / "site"
    (package / "a_family-1.dist-info").mkdir(parents=True)
    (package / "a_family-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: a-family\nVersion: 1\n")
    (package / "a_family-1.dist-info" / "entry_points.txt").write_text(
        "[pcs.families]\nStableDiffusionImg2ImgPipeline = a_family:wrap\n"
    )
    (package / "a_family.py").write_text(
        "from shared.backbones.stable_diffusion import StableDiffusionBackbone\n"
        "class Mine(StableDiffusionBackbone):\n    family = 'mine'\n"
        "def wrap(pipe, name):\n    return Mine(pipe, name)\n"
    )
    monkeypatch.syspath_prepend(str(package))
    assert "StableDiffusionImg2ImgPipeline" in families() and "a_family" not in sys.modules, (
        "the package must not be imported before it is used"
    )
    assert load_backbone(tmp_path / "model").family == "mine"
    sys.modules.pop("a_family", None)


def test_a_family_can_be_registered_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.backbones.load.FAMILIES", dict(FAMILIES))
    register_family("TextToVideoSDPipeline", lambda pipe, name: ClipBackbone(pipe, name))
    assert "TextToVideoSDPipeline" in families()
    with pytest.raises(ValueError, match="TextToVideoSDPipeline already has a family"):
        register_family("TextToVideoSDPipeline", lambda pipe, name: ClipBackbone(pipe, name))
