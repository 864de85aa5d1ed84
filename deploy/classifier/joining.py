"""A site that joins a finished run: what it fits to its own records, and writes into its own folder.

All of it reads the records without noise. That costs nothing as long as it stays at the site.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError
from common.evaluation.clinical import as_findings
from common.evaluation.heads import LinearHead
from common.evaluation.nonlinear_heads import MLPHead
from common.evaluation.scores import Split
from common.methods import get_method
from common.methods.constants import CENTRE
from common.methods.features import feature_scale
from common.methods.fedhypevae.joining import fit_code, sample_personal
from common.methods.mh_pfedhn.architectures import Architecture
from common.methods.mh_pfedhn.personal import join
from common.publishing.bundle import Bundle
from common.publishing.parquet import Written, write_rows
from common.records import SiteData
from deploy.classifier.file import TrainedHead

STAYS = "fitted to one site's own records without noise: it stays at that site"
_BLOCK = 65_536


def personal_set(bundle: Bundle, own: Split, rows: int, seed: int, out: Path) -> Written:
    """Fit a code to the site's records, and write a personalised synthetic set.

    Args:
        bundle: a run of fedhypevae with codes.
        own: the site's training embeddings (n, d), scaled as the run's, and labels (n,).
        rows: how many rows, classes in equal shares.
        seed: of the draws.
        out: the new parquet file.

    Returns:
        What was written. Code and rows depend on the records without noise, and the file says so.

    Raises:
        ConfigError: another method, or a generator without a code. DataError: no records.
    """
    if bundle.config.method != "fedhypevae":
        raise ConfigError(f"a personalised set needs a run of fedhypevae, found one of {bundle.config.method}")
    code = fit_code(bundle.context, bundle.artifact, SiteData(*own))
    labels = torch.arange(rows) % len(bundle.class_names)
    blocks = (
        sample_personal(bundle.context, bundle.artifact, code, part, seed + at)
        for at, part in enumerate(torch.split(labels, _BLOCK))
    )
    notes = bundle.notes([STAYS, *bundle.not_private], {"rows": rows, "code": "personal", "seed": seed})
    return write_rows(out, blocks, dim=bundle.dim, class_names=bundle.class_names, notes=notes)


def personal_model(bundle: Bundle, own: Split, model: str) -> TrainedHead:
    """The model that a hypernetwork of MH-pFedHN makes for a site that fits nothing but its own embeddings.

    Args:
        bundle: a run of mh_pfedhn or mh_pfedhn_gd, or of its private form.
        own: as `personal_set`.
        model: `linear`, or `mlp-WIDTH`; the run must have had models with as many chunks.

    Returns:
        A classifier for `fedhypevae predict`.

    Raises:
        ConfigError: another method, or a model that the hypernetwork has no head for.
    """
    if get_method(bundle.config.method).personal_scores is None:
        raise ConfigError(f"a personal model needs a run of mh_pfedhn, found one of {bundle.config.method}")
    hidden = bundle.config.replace(architectures=model).rivals.hidden_widths_of
    if len(hidden) != 1 or len(hidden[0]) > 1:
        raise ConfigError(f"a joining site's model must be linear or mlp-WIDTH, found {model!r}")
    problem, labels = bundle.context.problem, own[1]
    if problem.findings:
        labels = as_findings(labels, len(bundle.class_names), problem.task)
    architecture = Architecture(bundle.dim, hidden[0], problem.num_classes)
    _, theta = join(bundle.context, bundle.artifact, SiteData(own[0], labels), architecture)
    shared = problem.site_dims == ()
    centre = bundle.artifact.tensors[CENTRE] if shared else torch.zeros(bundle.dim)
    head = _as_head(
        architecture.unpack(theta), centre, feature_scale(bundle.context, bundle.dim), findings=problem.findings
    )
    return TrainedHead(
        head,
        bundle.class_names,
        bundle.encoder,
        bundle.config.operation.run_name,
        own_rows=len(own[1]),
        not_private=(STAYS, *bundle.not_private),
        task=problem.task,
    )


def _as_head(params: list[Tensor], centre: Tensor, scale: float, *, findings: bool) -> LinearHead | MLPHead:
    """The head that acts on embeddings as they are, from parameters that act on (embedding - centre) x scale."""
    if len(params) == 2:
        weight = params[0] * scale
        return LinearHead(weight, params[1] - weight @ centre, findings)
    hidden_weight, hidden_bias, weight, bias = params
    return MLPHead(centre, 1.0 / scale, hidden_weight, hidden_bias, weight, bias, findings)
