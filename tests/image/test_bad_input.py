"""Every user error gives one clear message and exit code 2, without a traceback or half-written output."""

from __future__ import annotations

import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.image.refusing import refusing


@pytest.fixture
def refused(pcs, tmp_path) -> Callable[..., str]:
    return refusing(pcs, tmp_path)


@pytest.fixture
def learning(refused, learn, tmp_path) -> Callable[..., str]:
    """Returns a function that starts a run with its output in `tmp_path` and returns its error message.

    The run must be refused.
    """

    def call(*settings: str, images: Path | None = None, recipe: str = "textual_inversion", **options) -> str:
        images = {"images": images} if images else {}
        return refused(*learn(recipe, f"output={tmp_path / 'x.concept'}", *settings, **images, **options))

    return call


# --- pictures --------------------------------------------------------------------------------


def test_missing_pictures_are_reported(refused, learn, learning, tmp_path):
    assert "no pictures: set subject.images=FOLDER" in refused(*learn("textual_inversion", images=None))
    assert f"{tmp_path / 'gone'} does not exist" in learning(images=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert f"no pictures in {tmp_path / 'empty'}: found nothing" in learning(images=tmp_path / "empty")


def test_a_folder_without_pictures_is_reported_with_its_stray_files(learning, tmp_path):
    folder = tmp_path / "stray"
    (folder / "checkpoints").mkdir(parents=True)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "fake.jpg"):
        (folder / name).write_bytes(b"not a picture")
    message = learning(images=folder)
    assert (
        "no pictures in" in message
        and "notes.txt" in message
        and "fake.jpg" in message
        and "checkpoints (a folder)" in message
    )


def test_a_truncated_jpeg_is_refused(learning, painted, tmp_path):
    folder = painted(tmp_path / "photos")
    Image.open(folder / "0.png").resize((256, 256)).save(folder / "cut.jpg", quality=95)
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    message = learning(images=folder)
    assert str(folder / "cut.jpg") in message and "damaged or truncated" in message


def test_a_one_pixel_picture_is_refused(learning, painted, tmp_path):
    folder = painted(tmp_path / "photos")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    assert "dot.png is 1x1 pixels: each side must be at least 16" in learning(images=folder)


def test_a_picture_of_30000_by_30000_pixels_is_refused(learning, painted, tmp_path):
    """The header alone is enough to refuse the picture. The file contains almost no other data."""
    folder = painted(tmp_path / "photos")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    message = learning(images=folder)
    assert "huge.png is 30000x30000 = 900,000,000 pixels, above the limit of" in message


def test_a_mask_that_differs_in_size_from_its_picture_is_refused(learning, painted, tmp_path):
    folder = painted(tmp_path / "photos")
    (folder / "masks").mkdir()
    Image.new("L", (30, 32), 255).save(folder / "masks" / "1.png")
    message = learning(images=folder)
    assert (
        "masks/1.png is 30x32 pixels, but its picture" in message
        and "is 32x32; both must have the same size" in message
    )


# --- names -----------------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused(learning):
    message = learning(recipe="dreambooth_loar")
    assert (
        "unknown recipe 'dreambooth_loar'. Did you mean 'dreambooth_lora'?" in message and "pivotal_tuning" in message
    )
    assert "recipe file mine.yaml does not exist" in learning(recipe="mine.yaml")


def test_code_in_a_hostile_recipe_is_not_executed(learning, tmp_path):
    path, mark = tmp_path / "mine.yaml", tmp_path / "mark"
    path.write_text(f"seed: !!python/object/apply:os.system ['touch {mark}']")
    assert "mine.yaml is not readable YAML, line 1" in learning(recipe=str(path))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.setps=3", "train: unknown key 'setps'. Did you mean 'steps'?"),
        ("trane.steps=3", "unknown key 'trane'. Did you mean 'train'?"),
        (
            "trainable.tokens.rate=3",
            "trainable.tokens: unknown key 'rate'. Available: adapter_set, group, kind, lr, per_source, temporary, "
            "weight_decay",
        ),
        ("trainable.x.kind=lorra", "trainable.x: unknown kind 'lorra'. Did you mean 'lora'?"),
        ("train.steps=many", "train.steps = 'many'"),
        ("train.steps", "'train.steps' is not a setting"),
        ("train.mixed_precision=fp8", "train.mixed_precision: unknown value 'fp8'"),
        ("name=my mug", "name = 'my mug'"),
    ],
)
def test_an_unknown_key_or_value_is_refused(learning, setting, message):
    assert message in learning(setting)


def test_an_output_whose_name_is_not_a_valid_concept_name_is_refused(refused, learn, tmp_path):
    message = refused(*learn("textual_inversion", f"output={tmp_path / 'my mug.concept'}"))
    assert "a concept cannot be called 'my mug'" in message and "name=" in message


