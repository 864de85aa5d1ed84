"""What a method is: pure functions over frozen state, the same under Flower and in a plain loop.

A method never talks to a network, a disk or a clock. It draws noise from the source that it is handed, and declares
in advance, in `plan`, every privacy event that its sites will be charged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.generator.row_law import RowLaw
from common.names import Task
from common.privacy.combined import ReleasedStatistics
from common.privacy.events import PrivacyEvent, gaussian, sampled_gaussian
from common.privacy.noise import NoiseSource
from common.privacy.statistics import StatisticsSpec
from common.records import SiteData

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Problem:
    """The public facts of a federation: width of an embedding, names of the classes, number of sites, what labels mean.

    `site_dims` gives each site's own width where the sites' encoders differ; empty where all have `dim`.
    `label_sets` are the different sets of findings, by number in `class_names`, that sites label; empty where all label
    all. Which ones a site labels is public.
    """

    dim: int
    class_names: tuple[str, ...]
    num_sites: int
    site_dims: tuple[int, ...] = ()
    task: Task = "multiclass"
    label_sets: tuple[tuple[int, ...], ...] = ()

    def label_set_of(self, own: Sequence[str]) -> int:
        """Which set of findings a site labels, by the names of its own; -1 for one that no site had at the start."""
        mine = tuple(place for place, name in enumerate(self.class_names) if name in set(own))
        sets = self.label_sets or (tuple(range(len(self.class_names))),)
        return sets.index(mine) if mine in sets else -1

    @property
    def findings(self) -> bool:
        """Whether a record has several yes/no findings, int8 (n, K), and not one class, int64 (n,)."""
        return self.task != "multiclass"

    @property
    def num_classes(self) -> int:
        """K: classes or findings. Of K + 1 grades there are K findings, "this grade or a higher one"."""
        return len(self.class_names) - (self.task == "ordinal")

    def dim_of(self, site_index: int) -> int:
        """Width of the embeddings at a site."""
        return self.site_dims[site_index] if self.site_dims else self.dim


@dataclass(frozen=True)
class PrivacyPlan:
    """Noise of a run, fixed before it starts.

    Attributes:
        statistics_noise: noise multiplier of the one-shot statistics; None without them; 0 without a guarantee.
        training_noise: noise multiplier of every local step; None if nothing is trained.
        sampling_rate: q. steps_per_round, num_rounds: what is asked for.
        delta: δ at which ε is stated.
        spare_rounds: rounds that are paid for on top, for those that a crash interrupts; T counts them.
    """

    statistics_noise: float | None
    training_noise: float | None
    sampling_rate: float
    steps_per_round: int
    num_rounds: int
    delta: float
    spare_rounds: int = 0

    @property
    def statistics_events(self) -> tuple[PrivacyEvent, ...]:
        """What the statistics cost a site."""
        if self.statistics_noise is None:
            return ()
        return (gaussian(self.statistics_noise, label="statistics"),)

    @property
    def round_events(self) -> tuple[PrivacyEvent, ...]:
        """What one round of training costs a site."""
        if self.training_noise is None:
            return ()
        steps = self.steps_per_round
        return (sampled_gaussian(self.training_noise, self.sampling_rate, count=steps, label="training"),)

    @property
    def all_events(self) -> tuple[PrivacyEvent, ...]:
        """Everything that a site releases in the whole run."""
        number = self.num_rounds + self.spare_rounds
        rounds = tuple(replace(event, count=event.count * number) for event in self.round_events)
        return self.statistics_events + (rounds if self.num_rounds else ())


@dataclass(frozen=True)
class RunContext:
    """What every function of a method may know: all of it public, all of it fixed before the run."""

    config: RunConfig
    problem: Problem
    plan: PrivacyPlan

    @property
    def finding_caps(self) -> tuple[int, int]:
        """How many findings of a record may be present, and unknown, before the statistics scale the record down.

        Of grades all that are at most the record's own are present, and none is unknown.
        """
        if self.problem.task == "ordinal":
            return self.problem.num_classes, 0
        return self.config.privacy.max_positives, self.config.privacy.max_unknowns


@dataclass(frozen=True)
class ServerState:
    """The server's state between rounds; everything in it is released or public.

    Attributes:
        round: rounds done.
        params: what the sites receive, by name.
        memory: optimiser state and running averages, by name; stays at the server.
        statistics: the noised statistics, once they are there.
    """

    round: int
    params: Tensors
    memory: Tensors = field(default_factory=dict)
    statistics: ReleasedStatistics | None = None


@dataclass(frozen=True)
class SiteState:
    """What stays at a site between rounds: private state, never sent."""

    tensors: Tensors


@dataclass(frozen=True)
class StepInput:
    """One round's work for one site.

    Attributes:
        params: what the server sent.
        site: the site's private state.
        data: the records that training may read.
        round_index: 0, 1, ...
        site_index: stable index of the site in the run.
        source: secret randomness: noise and sampling.
        noised_later: whether what is sent gets its noise afterwards, a share of it (`secagg.quantise`), and must leave
            the step without; what stays at the site gets its whole noise all the same.
    """

    params: Tensors
    site: SiteState
    data: SiteData
    round_index: int
    site_index: int
    source: NoiseSource
    noised_later: bool = False


@dataclass(frozen=True)
class Artifact:
    """What a run publishes.

    Attributes:
        kind: "generator" (samples can be drawn) or "head" (a linear classifier).
        tensors: its parameters.
        settings: public numbers and words needed to use it again, JSON-ready.
    """

    kind: str
    tensors: Tensors
    settings: Mapping[str, str | int | float | bool]


def nothing_stays(context: RunContext, site_index: int) -> SiteState:
    """Nothing stays at a site."""
    return SiteState({})


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: as in `method = "..."`.
        private: whether what leaves a site is clipped, noised and charged.
        plan: (config) -> noise and events; expensive, done once a run.
        statistics: (context) -> what the sites release before training, or None.
        init: (context) -> server's first state.
        init_site: (context, site_index) -> a site's first private state; reads no data.
        prepare: (context, state, statistics) -> state with the statistics taken in.
        upload_shapes: (context) -> names and shapes of what a site sends in a round.
        client_step: (context, work) -> (new private state, what is sent).
        server_step: (context, state, uploads by site index) -> next state.
        finish: (context, state) -> what is published.
        law: (context, artifact) -> what synthetic rows are drawn from; None for heads.
        broadcast: (context, state, site_index) -> what that site receives; None: every site receives `state.params`.
        site_upload_shapes: (context, site_index) -> as `upload_shapes`, where sites send different shapes; else None.
        personal_scores: (context, what the site received, embeddings (n, d), site_index) -> class scores (n, K) of the
            site's own model; None for methods without.
        uploads_sums: whether what a site sends is a sum of clipped gradients, and not parameters or their change.
        upload_weights: (context, state) -> by what each site's upload is multiplied before it is added up: tensors of
            (num_sites, ...) by name, each site's part broadcast over the upload; for methods that upload sums. None: 1.
        shares_noise: whether sites may share the noise under secure aggregation: only their sum matters, and nothing at
            a site depends on what it sends.
        receives: (context, site_index) -> names and shapes of what that site receives in a round; None: those of
            `init`.
        check: (config) -> ConfigError for settings that a round of the method would not carry out as its events say;
            the server's plan and every site ask for it. None: it carries out all.
    """

    name: str
    private: bool
    plan: Callable[[RunConfig], PrivacyPlan]
    statistics: Callable[[RunContext], StatisticsSpec | None]
    init: Callable[[RunContext], ServerState]
    prepare: Callable[[RunContext, ServerState, ReleasedStatistics], ServerState]
    upload_shapes: Callable[[RunContext], Shapes]
    client_step: Callable[[RunContext, StepInput], tuple[SiteState, dict[str, Tensor]]]
    server_step: Callable[[RunContext, ServerState, Mapping[int, Tensors]], ServerState]
    finish: Callable[[RunContext, ServerState], Artifact]
    init_site: Callable[[RunContext, int], SiteState] = nothing_stays
    law: Callable[[RunContext, Artifact], RowLaw] | None = None
    broadcast: Callable[[RunContext, ServerState, int], Tensors] | None = None
    site_upload_shapes: Callable[[RunContext, int], Shapes] | None = None
    personal_scores: Callable[[RunContext, Tensors, Tensor, int], Tensor] | None = None
    uploads_sums: bool = True
    upload_weights: Callable[[RunContext, ServerState], Mapping[str, Tensor]] | None = None
    shares_noise: bool = False
    receives: Callable[[RunContext, int], Shapes] | None = None
    check: Callable[[RunConfig], None] | None = None

    @property
    def makes_site_models(self) -> bool:
        """Whether each site gets a model of its own, which may read embeddings of its own width."""
        return self.personal_scores is not None

    def params_for(self, context: RunContext, state: ServerState, site_index: int) -> Tensors:
        """What a site receives at the start of a round."""
        return state.params if self.broadcast is None else self.broadcast(context, state, site_index)

    def received_by(self, context: RunContext, site_index: int) -> Shapes:
        """Names and shapes of what a site receives at the start of a round; from public facts alone."""
        if self.receives is not None:
            return self.receives(context, site_index)
        return {name: tuple(value.shape) for name, value in self.init(context).params.items()}

    def takes_newcomers(self, trust: str) -> bool:
        """Whether a site that was not there at the start may join: noise and parts of the model are not shared out."""
        return trust == "local" and self.broadcast is None and self.site_upload_shapes is None

    def shapes_from(self, context: RunContext, site_index: int) -> Shapes:
        """Names and shapes of what a site sends in a round."""
        if self.site_upload_shapes is None:
            return self.upload_shapes(context)
        return self.site_upload_shapes(context, site_index)


def seeded(*parts: object) -> torch.Generator:
    """A generator for draws that touch no data and protect nothing: the same parts give the same stream."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
