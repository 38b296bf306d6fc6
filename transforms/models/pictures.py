"""Pictures on their way into a model.

A model's own preprocessing ends in scaling and normalising, which make four bytes of each one and are a function of
the byte and its channel alone. So pictures travel as the bytes before that step, and a table of 3 x 256 numbers, made
by the model's own code, does the rest on the model's device: the same numbers to the bit, and a quarter of the copying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from transforms.core.records import Sample


def pixels_of(sample: Sample) -> np.ndarray:
    """The decoded picture. That it is decoded is the pipeline's duty, no property of the sample."""
    if sample.pixels is None:
        raise AssertionError(f"sample {sample.annotation.uid} came to a model undecoded")
    return sample.pixels


def grey() -> np.ndarray:
    """A picture that any sound model can score."""
    return np.full((64, 64, 3), 127, np.uint8)


def byte_table(
    normalise: Callable[[np.ndarray], np.ndarray],
    shape: Callable[[np.ndarray], np.ndarray],
    whole: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """float32 (3, 256): what a model's preprocessing makes of each byte of each channel.

    `whole` is the model's own preprocessing of a picture (h, w, 3), `shape` its part up to bytes (3, h, w), and
    `normalise` the rest of it. Raises ValueError where the parts do not give what the whole does, to the bit.
    """
    table = normalise(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2))[:, :, 0].astype(np.float32)
    picture = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    parts = np.stack([table[channel][plane] for channel, plane in enumerate(shape(picture))])
    if not np.array_equal(parts, whole(picture)):
        raise ValueError("this model's preprocessing does more than resizing, cropping and normalising")
    return table


def normalised(pictures: Sequence[np.ndarray], table: torch.Tensor) -> torch.Tensor:
    """Pictures (3, h, w) of bytes as the model takes them, on the device and in the type of its `table`."""
    pixels = on_device(np.stack(pictures), table.device)
    result = torch.empty(pixels.shape, dtype=table.dtype, device=table.device)
    for channel, values in enumerate(table):
        plane = pixels[:, channel]
        # on CPUs ten times as fast as indexing `values` with the plane
        result[:, channel] = values.index_select(0, plane.flatten().int()).view(plane.shape)
    return result


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor there; to a GPU by way of pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def settings_of(image_processor: Any) -> dict[str, Any]:
    """What a transformers image processor does to a picture, for the manifest."""
    names = ("size", "crop_size", "do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor",
             "do_normalize", "image_mean", "image_std", "do_convert_rgb")  # fmt: skip
    return {name: value for name, value in image_processor.to_dict().items() if name in names and value is not None}


class Processed:
    """The parts of a transformers image processor, whose every picture has one size."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor.image_processor
        self.table = byte_table(self._normalised, self, self._whole)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The picture (h, w, 3) at the model's size, as bytes (3, h, w)."""
        return self._run(pixels, do_rescale=False, do_normalize=False)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(pixels, do_resize=False)

    def _whole(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(pixels)

    def _run(self, pixels: np.ndarray, **steps: bool) -> np.ndarray:
        # The format is named because a picture 3 pixels high would pass for one with channels first.
        batch = self._processor([pixels], return_tensors="np", input_data_format="channels_last", **steps)
        return batch["pixel_values"][0]
