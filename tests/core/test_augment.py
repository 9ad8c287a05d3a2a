"""Augmentations change the picture, its mask and its valid area together. Mask parts change only the mask.

Neither kind of part uses global state.
"""

from __future__ import annotations

import pytest
import torch
from pydantic import Field
from torch.nn import functional as F

from shared.augment import Augment, Augmentation, Background, ColorJitter, Flip, RandomResize
from shared.config import Part, Slot, validate
from shared.masks import Box, Given, Grow, Mask, MaskPart
from shared.types import Example


class Recipe(Part):
    """A recipe with only the `augment` and `masks` slots."""

    augment: Slot[Augment] = Field(default={})
    masks: Slot[Mask] = Field(default={})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(side: int = 48, **changes: object) -> Example:
    """Returns an example with a smooth picture whose red channel shows the mask."""
    y, x = torch.meshgrid(torch.linspace(-0.8, 0.8, side), torch.linspace(-0.8, 0.8, side), indexing="ij")
    mask = torch.zeros(1, side, side)
    mask[:, side // 4 : side // 2, side // 4 : side * 5 // 8] = 1
    mask, pixels = changes.pop("mask", mask), torch.stack([mask[0] * 2 - 1, x, y])
    masks = {"m": mask} if isinstance(mask, torch.Tensor) else {}
    if masks and "pixels" not in changes:
        pixels = pixels[:, : mask.shape[-2], : mask.shape[-1]]
    settings = {"pixels": pixels, "masks": masks, "caption": "a photo of a mug", **changes}
    return Example(**{"owners": ("m",), "source": "a.png", **settings})  # type: ignore[arg-type]


AUGMENTATIONS = [Flip(), RandomResize(), ColorJitter(), Background()]


def test_the_key_in_a_slot_implies_the_kind() -> None:
    recipe = validate(Recipe, {"augment": {"flip": {"p": 1}, "color_jitter": {}}, "masks": {"grow": {"by": 2}}})
    assert [type(a) for a in recipe.augment.values()] == [Flip, ColorJitter] and recipe.masks["grow"] == Grow(by=2)
    with pytest.raises(ValueError, match=r"augment.flap: unknown kind 'flap'. Did you mean 'flip'"):
        validate(Recipe, {"augment": {"flap": {}}})
    with pytest.raises(ValueError, match=r"augment.flip.p = 2"):
        validate(Recipe, {"augment": {"flip": {"p": 2}}})
    with pytest.raises(ValueError, match=r"scale must be two factors from 0.05 to 8, smaller first, not 1.4, 0.4"):
        validate(Recipe, {"augment": {"random_resize": {"scale": [1.4, 0.4]}}})


@pytest.mark.parametrize("part", AUGMENTATIONS, ids=lambda p: p.kind)
def test_every_random_augmentation_is_reproducible_and_keeps_shapes_and_ranges(part: Augmentation) -> None:
    start = example()
    before = start.pixels.clone()
    state = torch.random.get_rng_state()
    many = [part(start, generator) for generator in [seeded(3)] for _ in range(30)]
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert torch.equal(start.pixels, before), "the example was changed in place"
    again = [part(start, generator) for generator in [seeded(3)] for _ in range(30)]
    assert all(torch.equal(a.pixels, b.pixels) and a.caption == b.caption for a, b in zip(many, again, strict=True))
    assert part.random and len({tuple(e.pixels[:, 0].flatten().tolist()) for e in many}) > 1
    for e in many:
        assert e.pixels.shape == (3, 48, 48) and e.pixels.dtype == torch.float32
        assert e.pixels.abs().max() <= 1 and torch.isfinite(e.pixels).all()
        assert e.mask is not None and e.mask.shape == (1, 48, 48) and e.mask.min() >= 0 and e.mask.max() <= 1
        assert e.owner == "m" and e.source == "a.png" and e.role == "instance"
    only = part.model_copy(update={"roles": ("prior",)})
    assert only(start, seeded()) is start


def test_augmentations_with_fixed_settings_are_not_random() -> None:
    quiet = [
        Flip(p=0),
        Flip(p=1),
        ColorJitter(brightness=0, contrast=0, saturation=0),
        Background(p=0),
        RandomResize(p=0),
    ]
    for part in quiet:
        assert not part.random
        one, two = part(example(), seeded(1)), part(example(), seeded(2))
        assert torch.equal(one.pixels, two.pixels) and one.caption == two.caption


def test_flip_mirrors_everything_unless_the_caption_names_a_side() -> None:
    start = example(valid=torch.rand(1, 48, 48, generator=seeded()))
    out = Flip(p=1)(start, seeded())
    for name in ("pixels", "mask", "valid"):
        assert torch.equal(getattr(out, name), getattr(start, name).flip(-1))
    assert out.pixels[1, 0, 0] == start.pixels[1, 0, -1] != start.pixels[1, 0, 0]
    for caption in ("a mug on the left", "Right of it"):
        sided = example(caption=caption)
        assert Flip(p=1)(sided, seeded()) is sided
    assert torch.equal(Flip(p=1)(example(caption="a bright leftover"), seeded()).pixels, out.pixels)
    share = sum(Flip()(start, g) is not start for g in [seeded()] for _ in range(400)) / 400
    assert 0.43 < share < 0.57


def test_random_resize_also_updates_the_mask_the_valid_area_and_the_caption() -> None:
    start, captions = example(64), set()
    generator = seeded()
    for _ in range(200):
        out = RandomResize(margin=0)(start, generator)
        assert out.valid is not None and out.mask is not None
        words = out.caption.removeprefix("a photo of a mug").removeprefix(", ")
        captions.add(words)
        rows = int(out.valid[0].amax(1).sum())
        assert 26 <= rows <= 64 and out.valid.sum() == rows * rows  # 0.4 * 64 = 25.6
        factor = rows / 64
        assert (words in ("very small", "far away")) == (rows < 0.6 * 64 - 0.5) or abs(factor - 0.6) < 0.02
        if words in ("zoomed in", "close up"):
            assert out.valid.min() == 1
        padding = out.valid[0] == 0
        assert out.pixels[:, padding].eq(0).all() and out.mask[0, padding].eq(0).all()
        inside = (out.mask > 0.9) & (out.valid == 1)
        assert out.pixels[0][inside[0]].min() > 0.3  # the picture and its mask moved together
    assert captions == {"", "very small", "far away", "zoomed in", "close up"}


def test_random_resize_with_a_fixed_factor_is_a_plain_resize() -> None:
    start = example(64, caption="")
    half = RandomResize(scale=(0.5, 0.5), margin=4)(start, seeded())
    assert half.caption == "" and half.valid is not None
    ys, xs = half.valid[0].nonzero(as_tuple=True)
    # A border of 4 on each side leaves 24 of the 32 pixels, and their indices differ by at most 23.
    assert (int(ys.max() - ys.min()), int(xs.max() - xs.min())) == (23, 23)
    top, left = int(ys.min()) - 4, int(xs.min()) - 4
    expected = F.interpolate(start.pixels[None], size=32, mode="bicubic", antialias=True).clamp(-1, 1)[0]
    torch.testing.assert_close(half.pixels[:, top : top + 32, left : left + 32], expected)
    same = RandomResize(scale=(1, 1))(example(), seeded())
    torch.testing.assert_close(same.pixels, example().pixels, atol=1e-5, rtol=0)
    assert same.caption == "a photo of a mug" and same.valid is not None and same.valid.min() == 1


def test_random_resize_keeps_existing_padding() -> None:
    valid = torch.ones(1, 48, 48)
    valid[:, :, :24] = 0
    out = RandomResize(scale=(2, 2))(example(valid=valid), seeded(1))
    assert out.valid is not None and 0 < out.valid.mean() < 1


def test_color_jitter_is_slight_and_leaves_padding_unchanged() -> None:
    valid = torch.ones(1, 48, 48)
    valid[:, :10] = 0
    start = example(valid=valid)
    for seed in range(20):
        out = ColorJitter()(start, seeded(seed))
        assert torch.equal(out.pixels[:, :10], start.pixels[:, :10])
        assert 0 < (out.pixels - start.pixels).abs().mean() < 0.2 and out.masks is start.masks
    grey = example(pixels=torch.full((3, 48, 48), 0.2))
    out = ColorJitter(brightness=0, contrast=0, saturation=0.9)(grey, seeded())
    torch.testing.assert_close(out.pixels, grey.pixels, atol=1e-5, rtol=0)  # grey has no saturation
    bright = ColorJitter(brightness=0.2, contrast=0, saturation=0)(grey, seeded(5)).pixels
    assert bright.std() < 1e-6 and 0.6 * 0.8 - 1e-6 <= float((bright.mean() + 1) / 2) <= 0.6 * 1.2 + 1e-6


def test_background_replaces_everything_outside_the_mask() -> None:
    start = example()
    assert start.mask is not None
    inside = start.mask[0] == 1
    for fill in ("color", "noise", "grey"):
        out = Background(p=1, fills=(fill,))(start, seeded(2))
        assert torch.equal(out.pixels[:, inside], start.pixels[:, inside])
        ground = out.pixels[:, ~inside]
        assert not torch.equal(ground, start.pixels[:, ~inside])
        assert (ground.std(1).max() < 1e-6) == (fill != "noise") and (float(ground.abs().max()) == 0) == (
            fill == "grey"
        )
    share = sum(Background(p=0.25)(start, g) is not start for g in [seeded()] for _ in range(400)) / 400
    assert 0.19 < share < 0.31
    with pytest.raises(ValueError, match=r"augment background needs a mask for a\.png"):
        Background()(example(mask=None), seeded())
    prior = example(mask=None, role="prior")
    assert Background()(prior, seeded()) is prior


# --- masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [Given(), Grow(by=3, soften=1), Box(margin=1)], ids=lambda p: p.kind)
def test_mask_parts_are_deterministic_and_change_only_the_mask(part: MaskPart) -> None:
    start = example()
    out, again = part(start, seeded(1)), part(start)
    assert not part.random and torch.equal(out.pixels, start.pixels)
    assert out.mask is not None and again.mask is not None and torch.equal(out.mask, again.mask)
    assert out.mask.shape == (1, 48, 48) and out.mask.dtype == torch.float32
    bare = example(mask=None)
    assert part(bare) is bare


def test_given_masks_can_be_required_and_binarized() -> None:
    with pytest.raises(ValueError, match=r"a\.png has no mask, but this recipe requires one. Put a mask with"):
        Given(require=True)(example(mask=None))
    prior = example(mask=None, role="prior")
    assert Given(require=True)(prior) is prior
    out = Given(threshold=0.5)(example(mask=torch.tensor([[[0.2, 0.5, 0.51]]])))
    assert out.mask is not None and out.mask.tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 30])
