"""Models can be loaded from folders, single files and the hub's cache. Errors explain why a model cannot be loaded."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones import load_backbone
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from tests.core.single_files import write_single_file


def predict(backbone: Any, prompts: Sequence[str] = ("a mug",)) -> Tensor:
    x = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(x, torch.tensor(300), backbone.encode(prompts))


def test_the_checkpoint_identifies_the_weights(make_tiny_sd: Any) -> None:
    one, again, other = (StableDiffusionBackbone(make_tiny_sd(seed)) for seed in (0, 0, 1))
    assert one.checkpoint == again.checkpoint != other.checkpoint
    half = make_tiny_sd().to(torch.bfloat16)
    assert StableDiffusionBackbone(half).checkpoint == one.checkpoint, "the precision makes no difference"


def test_model_folders_can_be_loaded(tiny_sd: Any, tiny_flux: Any, tmp_path: Path) -> None:
    for pipe, kind in ((tiny_sd, StableDiffusionBackbone), (tiny_flux, FluxBackbone)):
        folder = tmp_path / kind.family
        pipe.save_pretrained(folder)
        loaded, direct = load_backbone(folder), kind(copy.deepcopy(pipe))
        assert isinstance(loaded, kind) and loaded.name == str(folder)
        assert loaded.checkpoint == direct.checkpoint
        assert torch.allclose(predict(loaded), predict(direct), atol=1e-5)
        assert load_backbone(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def command_in(error: Any) -> list[str]:
    """Returns the words that a shell reads from the command at the end of a message (python, -c, code, arguments)."""
    words = shlex.split(line := str(error.value)[str(error.value).index("python -c") :])
    subprocess.run(["bash", "-n", "-c", line], check=True)
    compile(words[2], "<command>", "exec")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines() == words
    return words


def test_the_commands_for_converting_a_model_can_be_pasted_into_a_shell(tiny_sd: Any, tmp_path: Path) -> None:
    place = tmp_path / "it's my $HOME; (copy)"
    tiny_sd.unet.save_pretrained(place / "unet")
    file = next((place / "unet").glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"in the hub's cache") as error:
        load_backbone(file)
    assert "HF_HUB_OFFLINE" not in str(error.value) and ".." not in str(error.value)
    *_, code, source, target = command_in(error)
    assert (source, target) == (str(file), file.stem) and "P.from_single_file(sys.argv[1])" in code
    tiny_sd.save_pretrained(place)
    torch.save(tiny_sd.unet.state_dict(), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match="only as") as error:
        load_backbone(place)
    words = command_in(error)
    assert words[3:] == [str(place / "unet")]
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    assert load_backbone(place).family == "stable_diffusion", "the converted folder must load"


def test_a_single_file_loads_offline_with_the_configuration_next_to_it(tiny_sd: Any, tmp_path: Path) -> None:
    file = write_single_file(tiny_sd, tmp_path / "mine.safetensors")
    with pytest.raises(
        ValueError, match=rf"configuration and tokenizer.* folder {tmp_path / 'mine'} .*from_single_file"
    ):
        load_backbone(file)
    tiny_sd.save_pretrained(tmp_path / "mine")
    for weights in (tmp_path / "mine").rglob("*.safetensors"):
        weights.unlink()
    loaded, direct = load_backbone(file), StableDiffusionBackbone(tiny_sd)
    assert loaded.checkpoint == direct.checkpoint and loaded.name == str(file)
    assert torch.allclose(predict(loaded), predict(direct), atol=1e-5)


def test_weights_in_a_format_that_can_run_code_are_refused_and_the_error_says_why(tiny_sd: Any, tmp_path: Path) -> None:
    tiny_sd.save_pretrained(tmp_path)
    (weights,) = (tmp_path / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    says = "only as diffusion_pytorch_model.bin: .* can run code .*from diffusers import UNet2DConditionModel as M; .*save_pre"
    with pytest.raises(ValueError, match=says):
        load_backbone(tmp_path)


def test_the_error_explains_why_a_model_cannot_be_loaded(tiny_sd: Any, tmp_path: Path) -> None:
    folder, stray, foreign, broken = (tmp_path / n for n in ("sd", "stray", "foreign", "broken"))
    tiny_sd.save_pretrained(folder)
    for path in (stray, foreign, broken):
        path.mkdir()
    (stray / "notes.txt").write_text("hello")
    (foreign / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    (broken / "model_index.json").write_text("{")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    families = "FluxPipeline.*StableDiffusionPipeline"
    for source, message in [
        (tmp_path / "nowhere", f"no such file or folder.*{families}"),
        (stray, f"no model_index.json. It contains: notes.txt.*{families}"),
        (foreign, f"contains a KandinskyPipeline.*{families}"),
        (broken, "not readable JSON"),
        (tmp_path / "model.ckpt", "not a .safetensors file"),
        (tmp_path / "model.safetensors", "cannot load"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_backbone(source)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load .*/unet as UNet2DConditionModel"):
        load_backbone(folder)


def test_importing_the_package_loads_no_model_library() -> None:
    code = (
        "import sys, shared.backbones; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.fixture
def hub(tiny_sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub cache with one model. Any attempt to access the network fails the test."""
    import socket

    import huggingface_hub.constants

    root = tmp_path / "hub" / "models--someone--tiny-sd"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    tiny_sd.save_pretrained(root / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was accessed"))
    return "someone/tiny-sd"


def test_no_model_is_downloaded_unless_the_user_allows_it(hub: str, tiny_sd: Any) -> None:
    loaded = load_backbone(hub)
    assert loaded.name == hub and loaded.checkpoint == StableDiffusionBackbone(tiny_sd).checkpoint
    with pytest.raises(
        ValueError, match=r"someone/other: no such folder, and it is not in the hub's cache.*--download"
    ):
        load_backbone("someone/other")
    with pytest.raises(pytest.fail.Exception, match="the network was accessed"):
        load_backbone("someone/other", download=True)


def test_loading_a_single_file_does_not_access_the_network(hub: str, tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(
        {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(4)}, tmp_path / "one.safetensors"
    )
    with pytest.raises(ValueError, match=r"one\.safetensors.*Use --download"):
        load_backbone(tmp_path / "one.safetensors")
