"""Tests what is kept after a NaN loss or an interruption, and which settings may change before the run is resumed."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch

from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.io.read_subject import read_subject
from shared.modifiers import LearnableToken
from shared.train import checkpoint
from shared.train.last_good_state import LastGood
from shared.train.log import Log
from shared.train.optim import NotFinite
from shared.train.resuming import same_recipe
from shared.train.task import Update
from shared.train.tune import Tune
from shared.trainable import Lora
from tests.core.runs import finish, learned, same, session, small


def broken_at(monkeypatch, step: int, value: float = math.nan) -> None:
    """Multiplies the loss of the step with index `step` (counted from 0) by `value`."""
    before = Tune.updates

    def updates(self, index, micro):
        for update in before(self, index, micro):
            yield Update(update.loss * value, parts=update.parts) if index == step else update

    monkeypatch.setattr(Tune, "updates", updates)


# --- the last good state -----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 200])
def test_a_state_with_a_non_finite_loss_is_not_kept(tiny, photos, tmp_path, monkeypatch, every):
    """The parameters after step 3 produced the bad loss, so the parameters after step 2 are kept instead."""
    recipe = small("textual_inversion", "train.steps=6", f"train.checkpoint_every={every}")
    whole = finish(session(tiny(), recipe, photos, tmp_path / "whole"))
    states = []
    with monkeypatch.context() as patch:
        broken_at(patch, 3)
        run = session(tiny(), recipe, photos, tmp_path / "run")
        with pytest.raises(
            NotFinite,
            match=r"the loss at step 4 is nan \(phase tune\); the last good state, from step 2, is kept .* --resume",
        ):
            for _ in run.steps():
                states.append(learned(run))
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and len(states) == 3 and state.step == 2
    assert same(dict(state.learned), states[1]) and same(learned(run), states[1])
    assert state.optimizer["main.0.step"] == 2
    assert same(finish(session(tiny(), recipe, photos, tmp_path / "run"), resume=True), whole), (
        "the optimizer's moments are kept too"
    )


def test_a_run_can_continue_with_a_lower_learning_rate(tiny, photos, tmp_path):
    """The first update is far too large. The resumed run matches one that never made that update."""
    lower = small("textual_inversion", "trainable.tokens.lr=0.005", "train.steps=5")
    with pytest.raises(NotFinite, match="the last good state, from step 0"):
        finish(session(tiny(), small("textual_inversion", "trainable.tokens.lr=1e30"), photos, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"had train\.steps = 2, but this one has 5"):
        finish(session(tiny(), lower, photos, tmp_path / "run"), resume=True)
    short = small("textual_inversion", "trainable.tokens.lr=0.005")
    resumed = finish(session(tiny(), short, photos, tmp_path / "run"), resume=True)
    assert same(resumed, finish(session(tiny(), short, photos, tmp_path / "fresh")))
    with pytest.raises(ValueError, match=r"had trainable\.tokens\.lr = 0\.005, but this one has 1\.0"):
        finish(session(tiny(), small("textual_inversion", "trainable.tokens.lr=1"), photos, tmp_path / "run"), True)


def test_a_checkpoint_is_kept_if_the_first_step_after_it_fails(tiny, photos, tmp_path, monkeypatch):
    recipe = small("textual_inversion", "train.steps=4", "train.checkpoint_every=2")
    steps = session(tiny(), recipe, photos, tmp_path / "run").steps()
    next(steps), next(steps)
    steps.close()
    before = checkpoint.load(tmp_path / "run")
    with monkeypatch.context() as patch:
        broken_at(patch, 2)
        with pytest.raises(NotFinite, match="the last good state, from step 2"):
            finish(session(tiny(), recipe, photos, tmp_path / "run"), resume=True)
    state = checkpoint.load(tmp_path / "run")
    assert before is not None and state is not None and state.step == 2 and state.info["not_finite"]
    assert same(dict(state.learned), dict(before.learned))
    lower = small("textual_inversion", "train.steps=4", "train.checkpoint_every=2", "train.optimizers.main.eps=1e-6")
    finish(session(tiny(), lower, photos, tmp_path / "run"), resume=True)


def test_only_learning_rates_optimizers_and_precision_may_change_after_a_non_finite_loss():
    old = {
        "train": {"steps": 5, "mixed_precision": "fp16", "optimizers": {"main": {"eps": 1e-8, "betas": [0.9, 0.99]}}},
        "trainable": {"lora": {"kind": "lora", "lr": 1.0, "rank": 4}},
        "phases": {"a": {"trainable": {"lora": {"lr": 1.0}}, "train": {"optimizers": {"main": {"warmup": 3}}}}},
    }

    def changed(*path: Any) -> dict:
        new = json.loads(json.dumps(old))
        *parents, last, value = path
        node = new
        for key in parents:
            node = node[key]
        node[last] = value
        return new

    for path in (
        ("train", "mixed_precision", "no"),
        ("train", "optimizers", "main", "betas", [0.5, 0.9]),
        ("trainable", "lora", "lr", 0.1),
        ("phases", "a", "trainable", "lora", "lr", 0.1),
        ("phases", "a", "train", "optimizers", "main", "warmup", 9),
    ):
        same_recipe(old, changed(*path), after_not_finite=True)
        with pytest.raises(ValueError, match=r"resume with the same recipe, or start over with --overwrite"):
            same_recipe(old, changed(*path))
    for path in (("train", "steps", 6), ("trainable", "lora", "rank", 8), ("trainable", "lora", {"kind": "dora"})):
        with pytest.raises(ValueError, match=rf"had {path[0]}\.{path[1]}"):
            same_recipe(old, changed(*path), after_not_finite=True)


def test_settings_that_do_not_affect_the_result_may_change():
    old = {
        "backbone": "/a/sd",
        "title": "x",
        "method": "t_lora",
        "taxonomy": {"scheme": "test-time fine-tuning", "trains": "LoRA"},
        "subject": {"images": "/a/photos", "captions": None, "class_noun": "mug"},
        "subjects": {"b": {"images": ["/a/1.png"]}},
        "train": {"checkpoint_every": 200, "gradient_checkpointing": False, "steps": 5},
        "phases": {"a": {"train": {"checkpoint_every": 200, "steps": 5}}},
    }
    new = {
        "backbone": "/b/sd",
        "title": "y",
        "method": "mine",
        "taxonomy": {"scheme": "pre-trained adaptation", "trains": ""},
        "subject": {"images": "/b/photos", "captions": "/b/captions", "class_noun": "mug"},
        "subjects": {"b": {"images": ["/b/1.png"]}},
        "train": {"checkpoint_every": 1, "gradient_checkpointing": True, "steps": 5},
        "phases": {"a": {"train": {"checkpoint_every": 0, "steps": 5}}},
    }
    same_recipe(old, new)  # folders may move, because their contents are compared by hash
    for changed in (
        {"backbone": "toybox"},
        {"subject": {**new["subject"], "class_noun": "cup"}},
        {"train": {"steps": 6}},
    ):
        with pytest.raises(ValueError, match="the interrupted run had"):
            same_recipe(old, {**new, **changed})
    with pytest.raises(ValueError, match="the finished run had backbone = '/a/sd'"):
        same_recipe(old, new, finished=True)


def test_preview_settings_may_change_only_if_no_score_selects_the_best_state():
    old = {"train": {"validation": {"every": 5}}, "phases": {"a": {"train": {"validation": {"every": 5, "num": 2}}}}}
    new = {"train": {"validation": {"every": 0}}, "phases": {"a": {"train": {"validation": {"every": 1, "num": 4}}}}}
    same_recipe(old, new, scored=False)
    with pytest.raises(
        ValueError, match=r"the interrupted run had phases\.a\.train\.validation\.every = 5, but this one has 1"
    ):
        same_recipe(old, new)


class Standing:
    """Stands in for a run's optimizers, with one parameter and its moments."""

    def __init__(self, numbers: int = 2) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(numbers))
        self.state: dict[str, torch.Tensor] = {}

    def parameters(self):
        return [self.weight]

    def states(self):
        yield self.weight, self.state

    def progress(self):
        return {}

    def load_progress(self, state) -> None:
        assert state == {}

    def zero_grad(self) -> None:
        pass


