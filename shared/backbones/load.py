"""Loads a backbone from a folder, a file or a hub id. The embedded toybox is the default."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shared.backbones.single_file import is_version_1, write_version_1
from shared.backbones.synthetic_world import World
from shared.config import absent, expanded
from shared.io.failures import of_the_machine
from shared.io.model_folders import check_tokenizer, first_line, load_network, python_command, quiet

if TYPE_CHECKING:
    import torch

    from shared.backbones.protocol import Backbone


def _stable_diffusion(pipe: Any, name: str) -> Backbone:
    from shared.backbones.stable_diffusion import StableDiffusionBackbone

    return StableDiffusionBackbone(pipe, name)


def _flux(pipe: Any, name: str) -> Backbone:
    from shared.backbones.flux import FluxBackbone

    return FluxBackbone(pipe, name)


Wrap = Callable[[Any, str], "Backbone"]  # (pipeline, name as the user gave it) -> backbone
#: The wrapper for each diffusers pipeline class. Packages can add their own; see `register_family`.
FAMILIES: dict[str, Wrap] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "FluxPipeline": _flux,
}
# The entry-point group. An entry's name is a diffusers pipeline class, and its value is the import path of a `Wrap`.
GROUP = "pcs.families"
TOYBOX = "toybox"
#: The synthetic world of each model that was trained on one, by the model's name.
WORLDS: Mapping[str, World] = {
    TOYBOX: World(
        overlay="toybox",
        prompts="toybox",
        instruments="toybox",
        side=64,
        unseen="are not from the toybox, and the toybox has never seen the real world: it will generate toys. For real "
        "photos, set backbone=PATH to a Stable Diffusion folder.",
        find=("from shared.toybox.weights import backbone_path  # returns the toybox's folder", "backbone_path()"),
    )
}
_UNUSED = ("feature_extractor", "image_encoder", "safety_checker")  # parts that are never used and are slow to load
_MAY_DOWNLOAD = "Use --download (download=True) to fetch missing files."
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_backbone(
    source: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    download: bool = False,
    memory: int | None = None,
    prepare: Callable[[Backbone], Backbone] | None = None,
) -> Backbone:
    """Loads the backbone at `source` and freezes it.

    Args:
        source: None or "toybox" for the embedded model; a diffusers folder (with `model_index.json`); a `.safetensors`
            checkpoint of Stable Diffusion 1.x, or of 2.x with its configuration in the folder `NAME/` next to
            `NAME.safetensors` or in the hub's cache; or a hub id `owner/name`
        device: the device to move the backbone to. By default, it stays on the CPU
        dtype: the networks' precision. By default, float32
        download: whether to download files that are not in the hub's cache. If False, nothing is fetched over the internet
        memory: bytes on `device` that the networks may use. If they do not all fit, they take turns on the device (see
            `shared.backbones.placement`). By default, a share of the free memory on a GPU, and no limit elsewhere
        prepare: modifies the backbone before it is moved to the device, for example by adding motion modules

    Raises:
        ValueError: when the backbone cannot be loaded. The message states what was found and lists the available families,
            or names the incomplete file and one of its missing keys.
    """
    import torch

    from shared.backbones.placement import place

    name = TOYBOX if source is None or str(source) == TOYBOX else str(source)
    path = _toybox_path() if name == TOYBOX else expanded(name)
    if name != TOYBOX and path.exists():
        name = str(path.resolve())  # concepts record this name and may be used from another working directory
    dtype = dtype or torch.float32
    if path.is_dir():
        backbone = _from_folder(path, name, dtype)
    elif path.is_file():
        backbone = _from_file(path, name, dtype, download)
    elif _HUB_ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        backbone = _from_folder(_from_hub(name, download), name, dtype)
    else:
        raise ValueError(f"no model at {name}: {absent(path, 'no such file or folder')}. {_families()}")
    backbone.world = WORLDS.get(name)
    if name == TOYBOX:
        _toybox_defaults(backbone)
    backbone = prepare(backbone) if prepare else backbone
    if device is not None:
        place(backbone, torch.device(device), memory)
    return backbone


def _toybox_defaults(backbone: Backbone) -> None:
    """Sets the guidance and the number of steps stated in the toybox's model card."""
    from shared.toybox.weights import sampling_defaults

    stated = sampling_defaults()
    backbone.default_guidance, backbone.default_steps = float(stated["guidance"]), int(stated["steps"])


