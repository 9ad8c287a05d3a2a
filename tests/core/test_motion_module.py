"""Tests how the motion module starts, what its training changes and leaves unchanged, and which weights are shipped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute
from shared.pretrain.toybox import assemble, clip_dataset, clip_latents, motion_module, visible_words
from shared.pretrain.toybox.assemble_motion import assemble_motion
from shared.pretrain.toybox.motion_words import add_words, motion_words
from shared.pretrain.toybox.visible_words import WordTraining, make_visible
from shared.toybox import tokenizer as words
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.weights import backbone_path
from tests.core.squares import Squares, tiny_run

SETTINGS = motion_module.MotionTraining(batch=2, heads=2, most_frames=8, lr=2e-2)


@dataclass(frozen=True)
class SlidingSquares:
    """Six clips, each of four 16×16 frames, in which a square slides left or right."""

    def __len__(self) -> int:
        return 6

    @property
    def captions(self) -> list[list[str]]:
        return [[f"a photo of a red cat moving to the {'left' if i % 2 else 'right'}"] * 2 for i in range(6)]

    @property
    def frame_chunks(self) -> tuple[np.ndarray, ...]:
        clips = np.full((6, 4, 16, 16, 3), 230, np.uint8)
        for i in range(6):
            for f in range(4):
                x = 2 * f if i % 2 == 0 else 8 - 2 * f
                clips[i, f, 4:12, x : x + 8] = (220, 30, 30)
        return (clips,)

    def masks(self, index: Any) -> np.ndarray:
        return (self.frame_chunks[0][list(index)] != 230).any(-1)


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny toybox pipeline."""
    out = tmp_path_factory.mktemp("run")
    tiny_run(out, Squares(6))
    return assemble.assemble(out, tmp_path_factory.mktemp("pipe") / "backbone")


def opened(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)


def task(backbone: Path, work: Path, steps: int = 4, settings: Any = SETTINGS, **how: Any) -> Any:
    pipe = opened(backbone)
    add_words(pipe.tokenizer, pipe.text_encoder)
    data = clip_latents.build(work / "clip-latents", SlidingSquares(), pipe.vae, pipe.tokenizer)  # type: ignore[arg-type]
    return motion_module.MotionTask(settings, data, pipe, steps, how.pop("compute", Compute()), **how)


def train(made: Any, work: Path, steps: int, pause_at: int | None = None) -> None:
    settings = RunSettings(steps, pause_at=pause_at, device="cpu", log_every=2)
    run_task(made, settings, motion_module.motion_folder(work))


@torch.no_grad()
def ask(net: Any, frames: int = 3) -> Tensor:
    noisy = torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    return net(noisy, torch.tensor([300]), torch.full((1, 32), 7))


def test_motion_words_are_single_tokens_and_no_picture_word_changes(tiny_backbone: Path) -> None:
    pipe, known = opened(tiny_backbone), opened(tiny_backbone)
    ids = add_words(pipe.tokenizer, pipe.text_encoder)
    assert len(ids) == len(motion_words()) == len(set(ids)) and "falling" in motion_words()
    assert all(words.is_one_token(pipe.tokenizer, word) for word in motion_words())
    for text in ("a photo of a cat", "sks cat", "downtown", "riser"):
        assert pipe.tokenizer(text)["input_ids"] == known.tokenizer(text)["input_ids"]
    old = known.text_encoder.get_input_embeddings().weight
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[: len(old)], old)
    assert add_words(pipe.tokenizer, pipe.text_encoder) == ids  # adding the words again changes nothing


