"""What only a site itself may make: its keys, its policy, its ledger."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import make_key as make_receipt_key
from client_app.policy.template import policy_template
from common.durable import keep_private, make_private
from common.errors import ConfigError
from deploy.machine.keys import (
    make_node_key,
    make_secret,
    read_certificate,
    write_new,
)
from deploy.site.folder import SiteFolder
from deploy.site.unit import let_unit_write


def init_site(
    folder: Path,
    cohort_id: str,
    *,
    lifetime_epsilon: float,
    lifetime_delta: float,
    run_epsilon: float,
    witness: str = "",
    **others: str | float | bool | tuple[str, ...],
) -> str:
    """Make what only the site itself may make: its keys, its secret, its policy, its ledger and the ledger's witness.

    The systemd unit in the folder, if there is one, may write to the witness's place afterwards.

    Args:
        folder: the site's folder, with the site.toml and ca.crt that the coordinator sent.
        cohort_id: permanent name of the people the data is about.
        lifetime_epsilon: ε of everything ever released, at `lifetime_delta`.
        lifetime_delta: its δ.
        run_epsilon: ε of one run.
        witness: a second place for the ledger's head, best on another disk; empty: a folder beside the site's.
        others: other lines of the policy.

    Returns:
        The fingerprint of the new node key, to be compared with the coordinator's by telephone.

    Raises:
        ConfigError: the coordinator's files are missing, a key, policy or ledger is there already, or the witness's
            folder can't be made.
    """
    site = SiteFolder(folder)
    _ = site.settings
    read_certificate(folder / "ca.crt")
    witness = witness or str(site.default_witness)
    text = policy_template(
        cohort_id,
        lifetime_epsilon=lifetime_epsilon,
        lifetime_delta=lifetime_delta,
        run_epsilon=run_epsilon,
        witness=witness,
        **others,
    )
    made = (site.node_key, folder / "keys" / "superexec.secret", folder / "ledger.db", folder / witness)
    _refuse_existing((folder / "policy.toml", *made))
    try:
        make_private((folder / witness).parent)
    except OSError as error:
        raise ConfigError(
            f"can't make the folder of the ledger's witness, {(folder / witness).parent} ({error.strerror}): make it "
            "for the site's user, or name another place, best on another disk, with --witness"
        ) from None
    shown = make_node_key(site.node_key)
    make_secret(folder / "keys" / "superexec.secret")
    write_new(folder / "policy.toml", text.encode(), 0o600)
    make_receipt_key(folder)
    Ledger.create(folder / "ledger.db", cohort_id, folder / witness).close()
    keep_private(folder)
    let_unit_write(folder, (folder / witness).parent.resolve())
    return shown


def unit_of_data(site: SiteFolder) -> str:
    """Whom the ledger of a site should protect, by what its data names; it can't be changed later.

    Raises:
        ConfigError: there is no data yet to tell. DataError: it can't be read.
    """
    from embeddings.store.file import read_head

    if not site.data.is_file():
        raise ConfigError(
            f"whom shall the ledger protect? There is no {site.data} yet that would say, and it can't be changed "
            "later: --unit patient, where the data will name patients (embed with a patient column), or --unit record"
        )
    return "patient" if "patient" in read_head(site.data)[1] else "record"


def renew_site_key(folder: Path) -> str:
    """Make a new node key and keep the old one beside it, for `fedhypevae server rotate` at the server."""
    site = SiteFolder(folder)
    if site.node_key.is_file():
        number = 1
        while (kept := site.node_key.with_name(f"node.old-{number}")).exists():
            number += 1
        site.node_key.rename(kept)
    return make_node_key(site.node_key)


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} exists already: this site was set up before; its ledger and key stay as they are"
            )