def register_family(pipeline: str, wrap: Wrap) -> None:
    """Registers a family, so that `load_backbone` opens diffusers pipelines of this class for the rest of the process.

    An installed package can instead register its families in the entry-point group `pcs.families`. The package is then
    imported only when such a model is opened. Raises ValueError when the class already has a family.
    """
    if pipeline in families():
        raise ValueError(f"{pipeline} already has a family, and a pipeline class can have only one")
    FAMILIES[pipeline] = wrap


def families() -> dict[str, Wrap]:
    """Returns the wrapper of each diffusers pipeline class, including the wrappers that installed packages register. The
    packages are not imported.

    Raises ValueError when two families register the same class.
    """
    from importlib.metadata import entry_points

    out = dict(FAMILIES)
    for entry in entry_points(group=GROUP):
        if entry.name in out:
            raise ValueError(
                f"{entry.value} registers {entry.name}, which already has a family. Uninstall one of the packages that "
                "register it."
            )
        out[entry.name] = _imported(entry)
    return out


def _imported(entry: Any) -> Wrap:
    return lambda pipe, name: entry.load()(pipe, name)


def _families() -> str:
    return (
        f"A backbone must be a diffusers folder for one of these pipelines: {', '.join(sorted(families()))}; "
        "omit the backbone to use the toybox."
    )


def _toybox_path() -> Path:
    from shared.toybox.weights import backbone_path

    return Path(backbone_path())


def _from_folder(path: Path, name: str, dtype: torch.dtype) -> Backbone:
    index = path / "model_index.json"
    if not index.is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} is not a diffusers folder: it has no model_index.json. It contains: {inside}. {_families()}"
        )
    return _wrap(_load(_class_of(index), path, dtype, name), name)


def _class_of(index: Path) -> str:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{index} is not readable JSON") from None
    kind = data.get("_class_name") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in families():
        raise ValueError(f"{index.parent} contains a {kind}, which no family here supports. {_families()}")
    return kind


def _load(kind: str, path: Path, dtype: torch.dtype, name: str) -> Any:
    """Loads the pipeline in a folder. Its networks are loaded and checked one by one."""
    import diffusers

    pipeline = getattr(diffusers, kind)
    networks = {
        part: load_network(network, path / part, dtype=dtype)
        for part, network in _networks(pipeline, path, name).items()
    }
    extra: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if kind == "StableDiffusionPipeline":
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet():
            pipe = pipeline.from_pretrained(path, local_files_only=True, **networks, **extra)
    except Exception as error:  # broken files can raise any exception
        if of_the_machine(error):
            raise
        raise ValueError(f"cannot load {name} as {kind}: {first_line(error)}") from error
    for part, network in networks.items():
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            check_tokenizer(getattr(pipe, tokenizer), network.config.vocab_size, path / tokenizer)
    return pipe


def _networks(pipeline: Any, path: Path, name: str) -> dict[str, Any]:
    """Returns the network classes of a diffusers folder, by part. Raises ValueError if the folder lacks a part that the
    pipeline requires or that the folder's index lists (such as Wan's optional second expert)."""
    from torch import nn

    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    parameters = {p.name: p.default is p.empty for p in inspect.signature(pipeline.__init__).parameters.values()}
    named = {part for part in parameters if isinstance(index.get(part), list) and None not in index[part]}
    needed = {part for part, required in parameters.items() if required or part in named} - {"self", *_UNUSED}
    out: dict[str, Any] = {}
    for part in sorted(needed):
        entry = index.get(part)
        if not isinstance(entry, list) or None in entry or not (path / part).is_dir():
            raise ValueError(f"cannot load {name} as {pipeline.__name__}: {path} has no {part}")
        library, kind = map(str, entry)
        part_class = getattr(import_module(library), kind, None) if library in ("diffusers", "transformers") else None
        if part_class is None:
            raise ValueError(f"cannot load {name}: its {part} is a {kind} from {library}, which is not available here")
        if isinstance(part_class, type) and issubclass(part_class, nn.Module):
            out[part] = part_class
    return out


