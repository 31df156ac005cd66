"""Every kind of text encoder does what the inversion relies on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from gazeguard.lab import tiny_encoders
from gazeguard.models.encoders.encoder import TextEncoder
from gazeguard.models.encoders.load import load_encoder

PROMPTS = ["a red cat", "two dogs on the beach at night", "snow"]
LENGTH = {"longclip": 248, "chinese_clip": 52} | dict.fromkeys(
    ("siglip", "siglip-text", "siglip2"), 64
)
BIDIRECTIONAL = {"siglip", "siglip-text", "siglip2", "altclip", "chinese_clip"}
PROJECTED = {"clip", "clip-projected", "longclip", "altclip", "chinese_clip", "metaclip_2"}


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextEncoder]:
    root, loaded = tmp_path_factory.mktemp("encoders"), {}

    def encoder(kind: str) -> TextEncoder:
        if kind not in loaded:
            loaded[kind] = load_encoder(tiny_encoders.build(kind, root / kind))
        return loaded[kind]

    return encoder


@pytest.fixture(params=tiny_encoders.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def encoder(kind: str, encoder_of: Callable[[str], TextEncoder]) -> TextEncoder:
    return encoder_of(kind)


def test_embedding_path_equals_ids_path(encoder: TextEncoder):
    tokens = encoder.tokenise(PROMPTS, slot=True)
    other = encoder.tokenizer("z", add_special_tokens=False)["input_ids"][0]
    ids = tokens.ids.clone()
    ids[:, encoder.slot] = other
    with torch.no_grad():
        by_ids = encoder.run(type(tokens)(ids, tokens.real))
        plain = encoder.run(tokens)
        by_vector = encoder.run(tokens, encoder.embeddings[[other] * len(PROMPTS)])
    assert torch.equal(by_ids.tokens, by_vector.tokens)
    assert torch.equal(by_ids.pooled, by_vector.pooled)
    assert not torch.allclose(plain.pooled, by_vector.pooled, atol=1e-3), "the slot has no effect"


def test_each_prompt_may_have_its_own_vector(encoder: TextEncoder):
    tokens = encoder.tokenise(PROMPTS, slot=True)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, encoder.width, generator=generator)
    with torch.no_grad():
        together = encoder.run(tokens, vectors).pooled
        alone = torch.cat(
            [encoder.run(tokens[[i]], vectors[[i]]).pooled for i in range(len(PROMPTS))]
        )
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradients_flow_to_the_slot_and_weights_stay(encoder: TextEncoder):
    before = {name: w.clone() for name, w in encoder.model.state_dict().items()}
    vectors = torch.zeros(3, encoder.width, requires_grad=True)
    states = encoder.run(encoder.tokenise(PROMPTS, slot=True), vectors)
    (states.pooled.square().sum() + states.tokens.square().sum()).backward()
    assert (vectors.grad.abs().sum(1) > 0).all()
    assert all(w.grad is None for w in encoder.model.parameters())
    after = encoder.model.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    assert not encoder.model.get_input_embeddings()._forward_hooks


def test_what_is_read_from_the_model(kind: str, encoder: TextEncoder):
    assert encoder.length == LENGTH.get(kind, 77)
    assert (encoder.width, encoder.depth) == (32, 3)
    assert encoder.slot == (0 if "siglip" in kind else 1)
    assert encoder.causal == (kind not in BIDIRECTIONAL)
    assert encoder.run(encoder.tokenise(PROMPTS)).pooled.shape == (
        3,
        24 if kind in PROJECTED | {"open_clip"} else 32,
    )


def test_long_prompts_are_cut_and_the_slot_stays(encoder: TextEncoder):
    long = "word " * encoder.length
    with_slot, without = (encoder.tokenise([long, "a"], slot=slot) for slot in (True, False))
    assert with_slot.ids.shape == without.ids.shape == (2, encoder.length)
    assert with_slot.real.sum(1).tolist()[0] == encoder.length
    assert without.real.sum(1).tolist()[0] == encoder.length - 1
    assert encoder.too_long([long, "a"]) == 1
    kept = [i for i in range(encoder.length) if i != encoder.slot]
    assert torch.equal(with_slot.ids[0, kept], without.ids[0, :-1])


@pytest.mark.parametrize("kind", sorted(PROJECTED))
def test_pooled_is_what_transformers_gives(kind: str, encoder_of: Callable[[str], TextEncoder]):
    encoder = encoder_of(kind)
    folder = Path(encoder.folder or "")
    tokens = encoder.tokenise(PROMPTS)
    mask = tokens.real.long() if encoder.kind.masked else None
    with torch.no_grad():
        if kind == "clip-projected":
            whole = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
            expected = whole(input_ids=tokens.ids).text_embeds
        else:
            whole = transformers.AutoModel.from_pretrained(folder).eval()
            expected = whole.get_text_features(tokens.ids, attention_mask=mask).pooler_output
        mine = encoder.run(tokens).pooled
    assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_pools_at_the_last_of_all_positions(
    kind: str, encoder_of: Callable[[str], TextEncoder]
):
    encoder = encoder_of(kind)
    whole = transformers.AutoModel.from_pretrained(encoder.folder).eval()
    tokens = encoder.tokenise(PROMPTS)
    with torch.no_grad():
        expected = whole.get_text_features(tokens.ids).pooler_output
        assert torch.equal(encoder.run(tokens).pooled, expected)


def test_shared_padding_does_not_change_the_output(encoder: TextEncoder):
    tokens = encoder.tokenise(PROMPTS)
    with torch.no_grad():
        cut, whole = (encoder.run(tokens, padding=padding) for padding in (False, True))
    assert torch.allclose(cut.pooled, whole.pooled, atol=1e-5)
    assert whole.tokens.shape[1] == encoder.length


def test_bfloat16_is_near_float32(kind: str, encoder: TextEncoder):
    """Outputs with a free embedding, and the way its gradient points, which the search follows."""
    low = load_encoder(encoder.folder or "", dtype="bfloat16")
    tokens = encoder.tokenise(PROMPTS, slot=True)
    outputs, gradients = [], []
    for each in (encoder, low):
        vectors = encoder.embeddings[[40, 41, 42]].clone().float().requires_grad_()
        pooled = each.run(tokens, vectors).pooled.float()
        torch.cosine_similarity(pooled[0], pooled[1:]).sum().backward()
        outputs.append(pooled.detach())
        gradients.append(vectors.grad)
    assert low.dtype is torch.bfloat16
    assert (torch.cosine_similarity(*outputs) > 0.99).all(), kind
    assert (torch.cosine_similarity(*gradients) > 0.9).all(), kind
