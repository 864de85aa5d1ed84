"""`fedhypevae predict`: the class of one image, by a trained classifier and the encoder that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, say, working


def predict(
    head: Annotated[Path, typer.Argument(help="A classifier of `fedhypevae train`.")],
    image: Annotated[Path, typer.Argument(help="A picture or a DICOM file.")],
    encoder: Annotated[str | None, typer.Option(help="Load the encoder from this name or folder instead.")] = None,
    frame: Annotated[int, typer.Option(min=0, help="Frame of a multi-frame DICOM file.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    model_cache: Annotated[Path | None, typer.Option(help="Where downloaded models lie.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Embed one image with the classifier's encoder, print the probability of each class or finding. No medical device.

    Example: fedhypevae predict head.safetensors scan.png
    """
    import json

    import torch
    from rich.table import Table

    from common.errors import DataError
    from common.evaluation.clinical import grade_probabilities
    from common.names import WORDS
    from deploy.classifier.file import load_head
    from deploy.classifier.predict import encoder_of, read_any
    from embeddings.encoders.base import EncoderOptions

    trained = load_head(head)
    if trained.encoder is None:
        raise DataError(f"{head} names no encoder: train it from a bundle whose generator names one")
    pixels = read_any(image, trained.encoder, frame)
    with working(f"Embedding with {trained.encoder.encoder} ..."):
        options = EncoderOptions(device=device, offline=offline, cache_dir=model_cache, batch_size=1)
        vector = encoder_of(trained.encoder, encoder, options).embed([pixels])
    found = trained.probabilities(torch.from_numpy(vector))
    chances = (grade_probabilities(found) if trained.task == "ordinal" else found)[0].tolist()
    ranked = sorted(zip(trained.class_names, chances, strict=True), key=lambda pair: -pair[1])
    if as_json:
        say(json.dumps({name: round(chance, 6) for name, chance in ranked}, indent=2))
        return
    table = Table(WORDS[trained.task], "probability", "", box=None)
    table.columns[1].justify = "right"
    for name, chance in ranked:
        table.add_row(name, f"{100 * chance:.1f} %", "█" * round(30 * chance))
    console().print(table)
