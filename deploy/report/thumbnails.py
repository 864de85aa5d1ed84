"""Small pictures of a site's own images, found by the salted keys of its embedding set."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client_app.place import Place
from client_app.records import Simulated
from common.errors import DataError
from embeddings.pipeline import Item
from embeddings.quality.page import data_uri
from embeddings.readers.keyed import images_by_key
from embeddings.store.sets import EmbeddingSet

SIDE = 72


def thumbnails(records: EmbeddingSet, rows: Iterable[int], items: Mapping[bytes, Item]) -> dict[int, str]:
    """Pictures of some rows, as data URIs.

    Args:
        records: the site's set; a set without keys has none.
        rows: which.
        items: the site's images by key.

    Returns:
        Row -> picture, for the rows whose image was found and can be read.
    """
    if records.keys is None:
        return {}
    found = {}
    for row in rows:
        item = items.get(records.keys[row].tobytes())
        if item is None:
            continue
        try:
            found[row] = data_uri(_small(item.load()), "jpeg")
        except DataError:
            continue
    return found


def images_of(place: Place, images: Path | None, salt: Path | None) -> dict[bytes, Item]:
    """A site's images by their keys: of the folder that is given, else of the demonstration where it is simulated.

    Raises:
        DataError: as `images_by_key`.
    """
    if images is not None:
        return images_by_key(images, salt)
    if isinstance(place.records, Simulated) and place.records.pool is None:
        from embeddings.simulation.simulated import demo_items

        return demo_items()
    return {}


def _small(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture = Image.fromarray(image).convert("RGB")
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()
