"""Looks a site or a server over before it runs: each fault in one line, with its cure.

A check returns lines; none means that all is well. No check changes anything, and none prints a value of the data.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FedHypeVAEError, ProtocolError
from common.texts import object_or_empty
from deploy.coordinator.folder import ServerFolder
from deploy.doctor_ledger import ledger_advice, ledger_faults, unit_advice
from deploy.machine.keys import fingerprint, read_certificate
from deploy.machine.reach import examine_link
from deploy.machine.versions import unmet, versions
from deploy.site.folder import ALIVE, SiteFolder
from embeddings.encoders.base import precision_advice

if TYPE_CHECKING:
    from common.wire.identity import EncoderIdentity

_NEEDED_BYTES = 2_000_000_000
_SOON = timedelta(days=30)
_ALIVE_S = 60.0


def examine_site(site: SiteFolder, *, online: bool = True, now: datetime | None = None) -> list[str]:
    """Every fault found at a site.

    Args:
        site: its folder.
        online: also try the link to the server.
        now: the time, for tests.
    """
    moment = datetime.now(UTC) if now is None else now
    try:
        settings = site.settings
    except FedHypeVAEError as error:
        return [f"settings: {error}; put the coordinator's site.toml there"]
    agreed = object_or_empty(site.path / "federation.json")  # what the coordinator wrote down
    checks: list[Callable[[], Iterable[str]]] = [
        lambda: _versions(agreed),
        lambda: _disk(site.path),
        lambda: _secrets((site.node_key, site.path / "keys" / "superexec.secret")),
        lambda: _node_key(site),
        lambda: _certificate(site.path / "ca.crt", moment),
        lambda: _policy(site),
        lambda: ledger_faults(site),
        lambda: _data(site, agreed),
        _gpu,
        lambda: _device(settings.device),
        lambda: _ports((settings.runtime_port, settings.health_port)) if online and not _runs(site) else (),
        lambda: examine_link(settings.server, site.path / "ca.crt", os.environ) if online else (),
    ]
    return _all(checks)


def advise_site(site: SiteFolder) -> list[str]:
    """What a site does well to change, and may run without: faults are `examine_site`'s."""
    return _all([lambda: ledger_advice(site), lambda: unit_advice(site), precision_advice])


def examine_server(server: ServerFolder, *, now: datetime | None = None) -> list[str]:
    """Every fault found at a server."""
    moment = datetime.now(UTC) if now is None else now
    try:
        settings = server.settings
    except FedHypeVAEError as error:
        return [f"settings: {error}; run `fedhypevae provision`"]
    checks: list[Callable[[], Iterable[str]]] = [
        lambda: _disk(server.path),
        lambda: _secrets((server.path / "server.key", server.path / "superexec.secret")),
        lambda: _certificate(server.path / "ca.crt", moment),
        lambda: _certificate(server.path / "server.pem", moment),
        lambda: _control(settings.control_host),
        lambda: examine_link(f"127.0.0.1:{settings.fleet_port}", server.path / "ca.crt", {}),  # as its programs
        lambda: _refused(server),
    ]  # fmt: skip
    return _all(checks)


def _all(checks: Iterable[Callable[[], Iterable[str]]]) -> list[str]:
    lines: list[str] = []
    for check in checks:
        try:
            lines.extend(check())
        except FedHypeVAEError as error:
            lines.append(str(error))
        except Exception as error:  # a check that fails is a finding, never a silent pass
            lines.append(f"a check failed itself ({type(error).__name__}: {error}): report it")
    return [" ".join(line.split()) for line in lines]


def _control(host: str) -> Iterable[str]:
    if host in {"127.0.0.1", "::1", "localhost"}:
        return []
    return [
        "control port: it listens beyond this machine, and anybody who reaches it may start runs: set control_host = "
        '"127.0.0.1" in server.toml, and reach it by ssh -L'
    ]


def _refused(server: ServerFolder) -> Iterable[str]:
    """The sites that broke a rule in the newest run, as its server noted them."""
    from deploy.machine.live import find_status
    from server_app.checkpoint import load_checkpoint

    try:
        folder = find_status(server.path).folder
        found = {str(one["site"]): one for one in load_checkpoint(folder)[1].refused}
    except FedHypeVAEError:
        return []  # no run yet, or none that came as far
    return [
        f"site {name}: {one['when']} of the newest run: {one['why']}: ask its people; to shut it out: "
        f"fedhypevae server revoke {server.path} {name}"
        for name, one in found.items()
    ]


def _versions(agreed: Mapping[str, object]) -> Iterable[str]:
    wanted = agreed.get("versions")
    if not isinstance(wanted, dict):
        return ["versions: the coordinator's federation.json is missing or unreadable: ask for it, to compare releases"]
    here = versions()
    lines = [
        f"version of {name}: the server has {wanted[name]}, this site {mine}: install {name} {wanted[name]}"
        for name, mine in here.items()
        if name in wanted and wanted[name] != mine
    ]
    return lines + [f"package: {one}: install it" for one in unmet()]


def _disk(folder: Path) -> Iterable[str]:
    free = shutil.disk_usage(folder).free
    if free < _NEEDED_BYTES:
        return [f"disk: {free / 1e9:.2f} GB free at {folder}, {_NEEDED_BYTES / 1e9:.0f} GB needed: free some"]
    return []


def _secrets(paths: Iterable[Path]) -> Iterable[str]:
    lines = []
    for path in paths:
        if not path.is_file():
            lines.append(f"secret: {path} is missing: make it with `fedhypevae site init`, or restore it")
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            mode = stat.S_IMODE(path.stat().st_mode)
            lines.append(f"secret: {path} can be read by others (mode {mode:o}): chmod 600 {path}")
    return lines


