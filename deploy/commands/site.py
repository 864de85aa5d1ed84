"""`fedhypevae site`: set up and start a hospital's site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client_app.ledger.limits import LIFETIME_EPSILON
from deploy.console import console, said, say, working

app = typer.Typer(no_args_is_help=True, help="Set up a hospital's site, approve its app, start it, and report on it.")

SiteFolder = Annotated[Path, typer.Argument(help="The site's folder.")]


@app.command("init")
def init(
    folder: SiteFolder,
    cohort: Annotated[str, typer.Option(help="Permanent name of the people the data is about.")],
    lifetime_epsilon: Annotated[float, typer.Option(help="Epsilon of everything ever released.")] = LIFETIME_EPSILON,
    lifetime_delta: Annotated[float, typer.Option(help="Its delta, far below 1/patients.")] = 1e-5,
    run_epsilon: Annotated[float, typer.Option(help="Epsilon of one run.")] = 3.0,
    unit: Annotated[
        str,
        typer.Option(help="patient or record, for the ledger's whole life. Default: as the data says."),
    ] = "",
    max_records_per_patient: Annotated[int, typer.Option(min=1, help="Cap for unit patient.")] = 4,
    witness: Annotated[str, typer.Option(help="A second place for the ledger's head; default: beside FOLDER.")] = "",
    public_data: Annotated[bool, typer.Option(help="Only for public data: scores may leave.")] = False,
) -> None:
    """Make the site's key, secret, policy and ledger; needs site.toml and ca.crt of the coordinator.

    The lifetime's epsilon of 7 holds three runs of 3, each chosen after the results of those before. The unit can't be
    changed later: without --unit it is the patient where site.parquet names patients, else the record.

    Example: fedhypevae site init /srv/fedhypevae-site --cohort st-anna-breast --unit patient
    """
    from client_app.policy.policy import load_policy
    from deploy.doctor import advise_site
    from deploy.site.folder import SiteFolder as SiteAt
    from deploy.site.set_up import init_site, unit_of_data

    chosen_unit = unit or unit_of_data(SiteAt(folder))
    others: dict[str, str | float | bool | tuple[str, ...]] = {"unit": chosen_unit}
    if chosen_unit == "patient":
        others["max_records_per_patient"] = max_records_per_patient
    if public_data:
        others |= {"data_is_public": True, "metrics_may_leave": True}
    shown = init_site(
        folder,
        cohort,
        lifetime_epsilon=lifetime_epsilon,
        lifetime_delta=lifetime_delta,
        run_epsilon=run_epsilon,
        witness=witness,
        **others,
    )
    say(f"send {folder / 'keys' / 'node.pub'} to the coordinator, and read out by telephone: {shown}")
    say(f"read {folder / 'policy.toml'}: it is the site's own law")
    chosen = load_policy(folder / "policy.toml").witness_path(folder)
    say(f"witness {chosen}: shows when an old ledger is put back; never copy or restore it with the ledger")
    for line in advise_site(SiteAt(folder)):
        say(line)


@app.command("pin")
def pin(
    folder: SiteFolder,
    peers: Annotated[list[str], typer.Argument(help="NAME=FILE.pub of every other site of the federation.")],
) -> None:
    """Write the other sites' public keys into peers.json: what trust secagg holds every key against.

    Compare each fingerprint with that site's own people, by telephone and not through the server: a server that could
    choose these keys could pose as all the others.

    Example: fedhypevae site pin /srv/fedhypevae-site st-bernard=bernard.pub st-clara=clara.pub
    """
    from deploy.site.folder import site_folder
    from deploy.site.peers import pin_peers, read_pairs

    for name, shown in pin_peers(site_folder(folder), read_pairs(peers)).items():
        say(f"{name:<24} {shown}")
    say(f"compare each with its own site; then allow secagg in {folder / 'policy.toml'}: allowed_trust")


@app.command("start")
def start(
    folder: SiteFolder,
    check: Annotated[bool, typer.Option(help="Look for faults first, as `fedhypevae doctor` does.")] = True,
) -> None:
    """Check the site, then run it until it is stopped; a crash is followed by a new start, without limit.

    Example: fedhypevae site start /srv/fedhypevae-site
    """
    import threading

    from common.durable import keep_private
    from deploy.machine.live import watch_refusals, watch_site
    from deploy.machine.supervise import stop_on_signals, supervise
    from deploy.site.folder import ALIVE, site_folder

    site = site_folder(folder.resolve())
    if check:
        from deploy.doctor import advise_site, examine_site

        for line in advise_site(site):
            say(line, err=True)
        _refuse_faults(examine_site(site, online=False))
    for path in keep_private(site.path):
        say(f"others can read {path}: it belongs to somebody else")
    stop = threading.Event()
    stop_on_signals(stop)
    watch_site(site.path, stop, lambda line: say(line))
    watch_refusals(site.path, stop, lambda line: say(line))
    supervise(site.programs(), site.environment(), site.path, stop, lambda line: say(line), site.path / ALIVE)


@app.command("renew-key")
def renew_key(folder: SiteFolder) -> None:
    """Make a new node key; the old one stays beside it until the coordinator has rotated.

    Example: fedhypevae site renew-key /srv/fedhypevae-site
    """
    from deploy.site.folder import site_folder
    from deploy.site.set_up import renew_site_key

    shown = renew_site_key(site_folder(folder).path)
    say(f"send {folder / 'keys' / 'node.pub'} for `fedhypevae server rotate`, and read out by telephone: {shown}")


@app.command("report")
def report(
    folder: SiteFolder,
    bundle: Annotated[Path, typer.Option(help="The published bundle, or a run's output folder.")],
    images: Annotated[Path | None, typer.Option(help="The folder that was embedded, for thumbnails.")] = None,
    salt: Annotated[Path | None, typer.Option(help="The site's salt, if not at its usual place.")] = None,
    page: Annotated[str, typer.Option(help="Name of the page in the site's folder.")] = "report.html",
    umap: Annotated[bool, typer.Option(help="Draw the UMAP view too, where umap-learn is installed.")] = True,
) -> None:
    """Write this site's own page: real against synthetic, scores, ledger. It shows records and stays in the folder.

    Example: fedhypevae site report /srv/fedhypevae-site --bundle bundle --images scans
    """

    from common.publishing.bundle import load_bundle
    from deploy.report.own import open_site
    from deploy.report.project import has_umap
    from deploy.report.site import check_page, render_site, write_site_page
    from deploy.report.thumbnails import images_of

    published = load_bundle(bundle)
    site = open_site(folder, published)
    path = check_page(site.folder, site.folder / page)
    with working("Reading ...") as status:
        pictures = images_of(site, images, salt)
        text = render_site(
            site, published, pictures, umap=umap and has_umap(), tell=lambda word: status.update(said(f"{word} ..."))
        )
    write_site_page(site.folder, path, text)
    console().print(f"page: {path}", soft_wrap=True)


@app.command("approve")
def approve(
    folder: SiteFolder,
    digest: Annotated[str, typer.Argument(help="SHA-256 of the app's package.")],
    file: Annotated[Path | None, typer.Option(help="The package, if it did not arrive by a run.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Show all of its text, not the changes alone.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
) -> None:
    """Show what is inside an app, compared with what this site approved before, and approve it in place of that.

    Example: fedhypevae site approve /srv/fedhypevae-site 3fa9...c2 --file app.fab
    """
    from deploy.site.approve import approve_app, describe_app
    from deploy.site.folder import site_folder

    site = site_folder(folder)
    package = describe_app(site, digest, file, full=full)
    for line in package.lines:
        say(line)
    if not yes:
        typer.confirm(f"May this code run on this site's data, within its policy? {package.digest}", abort=True)
    approve_app(site, package)
    for old in package.replaced:
        say(f"not approved any more: {old}")
    say("approved: it may run from the next message on, no restart needed")


def _refuse_faults(findings: list[str]) -> None:
    """End with exit code 2 where a check found something."""
    if findings:
        for line in findings:
            say(line, err=True)
        raise typer.Exit(2)
