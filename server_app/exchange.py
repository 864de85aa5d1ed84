"""One exchange with the sites: send, wait, check, and sort out who answered and who did not, and why.

A reply is checked (`server_app.replies`) before anything of it is used, and none is counted twice.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from httpx import HTTPError
from torch import Tensor

from common.errors import WireError
from common.wire.allow_list import Kind
from server_app.charges import NO_CHARGES, Charges
from server_app.replies import Declined, Expected, Reply, Shapes, read_reply

Fields = Mapping[str, str | int | float]
"""What a message says beside its tensors, by name."""
Take = Callable[[int, Mapping[str, Tensor]], None]
"""Takes in what a node sent."""
Check = Callable[[Mapping[str, Tensor]], None]
"""Raises WireError for tensors that no honest site sends."""

_KINDS: dict[Kind, str] = {
    "hello": "query.hello",
    "statistics": "query.statistics",
    "train": "train",
    "evaluate": "evaluate",
    "secagg_keys": "query.secagg_keys",
    "secagg_shares": "query.secagg_shares",
    "secagg_check": "query.secagg_check",
    "secagg_masked": "query.secagg_masked",
    "secagg_unmask": "query.secagg_unmask",
}


@dataclass(frozen=True)
class Outcome:
    """An exchange with some sites.

    Attributes:
        replies: answers that passed the checks, by node.
        missing: why the others have none.
        bytes_down: bytes sent to each.
        broke: those whose answer broke a rule; `missing` says which.
    """

    replies: Mapping[int, Reply]
    missing: Mapping[int, str]
    bytes_down: Mapping[int, int]
    broke: frozenset[int] = frozenset()


def build_messages(
    kind: Kind,
    nodes: Iterable[int],
    fields: Callable[[int], Fields],
    tensors: Callable[[int], Mapping[str, Tensor]],
    group: str,
    ttl: float,
) -> list[Message]:
    """One message for each node, with fields and tensors of its own; equal tensors are packed once."""
    # with the tensors themselves: what is let go of leaves its identity to the next one
    packed: dict[int, tuple[Mapping[str, Tensor], ArrayRecord]] = {}

    def arrays(node: int) -> ArrayRecord:
        own = tensors(node)
        if id(own) not in packed:
            packed[id(own)] = own, ArrayRecord(dict(own))
        return packed[id(own)][1]

    return [
        Message(
            RecordDict({"words": ConfigRecord(dict(fields(node))), "tensors": arrays(node)}),
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
    shapes: Callable[[int], Shapes],
    check: Check = lambda _: None,
    take: Take | None = None,
    charges: Callable[[int], Charges] = lambda _: NO_CHARGES,
) -> Outcome:
    """Send messages and collect the replies that keep the rules.

    A reply that breaks one costs its sender its answer, and nobody else anything. So does one that the server can't
    handle for whatever reason: that may be the server's own fault, so its whole traceback is printed.

    Args:
        grid: the link to the sites.
        kind: of the exchange.
        messages: one a node.
        timeout: seconds to wait.
        shapes: allowed tensors of a node's reply.
        check: raises WireError for tensors that no honest site sends, however right their form is.
        take: is given each node's checked tensors as they come, which are then not kept.
        charges: what a node can have been charged in this run.

    Returns:
        Answers and absences. Replies are matched by the message they answer: an error's own source is not to be
        trusted.
    """
    waiting = _push(grid, messages)
    replies: dict[int, Reply] = {}
    asked = [message.metadata.dst_node_id for message in messages]
    missing: dict[int, str] = dict.fromkeys(asked, "left the federation")  # Flower takes no message for such a node
    missing |= dict.fromkeys(waiting.values(), "did not answer in time")
    broke: set[int] = set()
    for node, message in _pull(grid, waiting, timeout):
        if node in replies:
            continue
        try:
            if message is None:
                raise WireError("sent something that can't be read")
            reply = read_reply(message, Expected(kind, shapes(node), charges(node), len(messages)))
            check(reply.tensors)
            if take is not None:
                take(node, reply.tensors)
                reply = replace(reply, tensors={})
            replies[node] = reply
            missing.pop(node, None)
        except Declined as error:
            missing[node] = str(error)
        except WireError as error:
            missing[node] = str(error)
            broke.add(node)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # libraries in Rust raise panics that are no Exception
            missing[node] = f"sent something that the server can't handle ({type(error).__name__}, see its log)"
            broke.add(node)
            report(node, kind)
    sent = {
        message.metadata.dst_node_id: message.content.array_records["tensors"].count_bytes() for message in messages
    }
    return Outcome(replies, missing, sent, frozenset(broke - set(replies)))


def report(node: int, kind: str) -> None:
    """Print the traceback of what a node's reply did to the server; an error may quote the reply, so printable text."""
    text = traceback.format_exc()[-_LONGEST_REPORT:]
    shown = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
    print(f"the reply of node {node} to {kind} can't be handled:\n{shown}", flush=True)


def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send; returns message id -> node."""
    nodes = [message.metadata.dst_node_id for message in messages]
    return {identity: node for identity, node in zip(grid.push_messages(messages), nodes, strict=True) if identity}


def _pull(grid: Grid, waiting: Mapping[str, int], timeout: float) -> Iterator[tuple[int, Message | None]]:
    """Yield node and reply as they come, until all are there or the time is up.

    Each reply is asked for by itself: Flower decodes what it pulls, and one that can't be decoded would take those
    pulled with it along. Such a reply is None.
    """
    open_ids, start, pause = dict(waiting), time.monotonic(), _FIRST_POLL_S
    while open_ids:
        before = time.monotonic()
        for identity, node in sorted(open_ids.items()):
            for message in _pull_one(grid, identity, node):
                if message is None or message.has_error() or message.metadata.src_node_id == node:
                    open_ids.pop(identity, None)
                    yield node, message
        if not open_ids or time.monotonic() >= start + timeout:
            return
        # each question costs the SuperLink an HTTP request and a query: no more time goes into asking than into waiting
        time.sleep(max(pause, time.monotonic() - before))
        pause = min(pause * 1.2, _LAST_POLL_S)


def _pull_one(grid: Grid, identity: str, node: int) -> list[Message | None]:
    """The replies to one message; [None] where Flower can't decode what came."""
    try:
        found = grid.pull_messages([identity])
        return [message for message in found if message.metadata.reply_to_message_id == identity]
    except (OSError, HTTPError):
        raise  # the link to the SuperLink, no site's fault
    except Exception:
        report(node, "the last message")
        return [None]


_LONGEST_REPORT = 20_000  # characters
_FIRST_POLL_S = 0.2
_LAST_POLL_S = 2.0
