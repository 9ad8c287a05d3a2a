"""Trains the toybox's motion module on captioned clips.

The module consists of temporal layers that are inserted between the layers of the frozen U-Net (AnimateDiff,
https://arxiv.org/abs/2307.04725, section 4.2). The embeddings of the motion words (see `motion_words`) are trained
together with the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.optimizers import AdamW
from shared.pretrain.batch_shares import BatchShares
from shared.pretrain.prefetch import Prefetch
from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask, decay_groups
from shared.pretrain.toybox import clip_dataset, models
from shared.pretrain.toybox.clip_latents import ClipLatents
from shared.pretrain.toybox.clip_latents import build as build_latents
from shared.pretrain.toybox.denoising_loss import draw_times
from shared.pretrain.toybox.motion_words import add_words
from shared.pretrain.toybox.visible_words import WordTraining, make_visible
from shared.train.averages import Averages
from shared.train.loop import generator
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_ADAMW = AdamW(betas=(0.9, 0.99), weight_decay=1e-2, warmup=100, schedule="linear", decay=0.5)
_WORDS = WordTraining()


@dataclass(frozen=True)
class MotionTraining:
    """Settings for training the motion module.

    lr: the peak learning rate of the motion module
    word_lr: the peak learning rate of the embeddings of motion words. It is low because, at ten times this rate, words
        that do not help early in training drift to values that the network ignores.
    words: settings for preparing the words before training
    short: the initial fraction of the steps, during which batches contain twice as many clips, but only every second
        frame of each clip (8 of 16)
    t_uniform, t_mean: see `draw_times`. Motion is determined at higher noise levels than appearance.
    moving_weight: the loss weight of the time-varying part of the error; the error's mean over time has weight 1
    """

    batch: int = 4  # clips per step if they have 16 frames; twice as many if they have 8
    heads: int = 4
    most_frames: int = 32
    lr: float = 1e-3
    word_lr: float = 1e-4
    words: WordTraining = _WORDS
    optimizer: AdamW = _ADAMW
    caption_dropout: float = 0.1
    t_uniform: float = 0.25
    t_mean: float = 1.0
    thing_weight: float = 3.0
    moving_weight: float = 3.0
    short: float = 0.5
    ema: float = 0.999
    seed: int = 0


@dataclass(frozen=True)
class ClipBatch:
    """One step's random inputs."""

    latents: Tensor  # [B, C, F, h, w], scaled
    ids: Tensor  # [B, L]
    noise: Tensor  # [B, C, F, h, w]
    t: Tensor  # [B] in [0, 1000)
    weight: Tensor  # [B, F, h, w] loss weights, 1 on average

    def split(self, count: int) -> list[ClipBatch]:
        """Splits the batch into `count` equal shares. Each share consists of every `count`-th row."""
        return [ClipBatch(*(value[i::count] for value in vars(self).values())) for i in range(count)]


class MovingDenoiser(nn.Module):
    """The frozen text model and U-Net, with motion modules added. Only the motion modules and the embeddings of the
    motion words are trained.

    Args:
        pipe: the picture pipeline; the motion words are added to its tokenizer and text model
        settings: the settings for training the motion module
    """

    def __init__(self, pipe: StableDiffusionPipeline, settings: MotionTraining) -> None:
        from diffusers import UNetMotionModel

        super().__init__()
        self.word_ids = add_words(pipe.tokenizer, pipe.text_encoder)
        self.text_encoder: Any = pipe.text_encoder.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            adapter = build_adapter(pipe.unet, settings)
        unet: Any = UNetMotionModel.from_unet2d(pipe.unet, adapter)
        self.unet: Any = unet.requires_grad_(False).train()
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_("motion_modules" in name)
        for name, module in self.unet.named_modules():
            if isinstance(module, nn.GroupNorm) and "motion_modules" in name:
                module.register_forward_pre_hook(_contiguous)
        table = self.text_encoder.get_input_embeddings()
        self.words = nn.Parameter(table.weight.detach()[self.word_ids].clone())
        place = torch.full((len(table.weight),), -1)
        place[self.word_ids] = torch.arange(len(self.word_ids))
        self.register_buffer("place", place, persistent=False)
        table.register_forward_hook(self._learned_rows)

    def motion_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the motion modules, by their names in a `MotionAdapter`."""
        return {name: p for name, p in self.unet.named_parameters() if "motion_modules" in name}

    def _learned_rows(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Replaces the embeddings of motion words with the learned ones."""
        place = self.place[args[0]]  # pyright: ignore[reportIndexIssue]
        return torch.where((place >= 0)[..., None], self.words[place.clamp_min(0)], out)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicts v ([B, C, F, h, w]) from noisy latents of the same shape, timesteps [B] and token ids [B, L]."""
        context = self.text_encoder(input_ids=ids).last_hidden_state
        return self.unet(noisy, t, encoder_hidden_states=context.repeat_interleave(noisy.shape[2], dim=0)).sample


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Makes the input of a group norm contiguous. In channels-last format, PyTorch crashes if the parameters need
    gradients but the input does not. This happens in the first motion module, which follows frozen layers."""
    return (args[0].contiguous(), *args[1:])


