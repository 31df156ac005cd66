"""Loading a processor, also where torchvision is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from gazeguard.errors import ModelError


def load_processor(folder: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model folder.

    Families with a video processor need torchvision for that part alone; without torchvision the
    processor is made for images only.

    Raises:
        ModelError: the folder has no processor, or one without tokenizer or image processor.
    """
    cure = "add the processor and tokenizer files of the model it was made from."
    try:
        try:
            processor = transformers.AutoProcessor.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code
            )
        except ImportError as error:
            if "torchvision" not in str(error).lower():
                raise
            processor = _without_video(folder, config)
    except ImportError as error:
        raise ModelError(
            f"the processor in {folder} needs a package that is not installed"
            f" ({str(error).strip().splitlines()[0]}): install it."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        raise ModelError(f"no usable processor in {folder} ({reason}): {cure}") from error
    lacks = [n for n in ("tokenizer", "image_processor") if getattr(processor, n, None) is None]
    if lacks:
        raise ModelError(f"the processor in {folder} has no {' and no '.join(lacks)}: {cure}")
    return processor


class NoVideo(dict[str, Any]):
    """Stands where a video processor would be; empty in a saved configuration."""

    num_frames = fps = _auto_class = None


def images_only(processor_class: Any) -> Any:
    """Give a processor class that takes `NoVideo` for its video processor.

    transformers has no switch for this; a subclass leaves its own class untouched.
    """

    def check(self: Any, name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideo):
            return None
        return processor_class.check_argument_for_proper_class(self, name, argument)

    return type(
        processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check}
    )


def _without_video(folder: Path, config: Any) -> Any:
    """Build the folder's processor around its tokenizer and image processor."""
    processor_class = images_only(_processor_class(folder, config))
    loaders = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained,
        "image_processor": transformers.AutoImageProcessor.from_pretrained,
        "video_processor": lambda _: NoVideo(),
    }
    parts = [loaders[name](folder) for name in processor_class.get_attributes()]
    settings, _ = processor_class.get_processor_dict(folder)
    return processor_class.from_args_and_dict(parts, settings)


def _processor_class(folder: Path, config: Any) -> Any:
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        declared = json.loads(file.read_text()).get("processor_class") if file.is_file() else None
        if declared and hasattr(transformers, declared):
            return getattr(transformers, declared)
    return transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(config)]