def _from_file(path: Path, name: str, dtype: torch.dtype, download: bool) -> Backbone:
    """Loads a single file, which contains only weights. The configuration and the tokenizer come from the diffusers folder
    `NAME/` next to `NAME.safetensors` if that folder exists (it needs no weights), and from this package for Stable Diffusion
    1.x. Otherwise, they come from the hub's cache, or from the hub itself if `download` is set."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other formats can run code, so they are not supported. {_families()}"
        )
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    beside = path.with_suffix("")
    try:
        with TemporaryDirectory() as folder:
            known = beside if (beside / "model_index.json").is_file() else None
            if known is None and is_version_1(path):
                known = write_version_1(Path(folder))
            config = {} if known is None else {"config": str(known)}
            offline = not download or known is not None
            with quiet(network=not offline):
                pipe = StableDiffusionPipeline.from_single_file(
                    str(path), safety_checker=None, torch_dtype=dtype, local_files_only=offline, **config
                )
    except Exception as error:
        if of_the_machine(error):
            raise
        more = "" if download else f" {_MAY_DOWNLOAD}"
        uncached = not download and "HF_HUB_OFFLINE" in str(error)
        why = "its configuration is not in the hub's cache" if uncached else first_line(error).rstrip(".")
        convert = (
            "from diffusers import StableDiffusionPipeline as P; "
            "P.from_single_file(sys.argv[1]).save_pretrained(sys.argv[2])"
        )
        raise ValueError(
            f"cannot load {path} as a Stable Diffusion 1.x/2.x checkpoint: {why}. "
            f"Except for Stable Diffusion 1.x, a single file also needs the model's configuration and tokenizer, from the "
            f"hub's cache or from a diffusers folder {beside} (which needs no weights).{more} A diffusers folder is "
            "complete on its own. To convert the file into one, run this on a machine with internet access: "
            f"{python_command(convert, path, path.stem)}"
        ) from error
    check_filled(pipe.components, path)
    return _wrap(pipe, name)


def check_filled(components: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError when the file at `path` lacks parameters of a network."""
    from torch import nn

    for part, network in components.items():
        lost = [n for n, p in network.named_parameters() if p.is_meta] if isinstance(network, nn.Module) else []
        if lost:
            keys = f"{len(lost)} key{'s' if len(lost) > 1 else ''}"
            raise ValueError(f"{path} is incomplete: it lacks {keys} of the {part}, for example {lost[0]}")


def _from_hub(name: str, download: bool) -> Path:
    """Returns a hub id's folder in the hub's cache. If `download` is set, fetches missing files first."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not download:
            return Path(snapshot_download(name, local_files_only=True))
        import diffusers

        index = Path(hf_hub_download(name, "model_index.json"))
        return Path(getattr(diffusers, _class_of(index)).download(name, use_safetensors=True))
    except Exception as error:
        if isinstance(error, ValueError) or of_the_machine(error):
            raise
        why = f"the hub did not provide it ({first_line(error)})" if download else "it is not in the hub's cache"
        more = "" if download else f" {_MAY_DOWNLOAD}"
        raise ValueError(
            f"no model at {name}: {absent(name, 'no such folder')}, and {why}.{more} {_families()}"
        ) from error


def _wrap(pipe: Any, name: str) -> Backbone:
    kind = type(pipe).__name__
    known = families()
    if kind not in known:
        raise ValueError(f"{name} contains a {kind}, which no family here supports. {_families()}")
    return known[kind](pipe, name)
