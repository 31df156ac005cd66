"""What a model knows of a request at the moment before it answers: its last hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.cleaning.linear import fast_linear
from gazeguard.errors import MeasurementError
from gazeguard.models.target import Target
from gazeguard.probe.rows import last_real
from gazeguard.types import Sample


def last_states(target: Target, samples: Sequence[Sample], batch_size: int) -> NDArray[np.float32]:
    """Output of the decoder's last layer at the last prompt position; the answer is not shown.

    Args:
        target: the model.
        samples: at least one.
        batch_size: samples per forward pass.

    Returns:
        float32 `(n, hidden)`, after the final norm: what the language head reads.

    Raises:
        RowError: a sample that the model cannot take.
        MeasurementError: numbers that are not finite.
    """
    found = []
    with torch.inference_mode(), fast_linear():
        for start in range(0, len(samples), batch_size):
            encoded = target.encode(samples[start : start + batch_size])
            inputs = {name: value.to(target.device) for name, value in encoded.inputs.items()}
            # Without the language head: over whole prompts it costs more than some decoders.
            states = target.base.base_model(**inputs, use_cache=False).last_hidden_state
            last = last_real(encoded.key_kind).to(states.device)
            each = torch.arange(len(last), device=states.device)
            found.append(states[each, last].float().cpu().numpy())
    every = np.concatenate(found)
    if not np.isfinite(every).all():
        raise MeasurementError(
            f"hidden states of {target.name} are not finite (NaN or infinity): try float32 or"
            " another copy of its weights."
        )
    return every
