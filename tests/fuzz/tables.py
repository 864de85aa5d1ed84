"""Settings, class lists and label tables as people and other programs save them: read right, or refused in one line.

    python -m tests.fuzz.tables --inputs 10000 --seed 1

Each text is saved in one of many encodings, with or without a mark, and often changed in some bytes. A good text in
UTF-8 must be read as it was meant; of label tables, whose file names are stored in every Unicode form and in none,
every good row must be kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Callable
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
from tests.fuzz.files import changed
from tests.fuzz.session import Session, command_line, feed

_READ = ("utf-8", "utf-8-sig")
_ENCODINGS = (*_READ, *_READ, "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "cp850", "shift-jis")
_NAMES = ("gutartig", "bösartig", "Ödem", "in situ", "良性", "a", "nan", "1", "1.0", "O\u0308dem", "\u1ebf")
_FORMS: tuple[Any, ...] = ("NFC", "NFD", "NFKC", "NFKD")
_DIGEST = "ab" * 32


def save(session: Session, path: Path, text: str) -> bool:
    """Save a text in some encoding and often change bytes; returns whether it must be read as it was meant."""
    encoding = session.rng.choice(_ENCODINGS)
    text = text.replace("\n", session.rng.choice(["\n", "\r\n"]))
    content, whole = text.encode(encoding, errors="replace"), session.rng.random() < 0.6
    if not whole:
        content = changed(session.rng, content, content)
    path.write_bytes(content)
    return whole and encoding in _READ


def read_one(session: Session, kind: str, path: Path, text: str, read: Callable[[], Any], wanted: Any) -> None:
    """Save and read one text: as it was meant, or a refusal in one line that names the file."""
    right = save(session, path, text)
    session.counts[kind] += 1
    try:
        found = read()
    except FedHypeVAEError as error:
        told = str(error)
        session.refused += 1
        session.check(not right, f"a good text is refused: {told}")
        session.check(path.name in told or "class list" in told, f"a refusal that names no file: {told!r:.300}")
        return
    session.read += 1
    session.check(not right or found == wanted, f"{kind}: {found!r:.200} where {wanted!r:.200} was meant")


def run_settings(session: Session, folder: Path) -> None:
    """The TOML and JSON files of a federation, and a class list."""
    names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in session.rng.sample(_NAMES, 4)))
    plan = {"name": "study", "server_names": ["fl.example.org"], "sites": ["st-anna"], "classes": names}
    study = "# größer\n" + "".join(f"{key} = {json.dumps(one, ensure_ascii=False)}\n" for key, one in plan.items())
    path = folder / "study.toml"
    read_one(session, "study.toml", path, study, lambda: FederationPlan.read(path).classes, names)
    site = folder / "site.toml"
    text = '# für die Klinik\nname = "st-anna"\nserver = "fl.example.org:9092"\n'
    read_one(session, "site.toml", site, text, lambda: SiteFolder(folder).settings.server, "fl.example.org:9092")
    policy = folder / "policy.toml"
    text = with_digest(policy_template("größe/x"), _DIGEST)
    read_one(session, "policy.toml", policy, text, lambda: load_policy(policy).approved_app_digests, (_DIGEST,))
    approved = approved_digests(policy)  # never a traceback
    with contextlib.suppress(FedHypeVAEError):
        listed = {digest.lower() for digest in load_policy(policy).approved_app_digests}
        session.check(approved == listed, "guard and policy read one file in two ways")
    peers = folder / "peers.json"
    text = json.dumps({name: name for name in names}, ensure_ascii=False)
    read_one(session, "peers.json", peers, text, lambda: read_json(peers), {name: name for name in names})
    classes = folder / "classes.txt"
    text = "\n".join(session.rng.choice(["", " ", "\t"]) + name + session.rng.choice(["", " "]) for name in names)
    read_one(session, "classes.txt", classes, text, lambda: class_list(given_classes(str(classes)), ()), tuple(names))


def run_names(session: Session, folder: Path) -> None:
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
    right = save(session, folder / "l.csv", "path,label\n" + "\n".join(rows))
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


def fuzz_tables(inputs: int, seed: int, *, tell: bool = False) -> Session:
    """Save and read so many texts; raises as `feed` does."""

    def one(session: Session, folder: Path) -> None:
        run_settings(session, folder)
        run_names(session, folder)

    return feed(inputs, seed, one, tell=tell)


if __name__ == "__main__":
    command_line(__doc__ or "", fuzz_tables)
