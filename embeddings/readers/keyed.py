"""A folder's images by the salted keys under which `fedhypevae embed` stored them: how a row finds its picture."""

from __future__ import annotations

from pathlib import Path

from common.errors import DataError
from embeddings.pipeline import Item
from embeddings.readers.folders import FolderOptions, items_of_file
from embeddings.readers.patients import default_salt_path, image_key, load_salt
from embeddings.readers.walk import inside, walk


def images_by_key(folder: Path, salt: Path | None) -> dict[bytes, Item]:
    """The images of a folder by their keys; no label table is needed, since a key holds no label.

    Args:
        folder: what was embedded, unchanged since.
        salt: the site's salt; default: where `embed` finds it.

    Raises:
        DataError: there is no such folder, or no salt.
    """
    path = default_salt_path() if salt is None else salt
    if not path.is_file():
        raise DataError(f"no salt at {path}: the images can't be matched without it; name it with --salt")
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of images that was embedded, found none")
    secret, base, options = load_salt(path), folder.resolve(), FolderOptions(patients=False)
    found: dict[bytes, Item] = {}
    for file in walk(base):
        target = inside(base, file)
        # sub-folders as classes name a link by itself, a label table by what it leads to
        for name in {file, file if target is None else target}:
            try:
                items = items_of_file(base, name, options)
            except DataError:
                continue  # no picture, or a damaged one
            found |= {image_key(secret, *item.stamp): item for item in items}
    return found
