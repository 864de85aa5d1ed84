"""What a run of findings needs beside one of classes: its statistics' caps, and the law of its label vectors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.generator.finding_rows import OFFSETS, score_offsets, with_offsets
from common.generator.label_tree import LabelTree, fit_tree
from common.generator.row_law import RowLaw
from common.methods.base import RunContext, Tensors
from common.privacy.combined import ReleasedStatistics
from common.privacy.statistics import StatisticsSpec


def check_classes(config: RunConfig) -> None:
    """Refuse a run of findings by a method that knows classes alone (ConfigError)."""
    if config.federation.task != "multiclass":
        raise ConfigError(
            f"method {config.method} needs one class a record: for task {config.federation.task} take fedhypevae, "
            "dp_fedsgd, dp_gauss, dp_cvae, fedavg, fedprox, fedlambda, mh_pfedhn or mh_pfedhn_gd"
        )


def for_task(context: RunContext, spec: StatisticsSpec) -> StatisticsSpec:
    """The release as the run's task has it: of findings with its public caps and sets."""
    if not context.problem.findings:
        return spec
    present, unknown = context.finding_caps
    return replace(spec, max_positives=present, max_unknowns=unknown, label_sets=context.problem.label_sets)


def label_tensors(context: RunContext, statistics: ReleasedStatistics | None) -> dict[str, Tensor]:
    """The tree of findings to be published, from the released statistics; nothing where records have classes."""
    return fit_tree(statistics, context.problem.num_classes).tensors if context.problem.findings else {}


def with_label_offsets(law: RowLaw, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors, and what brings findings to their prevalence in rows of this law."""
    tree = LabelTree.of(tensors)
    return dict(tensors) if tree is None else {**tensors, OFFSETS: score_offsets(law, tree)}


def labelled(law: RowLaw, tensors: Tensors) -> RowLaw:
    """The law as a run publishes it: with the offsets of findings that are among its tensors."""
    return with_offsets(law, tensors[OFFSETS]) if OFFSETS in tensors else law
