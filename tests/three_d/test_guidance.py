"""Compares the guidance methods with the formulas in their papers, in float64. All methods use the same engine."""

from __future__ import annotations

import pytest
import torch

from pcs_3d.cameras import Cameras
from pcs_3d.guidance.engine import guide, rescaled, surrogate
from pcs_3d.guidance.noisers import Inversion, RandomNoise, ddim_step
from pcs_3d.guidance.oracle import OracleScores
from pcs_3d.guidance.scores import Ask, coefficients
from pcs_3d.guidance.settings import Guidance, Term
from pcs_3d.schedules import Moment
from pcs_3d.view_prompts import ScenePrompts, Views
from shared.recipe.resolve import load
from shared.train.loop import generator
from tests.three_d.picture_scenes import PictureRecipe

PROMPTS = ScenePrompts("a photo of a mug")
START = Moment(0, 10)


def shipped(name: str, *settings: str) -> Guidance:
    """Returns the guidance of a shipped recipe."""
    return load(name, ["backbone=some/folder", *settings], "3d", PictureRecipe).guidance


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(seed: int):
    """Returns a function that maps cameras to pictures. Each picture depends only on its camera's azimuth."""
    wave = random(3, 4, 4, seed=seed)
    return lambda cameras: wave * (1 + torch.deg2rad(cameras.azimuth_deg.double()).cos())[:, None, None, None]


@pytest.fixture
def scores() -> OracleScores:
    scene = {"prompt": (means(1), 0.1), "plain_prompt": (means(2), 0.2), "negative": (means(3), 0.5), "null": (means(4), 0.9),
             "away_near": (means(5), 0.3), "away_far": (means(6), 0.3)}  # fmt: skip
    return OracleScores(scene, student=means(7))  # type: ignore[arg-type]


def looked(*azimuths: float) -> Views:
    return Views(Cameras.of(list(azimuths)), (False,) * len(azimuths))


VIEWS = looked(0.0, 100.0)
Z = random(2, 3, 4, 4, seed=9)


def guided(settings: Guidance, scores: OracleScores, moment: Moment = START, z=Z, views=VIEWS, seed: int = 3):
    return guide(settings, scores, z, views, PROMPTS, moment, generator(seed, moment.step))


def parts(scores: OracleScores, made, views=VIEWS):
    """Returns alpha, sigma, and a function that returns predictions at (z_t, t)."""
    alpha, sigma = coefficients(scores, made.noised.t, made.noised.z_t)
    ask = lambda told, adapters="teacher": scores.eps([Ask(told, adapters)], made.noised.z_t, made.noised.t, views)[0]  # noqa: E731
    return alpha, sigma, ask


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=rtol, atol=1e-12)


# --- the surrogate loss and conventions --------------------------------------------------------


