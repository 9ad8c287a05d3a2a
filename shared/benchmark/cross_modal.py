"""Evaluates one concept in every installed modality (pictures, clips, assets) with the same instruments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shared.benchmark.cross_modal_report import CrossModalReport, ModalityRow, ShotRow, report_of, save_cross_modal
from shared.benchmark.cross_modal_scores import scores_of
from shared.benchmark.modality import Asked, Modality
from shared.concept.provenance import portable_text
from shared.config import unknown
from shared.io.failures import of_the_disk
from shared.io.outputs import atomic_folder, check_output
from shared.metrics.instruments import load_instruments
from shared.runner.bars import Bars
from shared.runner.judging import check_folders
from shared.runner.open_runner import read_by

GROUP = "pcs.cross_modal"
ORDER = ("image", "video", "3d")
KINDS = ("subject", "identity")  # kinds of concepts that have an appearance in every modality


def modalities(names: Sequence[str] = ()) -> Mapping[str, Modality]:
    """Returns the modalities of the installed packages in order, or only those in `names`. Raises ValueError for an
    unknown name."""
    from importlib.metadata import entry_points

    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name in names:
        if name not in found:
            raise ValueError(f"--in: {unknown(name, [n for n in ORDER if n in found], 'modality')}")
    chosen = [n for n in ORDER if n in found and (not names or n in names)]
    if not chosen:
        raise ValueError("--in: no installed package can evaluate a concept")
    return {name: found[name].load() for name in chosen}


def evaluate_across(asked: Asked, names: Sequence[str], overwrite: bool, bars: Bars) -> CrossModalReport:
    """Evaluates the concept in the modalities `names` (default: all), and writes the report to `asked.out`.

    If a modality fails, the report states the error and the other modalities still run.

    Raises:
        ValueError: before anything is generated, if a modality is unknown or cannot show the concept; if the concept is not
            a subject or an identity; if reference pictures or instruments are missing; or if `out` exists and `overwrite`
            is not set
    """
    chosen = modalities(names)
    folders = [p for p in (asked.judged.references, asked.judged.gallery, asked.judged.clip, asked.judged.dino) if p]
    motion = [asked.motion] if asked.motion else []
    check_output(
        asked.out, overwrite, [*read_by([asked.concept, *motion], asked.backbone, asked.motion_adapter), *folders]
    )
    check_folders(asked.judged.clip, asked.judged.dino)
    _check_thing(asked)
    tools = load_instruments(
        asked.judged.clip, asked.judged.dino, asked.world and asked.world.instruments, asked.device or "cpu"
    )
    for name, modality in chosen.items():
        try:
            modality.check(asked)
        except ValueError as error:
            raise ValueError(f"--in {name}: {error}") from error
    rows: list[ModalityRow] = []
    shots: list[ShotRow] = []
    with atomic_folder(asked.out, overwrite) as folder:
        inside = replace(asked, out=folder)
        for name, modality in chosen.items():
            try:
                row, of_it = scores_of(name, modality.make(inside, bars), tools, folder)
            except Exception as error:
                if of_the_disk(error):
                    raise
                row, of_it = ModalityRow(name=name, failed=portable_text(f"{type(error).__name__}: {error}")), []
            rows.append(row)
            shots += of_it
        return save_cross_modal(report_of(asked.read, rows, shots, tools), asked.subject, folder)


def failures_told(report: CrossModalReport) -> None:
    """Raises a ValueError that lists the failed modalities, if there are any."""
    if report.failures:
        raise ValueError("\n".join(f"{name} failed: {error}" for name, error in report.failures.items()))


def _check_thing(asked: Asked) -> None:
    meta = asked.read.meta
    if meta.kind not in KINDS:
        raise ValueError(
            f"{meta.name!r} is a {meta.kind}: only a {' or '.join(KINDS)} can be shown in every modality; for styles and "
            "motions, use `pcs image evaluate` and `pcs video evaluate`"
        )
    assert asked.subject and asked.standard
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise ValueError(f"seeds: pass at least one, without repeats; got {list(asked.seeds)}")
