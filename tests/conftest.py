"""Fixtures that build tiny pipelines from the real diffusers classes with random weights. Nothing is downloaded.

Each session-scoped fixture `make_tiny_*` is a factory that returns a new pipeline on every call. The same seed gives the same
weights. Each fixture `tiny_*` provides a new pipeline for every test. Pictures are 32×32 pixels, and their latents
have the shape 4×8×8.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# The libraries create half a million objects. With Python's default thresholds, garbage collection traverses them so
# often that it takes a tenth of the tests' time.
gc.set_threshold(20_000, 20, 20)

#: Words that are one token each in the tiny tokenizers. All other text is split into smaller pieces.
WORDS = (
    *("a", "an", "the", "of", "in", "on", "at", "with", "and", "photo", "picture", "painting", "mug", "dog", "cat"),
    *("toy", "person", "style", "red", "green", "blue", "yellow", "beach", "forest", "snow", "street", "sks", "ohwx"),
    *("zwx", "front", "side", "back", "above", "bad", "blurry", "teapot"),
)


@dataclass
class Ran:
    """The exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def pcs(capsys) -> Callable[..., Ran]:
    """Returns a function that runs a command, as in `pcs("image", "generate", …)`.

    An exception that the command does not handle fails the test, because a user would see a traceback.
    """

    def call(*arguments: Any) -> Ran:
        from shared.cli import build, run

        capsys.readouterr()
        code = run(build(), [str(a) for a in arguments])
        done = capsys.readouterr()
        return Ran(code, done.out, done.err)

    return call


def build_clip_tokenizer() -> Any:
    """Builds a real CLIPTokenizer with a vocabulary of a few hundred symbols and 32 tokens per prompt."""
    from shared.toybox.tokenizer import build

    return build(WORDS)


def build_t5_tokenizer(max_length: int = 48) -> Any:
    """Builds a real (Unigram) T5 tokenizer with the same words."""
    from transformers import T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>-_0123456789,.'!?{}"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(c, -9.0) for c in letters] + [("▁" + w, -1.0) for w in WORDS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=max_length)


def build_clip(tokenizer: Any, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def build_vae(**changes: Any) -> Any:
    """Builds an AutoencoderKL that shrinks each side by a factor of 4, from 32×32×3 to 8×8×4."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.7,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def build_sd(seed: int = 0, *, prediction_type: str = "epsilon", linear: bool = False) -> Any:
    """Builds a new StableDiffusionPipeline with random weights.

    If `linear`, the U-Net has linear projections and more attention heads, as in SD 2.x.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = build_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=(2, 4, 4) if linear else 2,
            use_linear_projection=linear,
            norm_num_groups=4,
        ).eval()
        text_encoder, vae = build_clip(tokenizer), build_vae()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_sd_v(seed: int = 0) -> Any:
    """Builds a pipeline like that of SD 2.x, with v-prediction and linear projections."""
    return build_sd(seed, prediction_type="v_prediction", linear=True)


def build_flux(seed: int = 0, *, guidance_embeds: bool = True, dynamic: bool = True) -> Any:
    """Builds a new FluxPipeline with random weights, two double blocks and two single blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = build_clip_tokenizer(), build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        text_encoder = build_clip(tokenizer)
        config = T5Config(vocab_size=len(tokenizer_2), d_model=24, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
        text_encoder_2 = T5EncoderModel(config).eval()
        vae = build_vae(scaling_factor=1.3, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Makes Ctrl-C work as it does in a terminal, even if the tests run in a background job, where it is ignored by default."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tests, and the commands that they run in separate processes, away from the user's own caches."""
    os.environ["PCS_CACHE"] = str(tmp_path_factory.getbasetemp() / "pcs-cache")


@pytest.fixture
def few_true_pictures(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures a subject's true figures on 16 true pictures per set instead of 120, and a motion's on two true clips instead
    of 16, which would take most of a small evaluation's time. The figures of pictures have their own cache."""
    from shared.metrics import measure_true
    from shared.metrics.clips import paths

    monkeypatch.setenv("PCS_CACHE", str(tmp_path_factory.getbasetemp() / "pcs-cache-few"))
    monkeypatch.setattr(measure_true, "BEHIND", 16)
    monkeypatch.setattr(measure_true, "PER_PROMPT", 4)
    monkeypatch.setattr(paths, "TRUE_CLIPS", 2)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a tiny DINOv2 model as a transformers folder."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tiny_sd() -> Callable[..., Any]:
    return build_sd


@pytest.fixture(scope="session")
def make_tiny_sd_v() -> Callable[..., Any]:
    return build_sd_v


@pytest.fixture(scope="session")
def make_tiny_flux() -> Callable[..., Any]:
    return build_flux


@pytest.fixture
def tiny_sd(make_tiny_sd: Callable[..., Any]) -> Any:
    return make_tiny_sd()


@pytest.fixture
def tiny_sd_v(make_tiny_sd_v: Callable[..., Any]) -> Any:
    return make_tiny_sd_v()


@pytest.fixture
def tiny_flux(make_tiny_flux: Callable[..., Any]) -> Any:
    return make_tiny_flux()
