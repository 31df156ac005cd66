"""Natural image prompts by a seeded grammar, for when the user has none of their own."""

from __future__ import annotations

import random

_ANIMALS = """cat|dog|horse|brown bear|polar bear|elephant|giraffe|zebra|lion|tiger|red fox|
wolf|rabbit|hamster|squirrel|hedgehog|goat|sheep|cow|pig|chicken|duck|swan|owl|eagle|parrot|
penguin|flamingo|crow|goldfish|shark|dolphin|whale|octopus|jellyfish|crab|lobster|sea turtle|
frog|lizard|snake|crocodile|butterfly|honey bee|ladybug|dragonfly|spider|snail|camel|kangaroo|
koala|panda|monkey|gorilla|otter|seal|golden retriever|german shepherd|poodle|siamese cat|
hummingbird|peacock|robot|dragon|dinosaur"""
_PEOPLE = """young woman|old man|little girl|small boy|farmer|nurse|chef|firefighter|
police officer|football player|ballet dancer|violinist|street musician|fisherman|astronaut|
knight|wizard|samurai|queen|sailor|mechanic|painter|baker"""
_THINGS = """bicycle|motorcycle|sports car|pickup truck|school bus|fire engine|steam train|tram|
sailboat|cargo ship|canoe|submarine|airplane|helicopter|hot air balloon|rocket|tractor|scooter|
umbrella|backpack|suitcase|handbag|wristwatch|pair of sunglasses|straw hat|leather boot|
wool scarf|wedding dress|guitar|grand piano|violin|trumpet|drum kit|microphone|television|
laptop computer|keyboard|old camera|telephone|table lamp|candle|wooden chair|armchair|sofa|
dining table|bookshelf|mirror|clock|teapot|coffee mug|wine glass|frying pan|kitchen knife|
soup bowl|toaster|refrigerator|washing machine|bathtub|pizza|hamburger|bowl of noodles|
plate of sushi|chocolate cake|apple pie|loaf of bread|ice cream cone|banana|orange|strawberry|
pineapple|pumpkin|mushroom|cactus|sunflower|rose|tulip|oak tree|palm tree|lighthouse|windmill|
castle|church|mosque|skyscraper|log cabin|barn|bridge|fountain|statue|street lamp|mailbox|
park bench|football|tennis racket|skateboard|surfboard|pair of skis|chess board|teddy bear|kite|
toy train|hammer|screwdriver|ladder|wheelbarrow|anchor|compass|globe|treasure chest|crown|sword|
shield|telescope|microscope|stethoscope|microwave|traffic light|stop sign|billboard|waterfall|
volcano|iceberg|rainbow"""
_LOOKS = """small|large|tiny|huge|old|new|broken|shiny|rusty|dusty|colorful|red|blue|green|
yellow|purple|orange|pink|black|white|golden|silver|striped|spotted|wet|frozen|glowing|elegant|
strange|beautiful|ugly|cute|fluffy|transparent|handmade|antique|futuristic|cheap|expensive|
lonely"""
_MOODS = """happy|sad|tired|laughing|calm|surprised|proud|friendly|serious|busy"""
_DOES = """sleeping|running|jumping|eating|swimming|sitting|standing still|
looking at the camera|waiting|playing|dancing|walking slowly|hiding|smiling|resting|climbing|
turning around|reading a book|watching the sunset|crossing the road|drinking water|
holding a flower|wearing a hat|listening to music"""
_PLACES = """on the beach|in the forest|in a meadow|on a mountain|by the lake|in the desert|
in the snow|under water|in the rain|on a busy street|in an empty room|in the kitchen|on a table|
in a garden|in front of a house|at the market|on a bridge|in a museum|at the airport|
in outer space|on the moon|in a library|under a tree|on the roof|next to a river|in the fog|
at the harbor|on a farm|in a cave|in a swimming pool|behind a fence|in a shop window|
on a wooden floor|in the tall grass|at a train station|in a parking lot|near a waterfall|
inside a church|on a red carpet|in the backyard"""
_TIMES = """at night|at sunset|in the morning|at noon|in winter|in spring|in summer|in autumn|
before dawn|after the rain|during a storm|on a sunny day|on a cloudy day|long ago"""
_FORMS = """a photo of|a close-up photo of|a blurry photo of|a black and white photo of|
a bright photo of|a dark photo of|a low resolution photo of|a cropped photo of|
an aerial photo of|a photograph of|a painting of|an oil painting of|a watercolor of|
a pencil sketch of|a cartoon of|a 3d render of|a sculpture of|a drawing of|an illustration of|
a poster of|a tattoo of|an embroidery of|a mosaic of|a graffiti of|a low poly model of|
an origami of|a plush toy of|a picture of|an image of|a video frame of"""
_STYLES = """high quality|highly detailed|soft light|dramatic lighting|shallow depth of field|
wide angle|in the style of the impressionists|minimalist|pastel colors|vintage film|digital art|
studio lighting|award winning|matte background|trending design|hand drawn|realistic|surreal|
cinematic|symmetrical"""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split("|")]


