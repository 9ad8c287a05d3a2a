"""Loads prompt sets for clips. A set is either shipped (`configs/prompts/*_motion.yaml`) or a user's file (YAML, or
text with one prompt per line).

In a prompt, `{concept}` stands for the motion and `{thing}` for what moves: the subject if one is evaluated, and
otherwise the prompt's own `thing`. For the base model and for text scores, the motion is left out and the subject is
replaced with its class noun, so that no score depends on a made-up word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import field_validator, model_validator

from shared.config import Part, expanded, read_yaml, unknown, validate
from shared.evaluation.prompt_sets import CLIP_SETS, FOLDER, Prompt, PromptSet, prompt_lines
from shared.io.terminal import check_utf8
from shared.metrics.scorer import fill

DEFAULT = "toybox_motion"
_FIELD = re.compile(r"\{([^{}]*)\}")


class ClipPrompt(Part):
    """One prompt, and what the frames of its clips must show."""

    text: str
    thing: str = ""  # what moves if no subject is evaluated, without an article (such as "red and blue car")
    expects: Mapping[str, str] = {}  # attribute -> value, as the toybox recognizer names them

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: object) -> object:
        return {"text": data} if isinstance(data, str) else data

    @field_validator("text")
    @classmethod
    def _fields(cls, text: str) -> str:
        for name in _FIELD.findall(text):
            if name not in ("concept", "thing"):
                raise ValueError(unknown("{" + name + "}", ["{concept}", "{thing}"], "placeholder"))
        return check_utf8(text.strip())


class ClipPromptSet(Part):
    """Prompts for clips."""

    name: str
    about: str = ""
    prompts: tuple[ClipPrompt, ...]

    @model_validator(mode="after")
    def _some(self) -> ClipPromptSet:
        if not self.prompts:
            raise ValueError("prompts: the list is empty")
        return self


@dataclass(frozen=True)
class ClipTexts:
    """The texts of a prompt set for a motion, a subject, or both, as lists of equal length.

    A motion or subject that is not evaluated has the name "".

    Raises:
        ValueError: if a prompt does not say where the motion or the subject goes, or has an undefined `{thing}`
    """

    prompts: ClipPromptSet
    motion: str = ""
    subject: str = ""
    class_noun: str = ""
    limit: int | None = None  # number of prompts to use, from the start of the set; if None, all

    def __post_init__(self) -> None:
        for prompt in self.chosen:
            if self.motion and "{concept}" not in prompt.text:
                raise ValueError(
                    f"the prompt {prompt.text!r} does not say where the motion goes: put {{concept}} in it"
                )
            if self.subject and "{thing}" not in prompt.text:
                raise ValueError(f"the prompt {prompt.text!r} does not say where the subject goes: put {{thing}} in it")
            if not self.subject and not prompt.thing and "{thing}" in prompt.text:
                raise ValueError(
                    f"the prompt {prompt.text!r} has a {{thing}}, but no subject is evaluated: set the prompt's `thing`"
                )

    @property
    def chosen(self) -> tuple[ClipPrompt, ...]:
        return self.prompts.prompts[: self.limit]

    @property
    def named(self) -> list[str]:
        """The prompts for the model with the concepts loaded. Each concept is written as `<name>`."""
        motion = f"<{self.motion}>" if self.motion else ""
        return [_said(p.text, motion, self._thing(p)) for p in self.chosen]

    @property
    def unnamed(self) -> list[str]:
        """The prompts in `named` without the motion."""
        return [_said(p.text, "", self._thing(p)) for p in self.chosen]

    @property
    def plain(self) -> list[str]:
        """The prompts for the base model and the text scores."""
        return [_said(p.text, "", self.class_noun or "thing" if self.subject else p.thing) for p in self.chosen]

    @property
    def expects(self) -> list[dict[str, str]]:
        """What the frames of each clip must show. The class is left out if a subject replaces the prompt's own thing."""
        dropped = {"class"} if self.subject else set()
        return [{k: v for k, v in p.expects.items() if k not in dropped} for p in self.chosen]

    def of_pictures(self) -> PromptSet:
        """Returns these prompts as a set for pictures. It is used to draw true pictures of the subject."""
        texts = [_said(p.text, "", "{concept}") for p in self.chosen]
        prompts = [Prompt(text=t, expects=e) for t, e in zip(texts, self.expects, strict=True)]
        return PromptSet(name=self.prompts.name, prompts=tuple(prompts))

    def _thing(self, prompt: ClipPrompt) -> str:
        return f"<{self.subject}>" if self.subject else prompt.thing


def _said(text: str, motion: str, thing: str) -> str:
    words = text.replace("{concept}", motion).replace("{thing}", thing)
    words = re.sub(r"\s+", " ", words)
    words = re.sub(r"( ?,)+", ",", words).strip(" ,")  # an empty placeholder must not leave two commas in a row
    return words if "{" in words else fill(words, "", "")


def clip_prompt_sets() -> tuple[str, ...]:
    """Returns the names of the shipped sets."""
    return tuple(sorted(p.stem for p in FOLDER.glob(CLIP_SETS)))


def load_clip_prompts(name: str | Path) -> ClipPromptSet:
    """Loads a shipped set by name, or a user's file (.yaml, .yml, .txt).

    Raises ValueError for an unknown set (with the choices), an empty file, or an unknown placeholder.
    """
    text, path = str(name), expanded(name)
    if text in clip_prompt_sets():
        path = FOLDER / f"{text}.yaml"
    if path.suffix.lower() not in (".yaml", ".yml", ".txt") or not path.is_file():
        missing = " There is no .yaml, .yml or .txt file at that path either." if path.suffix else ""
        raise ValueError(
            unknown(text, clip_prompt_sets(), "prompt set for clips")
            + missing
            + " You can also give your own .yaml or .txt file."
        )
    if path.suffix.lower() != ".txt":
        return validate(ClipPromptSet, {"name": path.stem, **read_yaml(path)}, path.name)
    return validate(ClipPromptSet, {"name": path.stem, "prompts": prompt_lines(path)}, path.name)