def build_adapter(unet: Any, settings: MotionTraining = MotionTraining()) -> Any:
    """Builds a new `MotionAdapter` for a picture U-Net. It has one temporal block per layer, and each block initially
    computes the identity."""
    from diffusers import MotionAdapter

    adapter: Any = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=settings.heads,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=settings.most_frames,
    )
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            nn.init.zeros_(parameter)
    return adapter


class MotionTask(PretrainTask):
    """The task that trains the motion module on cached latents of clips.

    Args:
        steps: the number of steps in the whole run. Clips have 8 frames during the initial fraction `settings.short` of
            these steps.
        workers: the number of threads, each of which takes an equal share of every batch. Results are bit-identical
            only for the same number of threads.
    """

    def __init__(
        self,
        settings: MotionTraining,
        data: ClipLatents,
        pipe: StableDiffusionPipeline,
        steps: int,
        compute: Compute,
        workers: int = 1,
    ) -> None:
        if settings.batch % workers:
            raise ValueError(f"a batch of {settings.batch} cannot be split equally among {workers} workers")
        self.settings, self.data, self.compute, self.steps = settings, data, compute, steps
        self.seed, self.batch_size = settings.seed, settings.batch
        self.shares = BatchShares(workers)
        self.net = MovingDenoiser(pipe, settings).to(compute.device)
        if compute.device.type == "cpu":
            self.net.text_encoder.set_attn_implementation("eager")
        models.lay_out(self.net.unet, compute)
        self.drawn = Prefetch(self.draw, compute.device)
        own = {**{f"unet.{name}": p for name, p in self.net.motion_parameters().items()}, "words": self.net.words}
        # In bf16 runs, all layers are in bf16, because casting to and from fp32 around each norm would take most of the
        # GPU's time.
        self.half = {name: nn.Parameter(p.detach().clone()) for name, p in own.items()} if compute.bf16 else None
        if self.half is not None:
            self.net.to(torch.bfloat16).requires_grad_(False)
        self.trained = {name.removeprefix("unet."): p for name, p in (self.half or own).items()}
        self.averages = Averages(self.trained, settings.ema)
        self.modules = {"model": _Named(self.trained)}
        self.optimizers = {"main": settings.optimizer}
        self.facts = {"seed": settings.seed, "batch": settings.batch, "heads": settings.heads, "pictures_of": data.mark}
        self.bars = models.alphas_bar().to(compute.device)
        self.pipe = pipe

    def groups(self) -> dict[str, list[TrainableGroup]]:
        modules = nn.ParameterList(p for name, p in self.trained.items() if name != "words")
        words = TrainableGroup("words", [self.trained["words"]], self.settings.word_lr, 0.0)
        return {"main": [*decay_groups(modules, self.settings.lr, self.settings.optimizer.weight_decay or 0.0), words]}

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss."""
        batch = self.drawn(step)
        yield Update(self.shares.mean_loss(self._loss, batch.split(self.shares.workers), list(self.trained.values())))

    def draw(self, step: int) -> ClipBatch:
        """Draws the batch of a step. The batch depends only on the settings, the step and the data."""
        settings, g = self.settings, generator(self.seed, step)
        short = step < settings.short * self.steps
        b, stride = (2 * settings.batch, 2) if short else (settings.batch, 1)
        index = torch.randint(len(self.data), (b,), generator=g).numpy()
        first = int(torch.randint(stride, (), generator=g))
        latents, covered = (torch.from_numpy(x).float() for x in self.data.take(index, first, stride))
        variant = torch.randint(self.data.tokens.shape[1], (b,), generator=g).numpy()
        ids = torch.from_numpy(self.data.tokens[index, variant].astype(np.int64))
        dropped = torch.rand(b, generator=g) < settings.caption_dropout
        ids = torch.where(dropped[:, None], torch.from_numpy(self.data.empty)[None], ids)
        weight = 1 + (settings.thing_weight - 1) * covered / 255
        times = draw_times(b, settings.t_uniform, settings.t_mean, g)
        noise = torch.randn(latents.shape, generator=g)
        batch = ClipBatch(latents, ids, noise, times, weight / weight.mean())
        return ClipBatch(*(value.to(self.compute.device) for value in vars(batch).values()))

    def _loss(self, batch: ClipBatch) -> Tensor:
        bar = self.bars[batch.t].view(-1, 1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        noisy = alpha * batch.latents + sigma * batch.noise
        target = alpha * batch.noise - sigma * batch.latents
        error = self._predict(noisy, batch).float() - target
        moving, weight = error - error.mean(2, keepdim=True), batch.weight[:, None]
        more = self.settings.moving_weight - 1
        return (weight * (error.square() + more * moving.square())).mean()

    def _predict(self, noisy: Tensor, batch: ClipBatch) -> Tensor:
        if self.half is None:
            return self.net(noisy, batch.t, batch.ids)
        cast = {name: p.bfloat16() for name, p in self.half.items()}
        return torch.func.functional_call(self.net, cast, (noisy.bfloat16(), batch.t, batch.ids))


class _Named(nn.Module):
    """Holds another module's parameters under their dotted names, which checkpoints also use."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.list = nn.ParameterList(parameters.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {name: p.detach() for name, p in zip(self.names, self.list, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if set(state_dict) != set(self.names):
            raise RuntimeError(
                f"the names of {len(state_dict)} tensors do not match those of {len(self.names)} parameters"
            )
        for name, parameter in zip(self.names, self.list, strict=True):
            if state_dict[name].shape != parameter.shape:
                raise RuntimeError(
                    f"{name} has shape {list(state_dict[name].shape)}, but must have {list(parameter.shape)}"
                )
            parameter.copy_(state_dict[name])


