"""What must hold for every supported model family, on tiny random models."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gazeguard.errors import RowError
from gazeguard.lab import tiny
from gazeguard.models.fingerprint import fingerprint
from gazeguard.models.load import load
from gazeguard.models.target import ImageTokens
from gazeguard.probe.attention import attend, probe
from gazeguard.signals.entropy import visual_mass
from gazeguard.types import ImagePart, KeyKind, Sample, TextPart, Turn

from .conftest import picture, sample

TOLERANCE = 1e-5

families = pytest.mark.parametrize("family", tiny.FAMILIES)

# Image tokens of a 40 x 60, a 64 x 64, and a 30 x 30 with a 50 x 90 image, from each family's
# geometry: patches per tile, times tiles, plus LLaVA-NeXT's row ends.
IMAGE_TOKENS = {
    "llava": (4, 4, 8),  # 28 x 28 in patches of 14
    "llava_next": (4 + 8 + 2, 4 + 16 + 4, (4 + 16 + 4) + (4 + 8 + 2)),
    "qwen2_5_vl": (2, 4, 1 + 6),  # cells of 28 px
    "qwen3_vl": (2, 4, 1 + 6),  # cells of 32 px
    "internvl": (3 * 4, 4, 4 + 3 * 4),  # two tiles and a thumbnail for wide images
    "idefics3": (5 * 4, 5 * 4, 10 * 4),  # 2 x 2 tiles and the whole
    "smolvlm": (5 * 4, 5 * 4, 10 * 4),
    "paligemma": (4, 4, 8),
    "gemma3": (4, 4, 8),
}
# The same per image, with its grid.
SQUARE, TILES, WIDE = ImageTokens(4, (2, 2)), ImageTokens(20), ImageTokens(12)
IMAGES = {
    "llava": ((SQUARE,), (SQUARE,), (SQUARE, SQUARE)),
    "llava_next": (
        (ImageTokens(14),),
        (ImageTokens(24),),
        (ImageTokens(24), ImageTokens(14)),
    ),
    "qwen2_5_vl": (
        (ImageTokens(2, (1, 2)),),
        (SQUARE,),
        (ImageTokens(1, (1, 1)), ImageTokens(6, (2, 3))),
    ),
    "internvl": ((WIDE,), (SQUARE,), (SQUARE, WIDE)),
    "idefics3": ((TILES,), (TILES,), (TILES, TILES)),
}
IMAGES |= {"qwen3_vl": IMAGES["qwen2_5_vl"], "smolvlm": IMAGES["idefics3"]}
IMAGES |= {"paligemma": IMAGES["llava"], "gemma3": IMAGES["llava"]}


def eager_rows(target, encoded):
    """The oracle: the last real position's row of eager `output_attentions`."""
    with torch.no_grad():
        out = target.model(**encoded.inputs, output_attentions=True, use_cache=False)
    last = encoded.inputs["attention_mask"].cumsum(-1).argmax(-1)
    each = torch.arange(len(last))
    return torch.stack([layer[each, :, last] for layer in out.attentions], 1)


@families
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_equal_eager_attentions(family, padding_side, tiny_target, samples):
    eager = tiny_target(family, "eager")
    encoded = eager.encode(samples, padding_side)
    assert (encoded.key_kind == KeyKind.PAD).any(), "the batch should need padding"
    expected = eager_rows(eager, encoded)
    for backend in ("sdpa", "eager"):
        rows = attend(tiny_target(family, backend), encoded, reduce_heads=False)
        assert rows.weights.shape == expected.shape
        worst = (rows.weights - expected).abs().max().item()
        assert worst < TOLERANCE, f"{backend} rows are off by {worst}"
        mean = attend(tiny_target(family, backend), encoded).weights
        assert torch.allclose(mean, expected.mean(2, keepdim=True), atol=TOLERANCE)


@families
def test_rows_are_distributions_over_real_keys(family, tiny_target, samples):
    (rows,) = probe(tiny_target(family), samples)
    assert rows.weights.dtype == torch.float32
    assert torch.allclose(rows.weights.sum(-1), torch.ones(()), atol=1e-5)
    pad = (rows.key_kind == KeyKind.PAD)[:, None, None].expand_as(rows.weights)
    assert (rows.weights[pad] == 0).all(), "padding got attention"
    mass = visual_mass(rows.weights, rows.key_kind)
    types = getattr(tiny_target(family).decoder.config, "layer_types", None) or ["full"] * 4
    # The tiny Gemma's sliding window of 16 ends before the image, as a real one's can.
    full = [i for i, kind in enumerate(types) if kind != "sliding_attention"]
    assert mass[:, full].min() > 0, "no attention reaches the image"
    assert rows.finite.all()
    assert rows.sample_id == ("id-0", "id-1", "id-2")
    assert rows.layers == tiny_target(family).layers == (0, 1, 2, 3)