def _node_key(site: SiteFolder) -> Iterable[str]:
    if not site.node_key.is_file():
        return []  # reported as a missing secret
    from common.secagg.primitives import load_signer, public_line

    public = site.node_key.with_suffix(".pub")
    fingerprint(public)
    try:
        key = load_signer(site.node_key.read_bytes())
    except ProtocolError as error:
        return [f"node key: {error} ({site.node_key}): restore it, or `fedhypevae site renew-key` and rotate"]
    if public_line(key.public_key()).split() != public.read_text(encoding="utf-8").split()[:2]:
        return [f"node key: {public} does not belong to {site.node_key}: `fedhypevae site renew-key` and rotate"]
    return []


def _certificate(path: Path, now: datetime) -> Iterable[str]:
    certificate = read_certificate(path)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        return [
            f"clock: {now:%Y-%m-%d %H:%M} UTC here, before {path.name} was made ({start:%Y-%m-%d %H:%M}): set it (NTP)"
        ]
    if now > end:
        return [f"certificate: {path} ended on {end:%Y-%m-%d}: the coordinator makes a new one, or the clock is wrong"]
    if now > end - _SOON:
        return [f"certificate: {path} ends on {end:%Y-%m-%d}, in less than 30 days: ask the coordinator for a new one"]
    return []


def _policy(site: SiteFolder) -> Iterable[str]:
    from client_app.policy.policy import load_policy
    from deploy.site.approve import approved_apps

    path = site.path / "policy.toml"
    policy = load_policy(path)
    lines = []
    if stat.S_IMODE(path.stat().st_mode) & 0o022:
        lines.append(f"policy: others may write {path}: chmod 600 {path}")
    if not policy.approved_app_digests:
        lines.append("policy: no app is approved, so none will run: read it and `fedhypevae site approve` its digest")
    names = list(approved_apps(site).values())
    if len(names) > len(set(names)):
        lines.append(
            "policy: several packages of one app are approved, so a server may send an old one: "
            "`fedhypevae site approve` the one in use, which takes the others' place"
        )
    if "secagg" in policy.allowed_trust:
        lines += _peers(site)
    return lines


def _peers(site: SiteFolder) -> Iterable[str]:
    """The list that secure aggregation needs."""
    from client_app.answers.peers import pinned_peers
    from client_app.place import find_place
    from common.config.run import RunConfig

    node = {"data-dir": str(site.path), "site-name": site.settings.name}
    try:
        pinned_peers(find_place(node, RunConfig()))
    except FedHypeVAEError as error:
        yield f"peers: {error}; write the list with `fedhypevae site pin`"


def _data(site: SiteFolder, agreed: Mapping[str, object]) -> Iterable[str]:
    from embeddings.store.file import read_store

    if not site.data.is_file():
        return [f"data: no embeddings at {site.data}: make them with `fedhypevae embed`"]
    try:
        records = read_store(site.data)
    except FedHypeVAEError as error:
        return [f"data: {error}"]
    classes = agreed.get("classes")
    here = list(records.metadata.class_names)
    if records.metadata.task == "multilabel":
        return []  # sites may label different findings: they meet on all of them
    if isinstance(classes, list) and classes and here != classes:
        odd = sorted(set(map(str, classes)) ^ set(here))
        which = f"differing in {', '.join(odd[:3])}" if odd else "in another order"
        return [f"class set: this site has {len(here)} classes, the federation {len(classes)}, {which}: embed again "
                "with the federation's class list"]  # fmt: skip
    return _encoder(records.metadata.identity, agreed)


def _encoder(found: EncoderIdentity, agreed: Mapping[str, object]) -> list[str]:
    """Whether the embeddings are of the federation's encoder. A folder's weights are compared when the sites meet."""
    from embeddings.encoders.backbones import SHORT_NAMES

    name, revision = str(agreed.get("encoder") or ""), str(agreed.get("encoder_revision") or "")
    right = found.encoder == SHORT_NAMES.get(name, name) and revision in {"", found.revision}
    if not name or right or found.encoder.startswith("local:"):
        return []
    wanted = f"--encoder {name}" + (f" --revision {revision}" if revision else "")
    return [
        f"encoder: this site's embeddings are of {found.encoder}, revision {found.revision}: the federation's are made "
        f"by `fedhypevae embed {wanted}`: embed again"
    ]


def _gpu() -> Iterable[str]:
    import torch

    built_for = torch.version.cuda
    if built_for is None or torch.cuda.is_available():
        return []
    return [
        f"GPU: torch is built for CUDA {built_for} and finds no GPU: install the driver, or torch's build for the CPU"
    ]


def _device(wanted: str) -> Iterable[str]:
    """The site's own `device`, where it names one: ConfigError, with its cure, if this machine has no such thing."""
    from common.devices import choose_device

    if wanted:
        choose_device(wanted)
    return []


def _runs(site: SiteFolder) -> bool:
    """Whether the site is running, by the file that its supervisor keeps young: the ports are its own then."""
    try:
        return abs(time.time() - (site.path / ALIVE).stat().st_mtime) < _ALIVE_S
    except OSError:
        return False


def _ports(ports: Iterable[int]) -> Iterable[str]:
    lines = []
    for port in ports:
        with socket.socket() as one:
            one.settimeout(1.0)
            if one.connect_ex(("127.0.0.1", port)) == 0:
                lines.append(
                    f"port {port}: taken on this machine (is the site running already?): change it in site.toml"
                )
    return lines
