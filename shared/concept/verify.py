"""Verifies an export by loading its files with diffusers and comparing the outputs numerically."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.backbones.protocol import Backbone
from shared.concept.diffusers_format import ANYTHING, reads_token_files, token_names
from shared.io.safetensors_files import safe_load_safetensors
from shared.trainable.wrapped_layers import is_wrapped

_SEED, _SIDE = 0, 256  # seed of the noise; maximum side length of pictures, in pixels
#: The largest difference, relative to the largest value, that may result from rounding when sums are reordered.
_ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-10, torch.float16: 5e-3, torch.bfloat16: 3e-2}
#: The largest allowed difference as a fraction of the concept's effect. Both are measured as root mean squares. The
#: fraction is 1 for an export that has no effect.
_SHARE = {torch.float32: 0.02, torch.float64: 0.001, torch.float16: 0.3, torch.bfloat16: 0.3}


@torch.no_grad()
def compare(
    backbone: Backbone, name: str, strength: float, folder: Path, written: Mapping[str, Any], words: str
) -> dict[str, Any]:
    """Compares the backbone's outputs for its concept `name` with those of a diffusers pipeline that loads `folder`.

    Args:
        written: the results of `write_lora` ("lora") and `write_tokens` ("tokens")
        words: the concept's words in a diffusers prompt

    Returns:
        A mapping with "prompt" (the prompt for diffusers) and "checks" (the result of `check` for each output).
    """
    placeholder = backbone.placeholders.get(name)
    phrase = placeholder.words if placeholder is not None else ""
    prompt, public = (f"a photo of a {said or ANYTHING}" for said in (phrase, words))
    adapted = set((written.get("lora") or {}).get("components", ()))
    with backbone.active({name: strength}):
        text = backbone.encode([prompt])
        calls = {component: _call(backbone, component, text) for component in backbone.noise_ranges}
    with backbone.active({}):
        without = [backbone.encode([prompt])] if adapted - backbone.noise_ranges.keys() else []
        without += (
            [backbone.encode([f"a photo of a {_unnamed(phrase, placeholder)}".strip()])] if written["tokens"] else []
        )
        bare = {c: [_again(backbone.components[c], call)] for c, call in calls.items() if c in adapted}
        pipe = loaded(backbone, folder, written)
        context, pooled = _encode(pipe, backbone, public)
        outputs = {c: _again(pipe.components[c], call) for c, call in calls.items()}
    checks = {_denoiser(backbone, c): check(call["output"], outputs[c], bare.get(c, [])) for c, call in calls.items()}
    if not isinstance(text.context, Tensor):
        raise ValueError(
            f"{name!r} has a text context for each attention layer, which diffusers' pipelines do not support"
        )
    checks["text"] = check(text.context, context, [w.context for w in without if isinstance(w.context, Tensor)])
    if text.pooled is not None and pooled is not None:
        checks["pooled text"] = check(text.pooled, pooled, [w.pooled for w in without if w.pooled is not None])
    return {"prompt": public, "checks": checks}


def _unnamed(phrase: str, placeholder: Any) -> str:
    """Returns the words without the concept's own tokens."""
    for token in sorted(placeholder.tokens if placeholder is not None else (), key=len, reverse=True):
        phrase = phrase.replace(token, "")
    return " ".join(phrase.split())


def check(ours: Tensor, theirs: Tensor, without: Sequence[Tensor]) -> dict[str, Any]:
    """Measures how far apart two outputs are, and decides whether that is acceptable.

    Args:
        ours: with the concept attached
        theirs: with the exported files loaded
        without: outputs like `ours`, each without one ingredient of the concept (its adapters or its tokens)

    Returns:
        max_abs_difference: the largest absolute difference between the outputs; None if their shapes differ
        limit: the largest absolute difference that rounding may cause
        effect: the largest absolute change made by the ingredient with the smallest effect
        share: the RMS difference divided by that ingredient's RMS effect; None if no ingredient affects this output
        ok: whether the difference is acceptable
    """
    a, b = ours.float(), theirs.float().to(ours.device)
    if a.shape != b.shape:
        return {"max_abs_difference": None, "shapes": [list(a.shape), list(b.shape)], "ok": False}
    difference = float((a - b).abs().max())
    limit = _ROUNDING.get(ours.dtype, 2e-5) * float(a.abs().max())
    effects = [(float((a - w.float()).abs().max()), float((a - w.float()).square().mean().sqrt())) for w in without]
    effect, spread = min((e for e in effects if e[0] > 0), default=(0.0, 0.0))
    share = float((a - b).square().mean().sqrt()) / spread if spread else None
    ok = difference <= limit and (share is None or share <= _SHARE.get(ours.dtype, 0.02))
    return {"max_abs_difference": difference, "limit": limit, "effect": effect, "share": share, "ok": ok}


