"""Tests the sources of training examples: references, folders and generated class pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field

from shared.config import Part, Slot, validate
from shared.io.contact_sheets import read_metadata
from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.sources import Folder, Generated, References, Source, SourceContext
from shared.types import Subject


class Recipe(Part):
    """A recipe whose only field is the slot for sources."""

    sources: Slot[Source] = Field(default={})


def photos(folder: Path, *names: str, size: tuple[int, int] = (60, 40)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        level = np.full((size[1], size[0], 3), 40 * i + 10, np.uint8)
        level[:, : size[0] // 2] += 5
        Image.fromarray(level).save(folder / name)
    return folder


class Painter:
    """A substitute for the sampler. It returns random pictures that depend only on their seeds, and records its calls."""

    def __init__(self, side: int = 32) -> None:
        self.calls: list[tuple[list[str], list[int], float, int]] = []
        self.side = side

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance: float,
        steps: int,
        resolution: int,
        progress=None,
    ) -> torch.Tensor:
        self.calls.append((list(prompts), list(seeds), guidance, steps))
        draw = [torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(draw) * 2 - 1

    @property
    def made(self) -> int:
        return sum(len(seeds) for _, seeds, _, _ in self.calls)


def context(tmp_path: Path, painter: Painter | None = None, **changes: object) -> SourceContext:
    subject = Subject((), "mug")
    settings = {"subjects": {"my-mug": subject}, "resolution": 32, "seed": 0, "backbone_key": "weights-1", **changes}
    return SourceContext(cache_dir=tmp_path / "cache", generate=painter, **settings)  # type: ignore[arg-type]


def test_the_key_of_a_source_can_name_its_kind_and_mistakes_are_reported() -> None:
    data = {"sources": {"references": {}, "more": {"kind": "folder", "images": "x"}, "generated": {"num_images": 8}}}
    recipe = validate(Recipe, data)
    assert [type(s) for s in recipe.sources.values()] == [References, Folder, Generated]
    with pytest.raises(ValueError, match=r"sources.reference: unknown kind 'reference'. Did you mean 'references'"):
        validate(Recipe, {"sources": {"reference": {}}})
    with pytest.raises(ValueError, match=r"unknown key 'repeat'. Did you mean 'repeats'"):
        validate(Recipe, {"sources": {"references": {"repeat": 2}}})
    with pytest.raises(ValueError, match=r"sources.generated.num_images = 0"):
        validate(Recipe, {"sources": {"generated": {"num_images": 0}}})
    for prompt in ("a {concept}", "a <my-mug>", " "):
        with pytest.raises(ValueError, match="before the concept exists, so use only words"):
            validate(Recipe, {"sources": {"generated": {"prompt": prompt}}})


def test_references_can_come_from_two_subjects(tmp_path: Path) -> None:
    one, two = photos(tmp_path / "one", "a.png", "b.png"), photos(tmp_path / "two", "c.jpg")
    (one / "a.txt").write_text("{concept} on a table")
    (one / "masks").mkdir()
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(one / "masks/a.png")
    subjects = {"mug": read_subject(one, "mug"), "cat": read_subject(two, "cat")}
    examples = list(References(repeats=2).examples(context(tmp_path, subjects=subjects)))
    assert [(e.owner, Path(e.source).name) for e in examples] == [
        ("mug", "a.png"),
        ("mug", "b.png"),
        ("cat", "c.jpg"),
    ] * 2
    first, second = examples[:2]
    assert {e.pixels.shape for e in examples} == {(3, 32, 32)} and {e.role for e in examples} == {"instance"}
    assert first.caption == "{concept} on a table" and first.user_caption
    assert second.caption == "" and not second.user_caption and second.mask is None and second.valid is None
    assert first.mask is not None and first.mask.shape == (1, 32, 32)
    assert float(first.mask.mean()) == pytest.approx(20 * 20 / 40 / 40, rel=0.05)
    again = list(References(repeats=2).examples(context(tmp_path, subjects=subjects)))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(examples, again, strict=True))


def test_references_can_keep_the_whole_picture(tmp_path: Path) -> None:
    subjects = {"mug": read_subject(photos(tmp_path / "one", "a.png"))}
    [example] = list(References(fit="contain").examples(context(tmp_path, subjects=subjects)))
    assert example.valid is not None and example.valid.mean() == pytest.approx(21 / 32)


def test_the_errors_for_unusable_references_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subject.images=FOLDER"):
        list(References().examples(context(tmp_path, subjects={})))
    one = photos(tmp_path / "one", "a.png")
    (one / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read"):
        list(References().examples(context(tmp_path, subjects={"x": read_subject(one)})))
    (one / "b.jpg").unlink()
    Image.new("L", (8, 8), 255).save(tmp_path / "m.png")
    subject = Subject((one / "a.png",), masks={one / "a.png": tmp_path / "m.png"})
    with pytest.raises(ValueError, match=r"m\.png is 8x8 pixels, but its picture .*a\.png is 60x40"):
        list(References().examples(context(tmp_path, subjects={"x": subject})))
    corners = np.zeros((40, 120), np.uint8)
    corners[:2, :2] = corners[:2, -2:] = 255
    Image.fromarray(corners).save(tmp_path / "corners.png")
    wide = photos(tmp_path / "wide", "w.png", size=(120, 40)) / "w.png"
    subject = Subject((wide,), masks={wide: tmp_path / "corners.png"})
    with pytest.raises(ValueError, match=r"w\.png: no part of its mask is inside the square crop; use fit=contain"):
        list(References().examples(context(tmp_path, subjects={"x": subject})))
    with pytest.warns(UserWarning, match=r"enlarged to 512 pixels, which blurs them: a\.png \(60x40\)"):
        list(References().examples(context(tmp_path, subjects={"x": read_subject(one)}, resolution=512)))


def test_class_pictures_can_come_from_a_folder(tmp_path: Path) -> None:
    real = photos(tmp_path / "real", "a.png", "b.png", "c.png")
    (real / "a.txt").write_text("a mug on a shelf")
    examples = list(Folder(images=str(real), limit=2).examples(context(tmp_path)))
    assert [(e.caption, e.user_caption, e.role, e.owner) for e in examples] == [
        ("a mug on a shelf", True, "prior", "my-mug"),
        ("a photo of a mug", True, "prior", "my-mug"),
    ]
    examples = list(Folder(images=str(real), role="instance").examples(context(tmp_path)))
    assert [(e.caption, e.user_caption, e.role) for e in examples][1:] == [("", False, "instance")] * 2
    filled = list(Folder(images=str(real), prompt="photo of a {class_noun}").examples(context(tmp_path)))
    assert [e.caption for e in filled] == ["a mug on a shelf", "photo of a mug", "photo of a mug"]
    two = context(tmp_path, subjects={"a": Subject((), "mug"), "b": Subject(())})
    with pytest.raises(ValueError, match=r"set the subject that it belongs to. Available: a, b"):
        list(Folder(images=str(real)).examples(two))
    with pytest.raises(ValueError, match=r"unknown subject 'c'. Available: a, b"):
        list(Folder(images=str(real), subject="c").examples(two))
    with pytest.raises(ValueError, match=r"needs subject.class_noun, but 'b' has none"):
        list(Folder(images=str(real), subject="b", prompt="a {class_noun}").examples(two))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list(Folder(images=str(tmp_path / "nowhere")).examples(context(tmp_path)))


def test_class_pictures_are_generated_once_and_cached(tmp_path: Path) -> None:
    painter = Painter()
    part = Generated(num_images=5, batch_size=2, guidance=3.0, steps=7)
    first = list(part.examples(context(tmp_path, painter)))
    assert [len(seeds) for _, seeds, _, _ in painter.calls] == [2, 2, 1]
    assert {(*p, g, n) for p, _, g, n in painter.calls for p in [set(p)]} == {("a photo of a mug", 3.0, 7)}
    assert len({s for _, seeds, _, _ in painter.calls for s in seeds}) == 5
    assert {(e.role, e.owner, e.caption, e.user_caption) for e in first} == {
        ("prior", "my-mug", "a photo of a mug", True)
    }
    second = list(part.examples(context(tmp_path)))  # the cache suffices, so no sampler is needed
    assert painter.made == 5
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
    made = painter(["x"], painter.calls[0][1][:1], guidance=1, steps=1, resolution=32)[0]
    assert float((first[0].pixels - made).abs().max()) <= 1 / 255
    meta = read_metadata(first[0].source)
    assert meta["prompt"] == "a photo of a mug" and meta["seed"] == str(painter.calls[0][1][0])


def test_missing_pictures_are_added_and_damaged_pictures_are_generated_again(tmp_path: Path) -> None:
    painter = Painter()
    first = list(Generated(num_images=3).examples(context(tmp_path, painter)))
    more = list(Generated(num_images=6, batch_size=1).examples(context(tmp_path, painter)))
    assert painter.made == 6
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, more[:3], strict=True))
    Path(more[0].source).unlink()
    Path(more[1].source).write_bytes(Path(more[1].source).read_bytes()[:-500])
    Image.new("RGB", (32, 32)).save(more[2].source)  # a valid picture, but not the generated one
    damaged = bytearray(Path(more[3].source).read_bytes())
    damaged[len(damaged) // 2] ^= 255
    Path(more[3].source).write_bytes(bytes(damaged))
    with pytest.raises(
        ValueError, match=r"lacks 4 class pictures of 'a photo of a mug' \(in .*cannot generate pictures"
    ):
        list(Generated(num_images=6).examples(context(tmp_path)))
    again = list(Generated(num_images=6).examples(context(tmp_path, painter)))
    assert painter.made == 10
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(more, again, strict=True))


@pytest.mark.parametrize(
    "change", [{"guidance": 1.0}, {"steps": 3}, {"seed": 1}, {"prompt": "a {class_noun}"}, {"batch_size": 1}]
)
def test_class_pictures_are_generated_again_if_a_setting_that_affects_them_changes(
    tmp_path: Path, change: dict[str, object]
) -> None:
    painter = Painter()
    list(Generated(num_images=2).examples(context(tmp_path, painter)))
    list(Generated.model_validate({"num_images": 2, **change}).examples(context(tmp_path, painter)))
    assert painter.made == (2 if "batch_size" in change else 4)


def test_the_cache_key_depends_on_weights_and_size_but_not_on_the_run_seed(tmp_path: Path) -> None:
    painter = Painter()
    list(Generated(num_images=2).examples(context(tmp_path, painter)))
    list(Generated(num_images=2).examples(context(tmp_path, painter, seed=7)))
    assert painter.made == 2
    list(Generated(num_images=2).examples(context(tmp_path, painter, backbone_key="weights-2")))
    assert painter.made == 4
    list(Generated(num_images=2).examples(context(tmp_path, Painter(24), resolution=24)))
    with pytest.raises(AssertionError, match="generate returned"):
        list(Generated(num_images=2).examples(context(tmp_path, Painter(24), resolution=48)))


def test_an_interrupted_run_keeps_the_completed_pictures(tmp_path: Path) -> None:
    class Tired(Painter):
        def __call__(self, *args: object, **settings: object) -> torch.Tensor:
            if self.calls:
                raise KeyboardInterrupt
            return super().__call__(*args, **settings)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        list(Generated(num_images=4, batch_size=2).examples(context(tmp_path, Tired())))
    files = sorted(p for p in (tmp_path / "cache").rglob("*.png"))
    assert len(files) == 2 and all(read_picture(p).size == (32, 32) for p in files)
    assert not [p for p in (tmp_path / "cache").rglob("*") if "partial" in p.name]
    rest = Painter()
    assert len(list(Generated(num_images=4).examples(context(tmp_path, rest)))) == 4 and rest.made == 2


def test_subjects_of_the_same_class_share_pictures_and_a_class_noun_is_required(tmp_path: Path) -> None:
    painter = Painter()
    subjects = {"a": Subject((), "mug"), "b": Subject((), "mug"), "c": Subject((), "cat")}
    examples = list(Generated(num_images=2).examples(context(tmp_path, painter, subjects=subjects)))
    assert [e.owner for e in examples] == ["a", "a", "b", "b", "c", "c"] and painter.made == 4
    with pytest.raises(ValueError, match=r"class pictures use 'a photo of a {class_noun}', but 'd' has no"):
        list(Generated().examples(context(tmp_path, painter, subjects={"d": Subject(())})))


def test_ordinary_references_cause_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = photos(tmp_path / "one", "a.png")
        list(References().examples(context(tmp_path, subjects={"x": read_subject(one)})))
