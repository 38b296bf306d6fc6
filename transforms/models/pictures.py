"""Image inputs of the models, as uint8 arrays.

The last steps of a model's preprocessing, scaling and normalisation, turn each byte into a float32 that depends on the
byte and its channel alone. Images are therefore kept as the bytes before those steps, and a table of 3 x 256 floats,
computed by the model's own code, is applied on the model's device. The values are identical to the bit, and a quarter
of the data is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from transforms.core.records import Sample


def pixels_of(sample: Sample) -> np.ndarray:
    """The decoded image, uint8 (h, w, 3). Raises AssertionError if the pipeline has not decoded it."""
    if sample.pixels is None:
        raise AssertionError(f"sample {sample.annotation.uid} reached a model without being decoded")
    return sample.pixels


def grey() -> np.ndarray:
    """A plain grey image, uint8 (64, 64, 3), that every working model can score."""
    return np.full((64, 64, 3), 127, np.uint8)


def byte_table(
    normalise: Callable[[np.ndarray], np.ndarray],
    shape: Callable[[np.ndarray], np.ndarray],
    full: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The preprocessed value of each byte in each channel, float32 (3, 256).

    `full` is the model's own preprocessing of an image uint8 (h, w, 3); `shape` is its first part, which returns uint8
    (3, h, w); `normalise` is the rest. Raises ValueError if the two parts do not reproduce `full` to the bit.
    """
    table = normalise(np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2))[:, :, 0].astype(np.float32)
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    from_table = np.stack([table[channel][plane] for channel, plane in enumerate(shape(image))])
    if not np.array_equal(from_table, full(image)):
        raise ValueError("this model's preprocessing does more than resizing, cropping and normalising")
    return table


def normalised(pictures: Sequence[np.ndarray], table: torch.Tensor) -> torch.Tensor:
    """Normalise images uint8 (3, h, w) with `table` (3, 256): a tensor (n, 3, h, w) of its device and dtype."""
    pixels = on_device(np.stack(pictures), table.device)
    result = torch.empty(pixels.shape, dtype=table.dtype, device=table.device)
    for channel, values in enumerate(table):
        plane = pixels[:, channel]
        # On CPUs `index_select` is ten times as fast as `values[plane]`.
        result[:, channel] = values.index_select(0, plane.flatten().int()).view(plane.shape)
    return result


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`. A copy to a GPU goes through pinned memory and is asynchronous."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def settings_of(image_processor: Any) -> dict[str, Any]:
    """The settings of a transformers image processor that affect its output, as recorded in the manifest."""
    names = ("size", "crop_size", "do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor",
             "do_normalize", "image_mean", "image_std", "do_convert_rgb")  # fmt: skip
    return {name: value for name, value in image_processor.to_dict().items() if name in names and value is not None}


class Processed:
    """A transformers image processor with a fixed output size, split at the byte table.

    `table` is its `byte_table`.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor.image_processor
        self.table = byte_table(self._normalised, self, self._run)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop an image uint8 (height, width, 3) to the model's size: uint8 (3, h, w)."""
        return self._run(pixels, do_rescale=False, do_normalize=False)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(pixels, do_resize=False)

    def _run(self, pixels: np.ndarray, **steps: bool) -> np.ndarray:
        # The format is given because an image 3 pixels high would be taken for one with channels first.
        batch = self._processor([pixels], return_tensors="np", input_data_format="channels_last", **steps)
        return batch["pixel_values"][0]