def test_with_an_untrained_motion_module_each_frame_is_predicted_as_a_picture(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    made = task(tiny_backbone, tmp_path)
    noisy = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    context = made.pipe.text_encoder(torch.full((1, 32), 7)).last_hidden_state
    with torch.no_grad():
        each = [made.pipe.unet(noisy[:, :, i], 300, encoder_hidden_states=context).sample for i in range(3)]
    torch.testing.assert_close(ask(made.net), torch.stack(each, dim=2), atol=1e-5, rtol=1e-4)


def test_only_motion_modules_and_motion_words_are_trained(tiny_backbone: Path, tmp_path: Path) -> None:
    made = task(tiny_backbone, tmp_path)
    before = {name: p.detach().clone() for name, p in made.net.named_parameters()}
    train(made, tmp_path, 4)
    changed = {name for name, p in made.net.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("motion_modules" in name or name == "words" for name in changed)
    assert "words" in changed and any("attn" in name for name in changed)
    said = made.net.place[made.data.tokens[:, 0].astype(np.int64)]
    moved = (made.net.words - before["words"]).abs().amax(1) > 0
    # Exactly the words used in the captions have moved.
    assert set(moved.nonzero()[:, 0].tolist()) == set(said[said >= 0].tolist())


def test_motion_is_learned(tiny_backbone: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, short=0.0, caption_dropout=0.0)
    made = task(tiny_backbone, tmp_path, steps=24, settings=settings)
    probe = [made.draw(1000 + i) for i in range(8)]

    def error() -> float:
        with torch.no_grad():
            return float(torch.stack([made._loss(batch) for batch in probe]).mean())

    before = error()
    train(made, tmp_path, 24)
    assert error() < 0.8 * before


def test_half_precision_changes_losses_and_gradients_only_slightly(tiny_backbone: Path, tmp_path: Path) -> None:
    whole, half = task(tiny_backbone, tmp_path / "a"), task(tiny_backbone, tmp_path / "b", compute=Compute(bf16=True))
    assert whole.trained.keys() == half.trained.keys() and half.half is not None
    assert all(p.dtype == torch.float32 for p in half.trained.values())
    losses = [next(made.updates(0, 0)).loss for made in (whole, half)]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=2e-2)
    for loss in losses:
        loss.backward()
    for name in ("words", *[n for n in whole.trained if "proj_out.weight" in n]):
        a, b = (made.trained[name].grad for made in (whole, half))
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95, name


def test_errors_that_change_over_time_have_more_weight(tiny_backbone: Path, tmp_path: Path) -> None:
    made = task(tiny_backbone, tmp_path)
    batch = replace(made.draw(3), weight=torch.ones(2, 4, 4, 4))

    def loss(error: Tensor) -> float:
        bar = made.bars[batch.t].view(-1, 1, 1, 1, 1)
        made._predict = lambda noisy, b: bar.sqrt() * b.noise - (1 - bar).sqrt() * b.latents + error
        return float(made._loss(batch))

    always = torch.ones(2, 4, 4, 4, 4)
    at_times = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 4, 1, 1).expand_as(always)
    assert loss(always) == pytest.approx(1, rel=1e-4)
    assert loss(at_times) == pytest.approx(made.settings.moving_weight, rel=1e-4)