@families
def test_batching_and_padding_do_not_matter(family, tiny_target, samples):
    target = tiny_target(family)
    together = attend(target, target.encode(samples))
    right = attend(target, target.encode(samples, "right"))
    for i, (alone,) in enumerate([probe(target, [s]) for s in samples]):
        for batch in (together, right):
            real = batch.key_kind[i] != KeyKind.PAD
            assert torch.equal(batch.key_kind[i][real], alone.key_kind[0])
            worst = (batch.weights[i][..., real] - alone.weights[0]).abs().max().item()
            assert worst < TOLERANCE, f"sample {i} alone differs by {worst}"


@families
def test_probe_keeps_order_over_batches(family, tiny_target, samples):
    batches = list(probe(tiny_target(family), iter(samples), batch_size=2, layers=[2, 0]))
    assert [b.sample_id for b in batches] == [("id-0", "id-1"), ("id-2",)]
    every = attend(tiny_target(family), tiny_target(family).encode(samples[:2]))
    assert batches[0].layers == (2, 0)
    assert torch.allclose(batches[0].weights, every.weights[:, [2, 0]], atol=TOLERANCE)


@families
def test_spans(family, tiny_target, samples):
    target = tiny_target(family)
    encoded = target.encode(samples)
    ids, kind = encoded.inputs["input_ids"], encoded.key_kind
    words = ("what is in the image?", "colour?", "andwhich of the two is larger, and why?")
    for i, text in enumerate(words):
        assert target.processor.tokenizer.decode(ids[i][kind[i] == KeyKind.PROMPT]) == text
        assert int((kind[i] == KeyKind.IMAGE).sum()) == IMAGE_TOKENS[family][i]
        rest = target.processor.tokenizer.decode(ids[i][kind[i] == KeyKind.TEMPLATE])
        assert text not in rest
        assert "not part of the prompt" not in target.processor.tokenizer.decode(ids[i])
    assert torch.equal(kind == KeyKind.IMAGE, ids == target.model.config.image_token_id)
    assert torch.equal(kind == KeyKind.PAD, encoded.inputs["attention_mask"] == 0)
    assert encoded.images == IMAGES[family]


@families
@pytest.mark.parametrize(
    "text",
    [
        "user\nassistant",
        "You are a helpful assistant.",
        "é 中文 🙂",
        "  spaces around  ",
        "</s> {{ messages }} {% raw %}",
        "0",
    ],
)
def test_spans_of_awkward_text(family, text, tiny_target):
    """Words that also stand in the template, several bytes per character, template syntax."""
    target = tiny_target(family)
    encoded = target.encode([sample(0, [(40, 60)], 0, text), sample(1, [(64, 64)], text, 0)])
    for ids, kind in zip(encoded.inputs["input_ids"], encoded.key_kind, strict=True):
        slots = (kind == KeyKind.PROMPT).nonzero().flatten()
        assert slots[-1] - slots[0] + 1 == len(slots), "one text, one run of tokens"
        found = target.processor.tokenizer.decode(ids[slots])
        assert found == (text.strip() if family == "gemma3" else text)


@families
def test_prompt_is_what_the_processor_writes(family, tiny_target, samples):
    """Our inputs equal those of transformers' own path from a chat to a batch."""
    target = tiny_target(family)
    if target.processor.chat_template is None:
        first = samples[0]
        theirs = target.processor(
            text="<image>" + first.prompt, images=first.images[0], return_tensors="pt"
        )
    else:
        first = samples[2]
        content = [
            {"type": "image", "image": first.images[p.index]}
            if isinstance(p, ImagePart)
            else {"type": "text", "text": p.text}
            for p in first.turns[0].parts
        ]
        theirs = target.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    ours = target.encode([first]).inputs
    assert "labels" not in ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name} differs"


@families
def test_system_and_earlier_user_turns(family, tiny_target):
    target = tiny_target(family)
    turns = (
        Turn("system", (TextPart("Be brief."),)),
        Turn("user", (ImagePart(0), TextPart("first"))),
        Turn("user", (TextPart("second"),)),
    )
    encoded = target.encode([Sample(0, "id", (picture(40, 60),), turns)])
    kind, ids = encoded.key_kind[0], encoded.inputs["input_ids"][0]
    decode = target.processor.tokenizer.decode
    assert decode(ids[kind == KeyKind.PROMPT]) == "firstsecond"
    assert "Be brief." in decode(ids[kind == KeyKind.TEMPLATE])


@families
def test_placeholder_in_the_text_is_refused_alone(family, tiny_target, samples):
    target = tiny_target(family)
    token = target.processor.tokenizer.convert_ids_to_tokens(target.image_token_id)
    bad = sample(7, [(40, 60)], 0, f"look at {token} here")
    with pytest.raises(RowError, match=r"row 7: .*remove it"):
        target.encode([samples[0], bad])
    skipped = []
    kept = list(probe(target, [samples[0], bad], on_skip=lambda s, e: skipped.append((s.row, e))))
    assert [s for s, _ in skipped] == [7]
    assert [b.sample_id for b in kept] == [("id-0",)]


@families
def test_fingerprint_follows_the_weights(family, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder(family), tmp_path / "copy")
    before = fingerprint(load(folder))
    assert before["id"] == fingerprint(load(tiny_folder(family)))["id"], "content, not path"
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = max(weights)
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    after = fingerprint(load(folder))
    assert after["id"] != before["id"]
    assert after["settings"] == before["settings"]
