"""The estimated memory matches what a run uses, and memory-saving settings do not change the field."""

from __future__ import annotations

import json

import pytest
import torch

from pcs_3d.assets import ABOUT, AssetFiles, create
from pcs_3d.distill.distill import Distill
from pcs_3d.distill.memory_plan import Levers, Tries, as_begun, fitting, plan_memory, step_once
from pcs_3d.runner import Runner3D
from shared.recipe.schema import dump
from shared.train.measure_memory import parse_bytes, peak_during
from tests.three_d.distilling import finish
from tests.three_d.test_assets import recipe, run_of, same

CPU = torch.device("cpu")
RENDERS = ("train.resolution=32", "renderer.samples=32", "field.start.radius=0.8", "train.batch_size=8", "train.steps=2",
           "penalties.orientation=null", "penalties.normal_image_smoothness=null", "penalties.sparsity=null")  # fmt: skip

CHUNKS = ("train.batch_size=2", "renderer.rays=1024")
AGAIN = ("train.gradient_checkpointing=true", "renderer.recompute=true", "renderer.rays=1024")


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * 2**30), ("1.5 GiB", 3 * 2**29), ("512m", 2**29), ("64KB", 2**16), ("77", 77)]
)
def test_sizes_in_common_notations_are_parsed(text, size):
    assert parse_bytes(text, "--vram") == size


@pytest.mark.parametrize("text", ["", "8 giga", "-1G", "0", "nan", "G"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match="--vram .* is not a size"):
        parse_bytes(text, "--vram")


def test_the_peak_counts_only_tensors_that_exist_at_the_same_time():
    def work():
        for _ in range(3):
            first = torch.zeros(1000, 1000)
            del first
        return torch.ones(1000, 1000) + 1

    assert 8e6 <= peak_during(work, CPU) < 8.1e6


def actual(backbone, folder, *settings):
    """Returns the peak memory of a complete step, in bytes."""
    run = run_of(backbone, recipe("voxels", *RENDERS, *settings), folder)
    task = Distill(run.context(0, run._unfreeze(run.phases[0][1])))
    step_once(run, task)
    return peak_during(lambda: step_once(run, task), CPU)


def test_the_estimate_matches_the_memory_of_a_step(sd, tmp_path):
    run = run_of(sd, recipe("voxels", *RENDERS), tmp_path / "run")
    tries = Tries(run, 0, [])
    eight, four = (actual(sd, tmp_path / "run", f"train.batch_size={n}") for n in (8, 4))
    assert tries.costs(Levers(8, 8))[1] == pytest.approx((eight - four) / 4, rel=0.33)
    less = actual(sd, tmp_path / "run", *AGAIN)
    assert less < 0.8 * eight and less < tries.costs(Levers(8, 8, 2))[1] * 8 + 2**20


def test_idle_networks_are_offloaded_while_memory_is_measured_and_return_afterwards(sd, tmp_path):
    run = run_of(sd, recipe("voxels", *RENDERS), tmp_path / "run")
    run.offloaded.on = True  # as on a GPU, although networks only "move" from the CPU to the CPU here
    steps, moved = [], run.offloaded.offload

    def offload(*names: str) -> None:
        steps.append(names)
        moved(*names)

    run.offloaded.offload = offload
    plan = plan_memory(run, recipe("voxels", *RENDERS), 8 * 2**30)
    assert steps and set(steps) == {("text_encoder",)}, steps
    assert not run.offloaded._away and plan.estimate < plan.budget


def test_recomputation_gives_the_same_field(new_sd, tmp_path):
    plain, less = (
        finish(run_of(new_sd(), recipe("voxels", *RENDERS, *CHUNKS, *how), tmp_path / str(len(how))))
        for how in ((), AGAIN)
    )
    assert same(plain, less)


def test_views_are_processed_in_smaller_batches_if_they_do_not_all_fit_in_memory(sd, tmp_path):
    tries = Tries(run_of(sd, recipe("voxels", *RENDERS), tmp_path / "run"), 0, [])
    fixed, one_more = tries.costs(Levers(8, 8))
    assert fitting(tries, fixed + 8 * one_more, True) == (Levers(8, 8), fixed + 8 * one_more)
    assert fitting(tries, fixed + 5 * one_more, True) == (Levers(4, 8), fixed + 4 * one_more)
    with pytest.raises(
        ValueError, match=r"--vram 1.0 MiB is not enough: the run needs about .* \(1 of 8 views .*set --vram \d+M"
    ):
        fitting(tries, 2**20, True)


def test_an_asset_records_the_memory_estimate_and_the_budget(sd, tmp_path):
    runner, how = Runner3D(sd), recipe("voxels", *RENDERS)
    plan = runner.fit(how, tmp_path / "run", memory=2**40)
    assert plan.recipe == how and "8 views at once" in str(plan) and not list(tmp_path.iterdir())
    create(runner, plan.recipe, AssetFiles(tmp_path / "asset"), plan=plan)
    costs = json.loads((tmp_path / "asset" / ABOUT).read_text())["costs"]
    assert costs["estimated_memory"] == plan.estimate <= costs["memory_budget"] == 2**40
    assert "Estimated before" in (tmp_path / "asset" / "report.html").read_text()


def test_a_fitted_run_resumes_with_its_fitted_settings():
    how = recipe("voxels", *RENDERS)
    fitted = recipe("voxels", *RENDERS, *AGAIN, "train.batch_size=2", "train.gradient_accumulation=4")
    assert as_begun(how, dump(fitted)) == fitted != how


def test_renders_shrink_only_if_nothing_else_helps_and_no_size_was_given(sd, tmp_path):
    run = run_of(sd, recipe("voxels", *RENDERS), tmp_path / "run")
    tries = Tries(run, 0, [])
    assert [level.side for level in tries.ladder(True)] == [None] * 3
    assert [level.side for level in tries.ladder(False)] == [None] * 3 + [16]
    changed = Levers(2, 8, 2, 16).changes(tries.recipe)
    assert changed == {
        "train": {"batch_size": 2, "gradient_accumulation": 4, "gradient_checkpointing": True, "resolution": 16},
        "renderer": {"recompute": True, "rays": 2048},
    }
