"""The token overlay and contexts per site and per time: oracles are transformers' own resized embedding tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.backbones.added_tokens import END, same_embeddings
from shared.backbones.flux import FluxBackbone
from shared.backbones.stable_diffusion import StableDiffusionBackbone
from shared.types import SiteContext


class FixedPlaceholder:
    """Tokens whose rows come from a function of (component, t, site)."""

    __test__ = False

    def __init__(
        self,
        name: str,
        tokens: tuple[str, ...],
        rows: Callable[[str, Tensor | None, str | None], Tensor] | None = None,
        varies_with: tuple[str, ...] = (),
        words: str | None = None,
        edit: Callable[[SiteContext, Tensor, str | None], SiteContext] | None = None,
    ) -> None:
        self.name, self.tokens, self.words = name, tokens, " ".join(tokens) if words is None else words
        self.varies_with = frozenset(varies_with)
        self.components = ()
        self._rows, self._edit = rows, edit

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        return self._rows(component, t, site) if self._rows else None

    def edit(self, context: SiteContext, positions: Tensor, t: Tensor | None, site: str | None) -> SiteContext:
        return self._edit(context, positions, site) if self._edit else context

    def parameters(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


WIDTH = {"text_encoder": 16, "text_encoder_2": 24}


def fixed(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(n, d, generator=generator) for c, d in WIDTH.items()}


@pytest.fixture
def sd(tiny_sd: Any) -> StableDiffusionBackbone:
    return StableDiffusionBackbone(tiny_sd)


@pytest.fixture
def flux(tiny_flux: Any) -> FluxBackbone:
    return FluxBackbone(tiny_flux)


def resized(model: Any, tokenizer: Any, tokens: tuple[str, ...], rows: Tensor) -> tuple[Any, Any]:
    """The ordinary way: the tokens are really in the tokenizer, and their rows really in the table."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(tokens))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for token, row in zip(tokens, rows, strict=True):
        model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(token)] = row
    return model, tokenizer


TOKENS = ("<my-mug>", "<my-mug>_1", "<my-mug>_2")
PROMPTS = ["a photo of a <my-mug> <my-mug>_1 <my-mug>_2 mug on the beach", "a dog"]


def test_overlay_equals_a_really_resized_clip(tiny_sd: Any) -> None:
    rows = fixed(3)
    model, tokenizer = resized(tiny_sd.text_encoder, tiny_sd.tokenizer, TOKENS, rows["text_encoder"])
    text = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    expected = model(text.input_ids)[0]
    backbone = StableDiffusionBackbone(tiny_sd)
    backbone.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    got = backbone.encode(PROMPTS)
    assert torch.allclose(got.context, expected, atol=1e-5)
    assert got.token_positions["my-mug"].sum(1).tolist() == [3, 0]
    assert got.token_positions["my-mug"][0].nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("legacy_eos", [False, True])
def test_overlay_equals_really_resized_encoders_of_flux(tiny_flux: Any, legacy_eos: bool) -> None:
    rows = fixed(3)
    t5, tokenizer_2 = resized(tiny_flux.text_encoder_2, tiny_flux.tokenizer_2, TOKENS, rows["text_encoder_2"])
    text = tokenizer_2(PROMPTS, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
    context = t5(text.input_ids)[0]
    clip, tokenizer = resized(tiny_flux.text_encoder, tiny_flux.tokenizer, TOKENS, rows["text_encoder"])
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=32, return_tensors="pt").input_ids
    pooled = clip(ids).pooler_output
    if legacy_eos:  # OpenAI's configuration pools where the id is largest: an added token would take that place
        tiny_flux.text_encoder.eos_token_id = 2
    backbone = FluxBackbone(tiny_flux)
    backbone.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    got = backbone.encode(PROMPTS)
    assert torch.allclose(got.context, context, atol=1e-5)
    assert torch.allclose(got.pooled, pooled, atol=1e-5)
    assert got.token_positions["my-mug"].shape == (2, 48)


