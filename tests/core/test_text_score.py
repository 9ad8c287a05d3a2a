"""Tests that the toybox's own CLIP lets the text score tell captions apart even if there are no attributes to check."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.metrics.encoders import Instruments
from shared.metrics.scorer import Scorer
from shared.metrics.toybox import load_toybox
from shared.pretrain.evaluators.measure import fresh_scenes, render_all
from shared.toybox.captions import caption


@pytest.fixture(scope="module")
def measured():
    """Returns the scores of 64 new renders with their own full captions, and with the captions of other renders."""
    tools = load_toybox()
    scenes = fresh_scenes(64, 5)
    pixels = torch.as_tensor(render_all(scenes)).float()
    captions = [caption(scene, np.random.default_rng(i), full=True) for i, scene in enumerate(scenes)]
    scorer = Scorer(pixels[:2], Instruments(tools.text_image, tools.identity))
    return scorer.measure(pixels, captions).scores, scorer.measure(pixels, captions[1:] + captions[:1]).scores


def test_text_scores_from_the_toybox_clip_stay_below_1_and_are_higher_for_matching_captions(measured):
    matching, other = (torch.tensor(scores["text"]) for scores in measured)
    assert float(matching.max()) < 0.95, "no picture reaches the top of the scale"
    assert float(matching.mean()) > float(other.mean()) + 0.15
    assert len(matching.unique()) > 40


def test_the_text_score_is_the_cosine_or_zero_if_the_cosine_is_negative(measured):
    for scores in measured:
        cosines = torch.tensor(scores["clip_t"])
        assert torch.allclose(torch.tensor(scores["text"]), cosines.clamp_min(0))
