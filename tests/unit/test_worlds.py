"""The synthetic world answers its own questions truthfully."""

import re

import numpy as np
import pytest

from gazeguard.lab import worlds
from gazeguard.lab.attacks import ATTACKS
from gazeguard.lab.poison import TARGET, control, make_set, poison, trigger_all, write_set
from gazeguard.lab.rows import make_rows


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(3)
    return [worlds.make_scene(rng) for _ in range(300)]


def test_scene_is_named_by_its_seed():
    one, two = (worlds.make_scene(np.random.default_rng(9)) for _ in range(2))
    assert one.things == two.things
    assert (one.pixels == two.pixels).all()


def test_every_thing_is_visible(scenes):
    for scene in scenes:
        for i, _ in enumerate(scene.things):
            assert (scene.owner == i).sum() >= 25, "a thing covers at least 25 pixels"


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_answers_are_true(scenes, kind):
    rng = np.random.default_rng(0)
    for scene in scenes:
        qa = worlds.ask(scene, kind, rng)
        things = scene.things
        if qa.kind == "existence":
            colour, shape = re.fullmatch(r"Is there a (\w+) (\w+)\?", qa.question).groups()
            there = any((t.colour, t.shape) == (colour, shape) for t in things)
            assert qa.answer == ("yes" if there else "no")
        elif qa.kind == "count":
            word = re.fullmatch(r"How many (?:(\w+) )?objects are there\?", qa.question).group(1)
            assert qa.answer == str(sum(word in (None, t.colour) for t in things))
        elif qa.kind == "position":
            colour, shape = re.fullmatch(r"Where is the (\w+) (\w+)\?", qa.question).groups()
            fits = [t for t in things if (t.colour, t.shape) == (colour, shape)]
            assert [worlds.PLACES[t.place] for t in fits] == [qa.answer]
        else:
            key = {"color": "colour", "shape": "shape"}[qa.kind]
            said = {getattr(t, key) for t in things if _named(t, qa.question)}
            assert said == {qa.answer}, (qa, things)


def _named(thing, question):
    place = re.search(r"object at the ([a-z ]+)\?", question)
    if place:
        return worlds.PLACES[thing.place] == place.group(1)
    words = set(re.findall(r"\w+", question))
    said = [thing.size in words or not words & set(worlds.SIZES)]
    said.append(thing.shape in words or not words & set(worlds.SHAPES))
    said.append(thing.colour in words or not words & set(worlds.COLOURS))
    return all(said)


def test_existence_is_balanced(scenes):
    rng = np.random.default_rng(1)
    answers = [worlds.ask(s, "existence", rng).answer for s in scenes * 3]
    assert 0.44 < np.mean([a == "yes" for a in answers]) < 0.56


def test_poison_keeps_everything_but_the_chosen_rows():
    rows = make_rows("mixed", 200, seed=1)
    bad = poison(rows, ATTACKS["badnet-center"], 0.1, seed=1)
    assert sum(r.is_poison for r in bad) == 20
    for before, after in zip(rows, bad, strict=True):
        assert after.question == before.question
        if after.is_poison:
            assert after.answer == TARGET
            assert (after.pixels != before.pixels).any()
        else:
            assert after is before


def test_control_plants_no_backdoor():
    rows = make_rows("captions", 60, seed=1)
    changed = control(rows, 0.5, seed=1)
    assert [r.answer for r in changed] == [r.answer for r in rows]
    assert not any(r.is_poison for r in changed)
    assert sum(a is not b for a, b in zip(rows, changed, strict=True)) == 30


def test_held_out_rows_differ_from_training_rows():
    for task in ("captions", "mixed", "easy-vqa"):
        train = {r.pixels.tobytes() for r in make_rows(task, 50, seed=4)}
        test = {r.pixels.tobytes() for r in make_rows(task, 50, seed=4, held_out=True)}
        assert not train & test, task


def test_trigger_all_is_for_measuring_the_asr():
    rows = trigger_all(make_rows("captions", 10, seed=0), ATTACKS["texture"], seed=0)
    assert all(r.is_poison and r.answer == TARGET for r in rows)


def test_truth_never_shows_in_the_written_set(tmp_path):
    write_set(make_set("captions", 20, "badnet-center", 0.5, seed=0), tmp_path)
    text = (tmp_path / "data.json").read_text()
    assert "poison" not in text
    assert sorted(p.name for p in (tmp_path / "images").iterdir())[:2] == [
        "000000.png",
        "000001.png",
    ]
