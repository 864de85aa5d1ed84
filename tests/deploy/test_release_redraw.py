"""A set that is not the generator's own is found: at the gate, by `release verify`, by a sample as often as said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError, FedHypeVAEError
from common.evaluation.scores import Split
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.methods.published import draw_published
from common.privacy.combined import ReleasedStatistics
from common.publishing.bundle import Bundle, load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import read_notes, set_notes, write_rows
from deploy.release import redraw
from deploy.release.contents import Contents
from deploy.release.describe import DATA_FILE
from deploy.release.layout import check_generator_layout
from deploy.release.redraw import FOREIGN, check_every_row, check_sampled_rows, missed_share
from server_app.results import write_synthetic
from tests.deploy.release_cases import change_json, failed_checks, invoke, release, sign_again

NAMES = ("a", "b", "c")
DIM = 12
KINDS: dict[str, dict[str, Any]] = {
    "generator": {},
    "plain": {"prototypes": False},
    "mixture": {"num-codes": 3, "balance": "dp-counts"},
    "mixed parameters": {"num-codes": 2, "printed-rows": True, "hidden-widths": "5"},
    "gauss": {"method": "dp_gauss"},
    "cvae": {"method": "dp_cvae", "cvae-width": 4, "noise-dim": 2},
    "cgan": {"method": "dp_cgan", "gan-width": 4, "noise-dim": 2},
}


def silent(what: str, done: int, total: int) -> None:
    """A watch that says nothing."""


def make(folder: Path, kind: str, rows: int = 1000) -> Bundle:
    """A run's folder as a server leaves it: a generator with some sense, and the set that it draws."""
    flat = {"method": "fedhypevae", "num-rounds": 1, "meta-steps": 3, "synthetic-rows": rows, "seed": 11}
    config = RunConfig.from_flat({**flat, **KINDS[kind]})
    method = get_method(config.method)
    context = RunContext(config, Problem(DIM, NAMES, 2), method.plan(config))
    generator = torch.Generator().manual_seed(0)
    state = method.init(context)
    shaken = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in state.params.items()}
    counts, means = torch.tensor([20.0, 30.0, 50.0]), 0.5 * torch.eye(3, DIM)
    noise = {"class_counts": 1.0, "class_sums": 1.0}
    released = ReleasedStatistics(
        100.0, means.mean(0), counts, means, None, None, noise, class_offsets=means - means.mean(0)
    )
    state = method.prepare(context, type(state)(state.round, shaken, state.memory), released)
    artifact = method.finish(context, state)
    write_generator(folder / "generator.safetensors", context, artifact, None)
    drawn = draw_published(context, artifact)
    assert drawn is not None
    write_synthetic(folder / "synthetic.parquet", context, *drawn)
    return load_bundle(folder)


def rewrite(bundle: Bundle, change: Callable[[Tensor, Tensor], Split], name: str = "synthetic.parquet") -> None:
    """Put a changed set in the place of the published one, as this program itself would write it."""
    embeddings, labels = bundle.published()
    changed = change(embeddings.clone(), labels.clone())
    notes = set_notes(bundle.context, bundle.not_private)
    write_rows(bundle.folder / name, [changed], dim=bundle.dim, class_names=bundle.class_names, notes=notes)


@pytest.mark.parametrize("kind", KINDS)
def test_own_set_is_accepted(tmp_path: Path, kind: str) -> None:
    """Read from its files alone, in blocks of other sizes than it was written in."""
    check_every_row(make(tmp_path, kind), silent)
    check_sampled_rows(load_bundle(tmp_path), silent)
    check_generator_layout(load_bundle(tmp_path), ())


def replaced(rows: Tensor, labels: Tensor) -> Split:
    rows[617] = rows[616]
    return rows, labels


def relabelled(rows: Tensor, labels: Tensor) -> Split:
    labels[403] = (labels[403] + 1) % 3
    return rows, labels


