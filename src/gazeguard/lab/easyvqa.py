"""The third-party `easy-vqa` set (PyPI, MIT): 5,000 real image files, 48,000 questions.

Its 4,000 training images are split here once: the lower half may be used to train the lab's base
model, the upper half is for fine-tuning sets, and the package's own test images are for scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gazeguard.errors import MissingExtra
from gazeguard.lab.worlds import QuestionAnswer

Split = Literal["base", "finetune", "test"]


def load(split: Split) -> list[tuple[Path, list[QuestionAnswer]]]:
    """Every image of a split with its questions, in image order."""
    try:
        import easy_vqa
    except ImportError as error:
        raise MissingExtra("easy-vqa", "lab", "The easy-vqa world") from error
    if split == "test":
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
        wanted = sorted(paths)
    else:
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
        half = len(paths) // 2
        wanted = sorted(paths)[:half] if split == "base" else sorted(paths)[half:]
    asked: dict[int, list[QuestionAnswer]] = {i: [] for i in wanted}
    for question, answer, image in zip(*questions, strict=True):
        if image in asked:
            asked[image].append(QuestionAnswer(_kind(question, answer), question, answer))
    return [(Path(paths[i]), asked[i]) for i in wanted]


def _kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "existence"
    return "color" if "color" in question else "shape"
