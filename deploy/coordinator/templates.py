"""Texts that `fedhypevae provision` writes: start scripts, systemd units, the proxy's snippet, the checklist."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_SWITCHES = (
    "FLWR_TELEMETRY_ENABLED=0",
    "FLWR_DISABLE_UPDATE_CHECK=1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
)


def start_script(command: str, verb: str) -> str:
    """A script that starts a node from its own folder."""
    exports = "\n".join(f"export {switch}" for switch in _SWITCHES)
    return f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\numask 077\n{exports}\nexec {shlex.quote(command)} {verb} .\n'


def unit(description: str, command: str, verb: str, folder: str, user: str) -> str:
    """A systemd unit with everything closed that the node does not need."""
    switches = "\n".join(f"Environment={switch}" for switch in _SWITCHES)
    return f"""[Unit]
Description={description}
Wants=network-online.target
After=network-online.target

[Service]
User={user}
WorkingDirectory={folder}
{switches}
# where the program is installed elsewhere, name its full path: systemd searches /usr/local/bin and /usr/bin
ExecStart={command} {verb} {folder}
Restart=always
RestartSec=5
KillMode=control-group
TimeoutStopSec=30
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=no
ReadWritePaths={folder}
# the ledger's witness; name the other place here, too, where policy.toml names one
ReadWritePaths=-{folder}-witness
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""


def proxy(name: str, fleet_port: int) -> str:
    """An nginx snippet: it passes the sites' TLS link through untouched, and nothing else."""
    return f"""# For nginx.conf, at the top level (needs the stream module). Sites need this one port and nothing else.
# TLS is not ended here: the sites check the server's own certificate, and the server checks their keys.
# The control port stays on the server's loopback: reach it by `ssh -L`, never through this proxy.
stream {{
    map $ssl_preread_server_name $fedhypevae {{
        {name} fedhypevae_fleet;
        default fedhypevae_refused;
    }}
    upstream fedhypevae_fleet {{
        server 127.0.0.1:{fleet_port};
    }}
    upstream fedhypevae_refused {{
        server 127.0.0.1:9;
    }}
    server {{
        listen 443;
        ssl_preread on;
        proxy_pass $fedhypevae;
        proxy_timeout 1h;
        proxy_socket_keepalive on;
    }}
}}
"""


def checklist(name: str, sites: Sequence[str], server_folder: str, site_folder: str, address: str) -> str:
    """What the coordinator and each site do next, in order."""
    steps = "\n".join(
        f"""
## Site {site}
- [ ] Send `sites/{site}/` (ca.crt, site.toml, start.sh, the unit): nothing in it is secret.
- [ ] The site puts it at `{site_folder}` and runs `fedhypevae site init {site_folder} --cohort NAME`
      (`--witness` on another disk, where there is one).
- [ ] The site reads `policy.toml` and changes what it does not want.
- [ ] The site puts its embeddings at `{site_folder}/site.parquet` (`fedhypevae embed`).
- [ ] The site sends `keys/node.pub` and tells its fingerprint by telephone.
- [ ] `fedhypevae site register {server_folder} {site} node.pub`: is the fingerprint the one you were told?
- [ ] The site reads the app and approves it: `fedhypevae site approve {site_folder} DIGEST`.
- [ ] `fedhypevae doctor {site_folder}` at the site finds nothing.
- [ ] The site starts: `systemctl enable --now fedhypevae-site`."""
        for site in sites
    )
    return f"""# {name}: from here to the first run

## Server
- [ ] Move `authority/` to an offline place. Whoever has `ca.key` can pose as the server.
- [ ] Put `server/` at `{server_folder}`, owned by the service's user; `server.key` and `superexec.secret` are 0600.
- [ ] Open one port to the sites: {address} (or 443 through `proxy.conf`). Keep the control port on loopback.
- [ ] `systemctl enable --now fedhypevae-server`, then `fedhypevae doctor {server_folder}`.
- [ ] Send the app to every site (`fedhypevae site package`) with its digest by another way.
{steps}

## Run
- [ ] `fedhypevae site list {server_folder}` shows every site online.
- [ ] `fedhypevae run {server_folder} --set num-sites={len(sites)}`
"""