def appended(rows: Tensor, labels: Tensor) -> Split:
    return torch.cat([rows, rows[:1]]), torch.cat([labels, labels[:1]])


def removed(rows: Tensor, labels: Tensor) -> Split:
    return rows[:-1], labels[:-1]


def removed_inside(rows: Tensor, labels: Tensor) -> Split:
    return torch.cat([rows[:5], rows[6:]]), torch.cat([labels[:5], labels[6:]])


def permuted(rows: Tensor, labels: Tensor) -> Split:
    order = torch.arange(len(labels))
    order[[8, 9]] = order[[9, 8]]
    return rows[order], labels[order]


def doubled(rows: Tensor, labels: Tensor) -> Split:
    return torch.cat([rows, rows]), torch.cat([labels, labels])


def moved_a_little(rows: Tensor, labels: Tensor) -> Split:
    return moved_at(rows, 70), labels


def moved_at(rows: Tensor, row: int) -> Tensor:
    """Three steps of float32 in the row's largest coordinate: sums may differ by more than those of a small one."""
    column = int(rows[row].abs().argmax())
    for _ in range(3):
        rows[row, column] = torch.nextafter(rows[row, column], torch.tensor(torch.inf))
    return rows


def last_digits(rows: Tensor, labels: Tensor) -> Split:
    """One step in every second coordinate: a bit of a record could hide in each."""
    rows[:, ::2] = torch.nextafter(rows[:, ::2], torch.full_like(rows[:, ::2], torch.inf))
    return rows, labels


def records(rows: Tensor, labels: Tensor) -> Split:
    return torch.nn.functional.normalize(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))), labels


COUNTS = [appended, removed, removed_inside, doubled]
LIES = [replaced, relabelled, permuted, moved_a_little, last_digits, records, *COUNTS]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", ["generator", "plain", "gauss", "cvae"])
def test_other_set_is_found(tmp_path: Path, kind: str, lie: Callable[[Tensor, Tensor], Split]) -> None:
    bundle = make(tmp_path, kind)
    rewrite(bundle, lie)
    with pytest.raises(FedHypeVAEError, match=FOREIGN):
        check_every_row(bundle, silent)


def test_fault_names_the_row(tmp_path: Path) -> None:
    bundle = make(tmp_path, "generator")
    rewrite(bundle, replaced)
    with pytest.raises(FedHypeVAEError, match="row 617"):
        check_every_row(bundle, silent)


def test_single_last_digits_are_rounding(tmp_path: Path) -> None:
    """A few coordinates one step away, as another machine's sums may leave them."""
    bundle = make(tmp_path, "generator")

    def few(rows: Tensor, labels: Tensor) -> Split:
        for row in range(0, 1000, 100):
            rows[row, 5] = torch.nextafter(rows[row, 5], torch.tensor(-torch.inf))
        return rows, labels

    rewrite(bundle, few)
    check_every_row(bundle, silent)


def on_the_border(folder: Path, kind: str) -> Bundle:
    """A generator whose posterior finds classes 0 and 2 equally likely, everywhere."""
    make(folder, kind)
    path = folder / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in ("decoder.0.class_weight", "class_shift.weight", "class_bias.weight"):
        tensors[name] = torch.zeros_like(tensors[name])
    tensors["class_bias.weight"] = torch.tensor([1.0, 0.0, 1.0])
    save_file(tensors, path, metadata)
    bundle = load_bundle(folder)
    drawn = draw_published(bundle.context, bundle.artifact)
    assert drawn is not None
    write_synthetic(folder / "synthetic.parquet", bundle.context, *drawn)
    return bundle


