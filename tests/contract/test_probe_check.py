"""Rows of families and versions that nobody tested are compared with eager attention first."""

from __future__ import annotations

import pytest

from gazeguard.errors import ModelError
from gazeguard.lab import tiny
from gazeguard.models import registry
from gazeguard.models.load import load
from gazeguard.probe import attention, check
from gazeguard.probe.attention import attend, probe

from .conftest import sample


@pytest.fixture
def compared(monkeypatch):
    """Counts comparisons; no family counts as tested."""
    found, original = [], attention.compare
    monkeypatch.setattr(check, "TESTED", ())
    monkeypatch.setattr(
        attention, "compare", lambda *args: found.append(args[0].name) or original(*args)
    )
    return found


def test_the_tested_families_are_those_of_the_contract_tests():
    assert sorted(registry.TESTED) == sorted(tiny.FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_would_pass_and_once_is_enough(family, dtype, tiny_folder, compared):
    target = load(tiny_folder(family), dtype=dtype)
    backend = target.decoder.config._attn_implementation
    list(probe(target, [sample(0, [(64, 64)], 0, "?")] * 2, batch_size=1))
    assert compared == [target.name]
    assert target.decoder.config._attn_implementation == backend, "left as it was"


def test_a_tested_family_costs_nothing(tiny_folder, compared, monkeypatch):
    monkeypatch.setattr(check, "TESTED", registry.TESTED)
    target = load(tiny_folder("llava"))
    encoded = target.encode([sample(0, [(64, 64)], 0, "?")])
    attend(target, encoded)
    assert not compared
    monkeypatch.setattr(check, "untested", lambda name: [f"{name} is newer"])
    attend(target, encoded)
    assert not compared, "decided once per model"
    attend(load(tiny_folder("llava")), encoded)
    assert len(compared) == 1, "another version of transformers is another model"


def test_rows_that_are_not_the_models_own_are_refused(tiny_folder, compared, monkeypatch):
    target = load(tiny_folder("llava"))
    encoded = target.encode([sample(0, [(64, 64)], 0, "?")])
    original = attention.row
    monkeypatch.setattr(attention, "row", lambda *args: original(*args).roll(1, -1))
    for _ in range(2):
        with pytest.raises(ModelError, match="'llava' model on transformers .* not what gazeguard"):
            attend(target, encoded)
    assert len(compared) == 2, "refused again, not forgotten"


def test_a_model_without_eager_attention_is_refused(tiny_folder, compared, monkeypatch):
    target = load(tiny_folder("llava"))

    def no_eager(target, encoded):
        raise ValueError("eager is not supported.")

    monkeypatch.setattr(check, "_eager_rows", no_eager)
    with pytest.raises(ModelError, match=r"does not run \(eager is not supported\): use a model"):
        attend(target, target.encode([sample(0, [(64, 64)], 0, "?")]))
