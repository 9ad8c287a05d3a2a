"""The decoder's training against a discriminator, at tiny size: what it changes, and what it leaves as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shared.pretrain.toybox import assemble, common, decoder, vae
from shared.pretrain.toybox import latent_cache as cache
from tests.core.squares import TINY_VAE, Squares, same, tiny_run

TINY = decoder.DecoderTraining(batch=4, alone=2, bf16=False, log_every=2, pixel=TINY_VAE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cache.Cache]:
    out = tmp_path_factory.mktemp("run")
    tiny_run(out, Squares(40))
    return out, cache.load(out / "latents")


@pytest.fixture
def run(made: tuple[Path, cache.Cache], tmp_path: Path) -> tuple[Path, cache.Cache]:
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run", made[1]


def _train(out: Path, cached: cache.Cache, steps: int, resume: bool) -> decoder.DecoderRun:
    trained = decoder.DecoderRun(TINY, out, CPU, resume)
    decoder.fit(trained, cached, Squares(40), common.Budget(steps=steps, warmup=2), out)
    return trained


def test_the_decoder_changes_and_the_latents_do_not(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    before = assemble.frozen_vae(out)
    trained = _train(out, cached, 4, resume=False)
    decoder.finish(trained, Squares(40), out)
    after = assemble.frozen_vae(out)
    kept = {n: x for n, x in after.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    same({n: before.state_dict()[n] for n in kept}, kept)
    moved = [n for n, x in after.named_parameters() if not torch.equal(x, before.state_dict()[n])]
    assert moved and all(n.startswith(("decoder.", "post_quant_conv.")) for n in moved)
    assert after.config["scaling_factor"] == before.config["scaling_factor"]
    tokenizer = assemble.tokenizer_of(out)
    assert cache.fingerprint(after, tokenizer) == cache.fingerprint(before, tokenizer)  # nothing is encoded anew
    average = torch.nn.ModuleList([after.post_quant_conv, after.decoder])  # type: ignore[list-item]
    same(dict(average.named_parameters()), {n: x for n, x in trained.ema.shadow.items()})


def test_it_decodes_what_the_autoencoder_decodes(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    trained, model = decoder.DecoderRun(TINY, out, CPU, resume=False), assemble.frozen_vae(out)
    latents = torch.from_numpy(cached.latents[:3].astype("float32"))
    with torch.no_grad():
        expected = model.decode(latents / model.config["scaling_factor"]).sample
        torch.testing.assert_close(trained.decode(latents), expected, atol=1e-5, rtol=1e-5)


def test_it_resumes_to_the_same_bits(run: tuple[Path, cache.Cache], tmp_path: Path) -> None:
    out, cached = run
    shutil.copytree(out, tmp_path / "other")
    _train(out, cached, 3, resume=False)
    stopped = _train(out, cached, 6, resume=True)
    straight = _train(tmp_path / "other", cached, 6, resume=False)
    same(stopped.decoder.state_dict(), straight.decoder.state_dict())
    same(stopped.critic.state_dict(), straight.critic.state_dict())
    same(stopped.ema.shadow, straight.ema.shadow)


def test_a_new_autoencoder_discards_the_decoder_s_training(run: tuple[Path, cache.Cache]) -> None:
    out, cached = run
    _train(out, cached, 1, resume=False)
    again = vae.VaeRun(TINY_VAE, out, CPU, resume=True)
    assert (out / assemble.DECODER_CHECKPOINT).is_file() and vae.finished(again, out), (
        "nothing was trained: nothing goes"
    )
    vae.fit(again, Squares(40), common.Budget(steps=again.step + 1), common.Log(out / "vae_log.jsonl", say=False))
    assert not vae.finished(again, out)
    vae.finish(again, Squares(40), out)
    assert not (out / assemble.DECODER_CHECKPOINT).exists()


def test_the_critic_learns_to_tell_blurred_pictures() -> None:
    torch.manual_seed(0)
    real = vae.to_signed(Squares(64).pixels(slice(None)))
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(real, (1, 1, 1, 1), mode="replicate"), 3, 1)
    critic = decoder.Critic((8, 16, 16))
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.99))
    for _ in range(40):
        loss = (1 - critic(real)[0]).relu().mean() + (1 + critic(blurred)[0]).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert float(critic(real)[0].mean()) > 0.3 > -0.3 > float(critic(blurred)[0].mean())


def test_the_discriminator_s_share_is_of_the_faithful_gradient(run: tuple[Path, cache.Cache]) -> None:
    """At the last layer the adversarial gradient is `adversarial` times as long as the rest (arXiv 2012.09841, eq. 7)."""
    out, cached = run
    trained = decoder.DecoderRun(TINY, out, CPU, resume=False)
    data = Squares(40)
    real, thing = vae.to_signed(data.pixels(slice(8))), torch.from_numpy(data.masks(slice(8)))[:, None]
    last = trained.decoder[1].conv_out.weight  # type: ignore[union-attr]
    norms = []
    for share in (0.0, 0.5):
        trained.settings = decoder.DecoderTraining(adversarial=share, pixel=TINY_VAE)
        shown = trained.decode(torch.from_numpy(cached.latents[:8].astype("float32")))
        loss, _ = trained._loss(shown, real, thing, trusted=1.0)
        norms.append(torch.autograd.grad(loss, last)[0])  # type: ignore[arg-type]
    assert float((norms[1] - norms[0]).norm() / norms[0].norm()) == pytest.approx(0.5, rel=1e-2)
