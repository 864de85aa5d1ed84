"""Before a run: wait for the sites, hear what they hold, and see that they agree."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from flwr.serverapp import Grid

from common.config.run import RunConfig
from common.errors import ConfigError, MeetingError, WireError
from common.names import MOST_FINDINGS, Task
from common.wire.agreement import all_findings, check_sites
from common.wire.allow_list import REQUEST_FIELDS, SiteFacts
from common.wire.identity import EncoderIdentity, compare
from server_app.exchange import Exchange, build_messages, receive
from server_app.members import Member
from server_app.progress import RoundPrinter
from server_app.refusals import Refusals
from server_app.register import registered_names
from server_app.replies import facts_of

_HELLO_S = 120.0
_RETURN_S = 60.0  # a node that crashed is refused for about as long


@dataclass(frozen=True)
class Meeting:
    """Sites that agreed.

    Attributes:
        members: by node.
        dim: width of their embeddings; of the first site where they differ.
        class_names: their class set; of a multi-label run the findings of any of them.
        label_sets: the different sets of findings that sites label; empty where all label all.
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
    label_sets: tuple[tuple[int, ...], ...] = ()

    @property
    def site_dims(self) -> tuple[int, ...]:
        """Each site's own width, by index; empty where all have one."""
        order = sorted(self.members.values(), key=lambda member: member.index)
        dims = tuple(self.facts[member.name].identity.dimension for member in order)
        return dims if len(set(dims)) > 1 else ()


@dataclass(frozen=True)
class Heard:
    """What nodes said of themselves.

    Attributes:
        facts: of those whose hello kept the rules, by node; no two have one name.
        missing: why others said nothing, by node.
        refused: those whose hello broke a rule.
    """

    facts: Mapping[int, SiteFacts]
    missing: Mapping[int, str]
    refused: frozenset[int] = field(default_factory=frozenset)


