"""Parameters in few bits: server and sites hold the same to the last bit, whatever a site misses or loses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.loop import LoopResult, run_loop
from common.wire.allow_list import PACKED
from common.wire.versions import version_of
from server_app.checkpoint import load_checkpoint
from tests.harness import CLASSES, SMALL, Federation, Handler, HarnessSite, Killed

PUBLIC = {"data_is_public": True, "metrics_may_leave": True, "allow_test_noise": True}
SEEDED: dict[str, Any] = {"noise": "test", "num_rounds": 4, "wire_bits": 8}


def seeded_federation(home: Path, num_sites: int = 3) -> Federation:
    from common.methods import method_names

    return Federation.create(home, num_sites, allowed_methods=method_names(), **PUBLIC)


def alone(federation: Federation, **settings: Any) -> LoopResult:
    """The same run in the plain loop."""
    flat = {**SMALL, "num-sites": len(federation.sites), "min-sites": 1}
    flat |= {name.replace("_", "-"): value for name, value in settings.items()}
    sites = [
        split_data(load_records(site.folder / "site.parquet", federation.home), "train", "record")
        for site in federation.sites
    ]
    return run_loop(RunConfig.from_flat(flat), sites, CLASSES)


def assert_same_run(federation: Federation, result: LoopResult) -> None:
    state, _, _ = load_checkpoint(federation.output)
    assert state.params.keys() == result.state.params.keys()
    for name, value in result.state.params.items():
        torch.testing.assert_close(state.params[name], value, atol=1e-5, rtol=1e-5)


def held_by(site: HarnessSite) -> str:
    """Version of the parameters on a site's disk."""
    (path,) = (site.folder / "state").glob("*/held.safetensors")
    return version_of(load_file(path))


def assert_all_hold_the_servers(federation: Federation, sites: int = 3) -> None:
    _, progress, held = load_checkpoint(federation.output)
    assert [held_by(site) for site in federation.sites[:sites]] == [held["all"].version] * sites
    assert all(progress.versions[site.name] == held["all"].version for site in federation.sites[:sites])
    assert version_of(held["all"].tensors) == held["all"].version


