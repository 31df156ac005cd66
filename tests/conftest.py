"""What every test leaves behind: nothing. What none may say: that a call of ours is deprecated."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, in the processes they start too
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# Libraries that say what will stop working, by a warning or through their logs.
TELLING = ("transformers", "peft", "accelerate")
SAID = re.compile(r"deprecat|will be (removed|required|changed)|no longer (be )?support", re.I)
# What they say of themselves, which no call of ours can help: a pattern, and why it stands here.
KNOWN = {
    # peft reads it off the model that it wraps.
    r"`is_gradient_checkpointing` is deprecated": "peft_model.py",
    # PaliGemma's processor makes numpy arrays of its own tensors.
    r"__array__ implementation doesn't accept a copy keyword": "processing_paligemma.py",
}


def pytest_configure(config: pytest.Config) -> None:
    """Their warnings are errors; the known ones are not."""
    for category in ("FutureWarning", "DeprecationWarning"):
        for module in ("gazeguard", *TELLING):
            config.addinivalue_line("filterwarnings", f"error::{category}:{module}")
        for pattern in KNOWN:
            config.addinivalue_line("filterwarnings", f"ignore:{pattern}:{category}")


class _Deprecations(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if SAID.search(text) and not any(re.search(known, text) for known in KNOWN):
            self.said.append(f"{record.name}: {text}")


@pytest.fixture(autouse=True)
def _nothing_deprecated() -> Iterator[None]:
    """No test may make a library log that something we call will stop working."""
    handler = _Deprecations()
    for name in TELLING:
        logging.getLogger(name).addHandler(handler)
    if (theirs := sys.modules.get("transformers.utils.logging")) is not None:
        theirs.warning_once.cache_clear()  # or only the first test to do it would fail
    yield
    for name in TELLING:
        logging.getLogger(name).removeHandler(handler)
    assert not handler.said, "a library says that a call of ours will stop working"


@pytest.fixture(autouse=True)
def _told() -> None:
    """A command that an earlier test left without its end may have turned our messages down."""
    for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "gazeguard"]:
        logger = logging.getLogger(name)
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Sums in another order differ in their last bits: a test's threads are its own."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)
