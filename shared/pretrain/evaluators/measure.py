"""Measures the accuracy of the evaluators on new renders, which may first be degraded by the VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.pretrain.evaluators.judge_backbone import render_all as render_anew
from shared.pretrain.evaluators.judge_backbone import truth
from shared.pretrain.evaluators.tasks import retrieve
from shared.toybox import subjects, world
from shared.toybox.captions import caption
from shared.toybox.evaluators.clip import image_features, load_clip, text_features
from shared.toybox.evaluators.identity import load_identity
from shared.toybox.evaluators.recognizer import ATTRIBUTES, FACE_VIEWS, load_recognizer

Degrade = Callable[[Tensor], Tensor]


@lru_cache(maxsize=512)
def _rendered(scenes: tuple[world.Scene, ...]) -> Tensor:
    return render_anew(scenes)


def render_all(scenes: Sequence[world.Scene]) -> Tensor:
    """Renders scenes as pictures, `[n, 3, 64, 64]` in [0, 1]. The renders are cached, because each is measured both
    clean and degraded."""
    return _rendered(tuple(scenes))


def fresh_scenes(n: int, seed: int, **fixed: Any) -> list[world.Scene]:
    """Samples `n` scenes of one thing each. Scenes viewed near the boundary between two named views are left out.

    The scenes are independent of the training pictures. They belong to the `reporting` split, so their patterns and
    identities do not occur in any training picture.
    """
    rng = np.random.default_rng([seed, 77])
    scenes: list[world.Scene] = []
    while len(scenes) < n:
        scene = world.sample_scene(rng, "reporting", two=False, **fixed)
        if scene.cameras[0].view_is_clear:
            scenes.append(scene)
    return scenes


def measure_recognizer(n: int = 1000, seed: int = 0, degrade: Degrade | None = None) -> dict[str, Any]:
    """Measures the recognizer's accuracies on `n` new renders in all styles, and its most common confusions.

    `accessory_shown` covers only pictures with an accessory, and `style_shown` covers only pictures that are not
    photos. Scores whose names end in `_in_photos` cover only photos.

    degrade: a function applied first to the pictures `[n, 3, 64, 64]`, for example the VAE's round trip
    """
    scenes = fresh_scenes(n, seed)
    pictures = render_all(scenes)
    found = load_recognizer().predict(degrade(pictures) if degrade else pictures)
    truths = [truth(scene) for scene in scenes]
    result: dict[str, Any] = {}
    for name in ATTRIBUTES:
        right = np.array([a == b[name] for a, b in zip(found[name], truths, strict=True)])
        result[name] = round(float(right.mean()), 4)
        plain = {"accessory": "none", "style": "photo"}.get(name)
        if plain:
            shown = np.array([t[name] != plain for t in truths])
            result[f"{name}_shown"] = round(float(right[shown].mean()), 4)
    photo = np.array([t["style"] == "photo" for t in truths])
    for name in ("main", "second", "view"):
        right = np.array([a == b[name] for a, b in zip(found[name], truths, strict=True)])
        result[f"{name}_in_photos"] = round(float(right[photo].mean()), 4)
    result["confusions"] = {name: confusions(found[name], [t[name] for t in truths]) for name in ATTRIBUTES}
    return result


def confusions(found: list[str], truths: list[str], most: int = 6) -> list[str]:
    """Lists the most common errors, as "truth -> answer: count"."""
    counts: dict[tuple[str, str], int] = {}
    for answer, true in zip(found, truths, strict=True):
        if answer != true:
            counts[true, answer] = counts.get((true, answer), 0) + 1
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [f"{true} -> {answer}: {count}" for (true, answer), count in worst]


def measure_identity(
    split: str = "development",
    references: int = 5,
    queries: int = 3,
    seed: int = 0,
    degrade: Degrade | None = None,
    faces: bool = False,
) -> dict[str, Any]:
    """Measures how often held-out subjects (or faces) are retrieved from among their distractors of the same class
    and palette.

    The gallery consists of a subject and its distractors, with `references` reference pictures of each. The queries are
    `queries` other photos of each, from random views. `degrade` is applied to references and queries. The
    `subject` score covers only queries that show the subjects themselves. With `faces`, queries in which the recognizer
    sees no face (only hair, from behind or from above) are left out, as is usual in face recognition. `no_face` is the
    number left out.
    """
    right: list[bool] = []
    own: list[bool] = []
    by_view: dict[str, list[bool]] = {}
    by_subject: dict[str, float] = {}
    faceless = 0
    held_out = (subjects.faces if faces else subjects.subjects)(split)
    for number, held in enumerate(held_out):
        found = _identity_hits(held, split, references, queries, [seed, number, 78], degrade)
        hits = [(index, view, hit) for index, view, hit, face in found if face or not faces]
        faceless += len(found) - len(hits)
        right += [hit for _, _, hit in hits]
        own += [hit for index, _, hit in hits if index == 0]
        for _, view, hit in hits:
            by_view.setdefault(view, []).append(hit)
        by_subject[held.name] = round(float(np.mean([hit for _, _, hit in hits])), 4)
    gallery = 1 + min(len(held.distractors) for held in held_out)
    return {
        "retrieval": round(float(np.mean(right)), 4),
        "subject": round(float(np.mean(own)), 4),
        "queries": len(right),
        "no_face": faceless,
        "gallery": gallery,
        "chance": round(1 / gallery, 4),
        "by_view": {name: round(float(np.mean(hits)), 4) for name, hits in sorted(by_view.items())},
        "by_subject": by_subject,
    }


def _identity_hits(
    held: subjects.HeldOut, split: str, references: int, queries: int, seed: list[int], degrade: Degrade | None
) -> list[tuple[int, str, bool, bool]]:
    """Returns, for every query, the index of its thing in the gallery, its view, whether the right gallery entry was
    found, and whether a face is visible."""
    encoder, rng = load_identity(), np.random.default_rng(seed)
    gallery = [held.thing, *held.distractors]
    through = degrade or (lambda pictures: pictures)
    shown = [
        encoder.embed(through(render_all(subjects.reference_scenes(t, references, seed[0] + i, split))))
        for i, t in enumerate(gallery)
    ]
    scenes = [world.sample_scene(rng, split, thing=thing, style="photo") for thing in gallery for _ in range(queries)]
    pictures = through(render_all(scenes))
    found = retrieve(encoder.embed(pictures), shown).tolist()
    faces = [view in FACE_VIEWS for view in load_recognizer().predict(pictures)["view"]]
    return [(k // queries, scene.view, found[k] == k // queries, faces[k]) for k, scene in enumerate(scenes)]


@torch.no_grad()
def measure_clip(n: int = 500, seed: int = 0, degrade: Degrade | None = None) -> dict[str, Any]:
    """Measures CLIP's zero-shot accuracies, how often CLIP finds a picture's own caption among 64 full captions, and
    how well it distinguishes a caption from a slightly changed one.

    `swap_<attribute>` is the fraction of pictures that are closer to their own caption than to the caption of the same
    scene with a different value of the attribute (chance: 0.5). For `swap_binding`, the two colours are exchanged
    instead.
    """
    model, processor = load_clip()
    scenes = fresh_scenes(n, seed, style="photo", accessory="none")
    pictures = render_all(scenes)
    images = image_features(model, degrade(pictures) if degrade else pictures)
    texts = [caption(scene, np.random.default_rng([seed, i]), full=True) for i, scene in enumerate(scenes)]
    words = text_features(model, processor.tokenizer, texts)
    result: dict[str, Any] = {"caption_of_64": round(_retrieval(images, words, 64), 4)}
    rng = np.random.default_rng([seed, 79])
    for name in ("class", "main", "second", "background", "view", "binding"):
        others = [
            caption(swapped(scene, name, rng), np.random.default_rng([seed, i]), full=True)
            for i, scene in enumerate(scenes)
        ]
        wrong = text_features(model, processor.tokenizer, others)
        result[f"swap_{name}"] = round(float(((images * words).sum(1) > (images * wrong).sum(1)).float().mean()), 4)
    for name, values in (("class", world.CLASSES), ("background", world.BACKGROUNDS)):
        prompt = "a photo of a {}" if name == "class" else "a photo of a toy, {}"
        scores = images @ text_features(model, processor.tokenizer, [prompt.format(v) for v in values]).T
        true = torch.tensor([values.index(truth(scene)[name]) for scene in scenes])
        result[f"zero_shot_{name}"] = round(float((scores.argmax(1) == true).float().mean()), 4)
    return result


def swapped(scene: world.Scene, attribute: str, rng: np.random.Generator) -> world.Scene:
    """Returns the scene with a different value for one attribute or, for `binding`, with the thing's two colours
    exchanged."""

    def other(values: tuple[str, ...], *but: str) -> str:
        left = [v for v in values if v not in but]
        return left[int(rng.integers(len(left)))]

    thing = scene.things[0]
    if attribute == "background":
        return replace(scene, background=other(world.BACKGROUNDS, scene.background))
    if attribute == "view":
        return replace(scene, cameras=(world.sample_camera(rng, other(world.VIEWS, scene.view)),))
    if attribute == "class":
        name = other(world.CLASSES, thing.class_name, "face")
        changed = replace(thing, class_name=name, identity=None)
    elif attribute == "main":
        changed = replace(thing, main=other(world.COLORS, thing.main, thing.second))
    elif attribute == "second":
        changed = replace(thing, second=other(world.COLORS, thing.main, thing.second))
    else:
        changed = replace(thing, main=thing.second, second=thing.main)
    return replace(scene, things=(changed,))


def _retrieval(images: Tensor, words: Tensor, among: int) -> float:
    """Returns the fraction of pictures whose own caption is the closest of `among` consecutive captions."""
    count = len(images) // among * among
    scores = images[:count].view(-1, among, images.shape[1]) @ words[:count].view(-1, among, words.shape[1]).mT
    return float((scores.argmax(2) == torch.arange(among)).float().mean()) if count else float("nan")