def test_new_words_are_trained_to_change_the_cross_attention_features(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = opened(backbone_path())
    ids = add_words(pipe.tokenizer, pipe.text_encoder)
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():  # as if the words were new to the text encoder
        table[ids] = table.mean(0) + 0.1 * table.std(0) * torch.randn(
            len(ids), table.shape[1], generator=torch.Generator().manual_seed(0)
        )
    before = table.detach().clone()
    latents = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    said = [f"a photo of a red cat {words} in the snow" for words in ("moving to the left", "moving to the right", "")]
    monkeypatch.setattr(visible_words, "_texts", lambda settings, step: [text for text in said for _ in range(2)])
    log = make_visible(pipe, ids, latents, WordTraining(steps=16, batch=2, lr=3e-2))
    assert log[0]["differ"] < 0.06 and np.mean([row["differ"] for row in log[-8:]]) > 0.2
    assert np.mean([row["seen"] for row in log[-8:]]) < 0.25  # for comparison, "red" instead of "blue" gives 0.47
    after = pipe.text_encoder.get_input_embeddings().weight
    same = torch.ones(len(before), dtype=torch.bool)
    same[ids] = False
    assert torch.equal(after[same], before[same]) and not torch.equal(after[ids], before[ids])


def test_captions_of_opposite_motions_are_often_compared() -> None:
    """These captions share most of their words, so their features would otherwise be the last to become different."""
    meet = {0.0: 0, 1.0: 0}
    for opposite in meet:
        for step in range(20):
            texts = visible_words._texts(WordTraining(batch=6, opposite=opposite), step)
            meet[opposite] += sum(("left" in a and "right" in b) for a, b in zip(texts[:6], texts[6:12], strict=True))
    assert meet[1.0] >= 6 and meet[1.0] >= 3 * meet[0.0]


def test_short_clips_come_first_with_twice_as_many_per_batch(tiny_backbone: Path, tmp_path: Path) -> None:
    made = task(tiny_backbone, tmp_path, steps=4)
    assert made.draw(0).latents.shape[:3] == (4, 4, 2) and made.draw(2).latents.shape[:3] == (2, 4, 4)
    assert torch.equal(made.draw(1).latents, made.draw(1).latents)
    assert not torch.equal(made.draw(0).noise, made.draw(1).noise)


def test_an_interrupted_training_run_equals_an_uninterrupted_one(tiny_backbone: Path, tmp_path: Path) -> None:
    whole, first = task(tiny_backbone, tmp_path / "a"), task(tiny_backbone, tmp_path / "b")
    train(whole, tmp_path / "a", 4)
    train(first, tmp_path / "b", 4, pause_at=2)
    again = task(tiny_backbone, tmp_path / "b")
    train(again, tmp_path / "b", 4)
    for (name, a), b in zip(whole.trained.items(), again.trained.values(), strict=True):
        assert torch.equal(a, b), name


def test_splitting_a_batch_among_workers_does_not_change_its_loss(tiny_backbone: Path, tmp_path: Path) -> None:
    one, two = task(tiny_backbone, tmp_path / "a"), task(tiny_backbone, tmp_path / "b", workers=2)
    losses = [float(next(made.updates(0, 0)).loss) for made in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_shipped_weights_are_the_averaged_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    import shutil

    from diffusers import MotionAdapter, UNetMotionModel

    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, backbone)
    before = opened(backbone)
    made = task(backbone, tmp_path)
    train(made, tmp_path, 4)
    with torch.no_grad():
        made.averages.copy_to(made.trained)
    target = assemble_motion(tmp_path, backbone, tmp_path / "motion_adapter")
    after = opened(backbone)
    adapter: Any = MotionAdapter.from_pretrained(str(target))
    unet: Any = UNetMotionModel.from_unet2d(after.unet, adapter.float())
    ids = torch.tensor([after.tokenizer("a photo of a cat moving left")["input_ids"]])
    noisy = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = after.text_encoder(ids).last_hidden_state
        shown = unet(noisy, 300, encoder_hidden_states=context.repeat_interleave(4, 0)).sample
        expected = made.net(noisy, torch.tensor([300]), ids)
    torch.testing.assert_close(shown, expected, atol=5e-3, rtol=5e-2)  # the motion module is stored in half precision
    plain = torch.tensor([before.tokenizer("a photo of a red cat")["input_ids"]])
    with torch.no_grad():  # captions without motion words are encoded as before
        assert torch.equal(before.text_encoder(plain).last_hidden_state, after.text_encoder(plain).last_hidden_state)


def test_a_set_of_clips_is_rendered_once_and_grows_by_whole_chunks(tmp_path: Path) -> None:
    clips = clip_dataset.build(tmp_path / "clips", 3, seed=0)
    assert len(clips) == 3 and clips.frames([0, 2]).shape == (2, 16, 64, 64, 3)
    assert clips.motions.tolist() == [0, 1, 2] and next(iter(MOTIONS)) == "spin"
    assert clips.masks([1]).any() and clips.paths.shape == (3, 16, 6)
    stamp = next((tmp_path / "clips").glob("*.frames.npy")).stat().st_mtime_ns
    again = clip_dataset.build(tmp_path / "clips", 3, seed=0)
    assert next((tmp_path / "clips").glob("*.frames.npy")).stat().st_mtime_ns == stamp
    assert again.captions == clips.captions
    with pytest.raises(ValueError, match="sets grow by whole chunks of 100"):
        clip_dataset.build(tmp_path / "clips", 4, seed=0)
    with pytest.raises(ValueError, match="contains a different data set"):
        clip_dataset.build(tmp_path / "clips", 3, seed=1)
    with pytest.raises(ValueError, match="contains no toybox clips"):
        clip_dataset.load(tmp_path)
