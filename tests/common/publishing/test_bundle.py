"""A bundle in a notebook: loaded, drawn from, and refused where it makes no sense."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.methods.published import draw_published
from common.privacy.combined import ReleasedStatistics
from common.publishing.bundle import Bundle, load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import write_rows
from common.wire.identity import EncoderIdentity

NAMES = ("liver", "lung", "spleen")
ENCODER = EncoderIdentity("made-up", "1", 6, "none", "0" * 64, "float32", NAMES)
MEANS = torch.eye(3, 6)


def make(folder: Path, method: str = "dp_gauss", **settings: str | float) -> Bundle:
    """The artifact of a run whose statistics came out as MEANS, counts 1:2:5, with little spread."""
    flat = {"residual-energy": 0.001, "num-rounds": 0, "epsilon": 5.0, "meta-steps": 0}
    flat |= {name.replace("_", "-"): value for name, value in settings.items()}
    config = RunConfig.from_flat({**flat, "method": method})
    chosen = get_method(method)
    context = RunContext(config, Problem(6, NAMES, 2), chosen.plan(config))
    counts = torch.tensor([10.0, 20.0, 50.0])
    released = ReleasedStatistics(80.0, torch.zeros(6), counts, MEANS, None, None, {"class_counts": 0.0})
    state = chosen.prepare(context, chosen.init(context), released)
    write_generator(folder / "generator.safetensors", context, chosen.finish(context, state), ENCODER)
    return load_bundle(folder)


def test_load_bundle_knows_its_run(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    assert bundle.class_names == NAMES
    assert bundle.dim == 6
    assert bundle.encoder == ENCODER
    assert bundle.not_private == ()
    assert bundle.statement is None
    assert bundle.config.method == "dp_gauss"
    assert load_bundle(tmp_path / "generator.safetensors").context == bundle.context


def test_load_bundle_says_why_a_run_is_not_private(tmp_path: Path) -> None:
    bundle = make(tmp_path, epsilon=math.inf)
    assert bundle.not_private == ("epsilon is infinite: no noise was drawn",)


def test_load_bundle_reads_a_generator_that_names_no_encoder(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "encoder"}
    save_file(load_file(path), path, metadata)
    assert load_bundle(tmp_path).encoder is None


@pytest.mark.parametrize("damage", ["missing", "text", "no metadata", "other context", "statement"])
def test_load_bundle_refuses_what_is_no_generator(tmp_path: Path, damage: str) -> None:
    make(tmp_path)
    path = tmp_path / "generator.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no tensors")
    elif damage == "no metadata":
        save_file(load_file(path), path)
    elif damage == "other context":
        save_file(load_file(path), path, {"kind": "generator", "context": "{}", "settings": "{}"})
    else:
        (tmp_path / "privacy_statement.json").write_text("[1]")
    with pytest.raises(DataError):
        load_bundle(tmp_path)


def test_sample_gives_the_classes_that_were_asked_for(tmp_path: Path) -> None:
    """Each row lies at its class' mean; uniform by default, by the noised counts or by shares where asked."""
    bundle = make(tmp_path)
    embeddings, labels = bundle.draw(900)
    assert torch.bincount(labels).tolist() == [300, 300, 300]
    assert float((embeddings - MEANS[labels]).abs().max()) < 0.1
    assert torch.bincount(bundle.draw(800, balance="dp-counts")[1]).tolist() == [100, 200, 500]
    assert torch.bincount(bundle.draw(40, balance="given", shares=[0, 1, 3])[1]).tolist() == [0, 10, 30]
    wanted = torch.tensor([2, 0, 0, 1, 2])
    assert torch.equal(bundle.draw(labels=wanted)[1], wanted)


def relabelling(folder: Path, **settings: str | float) -> Bundle:
    """A generator of classes that overlap, whose own posterior leans towards the first."""
    make(folder, "fedhypevae", num_rounds=1, code_dim=1, prototypes=False, **settings)
    path = folder / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["decoder.0.class_weight"] = MEANS.T.contiguous()
    tensors["class_bias.weight"] = torch.tensor([0.3, 0.0, -0.3])
    save_file(tensors, path, metadata)
    return load_bundle(folder)


