"""Compares the training speed and peak memory of the suite with those of the public DreamBooth script.

    python tests/bench/bench_script.py [--script PATH] [--steps 12] [--rounds 3] [--backbone PATH] [--roles attention|all]

`--script` is the path to diffusers' examples/dreambooth/train_dreambooth_lora.py. Without it, a plain loop in this file
takes the script's place. As in the script, each step of the loop reads and resizes pictures, runs the autoencoder and
the text encoder, makes one forward pass over the instance and class rows, computes both losses, clips the gradients and
takes an AdamW step. With `--roles all`, the suite and the plain loop adapt all modules that the toybox's recipe adapts.
The script always adapts only the attention modules.

Prints ratios of steps per CPU second and of peak memory. The two arms (the suite and what it is compared with) run in
separate processes and alternate, so drift in machine speed favours neither. Seconds are CPU seconds (user and system).
For the script, they are the difference between two runs of different lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIDE, ROWS, RANK = 64, 4, 16
INSTANCE, CLASS = "a photo of sks duck", "a photo of duck"
WARM_UPS = 3
#: The names of the modules that diffusers' script adapts, and of those that the toybox's recipe adapts as well.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OTHERS = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut")
TARGETS = {"attention": [*ATTENTION], "all": [*ATTENTION, *OTHERS]}
RECIPES = {"attention": "dreambooth_lora_plain", "all": "dreambooth_lora"}


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


class PlainLoop:
    """A plain version of the public script's loop, without caches."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
        from peft import LoraConfig
        from transformers import AutoTokenizer, CLIPTextModel

        folder, draw = options.backbone, torch.Generator().manual_seed(0)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text: Any = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        for network in (self.text, self.vae, self.unet):
            network.float().requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS[options.roles]))
        self.unet.train()
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-2)
        self.files = [sorted((options.folder / name).glob("*.png")) for name in ("pictures", "class")]
        self.draw = draw

    def batch(self) -> tuple[Any, list[str]]:
        import numpy as np
        import torch
        from PIL import Image

        pixels = []
        for files in self.files:
            for place in torch.randint(len(files), (ROWS,), generator=self.draw).tolist():
                picture = Image.open(files[place]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(pixels), [INSTANCE] * ROWS + [CLASS] * ROWS

    def step(self, _index: int) -> None:
        import torch
        from torch.nn import functional as F

        pixels, captions = self.batch()
        latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = self.scheduler.add_noise(latents, noise, t)
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(captions, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
        predicted = self.unet(noisy, t, self.text(ids.input_ids)[0]).sample
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, t) if velocity else noise
        (own, prior), (own_target, prior_target) = predicted.chunk(2), target.chunk(2)
        loss = F.mse_loss(own, own_target) + F.mse_loss(prior, prior_target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        float(loss.detach())


class Suite:
    """The suite's training loop, starting with the first step of a run."""

    def __init__(self, options: argparse.Namespace) -> None:
        from pcs_image.runner import ImageRunner
        from shared.backbones import load_backbone
        from shared.io.read_subject import read_subject
        from shared.recipe.resolve import load
        from shared.train.training_run import TrainingRun

        pictures = options.folder / "pictures"
        settings = [f"subject.images={pictures}", "subject.class_noun=duck", f"backbone={options.backbone}"]
        settings += [f"train.steps={options.steps + WARM_UPS}", f"train.batch_size={ROWS}", f"train.resolution={SIDE}"]
        settings += ["train.validation.every=0", f"trainable.lora.rank={RANK}", "trainable.lora.lr=1e-4"]
        modules = ["self_attention", "cross_attention"]
        modules += ["feed_forward", "conv", "proj"] if options.roles == "all" else []
        settings += [
            f"trainable.lora.roles=[{','.join(modules)}]",
            "objective.masked=false",
            "prompts.user_captions=false",
        ]
        settings += ["sources.class_pictures.num_images=16", "sources.class_pictures.steps=2", *options.set]
        recipe, model = load(RECIPES[options.roles], settings), load_backbone(options.backbone)
        self.run = TrainingRun(
            model, recipe, {"bench": read_subject(pictures, "duck")}, options.folder / "work", options.folder / "cache",
            class_pictures=ImageRunner(model)._class_pictures, tensorboard=False,
        )  # fmt: skip
        self.steps = self.run.steps()

    def step(self, _index: int) -> None:
        next(self.steps)


def measure(options: argparse.Namespace) -> None:
    """Runs one arm. For each number N on standard input, takes N steps and prints the time per step and peak memory."""
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    arm = {"plain": PlainLoop, "suite": Suite}[options.arm](options)
    for index in range(WARM_UPS):
        arm.step(index)
    for line in sys.stdin:
        begun = cpu_seconds()
        for index in range(int(line)):
            arm.step(index)
        seconds = (cpu_seconds() - begun) / int(line)
        print(
            json.dumps({"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True
        )


class OwnArm:
    """An arm that is defined in this file. It runs in a separate process, which waits for its turns."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, __file__, "--arm", name, "--folder", str(folder), "--roles", options.roles]
        command += ["--steps", str(options.steps * options.rounds), "--threads", str(options.threads)]
        command += ["--backbone", options.backbone, *(part for setting in options.set for part in ("--set", setting))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, steps: int) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"an arm ended with exit code {self.process.wait()}")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def of_a_process(command: list[str]) -> tuple[float, int]:
    """Runs a command and returns its CPU seconds and its peak memory in KiB. Raises SystemExit if the command fails."""
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss


class ScriptArm:
    """The given script. Each turn runs it twice with different step counts and takes the difference in time."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder

    def turn(self, steps: int) -> dict[str, float]:
        runs = [self._run(count) for count in (WARM_UPS, WARM_UPS + steps)]
        return {"seconds": (runs[1][0] - runs[0][0]) / steps, "memory": max(peak for _, peak in runs)}

    def _run(self, steps: int) -> tuple[float, int]:
        options, folder = self.options, self.folder
        count = len(list((folder / "class").iterdir()))
        command = [sys.executable, str(options.script), f"--pretrained_model_name_or_path={options.backbone}"]
        command += [f"--instance_data_dir={folder / 'pictures'}", f"--instance_prompt={INSTANCE}", f"--rank={RANK}"]
        command += ["--with_prior_preservation", f"--class_data_dir={folder / 'class'}", f"--class_prompt={CLASS}"]
        command += [f"--resolution={SIDE}", f"--train_batch_size={ROWS}", f"--num_class_images={count}"]
        with tempfile.TemporaryDirectory() as output:
            command += ["--learning_rate=1e-4", f"--max_train_steps={steps}", f"--output_dir={output}"]
            return of_a_process(command)

    def end(self) -> None:
        pass


def pictures(folder: Path) -> None:
    """Writes pictures of the subject and of its class to two folders without other files, as the script requires."""
    import shutil

    from shared.toybox.reference_sets import write_album

    for name, seed, count in (("pictures", 0, 5), ("class", 1, 16)):
        made = write_album("development-duck", folder / f"{name}-made", n=count, seed=seed)
        (folder / name).mkdir()
        for path in made:
            shutil.copy(path, folder / name / path.name)


def report(options: argparse.Namespace) -> None:
    other = "script" if options.script else "plain"
    seconds: dict[str, list[float]] = {"suite": [], other: []}
    memory: dict[str, list[float]] = {"suite": [], other: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures(folder)
        arms = {other: ScriptArm(options, folder) if options.script else OwnArm("plain", options, folder)}
        arms["suite"] = OwnArm("suite", options, folder)
        for _ in range(options.rounds):
            for name, arm in arms.items():
                found = arm.turn(options.steps)
                seconds[name].append(found["seconds"])
                memory[name].append(found["memory"] / 1024)
                spent, peak = found["seconds"] * 1e3, found["memory"] / 1024
                print(f"  {name:7} {spent:8.1f} CPU ms per step, {peak:.0f} MB", flush=True)
        for arm in arms.values():
            arm.end()
    what = "the public script" if options.script else "a plain loop like the public script's"
    ratios = sorted(b / a for a, b in zip(seconds["suite"], seconds[other], strict=True))
    print(f"LoRA on {options.roles}, rank {RANK}, {ROWS} + {ROWS} pictures of {SIDE}x{SIDE}; compared with {what}:")
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds"
    print(f"steps per CPU second: {statistics.median(ratios):.2f} times as many ({spread})")
    print(f"peak memory: {statistics.median(memory['suite']) / statistics.median(memory[other]):.2f} times as much")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--roles", choices=tuple(TARGETS), default="attention")
    parser.add_argument("--backbone", help="a diffusers folder (default: the toybox)")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of the suite's recipe as key=value; can be repeated"
    )
    parser.add_argument("--arm", choices=("plain", "suite"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backbone is None:
        import shared.toybox

        options.backbone = str(Path(shared.toybox.__file__).parent / "weights" / "backbone")
    measure(options) if options.arm else report(options)


if __name__ == "__main__":
    main()
