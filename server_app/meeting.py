"""Before a run: wait for the sites, hear what they hold, and see that they agree."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from common.agreement import require_agreement
from common.config import RunConfig
from common.errors import DataError, MeetingError
from common.identity import EncoderIdentity
from common.wire import SiteFacts
from server_app.exchange import Reply, build_messages, exchange
from server_app.link import Member
from server_app.progress import RoundPrinter

_HELLO_S = 120.0
_RETURN_S = 60.0  # a node that crashed is refused for about as long


@dataclass(frozen=True)
class Meeting:
    """Sites that agreed.

    Attributes:
        members: by node.
        dim: width of their embeddings; of the first site where they differ.
        class_names: their class set.
        identity: of the encoder and classes that all of them have; None where each has its own encoder.
        data_is_public: whether every site's policy declares its data public.
        facts: what each said, by name.
    """

    members: Mapping[int, Member]
    dim: int
    class_names: tuple[str, ...]
    identity: EncoderIdentity | None
    data_is_public: bool
    facts: Mapping[str, SiteFacts]

    @property
    def site_dims(self) -> tuple[int, ...]:
        """Each site's own width, by index; empty where all have one."""
        order = sorted(self.members.values(), key=lambda member: member.index)
        dims = tuple(self.facts[member.name].identity.dimension for member in order)
        return dims if len(set(dims)) > 1 else ()


def meet(grid: Grid, config: RunConfig, printer: RoundPrinter, least: int | None = None) -> Meeting:
    """Wait for `num-sites` sites and compare what they say.

    Args:
        grid: the link to the sites.
        config: of the run.
        printer: told of a wait.
        least: number of sites that is enough once the others have had a minute; for a run that is resumed.

    Raises:
        MeetingError: fewer sites than asked for, two with one name, or sites that differ in width, class set or
            encoder; the text names the site and the field.
    """
    federation = config.federation
    needed = federation.num_sites if least is None else least
    nodes = _wait_for_nodes(grid, federation.num_sites, needed, federation.round_timeout, printer)
    # the first message may make a simulated site extract its embeddings: allow for it
    facts, missing = say_hello(grid, config, nodes, max(federation.round_timeout, _HELLO_S))
    if len(facts) < max(needed, 1):
        reasons = "; ".join(f"site {node} {why}" for node, why in missing.items())
        raise MeetingError(
            f"expected {needed} sites, {len(facts)} said hello ({reasons}); mend them, or lower num-sites"
        )
    _check_agreement(facts, own_encoders=config.rivals.own_encoders)
    order = sorted(facts, key=lambda node: (facts[node].position, facts[node].site))
    members = {node: Member(node, facts[node].site, index) for index, node in enumerate(order)}
    first, public = facts[order[0]].identity, all(fact.public for fact in facts.values())
    by_name = {fact.site: fact for fact in facts.values()}
    shared = None if any(fact.identity != first for fact in facts.values()) else first
    return Meeting(members, first.dimension, first.class_names, shared, public, by_name)


def say_hello(
    grid: Grid, config: RunConfig, nodes: Iterable[int], patience: float
) -> tuple[dict[int, SiteFacts], Mapping[int, str]]:
    """Ask nodes what they hold.

    Args:
        grid: the link to the sites.
        config: of the run.
        nodes: whom to ask.
        patience: seconds to wait.

    Returns:
        What each said, and why others said nothing that can be used, by node.
    """
    federation = config.federation
    words: dict[str, str | int | float | bool] = {
        "seed": federation.seed,
        "alpha": federation.alpha,
        "sites_dir": federation.sites_dir,
    }
    words |= {"cache_dir": federation.cache_dir, "output_dir": federation.output_dir, "pool": federation.pool}
    words |= {"data_is_public": federation.data_is_public}
    words |= {"epsilon": config.privacy.epsilon, "unit": config.privacy.unit}
    messages = build_messages("hello", nodes, lambda _: words, lambda _: {}, "hello", patience)
    outcome = exchange(grid, "hello", messages, patience, lambda _: {})
    facts, missing = {}, dict(outcome.missing)
    for node, reply in outcome.replies.items():
        try:
            facts[node] = _facts(reply)
        except MeetingError as error:
            missing[node] = str(error)
    return facts, missing


def _wait_for_nodes(grid: Grid, wanted: int, least: int, timeout: float, printer: RoundPrinter) -> list[int]:
    start, told = time.monotonic(), False
    end, enough = start + timeout, start + min(timeout, _RETURN_S)
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= wanted or (len(nodes) >= least and time.monotonic() >= enough):
            return nodes
        if time.monotonic() >= end:
            raise MeetingError(
                f"expected {wanted} sites, {len(nodes)} are connected after {timeout:g} s; start the others, or lower "
                "num-sites"
            )
        if not told:
            printer.say(f"waiting for {wanted} sites, {len(nodes)} connected so far")
            told = True
        time.sleep(0.5)


def _facts(reply: Reply) -> SiteFacts:
    words = reply.words
    try:
        return SiteFacts(
            str(words["site"]),
            int(words["position"]),
            EncoderIdentity.from_json(json.loads(str(words["identity"]))),
            str(words["canary"]),
            bool(words["public"]),
        )
    except (KeyError, ValueError, TypeError, DataError):
        raise MeetingError("a site said hello in words that can't be read: it must run the same version") from None


def _check_agreement(facts: Mapping[int, SiteFacts], *, own_encoders: bool) -> None:
    ordered = sorted(facts.values(), key=lambda fact: (fact.position, fact.site))
    names = [fact.site for fact in ordered]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise MeetingError(f"two sites call themselves {double!r}: give each its own site-name")
    require_agreement({fact.site: fact for fact in ordered}, own_encoders=own_encoders)
