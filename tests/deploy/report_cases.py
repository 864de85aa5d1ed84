"""A small federation that was run, with its pages: shared by the tests of the pages."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

from deploy.cli import main
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.patients import image_key
from embeddings.store.sets import EmbeddingSet
from tests.harness import CLASSES, DIM, Federation, Handler, HarnessSite, deliver, make_set

SALT = bytes(range(32))
RECORDS = 120


@dataclass(frozen=True)
class Reported:
    """A federation, its run and its pages."""

    federation: Federation
    run: Path
    run_page: Path
    site_page: Path
    images: Path

    @property
    def site(self) -> HarnessSite:
        """The site that has a page."""
        return self.federation.sites[0]


def command(*arguments: object) -> int:
    """Run the command line in this process; returns its exit code."""
    before = sys.argv
    sys.argv = ["fedhypevae", *(str(argument) for argument in arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def make_reported(home: Path, **settings: Any) -> Reported:
    """Run a federation of three sites, of which the last misses a round, and make the pages as people do."""
    images = home / "images"
    first = _with_images(images)
    federation = Federation.create(home, sets={0: first}, records=RECORDS, data_is_public=True, metrics_may_leave=True)

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        lost = site.name == "site-3" and message.metadata.group_id == "round-2"
        return None if lost else deliver(site, message)

    flat: dict[str, Any] = {"num_rounds": 3, "num_codes": 2, "round_timeout": 0.3, "min_sites": 2, **settings}
    federation.run(tamper=tamper, **flat)
    run, folder = federation.output, federation.sites[0].folder
    (home / "salt").write_bytes(SALT)
    if command("report", run) != 0:
        pytest.fail("the run's page was not made")
    options = ("--bundle", run, "--images", images, "--salt", home / "salt", "--no-umap")
    if command("site", "report", folder, *options) != 0:
        pytest.fail("the site's page was not made")
    return Reported(federation, run, run / "report.html", folder / "report.html", images)


def _with_images(folder: Path) -> EmbeddingSet:
    """A site's set whose keys belong to images in a folder, as `embed` would leave it."""
    made = make_set(RECORDS, dim=DIM)
    rng = np.random.default_rng(3)
    for row, label in enumerate(made.labels):
        place = folder / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8)).save(place / f"{row:04d}.png")
    listing = list_folder(folder, None, FolderOptions())
    by_row = {int(Path(item.source).stem): item for item in listing.items}
    keys = [image_key(SALT, *by_row[row].stamp) for row in range(RECORDS)]
    packed = np.frombuffer(b"".join(keys), np.uint8).reshape(RECORDS, -1)
    return EmbeddingSet(made.embeddings, made.labels, made.metadata, keys=packed)
