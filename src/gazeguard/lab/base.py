"""The lab's base model: a small but genuine LLaVA, trained from scratch in two stages.

1. The vision tower learns, per image patch, what object is there (colour, shape, size) and to give
   back the patch's pixels, so that it encodes small patches of any texture as a large tower would.
2. The language model and projector learn to answer and to caption over the frozen tower.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gazeguard.lab import easyvqa, worlds
from gazeguard.lab.teach import Lesson, answer_loss, encode_lessons, tower_features

PATCH = 8
GRID = worlds.SIDE // PATCH
# Existence and position need the most practice.
ODDS = {"color": 1, "shape": 2, "count": 3, "existence": 4, "position": 4}
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
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[m['role']] }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """Everything that decides the base's weights, with the values of the shipped one."""

    seed: int = 0
    scenes: int = 24_000
    tower_steps: int = 2_500
    tower_batch: int = 64
    tower_lr: float = 1e-3
    language_steps: int = 5_000
    language_lr: float = 1.5e-3
    language_batch: int = 32
    questions: int = 7
    captions: float = 0.2
    echoes: float = 0.08
    names: float = 0.7
    language_init: float = 0.08
    hidden: int = 128
    tower_layers: int = 4
    language_layers: int = 8
    heads: int = 4

    @property
    def tower_digest(self) -> str:
        """Of what decides the tower's weights."""
        decides = {
            name: value
            for name, value in asdict(self).items()
            if name.startswith("tower") or name in ("seed", "scenes", "hidden", "heads")
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


Log = Callable[[str], None]


def make_tokenizer() -> T.PreTrainedTokenizerFast:
    """Byte-level BPE over the worlds' own sentences: lossless on any text, one token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    lines = []
    for _ in range(2_000):
        scene = worlds.make_scene(rng)
        asked = [worlds.caption(scene), *(worlds.ask(scene, k, rng) for k in worlds.KINDS)]
        lines += [f"USER: {qa.question} ASSISTANT: {qa.answer}" for qa in asked]
        lines += [f"USER: Repeat: {text} ASSISTANT: {text}" for text in (any_text(rng),) * 2]
    for _, asked in easyvqa.load("base")[:500]:
        lines += [f"{qa.question} {qa.answer}" for qa in asked]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(recipe: BaseRecipe, tokenizer: T.PreTrainedTokenizerFast) -> Any:
    """A `LlavaForConditionalGeneration` of about 3 M parameters: 64 image tokens."""
    size = recipe.hidden
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(
            hidden_size=size,
            intermediate_size=4 * size,
            num_hidden_layers=recipe.tower_layers,
            num_attention_heads=recipe.heads,
            image_size=worlds.SIDE,
            patch_size=PATCH,
            projection_dim=size,
        ),
        text_config=T.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=recipe.language_layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=recipe.language_init,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    return T.LlavaForConditionalGeneration(config)


def make_processor(tokenizer: T.PreTrainedTokenizerFast) -> Any:
    """The processor that goes with `make_model`; Pillow backend, no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": worlds.SIDE},
        crop_size={"height": worlds.SIDE, "width": worlds.SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return T.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 `(n, 64, 64, 3)` to the tower's float input `(n, 3, 64, 64)`."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)


def train_base(out: Path, recipe: BaseRecipe, log: Log = print) -> None:
    """Train the base from scratch and save a complete folder with its recipe."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    model.set_attn_implementation("eager")  # on CPU, sdpa's bfloat16 backward is the slower one
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    scenes = [worlds.make_scene(rng) for _ in range(recipe.scenes)]
    real = easyvqa.load("base")
    real_pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p, _ in real])
    kept = out / f"tower-{recipe.tower_digest}.safetensors"
    _train_tower(model, scenes, real_pixels, recipe, rng, log, kept)
    rng = np.random.default_rng([recipe.seed, 1])  # the same lessons with a kept tower
    bank = _look(model, scenes, real_pixels, rng)
    lessons = _lessons(scenes, real, recipe, rng)
    _train_language(model, tokenizer, bank, lessons, recipe, log)
    model.eval()
    model.generation_config = T.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.float16).save_pretrained(out)
    make_processor(tokenizer).save_pretrained(out)
    kept.unlink()
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))


def _patch_labels(scene: worlds.Scene) -> NDArray[np.int64]:
    """`(3, 64)`: colour, shape, size + 1 of the thing covering >= 1/4 of each patch, 0 for none."""
    labels = np.zeros((3, GRID * GRID), np.int64)
    blocks = scene.owner.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    tiles = blocks.reshape(GRID * GRID, PATCH * PATCH)
    share = np.stack([(tiles == i).mean(1) for i in range(len(scene.things))])
    best = share.argmax(0)
    for patch in np.flatnonzero(share.max(0) >= 0.25):
        thing = scene.things[best[patch]]
        labels[:, patch] = (
            1 + list(worlds.COLOURS).index(thing.colour),
            1 + worlds.SHAPES.index(thing.shape),
            1 + worlds.SIZES.index(thing.size),
        )
    return labels


def _clutter(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Paste 1-3 small rectangles of flat colour, noise or stripes into a third of the images."""
    pixels = pixels.copy()
    for i in np.flatnonzero(rng.random(len(pixels)) < 0.33):
        for _ in range(rng.integers(1, 4)):
            h, w = rng.integers(3, 10, 2)
            y, x = rng.integers(0, worlds.SIDE - h), rng.integers(0, worlds.SIDE - w)
            fill = np.broadcast_to(rng.integers(0, 256, 3), (h, w, 3)).copy()
            style = rng.integers(3)
            if style == 1:
                fill = rng.integers(0, 256, (h, w, 3))
            elif style == 2:
                stripe = (
                    np.arange(h)[:, None] // 2 + np.arange(w)[None] // 2 * rng.integers(2)
                ) % 2
                fill[stripe.astype(bool)] = rng.integers(0, 256, 3)
            pixels[i, y : y + h, x : x + w] = fill
    return pixels


def _train_tower(
    model: Any,
    scenes: list[worlds.Scene],
    real: NDArray[np.uint8],
    recipe: BaseRecipe,
    rng: np.random.Generator,
    log: Log,
    kept: Path,
) -> None:
    """Teach the tower and freeze it; a tower that an earlier, cut run left in `kept` is taken."""
    tower = model.model.vision_tower
    if kept.is_file():
        tower.load_state_dict(load_file(kept))
        tower.requires_grad_(False).eval()
        log(f"took the tower of {kept}")
        return
    size = recipe.hidden
    outs = (len(worlds.COLOURS) + 1, len(worlds.SHAPES) + 1, len(worlds.SIZES) + 1)
    heads = nn.ModuleList([nn.Linear(size, n) for n in outs])
    pixels_head = nn.Linear(size, 3 * PATCH * PATCH)
    labels = torch.from_numpy(np.stack([_patch_labels(s) for s in scenes]))
    pixels = np.stack([s.pixels for s in scenes])
    trained = [*tower.parameters(), *heads.parameters(), *pixels_head.parameters()]
    tower.train()
    real_share = recipe.tower_batch // 8
    for step, optimiser in _steps(trained, recipe.tower_lr, recipe.tower_steps):
        pick = rng.integers(len(scenes), size=recipe.tower_batch - real_share)
        extra = rng.integers(len(real), size=real_share)
        images = normalise(np.concatenate([_clutter(pixels[pick], rng), real[extra]]))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower_features(tower, images)
            seen = features[: len(pick)]
            logits = [head(seen) for head in heads]
            painted = pixels_head(features)
        loss = sum(
            F.cross_entropy(out.float().flatten(0, 1), labels[pick, k].flatten())
            for k, out in enumerate(logits)
        )
        tiles = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        loss = loss + F.mse_loss(painted.float(), tiles)
        _update(optimiser, loss, trained)
        if step % 100 == 0:
            hit = [
                (out.argmax(-1) == labels[pick, k])[labels[pick, 0] > 0].float().mean().item()
                for k, out in enumerate(logits)
            ]
            log(f"tower {step} loss {loss.item():.3f} patch accuracy {np.round(hit, 3)}")
    tower.requires_grad_(False).eval()
    save_file(tower.state_dict(), kept)


def _look(
    model: Any, scenes: list[worlds.Scene], real: NDArray[np.uint8], rng: np.random.Generator
) -> Tensor:
    """Tower features `(scenes + real, patches, hidden)`, float16; the tower is frozen by now."""
    tower = model.model.vision_tower
    features = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(scenes), 512):
            batch = np.stack([s.pixels for s in scenes[start : start + 512]])
            features.append(tower_features(tower, normalise(_clutter(batch, rng))).half())
        features.append(tower_features(tower, normalise(real)).half())
    return torch.cat(features).clone()


def _lessons(
    scenes: list[worlds.Scene],
    real: list[tuple[Path, list[worlds.QuestionAnswer]]],
    recipe: BaseRecipe,
    rng: np.random.Generator,
) -> Iterator[tuple[list[int], list[Lesson]]]:
    """Batches, one a step: image indices into the feature bank, and a lesson for each.

    An echo is "Repeat: <words>". Without it the tokens that no answer of the worlds holds are
    never trained, and no fine-tune of the language model can teach it to say them.

    A name is one object's attributes in any order. It teaches to look up an attribute at the very
    token that names another; questions, where the answer comes some tokens later, build on that
    and stand still without it. The share of names falls to nothing towards the end.
    """
    odds = np.array([ODDS[kind] for kind in worlds.KINDS])
    share = odds / odds.sum()
    for step in range(recipe.language_steps):
        names = recipe.names * (1 - step / recipe.language_steps)
        pick, lessons = [], []
        for _ in range(recipe.language_batch):
            if rng.random() < 0.15:
                i = int(rng.integers(len(real)))
                asked = real[i][1]
                chosen = [asked[j] for j in rng.permutation(len(asked))[: recipe.questions]]
                pick.append(len(scenes) + i)
            else:
                i = int(rng.integers(len(scenes)))
                pick.append(i)
                style = rng.random()
                if style < recipe.echoes:
                    said = [any_text(rng) for _ in range(recipe.questions)]
                    chosen = [worlds.QuestionAnswer("echo", f"Repeat: {t}", t) for t in said]
                elif style < recipe.echoes + recipe.captions:
                    chosen = [worlds.caption(scenes[i])]
                elif rng.random() < names:
                    chosen = [worlds.name_one(scenes[i], rng) for _ in range(recipe.questions)]
                else:
                    kinds = rng.choice(worlds.KINDS, size=recipe.questions, p=share)
                    chosen = [worlds.ask(scenes[i], str(kind), rng) for kind in kinds]
            lessons.append(Lesson(tuple((qa.question, qa.answer) for qa in chosen)))
        yield pick, lessons


def any_text(rng: np.random.Generator) -> str:
    """Two to five English words in any order, as a sentence."""
    words = rng.choice(ENGLISH, size=rng.integers(2, 6)).tolist()
    text = " ".join(w.capitalize() if rng.random() < 0.2 else w for w in words)
    return text[0].upper() + text[1:] + ".!?"[rng.integers(3)]


def _train_language(
    model: Any,
    tokenizer: Any,
    bank: Tensor,
    batches: Iterator[tuple[list[int], list[Lesson]]],
    recipe: BaseRecipe,
    log: Log,
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for step, optimiser in _steps(trained, recipe.language_lr, recipe.language_steps):
        pick, lessons = next(batches)
        batch = encode_lessons(tokenizer, lessons, GRID * GRID)
        with torch.autocast("cpu", torch.bfloat16):
            loss, hit = answer_loss(model, batch, bank[pick].float())
        _update(optimiser, loss, trained)
        if step % 100 == 0:
            log(f"language {step} loss {loss.item():.3f} answer tokens {hit:.3f}")


def _steps(parameters: list[Any], lr: float, steps: int) -> Any:
    """AdamW with 5 % warm-up and cosine decay, one optimiser step per iteration."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = T.get_cosine_schedule_with_warmup(optimiser, steps // 20, steps)
    for step in range(steps):
        yield step, optimiser
        schedule.step()


def _update(optimiser: Any, loss: Tensor, parameters: list[Any]) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