def test_sample_of_rows_that_are_relabelled_keeps_the_balance(tmp_path: Path) -> None:
    """As drawn, the classes come out uneven; by default each has just the rows that were asked for."""
    bundle = relabelling(tmp_path)
    as_drawn = torch.bincount(bundle.draw(9000, as_drawn=True)[1], minlength=3)
    assert int(as_drawn.max()) > 1.5 * int(as_drawn.min())
    embeddings, labels = bundle.draw(9000)
    assert torch.bincount(labels).tolist() == [3000, 3000, 3000]
    assert torch.bincount(bundle.draw(800, balance="dp-counts")[1]).tolist() == [100, 200, 500]
    assert torch.bincount(bundle.draw(40, balance="given", shares=[0, 1, 3])[1], minlength=3).tolist() == [0, 10, 30]
    wanted = torch.tensor([2, 0, 0, 1, 2])
    assert torch.equal(bundle.draw(labels=wanted)[1], wanted)
    again = bundle.draw(9000, threads=3)
    assert torch.equal(again[0], embeddings)
    assert torch.equal(again[1], labels)


def test_published_set_has_the_classes_that_the_posterior_gives_and_repeats(tmp_path: Path) -> None:
    bundle = relabelling(tmp_path, synthetic_rows=900)
    drawn, again = (draw_published(bundle.context, bundle.artifact) for _ in range(2))
    assert drawn is not None
    assert again is not None
    assert torch.bincount(drawn[1], minlength=3).tolist() != [300, 300, 300]
    assert torch.equal(drawn[0], again[0])


def test_sample_repeats_with_its_seed_alone(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    one, two, three = (bundle.draw(5000, seed=seed, threads=threads)[0] for seed, threads in ((1, 1), (1, 3), (2, 1)))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_sample_of_one_code_of_a_mixture(tmp_path: Path) -> None:
    """Two codes that shift the rows apart: each alone gives its own rows, the mixture both by weight."""
    settings = {"num_codes": 2, "latent_dim": 0, "code_dim": 1, "code_radius": 10.0}
    make(tmp_path, "fedhypevae", num_rounds=1, **settings)
    path = tmp_path / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["decoder.0.bias_shift"] = torch.ones(6, 1)
    tensors["meta.codes"] = torch.tensor([[-2.0], [2.0]])
    tensors["meta.weights"] = torch.tensor([0.25, 0.75])
    save_file(tensors, path, metadata)
    bundle = load_bundle(tmp_path)
    for code, place in ((0, -2.0), ("1", 2.0)):
        assert float((bundle.draw(50, code=code)[0] - place).abs().max()) < 0.2
    for code in (None, "mixture"):
        share = float((bundle.draw(4000, code=code)[0][:, 0] > 0).float().mean())
        assert 0.70 < share < 0.80
    with pytest.raises(ConfigError, match="mixture of 2 codes"):
        bundle.draw(5, code="meta")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rows": 0},
        {"rows": 5, "balance": "other"},
        {"rows": 5, "balance": "given"},
        {"rows": 5, "shares": [1, 1, 1]},
        {"rows": 5, "balance": "given", "shares": [1, 1]},
        {"rows": 5, "code": "meta"},
        {"labels": torch.tensor([3])},
        {"labels": torch.tensor([0.0])},
        {"rows": 2, "labels": torch.tensor([0])},
    ],
)
def test_sample_refuses_wrong_words(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make(tmp_path).draw(**wrong)  # type: ignore[arg-type]


def test_sample_refuses_a_method_without_a_sampler(tmp_path: Path) -> None:
    bundle = make(tmp_path, "dp_fedsgd", num_rounds=1)
    assert not bundle.can_sample
    with pytest.raises(ConfigError, match="dp_fedsgd publishes a head, which no embeddings can be drawn from"):
        bundle.draw(5)


def test_dp_counts_need_a_run_that_published_them(tmp_path: Path) -> None:
    bundle = make(tmp_path, "dp_cvae", num_rounds=1, cvae_width=4, noise_dim=2)
    assert bundle.draw(5)[0].shape == (5, 6)
    with pytest.raises(ConfigError, match="no noised class counts"):
        bundle.draw(5, balance="dp-counts")


def test_published_set_is_read_from_a_run_and_from_a_bundle(tmp_path: Path) -> None:
    bundle = make(tmp_path)
    with pytest.raises(DataError, match="no published set"):
        bundle.published()
    drawn = bundle.draw(30)
    write_rows(tmp_path / "synthetic.parquet", [drawn], dim=6, class_names=NAMES, notes={})
    assert torch.equal(bundle.published()[0], drawn[0])
    for part in range(2):  # a bundle's own files come first, in the order of their names
        rows = drawn[0][part::2], drawn[1][part::2]
        write_rows(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", [rows], dim=6, class_names=NAMES, notes={})
    assert torch.equal(bundle.published()[0], torch.cat([drawn[0][0::2], drawn[0][1::2]]))
    assert json.dumps([str(path.name) for path in bundle.published_files()]).count("train-") == 2
