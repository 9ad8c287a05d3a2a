"""Writes `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors`, the files that diffusers loads.

diffusers and peft read a LoRA without alpha as W + B A, so the strength and alpha / rank are folded into B. Several
slots on one layer are concatenated along the rank: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import Concept
from shared.concept.provenance import public_name
from shared.io.adapter_settings import MIN_RANK
from shared.modifiers.learnable import at_strength

ANYTHING = "mug"  # stands in for the subject in prompts for a concept that has no words, such as a motion
LORA_FILE = "pytorch_lora_weights.safetensors"
TOKEN_FILE = "learned_embeds.safetensors"
#: Networks whose LoRA a pipeline loads from a separate file: network -> (its name in that file, options for loading).
_OWN_FILE: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    "transformer_2": ("transformer", {"load_into_transformer_2": True})
}
_KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


@dataclass
class Layer:
    """The update that one or more slots add to one layer, with the scale folded into B."""

    downs: list[Tensor] = field(default_factory=list)  # each [r, in, …]
    ups: list[Tensor] = field(default_factory=list)  # each [out, r, …]
    magnitude: Tensor | None = None  # DoRA

    @property
    def rank(self) -> int:
        return sum(d.shape[0] for d in self.downs)


def lora_layers(concept: Concept, strength: float) -> dict[str, dict[str, Layer]]:
    """Returns the update of each layer, by component and path.

    Raises ValueError for anything that this format cannot store: adapters other than LoRA, a noise-dependent rank,
    changed weights, branches, DoRA on a layer that another slot also adapts, and DoRA on only some of the adapted
    layers of a component.
    """
    if concept.of("weights"):
        raise ValueError(f"{concept.name!r} contains changed weights, which diffusers' LoRA files cannot store")
    if concept.of("branches"):
        kinds = sorted(
            {s.form.kind.replace("_", " ") for parts in concept.meta.branches.values() for s in parts.values()}
        )
        raise ValueError(
            f"{concept.name!r} has branches ({', '.join(kinds)}), which diffusers' LoRA files cannot store"
        )
    layers: dict[str, dict[str, Layer]] = defaultdict(dict)
    for slot, components in concept.meta.adapters.items():
        for component, settings in components.items():
            if settings.get("peft_type") != "LORA":
                raise ValueError(
                    f"slot {slot!r} has an adapter of type {settings.get('peft_type')}, but diffusers' LoRA files can "
                    "store only LoRA and DoRA"
                )
            if MIN_RANK in settings:
                raise ValueError(
                    f"the rank of slot {slot!r} decreases as the noise increases, down to {settings[MIN_RANK]}, but "
                    "diffusers' LoRA files have a fixed rank. To export a concept, learn it with dreambooth_lora or "
                    f"trainable.{slot}.min_rank=null"
                )
            prefix = f"{slot}.{component}."
            state = {k[len(prefix) :]: v.float() for k, v in concept.of("adapter").items() if k.startswith(prefix)}
            _add(layers[component], state, settings, strength)
    for component, by_path in layers.items():
        _check_dora(component, by_path)
    return dict(layers)


def _add(layers: dict[str, Layer], state: Mapping[str, Tensor], settings: Mapping[str, Any], strength: float) -> None:
    for key, tensor in state.items():
        path, kind = next(((key[: -len(k) - 1], k) for k in _KINDS if key.endswith("." + k)), (key, ""))
        if not kind:
            raise ValueError(f"diffusers' LoRA files cannot store the adapter tensor {key!r}")
        layer = layers.setdefault(path, Layer())
        if kind == _KINDS[0]:
            layer.downs.append(tensor)
            layer.ups.append(state[f"{path}.{_KINDS[1]}"] * (strength * _scale(settings, path)))
        elif kind == _KINDS[2]:
            if layer.magnitude is not None:
                raise ValueError(f"two DoRA slots are on {path}, but diffusers' files store one magnitude per layer")
            layer.magnitude = tensor


def _scale(settings: Mapping[str, Any], path: str) -> float:
    """Returns alpha / rank for one layer, as peft computes it."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), path), settings.get("r", 8))
    alpha = alphas.get(get_pattern_key(list(alphas), path), settings.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _check_dora(component: str, layers: Mapping[str, Layer]) -> None:
    dora = [p for p, layer in layers.items() if layer.magnitude is not None]
    mixed = [p for p in dora if len(layers[p].downs) > 1]
    if mixed:
        raise ValueError(
            f"DoRA and another slot are both on {mixed[0]} of {component}, but diffusers allows no other slot "
            "on a layer with DoRA"
        )
    if dora and len(dora) < len(layers):
        plain = next(p for p in layers if p not in dora)
        raise ValueError(
            f"{component} has DoRA on {len(dora)} layers and plain LoRA on {len(layers) - len(dora)} "
            f"(for example {plain}); diffusers requires the same kind on all layers of a component"
        )


def write_lora(concept: Concept, folder: Path, backbone: Backbone, strength: float) -> dict[str, Any] | None:
    """Writes the LoRA files. Returns a description of them, or None if the concept has no adapter.

    Every layer of a component is zero-padded to the same rank, because diffusers versions differ in how they read mixed
    ranks.
    """
    layers = lora_layers(concept, strength)
    if not layers:
        return None
    _check_loadable(backbone, layers)
    states: dict[str, dict[str, Tensor]] = {}
    options: dict[str, dict[str, bool]] = {}
    for component, by_path in layers.items():
        prefix, how = _OWN_FILE.get(component, (component, {}))
        file = LORA_FILE.replace(".", f".{component}.", 1) if how else LORA_FILE
        state, options[file] = states.setdefault(file, {}), dict(how)
        rank = max(layer.rank for layer in by_path.values())
        for path, layer in by_path.items():
            key = f"{prefix}.{public_path(backbone, component, path)}"
            state[f"{key}.{_KINDS[0]}"] = _fill(torch.cat(layer.downs), 0, rank)
            state[f"{key}.{_KINDS[1]}"] = _fill(torch.cat(layer.ups, dim=1), 1, rank)
            if layer.magnitude is not None:
                # transformers 5 looks for the name with `.weight`; without it, the magnitude keeps its initial value
                full = ".weight" if component.startswith("text_encoder") else ""
                state[f"{key}.{_KINDS[2]}{full}"] = layer.magnitude.contiguous()
    for file, state in states.items():
        save_file(state, folder / file, metadata={"format": "pt"})
    return {"files": options, "components": sorted(layers), "tensors": sum(map(len, states.values()))}


def _fill(tensor: Tensor, axis: int, rank: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis).contiguous()


def _check_loadable(backbone: Backbone, layers: Mapping[str, Any]) -> None:
    loadable = type(backbone.pipeline())._lora_loadable_modules  # type: ignore[attr-defined]
    extra = sorted(set(layers) - set(loadable))
    if extra:
        raise ValueError(
            f"diffusers loads LoRA for {backbone.family} into {', '.join(loadable)}, not into {', '.join(extra)}"
        )


def public_path(backbone: Backbone, component: str, path: str) -> str:
    """Returns a layer's name in LoRA files. These files keep CLIP's prefix `text_model.`, which transformers 5 has
    dropped."""
    clip = type(backbone.components[component]).__name__.startswith("CLIPText")
    return f"text_model.{path}" if clip and not path.startswith("text_model.") else path


def write_tokens(
    concept: Concept, folder: Path, backbone: Backbone, tokens: tuple[str, ...], strength: float = 1.0
) -> list[dict[str, Any]]:
    """Writes one file per text encoder. As in diffusers, the first of `tokens` is the key for all n vectors ([n, d]).

    Returns a description of each file, in which "end_of_text" is True for a CLIP encoder with an old configuration. The
    user has to correct the configuration, because such an encoder pools at the position of the highest token id, which
    would be an added token instead of the end token.

    Args:
        strength: folded into the vectors; at 0 the initial values are written, and at 1 the learned values

    Raises ValueError if the tokens are not named as diffusers names them (`tok`, `tok_1`, `tok_2`, …), or if the
    concept did not learn exactly one table of vectors per text encoder.
    """
    embeddings = _rows(concept, backbone, strength)
    if embeddings and tokens != tuple(token_names(tokens[0], len(tokens))):
        raise ValueError(
            f"tokens {', '.join(tokens)} cannot be written, because diffusers would name them "
            f"{tokens[0]}, {tokens[0]}_1, …"
        )
    out = []
    for component, vectors in sorted(embeddings.items()):
        if vectors.ndim != 2 or vectors.shape[0] != len(tokens):
            raise ValueError(
                f"the embeddings of {component} have shape {list(vectors.shape)}, but there are {len(tokens)} tokens"
            )
        file = TOKEN_FILE if len(embeddings) == 1 else TOKEN_FILE.replace(".", f".{component}.", 1)
        token = public_token(backbone, tokens[0])
        save_file({token: vectors.float().contiguous()}, folder / file, metadata={"format": "pt"})
        old = getattr(backbone.components[component], "eos_token_id", None) == 2
        pooled = backbone.pooled_component == component
        entry = {"file": file, "component": component, "token": token, "vectors": len(tokens)}
        out.append({**entry, "end_of_text": old and pooled})
    return out


def _rows(concept: Concept, backbone: Backbone, strength: float) -> dict[str, Tensor]:
    """Returns the vectors [n, d] at this strength, by component."""
    learned, placeholder = concept.learned_words, backbone.placeholders.get(concept.name)
    if not learned or placeholder is None:
        return {}
    if placeholder.varies_with or set(learned) != set(placeholder.components):
        raise ValueError(
            f"{concept.name!r} learned the tensors {', '.join(sorted(learned)[:4])} …, but diffusers' embedding files can "
            "store only one table of vectors per text encoder"
        )
    starts = concept.initial_embeddings or placeholder.initial_state_dict()
    if strength != 1 and not starts:
        raise ValueError(
            f"{concept.name!r} was saved without its words' initial values, so it can only be exported at strength 1"
        )
    return {c: at_strength(starts.get(c, vectors).float(), vectors.float(), strength) for c, vectors in learned.items()}


def reads_token_files(pipeline: Any) -> bool:
    """Whether a diffusers pipeline can load learned tokens. If not, the export's README.txt shows how to add them."""
    return hasattr(pipeline, "load_textual_inversion")


def token_names(token: str, vectors: int) -> list[str]:
    """Returns the names that diffusers gives to the tokens of a concept with several vectors."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def public_token(backbone: Backbone, token: str) -> str:
    """Returns a token's name in exported files. It is in lower case for pipelines that read token files, because their
    CLIP tokenizer converts prompts to lower case."""
    return token.lower() if reads_token_files(backbone.pipeline()) else token


def public_words(words: str, tokens: Sequence[str], backbone: Backbone) -> str:
    """Returns a concept's words as they must appear in a diffusers prompt. The words contain only the first token if
    the pipeline expands it to all tokens. Otherwise, they contain all tokens."""
    if not tokens or not reads_token_files(backbone.pipeline()):
        return words
    return words.replace(" ".join(tokens), public_token(backbone, tokens[0]))


def write_readme(folder: Path, concept: Concept, backbone: Backbone, written: Mapping[str, Any], words: str) -> None:
    """Writes README.txt, which contains Python code that loads and runs the export."""
    pipeline = type(backbone.pipeline()).__name__  # type: ignore[attr-defined]
    lines = [f"from diffusers import {pipeline}"]
    # whether the model has a local path, which differs on other machines
    own = public_name(backbone.name) != backbone.name and backbone.world is None
    source = json.dumps("{model}" if own else backbone.name)
    if backbone.world is not None:
        import_line, source = backbone.world.find
        lines.append(import_line)
    for network in backbone.added:
        lines[0] += f", {network.kind}"
        folder_of = json.dumps(f"{{{network.argument}}}")
        if network.find is not None:
            import_line, folder_of = network.find
            lines.append(import_line)
        source += f", {network.argument}={network.kind}.from_pretrained({folder_of})"
    lines.append(f"pipe = {pipeline}.from_pretrained({source})")
    for file, options in (written.get("lora") or {}).get("files", {}).items():
        told = "".join(f", {key}={value}" for key, value in options.items())
        lines.append(f'pipe.load_lora_weights("{{folder}}", weight_name="{file}"{told})')
    for entry in written["tokens"]:
        tokenizer = entry["component"].replace("text_encoder", "tokenizer")
        if not reads_token_files(backbone.pipeline()):
            lines += _token_lines(entry, tokenizer)
            continue
        where = (
            f", text_encoder=pipe.{entry['component']}, tokenizer=pipe.{tokenizer}"
            if len(written["tokens"]) > 1
            else ""
        )
        lines.append(f'pipe.load_textual_inversion("{{folder}}/{entry["file"]}"{where})')
        if entry["end_of_text"]:
            lines.append(f"pipe.{entry['component']}.eos_token_id = pipe.{tokenizer}.eos_token_id")
    prompt = f"a photo of a {words or ANYTHING}"
    made = f"pipe({json.dumps(prompt)})"
    if backbone.frames is None:
        lines.append(f"{made}.images[0].save('picture.png')")
    else:
        lines += ["from diffusers.utils import export_to_video", f"export_to_video({made}.frames[0], 'clip.mp4')"]
    where = (
        f", and {{model}} with the path of {public_name(backbone.name)} (weights {backbone.checkpoint[:12]})"
        if own
        else ""
    )
    for network in backbone.added:
        where += "" if network.find else f", and {{{network.argument}}} with the folder of the {network.kind}"
    head = f"The concept {concept.name!r} for diffusers. Replace {{folder}} with this file's folder{where}:\n\n"
    (folder / "README.txt").write_text(head + "\n".join(f"    {line}" for line in lines) + "\n", encoding="utf-8")


def _token_lines(entry: Mapping[str, Any], tokenizer: str) -> list[str]:
    """Returns the lines in README.txt that do the same as `shared.concept.verify.add_tokens`."""
    encoder, names = f"pipe.{entry['component']}", token_names(entry["token"], entry["vectors"])
    return [
        "from safetensors.torch import load_file",
        "from transformers import AddedToken",
        f"names = {json.dumps(names)}",
        f"pipe.{tokenizer}.add_tokens([AddedToken(name, normalized=False) for name in names])",
        f"{encoder}.resize_token_embeddings(max(len(pipe.{tokenizer}), {encoder}.config.vocab_size), "
        "mean_resizing=False)",
        f'vectors = load_file("{{folder}}/{entry["file"]}")["{entry["token"]}"]',
        f"table = {encoder}.get_input_embeddings().weight",
        f"table.data[pipe.{tokenizer}.convert_tokens_to_ids(names)] = vectors.to(table)",
    ]