def test_a_diverging_state_is_not_a_good_state():
    """A state whose loss is a thousand times the lowest loss is finite, but not worth continuing from."""
    model: Any = Standing()
    good = LastGood(model)
    for step, (value, loss) in enumerate([(0.1, 0.5), (0.2, 0.4), (0.3, 3.0), (9.0, 1e7), (99.0, 1e20)]):
        model.weight.data.fill_(value)
        model.state["exp_avg"] = torch.full((2,), value)
        good.keep(step, loss)
    assert good.put_back() == 2
    assert torch.equal(model.weight, torch.full((2,), 0.3)) and torch.equal(model.state["exp_avg"], model.weight.data)
    assert LastGood(model).put_back() is None


def test_states_too_large_to_copy_are_not_copied(monkeypatch):
    monkeypatch.setattr("shared.train.last_good_state.MOST", 3)
    small_one, large = (LastGood(Standing(n)) for n in (3, 4))  # type: ignore[arg-type]
    for good in (small_one, large):
        good.keep(1, 0.5)
    assert small_one.put_back() == 1 and large.put_back() is None


def test_without_a_copy_a_run_falls_back_to_the_last_checkpoint(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.train.last_good_state.MOST", 0)
    broken_at(monkeypatch, 3)
    for every, message in ((2, "the last good state, from step 2"), (0, "there is no earlier state to return to")):
        recipe = small("textual_inversion", "train.steps=5", f"train.checkpoint_every={every}")
        with pytest.raises(NotFinite, match=message):
            finish(session(tiny(), recipe, photos, tmp_path / f"{every}"))
        state = checkpoint.load(tmp_path / f"{every}")
        assert (state and (state.step, state.info["not_finite"])) == ((2, True) if every else None)


# --- what a run depends on -----------------------------------------------------------------------


def cut(run: Any) -> None:
    """Takes one step of a run, then closes the run."""
    steps = run.steps()
    next(steps)
    steps.close()


RECIPE = ("textual_inversion", "train.steps=2", "train.checkpoint_every=1")


def test_resuming_with_different_pictures_is_refused(tiny, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    recipe, workdir = small(*RECIPE), tmp_path / "run"

    def go_on() -> None:
        finish(session(tiny(), recipe, folder, workdir), resume=True)

    cut(session(tiny(), recipe, folder, workdir))
    for change, undo, message in (
        (
            lambda: shutil.copyfile(photos / "0.png", folder / "1.png"),
            lambda: shutil.copyfile(photos / "1.png", folder / "1.png"),
            r"the picture 1\.png of 'mug' .* has changed",
        ),
        (
            lambda: (folder / "2.png").rename(tmp_path / "2.png"),
            lambda: (tmp_path / "2.png").rename(folder / "2.png"),
            r"the picture 2\.png of 'mug' .* has been removed",
        ),
        (
            lambda: (folder / "0.txt").write_text("a mug"),
            lambda: (folder / "0.txt").unlink(),
            r"the caption of 0\.png of 'mug' .* has been added",
        ),
        (
            lambda: shutil.copyfile(photos / "0.png", folder / "masks" / "0.png"),
            lambda: shutil.copyfile(photos / "masks" / "0.png", folder / "masks" / "0.png"),
            r"the mask of 0\.png",
        ),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            go_on()
        undo()
    go_on()


def test_resuming_with_another_model_is_refused(make_tiny_sd, tiny, photos, tmp_path):
    recipe = small(*RECIPE)
    cut(session(tiny(), recipe, photos, tmp_path / "run"))
    other = StableDiffusionBackbone(make_tiny_sd(1), "tiny")
    with pytest.raises(ValueError, match="the backbone's checkpoint has changed"):
        finish(session(other, recipe, photos, tmp_path / "run"), resume=True)
    finish(session(tiny(), recipe, photos, tmp_path / "run"), resume=True)


def test_a_run_that_starts_over_leaves_no_earlier_run_to_resume(tiny, photos, tmp_path):
    """This is true even if the new run is killed before its first checkpoint. A run that is refused removes nothing."""
    cut(session(tiny(), small(*RECIPE), photos, tmp_path / "run"))
    (tmp_path / "run" / "samples").mkdir()
    with pytest.raises(ValueError, match="trains nothing"):
        cut(session(tiny(), small(*RECIPE, "trainable.tokens=null"), photos, tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run") is not None
    cut(session(tiny(), small(*RECIPE, "train.checkpoint_every=0"), photos, tmp_path / "run"))
    assert checkpoint.load(tmp_path / "run") is None and not (tmp_path / "run" / "samples").exists()


def test_a_run_can_resume_with_the_same_weights_loaded_in_another_precision(
    make_tiny_sd, photos, tmp_path, monkeypatch
):
    half = StableDiffusionBackbone(make_tiny_sd().to(torch.bfloat16), "tiny")
    recipe = small("textual_inversion", "train.mixed_precision=bf16")
    with monkeypatch.context() as patch, pytest.raises(NotFinite):
        broken_at(patch, 1)
        finish(session(half, recipe, photos, tmp_path / "run"))
    full = StableDiffusionBackbone(make_tiny_sd(), "tiny")
    finish(session(full, small("textual_inversion", "train.mixed_precision=no"), photos, tmp_path / "run"), resume=True)


def with_old(backbone: Any, seed: int = 9) -> Any:
    Lora(rank=2).inject(backbone, "old", "lora", seed=seed)
    return backbone


def test_resuming_with_different_loaded_concepts_is_refused(tiny, photos, tmp_path):
    recipe, workdir = small(*RECIPE), tmp_path / "run"
    cut(session(with_old(tiny()), recipe, photos, workdir, loaded_strengths={"old": 1.0}))

    def go_on(backbone: Any, **changes: Any) -> None:
        finish(session(backbone, recipe, photos, workdir, **changes), resume=True)

    for backbone, others, message in (
        (tiny(), {}, "the loaded concept 'old' has been removed"),
        (with_old(tiny()), {"old": 0.5}, "at strength 1 is now .* at strength 0.5"),
        (with_old(tiny(), seed=1), {"old": 1.0}, "the loaded concept 'old' has changed"),
    ):
        with pytest.raises(ValueError, match=message):
            go_on(backbone, loaded_strengths=others)
    named = with_old(tiny())
    LearnableToken().attach(named, "dog", "dog")
    with pytest.raises(ValueError, match="the loaded concept 'dog' has been added"):
        go_on(named, loaded_strengths={"old": 1.0})
    go_on(with_old(tiny()), loaded_strengths={"old": 1.0})


def test_two_subjects_may_have_pictures_with_the_same_names(tiny, photos, tmp_path):
    subjects = {"mug": read_subject(photos, "mug"), "rex": read_subject(photos.parent / "other", "dog")}
    recipe = small("pivotal_tuning", "train.steps=2", "train.checkpoint_every=1")
    cut(session(tiny(), recipe, photos, tmp_path / "run", subjects=subjects))
    turned = {"mug": subjects["mug"], "rex": read_subject(photos, "dog")}
    with pytest.raises(ValueError, match=r"the picture 0\.png of 'rex'"):
        finish(session(tiny(), recipe, photos, tmp_path / "run", subjects=turned), resume=True)


def test_clearing_keeps_files_that_do_not_belong_to_the_run(tmp_path):
    log = Log(tmp_path)
    log.scalars(1, {"loss": 1.0})
    log.samples(1, torch.zeros(1, 3, 16, 16))
    log.close()
    checkpoint.save(tmp_path, checkpoint.State(0, 1, {"rows": torch.ones(2)}))
    mine = ("mine.txt", "samples/mine.png", "tensorboard/events.out.tfevents.1.mine", "checkpoint-00-0000001/notes.txt")
    for name in mine:
        (tmp_path / name).write_text("x")
    checkpoint.clear(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(mine)


def test_clearing_a_folder_that_contains_only_a_run_empties_it(tmp_path):
    log = Log(tmp_path)
    log.scalars(1, {"loss": 1.0})
    log.samples(1, torch.zeros(1, 3, 16, 16))
    log.close()
    checkpoint.save(tmp_path, checkpoint.State(0, 1, {"rows": torch.ones(2)}))
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_log_never_replaces_a_file_that_pcs_did_not_write(tmp_path):
    for name in ("log.jsonl", "samples/step-000001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"did not write.*{name}"):
            Log(tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
