"""Performs six golden runs on tiny models and hashes everything that they learn and generate.

    make golden                       runs this script
    python tests/golden.py            compares the new hashes with the stored ones, or stores them if there are none yet
    python tests/golden.py --keep     stores the new hashes; use it after a change that is meant to alter them

A commit that only moves code must not change any hash. The hashes depend on the processor and on the torch
version, so each checkout stores its own in `.golden.json`, which git ignores.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
KEPT = Path(__file__).resolve().parents[1] / ".golden.json"


def _tiny() -> Any:
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _photos(folder: Path) -> Path:
    """Writes three pictures with masks, and a caption for the first, to a folder. Returns the folder."""
    import numpy as np
    from PIL import Image

    (folder / "masks").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[4 + i : 20 + i, 6:24] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    (folder / "0.txt").write_text("a photo of a mug on the beach")
    return folder


def _pcs(*arguments: object) -> None:
    from shared.cli import build, run

    code = run(build(), [str(a) for a in arguments])
    assert code == 0, f"pcs {' '.join(map(str, arguments))} exited with {code}"


def _hash(folder: Path) -> str:
    """Returns the SHA-256 hash of the tensors and pixels in all files in a folder, ordered by relative path."""
    import numpy as np
    from PIL import Image
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix().encode()
        if path.suffix == ".safetensors":
            for key, tensor in sorted(load_file(path).items()):
                digest.update(place + key.encode() + tensor.tobytes())
        elif path.suffix == ".png":
            digest.update(place + np.asarray(Image.open(path)).tobytes())
    return digest.hexdigest()


def runs(work: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the hash of each golden run."""
    tiny, photos = _tiny(), _photos(work / "photos")
    tiny.build_sd().save_pretrained(work / "sd")
    tiny.build_flux().save_pretrained(work / "flux")
    common = [f"subject.images={photos}", "subject.class_noun=mug", "sampling.steps=2", "train.resolution=32"]
    sd, flux = f"backbone={work / 'sd'}", f"backbone={work / 'flux'}"
    few = ["sources.class_pictures.num_images=3", "sources.class_pictures.steps=2", "train.batch_size=2"]
    check = ["train.validation.every=2", "train.validation.num=1"]

    def learn(name: str, recipe: str, *settings: str) -> Path:
        out = work / name / f"{name}.concept"
        _pcs("image", "personalize", recipe, *common, *settings, f"output={out}")
        return out

    lora = learn("lora", "dreambooth_lora", sd, *few, *check, "train.steps=4", "trainable.lora.dropout=0.1")
    yield "dreambooth_lora", _hash(lora.parent)
    token = learn("token", "textual_inversion", sd, "train.steps=4", "train.gradient_accumulation=2")
    yield "textual_inversion", _hash(token.parent)
    phases = ["phases.pivot.train.steps=2", "phases.tune.train.steps=3", "train.gradient_checkpointing=true"]
    resize = ["augment.random_resize.p=0.5", "noise.offset=0.1", "objective.min_snr_gamma=5"]
    pivotal = learn("pivotal", "pivotal_tuning", sd, *phases, *resize)
    yield "pivotal_tuning", _hash(pivotal.parent)
    yield "flux", _hash(learn("flux-lora", "dreambooth_lora", flux, *few, "train.steps=2").parent)
    out = work / "pictures"
    both = ["--concept", f"{lora}:0.7", "--concept", token, "--strength", "lora=0@0,1@0.5", "--negative", "bad"]
    prompt = "a photo of a <lora> and a <token> on the beach"
    _pcs("image", "generate", prompt, *both, "--num", 3, "--steps", 3, "--scheduler", "dpm++", "--out", out)
    yield "generate", _hash(out)
    _pcs("concept", "export", pivotal, "--out", work / "export", "--strength", 0.8)
    yield "export", _hash(work / "export")


def main() -> int:
    """Returns 0 if the hashes equal the stored ones or were just stored, and 1 otherwise."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PCS_CACHE"] = str(Path(folder, "cache"))
        hashes = dict(runs(Path(folder)))
    if "--keep" in sys.argv or not KEPT.is_file():
        KEPT.write_text(json.dumps(hashes, indent=1) + "\n")
        print(f"stored {len(hashes)} hashes in {KEPT.name}")
        return 0
    kept = json.loads(KEPT.read_text())
    for name, value in hashes.items():
        print(f"{name:20} {'as before' if kept.get(name) == value else 'CHANGED'}")
    return int(kept != hashes)


if __name__ == "__main__":
    sys.exit(main())