def test_an_unknown_role_or_scheduler_and_an_unsupported_precision_are_refused(learning):
    roles = ("trainable.lora.kind=lora", "trainable.lora.roles=[cros_attention]")
    message = learning(*roles)
    assert "unknown role 'cros_attention'. Did you mean 'cross_attention'?" in message and "text_encoder" in message
    assert "unknown scheduler 'magic'" in learning("sampling.scheduler=magic")
    if not torch.cuda.is_available():
        assert "train.mixed_precision=fp16 needs a GPU" in learning("train.mixed_precision=fp16")


def test_a_missing_class_noun_is_reported(learning):
    assert "no subject.class_noun" in learning(recipe="dreambooth_lora", noun="")
    assert "set subject.class_noun or modifier.init" in learning(noun="")


def test_an_unusable_backbone_is_refused(learning, tiny_folder, tmp_path):
    assert "no model at nowhere: no such file or folder" in learning("backbone=nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("x")
    message = learning(f"backbone={tmp_path / 'model'}")
    assert "is not a diffusers folder" in message and "a.txt" in message and "StableDiffusionPipeline" in message
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"a": 1}))
    assert "is not a .safetensors file" in learning(f"backbone={tmp_path / 'model.ckpt'}")
    shutil.copytree(tiny_folder, tmp_path / "broken")
    weights = next((tmp_path / "broken" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"cannot load {tmp_path / 'broken'}" in learning(f"backbone={tmp_path / 'broken'}")


def test_invalid_option_values_are_refused(refused, concepts, photos, tmp_path):
    mug = concepts["mug"]
    assert "unknown format 'kohyaa'" in refused("concept", "export", mug, "--out", tmp_path / "o", "--format", "kohyaa")
    message = refused(
        *(
            "image",
            "evaluate",
            "--concept",
            mug,
            "--prompts",
            "dreambanch",
            "--references",
            photos,
            "--out",
            tmp_path / "o",
        )
    )
    assert "unknown prompt set 'dreambanch'. Did you mean 'dreambench'?" in message
    generate = ("image", "generate", "a <mug>", "--concept", mug, "--out", tmp_path / "o")
    message = refused(*generate, "--scheduler", "eular")
    assert "unknown scheduler 'eular'. Did you mean 'euler'?" in message and "ddim" in message
    assert "choose auto, no, bf16 or fp16" in refused(*generate, "--precision", "fp8")
    assert "--device 'tpu7' cannot be used here" in refused(*generate, "--device", "tpu7")
    assert "multiples of" in refused(*generate, "--height", 33)
    assert "'x' is not a strength" in refused(
        "image", "generate", "a <mug>", "--concept", f"{mug}:x", "--out", tmp_path / "o"
    )
    assert "exactly one --concept" in refused("image", "evaluate", "--out", tmp_path / "o")


def test_invalid_arguments_are_refused_by_the_command_line_parser(pcs, tmp_path):
    for arguments in (
        ("image", "generate"),
        ("image", "generate", "a", "--num", "0", "--out", tmp_path / "o"),
        ("image", "generate", "a", "--seed", "-1", "--out", tmp_path / "o"),
        ("image", "generate", "a", "--seed", 2**70, "--out", tmp_path / "o"),
        ("image", "generate", "a", "--nmu", "2"),
        ("image", "genrate"),
        ("nothing",),
    ):
        ran = pcs(*arguments)
        assert ran.code == 2 and "Error" in ran.err and "Traceback" not in ran.err, arguments
    assert list(tmp_path.iterdir()) == []


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_that_are_too_long_or_do_not_name_the_loaded_concept_are_refused(refused, concepts, tmp_path):
    generate = ("image", "generate", "--concept", concepts["mug"], "--steps", 1, "--out", tmp_path / "o")
    message = refused(*generate, "a photo of a <mug>" + " and a mug" * 20 + " in the snow")
    assert "the prompt is too long" in message and "reads 32 tokens" in message and "in the snow" in message
    assert "too long" in refused(*generate, "a <mug>", "--negative", "bad " * 60)
    assert "<nope>" in refused(*generate, "a <mug>", "--negative", "<nope>")
    message = refused(*generate, "a photo of a mug on the beach")
    assert "'mug' is loaded, but the prompt" in message and "write <mug>" in message
    message = refused(*generate, "a photo of a <mug> and a <dog>")
    assert "names <dog>, which is not loaded; loaded concepts: <mug>" in message
    assert "does not name it" in refused(*generate, "a <mug>", "a mug"), "every prompt is checked"


# --- existing files --------------------------------------------------------------------------


def test_an_existing_output_is_not_changed(refused, pcs, learn, concepts, photos, tmp_path):
    out = tmp_path / "x.concept"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    mug = concepts["mug"]
    for arguments in (
        learn("textual_inversion", f"output={out}"),
        ("image", "generate", "a <mug>", "--concept", mug, "--out", out),
        ("image", "evaluate", "--concept", mug, "--references", photos, "--out", out),
        ("concept", "export", mug, "--out", out),
    ):
        assert f"{out} already exists and contains 1 file" in refused(*arguments)
    assert (out / "mine.txt").read_text() == "keep me"
    (tmp_path / "file").write_text("x")
    assert "is an existing file" in refused(*learn("textual_inversion", f"output={tmp_path / 'file'}"))
    assert "is a file, not a folder" in refused(*learn("textual_inversion", f"output={tmp_path / 'file' / 'x'}"))
    assert "contains files that pcs did not write (mine.txt)" in refused(
        *learn("textual_inversion", f"output={out}"), "--overwrite"
    )
    (out / "mine.txt").unlink()
    assert pcs(*learn("textual_inversion", f"output={out}")).code == 0
    before = (out / "concept.json").read_bytes()
    assert pcs(*learn("textual_inversion", f"output={out}", "seed=1"), "--overwrite").code == 0
    assert (out / "concept.json").read_bytes() != before


def test_overwrite_does_not_delete_files_that_pcs_did_not_write(refused, learn, concepts, painted, tmp_path):
    user_photos = painted(tmp_path / "mine" / "photos")
    for out in (user_photos, user_photos.parent):
        for arguments in (
            learn("textual_inversion", f"output={out}", images=user_photos),
            ("image", "generate", "a <mug>", "--concept", concepts["mug"], "--out", out),
            ("image", "evaluate", "--concept", concepts["mug"], "--references", user_photos, "--out", out),
            ("concept", "export", concepts["mug"], "--out", out),
            ("demo", "--out", out),
            ("toybox", "subjects", "development-duck", "--out", out),
        ):
            message = refused(*arguments, "--overwrite")
            assert "which would be deleted" in message or "which is an input" in message
    assert len(list(user_photos.iterdir())) >= 3


def test_an_output_must_not_lie_inside_an_input(refused, learn, painted, tiny_folder, concepts, tmp_path):
    """The inputs are pictures, masks, other folders named in a recipe, models and concepts."""
    mine, other = painted(tmp_path / "mine"), painted(tmp_path / "other")
    source = ("sources.more.kind=folder", f"sources.more.images={other}", "sources.more.prompt=a mug")
    for out, arguments in (
        (mine / "x.concept", learn("textual_inversion", images=mine)),
        (mine / "masks" / "x.concept", learn("textual_inversion", f"subject.masks={mine / 'masks'}")),
        (other / "x.concept", learn("textual_inversion", *source)),
        (tiny_folder / "x.concept", learn("textual_inversion")),
        (concepts["mug"] / "x.concept", [*learn("textual_inversion"), "--concept", concepts["mug"]]),
    ):
        message = refused(*arguments, f"output={out}")
        assert f"the output {out} lies inside" in message and "which is an input" in message
    for arguments in (
        ("image", "generate", "a <mug>", "--concept", concepts["mug"]),
        ("concept", "export", concepts["mug"]),
        ("concept", "import", tmp_path / "x.safetensors", "--backbone", tiny_folder),
    ):
        message = refused(*arguments, "--out", tiny_folder / "out", "--overwrite")
        assert f"the output {tiny_folder / 'out'} lies inside {tiny_folder}, which is an input" in message
    message = refused("concept", "evaluate", concepts["mug"], "--motion-adapter", other, "--out", other / "out")
    assert f"lies inside {other}, which is an input" in message


def test_a_class_noun_must_be_a_plain_word(refused, learn, tmp_path):
    out = tmp_path / "x.concept"
    assert "class_noun = '<mug>'" in refused(*learn("textual_inversion", f"output={out}", noun="<mug>"))
    assert not out.exists()


def test_overwrite_does_not_delete_the_input_concept(refused, concepts):
    mug = concepts["mug"]
    before = {p: p.read_bytes() for p in mug.rglob("*") if p.is_file()}
    for arguments in (
        ("image", "generate", "a <mug>", "--concept", f"{mug}:0.5", "--out", mug),
        ("image", "evaluate", "--concept", mug, "--out", mug),
        ("concept", "export", mug, "--out", mug),
    ):
        assert f"the output {mug} is {mug}, which is an input" in refused(*arguments, "--overwrite")
    assert {p: p.read_bytes() for p in mug.rglob("*") if p.is_file()} == before


def test_resume_does_not_replace_a_finished_concept(pcs, learn, tmp_path):
    again = learn("textual_inversion", f"output={tmp_path / 'x.concept'}")
    assert pcs(*again).code == 0
    before = (tmp_path / "x.concept" / "concept.json").read_bytes()
    done = pcs(*again, "--resume")
    assert done.code == 0 and "already finished" in done.out
    assert (tmp_path / "x.concept" / "concept.json").read_bytes() == before
