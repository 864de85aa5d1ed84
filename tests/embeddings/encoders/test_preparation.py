"""What networks are fed has the very bits of the models' own processors, whatever these are set to."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embeddings.canary import draw
from embeddings.encoders.backbones import TransformersEncoder
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.encoders.preparation import Preparation, as_numbers
from tests.embeddings.encoders.tiny import save_model

PROCESSORS = ("Bit", "ViT", "CLIP", "Siglip", "DeiT", "Beit", "ConvNext", "EfficientNet", "Levit", "PoolFormer")
SIDES = {"height": 28, "width": 36}
CROP = {"do_center_crop": True, "crop_size": SIDES}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"resample": number} for number in range(6)),
    {"size": {"shortest_edge": 40}, **CROP},
    {"size": {"shortest_edge": 20}, **CROP},  # the crop is larger than the picture, and is filled up
    {"size": SIDES, "do_center_crop": False},
    {"do_resize": False, **CROP},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.7, 0.3]},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"do_convert_rgb": True},
    {"do_pad": True, "pad_size": {"height": 300, "width": 300}},
)
SHAPES = ((28, 36, 3), (40, 90, 3), (90, 40), (7, 300, 3), (301, 299, 3), (1, 1))


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [draw(), *(rng.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES)]


def by_the_processor(processor: Any, image: np.ndarray) -> np.ndarray:
    colour = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
    return processor(images=[colour], input_data_format="channels_last", return_tensors="np")["pixel_values"][0]


def outcome(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("family", PROCESSORS)
def test_pixels_are_the_processors_to_the_last_bit_at_every_setting(family: str) -> None:
    kind = getattr(transformers, f"{family}ImageProcessorPil")
    in_bytes = 0
    for settings in SETTINGS:
        processor = kind(**settings)
        preparation = Preparation(processor).in_bytes([draw()])
        in_bytes += preparation.table is not None
        table = None if preparation.table is None else torch.from_numpy(preparation.table)
        for image in pictures():
            expected, found = outcome(by_the_processor, processor, image), outcome(preparation, image)
            if isinstance(expected, type):  # a picture that the processor itself can't prepare
                assert found is expected
                continue
            assert (found.dtype == np.uint8) or table is None, settings
            numbers = as_numbers(torch.from_numpy(found[None]), table)[0].numpy()
            assert numbers.dtype == expected.dtype
            np.testing.assert_array_equal(numbers, expected, err_msg=str(settings))
    assert in_bytes >= (0 if family == "EfficientNet" else len(SETTINGS) - 1)  # that one normalises unasked


def test_border_that_no_byte_stands_for_is_left_to_the_processor() -> None:
    """It pads with zeros what is normalised: no byte means zero."""
    padded = {"do_pad": True, "pad_size": {"height": 300, "width": 300}}
    assert Preparation(transformers.BitImageProcessorPil(**padded)).in_bytes([draw()]).table is None


def test_processor_that_knows_no_bytes_is_asked_for_its_numbers(tmp_path: Path) -> None:
    class Foreign:
        """A processor with an offset that depends on the picture."""

        def __call__(self, images: list[np.ndarray], **_: object) -> dict[str, np.ndarray]:
            return {"pixel_values": np.stack([one[:8, :8].transpose(2, 0, 1) - one.mean() for one in images])}

    preparation = Preparation(Foreign()).in_bytes([draw()])
    assert preparation.table is None
    assert preparation.needs_torch
    np.testing.assert_array_equal(preparation(draw()), draw()[:8, :8].transpose(2, 0, 1) - draw().mean())
    encoder = load_encoder(str(save_model(tmp_path / "m", "dinov2")), EncoderOptions())
    assert encoder.remark == ""  # pictures travel in bytes


def test_preparation_travels_without_torch_and_the_network(tmp_path: Path) -> None:
    """As to a process that reads pictures: it starts in a quarter of the time."""
    encoder = load_encoder(str(save_model(tmp_path / "m", "dinov2")), EncoderOptions())
    assert isinstance(encoder, TransformersEncoder)
    assert not encoder.prepare.needs_torch
    (tmp_path / "p").write_bytes(pickle.dumps(encoder.prepare))
    assert (tmp_path / "p").stat().st_size < 10_000
    program = (
        "import pickle, sys; sys.modules['torch'] = None; from pathlib import Path; "
        "from embeddings.canary import draw; "
        "sys.stdout.buffer.write(pickle.loads(Path(sys.argv[1]).read_bytes())(draw()).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "p")], capture_output=True, check=True)
    assert done.stdout == encoder.prepare(draw()).tobytes()