def test_gradients_reach_the_rows_and_nothing_else(sd: StableDiffusionBackbone) -> None:
    row = nn.Parameter(torch.randn(1, 16))
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: row))
    before = copy.deepcopy(sd.components["text_encoder"].state_dict())
    prediction = sd.predict(torch.randn(1, 4, 8, 8), torch.tensor(10), sd.encode(["a photo of <x>"]))
    prediction.square().mean().backward()
    assert row.grad is not None and row.grad.abs().sum() > 0
    assert all(p.grad is None for m in sd.components.values() for p in m.parameters())
    assert all(torch.equal(v, before[k]) for k, v in sd.components["text_encoder"].state_dict().items())


def test_rows_per_sample(sd: StableDiffusionBackbone) -> None:
    rows = torch.randn(2, 1, 16)
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows))
    both = sd.encode(["a <x>", "a <x>"]).context
    sd.remove("x")
    for i in range(2):
        sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s, i=i: rows[i]))
        assert torch.allclose(sd.encode(["a <x>"]).context[0], both[i], atol=1e-6)
        sd.remove("x")


def test_removing_restores_tokenizer_repr_and_outputs(sd: StableDiffusionBackbone) -> None:
    prompts = ["a photo of a <my-mug> mug"]
    tokenizer, text = sd.tokens.current["text_encoder"], repr(sd.components["text_encoder"])
    vocabulary, before = len(tokenizer), sd.encode(prompts).context
    rows = fixed(3)
    sd.add_placeholder(FixedPlaceholder("my-mug", TOKENS, lambda c, t, s: rows[c]))
    sd.add_placeholder(FixedPlaceholder("b", ("<b>",), lambda c, t, s: rows[c][:1]))
    changed = sd.encode(prompts).context
    assert not torch.equal(changed, before)
    sd.remove("b")
    assert torch.equal(sd.encode(prompts).context, changed)  # the other concept's token keeps its row
    sd.remove("my-mug")
    assert sd.tokens.current["text_encoder"] is tokenizer and len(tokenizer) == vocabulary
    assert repr(sd.components["text_encoder"]) == text
    assert torch.equal(sd.encode(prompts).context, before)


def test_tokens_are_matched_exactly(sd: StableDiffusionBackbone) -> None:
    rows = fixed(3)
    sd.add_placeholder(FixedPlaceholder("a", ("<My-Mug>", "<my-mug>", "<my-mug>_1"), lambda c, t, s: rows[c]))
    ids = sd.tokens.tokenize("text_encoder", ["<My-Mug> <my-mug>_1, <my-mug>"], torch.device("cpu")).ids[0].tolist()
    expected = sd.tokens.ids_of("text_encoder", ["<My-Mug>", "<my-mug>_1", "<my-mug>"])
    assert [i for i in ids if i in expected] == expected


REFUSED = [
    (("mug</w>",), "already in the vocabulary"),
    (("<a b>",), "blanks"),
    (("<x>", "<x>"), "twice"),
    (("<taken>",), "already"),
]


@pytest.mark.parametrize(("tokens", "message"), REFUSED)
def test_tokens_that_cannot_be_added(sd: StableDiffusionBackbone, tokens: tuple[str, ...], message: str) -> None:
    sd.add_placeholder(FixedPlaceholder("taken", ("<taken>",), lambda c, t, s: torch.zeros(1, 16)))
    with pytest.raises(ValueError, match=message):
        sd.add_placeholder(FixedPlaceholder("new", tokens))
    assert "new" not in sd.placeholders
    with pytest.raises(ValueError, match="already named"):
        sd.add_placeholder(FixedPlaceholder("taken", ()))


def test_positions_of_plain_words(sd: StableDiffusionBackbone) -> None:
    sd.add_placeholder(FixedPlaceholder("m", (), words="sks mug"))
    got = sd.encode(["a sks mug and a sks mug", "a sks dog and a mug", "sks mug"])
    assert got.token_positions["m"].sum(1).tolist() == [4, 0, 2]
    assert got.token_positions["m"][0].nonzero().flatten().tolist() == [2, 3, 6, 7]
    assert sd.encode(["a dog"]).token_positions == {}