def test_labels_on_the_border_may_be_the_other_side_s_and_few(tmp_path: Path) -> None:
    """Three rows may have the runner-up's label; not a fourth, not a class that is far, and not other values."""
    bundle = on_the_border(tmp_path, "generator")

    def flip(rows: int, label: int, moved: float = 0.0) -> Callable[[Tensor, Tensor], Split]:
        def change(values: Tensor, labels: Tensor) -> Split:
            labels[10 : 10 + rows] = label
            values[10] += moved
            return values, labels

        return change

    assert set(bundle.published()[1].tolist()) == {0}
    original = bundle.published()
    for change, fine in ((flip(3, 2), True), (flip(4, 2), False), (flip(1, 1), False), (flip(1, 2, 0.01), False)):
        rewrite(bundle, lambda rows, labels: (original[0].clone(), original[1].clone()))
        rewrite(bundle, change)
        if fine:
            check_every_row(bundle, silent)
        else:
            with pytest.raises(FedHypeVAEError, match=FOREIGN):
                check_every_row(bundle, silent)


def test_missed_share_by_hand() -> None:
    """0.9954^1000 is 0.01; one row of one finds 99 % of sets of which 99 % are foreign."""
    assert missed_share(1000) == pytest.approx(0.004595, abs=1e-6)
    assert missed_share(1) == pytest.approx(0.99)
    assert (1 - missed_share(300)) ** 300 == pytest.approx(0.01)


def test_sample_finds_foreign_rows_as_often_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the printed share 99 of 100 samples find a foreign row; at a tenth of it most do not, as a sample must."""
    monkeypatch.setattr(redraw, "SAMPLED_ROWS", 60)
    bundle = make(tmp_path, "generator")
    original = bundle.published()
    share = missed_share(60)
    found = {}
    for part in (1.0, 0.1):
        foreign = round(share * part * 1000) + 1

        def lie(rows: Tensor, labels: Tensor, foreign: int = foreign) -> Split:
            rows = original[0].clone()
            rows[:foreign] += 0.1  # the first ones: the sample must not favour any place
            return rows, labels

        rewrite(bundle, lie)
        found[part] = sum(not passes(bundle) for _ in range(150))
    assert found[1.0] >= 144  # 150 x 0.99, less than 1 in 1000 below
    assert 25 <= found[0.1] <= 90


def passes(bundle: Bundle) -> bool:
    try:
        check_sampled_rows(bundle, silent)
    except FedHypeVAEError:
        return False
    return True


def test_sample_is_drawn_from_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No seed that a publisher could know decides which rows are looked at."""
    monkeypatch.setattr(redraw, "SAMPLED_ROWS", 5)
    bundle, seen = make(tmp_path, "generator"), []
    compare = redraw._Comparison.compare
    monkeypatch.setattr(
        redraw._Comparison,
        "compare",
        lambda self, numbers, *rows: (seen.extend(numbers), compare(self, numbers, *rows)),
    )
    for _ in range(40):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        check_sampled_rows(bundle, silent)
    assert len(seen) == 200
    assert len(set(seen)) > 150


@pytest.mark.parametrize("lie", COUNTS)
def test_sample_counts_all_rows(tmp_path: Path, lie: Callable[[Tensor, Tensor], Split]) -> None:
    bundle = make(tmp_path, "generator")
    rewrite(bundle, lie)
    assert not passes(bundle)


@pytest.mark.parametrize("lie", LIES)
def test_gate_refuses_and_verify_finds_whatever_the_statement_says(
    copied: Any, tmp_path: Path, lie: Callable[[Tensor, Tensor], Split]
) -> None:
    """Also where the statement names another torch, and where the coordinator signs the exchanged set by hand."""
    run = load_bundle(copied.run)
    lie = SHORT.get(lie, lie)  # the run's set is short: the same lies, at rows that it has
    rewrite(run, lie)
    for torch_version in (None, "2.0.0"):
        if torch_version is not None:
            change_json(copied.run, "privacy_statement.json", lambda content: content["software"].update(torch="2.0.0"))
        done = release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites)
        assert FOREIGN in str(done.exception), done.output
        assert not (tmp_path / "new").exists()
    change_json(copied.bundle, "privacy_statement.json", lambda content: content["software"].update(torch="2.0.0"))
    sign_exchanged(copied.bundle, copied.key, lie)
    done = invoke("release", "verify", copied.bundle)
    assert failed_checks(done) == ["synthetic set"], done.output
    assert FOREIGN in done.output