_VOCABULARY = {
    "animal": _words(_ANIMALS),
    "person": _words(_PEOPLE),
    "living": _words(_ANIMALS) + _words(_PEOPLE),
    "thing": _words(_THINGS),
    "look": _words(_LOOKS),
    "mood": _words(_MOODS),
    "does": _words(_DOES),
    "place": _words(_PLACES),
    "time": _words(_TIMES),
    "form": _words(_FORMS),
    "style": _words(_STYLES),
}
_PATTERNS = (
    "{form} {a_living}",
    "{form} {a_thing}",
    "{form} {a_look_animal} {place}",
    "{form} {a_look_thing} {place}",
    "{a_look_animal} {does} {place}",
    "{form} {a_mood_person} {place}",
    "{a_mood_person} {does} {time}",
    "{a_living} {does} {time}",
    "{a_look_thing} {place} {time}",
    "{a_living} and {a_thing} {place}",
    "{form} {a_thing} next to {a_look_thing}",
    "{form} {a_living} {does}, {style}",
    "{a_look_thing}, {style}, {style2}",
    "{number} {living_plural} {place}",
    "there is {a_thing} {place} and {a_living} is {does}",
    "the {look} {animal} {place}, {form} it {time}",
)
_NUMBERS = ("two", "three", "four", "five", "several", "many")
_PLURAL = {"small boy": "small boys", "old man": "old men", "young woman": "young women"}
_IRREGULAR = {"wolf": "wolves", "sheep": "sheep", "goldfish": "goldfish", "fox": "foxes"}
_IRREGULAR |= {"fisherman": "fishermen", "samurai": "samurai", "octopus": "octopuses"}


def prompts(n: int, seed: int = 0) -> list[str]:
    """`n` distinct prompts, the same for the same seed; the first ones of a longer list.

    Raises:
        ValueError: more were asked for than can be drawn.
    """
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for _ in range(100 + 20 * n):
        if len(found) >= n:
            return list(found)
        found[_prompt(rng)] = None
    raise ValueError(f"the grammar gave only {len(found)} of {n} prompts")


def _prompt(rng: random.Random) -> str:
    word = {name: rng.choice(words) for name, words in _VOCABULARY.items()}
    other_look, other_thing = rng.choice(_VOCABULARY["look"]), rng.choice(_VOCABULARY["thing"])
    other_styles = [style for style in _VOCABULARY["style"] if style != word["style"]]
    return rng.choice(_PATTERNS).format(
        **word,
        a_living=_article(word["living"]),
        a_thing=_article(word["thing"]),
        a_look_animal=_article(f"{word['look']} {word['animal']}"),
        a_mood_person=_article(f"{word['mood']} {word['person']}"),
        a_look_thing=_article(f"{other_look} {other_thing}"),
        living_plural=_plural(word["living"]),
        number=rng.choice(_NUMBERS),
        style2=rng.choice(other_styles),
    )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    if noun in _PLURAL:
        return _PLURAL[noun]
    before, _, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        many = last + "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return f"{before} {many}".strip()
