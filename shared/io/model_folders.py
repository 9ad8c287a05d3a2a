"""Loads networks and tokenizers from folders. Missing weights are an error; they are never silently left random."""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.io.failures import of_the_machine

#: Keys that are ignored without a warning. They occur in older files and in models that are used only for their text
#: half.
_UNREAD = (r"position_ids$", r"^vision_model\.", r"^(visual|text)_projection\.", r"^logit_scale$", r"^decoder\.")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_PADDED = 0.9  # the minimum share of an embedding table's rows that belong to tokens; only a few rows are padding
_WORDS = ("dog", "mug", "teapot")


def load_network(
    kind: Any, folder: Path, unused: Sequence[str] = (), variant: str | None = None, dtype: Any = None
) -> Any:
    """Loads a network with `kind.from_pretrained(folder)`, on the CPU and offline.

    Args:
        kind: a model class of diffusers or transformers
        folder: contains `config.json` and the weights as safetensors, in one file or in shards
        unused: patterns of model keys that are not used here and may be missing
        variant: the files' variant, such as fp16 in `model.fp16.safetensors`. By default, fp16 if all files are fp16
        dtype: the dtype of the weights (default: float32)

    Raises:
        ValueError: naming the file, if the files cannot be read, lack a key, or contain a key with a different shape

    Warns:
        UserWarning: if the files contain keys that the model does not have
    """
    import torch

    _check_format(kind, folder)
    variant = variant or ("fp16" if _half_only(folder) else None)
    dtype_key = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    options = {dtype_key: dtype or torch.float32, **({"variant": variant} if variant else {})}
    try:
        with quiet():
            model, info = kind.from_pretrained(
                str(folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # mismatches are reported below, with the file's name
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
    except Exception as error:  # whatever a broken folder raises, the fault is in the user's files
        if of_the_machine(error):
            raise
        raise ValueError(f"cannot load {folder} as {kind.__name__}: {first_line(error)}") from error
    # keys that are listed in an index but are not in any file
    empty = {n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta}
    wrong = {key for key, *_ in info["mismatched_keys"]}
    _check_keys({**info, "missing_keys": {*info["missing_keys"], *empty} - wrong}, folder, kind.__name__, unused)
    return model


def _check_format(kind: Any, folder: Path) -> None:
    """Raises ValueError if the weights exist only in an unsupported format."""
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLED)
    if pickled and not any(folder.glob("*.safetensors")):
        library, name = kind.__module__.partition(".")[0], kind.__name__
        convert = (
            f"from {library} import {name} as M; "
            "M.from_pretrained(sys.argv[1], use_safetensors=False).save_pretrained(sys.argv[1])"
        )
        raise ValueError(
            f"{folder} has its weights only as {pickled[0]}: that format can run code when it is read, so it is not "
            f"supported. If you trust the source, convert the weights once: {python_command(convert, folder)}"
        )


def python_command(code: str, *arguments: str | Path) -> str:
    """Returns a command for the user's shell that runs Python code with `arguments` as `sys.argv[1:]`."""
    return shlex.join(["python", "-c", f"import sys; {code}", *(str(argument) for argument in arguments)])


def _check_keys(info: Any, folder: Path, kind: str, unused: Sequence[str]) -> None:
    file = folder / _weights_file(folder)
    missing = _others(info["missing_keys"], unused)
    if missing:
        raise ValueError(
            f"{file} lacks {_listed(missing)} of a {kind}: the file is incomplete, or belongs to another model"
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, stored, expected = wrong[0]
        more = f", and {len(wrong) - 1} more shapes differ" if len(wrong) > 1 else ""
        raise ValueError(
            f"{file}: {key} is {list(stored)}, but the {kind} in {folder / 'config.json'} has {list(expected)}{more}"
        )
    stray = _others(info["unexpected_keys"], _UNREAD)
    if stray:
        warnings.warn(
            f"{file} contains {_listed(stray)}, which a {kind} does not have; they are not used", stacklevel=4
        )


def check_state(stored: Any, expected: Any, file: Path) -> None:
    """Raises ValueError unless `stored` (from `file`) and `expected` have the same keys and shapes."""
    missing, stray = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise ValueError(f"{file} lacks {_listed(missing)}: the file is incomplete, or belongs to another model")
    if stray:
        raise ValueError(f"{file} contains {_listed(stray)}, which the model does not have")
    for key, tensor in expected.items():
        if stored[key].shape != tensor.shape:
            raise ValueError(f"{file}: {key} is {list(stored[key].shape)}, but the model has {list(tensor.shape)}")


def _others(keys: Collection[str], patterns: Sequence[str]) -> list[str]:
    return sorted(k for k in keys if not any(re.search(p, k) for p in patterns))


def _listed(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"


def _weights_file(folder: Path) -> str:
    """Returns the name of the file that lists the keys, which is the shard index or, without an index, the first
    file."""
    names = sorted(p.name for p in (*folder.glob("*.index*.json"), *folder.glob("*.safetensors")))
    return next((n for n in names if "index" in n), names[0] if names else "")


def _half_only(folder: Path) -> bool:
    """Whether the weights exist only as `….fp16.safetensors`."""
    names = [p.name for p in folder.glob("*.safetensors")]
    return bool(names) and all(re.search(r"\.fp16[.-]", name) for name in names)


# --- tokenizers --------------------------------------------------------------------------------


def load_tokenizer(kind: Any, folder: Path, embeddings: int) -> Any:
    """Loads a transformers tokenizer from a folder. Raises ValueError if it is incomplete (`check_tokenizer`)."""
    try:
        with quiet():
            tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"cannot load a {kind.__name__} from {folder}: {first_line(error)}") from error
    check_tokenizer(tokenizer, embeddings, folder)
    return tokenizer


def check_tokenizer(tokenizer: Any, embeddings: int, folder: Path) -> None:
    """Raises ValueError if a tokenizer does not match a text encoder with this many token `embeddings`.

    This happens if some of the tokenizer's files are missing or belong to another model. If files are missing,
    transformers builds a tokenizer that encodes all prompts alike.
    """
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    what = f"{folder}: the tokenizer has {size} tokens, but the text encoder has {embeddings} embeddings"
    if size > embeddings or size < _PADDED * embeddings:
        raise ValueError(f"{what}. Some of its files are missing, or belong to another model")
    ids = [tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in _WORDS]
    for (one, a), (other, b) in itertools.combinations(zip(_WORDS, ids, strict=True), 2):
        if not a or a == b:
            raise ValueError(
                f"{folder}: its tokenizer encodes {one!r} and {other!r} alike. Some of its files are missing"
            )


# --- library output ----------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the exception's type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet(network: bool = False) -> Iterator[None]:
    """Silences the progress bars and logs of diffusers and transformers while they load models.

    Unless `network` is set, network requests are blocked, because not all code respects `local_files_only`. The
    previous state is restored at the end.
    """
    from diffusers.utils import logging as diffusers_log
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_log

    bars = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    levels = [(log, log.get_verbosity()) for log in (diffusers_log, transformers_log)]
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not network
    for log in bars:
        log.disable_progress_bar()
    for log, _ in levels:
        log.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # argument names change between versions
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for log in bars:
            log.enable_progress_bar()
        for log, level in levels:
            log.set_verbosity(level)