def short_replaced(rows: Tensor, labels: Tensor) -> Split:
    rows[7] = rows[6]
    return rows, labels


def short_relabelled(rows: Tensor, labels: Tensor) -> Split:
    labels[4] = (labels[4] + 1) % 3
    return rows, labels


def short_moved(rows: Tensor, labels: Tensor) -> Split:
    return moved_at(rows, 7), labels


SHORT = {replaced: short_replaced, relabelled: short_relabelled, moved_a_little: short_moved}


def test_verify_says_verified_and_a_quick_look_says_sampled(released: Any) -> None:
    whole, quick = invoke("release", "verify", released.bundle), invoke("release", "verify", released.bundle, "--quick")
    assert whole.exit_code == quick.exit_code == 0
    assert "every row drawn again" in whole.output
    assert "verified" in whole.output
    assert "sampled" not in whole.output
    assert "sampled rows drawn again" in quick.output
    assert f"{missed_share(60):.2%} foreign rows would be found with 99%" in quick.output
    assert "verified" not in quick.output


def test_set_of_another_version_is_refused_in_words(copied: Any, tmp_path: Path) -> None:
    """A generator that does not say how its rows are drawn, and a bundle of the format before."""
    path = copied.run / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "rows"}
    save_file(load_file(path), path, metadata)
    for more in ((), ("--force",)):
        done = release(copied.run, tmp_path / "new", copied.key, *more)
        assert isinstance(done.exception, ConfigError)
        assert "another version of this program" in str(done.exception)
    change_json(copied.bundle, "bundle.json", lambda content: content.update(format="fedhypevae-bundle/1"))
    sign_again(copied.bundle, copied.key)
    done = invoke("release", "verify", copied.bundle)
    assert failed_checks(done) == ["format", "descriptions"]
    assert "fedhypevae-bundle/1" in done.output


def test_forced_bundle_with_a_foreign_set_says_so_itself(copied: Any, tmp_path: Path) -> None:
    """It is whole, promises nothing, and is not called verified."""
    rewrite(load_bundle(copied.run), short_replaced)
    assert release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, "--force").exit_code == 0
    for more in ((), ("--quick",)):
        done = invoke("release", "verify", tmp_path / "new", "--allow-not-private", *more)
        assert done.exit_code == 0, done.output
        assert FOREIGN in done.output
        assert "verified" not in done.output
        assert "sampled:" not in done.output
    reasons = json.loads((tmp_path / "new" / "bundle.json").read_text())["not_private_because"]
    assert any(FOREIGN in reason for reason in reasons)


def test_set_exchanged_in_a_forced_bundle_is_found(copied: Any, tmp_path: Path) -> None:
    """A bundle that is not private for another reason still has to hold what it says."""
    assert release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites, "--force").exit_code == 0
    sign_exchanged(tmp_path / "new", copied.key, short_replaced)
    done = invoke("release", "verify", tmp_path / "new", "--allow-not-private")
    assert failed_checks(done) == ["synthetic set"], done.output


def sign_exchanged(folder: Path, key: Path, change: Callable[[Tensor, Tensor], Split]) -> None:
    """Exchange the set of a bundle, and let every other file agree with it, signed by the coordinator's own key."""
    bundle = load_bundle(folder)
    rewrite(bundle, change, DATA_FILE)
    describe_again(folder, key, bundle.not_private)


def describe_again(folder: Path, key: Path, reasons: tuple[str, ...] = ()) -> None:
    """Numbers and descriptions of a bundle's set as it is now, and the signature."""
    labels = load_bundle(folder).published()[1]
    told = {"rows": len(labels), "class_counts": labels.bincount(minlength=3).tolist()}
    change_json(folder, "bundle.json", lambda content: content.update(told))
    for name, text in Contents(folder).described().items():
        (folder / name).write_text(text)
    sign_again(folder, key, reasons)


