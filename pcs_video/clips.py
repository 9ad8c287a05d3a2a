"""Generates clips from prompts and writes them as mp4, GIF, WebP or frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pcs_video.backbones.picture_clips import PictureClipsBackbone
from pcs_video.runner import VideoRunner
from shared.config import unknown
from shared.io.clips.write_clip import SHEET_COLUMNS, spread, write_clip, write_clip_sheet
from shared.io.contact_sheets import check_sheet
from shared.io.denoising_progress import Steps
from shared.io.locks import holding
from shared.io.outputs import atomic_folder, check_file, check_output
from shared.runner.png_metadata import metadata
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings

ENDINGS = {"mp4": ".mp4", "gif": ".gif", "webp": ".webp", "frames": ""}


@dataclass(frozen=True)
class ClipFiles:
    """The destination of clips, which is a single file or a folder."""

    path: Path
    fps: float = 8.0
    kind: str = "mp4"  # format of the files in a folder, a key of `ENDINGS`
    with_sheet: bool = False  # whether to also write a contact sheet with a row of frames for each clip
    overwrite: bool = False

    @property
    def one_file(self) -> bool:
        return self.path.suffix != ""

    def check(self, clips: int, read: Sequence[Path] = ()) -> None:
        """Raises ValueError if this many clips cannot be written to the destination, or if an existing output or one of
        the input files `read` would be overwritten."""
        if self.kind not in ENDINGS:
            raise ValueError(f"--format: {unknown(self.kind, ENDINGS, 'format')}")
        if self.one_file and self.path.suffix.lower() not in ENDINGS.values():
            raise ValueError(
                f"cannot write a clip to {self.path}; use a file ending in .mp4, .gif or .webp, or a folder for several "
                "clips or for frames"
            )
        if self.one_file and clips > 1:
            raise ValueError(
                f"{self.path} is one file, but there will be {clips} clips; give a folder, such as --out clips/"
            )
        if self.one_file:
            for file in (self.path, *([self.sheet()] if self.with_sheet else [])):
                check_file(file, self.overwrite, read)
        else:
            check_output(self.path, self.overwrite, read)

    def sheet(self) -> Path:
        """Returns the path of the contact sheet."""
        return self.path.with_name(f"{self.path.stem}-sheet.png") if self.one_file else self.path / "sheet.png"


@holding()
def generate(
    runner: VideoRunner,
    prompts: Sequence[str],
    out: ClipFiles,
    settings: SamplingSettings = SamplingSettings(),
    *,
    seeds: Sequence[int] = (0,),
    progress: Steps | None = None,
) -> list[Path]:
    """Writes one clip for each prompt and seed. The metadata of each file records how its clip was generated. Returns
    the paths. Clips are written once they are done, so memory use does not grow with their number."""
    shots = [(p, s) for p in prompts for s in seeds]
    out.check(len(shots))
    settings = runner.with_own_sampling(settings)
    if isinstance(runner.backbone, PictureClipsBackbone):
        for prompt in (p for p in dict.fromkeys(prompts) if not runner.follows(p, settings)):
            warnings.warn(
                f"nothing will move in the clips of {prompt!r}, because it names no trajectory and there is no motion "
                "module",
                stacklevel=2,
            )
    if out.with_sheet:
        frames, *size = output_size(runner.backbone, settings)
        check_sheet("--sheet", len(shots) * min(frames, SHEET_COLUMNS), size)
    about = [{**metadata(p, s, runner, settings), "fps": f"{out.fps:g}"} for p, s in shots]
    made = runner.generate_each([p for p, _ in shots], [s for _, s in shots], settings, progress=progress)
    with closing(made):
        if not out.one_file:
            return _write_all(out, shots, made, about)
        ((_, clips),) = made
    paths = [write_clip(out.path, clips[0], out.fps, about[0])]
    rows = {_label(*shots[0]): clips[0]}
    return [*paths, write_clip_sheet(out.sheet(), rows, metadata=about[0])] if out.with_sheet else paths


def _write_all(
    out: ClipFiles,
    shots: Sequence[tuple[str, int]],
    made: Iterable[tuple[Sequence[int], Tensor]],
    about: Sequence[dict[str, str]],
) -> list[Path]:
    names = [f"{index:03d}-seed{seed}{ENDINGS[out.kind]}" for index, (_, seed) in enumerate(shots)]
    shown: dict[int, Tensor] = {}
    with atomic_folder(out.path, overwrite=out.overwrite) as folder:
        for rows, clips in made:
            for row, clip in zip(rows, clips, strict=True):
                write_clip(folder / names[row], clip, out.fps, about[row])
                if out.with_sheet:
                    shown[row] = spread(clip, SHEET_COLUMNS).movedim(0, 1)
        if out.with_sheet:
            labelled = {f"{row:03d} {_label(*shots[row])}": shown[row] for row in sorted(shown)}
            write_clip_sheet(folder / "sheet.png", labelled, metadata=about[0])
            names.append("sheet.png")
    return [out.path / name for name in names]


def _label(prompt: str, seed: int) -> str:
    return f"{prompt} (seed {seed})"
