"""A picture as a backbone's input: by the model's own processor, in bytes where these stand for all of its numbers.

A processor resizes and crops bytes, and makes a number of each at the end. Where that is so, what travels between
processes and to a GPU is the bytes, a quarter as much, and a table of the processor's own numbers says the rest: the
input has the same bits. Where it is not (a border of another number, say), the numbers travel as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError

_BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)
_IN_BYTES = {"do_rescale": False, "do_normalize": False}
_IN_PLACE = {"do_resize": False, "do_center_crop": False, "do_pad": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
    """A processor of `transformers` or `timm` on the PIL backend; without the network, so that it can be pickled.

    `shape` is what it gives, (3, s, s), where that is known; `table` the number of each byte, (3, 256), where bytes
    stand for numbers.
    """

    processor: Any
    shape: tuple[int, ...] | None = None
    table: NDArray[Any] | None = None

    @property
    def _is_timms(self) -> bool:
        return hasattr(self.processor, "val_transforms")  # which takes pictures and gives tensors

    @property
    def needs_torch(self) -> bool:
        """Whether pictures can't be prepared without torch, which takes seconds to import, and hundreds of MB."""
        return self.table is None

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[Any]:
        """Prepare one image, (h, w) or (h, w, 3) uint8; returns (3, s, s), of uint8 where there is a table.

        Raises:
            DataError: the processor gives another shape than for other pictures.
        """
        return self._checked(self._processed(image, **({} if self.table is None else _IN_BYTES)))

    def numbers(self, image: NDArray[np.uint8]) -> NDArray[Any]:
        """What the processor itself gives for one image: (3, s, s), of float32 as a rule.

        Raises:
            DataError: as above.
        """
        return self._checked(self._processed(image))

    def in_bytes(self, pictures: Sequence[NDArray[np.uint8]]) -> Preparation:
        """The same preparation in bytes, if these give the very numbers of the processor for some pictures."""
        if self._is_timms:
            return self
        try:
            values = self._processed(np.repeat(_BYTES[:, :, None], 3, axis=2), **_IN_PLACE)
            values = values.reshape(3, 256)
            found = dataclasses.replace(self, table=values)
            same = all(np.array_equal(_looked_up(values, found(one)), found.numbers(one)) for one in pictures)
        except Exception:  # a foreign processor, which may know no such settings
            return self
        return found if same else self

    def describe(self) -> str:
        """Describe the preprocessing by the processor's settings, without those that name files or versions."""
        settings = self.processor.to_dict()
        prefixes = ("do_", "size", "crop_size", "image_", "resample", "rescale", "pad", "data_config")
        kept = {key: value for key, value in settings.items() if key.startswith(prefixes) and value is not None}
        return f"pil {type(self.processor).__name__} {json.dumps(kept, sort_keys=True, default=str)}"

    def _processed(self, image: NDArray[np.uint8], **changes: bool) -> NDArray[Any]:
        colour = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        if self._is_timms:
            values = self.processor(images=[Image.fromarray(colour)], return_tensors="pt")["pixel_values"].numpy()
        else:
            settings = {"input_data_format": "channels_last", "return_tensors": "np", **changes}
            values = self.processor(images=[colour], **settings)["pixel_values"]
        result: NDArray[Any] = values[0]
        return result

    def _checked(self, result: NDArray[Any]) -> NDArray[Any]:
        if self.shape is not None and result.shape != self.shape:
            raise DataError(f"expected an input of {self.shape} of the processor, found {result.shape}")
        return result


def _looked_up(table: NDArray[Any], pixels: NDArray[Any]) -> NDArray[Any]:
    """Look the numbers of bytes up; what is no bytes is no index, and raises."""
    return np.stack([row[channel] for row, channel in zip(table, pixels, strict=True)])


def as_numbers(pixels: Any, table: Any) -> Any:
    """Bytes (b, 3, s, s) to the numbers of a table (3, 256), tensors on one device; numbers stay as they are."""
    import torch

    if table is None or pixels.dtype != torch.uint8:
        return pixels
    channels = enumerate(pixels.unbind(1))
    return torch.stack([table[i].index_select(0, one.reshape(-1).int()).view(one.shape) for i, one in channels], 1)


def on_device(batch: Any, device: str) -> Any:
    """Copy a batch, an array or a tensor, to where the network runs; to a GPU beside what it computes meanwhile."""
    import torch

    host = batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
    if host.device.type != "cpu" or device == "cpu":
        return host
    now, copying = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copying):
        there = host.pin_memory().to(device, non_blocking=True)
    now.wait_stream(copying)
    there.record_stream(now)  # its memory is not used again before
    return there


@functools.lru_cache
def _copy_stream(device: str) -> Any:
    import torch

    return torch.cuda.Stream(device)