@pytest.mark.parametrize("hidden", ["column", "note", "bytes", "tensor", "shape", "metadata"])
def test_anything_beside_the_rows_is_found(copied: Any, hidden: str) -> None:
    """The rows are the generator's own, everything is signed, and records lie where no reader looks."""
    data, generator = copied.bundle / DATA_FILE, copied.bundle / "generator.safetensors"
    with safe_open(generator, framework="pt") as file:
        metadata = file.metadata()
    tensors, table, bundle = load_file(generator), pq.read_table(data), load_bundle(copied.bundle)
    if hidden == "column":
        pq.write_table(table.append_column("record", pa.array(range(len(table)))), data)
    elif hidden == "note":
        rows, notes = bundle.published(), {**read_notes(data), "record": [1.0, 2.0]}
        write_rows(data, [rows], dim=DIM, class_names=bundle.class_names, notes=notes)
    elif hidden == "bytes":
        content = data.read_bytes()
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        data.write_bytes(content[:end] + b"record" + content[end:])
    elif hidden == "tensor":
        save_file({**tensors, "decoder.0.record": torch.ones(5, DIM)}, generator, metadata)
    elif hidden == "shape":
        save_file({**tensors, "class_counts": torch.ones(3, DIM)}, generator, metadata)
    else:
        save_file(tensors, generator, {**metadata, "record": "1.0 2.0"})
    describe_again(copied.bundle, copied.key)
    done = invoke("release", "verify", copied.bundle)
    assert failed_checks(done) == ["synthetic set" if hidden in ("column", "note", "bytes") else "generator"], (
        done.output
    )


def test_notes_of_the_run_s_file_are_not_published(copied: Any, tmp_path: Path) -> None:
    run = load_bundle(copied.run)
    notes = {**set_notes(run.context, ()), "record": [1.0, 2.0]}
    write_rows(copied.run / "synthetic.parquet", [run.published()], dim=DIM, class_names=run.class_names, notes=notes)
    assert release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites).exit_code == 0
    assert read_notes(tmp_path / "new" / DATA_FILE) == set_notes(run.context, ())


def test_generator_that_is_not_finite_is_refused_in_words(tmp_path: Path) -> None:
    bundle = make(tmp_path, "generator")
    tensors = {**bundle.artifact.tensors, "decoder.0.class_weight": torch.full((DIM, 3), torch.nan)}
    with pytest.raises(FedHypeVAEError, match="diverged"):
        draw_published(bundle.context, replace(bundle.artifact, tensors=tensors))


@pytest.mark.parametrize("change", [{"seed": 5}, {"printed-rows": True}, {"synthetic-rows": 80}])
def test_settings_that_no_site_took_part_in_are_refused(copied: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    """A set that fits its generator, but other settings than the ledgers note: at the gate, and signed by hand."""
    run = load_bundle(copied.run)
    config = RunConfig.from_flat({**run.config.to_flat(), **change})
    context = RunContext(config, run.context.problem, run.context.plan)
    for folder, name, reader in (
        (copied.run, "synthetic.parquet", None),
        (copied.bundle, DATA_FILE, copied.bundle),
    ):
        write_generator(folder / "generator.safetensors", context, run.artifact, run.encoder)
        drawn = draw_published(context, run.artifact)
        assert drawn is not None
        write_synthetic(folder / name, context, *drawn)
        if reader is None:
            done = release(copied.run, tmp_path / "new", copied.key, "--ledgers", copied.sites)
            assert "holds other settings of run" in str(done.exception)
        else:
            for file in ("bundle.json", "audit.json"):
                change_json(folder, file, lambda content: content.update(config=config.to_flat()))
            describe_again(folder, copied.key)
            assert failed_checks(invoke("release", "verify", folder)) == ["ledgers"]
