"""Settings, class lists and label tables as people and other programs save them: read right, or refused in one line.

    python -m tests.fuzz.tables --inputs 10000 --seed 1

Each text is saved in one of many encodings, with or without a mark, and often changed in some bytes. A good text in
UTF-8 must be read as it was meant; of label tables, whose file names are stored in every Unicode form and in none,
every good row must be kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client_app.policy.policy import load_policy
from client_app.policy.template import policy_template
from common.errors import FedHypeVAEError
from common.texts import read_json
from deploy.coordinator.provision import FederationPlan
from deploy.machine.app_package import with_digest
from deploy.site.app_guard import approved_digests
from deploy.site.folder import SiteFolder
from embeddings.readers.classes import class_list, given_classes
from embeddings.readers.folders import FolderOptions, list_folder
from tests.fuzz.files import Failure, changed

_READ = ("utf-8", "utf-8-sig")
_ENCODINGS = (*_READ, *_READ, "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp850", "shift-jis")
_NAMES = ("gutartig", "bösartig", "Ödem", "in situ", "良性", "a", "nan", "1", "1.0", "O\u0308dem", "\u1ebf")
_FORMS: tuple[Any, ...] = ("NFC", "NFD", "NFKC", "NFKD")
_DIGEST = "ab" * 32


@dataclass
class Tables:
    """Counts of one session, all of it from one seed."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    @property
    def inputs(self) -> int:
        """How many texts were read."""
        return sum(self.counts.values())

    def check(self, holds: bool, what: str) -> None:
        """Raise what is needed to see it again, where a property does not hold."""
        if not holds:
            raise Failure(f"seed {self.seed}, after {self.inputs} inputs: {what}")

    def save(self, path: Path, text: str) -> bool:
        """Save a text in some encoding and often change bytes; returns whether it must be read as it was meant."""
        encoding = self.rng.choice(_ENCODINGS)
        text = text.replace("\n", self.rng.choice(["\n", "\r\n"]))
        content, whole = text.encode(encoding, errors="replace"), self.rng.random() < 0.6
        if not whole:
            content = changed(self.rng, content, content)
        path.write_bytes(content)
        return whole and encoding in _READ

    def read_one(self, kind: str, path: Path, text: str, read: Callable[[], Any], wanted: Any) -> None:
        """Save and read one text: as it was meant, or a refusal in one line that names the file."""
        right = self.save(path, text)
        self.counts[kind] += 1
        try:
            found = read()
        except FedHypeVAEError as error:
            told = str(error)
            self.refused += 1
            self.check(not right, f"a good text is refused: {told}")
            self.check(path.name in told or "class list" in told, f"a refusal that names no file: {told!r:.300}")
            return
        self.read += 1
        self.check(not right or found == wanted, f"{kind}: {found!r:.200} where {wanted!r:.200} was meant")


def run_settings(session: Tables, folder: Path) -> None:
    """The TOML and JSON files of a federation, and a class list."""
    names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in session.rng.sample(_NAMES, 4)))
    plan = {"name": "study", "server_names": ["fl.example.org"], "sites": ["st-anna"], "classes": names}
    study = "# größer\n" + "".join(f"{key} = {json.dumps(one, ensure_ascii=False)}\n" for key, one in plan.items())
    path = folder / "study.toml"
    session.read_one("study.toml", path, study, lambda: FederationPlan.read(path).classes, names)
    site = folder / "site.toml"
    text = '# für die Klinik\nname = "st-anna"\nserver = "fl.example.org:9092"\n'
    session.read_one("site.toml", site, text, lambda: SiteFolder(folder).settings.server, "fl.example.org:9092")
    policy = folder / "policy.toml"
    text = with_digest(policy_template("größe/x"), _DIGEST)
    session.read_one("policy.toml", policy, text, lambda: load_policy(policy).approved_app_digests, (_DIGEST,))
    approved = approved_digests(policy)  # never a traceback
    with contextlib.suppress(FedHypeVAEError):
        listed = {digest.lower() for digest in load_policy(policy).approved_app_digests}
        session.check(approved == listed, "guard and policy read one file in two ways")
    peers = folder / "peers.json"
    text = json.dumps({name: name for name in names}, ensure_ascii=False)
    session.read_one("peers.json", peers, text, lambda: read_json(peers), {name: name for name in names})
    classes = folder / "classes.txt"
    text = "\n".join(session.rng.choice(["", " ", "\t"]) + name + session.rng.choice(["", " "]) for name in names)
    session.read_one("classes.txt", classes, text, lambda: class_list(given_classes(str(classes)), ()), tuple(names))


def run_names(session: Tables, folder: Path) -> None:
    """A label table whose names are stored otherwise than the files', beside files that no table can name."""
    images, wanted, rows = folder / "images", {}, []
    images.mkdir()
    for number, name in enumerate(session.rng.sample(_NAMES, 5)):
        stored = unicodedata.normalize(session.rng.choice(_FORMS[:2]), f"{number} {name}.png")
        named = unicodedata.normalize(session.rng.choice(_FORMS[:2]), stored)
        (images / stored).write_bytes(b"")
        label = session.rng.choice(_NAMES)
        wanted[stored] = unicodedata.normalize("NFC", label)
        rows.append(f"{session.rng.choice(['', './'])}{named},{session.rng.choice(['', ' '])}{label}")
    odd = os.fsdecode(session.rng.choice([b"gr\xf6\xdfe.png", b"\xff.png", b"a\xcc.png"]))
    (images / odd).write_bytes(b"")
    rows += [session.rng.choice(["x" * 400, "a\0b", "../a", "/etc/passwd", "none.png"]) + ",a"]
    session.rng.shuffle(rows)
    right = session.save(folder / "l.csv", "path,label\n" + "\n".join(rows))
    session.counts["names"] += 1
    try:
        listing = list_folder(images, folder / "l.csv", FolderOptions())
    except FedHypeVAEError as error:
        session.refused += 1
        session.check(not right and "l.csv" in str(error), f"a good table is refused, or none named: {error}")
        return
    session.read += 1
    found = {item.source: listing.class_names[item.label] for item in listing.items}
    session.check(not right or found == wanted, f"{found} where {wanted} was meant")
    session.check(odd in found or odd in dict(listing.rejected), "a file is neither kept nor named")


def fuzz_tables(inputs: int, seed: int) -> Tables:
    """Save and read so many texts.

    Raises:
        Failure: a property did not hold; its text has the seed.
    """
    session = Tables(seed)
    with tempfile.TemporaryDirectory() as home:
        while session.inputs < inputs:
            folder = Path(home) / "x"
            folder.mkdir()
            try:
                run_settings(session, folder)
                run_names(session, folder)
            except Failure:
                raise
            except BaseException as error:
                told = f"seed {seed}, after {session.inputs} inputs: {type(error).__name__}: {error}"
                raise Failure(told) from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return session


def main() -> None:
    """The command line: counts by kind; a failure ends it with the seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    start = time.monotonic()
    print(f"seed {chosen.seed}", flush=True)
    session = fuzz_tables(chosen.inputs, chosen.seed)
    seconds = time.monotonic() - start
    print(
        f"{session.inputs} texts in {seconds:.0f} s: {session.refused} refused, {session.read} read; {session.counts}"
    )


if __name__ == "__main__":
    main()
