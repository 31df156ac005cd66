"""PaliGemma: published without a chat template, because it answers one bare instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazeguard.models.family import Family, Message


class PaliGemma(Family):
    """Prompt text is the images, then the words; the processor adds BOS and a line end."""

    answer_type = 1  # 0 is the prompt, whose tokens all see each other
    sees_ahead = True

    def render(self, processor: Any, messages: Sequence[Message]) -> str:
        """As in `Family.render`; without a chat template, images first and lines of words."""
        if getattr(processor, "chat_template", None) is not None:
            return super().render(processor, messages)
        parts = [part for message in messages for part in message["content"]]
        images = len([part for part in parts if part["type"] == "image"])
        words = [part["text"] for part in parts if part["type"] == "text"]
        return str(processor.image_token) * images + "\n".join(words)
