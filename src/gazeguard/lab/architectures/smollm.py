"""SmolLM2 behind LLaVA's eyes: the lab's CLIP tower, a two-layer projector, a pretrained Llama.

transformers knows it as a `llava` model. What is its own is the chat format that SmolLM2 was
pretrained on, so the config carries a mark that says which format its lessons are written in.
"""

from __future__ import annotations

from typing import Any

from gazeguard.lab.architectures.llava import Llava
from gazeguard.lab.architectures.protocol import Prompt
from gazeguard.lab.base_recipe import BaseRecipe

MARK = "lab_architecture"  # entry of the config that names the architecture


class SmolLM(Llava):
    """`LlavaForConditionalGeneration` around a SmolLM2; as an `Architecture`.

    Without the system turn that SmolLM2's own template writes: the model is taught without it. An
    answer has a space before it, so that its first word is the token that it is anywhere else.
    """

    name = "smollm"
    base_name = "gazeguard-lab-base-smollm"
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>")
    sentence = "user\n{question}\nassistant\n {answer}"
    prompt = Prompt(
        opening="<|im_start|>user\n",
        image="<image>",
        closing="",
        cue="<|im_end|>\n<|im_start|>assistant\n",
    )
    # Line ends stand inside quotes, because jinja drops one that follows a block.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ ' ' if m['role'] == 'assistant' else '' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def make_model(self, recipe: BaseRecipe, tokenizer: Any) -> Any:
        """As in `Architecture.make_model`: a random Llama in SmolLM2's place."""
        model = super().make_model(recipe, tokenizer)
        setattr(model.config, MARK, self.name)
        return model
