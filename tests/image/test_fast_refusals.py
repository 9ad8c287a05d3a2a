"""Errors in a command are reported before slow libraries are imported and before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("accelerate", "diffusers", "peft", "transformers")
CODE = """
import sys
from shared.cli import build, run
code = run(build(), sys.argv[1:])
print(code, *({slow} & sys.modules.keys()))
"""


def ran(*arguments: str | Path) -> tuple[str, str]:
    """Runs `pcs` in its own process. Returns the exit code followed by the slow libraries imported, and stderr."""
    code = CODE.format(slow=set(SLOW))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def rex(learn, tmp_path_factory):
    from shared.cli import build, run

    path = tmp_path_factory.mktemp("fast") / "rex.concept"
    assert run(build(), learn("dreambooth_lora", f"output={path}", "preview.num=0")) == 0
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("image", "personalize", "t_loar", "output=x.concept"), "Did you mean 't_lora'?"),
        (("image", "personalize", "t_lora", "output=x.concept", "subject.images=missing"), "missing does not exist"),
        (("image", "personalize", "t_lora", "train.step=60", "output=x.concept"), "Did you mean 'steps'?"),
        (
            ("image", "generate", "a mug", "--concept", "missing.concept", "--out", "out"),
            "missing.concept does not exist",
        ),
        (("video", "personalize", "motion_director", "output=x.concept", "subject.clips=missing"), "missing does not"),
        (("3d", "create", "dreamfusion", "prompt=a mug", "train.stps=1", "--out", "out"), "Did you mean 'steps'?"),
    ],
)
def test_invalid_names_paths_and_keys_are_reported_before_slow_imports(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, error = ran(*arguments)
    assert code == "2" and message in error


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a mug", "'rex' is loaded, but the prompt 'a mug' does not name it; write <rex>"),
        ("a <rex> and a <dog>", "the prompt names <dog>, which is not loaded; loaded concepts: <rex>"),
    ],
)
def test_prompts_that_do_not_match_the_concepts_are_reported_before_slow_imports(rex, tmp_path, prompt, message):
    code, error = ran("image", "generate", prompt, "--concept", rex, "--out", tmp_path / "out")
    assert code == "2" and message in error and not (tmp_path / "out").exists()


def test_a_concept_is_shown_without_importing_a_model_library(rex):
    assert ran("concept", "show", rex)[0] == "0"
