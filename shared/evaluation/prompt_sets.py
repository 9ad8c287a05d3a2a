"""Loads prompt sets for evaluation. A set is either shipped (`configs/prompts/*.yaml`) or a user's file (YAML, or text
with one prompt per line).

In a prompt, `{concept}` stands for the subject and `{class_noun}` for its class noun. When the concept is loaded,
`{concept}` becomes `<name>`. For the base model and for text scores, `{concept}` becomes the class noun, so that no
score depends on a made-up word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import field_validator, model_validator

from shared.config import Part, expanded, read_yaml, unknown, validate
from shared.io.terminal import check_utf8
from shared.io.text_files import read_text_file
from shared.metrics.scorer import fill
from shared.recipe.catalog import config_folder

FOLDER = config_folder() / "prompts"
CLIP_SETS = "*_motion.yaml"  # sets for clips, which `shared.evaluation.clips.prompt_sets` loads
REAL = "dreambench"  # the set for models trained on real photos
LIVE_CLASSES = frozenset(
    {"cat", "dog", "kitten", "puppy", "bird", "horse", "rabbit", "person", "man", "woman", "boy", "girl"}
)
_FIELD = re.compile(r"\{([^{}]*)\}")


class Prompt(Part):
    """One prompt, and what its pictures must show."""

    text: str
    expects: Mapping[str, str] = {}  # attribute -> value, as the toybox recognizer names them
    # Whether the text leaves the subject's view and placement open. If None, this is derived from `expects`.
    pose_open: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: object) -> object:
        return {"text": data} if isinstance(data, str) else data

    @field_validator("text")
    @classmethod
    def _fields(cls, text: str) -> str:
        for name in _FIELD.findall(text):
            if name not in ("concept", "class_noun"):
                raise ValueError(unknown("{" + name + "}", ["{concept}", "{class_noun}"], "placeholder"))
        return text.strip()

    @property
    def free(self) -> bool:
        """Whether the prompt asks for a photo and leaves view and placement open, so that freedom can be measured."""
        return not {"view", "style"} & set(self.expects) if self.pose_open is None else self.pose_open

    def named(self, name: str, class_noun: str) -> str:
        """Returns the prompt for the model with the concept loaded, in which `{concept}` becomes `<name>`."""
        return fill(self.text, f"<{name}>", class_noun)

    def plain(self, class_noun: str) -> str:
        """Returns the prompt with the class noun in place of `{concept}`."""
        return fill(self.text, class_noun, class_noun)


class PromptSet(Part):
    """Prompts that name the subject, and some that do not (for drift)."""

    name: str
    about: str = ""
    prompts: tuple[Prompt, ...]
    drift: tuple[Prompt, ...] = ()

    @model_validator(mode="after")
    def _named(self) -> PromptSet:
        if not self.prompts:
            raise ValueError("prompts: the list is empty")
        for p in (*self.prompts, *self.drift):
            check_utf8(p.text)
        for p in self.prompts:
            if "{concept}" not in p.text:
                raise ValueError(f"the prompt {p.text!r} does not say where the subject goes: put {{concept}} in it")
        for p in self.drift:
            if "{concept}" in p.text:
                raise ValueError(f"the drift prompt {p.text!r} must not name the concept")
        return self

    def first(self, count: int | None) -> PromptSet:
        """Returns the set with only its first `count` prompts, or with all of them if `count` is None."""
        return self if count is None else self.model_copy(update={"prompts": self.prompts[:count]})


def prompt_sets() -> tuple[str, ...]:
    """Returns the names of the shipped sets. `dreambench` stands for whichever of its two sets fits the class noun."""
    return tuple(sorted({p.stem for p in FOLDER.glob("*.yaml") if not p.match(CLIP_SETS)} | {REAL}))


def load_prompts(name: str | Path, class_noun: str = "") -> PromptSet:
    """Loads a shipped set by name, or a user's file (.yaml, .yml, .txt).

    Raises ValueError for an unknown set (with the choices), an empty file, or a prompt without `{concept}`.
    """
    text = str(name)
    if text == REAL:
        text = "dreambench_live" if class_noun.split(" ")[-1].lower() in LIVE_CLASSES else "dreambench_objects"
    shipped = FOLDER / f"{text}.yaml"
    if text in prompt_sets() and shipped.is_file():
        return _from_yaml(shipped)
    path = expanded(name)
    if path.suffix.lower() not in (".yaml", ".yml", ".txt") or not path.is_file():
        missing = " There is no .yaml, .yml or .txt file at that path either." if path.suffix else ""
        raise ValueError(
            unknown(text, prompt_sets(), "prompt set") + missing + " You can also give your own .yaml or .txt file."
        )
    return _from_yaml(path) if path.suffix.lower() != ".txt" else _from_txt(path)


def _from_yaml(path: Path) -> PromptSet:
    return validate(PromptSet, {"name": path.stem, **read_yaml(path)}, str(path.name))


def _from_txt(path: Path) -> PromptSet:
    return validate(PromptSet, {"name": path.stem, "prompts": prompt_lines(path)}, path.name)


def prompt_lines(path: Path) -> list[str]:
    """Returns the prompts in a text file, one per line, without comments (#). Raises ValueError if there are none."""
    lines = read_text_file(path, "the prompts").splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path} contains no prompts: write one per line, with {{concept}} where the concept goes")
    return prompts