def meet(grid: Grid, config: RunConfig, printer: RoundPrinter, refusals: Refusals, least: int | None = None) -> Meeting:
    """Wait for `num-sites` sites and compare what they say.

    A site that says no hello that can be used is left out, and so is one that differs from the others. They go on
    without it, if they are `min-sites` and more than half of those asked for.

    Args:
        grid: the link to the sites.
        config: of the run.
        printer: says that the run waits.
        refusals: notes who is left out.
        least: number of sites that is enough once the others have had a minute; for a run that is resumed.

    Raises:
        MeetingError: too few sites, or sites that differ in width, class set or encoder where too few are alike; the
            text names the site and the field.
    """
    federation, operation = config.federation, config.operation
    needed = federation.num_sites if least is None else least
    nodes = _wait_for_nodes(grid, config, needed, printer)
    # the first message may make a simulated site extract its embeddings: allow for it
    heard = say_hello(grid, config, nodes, max(operation.round_timeout, _HELLO_S), refusals)
    # one site must not end what the others want; but half of them is no longer the run that was asked for
    enough = max(min(operation.min_sites, needed), needed // 2 + 1)
    if len(heard.facts) < enough:
        reasons = "; ".join(f"site {node} {why}" for node, why in heard.missing.items())
        raise MeetingError(
            f"expected {needed} sites, {len(heard.facts)} said hello ({reasons}); mend them, or lower num-sites"
        )
    for node in sorted(set(heard.missing) - heard.refused):
        printer.say(f"hello: site {node} is missing: {heard.missing[node]}")
    facts = _that_agree(heard.facts, enough, refusals, own_encoders=config.rivals.own_encoders, task=federation.task)
    order = sorted(facts, key=lambda node: (facts[node].position, facts[node].site))
    members = {node: Member(node, facts[node].site, index) for index, node in enumerate(order)}
    # where the weights are the same, a hub's name tells more than a folder's
    first = min((facts[node].identity for node in order), key=lambda identity: identity.encoder.startswith("local:"))
    public = all(fact.public for fact in facts.values())
    by_name = {fact.site: fact for fact in facts.values()}
    names, label_sets = all_findings(facts[node].identity.class_names for node in order)
    if federation.task != "multiclass" and len(names) > MOST_FINDINGS:
        raise MeetingError(f"the sites label {len(names)} findings, expected at most {MOST_FINDINGS}: leave some out")
    identities = {site: replace(fact.identity, class_names=names) for site, fact in by_name.items()}
    shared = None if compare(identities) else replace(first, class_names=names)
    return Meeting(members, first.dimension, names, shared, public, by_name, label_sets)


def say_hello(grid: Grid, config: RunConfig, nodes: Iterable[int], patience: float, refusals: Refusals) -> Heard:
    """Ask nodes what they hold.

    Where the coordinator keeps a register, a site must have the name under which its key is registered. Where there is
    none, nobody knows whose name it is: the node with the lower number has it.

    Args:
        grid: the link to the sites.
        config: of the run.
        nodes: whom to ask.
        patience: seconds to wait.
        refusals: notes whose hello broke a rule.
    """
    settings, (names, _) = config.to_flat(), REQUEST_FIELDS["hello"]
    fields = {name: settings[name.replace("_", "-")] for name in sorted(names)}
    messages = build_messages("hello", nodes, lambda _: fields, lambda _: {}, "hello", patience)
    outcome = Exchange("hello", messages).read(receive(grid, messages, patience))
    registered = registered_names()
    facts: dict[int, SiteFacts] = {}
    broke = {node: outcome.missing[node] for node in outcome.broke}
    for node, reply in sorted(outcome.replies.items()):
        try:
            facts[node] = facts_of(reply)
            _check_name(node, facts, registered)
        except WireError as error:
            facts.pop(node, None)
            broke[node] = f"{error} (it calls itself {reply.words['site']})"
    for node, why in sorted(broke.items()):
        refusals.add((registered or {}).get(node, str(node)), "hello", why)
    return Heard(facts, {**outcome.missing, **broke}, frozenset(broke))


def _check_name(node: int, facts: Mapping[int, SiteFacts], registered: Mapping[int, str] | None) -> None:
    """Refuse a name that is another site's (WireError)."""
    name = facts[node].site
    if registered is None:
        other = next((one for one, fact in facts.items() if one != node and fact.site == name), None)
        if other is not None:
            raise WireError(f"has the name of node {other}: give each site its own site-name")
    elif node not in registered:
        raise WireError("its key is not in the register: see `fedhypevae server register`")
    elif registered[node] != name:
        raise WireError(f"its key is registered as {registered[node]}")


def asked_nodes(grid: Grid, config: RunConfig) -> list[int]:
    """The connected nodes that the run asks: those of `sites`, by the register, or all.

    Raises:
        ConfigError: the server has no register, or one that does not hold a name of `sites`.
    """
    nodes, wanted = sorted(grid.get_node_ids()), config.operation.chosen_sites
    if not wanted:
        return nodes
    names = registered_names() or {}
    unknown = sorted(wanted - set(names.values()))
    if unknown:
        raise ConfigError(f"sites names {', '.join(unknown)}, which the server's register does not: see `server list`")
    return [node for node in nodes if names.get(node) in wanted]


def _wait_for_nodes(grid: Grid, config: RunConfig, least: int, printer: RoundPrinter) -> list[int]:
    wanted, timeout = config.federation.num_sites, config.operation.round_timeout
    start, announced = time.monotonic(), False
    end, enough = start + timeout, start + min(timeout, _RETURN_S)
    while True:
        nodes = asked_nodes(grid, config)
        if len(nodes) >= wanted or (len(nodes) >= least and time.monotonic() >= enough):
            return nodes
        if time.monotonic() >= end:
            raise MeetingError(
                f"expected {wanted} sites, {len(nodes)} are connected after {timeout:g} s; start the others, or lower "
                "num-sites"
            )
        if not announced:
            printer.say(f"waiting for {wanted} sites, {len(nodes)} connected so far")
            announced = True
        time.sleep(0.5)


def _that_agree(
    facts: Mapping[int, SiteFacts], least: int, refusals: Refusals, *, own_encoders: bool, task: Task
) -> dict[int, SiteFacts]:
    """The sites whose embeddings mean the same, if there are at least so many."""
    kept, odd = dict(facts), dict[str, str]()
    while True:
        in_order = sorted(kept.values(), key=lambda fact: (fact.position, fact.site))
        found = check_sites({fact.site: fact for fact in in_order}, own_encoders=own_encoders, task=task)
        if not found:
            break
        odd |= {mismatch.site: str(mismatch) for mismatch in reversed(found)}
        kept = {node: fact for node, fact in kept.items() if fact.site not in odd}
        if len(kept) < least:
            raise MeetingError("the sites' embeddings differ: " + "; ".join(str(mismatch) for mismatch in found))
    for site, why in odd.items():
        refusals.add(site, "hello", why)
    return kept