def test_wrong_rows_are_refused(sd: StableDiffusionBackbone) -> None:
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: torch.zeros(2, 16)))
    with pytest.raises(ValueError, match=r"vectors for text_encoder must be \[1, 16\]"):
        sd.encode(["<x>"])


def test_prompts_past_the_limit_name_what_is_cut(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    long = "a photo of a mug " * 5 + "a mug on the snow and the beach with a dog"
    sd.check_prompt("a photo of a mug")
    with pytest.raises(ValueError, match="reads 32 tokens, and would cut 'and the beach with a dog'"):
        sd.check_prompt(long)
    flux.check_prompt(long)  # its context is T5's, which reads 48
    with pytest.raises(ValueError, match="reads 48 tokens"):
        flux.check_prompt(long * 2)


# --- per time ---------------------------------------------------------------------------------------------


def timed(c: str, t: Tensor | None, s: str | None) -> Tensor:
    assert t is not None and s is None
    return (t[:, None, None] / 1000).expand(-1, 1, WIDTH[c])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_name_that_varies_with_time(family: str, request: pytest.FixtureRequest) -> None:
    backbone = request.getfixturevalue(family)
    backbone.add_placeholder(FixedPlaceholder("x", ("<x>",), timed, ("time",)))
    assert backbone.varies_with(["a <x>"]) == {"time"} and backbone.varies_with(["a dog"]) == frozenset()
    with pytest.raises(ValueError, match="vary with time"):
        backbone.encode(["a <x>"])
    both = backbone.encode(["a <x>", "a <x>"], torch.tensor([100.0, 900.0]))
    assert not torch.allclose(both.context[0], both.context[1])
    alone = backbone.encode(["a <x>"], torch.tensor(900.0))  # a scalar t stands for all rows
    assert torch.allclose(alone.context[0], both.context[1], atol=1e-6)
    if family == "flux":
        assert torch.allclose(alone.pooled[0], both.pooled[1], atol=1e-6)
    assert torch.equal(backbone.encode(["a dog"]).context, backbone.encode(["a dog"], torch.tensor(3.0)).context)


# --- per site ---------------------------------------------------------------------------------------------


def by_site(backbone: StableDiffusionBackbone, equal: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one = torch.randn(1, 16, generator=generator)
    return {s: one.clone() if equal else torch.randn(1, 16, generator=generator) for s in backbone.text_sites()}


def count_runs(backbone: StableDiffusionBackbone) -> tuple[list[int], Any]:
    runs: list[int] = []
    return runs, backbone.components["text_encoder"].register_forward_hook(lambda *_: runs.append(1))


def test_equal_rows_at_all_sites_are_the_plain_path(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: next(iter(rows.values()))))
    plain = sd.predict(x, t, sd.encode(["a <x>", "a dog"]))
    sd.remove("x")
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    runs, handle = count_runs(sd)
    conditioning = sd.encode(["a <x>", "a dog"])
    handle.remove()
    assert len(runs) == 1  # equal rows that nobody learns need one run
    assert set(conditioning.context) == set(sd.text_sites())
    assert torch.equal(sd.predict(x, t, conditioning), plain)


def test_each_site_reads_its_own_rows(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=False)
    seen: dict[str, Tensor] = {}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    conditioning = sd.encode(["a <x>"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    first = sd.predict(x, t, conditioning)
    handles = [
        sd.unet.get_submodule(f"{site}.{leaf}").register_forward_hook(
            lambda m, a, out, key=f"{site}.{leaf}": seen.__setitem__(key, out)
        )
        for site in sd.text_sites()
        for leaf in ("to_k", "to_v")
    ]
    assert torch.equal(sd.predict(x, t, conditioning), first)
    for handle in handles:
        handle.remove()
    for site in sd.text_sites():
        sd.remove("x")  # oracle: the plain path with this site's rows alone
        sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s, site=site: rows[site]))
        context = sd.encode(["a <x>"]).context
        for leaf in ("to_k", "to_v"):
            assert torch.allclose(seen[f"{site}.{leaf}"], sd.unet.get_submodule(f"{site}.{leaf}")(context), atol=1e-6)
    swapped = dict(zip(sd.text_sites(), reversed(list(rows.values())), strict=True))
    sd.remove("x")
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: swapped[s or ""], ("site",)))
    assert not torch.allclose(sd.predict(x, t, sd.encode(["a <x>"])), first, atol=1e-5)


