"""Concept folders are written completely or not at all. Reading even a malicious one never executes code."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import Concept, Provenance, as_json, capture, describe, lines, read, save
from shared.concept.show import described
from shared.modifiers import LearnableToken
from shared.trainable import Lora


@pytest.fixture
def sd(make_tiny_sd: Callable[..., Any]) -> Callable[..., Any]:
    return lambda: StableDiffusionBackbone(make_tiny_sd(), "tiny")


def learned(backbone: Any, name: str = "my-mug") -> Concept:
    modifier = LearnableToken(vectors=2)
    modifier.attach(backbone, name, "mug")
    Lora(roles=("cross_attention", "text_encoder"), rank=4).inject(backbone, name, "lora", 0)
    return capture(backbone, name, Provenance(class_noun="mug", modifier=modifier))


class _Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def template(make_tiny_sd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    concept = learned(StableDiffusionBackbone(make_tiny_sd(0), "tiny"))
    return save(concept, tmp_path_factory.mktemp("template") / "my-mug.concept").path or Path()


@pytest.fixture
def saved(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "my-mug.concept"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "concept.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rehash(folder: Path) -> None:
    """Updates the recorded hashes, as someone who deliberately tampers with a concept would."""
    edit(folder, files={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")})


def _pickle(folder: Path, mark: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(pickle.dumps(_Bomb(mark)))


def _torch_save(folder: Path, mark: Path) -> None:
    torch.save(_Bomb(mark), folder / "embeddings.safetensors")


def _truncated(folder: Path, mark: Path) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _header(folder: Path, mark: Path) -> None:
    (folder / "adapter.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)


def _nan(folder: Path, mark: Path) -> None:
    tensors = load_file(folder / "embeddings.safetensors")
    tensors["text_encoder"][0, 0] = float("nan")
    save_file(tensors, folder / "embeddings.safetensors")


def _integers(folder: Path, mark: Path) -> None:
    save_file({"text_encoder": torch.ones(2, 16, dtype=torch.int64)}, folder / "embeddings.safetensors")


def _other(folder: Path, mark: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pickle, "adapter.safetensors"),
        (_torch_save, "embeddings.safetensors"),
        (_truncated, "adapter.safetensors"),
        (_header, r"adapter\.safetensors is .*not a safetensors file"),
        (_nan, "'text_encoder' contains NaN or Inf"),
        (_integers, "'text_encoder' is I64"),
        (_other, "adapter_id does not match"),
    ],
)
@pytest.mark.parametrize("on_purpose", [True, False])
def test_damaged_tensors_are_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str, on_purpose: bool
) -> None:
    mark = tmp_path / "executed"
    damage(saved, mark)
    if on_purpose:
        rehash(saved)
    with pytest.raises(ValueError, match=message if on_purpose else "safetensors"):
        read(saved)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.bin", "model.ckpt", "x.pt", "sub/old.pkl", "setup.py", "recipe.yaml"])
def test_files_that_can_contain_code_are_refused_without_being_opened(saved: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "executed"
    file = saved / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(_Bomb(mark)))
    if name.endswith(".yaml"):
        file.write_text(f"train: !!python/object/apply:pathlib.Path.touch ['{mark}']\n")
    with pytest.raises(ValueError, match=rf"{Path(name).name} .*was not (opened|loaded)"):
        read(saved)
    assert not mark.exists()


def test_harmless_extra_files_are_ignored(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "recipe.yaml").write_text("train: {steps: 3}  # fine!\n")
    assert read(saved).name == "my-mug"


def test_links_that_point_outside_the_folder_are_not_followed(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "adapter.safetensors"
    shutil.move(saved / "adapter.safetensors", outside)
    (saved / "adapter.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="link that points outside"):
        read(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../etc"}, "name"),
        ({"name": ""}, "name"),
        (
            {"schema_version": 1},
            r"concept\.json has schema 1: it was made by an older version of pcs; learn the concept again$",
        ),
        (
            {"schema_version": 3},
            "has schema 3: it was made by a newer version of pcs, and this version reads schema 2; update pcs",
        ),
        ({"schema_version": True}, "not made by pcs"),
        ({"schema_version": None}, "not made by pcs"),
        ({"kind": "virus"}, "kind: unknown value 'virus'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"files": {"../secret.safetensors": "0" * 64}}, "not a plain path"),
        ({"files": {"x.safetensors": "0" * 64}}, "lists the file 'x.safetensors'"),
        ({"files": {}}, "is not listed in concept.json"),
        ({"references": [{"file": "/etc/passwd", "sha256": "0" * 64}]}, "without folders"),
        (
            {"adapters": {"l": {"unet": {"peft_type": "LORA", "megatron_core": "os"}}}},
            "'megatron_core', which is not accepted",
        ),
        ({"adapters": {"l": {"unet": {"peft_type": "LORA", "r": 10**9, "target_modules": ["a"]}}}}, "ranks must be"),
        ({"adapters": {"l": {"unet": {"peft_type": "LORA", "target_modules": "(a+)+$"}}}}, "module names"),
        ({"adapters": {"../x": {"unet": {}}}}, "adapters"),
        (
            {"adapters": {"l": {"unet": {"peft_type": "LORA", "r": 2, "bias": "all", "target_modules": ["a"]}}}},
            "trains the base model's own biases",
        ),
        (
            {"adapters": {"l": {"unet": {"peft_type": "LORA", "init_lora_weights": "pissa", "target_modules": []}}}},
            "init_lora_weights='pissa' rewrites the base model's weights",
        ),
        (
            {"adapters": {"l": {"unet": {"peft_type": "LORA", "rank_pattern": {"a": math.nan}, "target_modules": []}}}},
            "l.unet.rank_pattern must be a number",
        ),
        ({"layers": {}}, r"layers: unet does not list 'down_blocks\.0\.\S+', which the concept touches"),
        ({"layers": {"unet": {"x": "wide"}}}, r"layers\.unet\.x"),
        ({"weights": {"w": {"unet": ["conv_in.bias"]}}}, r"layers: unet does not list 'conv_in\.bias'"),
        ({"embeddings": {"text_encoder": "wide"}}, r"embeddings\.text_encoder = 'wide'"),
    ],
)
def test_invalid_descriptions_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        read(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00", '{"schema_version": 2}', "nan", "\ud800"])
def test_a_broken_description_is_refused(saved: Path, text: str) -> None:
    (saved / "concept.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=r"concept\.json"):
        read(saved)


def test_paths_that_are_not_complete_concept_folders_are_refused(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no concept\.json"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        read(saved / "concept.json")
    (saved / "embeddings.safetensors").unlink()
    with pytest.raises(ValueError, match=r"embeddings\.safetensors is missing"):
        read(saved)


def test_a_preview_that_is_not_a_picture_is_refused(sd: Callable[..., Any], tmp_path: Path) -> None:
    from PIL import Image

    concept = learned(sd())
    folder = save(concept, tmp_path / "c", preview=Image.new("RGB", (8, 8))).path or tmp_path
    assert read(folder).preview == folder / "preview.png"
    (folder / "preview.png").write_bytes(b"<script>")
    with pytest.raises(ValueError, match="not a PNG"):
        read(folder)


# --- writing


def test_an_existing_folder_is_kept_unless_overwriting_is_requested(sd: Callable[..., Any], saved: Path) -> None:
    other = learned(sd(), "pot")
    with pytest.raises(ValueError, match="already exists"):
        save(other, saved)
    assert read(saved).name == "my-mug"
    save(other, saved, overwrite=True)
    assert read(saved).name == "pot"


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_interrupted_save_leaves_nothing_half_written(
    sd: Callable[..., Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    concept = learned(sd(), "pot")

    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("shared.concept.concept_folder.dump_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(concept, saved if overwrite else tmp_path / "pot.concept", overwrite=overwrite)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["my-mug.concept"]
    assert read(saved).name == "my-mug"


# --- showing


def test_costs_are_shown_with_their_units(saved: Path) -> None:
    concept = read(saved)
    costs = {
        "training_seconds": 12.5,
        "training_peak_memory": 3 * 2**20,
        "training_peak_memory_of": "process",
        "clip_t": 0.25,
    }
    shown = dict(described(replace(concept, meta=concept.meta.model_copy(update={"metrics": costs}))))["metrics"]
    assert shown == "training_seconds 12.5 s; training_peak_memory 3 MiB; training_peak_memory_of process; clip_t 0.25"


def test_a_concept_is_described_as_text_table_and_json(saved: Path) -> None:
    from rich.console import Console

    concept = read(saved)
    text = "\n".join(lines(concept))
    for part in (
        "my-mug",
        "subject (mug)",
        "learnable token",
        "LORA rank 4",
        "adapter.safetensors",
        "--concept my-mug.concept",
    ):
        assert part in text
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as captured:
        console.print(describe(concept))
    assert "stable_diffusion" in captured.get()
    data = json.loads(json.dumps(as_json(concept)))
    learned = [t for v in concept.tensors.values() for k, t in v.items() if not k.startswith("start.")]
    assert data["parameters"] == sum(t.numel() for t in learned)
    assert data["bytes"]["concept.json"] > 0 and data["name"] == "my-mug"
