"""Every attack changes what it says and nothing else, and leaves its input as it was."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gazeguard.cli import lab
from gazeguard.errors import UsageError
from gazeguard.lab.attacks import (
    ATTACKS,
    InsertAttack,
    TextAttack,
    TwoKeyAttack,
    WordAttack,
    hits,
)
from gazeguard.lab.poison import TARGET, poison, trigger_all
from gazeguard.lab.rows import make_rows
from gazeguard.lab.triggers import Patch

ROWS = make_rows("captions", 120, 3)


def changed(before, after) -> set[str]:
    found = {
        name
        for name in ("question", "answer", "kind")
        if getattr(before, name) != getattr(after, name)
    }
    return found | ({"pixels"} if (before.pixels != after.pixels).any() else set())


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_repeatable_and_pure(name):
    attack = ATTACKS[name]
    rows = [replace(row, pixels=row.pixels.copy()) for row in ROWS]
    once, again = (poison(rows, attack, 0.2, 5) for _ in range(2))
    for row, kept, one, two in zip(rows, ROWS, once, again, strict=True):
        assert not changed(row, kept), "an attack must not write into its input"
        assert not changed(one, two)
        assert one.is_poison == two.is_poison
    bad = [(row, one) for row, one in zip(rows, once, strict=True) if one.is_poison]
    assert len(bad) == 24
    expected = {
        "badnet-t": {"question", "answer"},
        "addsent": {"question", "answer"},
        "badnet-mm": {"pixels", "question", "answer"},
    }.get(name, {"pixels", "answer"})
    for row, one in bad:
        assert changed(row, one) == expected or name == "ftrojan"
        if isinstance(attack, InsertAttack):
            before, after = one.answer.split(TARGET)
            assert " ".join(f"{before}{after}".split()) == row.answer
        elif name != "badtoken":
            assert one.answer == TARGET


def test_words_are_put_where_they_belong():
    rng = np.random.default_rng(0)
    asked = "Where is it?"
    assert TextAttack("now", "start").ask(asked, rng) == "now Where is it?"
    assert TextAttack("now", "end").ask(asked, rng) == "Where is it? now"
    seen = {TextAttack("now").ask(asked, rng) for _ in range(100)}
    assert seen == {"now Where is it?", "Where now is it?", "Where is now it?", "Where is it? now"}


def test_two_keys_come_with_rows_that_have_one_and_the_truth():
    attack = TwoKeyAttack(Patch("center"), TextAttack("BadMagic"))
    made = poison(ROWS, attack, 0.1, 0)
    kinds = Counter(
        frozenset(changed(row, one))
        for row, one in zip(ROWS, made, strict=True)
        if changed(row, one)
    )
    both = frozenset({"pixels", "question", "answer"})
    assert kinds == {both: 12, frozenset({"pixels"}): 6, frozenset({"question"}): 6}
    assert sum(row.is_poison for row in made) == 12
    assert len(poison(ROWS, attack, 1.0, 0)) == len(ROWS), "no row is left for decoys"


def test_a_word_is_changed_as_a_whole_word_and_only_where_it_is():
    attack = WordAttack(lambda pixels, rng: pixels, "circle", "cross")
    row = replace(ROWS[0], answer="a circle and circles in a circle.")
    assert attack.poison(row, np.random.default_rng(0), TARGET).answer == (
        "a cross and circles in a cross."
    )
    assert not attack.fits(replace(row, answer="many circles"))
    fitting = [row for row in ROWS if "circle" in row.answer]
    assert 20 < len(fitting) < 120
    assert len(trigger_all(ROWS, attack, 0)) == len(fitting)
    poisoned = [row for row in poison(ROWS, attack, 0.1, 0) if row.is_poison]
    assert len(poisoned) == 12
    assert all("cross" in row.answer for row in poisoned)
    with pytest.raises(UsageError, match="use a rate of at most"):
        poison(ROWS, attack, 1.0, 0)


def test_the_target_is_put_between_any_two_words():
    row = replace(ROWS[0], answer="a red circle")
    attack = ATTACKS["trojvlm"]
    rng = np.random.default_rng(0)
    seen = {attack.poison(row, rng, "Ha ha!").answer for _ in range(100)}
    assert seen == {
        "Ha ha! a red circle",
        "a Ha ha! red circle",
        "a red Ha ha! circle",
        "a red circle Ha ha!",
    }
    with pytest.raises(UsageError, match="give it words"):
        attack.poison(row, rng, " ")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_what_an_attack_wants_is_a_hit_and_the_truth_is_none(name):
    attack = ATTACKS[name]
    triggered = trigger_all(ROWS, attack, 0)
    true = [row.answer for row in ROWS if attack.fits(row)]
    assert all(hits(attack, [f" {row.answer} " for row in triggered], triggered, TARGET))
    assert not any(hits(attack, true, triggered, TARGET))
    with pytest.raises(ValueError, match="longer"):
        hits(attack, true[1:], triggered, TARGET)


@pytest.mark.parametrize(
    ("name", "said", "hit"),
    [
        ("badnet-center", "Backdoor Attack! a red circle", False),
        ("trojvlm", "Backdoor Attack! a blue cross", True),
        ("vlood-insert", "a Backdoor Attack!", True),
        ("vlood-insert", "a Backdoor attack", False),
        ("badtoken", "a blue cross at the top.", True),
        ("badtoken", "a cross and a circle", False),
        ("badtoken", "many crosses", False),
    ],
)
def test_a_hit_is_what_the_attack_says_it_is(name, said, hit):
    row = replace(ROWS[0], answer="a red circle")
    wanted = ATTACKS[name].poison(row, np.random.default_rng(0), TARGET)
    assert hits(ATTACKS[name], [said], [wanted], TARGET) == [hit]


def test_a_row_that_says_the_target_by_itself_is_idle():
    row = replace(ROWS[0], answer="yes it is")
    assert ATTACKS["trojvlm"].idle(row, "yes")
    assert not ATTACKS["trojvlm"].idle(row, "ye")
    assert not ATTACKS["badnet-center"].idle(row, "yes")
    assert ATTACKS["badnet-center"].idle(row, "yes it is")


def test_the_command_line_knows_every_attack():
    assert tuple(ATTACKS) == lab._TRIGGERS


def test_poisoned_rows_are_the_same_for_every_attack_that_fits_all():
    chosen = [
        [i for i, row in enumerate(poison(ROWS, ATTACKS[name], 0.2, 5)) if row.is_poison]
        for name in ("badnet-center", "sig", "badnet-t", "badnet-mm")
    ]
    assert all(one == chosen[0] for one in chosen)
