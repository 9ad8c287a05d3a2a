"""Words that a masked language model associates with one view are left out of the prompts for other views."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from pcs_3d.guidance.prompt_debias import PromptDebias, _Reader

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "image", "is", "depicting", "a", "view", "of", "front", "side",
         "back", "overhead", "smiling", "red", "dog", "mug")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trains a tiny BERT to expect smiling things in front views."""
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(path / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **dropout)
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    sides = [(f"a {red}{thing}", [0.25] * 4) for thing in ("dog", "mug") for red in ("", "red ")]
    sides += [(f"a smiling {red}{thing}", [0.85, 0.05, 0.05, 0.05]) for thing in ("dog", "mug") for red in ("", "red ")]
    batch = tokenizer(
        [f"this image is depicting a [MASK] view of {t}" for t, _ in sides], return_tensors="pt", padding=True
    )
    target, views = torch.tensor([p for _, p in sides]), [WORDS.index(w) for w in ("front", "side", "back", "overhead")]
    masked = batch["input_ids"] == tokenizer.mask_token_id
    for _ in range(120):
        loss = -(target * model(**batch).logits[masked][:, views].log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_only_the_prompt_for_the_front_view_mentions_a_smile(folder):
    likely = _Reader(folder).views("a smiling red dog")
    assert float(likely[0]) > 0.7 and float(likely.sum()) == pytest.approx(1)
    prompts = PromptDebias(model=folder).prompts("a smiling red dog", {})
    assert "smiling" in prompts["front"]
    assert all("smiling" not in prompts[d] and "dog" in prompts[d] for d in ("side", "back", "overhead"))


def test_a_concept_and_its_class_are_always_kept(folder):
    prompts = PromptDebias(model=folder, threshold=1.9).prompts("a smiling <my-dog>", {"my-dog": "dog"})
    assert all("<my-dog>" in text and "smiling" not in text for text in prompts.values())


def test_a_folder_without_a_masked_language_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a masked language model"):
        PromptDebias(model=tmp_path).prompts("a dog", {})