def test_sites_that_start_equal_learn_apart(sd: StableDiffusionBackbone) -> None:
    rows = {s: nn.Parameter(v) for s, v in by_site(sd, equal=True).items()}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    sd.predict(torch.randn(1, 4, 8, 8), torch.tensor(10), sd.encode(["a <x>"])).square().mean().backward()
    gradients = [p.grad for p in rows.values()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert len({tuple(g.flatten().tolist()) for g in gradients if g is not None}) == len(rows)


def test_gradient_checkpointing_sees_the_same_sites(sd: StableDiffusionBackbone) -> None:
    rows = {s: nn.Parameter(v) for s, v in by_site(sd, equal=False).items()}
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)

    def gradients() -> list[Tensor]:
        prediction = sd.predict(x, t, sd.encode(["a <x>"]))
        sd.predict(x, t, sd.encode(["a dog"]))  # another, plain pass before the backward pass
        return list(torch.autograd.grad(prediction.square().mean(), list(rows.values())))

    plain = gradients()
    sd.unet.enable_gradient_checkpointing()
    sd.unet.train()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_site_hooks_are_removed_with_the_last_placeholder_that_needs_them(sd: StableDiffusionBackbone) -> None:
    text = repr(sd.unet)
    rows = by_site(sd, equal=False)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    before = sd.predict(x, t, sd.encode(["a dog"]))
    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: rows[s or ""], ("site",)))
    sd.predict(x, t, sd.encode(["a <x>"]))
    assert torch.equal(sd.predict(x, t, sd.encode(["a dog"])), before)
    sd.remove("x")
    assert not any(m._forward_pre_hooks for m in sd.unet.modules())
    assert repr(sd.unet) == text and torch.equal(sd.predict(x, t, sd.encode(["a dog"])), before)


