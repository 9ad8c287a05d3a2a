"""Merges separately learned concepts without training.

The default method is Custom Diffusion's closed form (arXiv 2212.04488, section 3.3).

Each concept has its own key and value weights in cross-attention. The merged weights W must map every concept's words
to the same outputs as that concept's weights do. For all other text, the outputs of W must differ as little as
possible from those of the base weights W_0 (equation 4):

    W = argmin ||W C_reg^T - W_0 C_reg^T||_F   such that   W C^T = V

where C [s, d] contains the text features of the concepts' words, V [o, s] contains the outputs to which each concept
maps its own words, and C_reg contains the features of plain captions. With G = C_reg^T C_reg, the solution
(equation 5) is W = W_0 + v^T D, where D = C G^-1 and v = (C D^T)^-1 (V - W_0 C^T)^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.attaching import attach
from shared.concept.concept_folder import Concept, adapter_id, with_fields
from shared.config import unknown
from shared.trainable.delta import find_parameter

Method = Literal["closed_form", "sum"]
SLOT = "merged"
_BEFORE = "a photo of a"  # the text that precedes a concept's words
#: The ridge that makes G invertible, as a fraction of the mean of G's diagonal. Without it, G is singular, because a
#: few captions do not span all features and because normalised features lie in a hyperplane.
_RIDGE = 1e-9
_LEAST = 1e-9  # singular values of C below this fraction of the largest one count as zero


def merge(
    concepts: Sequence[Concept], backbone: Backbone, captions: Sequence[str], method: Method = "closed_form"
) -> list[Concept]:
    """Returns the concepts with one shared change to the keys and values. Each concept keeps its own name and words.

    Each returned concept contains the whole shared change. If several of them are loaded, the change is applied only
    once.

    Args:
        backbone: the model that the concepts were learned on, with none of them attached; it is left unchanged
        captions: plain sentences whose meaning is preserved; ignored by "sum", which adds up the changes

    Raises:
        ValueError: if there are fewer than two concepts or no captions; if a name is repeated or the method is unknown;
            if the concepts change weights other than cross-attention's keys and values, change different layers, or
            belong to different families; or if their words cannot be told apart
    """
    if method not in get_args(Method):
        raise ValueError(unknown(method, get_args(Method), "method"))
    changes = _changes(concepts, backbone)
    base = _base(backbone, changes[0])
    if method == "sum":
        merged = {key: torch.stack([c[key].double() for c in changes]).sum(0) for key in base}
    else:
        merged = _closed_form(concepts, backbone, captions, changes, base)
    deltas = {key: delta.float() for key, delta in merged.items()}
    return [_with(concept, deltas, [c.name for c in concepts], method) for concept in concepts]


def solve(weight: Tensor, targets: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """Solves equation 5 in float64. Returns the change to `weight` ([o, d]) for which the changed weight maps `targets`
    ([s, d]) to `values` ([s, o]) and the cost tr(change gram change^T) is minimal."""
    directions = torch.linalg.solve(gram, targets.T).T
    factors = torch.linalg.solve(targets @ directions.T, values - targets @ weight.T)
    return factors.T @ directions


def _closed_form(
    concepts: Sequence[Concept],
    backbone: Backbone,
    captions: Sequence[str],
    changes: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    words = [_word_features(concept, backbone) for concept in concepts]
    targets = torch.cat(words)
    singular = torch.linalg.svdvals(targets)
    if len(targets) > targets.shape[1] or singular[-1] < _LEAST * singular[0]:
        names = ", ".join(repr(c.name) for c in concepts)
        raise ValueError(
            f"the words of {names} cannot be told apart by this text encoder, so no set of weights suits all of them"
        )
    gram = _gram(backbone, captions)
    out = {}
    for key, weight in base.items():
        outputs = [c @ (weight + change[key].double()).T for c, change in zip(words, changes, strict=True)]
        out[key] = solve(weight, targets, torch.cat(outputs), gram)
    return out


@torch.no_grad()
def _gram(backbone: Backbone, captions: Sequence[str]) -> Tensor:
    """Returns C_reg^T C_reg plus a small ridge ([d, d], float64). Every position that the network attends to is
    included."""
    if not captions:
        raise ValueError("merging needs captions whose meaning it preserves; give at least one sentence")
    total: Tensor | None = None
    with backbone.active({}):
        for caption in captions:
            features = _context(backbone, caption)[0].cpu().double()
            total = features.T @ features + (0 if total is None else total)
    assert total is not None
    return total + _RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)


@torch.no_grad()
def _word_features(concept: Concept, backbone: Backbone) -> Tensor:
    """Returns the features ([n, d], float64) of the tokens that name the concept, including its class noun."""
    attach(concept, backbone)
    try:
        placeholder = backbone.placeholders.get(concept.name)
        if placeholder is None or not placeholder.words:
            raise ValueError(
                f"{concept.name!r} has no words in prompts: only concepts that are named in prompts can be merged"
            )
        prompt = f"{_BEFORE} {placeholder.words}"
        backbone.check_prompt(prompt)
        start, end = (_length(backbone, text) - 1 for text in (_BEFORE, prompt))  # without the end token
        with backbone.active({concept.name: 1.0}):
            return _context(backbone, prompt)[0, start:end].cpu().double()
    finally:
        backbone.remove(concept.name)


def _context(backbone: Backbone, prompt: str) -> Tensor:
    context = backbone.encode([prompt]).context
    if not isinstance(context, Tensor):
        raise ValueError("words with a separate text context per layer cannot be merged in closed form; use method sum")
    return context


def _length(backbone: Backbone, text: str) -> int:
    """Returns the number of tokens in a text, including its start and end tokens."""
    tokens, component = backbone.tokens, backbone.context_component  # type: ignore[attr-defined]
    return int(tokens.tokenize(component, [text], "cpu").mask.sum())


def _changes(concepts: Sequence[Concept], backbone: Backbone) -> list[dict[str, Tensor]]:
    """Returns each concept's changes to the weights, under the keys "{component}.{path}"."""
    names = [c.name for c in concepts]
    if len(names) < 2:
        raise ValueError("give two or more concepts to merge")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(
            f"two of the concepts are called {twice!r}: names must differ, because they become folders and words in prompts"
        )
    first = concepts[0]
    for concept in concepts[1:]:
        family = concept.meta.backbone.family
        if family != first.meta.backbone.family:
            expected = first.meta.backbone.family
            raise ValueError(
                f"{first.name!r} was learned on {expected}, but {concept.name!r} on {family}, so they cannot be merged"
            )
    changes = [_change(concept, backbone) for concept in concepts]
    for concept, change in zip(concepts[1:], changes[1:], strict=True):
        other = sorted(change.keys() ^ changes[0].keys())
        if other:
            raise ValueError(
                f"{first.name!r} and {concept.name!r} change different layers ({len(other)} in only one of them, for example "
                f"{other[0]}): learn them with the same roles"
            )
    return changes


