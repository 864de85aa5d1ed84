"""`fedhypevae release verify`: a bundle is accepted as it was signed, and for no change of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, DataError, FedHypeVAEError
from common.privacy.events import PrivacyEvent
from common.publishing.bundle import STATEMENT, load_bundle
from common.publishing.parquet import read_notes, write_rows
from deploy.release.build import FILES, SIGNATURE, SUMS
from deploy.release.describe import DATA_FILE
from deploy.release.ledgers import check_published, published_rows
from deploy.release.promises import recomputed
from deploy.release.signing import check_signature, fingerprint, load_or_make_key
from tests.deploy.release_cases import CONTEXT, change_json, failed_checks, invoke, read, sign_again

EVERY_FILE = (*FILES, SUMS, SIGNATURE)


@pytest.fixture
def bundle(copied: Any) -> Path:
    """A copy of the bundle, to be changed."""
    found: Path = copied.bundle
    return found


@pytest.fixture
def key(copied: Any) -> Path:
    """The key that signed it."""
    found: Path = copied.key
    return found


def refused(bundle: Path, *more: str) -> list[str]:
    """The failed checks of a bundle that must not verify."""
    done = invoke("release", "verify", bundle, *more)
    assert isinstance(done.exception, FedHypeVAEError), done.output
    assert done.exception.exit_code == 1
    assert failed_checks(done)
    return failed_checks(done)


def test_bundle_verifies_as_it_was_made(bundle: Path, key: Path) -> None:
    done = invoke("release", "verify", bundle)
    assert done.exit_code == 0, done.output
    assert "FAILED" not in done.output
    assert "epsilon 2.5" in done.output
    trusted = fingerprint(load_or_make_key(key)[0].public_key())
    done = invoke("release", "verify", bundle, "--key", trusted)
    assert done.exit_code == 0
    assert "--key was not given" not in done.output


@pytest.mark.parametrize("name", EVERY_FILE)
def test_flipped_byte_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    for place in (len(content) // 3, len(content) - 2):
        changed = bytearray(content)
        changed[place] ^= 1
        (bundle / name).write_bytes(changed)
        assert refused(bundle)[0] in ("signature", "checksum of every file", "files, none missing and none added")


def test_flipped_byte_anywhere_in_the_signature_is_found(bundle: Path) -> None:
    content, sums = (bundle / SIGNATURE).read_bytes(), (bundle / SUMS).read_bytes()
    signer = read(bundle / "bundle.json")["signed_by"]
    assert check_signature(content, sums, signer, None) == signer
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(FedHypeVAEError):
            check_signature(bytes(changed), sums, signer, None)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_missing_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refused(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "data/more.parquet", ".hidden", "data/deep/x"])
def test_added_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("more")
    assert refused(bundle) == ["files, none missing and none added"]


def test_link_in_place_of_a_file_is_found(bundle: Path, tmp_path: Path) -> None:
    (bundle / "README.md").rename(tmp_path / "README.md")
    (bundle / "README.md").symlink_to(tmp_path / "README.md")
    assert refused(bundle) == ["files, none missing and none added"]


def test_foreign_signature_is_refused(bundle: Path, tmp_path: Path) -> None:
    """Signed again by another key: the bundle itself names its own signer."""
    sign_again(bundle, tmp_path / "other.pem")
    assert refused(bundle) == ["signature"]


def test_bundle_made_over_by_another_is_refused_by_the_trusted_fingerprint(
    bundle: Path, key: Path, tmp_path: Path
) -> None:
    """Whoever changes the named signer everywhere has made another bundle: the fingerprint tells them apart."""
    trusted, other = (fingerprint(load_or_make_key(path)[0].public_key()) for path in (key, tmp_path / "other.pem"))
    change_json(bundle, "bundle.json", lambda content: content.update(signed_by=other))
    card = (bundle / "README.md").read_text().replace(trusted, other)
    (bundle / "README.md").write_text(card)
    sign_again(bundle, tmp_path / "other.pem")
    assert invoke("release", "verify", bundle).exit_code == 0
    assert refused(bundle, "--key", trusted) == ["signature"]


def test_public_key_file_is_as_good_as_a_fingerprint(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "public.pem").write_text(str(read(bundle / SIGNATURE)["public_key"]))
    assert invoke("release", "verify", bundle, "--key", str(tmp_path / "public.pem")).exit_code == 0


@pytest.mark.parametrize("text", ["abcd", "no-such-file", "00:11"])
def test_unreadable_trusted_key_is_wrong_use(bundle: Path, text: str) -> None:
    assert isinstance(invoke("release", "verify", bundle, "--key", text).exception, ConfigError)


def test_folder_that_is_no_bundle_is_wrong_use(tmp_path: Path) -> None:
    assert isinstance(invoke("release", "verify", tmp_path).exception, DataError)
    assert isinstance(invoke("release", "verify", tmp_path / "none").exception, DataError)


STATEMENT_CHECK = "privacy statement, every epsilon computed again"


def lower_site(content: dict[str, Any]) -> None:
    content["sites"]["site-1"]["epsilon"] *= 0.99


def lower_declared(content: dict[str, Any]) -> None:
    content["guarantee"]["epsilon_declared"] *= 0.99


def lower_checks(content: dict[str, Any]) -> None:
    content["sites"]["site-2"]["epsilon_cross_checks"]["rdp"] *= 0.99


def raise_delta(content: dict[str, Any]) -> None:
    content["sites"]["site-2"]["delta"] *= 2


def drop_site(content: dict[str, Any]) -> None:
    del content["sites"]["site-2"]


def claim_patients(content: dict[str, Any]) -> None:
    content["guarantee"]["unit"] = "patient"


def claim_noise(content: dict[str, Any]) -> None:
    content["mechanism"]["noise_multiplier_training"] *= 2


def forget_a_release(content: dict[str, Any]) -> None:
    content["released"].pop(1)


def out_of_schema(content: dict[str, Any]) -> None:
    content["promise"] = "absolute"


@pytest.mark.parametrize(
    "change",
    [
        lower_site,
        lower_declared,
        lower_checks,
        raise_delta,
        claim_patients,
        claim_noise,
        forget_a_release,
        out_of_schema,
    ],
)
def test_changed_statement_fails_though_signed_again(
    bundle: Path, key: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    change_json(bundle, "privacy_statement.json", change)
    sign_again(bundle, key)
    assert refused(bundle)[0] == STATEMENT_CHECK


def test_statement_that_forgets_a_site_fails(bundle: Path, key: Path) -> None:
    change_json(bundle, "privacy_statement.json", drop_site)
    sign_again(bundle, key)
    assert "ledgers" in refused(bundle)


def test_lowered_events_fail_though_epsilon_fits_them(bundle: Path, key: Path) -> None:
    """More noise in the events, ε computed anew from them: the plan and the ledger charge otherwise."""
    context = load_bundle(bundle).context
    statement = json.loads((bundle / "privacy_statement.json").read_text())
    for event in statement["sites"]["site-1"]["events"]:
        event["noise_multiplier"] *= 2
    anew = recomputed(statement, context)
    assert anew["sites"]["site-1"]["epsilon"] < 0.7 * anew["sites"]["site-2"]["epsilon"]
    change_json(bundle, "privacy_statement.json", lambda content: content.update(anew))
    sign_again(bundle, key)
    assert refused(bundle) == [STATEMENT_CHECK, "ledgers", "descriptions"]


def weaken_row(row: dict[str, Any]) -> None:
    row["body"] = row["body"].replace('\\"count\\":1', '\\"count\\":2')


def rename_run(row: dict[str, Any]) -> None:
    row["round_key"] = "round-9"


def shift_time(row: dict[str, Any]) -> None:
    row["at"] = row["at"].replace("20", "21", 1)


@pytest.mark.parametrize("change", [weaken_row, rename_run, shift_time])
def test_changed_row_of_a_ledger_fails_though_signed_again(
    bundle: Path, key: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rows = read(bundle / "ledgers.json")["sites"]["site-1"]["rows"]
    place = next(index for index, row in enumerate(rows) if row["kind"] == "reserve")
    before = dict(rows[place])
    change_json(bundle, "ledgers.json", lambda content: change(content["sites"]["site-1"]["rows"][place]))
    assert read(bundle / "ledgers.json")["sites"]["site-1"]["rows"][place] != before
    sign_again(bundle, key)
    assert refused(bundle) == ["ledgers"]


def test_removed_row_of_a_ledger_fails(bundle: Path, key: Path) -> None:
    change_json(bundle, "ledgers.json", lambda content: content["sites"]["site-1"]["rows"].pop())
    sign_again(bundle, key)
    assert refused(bundle) == ["ledgers"]


def test_charges_of_a_ledger_that_is_not_shown_are_chained_too() -> None:
    """Where data is not public the bundle has charges alone: a changed, removed or exchanged one is found."""
    told = [PrivacyEvent("gaussian", 2.0 + place, 1.0, 1, "training") for place in range(3)]
    receipt = "5:" + "ab" * 32
    part = published_rows(None, "run", "site-1", told, public=True)
    check_published(part, "run", "site-1", receipt, told, CONTEXT)
    first, second, third = part["rows"]
    weak = {**second, "event": PrivacyEvent("gaussian", 99.0, 1.0, 1, "training").to_json()}
    for rows in ([first, weak, third], [first, third], [second, first, third], [first, second]):
        with pytest.raises(FedHypeVAEError):
            check_published({**part, "rows": rows}, "run", "site-1", receipt, told, CONTEXT)
    with pytest.raises(FedHypeVAEError):
        check_published(part, "another run", "site-1", receipt, told, CONTEXT)
    with pytest.raises(FedHypeVAEError):
        check_published(part, "run", "site-1", receipt, told[:2], CONTEXT)


def test_exchanged_rows_fail_though_signed_again(bundle: Path, key: Path) -> None:
    """Other rows than those that bundle.json counts."""
    notes = dict(read_notes(bundle / DATA_FILE))
    rows = torch.zeros(6, 12), torch.zeros(6, dtype=torch.int64)
    write_rows(bundle / DATA_FILE, [rows], dim=12, class_names=("a", "b", "c"), notes=notes)
    sign_again(bundle, key)
    assert refused(bundle) == ["synthetic set", "synthetic set", "descriptions"]


@pytest.mark.parametrize("name", ["bundle.json", "audit.json", "ledgers.json"])
def test_marks_that_differ_fail(bundle: Path, key: Path, name: str) -> None:
    def mark(content: dict[str, Any]) -> None:
        content.update(private=False, not_private_because=["because"])

    change_json(bundle, name, mark)
    sign_again(bundle, key)
    assert "marks" in refused(bundle)


def test_audit_above_the_claim_fails(bundle: Path, key: Path) -> None:
    def contradict(content: dict[str, Any]) -> None:
        content["audits"][0]["epsilon_bound"] = content["audits"][0]["epsilon_claimed"] + 0.1

    change_json(bundle, "audit.json", contradict)
    sign_again(bundle, key)
    assert refused(bundle) == ["audit", "descriptions"]


def note(bundle: Path, name: str, place: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Something that nobody reads in one of the JSON files."""
    change_json(bundle, name, lambda content: place(content).update(note="0123"))


