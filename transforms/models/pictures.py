"""Pictures on their way into a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.records import Sample


def pixels_of(sample: Sample) -> np.ndarray:
    """The decoded picture. That it is decoded is the pipeline's duty, no property of the sample."""
    if sample.pixels is None:
        raise AssertionError(f"sample {sample.annotation.uid} came to a model undecoded")
    return sample.pixels


def grey() -> np.ndarray:
    """A picture that any sound model can score."""
    return np.full((64, 64, 3), 127, np.uint8)


def processed(processor: Any, pixels: np.ndarray) -> torch.Tensor:
    """The picture as a transformers processor makes it.

    The format is named because a picture 3 pixels high would pass for one with channels first.
    """
    batch = processor.image_processor([pixels], return_tensors="pt", input_data_format="channels_last")
    return batch["pixel_values"][0]