def test_keys_and_values_apart(sd: StableDiffusionBackbone, flux: FluxBackbone) -> None:
    """An edit of V alone (as Perfusion's) becomes a context per site; a joint-attention family refuses it."""

    def edit(context: SiteContext, positions: Tensor, site: str | None) -> SiteContext:
        return SiteContext(context.key, context.value + positions[..., None].to(context.value))

    sd.add_placeholder(FixedPlaceholder("m", (), words="sks mug", edit=edit))
    conditioning = sd.encode(["a sks mug"])
    assert not isinstance(conditioning.context, Tensor)
    one = conditioning.context[sd.text_sites()[0]]
    moved = (one.key != one.value).any(-1)
    assert torch.equal(moved, conditioning.token_positions["m"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(10)
    edited = sd.predict(x, t, conditioning)
    sd.remove("m")
    assert not torch.equal(edited, sd.predict(x, t, sd.encode(["a sks mug"])))
    flux.add_placeholder(FixedPlaceholder("m", (), words="sks mug", edit=edit))
    with pytest.raises(ValueError, match="flux has none"):
        flux.encode(["a sks mug"])


def test_site_and_time_together(sd: StableDiffusionBackbone) -> None:
    rows = by_site(sd, equal=False)

    def both(c: str, t: Tensor | None, s: str | None) -> Tensor:
        assert t is not None and s is not None
        return rows[s][None] * t[:, None, None] / 1000

    sd.add_placeholder(FixedPlaceholder("x", ("<x>",), both, ("site", "time")))
    a, b = (sd.encode(["a <x>"], torch.tensor([t])).context for t in (100.0, 800.0))
    sites = sd.text_sites()
    assert not torch.allclose(a[sites[0]].key, b[sites[0]].key) and not torch.allclose(a[sites[0]].key, a[sites[1]].key)


def test_flux_refuses_a_name_that_varies_with_site(flux: FluxBackbone) -> None:
    flux.add_placeholder(FixedPlaceholder("x", ("<x>",), lambda c, t, s: torch.zeros(1, WIDTH[c]), ("site",)))
    with pytest.raises(ValueError, match=r"'x'.*flux has none"):
        flux.encode(["a <x>"])


def test_same_rows_compares_memory_where_something_is_learned() -> None:
    a, b = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    assert same_embeddings([a], [a]) and not same_embeddings([a], [b])
    table = nn.Parameter(torch.ones(2, 1, 2))
    assert same_embeddings([table[0]], [table[0]]) and not same_embeddings([table[0]], [table[1]])
    assert same_embeddings([a.detach()], [b.detach()]) and not same_embeddings([a], [a.detach()])


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_words_are_found_whole_and_everywhere(family: str, request: pytest.FixtureRequest) -> None:
    backbone, two = request.getfixturevalue(family), lambda c, t, s: fixed(2)[c]
    backbone.add_placeholder(FixedPlaceholder("x", ("<x>", "<x>_1"), two, words="<x> <x>_1 mug"))
    backbone.add_placeholder(FixedPlaceholder("a-mug", ("<a-mug>",), lambda c, t, s: fixed(1)[c]))
    tokenizer = backbone.tokens.current[backbone.context_component]
    prompts = ("a photo of <x> <x>_1 mug, a Mug and a <a-mug> teapot", "xzq zqx  zq  mug", "a dog")
    ids = backbone.tokens.tokenize(backbone.context_component, prompts, torch.device("cpu")).ids

    def words_at(words: str) -> list[list[str]]:
        positions = backbone.word_positions(prompts, words)
        assert (
            positions.shape == ids.shape == backbone.encode(prompts).context.shape[:2] and positions.dtype == torch.bool
        )
        read = [tokenizer.convert_ids_to_tokens(row[at].tolist()) for row, at in zip(ids, positions, strict=True)]
        return [[t.replace("</w>", "").replace("▁", "") for t in tokens] for tokens in read]

    assert [[t.lower() for t in row if t] for row in words_at("mug")] == [
        ["mug", "mug"] if family == "sd" else ["mug", "m", "u", "g"],  # T5's vocabulary has no capitals here
        ["mug"],
        [],
    ]
    assert words_at("<x>") == [["<x>"], [], []] and words_at("<x>_1  mug") == [["<x>_1", "mug"], [], []]
    assert words_at("<x> <x>_1 mug")[0] == ["<x>", "<x>_1", "mug"]
    assert torch.equal(backbone.word_positions(prompts, "<a-mug>"), backbone.encode(prompts).token_positions["a-mug"])
    assert [[t for t in row if t] for row in words_at("zq")] == [[], ["z", "q"], []] and words_at("cat") == [[], [], []]
    ends = words_at(END)
    assert ends == [[tokenizer.eos_token.replace("</w>", "")]] * 3
    at = backbone.word_positions(prompts, END).int().argmax(1)
    assert at.tolist() == [int((row != tokenizer.pad_token_id).sum()) - (family == "flux") for row in ids]
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="no words"):
            backbone.word_positions(prompts, nothing)


def test_words_that_are_cut_are_not_there(sd: StableDiffusionBackbone) -> None:
    prompts = ["dog " * 29 + "mug", "dog " * 30 + "mug"]  # 30 tokens fit between the special ones
    positions = sd.word_positions(prompts, "mug").nonzero().tolist()
    assert positions == [[0, 30]]