def motion_folder(work: Path) -> Path:
    """Returns the folder for the motion module's checkpoint and log."""
    return work / "training" / "motion"


def train_motion(work: Path, backbone: Path, run: RunSettings, settings: MotionTraining = MotionTraining()) -> Path:
    """Trains a motion module for a finished backbone on the clips in `work/clips`. Returns the folder with the
    checkpoint and the log.

    `run.steps` is the number of steps in the whole run, which uses 8-frame clips at first and 16-frame clips later.
    After `run.minutes`, the run pauses and can be resumed.
    """
    from diffusers import StableDiffusionPipeline

    from shared.train import checkpoint

    if run.steps is None:
        raise ValueError("set the number of steps, which is divided between 8-frame and 16-frame clips")
    pipe = StableDiffusionPipeline.from_pretrained(str(backbone), torch_dtype=torch.float32)
    folder, workers = motion_folder(work), run.threads or torch.get_num_threads()
    compute = run.compute()
    if compute.device.type == "cpu":
        torch.set_num_threads(1)
    else:
        workers = 1
    clips = clip_dataset.load(work / "clips")
    add_words(pipe.tokenizer, pipe.text_encoder)  # must precede the tokenization of captions
    data = build_latents(work / "clip-latents", clips, pipe.vae, pipe.tokenizer, compute.device)
    if not (run.resume and checkpoint.load(folder) is not None):
        _prepare_words(pipe, data, settings, compute)
    task = MotionTask(settings, data, pipe, run.steps, compute, workers)
    run_task(task, run, folder)
    return folder


def _prepare_words(
    pipe: StableDiffusionPipeline, data: ClipLatents, settings: MotionTraining, compute: Compute
) -> None:
    """Makes the motion words visible to the motion modules, using the clips' first frames."""
    pipe.unet.to(compute.device)
    pipe.text_encoder.to(compute.device)
    first = data.take(range(min(len(data), 500)))[0][:, :, 0]
    log = make_visible(
        pipe, add_words(pipe.tokenizer, pipe.text_encoder), torch.from_numpy(first).to(compute.device), settings.words
    )
    if log:
        said = "  ".join(f"{name} {value:.3f}" for name, value in log[-1].items())
        print(f"words: {len(log)} steps  {said}", flush=True)


def averaged(work: Path, backbone: Path, settings: MotionTraining = MotionTraining()) -> tuple[Any, Any]:
    """Returns, in fp32, the picture pipeline with the learned words, and the learned `MotionAdapter`. The learned
    parameters have their averaged values."""
    from diffusers import StableDiffusionPipeline

    from shared.pretrain.task import average_of
    from shared.train import checkpoint

    state = checkpoint.load(motion_folder(work))
    if state is None:
        raise ValueError(f"no motion module in {work}: train one first (`pcs toybox train motion`)")
    average = average_of(state.learned)
    pipe = StableDiffusionPipeline.from_pretrained(str(backbone), torch_dtype=torch.float32)
    ids = add_words(pipe.tokenizer, pipe.text_encoder)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[ids] = average.pop("words")
    adapter: Any = build_adapter(pipe.unet, settings)
    missing, extra = adapter.load_state_dict(average, strict=False)
    left = [name for name in missing if "pos_embed" not in name]
    assert not left and not extra, (left[:3], extra[:3])
    return pipe, adapter
