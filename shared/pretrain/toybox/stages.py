"""Every stage of making the toybox's weights, in order, each resumable: `pcs toybox train`. Light to import: the command line
does it for its help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

#: Steps of a whole run, where no minutes are given. A stage that has done them is complete and returns at once.
VAE_STEPS, DECODER_STEPS, UNET_STEPS = 12_000, 10_000, 16_000
#: Groups of things for the identity encoder. With 1,500 it knew its own by heart: after the autoencoder it told 98 % of
#: them, 75 % of others.
IDENTITY_GROUPS = 4_500
#: Pictures that go through the autoencoder for the evaluators, as many as there are at most.
RECONSTRUCTED = {"recognizer": 48_000, "identity": 144_000}


@dataclass(frozen=True)
class Work:
    """One run: where its files lie and what it may spend."""

    folder: Path
    pictures: int
    minutes: float | None
    device: str
    threads: int
    seed: int
    fresh: bool = False

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"


def run(stages: Sequence[str], work: Work) -> None:
    """Do the stages, in order. Each prints what it made and goes on from where an earlier call stopped."""
    for stage in STAGES:
        if stage in stages:
            print(f"{stage}: {_STAGES[stage](work)}", flush=True)


def _data(work: Work) -> str:
    from shared.pretrain.evaluators.data import build_identity
    from shared.pretrain.toybox import dataset

    dataset.build(work.data, work.pictures, work.seed, work.threads)
    build_identity(work.folder / "identity", groups=IDENTITY_GROUPS, seed=work.seed)
    return f"{work.pictures} pictures in {work.data}"


def _vae(work: Work) -> str:
    from shared.pretrain.toybox.initial_weights import adopt_vae
    from shared.pretrain.toybox.vae import train_vae

    if not work.fresh and adopt_vae(work.run):
        print("vae: goes on from the shipped weights", flush=True)
    steps = VAE_STEPS if work.minutes is None else None
    return str(
        train_vae(work.data, work.run, steps=steps, minutes=work.minutes, threads=work.threads, device=work.device)
    )


def _decoder(work: Work) -> str:
    from shared.pretrain.toybox.decoder import train_decoder
    from shared.pretrain.toybox.initial_weights import adopt

    if not work.fresh and adopt(work.run):
        print("decoder: goes on from the shipped weights", flush=True)
    steps = DECODER_STEPS if work.minutes is None else None
    return str(
        train_decoder(work.data, work.run, steps=steps, minutes=work.minutes, threads=work.threads, device=work.device)
    )


def _unet(work: Work) -> str:
    from shared.pretrain.toybox.initial_weights import adopt
    from shared.pretrain.toybox.unet import train_unet

    if not work.fresh and adopt(work.run):
        print("unet: goes on from the shipped weights", flush=True)

    steps = UNET_STEPS if work.minutes is None else None
    decay = 0.2 if work.minutes is None else 0.0
    made = train_unet(
        work.data, work.run, steps=steps, minutes=work.minutes, decay=decay, threads=work.threads, device=work.device
    )
    return str(made)


def _evaluator(name: str) -> Callable[[Work], str]:
    def train(work: Work) -> str:
        from shared.pretrain.evaluators.data import reconstruct
        from shared.pretrain.evaluators.train import TRAININGS
        from shared.toybox.evaluators.convnet import WEIGHTS

        source = work.folder / "identity" if name == "identity" else work.data
        through = source / "reconstructions.npy"
        if not through.is_file() and (work.run / "vae" / "config.json").is_file():
            reconstruct(source, work.run / "vae", through, RECONSTRUCTED.get(name, RECONSTRUCTED["recognizer"]))
        fit, settings = TRAININGS[name]
        settings = replace(settings, seed=work.seed, threads=work.threads, device=work.device, minutes=work.minutes)
        target = WEIGHTS / name
        place = work.folder / "evaluators" / name
        fit(source, target, place, settings, not work.fresh, through if through.is_file() else None)
        return str(target)

    return train


def _assemble(work: Work) -> str:
    from shared.pretrain.toybox.assemble import assemble

    return str(assemble(work.run))


_STAGES: dict[str, Callable[[Work], str]] = {
    "data": _data,
    "vae": _vae,
    "decoder": _decoder,
    "unet": _unet,
    "recognizer": _evaluator("recognizer"),
    "identity": _evaluator("identity"),
    "clip": _evaluator("clip"),
    "assemble": _assemble,
}
#: Their names, in order.
STAGES = tuple(_STAGES)