def _denoiser(backbone: Backbone, component: str) -> str:
    """Returns the denoiser's name in a report. The name includes the component if there are several denoisers."""
    return "denoiser" if len(backbone.noise_ranges) == 1 else f"denoiser {component}"


def _again(network: Any, call: Mapping[str, Any]) -> Tensor:
    return network(*call["args"], **call["kwargs"])[0]


# --- diffusers' side --------------------------------------------------------------------------


def loaded(backbone: Backbone, folder: Path, written: Mapping[str, Any]) -> Any:
    """Returns the family's diffusers pipeline with the exported files loaded.

    The pipeline uses copies of the backbone's networks without their adapters. The copies share their weights with the
    backbone, so that large models fit in memory. Only embedding tables that grow are not shared.
    """
    pipe = backbone.pipeline()  # type: ignore[attr-defined]
    grows = {entry["component"] for entry in written["tokens"]}
    touched = {*backbone.components} if written.get("lora") else grows | backbone.noise_ranges.keys()
    for component in backbone.components:
        if component in touched or any(is_wrapped(m) for m in backbone.components[component].modules()):
            pipe.register_modules(**{component: bare_copy(backbone.components[component], component in grows)})
    for entry in written["tokens"]:
        tokenizer = entry["component"].replace("text_encoder", "tokenizer")
        pipe.register_modules(**{tokenizer: copy.deepcopy(getattr(pipe, tokenizer))})
        encoder, words = getattr(pipe, entry["component"]), getattr(pipe, tokenizer)
        with torch.random.fork_rng():  # resizing draws random numbers for the new rows
            if reads_token_files(pipe):
                pipe.load_textual_inversion(
                    str(folder / entry["file"]), text_encoder=encoder, tokenizer=words, local_files_only=True
                )
            else:
                add_tokens(encoder, words, folder / entry["file"])
        if entry["end_of_text"]:
            getattr(pipe, entry["component"]).eos_token_id = getattr(pipe, tokenizer).eos_token_id
    for file, options in (written.get("lora") or {}).get("files", {}).items():
        pipe.load_lora_weights(str(folder), weight_name=file, local_files_only=True, **options)
    return pipe


def add_tokens(encoder: Any, tokenizer: Any, file: Path) -> None:
    """Adds an export's tokens and their embeddings with transformers, for pipelines that cannot read token files.

    The export's README contains the same steps.
    """
    from transformers import AddedToken

    ((token, vectors),) = safe_load_safetensors(file).items()
    names = token_names(token, len(vectors))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    encoder.resize_token_embeddings(max(len(tokenizer), encoder.config.vocab_size), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table.data[tokenizer.convert_tokens_to_ids(names)] = vectors.to(table)


def bare_copy(module: nn.Module, own_embeddings: bool = False) -> Any:
    """Returns a copy of the network without its adapters. The copy shares the network's weights. If `own_embeddings` is
    set, the embedding tables are copied instead of shared."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    if own_embeddings:
        for table in (m for m in module.modules() if isinstance(m, nn.Embedding)):
            memo.pop(id(table.weight), None)
    out: Any = copy.deepcopy(module, memo)
    for path, layer in list(out.named_modules()):
        if is_wrapped(layer):
            parent, _, leaf = path.rpartition(".")
            setattr(out.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(out, "peft_config"):
        del out.peft_config
    return out


def _encode(pipe: Any, backbone: Backbone, prompt: str) -> tuple[Tensor, Tensor | None]:
    """Returns (context, pooled) from the pipeline's own `encode_prompt`."""
    lengths = backbone.max_length
    settings = {
        "prompt": prompt,
        "device": backbone.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "max_sequence_length": max(lengths.values()),
    }
    takes = inspect.signature(pipe.encode_prompt).parameters
    out = pipe.encode_prompt(**{k: v for k, v in settings.items() if k in takes})
    return out[0], out[1] if backbone.pooled_component else None


def _call(backbone: Backbone, component: str, conditioning: Any) -> dict[str, Any]:
    """Makes the backbone call a denoiser at the middle of the denoiser's time range, and returns the arguments and the
    output of this call."""
    side = min(backbone.resolution, _SIDE)
    generator = torch.Generator().manual_seed(_SEED)
    # a clip has two latent frames, so that attention across frames has an effect
    frames = None if backbone.frames is None else backbone.frame_factor + 1
    shape = backbone.latent_shape(side, side, frames)
    noise = torch.randn(1, *shape, generator=generator).to(backbone.device, backbone.dtype)
    middle = int(sum(backbone.noise_ranges[component]) / 2)
    with _watched(backbone.components[component]) as seen:
        backbone.predict(noise, torch.tensor([middle], device=backbone.device), conditioning)
    return seen


@contextmanager
def _watched(module: nn.Module) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def watch(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(args=args, kwargs=kwargs, output=output[0])

    handle = module.register_forward_hook(watch, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
