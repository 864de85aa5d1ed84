"""Who a patient is, and salted hashes of patients and images: the store says which rows belong together, not whom they
show.

The salt is a random file at the site. Without it a hash can't be turned back by trying names; with it, anyone
can: it stays at the site, and is kept, since a second extraction must give the same patient the same number.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from common.durable import make_private
from common.errors import DataError
from common.texts import neat

# What stands where nobody is named, in lower case and without punctuation: from programs that take names out of files,
# and from tables with cells missing. A zero is none of them: patients are often numbered from there.
_NOBODY = {
    *("", "anon", "anonym", "anonymous", "anonymouspatient", "anonymized", "anonymised", "anonymizedpatient"),
    *(
        "deidentified",
        "unidentified",
        "removed",
        "redacted",
        "unknown",
        "unknownpatient",
        "unk",
        "unnamed",
        "undefined",
    ),
    *("none", "null", "nil", "nan", "na", "missing", "notavailable", "notapplicable", "notknown"),
    *("noid", "nopatientid", "undefined"),
}
_WHOLE = re.compile(r"^(-?[0-9]+)\.0+$")
SALT_BYTES = 32
KEY_BYTES = 16


def patient_identifier(stated: str) -> str:
    """Who is meant by an identifier; the one place where that is decided, for headers, tables and arrays.

    Blanks and padding at its ends mean nothing, nor how accents are stored, nor that a program which takes a column for
    numbers wrote 12 as 12.0; case and zeros in front do mean something. One person under two identifiers would be two
    units of privacy.

    Args:
        stated: what stands in the file.

    Returns:
        The identifier, or an empty text where it names nobody: it is empty, a placeholder (ANONYMOUS, unknown, n/a), a
        row of X, or -1. Who has records under a placeholder may have others under an own identifier.

    Source: DICOM PS3.5 6.2 (LO: leading and trailing spaces are insignificant).
    """
    text = neat(stated.replace("\0", " ")).encode(errors="backslashreplace").decode()
    text = _WHOLE.sub(r"\1", text)
    letters = "".join(filter(str.isalnum, text.casefold()))
    redacted = len(letters) > 2 and set(letters) == {"x"}
    return "" if letters in _NOBODY or redacted or text == "-1" else text


def default_salt_path() -> Path:
    """Return `patient.salt` in `FEDHYPEVAE_HOME`, or in `~/.fedhypevae`."""
    home = os.environ.get("FEDHYPEVAE_HOME")
    return (Path.home() / ".fedhypevae" if home is None else Path(home)) / "patient.salt"


def load_salt(path: Path) -> bytes:
    """Read the site's salt, drawing it from the operating system on first use.

    Args:
        path: the file; made with access for its owner alone.

    Returns:
        32 bytes.

    Raises:
        DataError: the file has another length, or can't be read or made.
    """
    try:
        make_private(path.parent)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            salt = path.read_bytes()
        else:
            salt = secrets.token_bytes(SALT_BYTES)
            with os.fdopen(handle, "wb") as file:
                file.write(salt)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: can't read or make the patient salt ({error.strerror})") from None
    if len(salt) != SALT_BYTES:
        raise DataError(
            f"{path}: expected a salt of {SALT_BYTES} bytes, found {len(salt)}; restore it from a backup "
            f"(a new salt "
            "gives every patient a new number)"
        )
    return salt


def patient_number(salt: bytes, patient: str) -> int:
    """Return a patient's number: the first 64 bits of HMAC-SHA256, as a signed integer."""
    digest = hmac.digest(salt, b"patient\0" + patient.encode("utf-8", "surrogateescape"), hashlib.sha256)
    return int.from_bytes(digest[:8], "big", signed=True)


def image_key(salt: bytes, *parts: str | int) -> bytes:
    """Return the 16 bytes by which a second extraction knows an image it already has."""
    text = "\0".join(str(part) for part in parts)
    return hmac.digest(salt, b"image\0" + text.encode("utf-8", "surrogateescape"), hashlib.sha256)[:KEY_BYTES]