def test_the_slope_of_the_surrogate_is_the_gradient_divided_by_the_number_of_views():
    grad = random(2, 3, 4, 4, seed=2)
    z = Z.clone().requires_grad_(True)
    surrogate(z, grad).backward()
    assert close(z.grad, grad / 2)
    fixed = (Z - grad).detach()
    direction, step = random(2, 3, 4, 4, seed=5), 1e-5
    loss = lambda x: float(0.5 * (x - fixed).square().sum() / 2)  # noqa: E731
    slope = (loss(Z + step * direction) - loss(Z - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((grad / 2 * direction).sum()), rel=1e-6)


def test_guidance_scale_0_ignores_the_prompt_and_scale_1_gives_the_plain_prediction(scores):
    for scale, told in ((0.0, "negative"), (1.0, "prompt")):
        made = guided(shipped("dreamfusion", f"guidance.scale={scale}"), scores)
        _, _, ask = parts(scores, made)
        assert close(made.eps, ask(told))


def test_a_prediction_equal_to_the_noise_gives_no_gradient():
    z = Z.clone()
    scores = OracleScores({"prompt": (lambda cameras: z, 0.0)})
    made = guided(shipped("dreamfusion", "guidance.scale=1"), scores)
    assert made.grad.abs().max() < 1e-12 and close(made.x0, z)


# --- methods ---------------------------------------------------------------------------------


def test_sds_equals_its_formula(scores):
    made = guided(shipped("dreamfusion"), scores)
    _, sigma, ask = parts(scores, made)
    eps = ask("negative") + 100 * (ask("prompt") - ask("negative"))
    assert close(made.grad, sigma**2 * (eps - made.noised.target))
    alpha, sigma = coefficients(scores, made.noised.t, Z)
    assert close(made.noised.z_t, alpha * Z + sigma * made.noised.target)


def test_sjc_equals_the_variance_reduced_gradient_in_its_paper(scores):
    """At noise level s = sigma / alpha, the denoised view is D = z + s noise - s eps(z_t).

    The gradient is (z - D) / s.
    """
    made = guided(shipped("sjc", "guidance.scale=1"), scores)
    alpha, sigma, ask = parts(scores, made)
    level = sigma / alpha
    noisy = Z + level * made.noised.target
    assert close(made.noised.z_t, noisy / (1 + level**2).sqrt(), rtol=1e-7), "the network sees the scaled noisy latents"
    assert close(made.grad, -((noisy - level * ask("prompt")) - Z) / level, rtol=1e-7)


def test_csd_is_sds_at_an_infinite_scale(scores):
    last = Moment(9, 10)
    csd = guided(shipped("csd"), scores, last)
    _, _, ask = parts(scores, csd)
    assert close(csd.grad, ask("prompt") - ask("negative")), "the negative prompt is subtracted in the second half"
    sds = shipped("dreamfusion", "guidance.weighting=uniform", "guidance.scale=1e7", "guidance.times.high=0.5")
    limit = guided(sds, scores, last)
    assert torch.equal(limit.noised.z_t, csd.noised.z_t) and torch.allclose(limit.grad / 1e7, csd.grad, atol=1e-7)
    first = guided(shipped("csd"), scores, START)
    _, _, ask = parts(scores, first)
    assert close(first.grad, ask("prompt") - ask("null"))


@pytest.mark.parametrize(("t", "with_noise"), [(199, False), (200, True)])
def test_nfsd_subtracts_the_negative_prediction_only_at_t_200_and_above(scores, t, with_noise):
    made = guided(shipped("nfsd", f"guidance.times.low={t / 1000}", f"guidance.times.high={t / 1000}"), scores)
    assert made.noised.t.tolist() == [t, t]
    _, sigma, ask = parts(scores, made)
    domain = ask("null") - ask("negative") if with_noise else ask("null")
    assert close(made.grad, sigma**2 * (domain + 7.5 * (ask("prompt") - ask("null"))))


def test_vsd_subtracts_the_students_prediction(scores):
    made = guided(shipped("prolificdreamer"), scores)
    _, sigma, ask = parts(scores, made)
    teacher = ask("negative") + 7.5 * (ask("prompt") - ask("negative"))
    assert close(made.grad, sigma**2 * (teacher - ask("plain_prompt", "student")))
    same = OracleScores({"prompt": (means(1), 0.1)}, student=means(1))
    assert guided(shipped("prolificdreamer", "guidance.scale=1"), same).grad.abs().max() < 1e-12


def test_ism_subtracts_an_earlier_prediction_on_the_same_trajectory(scores):
    settings = shipped("lucid_dreamer")
    made = guided(settings, scores)
    alpha, sigma, ask = parts(scores, made)
    assert made.noised.start is not None
    z_s, s = made.noised.start
    target = scores.eps([Ask("null")], z_s, s, VIEWS)[0]
    assert close(made.noised.z_t, ddim_step(scores, z_s, target, s, made.noised.t)) and bool((s < made.noised.t).all())
    eps = ask("negative") + 7.5 * (ask("prompt") - ask("negative"))
    assert close(made.grad, 0.1 * sigma / alpha * (eps - target))
    as_term = settings.model_copy(
        update={"target": "none", "terms": {**settings.terms, "start": Term(kind="null", at="s", plain=-1.0)}}
    )
    assert close(guided(as_term, scores).grad, made.grad), "the target equals a term at the earlier point"
    assert torch.equal(guided(settings, scores).grad, made.grad), "the same seed gives the same gradient"


def test_ism_without_an_interval_gives_no_gradient():
    scores = OracleScores({"prompt": (means(1), 0.4)})
    made = guided(shipped("lucid_dreamer", "guidance.scale=1", "guidance.noiser.delta=0"), scores)
    assert made.grad.abs().max() < 1e-12
    wide = guided(shipped("lucid_dreamer", "guidance.scale=1", "guidance.noiser.delta=0.2"), scores)
    assert wide.grad.abs().max() > 1e-3


def test_sdi_moves_towards_x0_and_has_no_gradient_where_the_teacher_agrees():
    settings = shipped("sdi", "guidance.perp_neg=null", "guidance.noiser.eta=0", "guidance.normalize=sum")
    z = Z.clone()
    made = guided(settings, OracleScores({"prompt": (lambda cameras: z, 0.0)}), z=z)
    assert torch.allclose(made.x0, z, atol=1e-9) and made.grad.abs().max() < 1e-9, (
        "inversion followed by one step is the identity"
    )
    elsewhere = guided(settings, OracleScores({"prompt": (means(1), 0.3)}), z=z)
    assert close(elsewhere.grad, z - elsewhere.x0, rtol=1e-6), "the gradient of half the squared distance to x0"


def test_inversion_guides_away_from_the_prompt(scores):
    """The scale is -6.5 in eps_u + s (eps_c - eps_u). The paper's scale of -7.5 is for eps_c + s (eps_c - eps_u)."""
    t = torch.tensor([500, 500])
    asked = Inversion()._eps(scores, Z, t, VIEWS)
    c, u = scores.eps([Ask("prompt"), Ask("negative")], Z, t, VIEWS)
    assert close(asked, c - 7.5 * (c - u))


# --- rescaling, clipping, normalization -------------------------------------------------------


def test_the_gradient_points_from_x0_to_z_and_x0_can_be_rescaled(scores):
    terms = {"guidance.weighting": "noise_to_signal", "guidance.scale": "50"}
    settings = [f"{k}={v}" for k, v in terms.items()]
    made = guided(shipped("dreamfusion", *settings), scores)
    alpha, sigma, ask = parts(scores, made)
    assert close(made.grad, sigma / alpha * (made.eps - made.noised.target)) and close(
        made.grad, Z - made.x0, rtol=1e-7
    )
    whole = guided(shipped("dreamfusion", *settings, "guidance.rescale=1", "guidance.rescale_over=2"), scores)
    plain = (whole.noised.z_t - sigma * ask("prompt")) / alpha
    assert float(whole.x0.std()) == pytest.approx(float(plain.std()), rel=1e-9), "both views are rescaled together"
    assert close(whole.grad, Z - whole.x0, rtol=1e-7)
    with pytest.raises(ValueError, match=r"number of views in a step \(2\) must be a multiple"):
        guided(shipped("dreamfusion", "guidance.rescale=1", "guidance.rescale_over=4"), scores)
    half = rescaled(Z, 3 * Z, 0.5, 1)
    assert close(half, 2 * Z)


def test_score_debiasing_clips_each_value_at_a_limit_that_grows(scores):
    settings = shipped("dreamfusion", "guidance.clip=[0, 0.5, 2.0, 10]")
    for moment, limit in ((START, 0.5), (Moment(5, 10), 1.25)):
        made, free = guided(settings, scores, moment), guided(shipped("dreamfusion"), scores, moment)
        assert close(made.grad, free.grad.clamp(-limit, limit)) and float(free.grad.abs().max()) > limit


def test_the_mean_gradient_is_the_sum_divided_by_the_number_of_values(scores):
    mean, total = (guided(shipped("dreamfusion", f"guidance.normalize={n}"), scores) for n in ("mean", "sum"))
    assert close(mean.grad * Z[0].numel(), total.grad)


def test_a_term_with_weight_0_is_not_evaluated(scores):
    asked = []

    class Watched(OracleScores):
        def eps(self, asks, z_t, t, views):
            asked.extend(asks)
            return super().eps(asks, z_t, t, views)

    watched = Watched(scores.scene, scores.student)
    guided(shipped("csd"), watched, Moment(9, 10))
    assert set(asked) == {Ask("prompt"), Ask("negative")}


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dreamfusion", "sdi"])
def test_a_view_gets_the_same_gradient_in_a_batch_as_alone(scores, name):
    settings = shipped(name, "guidance.times.low=0.4", "guidance.times.high=0.4", "guidance.times.anneal=1")
    fixed = {"noiser": settings.noiser.model_copy(update={"eta": 0.0, "jitter": 0.0})} if name == "sdi" else {}
    settings = settings.model_copy(update=fixed)
    if name == "dreamfusion":
        settings = settings.model_copy(update={"noiser": _no_noise()})
    azimuths = (20.0, 130.0, -75.0)
    z = random(3, 3, 4, 4, seed=4)
    together = guided(settings, scores, z=z, views=looked(*azimuths)).grad
    for i, azimuth in enumerate(azimuths):
        alone = guided(settings, scores, z=z[i : i + 1], views=looked(azimuth)).grad
        assert close(together[i : i + 1], alone, rtol=1e-9)


def _no_noise():
    class Silent(RandomNoise):
        def __call__(self, z, times, scores, views, moment, generator):
            made = super().__call__(z, times, scores, views, moment, generator)
            zero = torch.zeros_like(z)
            alpha, _ = coefficients(scores, made.t, z)
            return type(made)(alpha * z, made.t, zero)

    return Silent()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["guidance.terms.student={kind: plain_prompt, adapters: student, plain: -1}"], "nothing trains the student"),
        (["guidance.terms.start={kind: negative, at: s}"], "at=s needs the earlier point"),
        (["guidance.perp_neg={}"], "needs a term of kind null"),
        (["guidance.space=latents", "guidance.pixel_weight=1"], "have no pixels"),
        (["guidance.terms.prompt=null", "guidance.terms.negative=null"], "nothing guides"),
    ],
)
def test_incompatible_settings_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        shipped("dreamfusion", *settings)
