"""`pcs image generate` writes the same pixels as diffusers' own pipeline does with the exported concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SEED = 11


def theirs(folder: Path, exported: Path, prompt: str, **how: Any) -> np.ndarray:
    """Returns the picture that diffusers generates with the model and the exported files, as uint8 `[H, W, 3]`."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if how.pop("dpm", False):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    if (exported / "pytorch_lora_weights.safetensors").is_file():
        pipe.load_lora_weights(exported, weight_name="pytorch_lora_weights.safetensors")
    if (exported / "learned_embeds.safetensors").is_file():
        pipe.load_textual_inversion(str(exported / "learned_embeds.safetensors"))
    generator = torch.Generator().manual_seed(SEED)
    made = pipe(prompt, num_inference_steps=4, generator=generator, height=32, width=32, **how).images[0]
    return np.asarray(made)


@pytest.mark.parametrize(
    ("name", "ours_say", "they_say", "options", "how"),
    [
        ("mug", "a photo of a <mug> on the beach", "a photo of a <mug> mug on the beach", (), {}),
        (
            *("rex", "a photo of a <rex> in the snow", "a photo of a sks dog in the snow"),
            ("--negative", "blurry", "--guidance", "4", "--scheduler", "dpm++"),
            {"negative_prompt": "blurry", "guidance_scale": 4.0, "dpm": True},
        ),
    ],
)
def test_the_command_line_produces_the_same_pixels_as_diffusers(
    pcs, concepts, tiny_folder, tmp_path, name, ours_say, they_say, options, how
):
    exported = tmp_path / "exported"
    assert pcs("concept", "export", concepts[name], "--format", "diffusers", "--out", exported).code == 0

    def ours(prompt: str, *concept: Any) -> np.ndarray:
        out = tmp_path / f"out-{len(concept)}"
        ran = pcs(
            *("image", "generate", prompt, *concept, "--backbone", tiny_folder, "--seed", SEED, "--steps", 4),
            *("--height", 32, "--width", 32, "--out", out, *options),
        )
        assert ran.code == 0, ran.err
        return np.asarray(Image.open(out / f"000-seed{SEED}.png"))

    painted = ours(ours_say, "--concept", concepts[name]).astype(int)
    expected = theirs(tiny_folder, exported, they_say, **how).astype(int)
    assert painted.shape == (32, 32, 3)
    assert abs(painted - expected).max() <= 1 and (painted != expected).mean() < 0.01, (
        "the pixels are equal apart from rounding"
    )
    plain = ours(they_say.replace("<mug> mug", "mug").replace("sks dog", "dog")).astype(int)
    assert (plain != expected).mean() > 0.3, "the concept has an effect"
