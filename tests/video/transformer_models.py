"""Tiny random Wan and LTX pipelines, built from the real diffusers classes.

Pictures of 32 x 32 pixels have latents of shape [4, 4, 4].
"""

from __future__ import annotations

from typing import Any

import torch

from tests.conftest import build_t5_tokenizer


def build_wan(seed: int = 0, *, experts: int = 1, time_per_token: bool = False) -> Any:
    """Builds a two-block `WanPipeline` for clips of 4n + 1 frames. With two experts, the boundary is at t = 700."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = [
            WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            ).eval()
            for _ in range(experts)
        ]
        config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
        text_encoder = UMT5EncoderModel(config).eval()
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, 0.0],
            latents_std=[0.5, 1.5, 0.8, 1.2],
        ).eval()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=networks[0],
        transformer_2=networks[1] if experts > 1 else None,
        boundary_ratio=0.7 if experts > 1 else None,
        expand_timesteps=time_per_token,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_ltx(seed: int = 0, *, timed_decoder: bool = False) -> Any:
    """Builds a two-block `LTXPipeline` for clips of 8n + 1 frames. LTX 0.9.1 and later have a `timed_decoder`."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    tokenizer = build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=16,
        ).eval()
        config = T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
        text_encoder = T5EncoderModel(config).eval()
        vae: Any = AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            decoder_inject_noise=(timed_decoder,) * 5,
            timestep_conditioning=timed_decoder,
            patch_size=1,
            scaling_factor=0.9,
        ).eval()
        vae.latents_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        vae.latents_std.copy_(torch.tensor([0.5, 1.5, 0.8, 1.2]))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=8, max_image_seq_len=64
    )
    pipe = LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
