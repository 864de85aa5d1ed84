"""One exchange with the sites: send, wait, check, and sort out who answered and who did not, and why.

A reply is checked against the allow-list before anything of it is used, and none is counted twice.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from common.compression import OFF
from common.errors import StaleError, WireError
from common.transfer import from_wire, wire_shapes
from common.wire import ERROR_WORDS, Kind, check_scores, check_tensors, check_words, read_charged

Take = Callable[[int, Mapping[str, Tensor]], None]
"""Takes in what a node sent."""

_KINDS: dict[Kind, str] = {
    "hello": "query.hello",
    "statistics": "query.statistics",
    "train": "train",
    "baseline": "query.baseline",
    "evaluate": "evaluate",
    "secagg_keys": "query.secagg_keys",
    "secagg_shares": "query.secagg_shares",
    "secagg_masked": "query.secagg_masked",
    "secagg_unmask": "query.secagg_unmask",
}
_ADVICE = {
    "policy:run_name": ": it knows a run of this name with other settings; give this one another run-name",
    "ledger": ": its privacy ledger can't be used, or is older than what it released: its own log says what to do",
    "receipt": ": the receipt kept of it here is not one that it gave: ask its people, its own log says what to do",
}
_APP_REFUSED = "AppRefused"  # the error that a site's launcher reports before any of the app's code runs
_ERROR_CODES = {2: "its app failed", 3: "answered too late", 5: "unreachable", 8: "its app was killed"}


@dataclass(frozen=True)
class Reply:
    """A site's answer that passed the checks.

    Attributes:
        words: strings and numbers, by name.
        tensors: float32 tensors, by name; none where they were taken in at once.
        scores: numbers of an evaluation, by name.
        num_bytes: size of its arrays.
    """

    words: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scores: Mapping[str, float]
    num_bytes: int


@dataclass(frozen=True)
class Outcome:
    """An exchange: answers by node, why others have none, and bytes sent to each.

    `stale` are those that have none because they need the whole parameters, and may be asked again.
    """

    replies: Mapping[int, Reply]
    missing: Mapping[int, str]
    bytes_down: Mapping[int, int]
    stale: frozenset[int] = frozenset()

    def then(self, again: Outcome) -> Outcome:
        """This exchange and a second one with some of its sites."""
        down = {node: self.bytes_down.get(node, 0) + again.bytes_down.get(node, 0) for node in self.bytes_down}
        missing = {node: why for node, why in self.missing.items() if node not in again.replies}
        return Outcome({**self.replies, **again.replies}, {**missing, **again.missing}, down, again.stale)


def build_messages(
    kind: Kind,
    nodes: Iterable[int],
    words: Callable[[int], Mapping[str, str | int | float]],
    tensors: Callable[[int], Mapping[str, Tensor]],
    group: str,
    ttl: float,
) -> list[Message]:
    """One message for each node, with words and tensors of its own; equal tensors are packed once."""
    # with the tensors themselves: what is let go of leaves its identity to the next one
    packed: dict[int, tuple[Mapping[str, Tensor], ArrayRecord]] = {}

    def arrays(node: int) -> ArrayRecord:
        own = tensors(node)
        if id(own) not in packed:
            packed[id(own)] = own, ArrayRecord(dict(own))
        return packed[id(own)][1]

    return [
        Message(
            RecordDict({"words": ConfigRecord(dict(words(node))), "tensors": arrays(node)}),
            dst_node_id=node,
            message_type=_KINDS[kind],
            ttl=ttl,
            group_id=group,
        )
        for node in nodes
    ]


def exchange(
    grid: Grid,
    kind: Kind,
    messages: list[Message],
    timeout: float,
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]],
    largest_norm: float = math.inf,
    bits: int = OFF,
    reference: Callable[[int], Mapping[str, Tensor]] = lambda _: {},
    take: Take | None = None,
) -> Outcome:
    """Send messages and collect the replies that pass the allow-list.

    Args:
        grid: the link to the sites.
        kind: of the exchange.
        messages: one a node.
        timeout: seconds to wait.
        shapes: allowed tensors of a node's reply.
        largest_norm: L2 norm that no honest reply's tensors, taken together, exceed.
        bits: of a number in a reply.
        reference: what a node's reply in few bits is told as a difference from.
        take: is given each node's checked tensors as they come, which are then not kept.

    Returns:
        Answers and absences. Replies are matched by the message they answer: an error's own source is not to be
        trusted.
    """
    waiting = _push(grid, messages)
    replies: dict[int, Reply] = {}
    asked = [message.metadata.dst_node_id for message in messages]
    missing: dict[int, str] = dict.fromkeys(asked, "left the federation")  # Flower takes no message for such a node
    missing |= dict.fromkeys(waiting.values(), "did not answer in time")
    stale: set[int] = set()
    for message in _pull(grid, list(waiting), timeout):
        node = waiting.get(message.metadata.reply_to_message_id)
        if node is None or node in replies:
            continue
        try:
            reply = _read(kind, message, shapes(node), bits, reference(node))
            check_norm(reply.tensors, largest_norm)
            if take is not None:
                take(node, reply.tensors)
                reply = replace(reply, tensors={})
            replies[node] = reply
            missing.pop(node, None)
        except WireError as error:
            missing[node] = str(error)
            if isinstance(error, StaleError):
                stale.add(node)
    sent = {
        message.metadata.dst_node_id: message.content.array_records["tensors"].count_bytes() for message in messages
    }
    return Outcome(replies, missing, sent, frozenset(stale - set(replies)))


def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send; returns message id -> node."""
    nodes = [message.metadata.dst_node_id for message in messages]
    return {identity: node for identity, node in zip(grid.push_messages(messages), nodes, strict=True) if identity}