def _change(concept: Concept, backbone: Backbone) -> dict[str, Tensor]:
    keys = {
        f"{site}.{leaf}.weight"
        for site in backbone.text_sites()  # type: ignore[attr-defined]
        for leaf in ("to_k", "to_v")
    }
    change: dict[str, Tensor] = {}
    for slot, components in concept.meta.weights.items():
        for key in (f"{component}.{path}" for component, paths in components.items() for path in paths):
            delta = concept.of("weights")[f"{slot}.{key}"].double()
            change[key] = change[key] + delta if key in change else delta
    other = [k for k in change if k.partition(".")[2] not in keys]
    adapted = concept.meta.adapters or concept.meta.branches
    if adapted or other or not change:
        what = f"changes {other[0]}" if other else "has adapters" if adapted else "changes no weights"
        raise ValueError(
            f"{concept.name!r} {what}: only changes to the keys and values of cross-attention can be merged. The "
            "recipe custom_diffusion learns such changes"
        )
    return change


def _base(backbone: Backbone, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the base weights that the changes apply to, in float64 on the CPU."""
    out = {}
    with backbone.active({}):
        for key, delta in like.items():
            weight = find_parameter(backbone, key)
            if weight is None or weight.shape != delta.shape:
                shape = "it is missing here" if weight is None else f"{list(weight.shape)} here"
                raise ValueError(
                    f"{key} has shape {list(delta.shape)} in the concepts, but {shape}: merge them on the model that "
                    "they were learned on"
                )
            out[key] = weight.detach().cpu().double()
    return out


def _with(concept: Concept, deltas: Mapping[str, Tensor], names: Sequence[str], method: str) -> Concept:
    paths: dict[str, list[str]] = {}
    for component, _, path in (key.partition(".") for key in sorted(deltas)):
        paths.setdefault(component, []).append(path)
    tensors = {**concept.tensors, "weights": {f"{SLOT}.{key}": delta for key, delta in deltas.items()}}
    # these replace the old scores, which were measured with other weights
    scores = {
        "merged": ", ".join(names),
        "merge_method": method,
    }
    meta = with_fields(concept.meta, weights={SLOT: paths}, metrics=scores, adapter_id=adapter_id(tensors), files={})
    return replace(concept, meta=meta, tensors=tensors, preview=None, path=None)
