"""The file of a published generator: its tensors, and in the metadata all that is needed to draw its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from common.assurance.statement import why_not_private
from common.durable import write_output
from common.generator.row_sets import ROWS_FORMAT
from common.methods.base import Artifact, RunContext
from common.wire.allow_list import dump_context
from common.wire.identity import EncoderIdentity

GENERATOR = "generator.safetensors"
FORCED = "not_private_because"  # of the metadata: why a bundle was released against its gate
ROWS = "rows"  # of the metadata: how its rows are drawn


def write_generator(
    path: Path,
    context: RunContext,
    artifact: Artifact,
    encoder: EncoderIdentity | None,
    forced: Sequence[str] = (),
) -> None:
    """Save the published parameters as safetensors, with all that is needed to draw its rows in the metadata.

    Args:
        path: the new file.
        context: the run's; settings and seed are in it.
        artifact: kind, tensors and settings.
        encoder: the encoder of the embeddings; None where each site has its own.
        forced: why the generator is published against the release's gate.
    """
    write_output(
        path,
        save(
            {name: value.contiguous() for name, value in artifact.tensors.items()},
            generator_metadata(context, artifact, encoder, forced),
        ),
    )


def generator_metadata(
    context: RunContext, artifact: Artifact, encoder: EncoderIdentity | None, forced: Sequence[str]
) -> dict[str, str]:
    """All that belongs to a generator beside its tensors; see `write_generator`."""
    return {
        "kind": artifact.kind,
        "method": context.config.method,
        "context": dump_context(context),
        "settings": json.dumps(dict(artifact.settings)),
        # the settings alone do not tell: a method may have no privacy whatever they say
        "private": json.dumps(not why_not_private(context) and not forced),
        FORCED: json.dumps(list(forced)),
        ROWS: ROWS_FORMAT,
        "encoder": json.dumps(None if encoder is None else encoder.to_json()),
    }
