"""The public interface for training and generation, and saved concepts that reproduce the same pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.backbones.flux import FluxBackbone
from shared.backbones.load import WORLDS
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.concept import export, read, save
from shared.io.contact_sheets import read_metadata, to_image
from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.base import Runner, attached
from shared.runner.open_runner import open_runner, parse_concept
from shared.runner.plan import warn_unseen
from shared.runner.png_metadata import metadata
from shared.sampling.inversion import NoisePrior
from shared.sampling.settings import SamplingSettings
from tests.core.runs import sample

TINY = ("backbone=tiny", "train.steps=2", "train.batch_size=2", "train.resolution=32", "sampling.steps=2")
TOKENS, LORA = "trainable.tokens.lr=0.5", "trainable.lora.lr=0.05"
STRONG = (TOKENS, LORA)
CLASS = ("sources.class_pictures.num_images=2", "sources.class_pictures.steps=1")
FAST: dict[str, Any] = {"steps": 3, "guidance": 3.0, "height": 32, "width": 32}
SCENE = "a photo of a <mug> on the beach"


def pictures(runner: Runner, prompt: str = SCENE, seeds=(0, 1), base: bool = False, **settings: Any) -> Tensor:
    return runner.generate([prompt] * len(seeds), list(seeds), SamplingSettings(**{**FAST, **settings}), base=base)


def on(folder: Path, *loaded: tuple[Path, float]) -> Runner:
    runner = ImageRunner(load_backbone(folder))
    for path, strength in loaded:
        runner.load(read(path), strength)
    return runner


# --- saved concepts -----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "extra"),
    [
        ("sd", "pivotal_tuning", STRONG),
        ("sd_v", "dreambooth_lora", (LORA, *CLASS)),
        ("sd", "textual_inversion", (TOKENS,)),
        ("flux", "pivotal_tuning", STRONG),
    ],
)
def test_a_saved_concept_reproduces_its_pictures_elsewhere_bit_for_bit(request, photos, tmp_path, family, name, extra):
    make = request.getfixturevalue(f"make_tiny_{family}")
    wrap = FluxBackbone if family == "flux" else StableDiffusionBackbone
    recipe = load(name, [*TINY, *extra])
    runner = ImageRunner(wrap(make(), "tiny"))
    look = {c: repr(m) for c, m in runner.backbone.components.items()}
    settings = {"guidance": 1.0} if family == "flux" else {}
    plain = sample(runner.backbone, ["a photo of a mug on the beach"], seeds=[0, 1], **{**FAST, **settings})
    made = runner.personalize({"mug": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    pixels = pictures(runner, **settings)
    assert not torch.allclose(pixels, plain, atol=1e-3), "something was learned"
    save(made["mug"], tmp_path / "mug.concept")
    concept = read(tmp_path / "mug.concept")
    other = ImageRunner(wrap(make(), "tiny"))
    other.load(concept)
    assert torch.equal(pictures(other, **settings), pixels)
    other.unload("mug")
    assert {c: repr(m) for c, m in other.backbone.components.items()} == look
    assert torch.equal(
        sample(other.backbone, ["a photo of a mug on the beach"], seeds=[0, 1], **{**FAST, **settings}), plain
    )
    meta = concept.meta
    assert (meta.name, meta.class_noun, meta.kind, meta.recipe["method"]) == ("mug", "mug", "subject", name)
    assert meta.metrics["training_seconds"] > 0 and len(meta.references) == 3
    assert bool(meta.ports) == (family == "flux")


@pytest.mark.parametrize("family", ["sd", "sd_v"])
def test_pixels_equal_those_that_diffusers_generates_with_the_exported_concept(request, photos, tmp_path, family):
    make = request.getfixturevalue(f"make_tiny_{family}")
    runner = ImageRunner(StableDiffusionBackbone(make(), "tiny"))
    recipe = load("pivotal_tuning", [*TINY, *STRONG])
    made = runner.personalize({"mug": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    export(made["mug"], tmp_path / "out", backbone=runner.backbone)
    pipe = make()
    pipe.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "out" / "learned_embeds.safetensors"))
    with torch.no_grad():
        theirs = pipe(
            "a photo of a <mug> mug on the beach",
            negative_prompt="blurry",
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            height=32,
            width=32,
            output_type="pt",
        ).images
    ours = pictures(runner, seeds=[5], negative="blurry")
    assert torch.allclose(ours / 2 + 0.5, theirs, atol=1e-5)
    assert not torch.allclose(ours, pictures(runner, seeds=[5], negative="blurry", base=True), atol=1e-2)


def test_flux_pixels_equal_those_that_diffusers_generates_with_the_exported_lora(make_tiny_flux, photos, tmp_path):
    runner = ImageRunner(FluxBackbone(make_tiny_flux(), "tiny"))
    recipe = load("dreambooth_lora", [*TINY, LORA, "regularize=null", "sources.class_pictures=null"])
    made = runner.personalize({"mug": read_subject(photos, "mug")}, recipe, tmp_path / "run", tensorboard=False)
    export(made["mug"], tmp_path / "out", backbone=runner.backbone)
    pipe = make_tiny_flux()
    pipe.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        theirs = pipe(
            "a photo of a sks mug on the beach",
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            height=32,
            width=32,
            max_sequence_length=48,
            output_type="pt",
        ).images
    assert torch.allclose(pictures(runner, seeds=[5]) / 2 + 0.5, theirs, atol=1e-5)


# --- concepts together -----------------------------------------------------------------------


def test_the_base_is_the_model_without_any_concept(tiny_folder, concepts):
    runner = on(tiny_folder, (concepts["mug"], 1.0), (concepts["rex"], 1.0))
    base = runner.generate(["a photo of a <mug> and a <rex>"], [3], SamplingSettings(**FAST), base=True)
    bare = sample(load_backbone(tiny_folder), ["a photo of a mug and a dog"], seeds=[3], **FAST)
    assert torch.equal(base, bare)
    with_one = on(tiny_folder, (concepts["rex"], 1.0)).generate(["a photo of a <rex>"], [3], SamplingSettings(**FAST))
    assert not torch.allclose(
        with_one, sample(load_backbone(tiny_folder), ["a photo of a dog"], seeds=[3], **FAST), atol=1e-3
    )


def test_several_concepts_can_be_loaded_each_with_its_own_strength(tiny_folder, concepts):
    prompt = "a photo of a <mug> and a <rex>"
    both = on(tiny_folder, (concepts["mug"], 1.0), (concepts["rex"], 1.0))
    assert both.strengths == {"mug": 1.0, "rex": 1.0}
    full = pictures(both, prompt)
    half = pictures(on(tiny_folder, (concepts["mug"], 1.0), (concepts["rex"], 0.5)), prompt)
    none = pictures(on(tiny_folder, (concepts["mug"], 1.0), (concepts["rex"], 0.0)), prompt)
    assert not torch.allclose(full, half, atol=1e-3) and not torch.allclose(half, none, atol=1e-3)
    alone = on(tiny_folder, (concepts["mug"], 1.0)).generate(
        ["a photo of a <mug> and a sks dog"] * 2, [0, 1], SamplingSettings(**FAST)
    )
    assert torch.equal(none, alone), "at strength 0, an adapter has no effect"
    turned = pictures(on(tiny_folder, (concepts["rex"], 1.0), (concepts["mug"], 1.0)), prompt)
    assert torch.allclose(full, turned, atol=1e-4), "the order of loading does not matter"
    both.unload("rex")
    assert torch.equal(
        both.generate(["a photo of a <mug>"], [0], SamplingSettings(**FAST)),
        on(tiny_folder, (concepts["mug"], 1.0)).generate(["a photo of a <mug>"], [0], SamplingSettings(**FAST)),
    )


def test_attached_concepts_are_removed_afterwards(tiny_folder, concepts):
    runner = on(tiny_folder)
    with pytest.raises(ValueError, match="already"), attached(runner, [(read(concepts["mug"]), 1.0)] * 2):
        pass
    assert not runner.loaded and not runner.backbone.placeholders and not runner.backbone.adapters
    with attached(runner, [(read(concepts["mug"]), 0.5)]):
        assert runner.strengths == {"mug": 0.5}
    assert not runner.loaded


def test_a_picture_does_not_depend_on_its_neighbours(tiny_folder, concepts):
    runner = on(tiny_folder, (concepts["mug"], 1.0))
    many = pictures(runner, seeds=range(10))
    assert torch.allclose(many[9:], pictures(runner, seeds=[9]), atol=1e-4)


def test_a_new_concept_can_be_learned_alongside_a_loaded_one(tiny_folder, concepts, photos, tmp_path):
    runner = on(tiny_folder, (concepts["rex"], 1.0))
    before = runner.generate(["a photo of a <rex>"], [0], SamplingSettings(**FAST))
    with pytest.raises(ValueError, match="'rex' is already loaded"):
        runner.personalize({"rex": read_subject(photos, "mug")}, load("pivotal_tuning", TINY), tmp_path / "a")
    made = runner.personalize(
        {"mug": read_subject(photos, "mug")},
        load("pivotal_tuning", [*TINY, *STRONG]),
        tmp_path / "b",
        tensorboard=False,
    )
    assert set(runner.loaded) == {"mug", "rex"} and runner.strengths == {"mug": 1.0, "rex": 1.0}
    assert {k.split(".")[0] for k in made["mug"].of("adapter")} == {"lora"}, (
        "the new concept does not contain the other concept's adapter"
    )
    runner.unload("mug")
    assert torch.equal(runner.generate(["a photo of a <rex>"], [0], SamplingSettings(**FAST)), before)


def test_two_subjects_in_one_run_become_two_concepts(tiny_folder, photos, painted, tmp_path):
    runner = on(tiny_folder)
    subjects = {"mug": read_subject(photos, "mug"), "rex": read_subject(painted(tmp_path / "dogs", seed=1), "dog")}
    made = runner.personalize(subjects, load("pivotal_tuning", [*TINY, *STRONG]), tmp_path / "run", tensorboard=False)
    prompt = "a photo of a <mug> and a <rex>"
    pixels = pictures(runner, prompt)
    for name, concept in made.items():
        save(concept, tmp_path / f"{name}.concept")
        assert [r.file for r in concept.meta.references] == ["0.png", "1.png", "2.png"]
    again = on(tiny_folder, (tmp_path / "rex.concept", 1.0), (tmp_path / "mug.concept", 1.0))
    assert torch.equal(pictures(again, prompt), pixels)
    again.unload("rex")
    one = pictures(again)
    assert torch.equal(one, pictures(on(tiny_folder, (tmp_path / "mug.concept", 1.0))))


def test_a_failed_run_leaves_the_backbone_unchanged(tiny_folder, photos, tmp_path):
    runner = on(tiny_folder)
    subject = {"mug": read_subject(photos, "mug")}
    look = {c: repr(m) for c, m in runner.backbone.components.items()}
    for settings, message in (
        (["trainable.tokens.lr=1e30", "train.steps=9"], "is nan|not finite"),
        (["train.resolution=33"], "multiples of"),
        (["sampling.scheduler=magic"], "unknown scheduler 'magic'"),
        (["phases.tune.trainable.lora.roles=[nowhere]"], "unknown role 'nowhere'"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            runner.personalize(subject, load("pivotal_tuning", [*TINY, *settings]), tmp_path / "run", tensorboard=False)
        assert not runner.loaded and not runner.backbone.placeholders and not runner.backbone.adapters
        assert {c: repr(m) for c, m in runner.backbone.components.items()} == look


def test_validation_pictures_are_generated_in_the_phase_that_requests_them(tiny_folder, photos, tmp_path):
    seen = []

    def score(pixels: Tensor, prompts) -> dict[str, float]:
        seen.append((tuple(pixels.shape), tuple(prompts)))
        return {"score": float(len(seen))}

    settings = ["phases.tune.train.validation.every=1", "phases.tune.train.validation.num=1"]
    prompts = ['phases.tune.train.validation.prompts=["a {concept} in the snow"]']
    recipe = load("pivotal_tuning", [*TINY, *settings, *prompts])
    runner = on(tiny_folder)
    subject = {"mug": read_subject(photos, "mug")}
    made = runner.personalize(subject, recipe, tmp_path / "run", scorers={"mug": score}, tensorboard=False)
    assert seen == [((1, 3, 32, 32), ("a mug in the snow",))] * 2
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["step-000003.png", "step-000004.png"]
    assert made["mug"].meta.metrics["score"] == 2.0


# --- the command line ------------------------------------------------------------------------


def test_the_command_line_trains_and_generates(pcs, learn, concepts, photos, tiny_folder, tmp_path):
    folder = concepts["mug"]
    assert {p.name for p in folder.iterdir()} == {
        *("concept.json", "adapter.safetensors", "embeddings.safetensors", "preview.png")
    }
    training = folder.with_name("mug.training")
    assert not list(training.glob("checkpoint-*")) and (training / "log.jsonl").is_file()
    out = tmp_path / "out"
    made = pcs(
        *("image", "generate", SCENE, "a <mug> in the snow", "--concept", f"{folder}:0.5", "--num", 3, "--seed", 7),
        *("--steps", 2, "--guidance", 2.5, "--scheduler", "euler", "--negative", "blurry", "--grid", "--out", out),
    )
    assert made.code == 0, made.err
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted([*(f"{i:03d}-seed{7 + i % 3}.png" for i in range(6)), "grid.png"])
    assert made.out.split() == [str(out / n) for n in names]
    assert Image.open(out / "grid.png").size >= (96, 64)
    with Image.open(out / "grid.png") as sheet, Image.open(out / "004-seed8.png") as one:
        assert sheet.width < 4 * 40 and one.size == (32, 32)


def test_a_picture_contains_all_settings_needed_to_reproduce_it(pcs, concepts, tiny_folder, tmp_path):
    out = tmp_path / "out"
    arguments = (
        "--concept",
        concepts["mug"],
        "--concept",
        f"{concepts['rex']}:0.5",
        "--steps",
        2,
        "--seed",
        4,
        "--out",
        out,
    )
    assert pcs("image", "generate", "a <mug> beside a <rex>", *arguments).code == 0
    (path,) = out.iterdir()
    text = read_metadata(path)
    about = json.loads(text["pcs"])
    assert text["Description"] == about["prompt"] == "a <mug> beside a <rex>"
    assert about["expanded"] == "a <mug> <mug>_1 mug beside a sks dog" and about["concepts"] == {"mug": 1.0, "rex": 0.5}
    assert about["backbone"] == tiny_folder.name and str(tiny_folder.parents[1]) not in json.dumps(text)
    runner = open_runner(
        ImageRunner, str(tiny_folder), [f"{concepts[n]}:{s}" for n, s in about["concepts"].items()], "cpu"
    )
    assert about["checkpoint"] == runner.backbone.checkpoint
    steered = SamplingSettings(hooks=(NoisePrior(path=tiny_folder / "clip.mp4"),))
    told = json.loads(metadata("a <mug> and a <rex>", 0, runner, steered)["pcs"])
    assert told["hooks"][0]["path"] == "clip.mp4", "metadata must not contain local paths"
    settings = {k: about[k] for k in ("steps", "guidance", "negative", "height", "width")}
    again = runner.generate([about["prompt"]], [about["seed"]], SamplingSettings(**settings))
    assert torch.equal(read_picture(path).pixels, torch.as_tensor(_bytes(again[0])))


def test_the_command_line_can_change_the_strength_between_steps(pcs, concepts, tmp_path):
    def made(name: str, *options: object) -> Path:
        arguments = ("--concept", concepts["rex"], "--steps", 4, "--out", tmp_path / name, *options)
        assert pcs("image", "generate", "a <rex>", *arguments).code == 0
        return next((tmp_path / name).iterdir())

    on, late, zero = made("on"), made("late", "--strength", "rex=0@0,1@0.5"), made("zero", "--strength", "rex=0@0")
    off = tmp_path / "off"
    arguments = ("--concept", f"{concepts['rex']}:0", "--steps", 4, "--out", off)
    assert pcs("image", "generate", "a <rex>", *arguments).code == 0
    pixels = {p: read_picture(p).pixels for p in (on, late, zero, next(off.iterdir()))}
    on_, late_, zero_, off_ = pixels.values()
    assert torch.equal(zero_, off_) and not torch.equal(late_, on_) and not torch.equal(late_, off_)
    (change,) = json.loads(read_metadata(late)["pcs"])["hooks"]
    assert change["kind"] == "strength_schedule" and change["strengths"] == {"rex": {"0.0": 0.0, "0.5": 1.0}}
    messages = {
        ("rex",): "--strength: 'rex' is not a strength schedule",
        ("cup=1@0",): "'cup'",
        ("rex=0@0", "rex=1@0.5"): "--strength: 'rex' is given twice",
    }
    for texts, why in messages.items():
        options = [option for text in texts for option in ("--strength", text)]
        refused = pcs("image", "generate", "a <rex>", "--concept", concepts["rex"], *options, "--out", tmp_path / "no")
        assert refused.code == 2 and why in refused.err and not (tmp_path / "no").exists()


def _bytes(pixels: Tensor) -> Tensor:
    from shared.io.decode import to_pixels

    return to_pixels(to_image(pixels))


def test_the_metadata_includes_the_backbones_defaults(tiny_folder):
    about = json.loads(metadata("a mug", 3, on(tiny_folder), SamplingSettings(guidance=2.0))["pcs"])
    assert {k: about[k] for k in ("steps", "guidance", "height", "width", "seed")} == {
        **{"steps": 50, "guidance": 2.0, "height": 32, "width": 32, "seed": 3}
    }


def test_the_toybox_accepts_photos_with_a_single_warning(make_tiny_sd, photos, painted, tmp_path):
    toybox = StableDiffusionBackbone(make_tiny_sd(), "toybox")
    toybox.world = WORLDS["toybox"]
    with pytest.warns(UserWarning, match="has never seen the real world") as caught:
        warn_unseen(toybox, {"mug": read_subject(photos, "mug")})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unseen(toybox, {"toy": read_subject(painted(tmp_path / "toys", side=64), "mug")})
        warn_unseen(StableDiffusionBackbone(make_tiny_sd(), "x"), {"mug": read_subject(photos, "mug")})


def test_the_default_backbone_is_the_one_that_the_concept_was_learned_on(concepts, tiny_folder):
    assert open_runner(ImageRunner, None, [str(concepts["mug"])], "cpu").backbone.name == str(tiny_folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.concept", ("a.concept", 1.0)), ("a.concept:0.8", ("a.concept", 0.8)), ("x/y:-1", ("x/y", -1.0))],
)
def test_a_concept_is_parsed_with_its_strength(text, expected):
    assert parse_concept(text) == (Path(expected[0]), expected[1])


def test_several_subjects_can_be_learned_through_the_command_line(pcs, learn, photos, painted, tmp_path):
    dogs = painted(tmp_path / "dogs", seed=1)
    subjects = [
        *(f"subjects.mug.images={photos}", "subjects.mug.class_noun=mug"),
        *(f"subjects.rex.images={dogs}", "subjects.rex.class_noun=dog"),
    ]
    made = pcs(*learn("pivotal_tuning", *subjects, f"output={tmp_path / 'all'}", images=None))
    assert made.code == 0, made.err
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"mug.concept", "rex.concept"}
    both = ("--concept", tmp_path / "all" / "mug.concept", "--concept", tmp_path / "all" / "rex.concept")
    assert pcs("image", "generate", "<mug> and <rex>", *both, "--steps", 1, "--out", tmp_path / "out").code == 0
