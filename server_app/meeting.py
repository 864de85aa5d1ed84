"""Before a run: wait for the sites, hear what they hold, and see that they agree."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Meeting:
    """Sites that agreed.

    Attributes:
        members: by node.
        dim: width of their embeddings.
        class_names: their class set.
        identity: of the encoder and classes that all of them have.
        data_is_public: whether every site's policy declares its data public.
    """

    members: Mapping[int, Member]
    dim: int
    class_names: tuple[str, ...]
    identity: EncoderIdentity
    data_is_public: bool


def meet(grid: Grid, config: RunConfig, printer: RoundPrinter) -> Meeting:
    """Wait for `num-sites` sites and compare what they say.

    Raises:
        MeetingError: fewer sites than asked for, two with one name, or sites that differ in width, class set or
            encoder; the text names the site and the field.
    """
    federation = config.federation
    nodes = _wait_for_nodes(grid, federation.num_sites, federation.round_timeout, printer)
    words: dict[str, str | int | float | bool] = {
        "seed": federation.seed,
        "alpha": federation.alpha,
        "sites_dir": federation.sites_dir,
    }
    words |= {"cache_dir": federation.cache_dir, "output_dir": federation.output_dir, "pool": federation.pool}
    words |= {"data_is_public": federation.data_is_public}
    words |= {"epsilon": config.privacy.epsilon, "unit": config.privacy.unit}
    # the first message may make a simulated site extract its embeddings: allow for it
    patience = max(federation.round_timeout, _HELLO_S)
    messages = build_messages("hello", nodes, lambda _: words, lambda _: {}, "hello", patience)
    outcome = exchange(grid, "hello", messages, patience, lambda _: {})
    if len(outcome.replies) < max(federation.num_sites, 1):
        reasons = "; ".join(f"site {node} {why}" for node, why in outcome.missing.items())
        raise MeetingError(
            f"expected {federation.num_sites} sites, {len(outcome.replies)} said hello ({reasons}); mend them, or "
            "lower num-sites"
        )
    facts = {node: _facts(reply) for node, reply in outcome.replies.items()}
    _check_agreement(facts)
    order = sorted(facts, key=lambda node: (facts[node].position, facts[node].site))
    members = {node: Member(node, facts[node].site, index) for index, node in enumerate(order)}
    first = facts[order[0]].identity
    return Meeting(members, first.dimension, first.class_names, first, all(fact.public for fact in facts.values()))


def _wait_for_nodes(grid: Grid, wanted: int, timeout: float, printer: RoundPrinter) -> list[int]:
    end, told = time.monotonic() + timeout, False
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= wanted:
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


def _check_agreement(facts: Mapping[int, SiteFacts]) -> None:
    ordered = sorted(facts.values(), key=lambda fact: (fact.position, fact.site))
    names = [fact.site for fact in ordered]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise MeetingError(f"two sites call themselves {double!r}: give each its own site-name")
    require_agreement({fact.site: fact for fact in ordered})
