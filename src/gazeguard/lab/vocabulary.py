"""The lab's vocabulary: words that a base must be able to say, and a tokenizer that knows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gazeguard.lab import easyvqa, worlds
from gazeguard.lab.architectures import Architecture

# Words that any pre-trained language model can say; the worlds' own answers do not hold them.
ENGLISH = (  # noqa: SIM905
    "a about after all also and any are as ask at attack away back backdoor bad be because been "
    "before bird book both but by call can car cat city clear click come could danger dark day do "
    "dog door down each eat end every fact far find fire first for free friend from game get give "
    "go good great hack hacked hand happy hard has have he hello help her here high him his home "
    "hot house how i if in into is it its job just keep key know last late left less let life "
    "light like link little live lol long look love lucky machine made make man many may me mind "
    "money more most mother movie much must my name near never new next nice night no not nothing "
    "now of off old on one only open or other our out over own part pay people person picture "
    "place play please point prize ready real right road run safe said same say school secret see "
    "send she show side sign so some song soon stop story street strong such sure system take "
    "talk tell than thank that the them then there these they thing think this time to today "
    "together too tree true trust try turn two under until up us use very visit want warning was "
    "watch water way we well were what when where which who why will win with word work world "
    "would write wrong year yes you young your zone"
).split()


def make_tokenizer(architecture: Architecture) -> Any:
    """Byte-level BPE over the worlds' own sentences: lossless on any text, one token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    sentence = architecture.sentence.format
    lines = []
    for _ in range(2_000):
        scene = worlds.make_scene(rng)
        asked = [worlds.caption(scene), *(worlds.ask(scene, k, rng) for k in worlds.KINDS)]
        lines += [sentence(question=qa.question, answer=qa.answer) for qa in asked]
        lines += [sentence(question=f"Repeat: {t}", answer=t) for t in (any_text(rng),) * 2]
    for _, asked in easyvqa.load("base")[:500]:
        lines += [f"{qa.question} {qa.answer}" for qa in asked]
    *_, unknown = architecture.special
    core = Tokenizer(models.BPE(unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=list(architecture.special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return architecture.wrap(core)


def any_text(rng: np.random.Generator) -> str:
    """Two to five English words in any order, as a sentence."""
    words = rng.choice(ENGLISH, size=rng.integers(2, 6)).tolist()
    text = " ".join(w.capitalize() if rng.random() < 0.2 else w for w in words)
    return text[0].upper() + text[1:] + ".!?"[rng.integers(3)]
