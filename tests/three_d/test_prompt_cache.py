"""Cached text embeddings are reused only while concepts are unchanged, and embeddings are mixed row by row."""

from __future__ import annotations

import pytest
import torch

from pcs_3d.guidance.camera_embedding import CameraEmbedding, matrices
from pcs_3d.guidance.prompt_cache import PromptCache
from shared.modifiers.learnable import LearnableToken
from shared.trainable import Lora
from tests.three_d.test_guidance import looked

T = torch.tensor([10])


@pytest.fixture
def named(sd):
    LearnableToken(vectors=1).attach(sd, "mug", "mug", 0)
    return sd


def test_a_text_is_encoded_only_once_unless_its_concept_changes(named):
    cache = PromptCache(named)
    first = cache.encode(["a <mug>", "a dog", "a <mug>"], T.expand(3)).context
    assert len(cache) == 2 and torch.equal(first[0], first[2])
    assert torch.equal(first[0], named.encode(["a " + named.placeholders["mug"].words]).context[0])
    (vector,) = named.placeholders["mug"].parameters()
    with torch.no_grad():
        vector.add_(1.0)
    later = cache.encode(["a <mug>", "a dog"], T.expand(2)).context
    assert len(cache) == 3 and not torch.allclose(later[0], first[0]) and torch.equal(later[1], first[1])
    with torch.no_grad():
        vector.sub_(1.0)
    cache.encode(["a dog"], T)
    assert len(cache) == 3


def test_only_text_encoder_adapters_and_their_strengths_affect_the_cache(named):
    Lora(rank=1).inject(named, "unet-only", "lora", 0)
    cache = PromptCache(named)
    cache.encode(["a dog"], T)
    with torch.no_grad():
        next(named.adapters["unet-only"][0].parameters()).add_(1.0)
    cache.encode(["a dog"], T)
    assert len(cache) == 1, "denoiser adapters do not change text embeddings"
    Lora(rank=1, roles=("text_encoder",)).inject(named, "wordy", "lora", 0)
    cache.encode(["a dog"], T)
    assert len(cache) == 2
    with named.active({"wordy": 0.5}):
        cache.encode(["a dog"], T)
    assert len(cache) == 3
    with named.active({}):
        cache.encode(["a dog"], T)
    assert len(cache) == 3, "an inactive adapter has no effect"


def test_rows_are_mixed_by_their_weights(sd):
    cache = PromptCache(sd)
    mixed = cache.mixed([((0.25, "a dog"), (0.75, "a cat")), ((1.0, "a mug"),)], T.expand(2)).context
    dog, cat, mug = (sd.encode([text]).context[0] for text in ("a dog", "a cat", "a mug"))
    assert torch.allclose(mixed[0], 0.25 * dog + 0.75 * cat, atol=1e-6) and torch.allclose(mixed[1], mug, atol=1e-6)


def test_a_camera_embedding_has_no_effect_at_first_and_can_be_removed_without_a_trace(sd):
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([100, 500]), sd.encode(["a mug", "a dog"])
    with torch.no_grad():
        before = sd.predict(z, t, text)
        CameraEmbedding().inject(sd, "student", "camera", 0)
        (adapter,) = sd.adapters["student"]
        with adapter.seeing(looked(0.0, 90.0).cameras):
            assert torch.equal(sd.predict(z, t, text), before), "the embedding starts as the identity"
            for parameter in adapter.parameters():
                parameter.add_(0.2)
            seen = sd.predict(z, t, text)
        with adapter.seeing(looked(0.0, 90.0).cameras, blind=True):
            blind = sd.predict(z, t, text)
        assert not torch.allclose(seen, before) and not torch.allclose(seen, blind)
        assert torch.equal(sd.predict(z, t, text), before), "the embedding has no effect outside the context"
        state = adapter.state_dict()
        assert all(k.startswith("unet.camera_embedding.") for k in state)
        with pytest.raises(ValueError, match="differ from those of the 4 saved tensors"):
            adapter.load_state_dict({k: v[:1] for k, v in state.items()})
        sd.remove("student")
        assert torch.equal(sd.predict(z, t, text), before)


def test_matrices_map_camera_coordinates_to_world_coordinates():
    cameras = looked(30.0, -110.0, 170.0).cameras
    made = matrices(cameras).reshape(3, 4, 4)
    origin = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.allclose((made @ origin)[:, :3], cameras.positions)
    ahead = (made @ torch.tensor([0.0, 0.0, -1.0, 0.0]))[:, :3]
    assert torch.allclose(ahead * cameras.distance[:, None], -cameras.positions, atol=1e-5), (
        "each camera looks at the object"
    )
