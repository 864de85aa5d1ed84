"""`fedhypevae audit`: attack one's own configuration with made-up records, and hold the result against the claim."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.console import say, watching

if TYPE_CHECKING:
    from common.assurance.audit import AuditResult
    from common.config.run import RunConfig

SUM_IS_ATTACKED = "secure aggregation: the sum of the sites is attacked, with its whole noise; the masks are not"
_ATTACKED = 17  # the public image that the inversion is shown on


def audit(
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of each site for the run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Its delta.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, KEY=VALUE; may be repeated.")
    ] = None,
    dim: Annotated[int, typer.Option(min=2, help="Width of the made-up embeddings.")] = 256,
    classes: Annotated[int, typer.Option(min=3, help="Number of classes.")] = 11,
    draws: Annotated[int, typer.Option(min=100, help="Draws of each world of the two-world audit.")] = 5000,
    canaries: Annotated[int, typer.Option(min=10, help="Canaries of the one-run audit.")] = 1000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.99999, help="Of each bound.")] = 0.999,
    two_world: Annotated[bool, typer.Option(help="The two-world audit of one step.")] = True,
    one_run: Annotated[bool, typer.Option(help="The one-run audit of the whole run.")] = True,
    inversion: Annotated[bool, typer.Option(help="The picture of a gradient inversion.")] = True,
    cache: Annotated[
        Path, typer.Option(envvar="FEDHYPEVAE_CACHE", help="Cache of the demonstration's embeddings.")
    ] = Path("outputs/cache"),
    output: Annotated[Path, typer.Option(help="Folder for audit.json and inversion.png.")] = Path("outputs/audit"),
) -> None:
    """Lower bounds of epsilon beside the claim, with what they could have seen; no site's records are read.

    Exit code 1 if a bound is above the claim: the code does not keep its promise.

    Example: fedhypevae audit --epsilon 2 --rounds 20 --set sampling-rate=0.5
    """
    from common.durable import write_output
    from common.errors import FedHypeVAEError
    from common.methods import get_method
    from deploy.settings import run_config

    config = run_config(setting, epsilon=epsilon, delta=delta, num_rounds=rounds)
    attacked = "what one site sends"
    if config.privacy.trust == "secagg":
        # what the server sees: the same steps at one site, with the whole noise that the honest sites add together
        attacked = SUM_IS_ATTACKED
        say(attacked)
    config = config.replace(trust="local", num_sites=1, min_sites=1, robust_statistics="off")
    results = _audits(config, dim, classes, draws if two_world else 0, canaries if one_run else 0, confidence)
    trains = get_method(config.method).plan(config).training_noise is not None
    for result in results:
        say(_line(result, trains))
    facts: dict[str, Any] = {
        "records": "made up",
        "attacked": attacked,
        "config": config.to_flat(),
        "audits": [{**asdict(result), "passed": result.passed} for result in results],
    }
    if inversion:
        facts["inversion"] = _inversion(config, cache, output)
        say(facts["inversion"]["in_words"])
    write_output(output / "audit.json", (json.dumps(facts, indent=2) + "\n").encode())
    say(f"written: {output / 'audit.json'}")
    say("a bound below the claim proves nothing by itself: the power says what would have gone unseen")
    failed = [result.kind for result in results if not result.passed]
    if failed:
        raise FedHypeVAEError(f"the {' and '.join(failed)} audit contradicts the claim: do not release anything")


def _audits(
    config: RunConfig, dim: int, classes: int, draws: int, canaries: int, confidence: float
) -> list[AuditResult]:
    from common.assurance.audit_run import AuditSize, audit_run

    with watching() as watch:
        return audit_run(config, dim, classes, AuditSize(draws, canaries), confidence, watch)


def _line(result: AuditResult, trains: bool) -> str:
    verdict = "stands" if result.passed else "IS CONTRADICTED"
    of_what = "the whole run" if result.kind == "one-run" else "one step" if trains else "the statistics, once"
    return (
        f"{result.kind:10} ({of_what}): epsilon is at least {result.epsilon_bound:.3f} at {result.confidence:.1%} "
        f"confidence; claimed {result.epsilon_claimed:.3f} at delta {result.delta:g}: the claim {verdict}\n"
        f"{'':10} power: {result.power}"
    )


def _inversion(config: RunConfig, cache: Path, output: Path) -> dict[str, Any]:
    """Attack one upload of one public image, without and with the run's noise, and draw what is found."""
    import numpy as np
    import torch

    from common.assurance.inversion import invert_batch_of_one
    from common.methods import get_method
    from common.privacy.noise import SecureNoise
    from embeddings.simulation.simulated import DEMO_CLASSES, DEMO_FILE, load_pool, pool_path

    noise = get_method(config.method).plan(config).training_noise
    if config.method != "fedhypevae" or noise is None:
        return {"in_words": f"inversion: built for fedhypevae with training, not for {config.method}: left out"}
    if pool_path(cache).is_file() and DEMO_FILE.is_file():
        pool = load_pool(cache)
        embeddings, labels = torch.from_numpy(pool.embeddings), pool.labels
    else:
        embeddings = torch.randn(64, 1280, generator=torch.Generator().manual_seed(0))
        labels = np.arange(64) % len(DEMO_CLASSES)
        pool = None
    record, label = embeddings[_ATTACKED], int(labels[_ATTACKED])
    found = {
        name: invert_batch_of_one(config, record, label, len(DEMO_CLASSES), sigma, SecureNoise())
        for name, sigma in (("unprotected", 0.0), ("protected", noise))
    }
    similar = torch.nn.functional.normalize(embeddings, dim=1)
    nearest = {name: int((similar @ one.embedding).argmax()) for name, one in found.items()}
    words = (
        f"inversion of one upload of one record: cosine {found['unprotected'].cosine:.3f} without noise, "
        f"{found['protected'].cosine:.3f} with this run's noise (sigma {noise:g})"
    )
    facts: dict[str, Any] = {
        "cosine_unprotected": found["unprotected"].cosine,
        "cosine_protected": found["protected"].cosine,
        "noise_multiplier": noise,
        "record": "a public image of the demonstration" if pool is not None else "made up",
        "found_again_unprotected": nearest["unprotected"] == _ATTACKED,
        "found_again_protected": nearest["protected"] == _ATTACKED,
    }
    if pool is None:
        return {**facts, "in_words": f"{words}; for the picture, run `fedhypevae demo` once or name --cache"}
    with np.load(DEMO_FILE) as demo:
        images = demo["images"]
        titles = {
            "the record": (_ATTACKED, DEMO_CLASSES[label]),
            "found without protection": (nearest["unprotected"], f"cosine {found['unprotected'].cosine:.2f}"),
            "found with protection": (nearest["protected"], f"cosine {found['protected'].cosine:.2f}"),
        }
        _draw({f"{title}\n{note}": images[row] for title, (row, note) in titles.items()}, output / "inversion.png")
    return {**facts, "picture": "inversion.png", "in_words": f"{words}; picture: {output / 'inversion.png'}"}


def _draw(pictures: dict[str, Any], path: Path) -> None:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from common.durable import write_output

    figure, axes = pyplot.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 3.6))
    for axis, (title, image) in zip(axes, pictures.items(), strict=True):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.suptitle("Nearest public image to what an attacker reconstructs", fontsize=11)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    write_output(path, sink.getvalue())