def _pull(grid: Grid, identities: list[str], timeout: float) -> Iterable[Message]:
    """Yield replies as they come, until all are there or the time is up."""
    open_ids, end, pause = set(identities), time.monotonic() + timeout, _FIRST_POLL_S
    while open_ids:
        for message in grid.pull_messages(sorted(open_ids)):
            open_ids.discard(message.metadata.reply_to_message_id)
            yield message
        if not open_ids or time.monotonic() >= end:
            return
        time.sleep(pause)
        pause = min(pause * 1.2, _LAST_POLL_S)  # each question costs the SuperLink an HTTP request and a query


_FIRST_POLL_S = 0.2
_LAST_POLL_S = 2.0


def check_norm(tensors: Mapping[str, Tensor], largest: float) -> None:
    """Refuse a reply that is larger than any honest one (WireError)."""
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    if not norm <= largest:
        raise WireError(f"sent tensors of norm {norm:.3g}, more than the {largest:.3g} that clipping and noise allow")


def _read(
    kind: Kind,
    message: Message,
    shapes: Mapping[str, tuple[int, ...]],
    bits: int,
    reference: Mapping[str, Tensor],
) -> Reply:
    """The checked content of a reply.

    Raises:
        WireError: it is an error, a refusal, or not what is allowed; the text says which.
    """
    if message.has_error():
        if _APP_REFUSED in (message.error.reason or ""):
            raise WireError("refused the app: its digest is not one that the site approved, so none of it was run")
        raise WireError(_ERROR_CODES.get(message.error.code, f"failed (code {message.error.code})"))
    try:
        words = dict(message.content.config_records.get("words", ConfigRecord()))
        tensors = message.content.array_records.get("tensors", ArrayRecord())
        received = tensors.to_torch_state_dict()
        scores = dict(message.content.metric_records.get("scores", {}))
    except Exception:
        raise WireError("sent something that can't be read") from None
    if "error" in words:
        if set(words) - ERROR_WORDS:
            raise WireError("sent an error with fields that are not on the allow-list")
        advice = _ADVICE.get(str(words["error"]), "")
        error = StaleError if words["error"] == StaleError.code else WireError
        raise error(f"refused: {words['error']} (reference {words.get('reference', 'none')} in its own log){advice}")
    check_words(kind, words)
    if "charged" in words:
        words["charged"] = json.dumps(read_charged(str(words["charged"])))
    check_tensors(kind, received, wire_shapes(shapes, bits))
    if scores and kind != "evaluate":
        raise WireError(f"message {kind}: scores are not on the allow-list; nothing of it is used")
    check_scores(scores)
    told = from_wire(received, shapes, bits, reference)
    return Reply(words, told, {name: float(value) for name, value in scores.items()}, tensors.count_bytes())
