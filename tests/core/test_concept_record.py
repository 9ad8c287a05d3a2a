"""A concept can be saved whatever its provenance record contains. The record is checked when the concept is read."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, OFTConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

import pcs_3d.recipe
import pcs_video.recipe
from shared.concept import Concept, Provenance, attach, capture, lines, read, save
from shared.concept.provenance import portable, public_name
from shared.config import Part
from shared.io.adapter_settings import check_adapter, recordable
from shared.modifiers import LearnableToken, PlainText, RareToken
from shared.trainable import Lora
from shared.trainable.adapter import PeftAdapter, config_from_dict, config_to_dict

MODIFIER = LearnableToken()


@pytest.fixture
def backbone(new_sd: Callable[..., Any]) -> Any:
    backbone = new_sd()
    MODIFIER.attach(backbone, "cup", "mug")
    return backbone


def kept(backbone: Any, folder: Path, **about: Any) -> Concept:
    """Captures, saves and reads back a concept."""
    return read(save(capture(backbone, "cup", Provenance(modifier=MODIFIER, **about)), folder).path or folder)


# --- local folders


def test_no_local_folder_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "subjects": {"mug": {"images": ["../jane-doe/photos", "a b/1.png"], "masks": "~/jane/masks", "captions": None}},
        "motion_adapter": "../jane/ad",
        "backbone": "models/jane/sd",
        "output": "jane/mug.concept",
        "sources": {"own": {"kind": "folder", "images": "file:///home/jane/x"}},
        "field": {"start": {"kind": "mesh", "path": "C:\\jane\\cup.obj"}},
        "preview": ["/imagine a cat", "~ a/b", "a cat and/or a dog"],
        "extra": "/home/jane doe/photos",
    }
    assert portable(recipe) == {
        "subjects": {"mug": {"images": ["photos", "1.png"], "masks": "masks", "captions": None}},
        "motion_adapter": "ad",
        "backbone": "sd",
        "output": "mug.concept",
        "sources": {"own": {"kind": "folder", "images": "x"}},
        "field": {"start": {"kind": "mesh", "path": "cup.obj"}},
        "preview": ["/imagine a cat", "~ a/b", "a cat and/or a dog"],
        "extra": "photos",
    }
    assert portable(portable(recipe)) == portable(recipe)
    assert portable({"images": "jane/caf\\udce9"}) == {"images": "caf\\udce9"} == portable({"images": "caf\\udce9"})


def test_only_the_last_part_of_a_local_model_path_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane" / "own").mkdir(parents=True)
    for name in ("models/jane/sd", "file:///home/jane/sd", "C:\\jane\\sd", "..\\sd", "../sd", "/jane/sd/", "jane/sd/"):
        assert public_name(name) == "sd", name
    assert public_name("jane/sd.safetensors") == "sd.safetensors" and public_name("jane/own") == "own"
    for name in ("toybox", "runwayml/stable-diffusion-v1-5", "https://example.org/org/sd"):
        assert public_name(name) == name


def test_every_setting_that_is_a_path_is_recorded_without_its_folders() -> None:
    def kinds(part: type[Part]) -> set[type[Part]]:
        return {part}.union(*map(kinds, part.__subclasses__()))

    paths = {
        name
        for part in kinds(Part)
        for name, field in part.model_fields.items()
        if part.__module__.startswith(("shared.", "pcs_"))
        and any(Path in (a, *get_args(a)) for a in (field.annotation, *get_args(field.annotation)))
    }
    assert {"images", "output", "path", "model"} <= paths and pcs_3d.recipe and pcs_video.recipe
    assert {portable({name: "jane/x"})[name] for name in paths} == {"x"}


# --- writing


@pytest.mark.parametrize(
    "name",
    [
        "Screenshot 2024-05-01 at 9.41.00\u202fAM.png",
        "写真\u3000一.png",
        "my\u00a0photo.png",
        "👩\u200d🚀.png",
        "a\\b.png",
        "caf\udce9.png",
        "tab\tand\nline.png",
        "\u202e" * 80 + ".png",
    ],
)
def test_any_file_name_is_recorded(backbone: Any, tmp_path: Path, name: str) -> None:
    picture = tmp_path / name
    picture.write_bytes(b"not opened")
    concept = kept(backbone, tmp_path / "c", references=[picture])
    (reference,) = concept.meta.references
    assert reference.file.isprintable() and reference.file.endswith(".png") and reference.sha256
    lines(concept)


def test_a_missing_picture_has_no_hash(backbone: Any, tmp_path: Path) -> None:
    concept = kept(backbone, tmp_path / "c", references=[tmp_path / "gone.png"])
    assert [(r.file, r.sha256) for r in concept.meta.references] == [("gone.png", None)]


def test_metrics_and_settings_of_any_type_are_written(backbone: Any, tmp_path: Path) -> None:
    metrics = {
        **{"nan": float("nan"), "inf": float("-inf"), "tensor": torch.tensor(0.5), "numpy": np.float32(0.25)},
        **{"none": None, "text": "bf16", "inner": {"a": 1, "b": np.nan}, "list": [1, 2], "many": torch.ones(2)},
    }
    recipe = {
        "method": "caf\udce9",
        "lr": float("inf"),
        "subject": {"images": tmp_path / "a\udce9", "class_noun": "x" * 5000},
        "set": {"b", "a"},
        "tuple": (1, Path("/home/anna/masks")),
        "backbone": str(tmp_path),
    }
    concept = kept(
        backbone, tmp_path / "c", metrics=metrics, recipe=recipe, class_noun="\udce9" * 300, ports=["a\udce9"]
    )
    metrics = concept.meta.metrics
    assert metrics["inner.a"] == 1 and (metrics["tensor"], metrics["numpy"], metrics["text"]) == (0.5, 0.25, "bf16")
    assert [k for k, v in metrics.items() if v is None] == ["nan", "inf", "none", "inner.b", "list", "many"]
    assert concept.meta.recipe["tuple"] == [1, "masks"] and concept.meta.recipe["set"] == ["a", "b"]
    assert concept.meta.recipe["lr"] is None and concept.meta.recipe["subject"]["images"] == "a\\udce9"
    assert concept.meta.recipe["backbone"] == tmp_path.name and str(tmp_path) not in json.dumps(concept.meta.recipe)


def test_an_invalid_description_does_not_prevent_saving_the_concept(backbone: Any, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"references\.0\.sha256.*\n.*saved without its recipe, metrics and references"
    ):
        concept = kept(backbone, tmp_path / "c", class_noun="mug", references=[{"file": "a", "sha256": "short"}])
    assert concept.meta.class_noun == "mug" and concept.of("embeddings")


def test_non_finite_values_are_not_saved(backbone: Any, tmp_path: Path) -> None:
    concept = capture(backbone, "cup", Provenance(modifier=MODIFIER))
    concept.of("embeddings")["text_encoder"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'cup'.*embeddings tensor 'text_encoder' contains NaN or Inf"):
        save(concept, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# --- adapters of every type


def _types() -> list[str]:
    tuners = {getattr(k, "value", k): v for k, v in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return sorted(k for k, v in tuners.items() if issubclass(v, BaseTuner) and k not in ("XLORA", "SHADOW"))


@pytest.mark.parametrize("kind", _types())
def test_the_settings_of_every_adapter_type_are_accepted(kind: str) -> None:
    """Only plain fields are tried, because settings that replace modules, load files or need data are refused."""
    config = {getattr(k, "value", k): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
    plain = {f.name: f.default for f in dataclasses.fields(config) if type(f.default) in (bool, int, float)}
    refused = {"use_qalora", "qalora_group_size", "ensure_weight_tying"}
    settings = recordable({"peft_type": kind, **{k: v for k, v in plain.items() if k not in refused}}, ["a.b"], 0)
    check_adapter(settings, kind)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LOKR", {"r": 10_000, "decompose_factor": 4}),
        ("LOHA", {"r": 3, "use_effective_conv2d": True, "rank_pattern": {"to_v": 2}}),
        ("OFT", {"r": 0, "oft_block_size": 4}),
        ("HIRA", {"r": 2}),
        ("FOURIERFT", {"n_frequency": 20, "random_loc_seed": 3}),
        ("IA3", {"feedforward_modules": []}),
        ("LORA", {"r": 2, "lora_alpha": 3.5, "use_rslora": True, "init_lora_weights": "gaussian"}),
    ],
)
def test_adapters_of_other_types_survive_saving(
    new_sd: Callable[..., Any], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    backbone = new_sd()
    targets = [m for g in backbone.group("cross_attention") for m in g.modules]
    config = config_from_dict({"peft_type": kind, "target_modules": targets, **settings})
    adapter = PeftAdapter.inject(backbone, "cup", "slot", "unet", config, seed=11)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        if parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    concept = read(save(capture(backbone, "cup"), tmp_path / "c").path or tmp_path)
    fresh = new_sd()
    attach(concept, fresh)
    (restored,) = fresh.adapters["cup"]
    assert all(torch.equal(v, restored.state_dict()[k]) for k, v in adapter.state_dict().items())
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        outs = [
            b.predict(noise, torch.tensor([400]), b.encode(["a photo of a mug"])) for b in (backbone, fresh, new_sd())
        ]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_adapter_settings_that_a_concept_cannot_store_are_refused_before_training(new_sd: Callable[..., Any]) -> None:
    backbone = new_sd()
    targets = [m for g in backbone.group("cross_attention") for m in g.modules]
    for config, message in (
        (LoraConfig(target_modules=targets, init_lora_weights="pissa"), "rewrites the base model's weights"),
        (LoraConfig(target_modules=targets, bias="all"), "own biases"),
        (LoraConfig(target_modules=targets, modules_to_save=["conv_in"]), "'modules_to_save', which is not accepted"),
        (OFTConfig(r=10**6, oft_block_size=0, target_modules=targets), "ranks must be whole numbers up to 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftAdapter.inject(backbone, "cup", "slot", "unet", config, seed=0)
    assert not backbone.adapters and not hasattr(backbone.denoiser, "peft_config")
    assert config_to_dict(LoraConfig(target_modules=["a"]))["peft_type"] == "LORA"


# --- reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"sampling": True}}, r"recipe\.sampling"),
        ({"recipe": {"sampling": {"steps": "x"}}}, r"recipe\.sampling\.steps = 'x'"),
        ({"recipe": {"sampling": {"steps": True}}}, r"recipe\.sampling\.steps"),
        ({"recipe": {"sampling": {"steps": 0}}}, r"recipe\.sampling\.steps = 0"),
        ({"recipe": {"sampling": {"guidance": float("nan")}}}, r"recipe\.sampling\.guidance = nan"),
        ({"recipe": {"sampling": {"scheduler": 3}}}, r"recipe\.sampling\.scheduler = 3"),
        ({"recipe": {"subject": {"images": 3}}}, r"recipe\.subject\.images = 3"),
        ({"recipe": {"subject": "photos"}}, r"recipe\.subject"),
        ({"recipe": {"subjects": {"cup": []}}}, r"recipe\.subjects\.cup"),
        ({"recipe": {"method": ["x"]}}, r"recipe\.method"),
        ({"recipe": {"train": 3}}, r"recipe\.train"),
        ({"recipe": {"train": {"steps": "many"}}}, r"recipe\.train\.steps = 'many'"),
        ({"recipe": {"phases": {"a": {"train": {"batch_size": -1}}}}}, r"recipe\.phases\.a\.train\.batch_size = -1"),
        ({"recipe": {"phases": ["a"]}}, r"recipe\.phases"),
        ({"recipe": []}, "recipe"),
        ({"metrics": {"training_seconds": "long"}}, r"metrics\.training_seconds = 'long'"),
        ({"metrics": {"clip_t": float("nan")}}, r"metrics\.clip_t = nan: must be a finite number, a string, or null"),
        ({"metrics": {"clip_t": [1]}}, r"metrics\.clip_t.*must be a finite number"),
        ({"seed": "x"}, "seed = 'x'"),
        ({"references": [{"file": "a\\b", "sha256": None}]}, r"references\.0\.file"),
        ({"references": [{"file": "a\u202fb", "sha256": None}]}, r"references\.0\.file"),
    ],
)
def test_fields_that_pcs_uses_are_checked_when_read(
    backbone: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = kept(backbone, tmp_path / "c").path or tmp_path
    file = folder / "concept.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"concept\.json: {message}"):
        read(folder)


def test_fields_that_pcs_does_not_use_may_contain_anything(backbone: Any, tmp_path: Path) -> None:
    recipe = {"sampling": None, "train": {"steps": 3, "pace": "slow"}, "phases": {"a": None}, "fields": {"grid": 3}}
    learned = kept(backbone, tmp_path / "c", recipe=recipe).meta.learned_with
    assert (learned.train.steps, learned.sampling.steps, list(learned.phases)) == (3, None, ["a"])


# --- words


def _attached(backbone: Any, learner: Any, name: str, modifier: Any, noun: str, kind: Any = "subject") -> None:
    """Captures a concept from `learner` and attaches it to `backbone`."""
    modifier.attach(learner, name, noun)
    Lora(rank=1).inject(learner, name, "lora", len(learner.word_pieces("text_encoder", name)))
    concept = capture(learner, name, Provenance(kind=kind, class_noun=noun, modifier=modifier))
    learner.remove(name)
    attach(concept, backbone)


@pytest.mark.parametrize(
    ("one", "noun", "other", "other_noun"),
    [
        (RareToken(), "mug", RareToken(), "mug"),
        (RareToken(), "mug", RareToken(token="SKS"), "mug"),
        (RareToken(), "mug", RareToken(with_class_noun=False), "mug"),
        (RareToken(), "mug", PlainText(), "mug"),
        (PlainText(), "mug", PlainText(), "mug"),
        (PlainText(), "mug", LearnableToken(with_class_noun=True), "mug"),
        (RareToken(), "toy", RareToken(), "toy dog"),
    ],
    ids=["the same", "in capitals", "the word alone", "the noun alone", "nouns", "beside a token", "a longer noun"],
)
def test_two_concepts_with_the_same_word_are_refused(
    new_sd: Callable[..., Any], one: Any, noun: str, other: Any, other_noun: str
) -> None:
    for first, second in (((one, noun), (other, other_noun)), ((other, other_noun), (one, noun))):
        backbone, learner = new_sd(), new_sd()
        _attached(backbone, learner, "cup", *first)
        with pytest.raises(ValueError, match=r"'pot' and 'cup' cannot be loaded together: .*modifier\.token"):
            _attached(backbone, learner, "pot", *second)
        assert list(backbone.placeholders) == ["cup"] and list(backbone.adapters) == ["cup"]


def test_concepts_that_can_be_told_apart_are_loaded_together(new_sd: Callable[..., Any]) -> None:
    backbone, learner = new_sd(), new_sd()
    _attached(backbone, learner, "a", RareToken(), "mug")
    _attached(backbone, learner, "b", RareToken(token="ohwx"), "mug")
    _attached(backbone, learner, "c", RareToken(), "dog")
    _attached(backbone, learner, "d", LearnableToken(vectors=2), "mug")
    _attached(backbone, learner, "d_1", LearnableToken(), "mug")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("e", "f"):
            _attached(backbone, learner, name, PlainText(words="painting"), "style", "style")
        for name in ("g", "h"):  # these concepts have no words at all
            _attached(backbone, learner, name, PlainText(words="", with_class_noun=False), "style", "style")
    with pytest.raises(ValueError, match="'i' and 'e' cannot be loaded together"):
        _attached(backbone, learner, "i", PlainText(words="painting"), "style")
