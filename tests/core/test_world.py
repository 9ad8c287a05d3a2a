"""A backbone's synthetic world determines its overlay, prompts, instruments and warning about unseen pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.backbones import load_backbone
from shared.backbones.load import WORLDS
from shared.io.read_subject import read_subject
from shared.metrics.instruments import OWN
from shared.recipe.catalog import config_folder
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.runner.plan import warn_unseen

SMALL = replace(WORLDS["toybox"], side=16, unseen="are from elsewhere.")


def test_the_files_named_by_a_world_exist() -> None:
    for world in WORLDS.values():
        assert (config_folder() / "overlays" / f"{world.overlay}.yaml").is_file()
        assert (config_folder() / "prompts" / f"{world.prompts}.yaml").is_file()
        assert world.instruments in OWN


def test_the_world_determines_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORLDS, "elsewhere", SMALL)  # type: ignore[arg-type]
    assert dump(load("pivotal_tuning", ["backbone=elsewhere"])) == {
        **dump(load("pivotal_tuning")),
        "backbone": "elsewhere",
    }
    monkeypatch.setitem(WORLDS, "elsewhere", replace(SMALL, overlay="none"))  # type: ignore[arg-type]
    assert load("pivotal_tuning", ["backbone=elsewhere"]).train.resolution is None


def test_only_a_model_with_its_own_world_warns_about_unseen_pictures(
    new_sd: Callable[..., Any], tmp_path: Path
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    subjects, backbone = {"mug": read_subject(tmp_path, "mug")}, new_sd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unseen(backbone, subjects)
        backbone.world = SMALL
        warn_unseen(backbone, subjects)
    backbone.world = replace(SMALL, side=32)
    with pytest.warns(UserWarning, match=r"the pictures of 'mug' are from elsewhere\."):
        warn_unseen(backbone, subjects)


def test_the_loader_sets_the_world_of_a_backbone(tmp_path: Path) -> None:
    assert load_backbone().world is WORLDS["toybox"]
