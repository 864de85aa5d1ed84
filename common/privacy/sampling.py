"""Poisson sampling of privacy units: the one sampler, used in every step of every method.

Each unit is drawn by itself with the public rate q. An empty batch is a batch: it is noised, released and charged.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.devices import sent_to
from common.privacy.noise import NoiseSource
from common.records import SiteData, UnitBatch


def draw_units(data: SiteData, sampling_rate: float, records_per_unit: int, source: NoiseSource) -> UnitBatch:
    """Draw units independently with probability `sampling_rate`; of each, at most `records_per_unit` records.

    Args:
        data: the site's records.
        sampling_rate: q in (0, 1]; at 1 every unit is in.
        records_per_unit: R, the public cap; a larger unit's records are drawn at random within it.
        source: where the secret choice comes from; the run's seed never decides it.

    Returns:
        The batch; U may be 0.
    """
    device = data.embeddings.device
    if data.groups is None:
        count = data.embeddings.shape[0]
        chosen = _chosen(count, sampling_rate, source)
        taken = slice(None) if chosen is None else sent_to(device, chosen)
        embeddings, labels = data.embeddings[taken], data.labels[taken]
        return UnitBatch(embeddings[:, None], labels[:, None], embeddings.new_ones(len(labels), 1), data.label_set)
    members = _members(data.groups)
    chosen = _chosen(len(members), sampling_rate, source)
    units = range(len(members)) if chosen is None else chosen.tolist()
    rows = torch.full((len(units), records_per_unit), -1, dtype=torch.long, device="cpu")
    for position, unit in enumerate(units):
        records = members[unit]
        if len(records) > records_per_unit:
            records = records[np.argsort(source.uniform(len(records)))[:records_per_unit]]
        rows[position, : len(records)] = torch.from_numpy(records)
    # Padding is written, not read and then multiplied by zero: what it would read is a record of another unit, and zero
    # times what is not finite is not zero.
    real = rows >= 0
    taken, places = sent_to(device, rows[real]), sent_to(device, real.flatten().nonzero()[:, 0])
    embeddings = data.embeddings.new_zeros(*rows.shape, data.embeddings.shape[-1])
    padding = 0 if data.labels.ndim == 1 else -1
    labels = data.labels.new_full((*rows.shape, *data.labels.shape[1:]), padding)
    embeddings.flatten(0, 1)[places], labels.flatten(0, 1)[places] = data.embeddings[taken], data.labels[taken]
    return UnitBatch(embeddings, labels, sent_to(device, real.to(embeddings.dtype)), data.label_set)


def _chosen(count: int, sampling_rate: float, source: NoiseSource) -> Tensor | None:
    """Indices of the units drawn; None means all."""
    if sampling_rate >= 1.0:
        return None
    return torch.from_numpy(np.flatnonzero(source.uniform(count) < sampling_rate))


def _members(groups: Tensor) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Records of each unit, in a stable order."""
    values = groups.numpy()
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    return list(np.split(order, edges)) if len(order) else []
