"""Tests phases that generate pictures from the state learned so far and select those that the next phase trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.config import validate
from shared.recipe.schema import Recipe, dump
from shared.sources.phase_pictures import read_kept
from shared.train import checkpoint
from shared.train.optim import NotFinite
from shared.train.phase_context import PhaseContext
from shared.train.task import Update
from shared.train.training_run import TASKS, TrainingRun
from shared.trainable import TrainableGroup
from tests.core.runs import finish, learned, paint, same, session, small


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("phases") / "photos")


def brightest(pixels: Tensor, prompts: Any) -> dict[str, float]:
    """A scorer that prefers bright pictures."""
    assert len(pixels) == len(prompts) == 1 and "<" not in prompts[0]
    return {"score": float(pixels.mean())}


PHASES = {
    "first": {"train": {"steps": 2}},
    "look": {"task": {"kind": "generate", "num": 5, "keep": 2, "batch_size": 2, "prompts": ["a photo of a {concept}"]}},
    "second": {"sources": {"references": None, "made": {"kind": "phase_pictures", "phase": "look"}}},
}


def feedback(**train: Any) -> Recipe:
    """Returns a recipe whose three phases train, generate and select pictures, and train again on the selected ones."""
    plain = dump(small("textual_inversion", "sampling.steps=1", "trainable.tokens.lr=0.1"))
    return validate(Recipe, {**plain, "phases": PHASES, "train": {**plain["train"], "steps": 3, **train}})


def run_of(tiny: Callable[[], Any], photos: Path, workdir: Path, **train: Any) -> TrainingRun:
    return session(tiny(), feedback(**train), photos, workdir, scorers={"mug": brightest})


def test_the_next_phase_learns_from_the_selected_generated_pictures(tiny, photos, tmp_path):
    run = run_of(tiny, photos, tmp_path / "run")
    finish(run)
    kept = read_kept(run.folder("look"))
    made = sorted(run.folder("look").glob("*.png"))
    assert len(made) == 5 and len(kept) == 2 and len({entry["file"] for entry in kept}) == 2
    scores = {entry["file"]: entry["score"] for entry in kept}
    rest = [brightest(picture(p)[None], ["x"])["score"] for p in made if p.name not in scores]
    assert min(scores.values()) >= max(rest), "the pictures with the best scores are selected"
    examples = list(run.examples(run.phases[2][1]))
    assert [Path(e.source).name for e in examples] == [entry["file"] for entry in kept]
    assert all(e.caption == "a photo of a {concept}" and e.role == "instance" for e in examples)
    assert torch.equal(examples[0].pixels, picture(run.folder("look") / kept[0]["file"]))


def picture(path: Path) -> Tensor:
    from shared.io.decode import read_picture

    return read_picture(path, min_side=1).pixels


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_killed_in_any_phase_resumes_bit_for_bit(tiny, photos, tmp_path, stop):
    """Steps 1 and 2 train, steps 3 to 5 generate pictures, and steps 6 to 8 train on the selected pictures."""
    whole = finish(run_of(tiny, photos, tmp_path / "whole", checkpoint_every=1))
    killed = run_of(tiny, photos, tmp_path / "part", checkpoint_every=1)
    steps = killed.steps()
    for _ in range(stop):
        next(steps)
    steps.close()  # as with kill -9, nothing is saved on exit
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "part" / "phases").rglob("*.png")}
    resumed = run_of(tiny, photos, tmp_path / "part", checkpoint_every=1)
    assert same(finish(resumed, resume=True), whole)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "part" / "phases").rglob("*.png")}
    assert all(after[name] == when for name, when in before.items()), "finished pictures are not generated again"
    one, two = (json.loads((tmp_path / n / "phases" / "look" / "kept.json").read_text()) for n in ("whole", "part"))
    assert one == two


def test_pictures_from_another_state_are_not_reused(tiny, photos, tmp_path):
    finish(run_of(tiny, photos, tmp_path / "run"))
    folder = tmp_path / "run" / "phases" / "look"
    before = {p.name: picture(p) for p in folder.glob("*.png")}
    plain = dump(feedback())
    other = validate(Recipe, {**plain, "trainable": {"tokens": {"lr": 0.3}}})
    finish(session(tiny(), other, photos, tmp_path / "run", scorers={"mug": brightest}))
    assert all(not torch.equal(picture(p), before[p.name]) for p in folder.glob("*.png"))


def test_selecting_pictures_without_a_scorer_is_refused_before_the_first_phase(tiny, photos, tmp_path):
    with pytest.raises(ValueError, match=r"phases\.look\.task\.keep selects .* --clip FOLDER"):
        session(tiny(), feedback(), photos, tmp_path / "run")


def test_a_source_that_reads_pictures_from_an_unknown_phase_is_an_error(tiny, photos, tmp_path):
    recipe = small("textual_inversion", "sources.made.kind=phase_pictures", "sources.made.phase=lok")
    with pytest.raises(ValueError, match=r"unknown earlier phase with pictures 'lok'"):
        finish(session(tiny(), recipe, photos, tmp_path / "run"))


def test_pictures_left_over_from_a_later_phase_are_not_used(tiny, photos, tmp_path):
    """The pictures were left in the folder by an earlier run."""
    finish(run_of(tiny, photos, tmp_path / "run"))
    run = run_of(tiny, photos, tmp_path / "run")
    (_, first), _, (_, second) = run.phases
    reads = first.model_copy(update={"sources": second.sources})
    run.phases[0] = ("first", reads)
    with pytest.raises(ValueError, match=r"unknown earlier phase with pictures 'look'"):
        list(run.examples(reads))


# --- tasks from other packages ---------------------------------------------------------------


class Count(torch.nn.Module):
    """A task added by a package. It trains a single number, which grows by 1 at each step."""

    def __init__(self, context: PhaseContext) -> None:
        super().__init__()
        self.steps, self.weight = context.recipe.train.steps, torch.nn.Parameter(torch.zeros(1))

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": [TrainableGroup("weight", [self.weight], lr=1.0, weight_decay=0.0)]}

    def updates(self, step: int, micro: int):
        yield Update((self.weight - 10.0).abs().sum())

    def regrouped(self, step: int) -> None:
        return None

    def carried(self) -> dict[str, torch.Tensor]:
        return {}

    def result(self) -> float:
        return float(self.weight.detach())


def test_a_package_can_add_a_task(tiny, photos, tmp_path):
    from shared.recipe.tasks import TuneTask

    recipe = small("textual_inversion", "train.steps=3")
    run = session(tiny(), recipe, photos, tmp_path / "run", tasks={**TASKS, TuneTask: Count})
    steps = run.steps()
    for _ in range(2):
        next(steps)
    steps.close()
    records = [record for _, record in run_again(tiny, recipe, photos, tmp_path)]
    assert [r.loss for r in records] == pytest.approx([10.0, 9.0, 8.0], abs=0.01)


def run_again(tiny: Callable[[], Any], recipe: Recipe, photos: Path, folder: Path) -> Any:
    from shared.recipe.tasks import TuneTask

    return session(tiny(), recipe, photos, folder / "again", tasks={**TASKS, TuneTask: Count}).steps()


# --- the last update -------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [0, 2])
def test_the_last_update_of_a_phase_is_also_checked(tiny, photos, tmp_path, phases):
    """Only finite values are saved. The run can resume with a lower learning rate, as the message advises."""
    recipe = small("textual_inversion", "train.steps=1", "trainable.tokens.lr=0.1")
    if phases:
        recipe = validate(Recipe, {**dump(recipe), "phases": {"a": {}, "b": {}}})
    with pytest.raises(NotFinite, match=r"the update at step 1 left parameters that are not finite .*--resume"):
        huge(finish, session(tiny(), recipe, photos, tmp_path / "run"))
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.step == 0 and all(bool(v.isfinite().all()) for v in state.learned.values())
    lower = validate(Recipe, {**dump(recipe), "trainable": {"tokens": {"lr": 0.01}}})
    again = session(tiny(), lower, photos, tmp_path / "run")
    assert all(bool(v.isfinite().all()) for v in finish(again, resume=True).values())


def huge(run: Callable[[TrainingRun], Any], owner: TrainingRun) -> Any:
    """Calls `run` with updates so large that the rows overflow."""
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1e38).mul_(1e38)
        return out

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    try:
        return run(owner)
    finally:
        torch.optim.AdamW.step = original  # type: ignore[method-assign]


def test_the_state_of_a_run_consists_of_the_learned_rows(tiny, photos, tmp_path):
    run = session(tiny(), small("textual_inversion"), photos, tmp_path / "run")
    assert set(finish(run)) == {"placeholder/mug/text_encoder"} == set(learned(run))
