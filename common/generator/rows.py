"""The law of rows of a trained generator (Eqs. 12-13). All of it is post-processing.

Samples may be drawn without limit: they are functions of released values, so drawing more costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.heads import LinearHead
from common.findings import label_vectors
from common.generator.hypernetwork import Generated, GeneratorShape, decode, generate, prior_of, score_head
from common.generator.layers import Tensors
from common.generator.meta_code import MetaCodes, mixture_means
from common.generator.row_law import Middle, RowLaw
from common.names import Task

_CODE, _WAY, _BARE, _WIDE = range(4)
_NUM_UNIFORMS = 4  # of a try, by the names above
# Of the rows a prototype each, and of these one in fourteen spread as the latent spreads: measured, 10 to 23 points for
# a head that compares distances, and none lost for a linear one.
PROTOTYPE_SHARE, PROTOTYPE_SPREAD = 0.02, 0.07


@dataclass(frozen=True)
class RowSettings:
    """How rows are drawn from a generator.

    Attributes:
        printed: as Eqs. 12-13 print: one generator of averaged parameters, z from N(0, I). Else each row has a code of
            its own, and z is drawn from the generated prior, as Eq. 11 means.
        unit_rows: whether embeddings have unit length and so should rows: the noise then has what a row's mean leaves
            of it, in expectation. Else it has the decoder's variance.
        prototype_share: that share of the rows is the prototype of the wanted class itself, without noise.
        prototype_spread: that share of the prototypes is drawn around itself as the latent spreads its class.
    """

    printed: bool = False
    unit_rows: bool = False
    prototype_share: float = 0.0
    prototype_spread: float = 0.0


def generator_law(
    shape: GeneratorShape,
    params: Tensors,
    meta: MetaCodes,
    settings: RowSettings,
    *,
    centre: Tensor,
    placement: Tensor | None = None,
    prototypes: Tensor | None = None,
    task: Task = "multiclass",
) -> RowLaw:
    """The law of a generator's rows (Eqs. 12-13).

    Args:
        shape: public sizes.
        params: Φ.
        meta: codes and weights.
        settings: how rows are drawn.
        centre: (d_x,), which the generator's values lie around.
        placement: (K, d_x) shifts of the wanted classes, from `place_classes`, or None. Each row is moved a part of the
            way, uniform on [0, 1].
        prototypes: (K, d_x), from `class_prototypes`, or None.
        task: what the labels of rows are.

    Returns:
        The law of rows as an encoder would give them: the centre is added.
    """
    exact = {name: value.double() for name, value in params.items()}
    codes = MetaCodes(meta.codes.double(), meta.weights.double())
    parts = [generate(shape, exact, code) for code in codes.codes]
    if settings.printed:
        from common.generator.printed_rows import as_printed

        parts = [as_printed(parts, codes.weights)]
    origin = centre.double()
    shown = prototypes if settings.prototype_share > 0 else None
    spreads = shown is not None and settings.prototype_spread > 0 and shape.model.latent_dim > 0
    law = _GeneratorRows(
        shape,
        settings,
        parts,
        codes.weights,
        origin,
        None if placement is None else placement.double(),
        None if shown is None else shown.double(),
        mixture_means(shape, exact, codes) if spreads else None,
    )
    heads = [score_head(shape, part.layers) for part in parts]
    around = [LinearHead(weight, bias - weight @ origin) for weight, bias in heads]
    return RowLaw(shape.dim, _NUM_UNIFORMS, shape.model.latent_dim, law.middle, around, task=task)


@dataclass(frozen=True)
class _GeneratorRows:
    shape: GeneratorShape
    settings: RowSettings
    parts: Sequence[Generated]
    weights: Tensor
    centre: Tensor
    placement: Tensor | None
    prototypes: Tensor | None
    spread_around: Tensor | None

    def middle(self, labels: Tensor, uniforms: Tensor, normals: Tensor) -> Middle:
        """Rows without their noise: see `RowLaw`."""
        part = torch.zeros(len(labels), dtype=torch.int64)
        if len(self.parts) > 1:
            from common.generator.code_mixture import choose_codes

            part = choose_codes(self.weights, uniforms[:, _CODE])
        decoded = self._decoded(labels, part, normals)
        values = decoded
        if self.placement is not None:
            # any part of the way: rows lie between the classes too, where a head learns the boundaries
            values = values + uniforms[:, [_WAY]] * self.placement[labels]
        scale = self._noise_scale(values)
        if self.prototypes is not None:
            bare = uniforms[:, [_BARE]] < self.settings.prototype_share
            still = self.prototypes[labels]
            if self.spread_around is not None:
                wide = uniforms[:, [_WIDE]] < self.settings.prototype_spread
                still = still + wide * (decoded - self.spread_around[labels])
            values, scale = torch.where(bare, still, values), scale.masked_fill(bare, 0.0)
        return Middle(values + self.centre, scale, part)

    def _decoded(self, labels: Tensor, part: Tensor, normals: Tensor) -> Tensor:
        """What the decoder makes of latents, without noise: (n, d_x) around the centre."""
        one_hot = label_vectors(labels, self.shape.num_classes, torch.float64)
        decoded = torch.empty(len(labels), self.shape.dim, dtype=torch.float64)
        for index, generated in enumerate(self.parts):
            rows = torch.nonzero(part == index)[:, 0] if len(self.parts) > 1 else slice(None)
            mean, scale = prior_of(self.shape, generated, labels[rows], one_hot[rows])
            latent = mean + scale * normals[rows]
            # Eq. (12), the decoded row, with z of the prior that Eq. 11 is fitted with
            decoded[rows] = decode(self.shape, generated.layers, latent, one_hot[rows])
        return decoded

    def _noise_scale(self, values: Tensor) -> Tensor:
        """Standard deviation of the noise, (n, 1): the decoder's, or what brings rows to unit length."""
        if not self.settings.unit_rows:
            return values.new_full((len(values), 1), math.sqrt(self.shape.observation_variance))
        left = 1.0 - (values + self.centre).square().sum(1, keepdim=True)
        return (left.clamp(min=0.0) / self.shape.dim).sqrt()