def test_grow_dilates_with_a_disc(radius: int) -> None:
    mask = (torch.rand(1, 24, 40, generator=seeded()) > 0.99).float() * torch.rand(1, 24, 40, generator=seeded(1))
    out = Grow(by=radius)(example(mask=mask)).mask
    y, x = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    expected = torch.zeros(24, 40)
    for py, px in mask[0].nonzero().tolist():
        near = (y - py) ** 2 + (x - px) ** 2 <= radius**2
        expected = torch.maximum(expected, near * mask[0, py, px])
    assert out is not None and torch.equal(out[0], expected)


def test_grow_can_also_shrink_and_soften() -> None:
    start = example()
    assert start.mask is not None
    small = Grow(by=-3)(start).mask
    assert small is not None and small.sum() == (12 - 6) * (18 - 6)
    soft = Grow(soften=2.0)(start).mask
    assert soft is not None and soft.sum() == pytest.approx(float(start.mask.sum()), rel=1e-4)
    # The centre of this pixel is half a pixel outside the mask, where the blur gives 1 - Phi(0.25).
    assert soft[0, 24, 24] == pytest.approx(0.5 - 0.5 * 0.19741, abs=0.02)
    whole = Grow(soften=3.0)(example(mask=torch.ones(1, 48, 48))).mask
    assert whole is not None
    torch.testing.assert_close(whole, torch.ones(1, 48, 48))  # no dark border


def test_box_is_the_rectangle_around_the_mask() -> None:
    mask = torch.zeros(1, 20, 30)
    mask[0, 4, 6] = mask[0, 9, 2] = 1
    mask[0, 19, 29] = 0.3
    out = Box()(example(mask=mask)).mask
    wide = Box(margin=100)(example(mask=mask)).mask
    none = Box()(example(mask=torch.zeros(1, 4, 4))).mask
    assert out is not None and wide is not None and none is not None
    assert out.sum() == 6 * 5 and out[0, 4:10, 2:7].min() == 1
    assert wide.min() == 1 and none.max() == 0
