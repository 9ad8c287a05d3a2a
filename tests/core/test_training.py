"""Complete runs on tiny pipelines, from pictures to learned tensors: what a run changes and how it resumes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.recipe.catalog import recipe_files
from shared.train import checkpoint
from shared.train.phase import Interrupted
from tests.core.runs import finish, learned, same, session, small

SHIPPED = sorted(recipe_files("image"))


def weights(backbone: Any) -> dict[str, Tensor]:
    networks = {**backbone.components, "vae": backbone.vae}
    adapter_ids = {id(p) for adapters in backbone.adapters.values() for a in adapters for p in a.parameters()}
    return {
        f"{c}.{n.replace('.base_layer', '')}": p.detach().clone()
        for c, m in networks.items()
        for n, p in m.named_parameters()
        if id(p) not in adapter_ids
    }


# --- what changes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [*(("sd", n) for n in SHIPPED), ("flux", "pivotal_tuning")])
def test_two_steps_change_the_declared_parameters_and_nothing_else(request, photos, tmp_path, family, name):
    make = request.getfixturevalue(f"make_tiny_{family}")
    wrap = StableDiffusionBackbone if family == "sd" else FluxBackbone
    start = finish(session(wrap(make(), "tiny"), small(name, "train.steps=0"), photos, tmp_path / "a"))
    backbone = wrap(make(), "tiny")
    before = weights(backbone)
    run = session(backbone, small(name), photos, tmp_path / "b")
    after = finish(run)
    assert after.keys() == start.keys() and after
    assert all(not torch.equal(v, start[k]) for k, v in after.items()), "every declared parameter has changed"
    left, trained = (
        weights(backbone),
        {slot for _, p in run.phases for slot, t in p.trainable.items() if t.kind == "weights"},
    )
    learned = {k.split("/", 2)[2] for k in after if k.startswith("adapter/") and k.split("/")[1] in trained}
    assert same(left, {k: v for k, v in before.items() if k not in learned}), (
        "all other weights are unchanged, bit for bit"
    )
    declared = {slot for _, phase in run.phases for slot in phase.trainable}
    assert {k.split("/")[1] for k in after if k.startswith("adapter/")} == declared - {"tokens"}
    assert any(k.startswith("placeholder/mug/") for k in after) == ("tokens" in declared)
    assert not any(p.requires_grad for m in backbone.components.values() for p in m.parameters())
    assert bool(run.ports) == (family == "flux")


def test_a_run_is_reproducible_and_depends_on_the_seed(tiny, photos, tmp_path):
    one, two, other = (
        finish(session(tiny(), small("dreambooth_lora", f"seed={s}"), photos, tmp_path / f"{i}"))
        for i, s in enumerate((0, 0, 1))
    )
    assert same(one, two) and not same(one, other)


def test_a_recipe_that_trains_nothing_is_refused(tiny, photos, tmp_path):
    with pytest.raises(ValueError, match=r"trains nothing: add a part under trainable"):
        finish(session(tiny(), small("textual_inversion", "trainable.tokens=null"), photos, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- interrupting and resuming ---------------------------------------------------------------

RICH = (
    *("augment.flip.p=0.5", "augment.color_jitter.brightness=0.2", "train.gradient_accumulation=2"),
    *(
        "train.optimizers.main.schedule=cosine",
        "train.optimizers.main.warmup=1",
        "prompts.drop=0.2",
        "noise.offset=0.1",
    ),
    *("trainable.lora.kind=lora", "trainable.lora.dropout=0.3", "trainable.lora.rank=2"),
    *("regularize.anchor.kind=embedding_anchor", "regularize.anchor.weight=10"),
)


@pytest.mark.parametrize(
    ("name", "settings", "stop"),
    [
        ("textual_inversion", ("train.steps=5",), 3),
        ("textual_inversion", ("train.steps=5", *RICH), 3),
        ("dreambooth_lora", ("train.steps=4", "objective.masked=true"), 1),
        ("pivotal_tuning", ("train.steps=3",), 2),
        ("pivotal_tuning", ("train.steps=3",), 3),
        ("pivotal_tuning", ("train.steps=3", "augment.color_jitter.contrast=0.2", "train.variants=2"), 5),
    ],
    ids=["tokens", "rich", "class pictures", "first phase", "at the end of a phase", "second phase"],
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tiny, photos, tmp_path, name, settings, stop):
    recipe = small(name, *settings)
    whole = finish(session(tiny(), recipe, photos, tmp_path / "whole"))
    first = session(tiny(), recipe, photos, tmp_path / "cut")
    steps = 0
    with pytest.raises(Interrupted):
        for _ in first.steps():
            steps += 1
            if steps == stop:
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does; the run finishes the current step and saves
    assert steps == stop and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(list((tmp_path / "cut").glob(f"{checkpoint.PREFIX}*"))) == 1
    assert same(finish(session(tiny(), recipe, photos, tmp_path / "cut"), resume=True), whole)
    logs = [[json.loads(x) for x in (tmp_path / f / "log.jsonl").read_text().splitlines()] for f in ("whole", "cut")]
    assert logs[0] == logs[1] and [r["step"] for r in logs[1]] == list(range(1, len(logs[0]) + 1))


def test_a_killed_run_resumes_from_the_last_checkpoint_even_at_the_start_of_a_phase(tiny, photos, tmp_path):
    """Each run is abandoned at a different step, as if by kill -9.

    One run stops at the first step of the second phase, whose only checkpoint so far was saved as the phase began.
    """
    recipe = small("pivotal_tuning", "train.steps=3", "train.checkpoint_every=2")
    whole = finish(session(tiny(), recipe, photos, tmp_path / "whole"))
    for stop, expected in ((1, None), (2, (0, 2)), (4, (1, 0)), (5, (1, 2))):
        workdir = tmp_path / f"cut-{stop}"
        steps = session(tiny(), recipe, photos, workdir).steps()
        for _ in range(stop):
            next(steps)
        steps.close()
        state = checkpoint.load(workdir)
        assert (state and (state.phase, state.step)) == expected
        assert same(finish(session(tiny(), recipe, photos, workdir), resume=True), whole)
        rows = [json.loads(x)["step"] for x in (workdir / "log.jsonl").read_text().splitlines()]
        assert rows == list(range(1, 7)), "no step is logged twice"


def test_a_finished_run_is_not_trained_again(tiny, photos, tmp_path):
    recipe = small("pivotal_tuning")
    whole = finish(session(tiny(), recipe, photos, tmp_path / "run"))
    again = session(tiny(), recipe, photos, tmp_path / "run")
    assert list(again.steps(resume=True)) == [] and same(learned(again), whole)


def test_resuming_with_a_different_recipe_is_refused(tiny, photos, tmp_path):
    finish(session(tiny(), small("textual_inversion"), photos, tmp_path / "run"))
    with pytest.raises(
        ValueError,
        match=r"the interrupted run had trainable\.tokens\.lr = 0\.005, but this one has 1\.0: resume with the same recipe",
    ):
        finish(session(tiny(), small("textual_inversion", "trainable.tokens.lr=1"), photos, tmp_path / "run"), True)
    finish(session(tiny(), small("textual_inversion", "output=elsewhere"), photos, tmp_path / "run"), resume=True)


# --- the best state --------------------------------------------------------------------------


class Judge:
    """A preview that returns blank pictures and the score given for each step."""

    def __init__(self, scores: Mapping[int, float]) -> None:
        self.scores, self.seen = scores, []

    def __call__(self, phase: str, step: int) -> tuple[Tensor, dict[str, float]]:
        self.seen.append(step)
        return torch.zeros(2, 3, 8, 8), {"score": self.scores[step], "other": 1.0}


@pytest.mark.parametrize("cut", [None, 3, 4])
def test_the_state_with_the_best_score_is_returned(tiny, photos, tmp_path, cut):
    recipe = small("textual_inversion", "train.steps=5", "train.validation.every=2", "trainable.tokens.lr=0.1")
    judge = Judge({2: 0.9, 4: 0.5, 5: 0.7})
    run = session(tiny(), recipe, photos, tmp_path / "run", preview=judge)
    states = []
    try:
        for _, record in run.steps():
            states.append(learned(run))
            if record.step == cut:
                os.kill(os.getpid(), signal.SIGINT)
    except Interrupted:
        run = session(tiny(), recipe, photos, tmp_path / "run", preview=judge)
        finish(run, resume=True)
    assert len(states) == (cut or 5)
    assert judge.seen == [2, 4, 5]
    assert same(learned(run), states[1])
    assert run.final_scores["score"] == 0.9 and run.final_scores["step"] == 2
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["validation/score"]) for r in rows if "validation/score" in r] == [
        (2, 0.9),
        (4, 0.5),
        (5, 0.7),
    ]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [f"step-{s:06d}.png" for s in (2, 4, 5)]


def test_without_keep_best_the_last_state_is_returned(tiny, photos, tmp_path):
    settings = ("train.steps=3", "train.validation.every=1", "train.validation.keep_best=false")
    run = session(
        tiny(), small("textual_inversion", *settings), photos, tmp_path / "a", preview=Judge({1: 3, 2: 2, 3: 1})
    )
    assert same(
        finish(run), finish(session(tiny(), small("textual_inversion", "train.steps=3"), photos, tmp_path / "b"))
    )
    assert run.final_scores["score"] == 1
