"""User mistakes are reported before a run begins, and a full disk or a killed run leaves no half-written asset."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pcs_3d.assets import AssetFiles, create
from pcs_3d.export.asset import export_asset
from pcs_3d.runner import Runner3D
from shared.concept import Provenance, capture
from shared.modifiers.learnable import LearnableToken
from shared.train import checkpoint
from shared.trainable import Lora
from tests.three_d.distilling import finish
from tests.three_d.test_assets import recipe, run_of, same
from tests.three_d.test_distill import teach

# --- concepts --------------------------------------------------------------------------------


def test_a_loaded_subject_that_the_prompt_does_not_name_is_refused(sd, tmp_path):
    teach(sd)
    concept = capture(sd, "mug", Provenance("subject", "mug", LearnableToken(vectors=1)))
    sd.remove("mug")
    runner = Runner3D(sd)
    runner.load(concept)
    with pytest.raises(ValueError, match="<mug>"):
        create(runner, recipe("voxels", "prompt=a photo of a dog"), AssetFiles(tmp_path / "asset"))
    assert not list(tmp_path.iterdir())


def test_a_concept_for_another_architecture_is_refused(sd, flux):
    Lora(roles=("cross_attention",), rank=2).inject(sd, "mug", "lora", 0)
    LearnableToken(vectors=1).attach(sd, "mug", "mug", 0)
    concept = capture(sd, "mug", Provenance("subject", "mug", LearnableToken(vectors=1)))
    runner = Runner3D(flux)
    with pytest.raises(ValueError, match="mug"):
        runner.load(concept)
    assert not runner.loaded and not flux.adapters and not flux.placeholders


# --- cameras ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    ["fov_deg=[0, 0]", "fov_deg=[170, 190]", "fov_deg=[60, 40]", "elevation_deg=[80, 100]", "fill=[0, 0.5]",
     "distance=[0, 2]", "distance=[.nan, .nan]", "fill=[0.5, .inf]", "azimuth_deg=[.nan, 3]", "look_at=.inf", "roll_deg=-1"],
)  # fmt: skip
def test_invalid_cameras_are_refused_by_the_recipe(setting):
    with pytest.raises(ValueError, match=rf"cameras.*{setting.partition('=')[0]}|cameras.*above"):
        recipe("voxels", f"cameras.{setting}")


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Yields a function that limits file sizes (in bytes), so that writes fail as they would on a full disk."""
    before, usual = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, usual)


def test_a_full_disk_leaves_a_state_to_resume_from_but_no_asset(sd, tmp_path, full_disk):
    def full(field: Any, folder: Path, how: Any) -> Any:
        full_disk(4 << 10)
        return export_asset(field, folder, how)

    how, files = recipe("voxels", "train.steps=1"), AssetFiles(tmp_path / "asset", resume=True)
    with pytest.raises((OSError, ValueError)):
        create(Runner3D(sd), how, files, export=full)
    assert [p.name for p in tmp_path.iterdir()] == ["asset.training"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    create(Runner3D(sd), how, files)
    assert (tmp_path / "asset" / "report.html").is_file() and checkpoint.load(files.workdir) is None


# --- killed runs ----------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_result_bit_for_bit(new_sd, tmp_path):
    """The run is sent SIGKILL some time after its second checkpoint."""
    how, folder = recipe("voxels", "train.steps=5", "train.checkpoint_every=1"), tmp_path / "run"
    whole = finish(run_of(new_sd(), how, tmp_path / "whole"))
    torch.set_num_threads(1)  # a forked process keeps only the thread that forked it
    child = multiprocessing.get_context("fork").Process(target=_begun, args=(run_of(new_sd(), how, folder),))
    child.start()
    end = time.monotonic() + 120
    while not any(p.name >= "checkpoint-00-0000002" for p in folder.glob("checkpoint-*")):
        assert child.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    state = checkpoint.load(folder)
    assert state is not None and 2 <= state.step < 5
    assert same(finish(run_of(new_sd(), how, folder), resume=True), whole)


def _begun(run: Any) -> None:
    for _, record in run.steps():
        if record.step >= 3:
            time.sleep(300)
