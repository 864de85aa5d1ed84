"""What statistics an honest site can release: parts that contradict each other, or the noise, are refused.

Before the noise, a site's counts, sums and moments are of the same records, each of norm at most R. So the sum of a
class is no longer than R times its count, the class sums add up to the total, and no count is below zero; of findings
the sums need not add up, and no count is larger than that of the records. The noise is
known in distribution; an honest release falls outside of these bounds less than once in 10^9 releases.

What they leave open: a site may invent records. It may claim as many as the run lets one site have, and place them
anywhere within the ball of radius R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.linalg import vector_norm

from common.config.run import RunConfig
from common.errors import WireError
from common.privacy.statistics import StatisticsSpec, part_weights

# Standard deviations that noise is given: beyond 7, a normal falls once in 10^12 draws.
_DEVIATIONS = 7.0
# Records at one site, where nobody said how many there are in all.
_MOST_RECORDS = 1e7
_ROOM = 2.0  # over the public number of units in all
_FLOAT32 = 1e-5


@dataclass(frozen=True)
class StatisticsBounds:
    """Bounds of one release, or of a sum of several.

    Attributes:
        spec: what is released.
        noise_std: standard deviation of the noise in one coordinate, by part.
        most_records: how many there can be.
    """

    spec: StatisticsSpec
    noise_std: Mapping[str, float]
    most_records: float

    @classmethod
    def of(
        cls, config: RunConfig, spec: StatisticsSpec, noise_multiplier: float, *, sites: int = 1
    ) -> StatisticsBounds:
        """The bounds of a run's statistics.

        Args:
            config: its public number of units, where it is set, bounds the records of one site.
            spec: what is released.
            noise_multiplier: σ of one site's release, over `spec.sensitivity`.
            sites: how many sites' releases are added up.
        """
        weights, units = part_weights(spec), config.federation.public_total
        scale = noise_multiplier * spec.sensitivity * math.sqrt(sites)
        most = sites * (_ROOM * units if units > 0 else _MOST_RECORDS) * config.privacy.records_per_unit
        return cls(spec, {name: scale / weights[name] for name in spec.shapes}, most)

    def check(self, released: Mapping[str, Tensor]) -> None:
        """Refuse statistics that no records within the ball have, with this noise.

        Args:
            released: finite tensors by name, as in `spec.shapes`.

        Raises:
            WireError: names the part and what it contradicts.
        """
        parts = {name: value.double() for name, value in released.items()}
        counts, margin = parts["class_counts"], _DEVIATIONS * self.noise_std["class_counts"]
        of_records = "records" if "records" in parts else "class_counts"
        records = parts[of_records]
        room = math.sqrt(len(records)) * _DEVIATIONS * self.noise_std[of_records]
        for name in ("class_counts", "records", "unknown_counts", "pair_counts"):
            # a set of one finding has no pairs
            if name in parts and bool((parts[name] < -_DEVIATIONS * self.noise_std[name]).any()):
                raise WireError(f"sent {name} below zero by more than the noise allows")
        if float(records.sum()) > self.most_records + room:
            raise WireError(f"sent {of_records} of more than the {self.most_records:.3g} records that a site can have")
        most = counts.clamp(min=0.0) + margin
        everything = float(records.sum().clamp(min=0.0)) + room
        for name in ("class_counts", "unknown_counts", "pair_counts"):
            if name in parts and self.spec.max_positives > 0:
                self._no_more(name, parts[name], everything)
        radius = self.spec.radius
        for name, longest in (("class_sums", radius), ("class_features", 1.0)):
            if name in parts:
                self._within(name, parts[name], [longest * float(count) for count in most], "the class's count")
        for name, longest in (("total_sum", radius), ("second_moment", radius**2)):
            if name in parts:
                self._within(name, parts[name][None], [longest * everything], "the number of records")
        if "class_sums" in parts and "total_sum" in parts and self.spec.max_positives == 0:
            self._same_total(parts["class_sums"], parts["total_sum"])

    def _no_more(self, name: str, counts: Tensor, records: float) -> None:
        """None of these counts is larger than that of all records."""
        if bool((counts > records * (1.0 + _FLOAT32) + _DEVIATIONS * self.noise_std[name]).any()):
            raise WireError(f"sent {name} of more records than there are")

    def _within(self, name: str, rows: Tensor, longest: list[float], what: str) -> None:
        """Each row of a part is no longer than it can be without noise, and the noise."""
        noise = self.noise_std[name] * (math.sqrt(rows.shape[1]) + _DEVIATIONS)
        for norm, without in zip(vector_norm(rows, dim=1).tolist(), longest, strict=True):
            if not norm <= without * (1.0 + _FLOAT32) + noise:
                raise WireError(f"sent {name} longer than {what} and the noise allow")

    def _same_total(self, sums: Tensor, total: Tensor) -> None:
        """The class sums add up to the total, but for the noise and float32."""
        classes, size = sums.shape
        spread = math.sqrt(self.noise_std["total_sum"] ** 2 + classes * self.noise_std["class_sums"] ** 2)
        exact = _FLOAT32 * math.sqrt(classes) * float(vector_norm(sums))
        if not float(vector_norm(sums.sum(0) - total)) <= spread * (math.sqrt(size) + _DEVIATIONS) + exact:
            raise WireError("sent class_sums that do not add up to total_sum")
