"""The image side of every whole image-text model embeds as the model itself does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from gazeguard.errors import ModelError
from gazeguard.lab import tiny_encoders
from gazeguard.models.encoders.images import ImageTower, image_processor, load_images

WHOLE = ("clip", "longclip", "siglip", "siglip2", "altclip", "chinese_clip", "metaclip_2")
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    for seed, size in enumerate([(28, 28, 3), (40, 30, 3), (60, 90, 3)])
]


@pytest.fixture(params=WHOLE)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_encoders.build(request.param, tmp_path / request.param)


@pytest.fixture
def tower(folder: Path) -> ImageTower:
    return load_images(folder, "suspect", torch.float32, "cpu")


def test_embeddings_are_the_models_own(folder: Path, tower: ImageTower):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = image_processor(folder, "suspect")(images=IMAGES, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
    found = tower.embed(IMAGES)
    assert found.dtype is torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)
    assert (found[0] @ found[1:].T).max() < 0.999, "the images have no effect"


def test_a_batch_is_its_images_one_by_one(tower: ImageTower):
    alone = torch.cat([tower.embed([image]) for image in IMAGES])
    assert torch.allclose(tower.embed(IMAGES), alone, atol=1e-5)


def test_bfloat16_is_near_float32(folder: Path, tower: ImageTower):
    low = load_images(folder, "suspect", torch.bfloat16, "cpu").embed(IMAGES)
    assert ((low * tower.embed(IMAGES)).sum(1) > 0.99).all()


@pytest.mark.parametrize("kind", ["clip-text", "clip-projected", "siglip-text", "open_clip"])
def test_what_sees_no_images_is_refused(kind: str, tmp_path: Path):
    folder = tiny_encoders.build(kind, tmp_path / kind)
    with pytest.raises(ModelError, match="or leave --target-images out"):
        image_processor(folder, "suspect")


def test_a_model_without_an_image_processor_is_refused(tmp_path: Path):
    folder = tiny_encoders.build("clip", tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"copy preprocessor_config\.json"):
        image_processor(folder, "suspect")
