"""Tests that the README's recipe is T-LoRA and that no page has a broken link to a file or heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.recipe.resolve import load

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "pcs_image/README.md", "pcs_video/README.md", "pcs_3d/README.md")


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_recipe_in_the_readme_is_t_lora(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(shown)
    ours, shipped = (load(recipe, backbone="full-size") for recipe in (str(tmp_path / "mine.yaml"), "t_lora"))
    labels = {"method", "title", "papers"}  # the README leaves these out
    assert ours.model_dump(exclude=labels) == shipped.model_dump(exclude=labels)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_or_heading_has_an_existing_target(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text("utf-8"))
    assert links
    for link in links:
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link
