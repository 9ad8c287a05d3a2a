"""Trains the toybox's weights in resumable stages (`pcs toybox train`). Importing this module must be fast, because the
command line needs it to show its help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from shared.pretrain.run_task import RunSettings
    from shared.pretrain.toybox.denoising_loss import UnetTraining
    from shared.pretrain.toybox.motion_module import MotionTraining

_FOLDERS = ("data", "run", "identity", "evaluators", "clips", "clip-latents", "training")  # written by the stages
T = TypeVar("T", "UnetTraining", "MotionTraining")

#: The number of steps of each stage if no time limit is set. A stage that has done all its steps returns immediately.
VAE_STEPS, DECODER_STEPS, UNET_STEPS, MOTION_STEPS = 12_000, 10_000, 16_000, 12_000
#: The learning rate falls over this final fraction of the steps when `Work.more` is set.
FALL = 0.75
#: The number of groups of things on which the identity encoder is trained. An encoder trained on 1,500 groups memorised
#: them. In pictures decoded by the autoencoder, it recognized 98% of the things from these groups, but only 75% of
#: other things.
IDENTITY_GROUPS = 4_500
#: The minimum number of pictures per group. With a small data set, it limits the number of groups.
PICTURES_PER_GROUP = 24
#: The maximum number of pictures that the autoencoder reconstructs for each evaluator.
RECONSTRUCTED = {"recognizer": 48_000, "identity": 144_000}


@dataclass(frozen=True)
class Pace:
    """The training pace of the denoising networks. Settings that are None take their default values, which suit a CPU.

    batch: pictures or clips per step; the moving average's decay is raised to the power sqrt(batch / default batch)
    lr: the peak learning rate
    steps: the number of steps for which the motion module is trained
    compiled: whether the networks' blocks are compiled (`RunSettings.compiled`)
    """

    batch: int | None = None
    lr: float | None = None
    steps: int | None = None
    compiled: bool = False

    def of(self, usual: T) -> T:
        """Returns the `usual` settings, adapted to this pace."""
        lr = usual.lr if self.lr is None else self.lr
        if self.batch is None:
            return replace(usual, lr=lr)
        return replace(usual, lr=lr, batch=self.batch, ema=usual.ema ** (self.batch / usual.batch) ** 0.5)


@dataclass(frozen=True)
class Work:
    """The folder, budget and options of one run.

    more: the number of pictures on which the U-Net is trained, in addition to those that its initial weights have
        already seen. The learning rate falls to 0 over the final fraction `FALL` of these pictures.
    """

    folder: Path
    pictures: int
    minutes: float | None
    device: str
    threads: int
    seed: int
    fresh: bool = False
    clips: int = 6_000
    more: int | None = None
    pace: Pace = Pace()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def settings(self, steps: int) -> RunSettings:
        """Returns the settings of a training run, which takes `steps` steps unless a time limit is set."""
        from shared.pretrain.run_task import RunSettings

        own = steps if self.minutes is None else None
        return RunSettings(
            steps=own, minutes=self.minutes, threads=self.threads, device=self.device, compiled=self.pace.compiled
        )


def run(stages: Sequence[str], work: Work) -> None:
    """Runs the stages in order and prints the result of each. Each stage resumes where an earlier call stopped.

    Raises ValueError if the folder cannot be written to, if it contains files but none from an earlier call, or if another
    process is writing to the folder or to weights that these stages write.
    """
    from shared.io.locks import hold
    from shared.io.outputs import check_resumable
    from shared.toybox.weights import WEIGHTS

    check_resumable(work.folder, "training", lambda folder: any((folder / name).is_dir() for name in _FOLDERS))
    for stage in stages:
        for name in _SHIPPED.get(stage, ()):
            hold(WEIGHTS / name)
    for stage in STAGES:
        if stage in stages:
            print(f"{stage}: {_STAGES[stage](work)}", flush=True)


def _data(work: Work) -> str:
    from shared.pretrain.evaluators.data import build_identity
    from shared.pretrain.toybox import dataset

    dataset.build(work.data, work.pictures, work.seed, work.threads)
    groups = min(IDENTITY_GROUPS, max(1, work.pictures // PICTURES_PER_GROUP))
    build_identity(work.folder / "identity", groups=groups, seed=work.seed)
    return f"{work.pictures} pictures in {work.data}"


def _vae(work: Work) -> str:
    from shared.pretrain.toybox.initial_weights import adopt_vae
    from shared.pretrain.toybox.vae import VaeTraining, train_vae

    if not work.fresh and adopt_vae(work.run):
        return "kept the shipped one, on whose latents the other networks were trained (--fresh trains a new one)"
    return str(train_vae(work.data, work.run, work.settings(VAE_STEPS), VaeTraining(seed=work.seed)))


def _decoder(work: Work) -> str:
    from shared.pretrain.toybox.decoder import DecoderTraining, train_decoder

    _adopt_backbone("decoder", work)
    return str(train_decoder(work.data, work.run, work.settings(DECODER_STEPS), DecoderTraining(seed=work.seed)))


def _unet(work: Work) -> str:
    from shared.pretrain.toybox.unet import train_unet

    _adopt_backbone("unet", work)
    spend, settings = unet_training(work)
    return str(train_unet(work.data, work.run, spend, settings))


def unet_training(work: Work) -> tuple[RunSettings, UnetTraining]:
    """Returns the budget and the settings of the U-Net's training."""
    from shared.pretrain.toybox.denoising_loss import UnetTraining
    from shared.pretrain.toybox.initial_weights import adopted_steps

    settings, spend, decay = work.pace.of(UnetTraining(seed=work.seed)), work.settings(UNET_STEPS), 0.2
    if work.more is not None:
        first = 0 if work.fresh else adopted_steps()
        steps = first + max(1, work.more // settings.batch)
        spend = replace(spend, steps=steps)  # the time limit only pauses the run
        decay = FALL * (steps - first) / max(1, steps - settings.optimizer.warmup)
    if spend.steps is not None:  # without a number of steps, the rate stays constant, because the run may be resumed
        falling = settings.optimizer.model_copy(update={"schedule": "linear", "decay": min(1.0, decay)})
        settings = replace(settings, optimizer=falling)
    return spend, settings


def _adopt_backbone(stage: str, work: Work) -> None:
    from shared.pretrain.toybox.initial_weights import adopt_backbone

    if not work.fresh and adopt_backbone(work.run):
        print(f"{stage}: starts from the shipped weights", flush=True)


def _evaluator(name: str) -> Callable[[Work], str]:
    def train(work: Work) -> str:
        from shared.pretrain.evaluators.reconstructions import reconstruct
        from shared.pretrain.evaluators.train import TRAININGS, Folders, train_evaluator
        from shared.toybox.evaluators.convnet import WEIGHTS

        source = work.folder / "identity" if name == "identity" else work.data
        through = source / "reconstructions.npy"
        if not through.is_file() and (work.run / "vae" / "config.json").is_file():
            reconstruct(source, work.run / "vae", through, RECONSTRUCTED.get(name, RECONSTRUCTED["recognizer"]))
        folders = Folders(
            data=source,
            out=WEIGHTS / name,
            work=work.folder / "evaluators" / name,
            reconstructions=through if through.is_file() else None,
        )
        steps, settings = TRAININGS[name].steps, replace(TRAININGS[name].settings, seed=work.seed)
        spend = replace(work.settings(steps), steps=steps, resume=not work.fresh)  # the time limit only pauses the run
        train_evaluator(name, folders, spend, settings)
        return str(folders.out)

    return train


def _assemble(work: Work) -> str:
    from shared.pretrain.toybox.assemble import assemble

    return str(assemble(work.run))


def _clips(work: Work) -> str:
    from shared.pretrain.toybox import clip_dataset

    clip_dataset.build(work.folder / "clips", work.clips, work.seed, work.threads)
    return f"{work.clips} clips in {work.folder / 'clips'}"


def _motion(work: Work) -> str:
    from shared.pretrain.toybox.motion_module import MotionTraining, train_motion
    from shared.toybox.weights import backbone_path

    spend = replace(work.settings(MOTION_STEPS), steps=work.pace.steps or MOTION_STEPS)  # minutes only pause the run
    return str(train_motion(work.folder, backbone_path(), spend, work.pace.of(MotionTraining(seed=work.seed))))


def _assemble_motion(work: Work) -> str:
    from shared.pretrain.toybox.assemble_motion import assemble_motion

    return str(assemble_motion(work.folder))


_STAGES: dict[str, Callable[[Work], str]] = {
    "data": _data,
    "vae": _vae,
    "decoder": _decoder,
    "unet": _unet,
    "recognizer": _evaluator("recognizer"),
    "identity": _evaluator("identity"),
    "clip": _evaluator("clip"),
    "pose": _evaluator("pose"),
    "assemble": _assemble,
    "clips": _clips,
    "motion": _motion,
    "assemble-motion": _assemble_motion,
}
#: The folders of the shipped weights that each stage writes.
_SHIPPED = {
    **{name: (name,) for name in ("recognizer", "identity", "clip", "pose")},
    "assemble": ("backbone",),
    "assemble-motion": ("motion_adapter", "backbone"),
}
#: The names of the stages, in the order in which they run.
STAGES = tuple(_STAGES)
