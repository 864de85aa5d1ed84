"""What the compose demo needs beside the ordinary commands: it sets all folders up, and starts the one run.

In a real federation `provision` runs at the coordinator and `site init` at each hospital; here one service does both,
since all data is the demonstration's and public.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

from client_app.place import open_policy
from common.config.run import RunConfig
from common.errors import FedHypeVAEError
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.provision import FederationPlan, provision
from deploy.coordinator.registry import list_sites, register
from deploy.coordinator.run import follow, in_own_folder, start_run
from deploy.machine.app_package import build_package, digest_of
from deploy.settings import run_config
from deploy.site.folder import SiteFolder
from deploy.site.set_up import init_site

APP = Path("/app")
VOLUMES = Path("/volumes")
ONLINE_S = 600.0


def prepare(volumes: Path, num_sites: int, app: Path, cache: Path, *, server_name: str = "superlink") -> None:
    """Fill the volumes `server`, `site-1`, ... with keys, policies, ledgers and data; a second call does nothing.

    Args:
        volumes: folder in which the volumes are mounted.
        num_sites: how many sites.
        app: the project's folder; its digest is approved at every site.
        cache: where the demonstration's embeddings are kept.
        server_name: by which sites reach the server.
    """
    if (volumes / "server" / "server.toml").is_file():
        print("the volumes are set up already")
        return
    from embeddings.simulation.simulated import load_pool, load_site
    from embeddings.store.writing import write_store

    names = [f"site-{number + 1}" for number in range(num_sites)]
    digest = digest_of(build_package(app))
    pool = load_pool(cache)
    config = RunConfig().federation
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "federation"
        provision(FederationPlan(name="demo", server_names=[server_name], sites=names), out)
        for index, name in enumerate(names):
            place = volumes / name
            shutil.copytree(out / "sites" / name, place, dirs_exist_ok=True)
            write_store(place / "site.parquet", load_site(pool, index, num_sites, None, config.seed))
            init_site(
                place,
                f"demo/{name}",
                lifetime_epsilon=50.0,
                lifetime_delta=1e-5,
                run_epsilon=10.0,
                witness="witness/witness.json",  # all that a demo's site keeps is one volume
                approved_app_digests=(digest,),
                # a site that allows shared noise does not start before people have compared and pinned its peers' keys
                **{**open_policy(public=True), "allowed_trust": ("local",)},
            )
            shutil.copy(SiteFolder(place).node_key.with_suffix(".pub"), out / "server" / f"{name}.pub")
        shutil.copytree(out / "server", volumes / "server", dirs_exist_ok=True)
    print(f"set up a server and {num_sites} sites; app {digest} is approved at each")


def run(server: ServerFolder, app: Path, num_sites: int, config: RunConfig) -> Path:
    """Register the sites that are not yet, wait until all are online, run, and return the folder with summary.json."""
    known = {site.name for site in list_sites(server)}
    names = [f"site-{number + 1}" for number in range(num_sites)]
    for name in names:
        if name not in known:
            register(server, name, server.path / f"{name}.pub")
            print(f"registered {name}", flush=True)
    end = time.monotonic() + ONLINE_S
    while (online := {site.name for site in list_sites(server) if site.status == "online"}) != set(names):
        if time.monotonic() > end:
            missing = ", ".join(sorted(set(names) - online))
            raise FedHypeVAEError(f"not online after {ONLINE_S:g} s: {missing}; see `docker compose logs`")
        time.sleep(2.0)
    config = in_own_folder(server, config)
    run_id = start_run(server, app, config)
    return follow(server, run_id, config, lambda line: print(line, flush=True))


def main() -> None:
    """`python -m deploy.simulation.compose_demo prepare|run`, with FEDHYPEVAE_SITES and FEDHYPEVAE_SETTINGS."""
    num_sites = int(os.environ.get("FEDHYPEVAE_SITES", "4"))
    try:
        if sys.argv[1:] == ["prepare"]:
            prepare(VOLUMES, num_sites, APP, Path(os.environ.get("FEDHYPEVAE_CACHE", "/cache")))
        elif sys.argv[1:] == ["run"]:
            pairs = shlex.split(os.environ.get("FEDHYPEVAE_SETTINGS", ""))
            config = run_config(pairs, num_sites=num_sites, min_sites=min(2, num_sites))
            output = run(ServerFolder(Path("/srv/server")), APP, num_sites, config)
            print((output / "summary.json").read_text())
        else:
            sys.exit("usage: python -m deploy.simulation.compose_demo prepare|run")
    except FedHypeVAEError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