DESCRIPTIONS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a smaller epsilon in the card": (
        "descriptions",
        lambda bundle: change_text(bundle / "README.md", f"({read_epsilon(bundle)}, ", "(0.100, "),
    ),
    "a limit that the card keeps silent about": (
        "descriptions",
        lambda bundle: change_text(bundle / "README.md", "- Correlated units", "- "),
    ),
    "a limit that the statement keeps silent about": (
        "privacy statement, every epsilon computed again",
        lambda bundle: change_json(bundle, STATEMENT, lambda told: told["not_covered"].pop()),
    ),
    "a larger promise in the statement's words": (
        "privacy statement, every epsilon computed again",
        lambda bundle: change_json(bundle, STATEMENT, lambda told: told["guarantee"].update(in_words="All is safe.")),
    ),
    "another license in croissant": (
        "descriptions",
        lambda bundle: change_json(bundle, "croissant.json", lambda told: told.update(license="cc0-1.0")),
    ),
    "another class in croissant": (
        "descriptions",
        lambda bundle: change_text(bundle / "croissant.json", "liver", "heart"),
    ),
    "a note in bundle.json": ("descriptions", lambda bundle: note(bundle, "bundle.json", lambda told: told)),
    "a note in croissant.json": ("descriptions", lambda bundle: note(bundle, "croissant.json", lambda told: told)),
    "a note in audit.json": ("descriptions", lambda bundle: note(bundle, "audit.json", lambda told: told)),
    "a note in an audit": ("descriptions", lambda bundle: note(bundle, "audit.json", lambda told: told["audits"][0])),
    "a note at a ledger": (
        "ledgers",
        lambda bundle: note(bundle, "ledgers.json", lambda told: told["sites"]["site-1"]),
    ),
    "a note in a ledger's row": (
        "ledgers",
        lambda bundle: note(bundle, "ledgers.json", lambda told: told["sites"]["site-1"]["rows"][0]),
    ),
    "a name twice in JSON": (
        "descriptions",
        lambda bundle: change_text(bundle / "ledgers.json", "{", '{\n  "run": "0123",'),
    ),
    "a title of two lines": (
        "descriptions",
        lambda bundle: change_json(bundle, "bundle.json", lambda told: told.update(name="a\n# b")),
    ),
}


def change_text(path: Path, before: str, after: str) -> None:
    """Change the first of such words."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def read_epsilon(bundle: Path) -> str:
    """The set's epsilon as its card has it."""
    return f"{max(site['epsilon'] for site in read(bundle / STATEMENT)['sites'].values()):.3f}"


@pytest.mark.parametrize("lie", DESCRIPTIONS)
def test_description_that_does_not_follow_from_the_rest_fails_though_signed_again(
    bundle: Path, key: Path, lie: str
) -> None:
    check, change = DESCRIPTIONS[lie]
    change(bundle)
    sign_again(bundle, key)
    assert check.split(":")[0] in refused(bundle)


@pytest.mark.parametrize("name", ["bundle.json", "audit.json", "ledgers.json", "privacy_statement.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "no json", "null"])
def test_file_that_makes_no_sense_is_a_failed_check(bundle: Path, key: Path, name: str, text: str) -> None:
    (bundle / name).write_text(text)
    sign_again(bundle, key)
    assert refused(bundle)