METHODS = {
    "fedhypevae": {},
    "fedavg": {"epsilon": float("inf"), "spare_rounds": 0},
    "mh_pfedhn": {"epsilon": float("inf"), "architectures": "linear,mlp-3", "chunk_size": 40},
    "dp_cvae": {"cvae_width": 5, "noise_dim": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [32, 8, 6])
def test_flower_and_loop_give_the_same_state(tmp_path: Path, method: str, bits: int) -> None:
    federation = seeded_federation(tmp_path)
    settings = {**SEEDED, **METHODS[method], "method": method, "wire_bits": bits}
    federation.run(**settings)
    assert_same_run(federation, alone(federation, **settings))


def test_bytes_of_the_loop_are_those_of_the_messages(tmp_path: Path) -> None:
    """Both ways, but for each array's name and its header of 128 bytes under Flower."""
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(**{**SEEDED, "noise": "secure"})
    result = alone(federation, **SEEDED)
    parts = [
        (seen.to_server, name, array)
        for seen in federation.traffic
        if seen.site == "site-1" and "tensors" in seen.message.content.array_records
        for name, array in seen.message.content.array_records["tensors"].items()
    ]
    for to_server, told, counted in ((True, "bytes_up_per_site", result.bytes_up),
                                     (False, "bytes_down_per_site", result.bytes_down)):  # fmt: skip
        arrays = [(name, array) for way, name, array in parts if way == to_server]
        assert sum(array.numpy().nbytes for _, array in arrays) == counted
        assert summary[told] == counted + sum(128 + len(name) for name, _ in arrays)


def test_few_bits_change_little_and_none_change_nothing(tmp_path: Path) -> None:
    """The first parameters are whole, and the last lie within a step of the last change."""
    found = {bits: alone(seeded_federation(tmp_path / str(bits)), **{**SEEDED, "wire_bits": bits}) for bits in (32, 16)}
    for name, value in found[32].state.params.items():
        torch.testing.assert_close(found[16].state.params[name], value, atol=2e-2 * float(value.abs().max()), rtol=0.0)
    assert found[16].bytes_up < 0.6 * found[32].bytes_up


def test_sites_hold_what_the_server_holds(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 3)
    federation.run(num_rounds=4, wire_bits=8)
    assert_all_hold_the_servers(federation)
    changes = [PACKED in seen.message.content.array_records["tensors"] for seen in federation.traffic
               if not seen.to_server and seen.kind == "train" and seen.site == "site-1"]  # fmt: skip
    assert changes == [False, True, True, True]


def gone(_: HarnessSite, __: Handler) -> Message | None:
    raise Killed


def answered_too_late(_: HarnessSite, handler: Handler) -> Message | None:
    handler()
    raise Killed


def with_lost_parameters(site: HarnessSite, handler: Handler) -> Message:
    for path in (site.folder / "state").glob("*/held.safetensors"):
        path.unlink()
    return handler()


def with_spoiled_parameters(site: HarnessSite, handler: Handler) -> Message:
    for path in (site.folder / "state").glob("*/held.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return handler()


def with_a_torn_file(site: HarnessSite, handler: Handler) -> Message:
    for path in (site.folder / "state").glob("*/held.safetensors"):
        path.write_bytes(b"\x00" * 7)
    return handler()


ACCIDENTS = [gone, answered_too_late, with_lost_parameters, with_spoiled_parameters, with_a_torn_file]


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("trust", ["local", "secagg"])
def test_all_hold_the_same_after(
    tmp_path: Path, accident: Callable[[HarnessSite, Handler], Message | None], trust: str
) -> None:
    from tests.secagg_cases import keyed_federation

    federation = keyed_federation(tmp_path, 4)
    settings: dict[str, Any] = {"num_rounds": 4, "wire_bits": 8, "trust": trust, "sampling_rate": 1.0}
    last = accident_in(accident, "site-2", 3, "secagg_masked" if trust == "secagg" else "train")
    summary = federation.run(tamper=last, **settings)
    assert_all_hold_the_servers(federation, 4)
    missed = accident in (gone, answered_too_late)
    assert ["site-2" in sites for sites in summary["rounds_taken_part"]] == [True, True, not missed, True]
    for site in federation.sites:
        (run,) = site.runs().values()
        # a site that was asked again with the whole was not charged twice; one that was gone not at all
        wanted = 5 - (site.name == "site-2" and accident is gone)
        assert sum(event.count for event in run.charged) == wanted


def accident_in(
    act: Callable[[HarnessSite, Handler], Message | None], site: str, number: int, phase: str
) -> Callable[[HarnessSite, Message, Handler], Message | None]:
    """One accident at a site when it gets a round's parameters."""
    done: list[int] = []

    def tamper(found: HarnessSite, message: Message, handler: Handler) -> Message | None:
        kind = str(message.metadata.message_type).removeprefix("query.")
        if found.name == site and message.metadata.group_id == f"round-{number}" and kind == phase and not done:
            done.append(number)
            return act(found, handler)
        return handler()

    return tamper


def test_digest_finds_a_site_that_computes_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose arithmetic differs does not train at other parameters: it asks for the whole."""
    from client_app.state import received

    right = received.apply_change

    def slightly_off(*arguments: Any) -> Any:
        return {name: value + 1e-7 for name, value in right(*arguments).items()}

    monkeypatch.setattr(received, "apply_change", slightly_off)
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=3, wire_bits=8)
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [2, 2, 2]
    assert_all_hold_the_servers(federation, 2)


def test_without_the_digest_sites_would_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken version: no digest, and the tests above would find a site that holds something else."""
    from client_app.state import received

    right, claimed = received.apply_change, dict[str, str]()

    def slightly_off(*arguments: Any) -> Any:
        wanted = right(*arguments)
        made = {name: value + 1e-3 for name, value in wanted.items()}
        claimed[version_of(made)] = version_of(wanted)
        return made

    monkeypatch.setattr(received, "apply_change", slightly_off)
    monkeypatch.setattr(received, "version_of", lambda tensors: claimed.get(version_of(tensors), version_of(tensors)))
    federation = Federation.create(tmp_path, 2)
    federation.run(num_rounds=2, wire_bits=8)
    with pytest.raises(AssertionError):
        assert_all_hold_the_servers(federation, 2)


def test_run_killed_in_mid_round_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    """Killed when one of three had answered round 3: the state is that of a run that was never killed."""
    federation = seeded_federation(tmp_path)
    seen: list[str] = []

    def kill(site: HarnessSite, message: Message, handler: Handler) -> Message:
        if message.metadata.group_id == "round-3":
            if seen:
                raise SystemExit(137)
            seen.append(site.name)
        return handler()

    with pytest.raises(SystemExit):
        federation.run(tamper=kill, **SEEDED)
    summary = federation.run(resume=True, run_id=2, **SEEDED)
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [3, 3, 3, 3]
    assert_same_run(federation, alone(federation, **SEEDED))
    assert_all_hold_the_servers(federation)


def test_round_that_fell_short_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    """Too few answered round 3, and the run stopped: the versions of that round are not made anew from themselves."""
    federation = seeded_federation(tmp_path)
    settings = {**SEEDED, "min_sites": 3}
    with pytest.raises(SystemExit):
        federation.run(tamper=accident_in(gone, "site-2", 3, "train"), **settings)
    federation.run(resume=True, run_id=2, **settings)
    assert_same_run(federation, alone(federation, **settings))
    assert_all_hold_the_servers(federation)


def test_twice_delivered_round_gets_the_same_bytes(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1)

    def twice(site: HarnessSite, message: Message, handler: Handler) -> Message:
        first = handler()
        if message.metadata.message_type == "train":
            again = handler()
            one, other = (reply.content.array_records["tensors"][PACKED].data for reply in (first, again))
            assert one == other
        return first

    federation.run(num_rounds=3, tamper=twice, wire_bits=8)
    assert len(federation.sites[0].releases()) == 4


def test_secagg_sites_agree_on_parameters_that_some_got_whole(tmp_path: Path) -> None:
    """The signed task is of what a site holds, not of how it came: some got the change and one the whole."""
    from tests.secagg_cases import keyed_federation

    federation = keyed_federation(tmp_path, 4)
    tamper = accident_in(with_lost_parameters, "site-3", 2, "secagg_masked")
    summary = federation.run(num_rounds=2, trust="secagg", wire_bits=8, tamper=tamper)
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [4, 4]
