"""Which device a model gets, and what is said when it is not there or too small."""

import pytest
import torch

from gazeguard.errors import ModelError, UsageError
from gazeguard.models.device import chosen_device
from gazeguard.models.weights import load_weights


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: a machine with so many."""

    def install(n: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return install


def test_auto_is_the_first_gpu_or_the_cpu(gpus):
    gpus(2)
    assert chosen_device("auto") == ("cuda:0", "the first GPU")
    gpus(0)
    assert chosen_device("auto") == ("cpu", "no GPU was found")


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1", "balanced"])
def test_as_asked(gpus, device):
    gpus(2)
    assert chosen_device(device) == (device, "as asked")


@pytest.mark.parametrize(
    ("n", "device", "match"),
    [
        (0, "cuda", "no usable GPU .* use --device cpu"),
        (0, "cuda:1", "no usable GPU"),
        (2, "cuda:2", "use cuda:0 to cuda:1, or balanced"),
        (2, "cuda:x", "unknown"),
        (2, "cuda:", "unknown"),
        (2, "cuda:-1", "unknown"),
        (2, "balanced:1", "unknown"),
        (2, "offload", "unknown"),
        (0, "mps", "no Apple GPU"),
    ],
)
def test_what_is_not_there(gpus, n, device, match):
    gpus(n)
    with pytest.raises(UsageError, match=match):
        chosen_device(device)


def test_a_gpu_that_is_too_small(tmp_path):
    class Large:
        @staticmethod
        def from_pretrained(*args, **options):
            assert "offload_folder" not in options, "one device never uses the disk"
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ModelError, match="use --device balanced"):
        load_weights(Large, tmp_path, device_map="cuda:0")


def test_a_load_that_fails_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Broken:
        @staticmethod
        def from_pretrained(*args, offload_folder, **options):
            assert list(tmp_path.iterdir()), "no folder for rewritten weights"
            raise ValueError("broken")

    with pytest.raises(ModelError, match="broken"):
        load_weights(Broken, tmp_path / "model", device_map="balanced")
    assert not list(tmp_path.iterdir())
