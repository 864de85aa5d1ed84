"""`fedhypevae release`: publish a run as a signed bundle, behind a gate; and check such a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from deploy.console import say, watching

if TYPE_CHECKING:
    from deploy.release.verify import Verdict

MAKE = "make"


class _MakeByDefault(TyperGroup):
    """`release RUN` is `release make RUN`: a person who names no command means the main one."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the main command's options, too: nobody who types `release --help` knows its name."""
        super().format_help(ctx, formatter)
        main = self.commands[MAKE]
        main.format_help(click.Context(main, info_name=MAKE, parent=ctx), formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the main command's name where none is given."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MakeByDefault,
    no_args_is_help=True,
    help="Publish a run as a signed bundle, behind a gate; or check a bundle.\n\n"
    "Example: fedhypevae release outputs/demo --out bundle",
)


@app.command(MAKE)
def make(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a completed run.")],
    out: Annotated[Path, typer.Option(help="The new bundle: a folder that does not exist yet.")],
    name: Annotated[str, typer.Option(help="Title of the set.")] = "Synthetic embeddings of a federation",
    license_name: Annotated[str, typer.Option("--license", help="Licence of the set.")] = "cc-by-4.0",
    key: Annotated[
        Path | None,
        typer.Option(help="The coordinator's signing key; made once. Default: ~/.config/fedhypevae/release-key.pem."),
    ] = None,
    ledgers: Annotated[
        Path | None, typer.Option(help="Folder with SITE.json, as `fedhypevae ledger export` writes them at the sites.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish whatever the gate says, marked as not private in every file.")
    ] = False,
    audit_draws: Annotated[int, typer.Option(min=100, help="Draws of each world of the two-world audit.")] = 1000,
    audit_canaries: Annotated[int, typer.Option(min=10, help="Canaries of the one-run audit.")] = 500,
) -> None:
    """Write a bundle: the set, the generator, card, Croissant, privacy statement, audit, checksums, signature.

    Refused unless every ledger verifies, the privacy statement is complete and comes out the same when computed again,
    the run was private end to end, and an audit of its configuration does not contradict its epsilon. The audit takes
    some tens of seconds and reads made-up records alone.

    Example: fedhypevae release outputs/demo --out bundle --name "CT embeddings, four hospitals"
    """
    from common.assurance.audit_run import AuditSize
    from common.errors import FedHypeVAEError
    from deploy.release.build import check_place, write_bundle
    from deploy.release.gate import inspect_run
    from deploy.release.signing import default_key, fingerprint, load_or_make_key

    check_place(out, name, license_name)
    with watching() as watch:
        found = inspect_run(run, ledgers, AuditSize(audit_draws, audit_canaries), watch)
    for audit in found.audits:
        say(f"audit, {audit.kind}: epsilon is at least {audit.epsilon_bound:.3f}, claimed {audit.epsilon_claimed:.3f}")
    if found.refusals and not force:
        listed = "\n".join(f"  - {reason}" for reason in found.refusals)
        raise FedHypeVAEError(
            f"not released:\n{listed}\nmend the run; --force would publish it marked as not private in every file"
        )
    reasons = found.refusals or (("released with --force, so without the gate's word",) if force else ())
    place = default_key() if key is None else key
    secret, made = load_or_make_key(place)
    with watching() as watch:
        write_bundle(out, found, reasons, title=name, license_name=license_name, key=secret, watch=watch)
    signer = fingerprint(secret.public_key())
    if made:
        say(f"made a signing key at {place}: keep it, and publish its fingerprint where people trust it")
    say(f"bundle in {out}, signed by {signer}")
    for reason in reasons:
        say(f"NOT PRIVATE: {reason}")
    say(f"check it anywhere: fedhypevae release verify {out} --key {signer}")


@app.command("verify")
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    key: Annotated[
        str | None,
        typer.Option(help="Fingerprint of the coordinator's key, or a file with the public key, from another source."),
    ] = None,
    allow_not_private: Annotated[
        bool, typer.Option("--allow-not-private", help="Accept a bundle that says that it is not private.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Draw a random sample of the rows again, and not all of them.")
    ] = False,
) -> None:
    """Check a bundle on any machine: every file, the signature, the ledgers, every epsilon, and every row drawn again.

    Exit code 1 if anything is off, or if the bundle carries no promise. Without --key it is only shown that the bundle
    is whole, not who made it. A million rows take about a minute; --quick is done in seconds, and says what it misses.

    Example: fedhypevae release verify bundle --key 5f0c:...
    """
    from common.errors import FedHypeVAEError
    from deploy.release.signing import read_pinned
    from deploy.release.verify import verify_bundle

    pinned = None if key is None else read_pinned(key)
    with watching() as watch:
        verdict = verify_bundle(bundle, pinned, watch, quick=quick)
    _print(verdict, pinned is not None)
    if not verdict.intact:
        raise FedHypeVAEError(f"{bundle} does not verify: don't use it, and ask the coordinator")
    if verdict.not_private_because and not allow_not_private:
        raise FedHypeVAEError(f"{bundle} is whole, and carries no promise: it is NOT PRIVATE")


def _print(verdict: Verdict, pinned: bool) -> None:
    from deploy.release.redraw import SAMPLE_CERTAINTY

    for check in verdict.checks:
        say(f"{'FAILED' if check.fault else 'ok':>6}  {check.what}{': ' if check.fault else ''}{check.fault}")
    if not verdict.intact:
        return
    if verdict.missed_share is not None:
        say(
            f"sampled: a set with more than {verdict.missed_share:.2%} foreign rows would be found with "
            f"{SAMPLE_CERTAINTY:.0%}; leave --quick out to compare every row"
        )
    elif not verdict.not_private_because:
        say("verified: every row is what the generator draws")
    say(f"signed by {verdict.signed_by}")
    if not pinned:
        say("compare this fingerprint with the coordinator's, from another source: --key was not given")
    for reason in verdict.not_private_because:
        say(f"NOT PRIVATE: {reason}")
    if not verdict.not_private_because:
        say(f"epsilon {verdict.epsilon:.4f} at delta {verdict.delta:g}, recomputed from the events of every site")
