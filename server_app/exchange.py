"""One exchange with the sites: send, wait, check, and sort out who answered and who did not, and why.

A reply is checked (`server_app.replies`) before anything of it is used, and none is counted twice.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from httpx import HTTPError
from torch import Tensor

from common.errors import WireError
from common.wire.allow_list import Kind
from server_app.charges import NO_CHARGES, Charges
from server_app.replies import LEFT, UNREADABLE, Declined, Expected, Refused, Reply, Shapes, read_reply

Fields = Mapping[str, str | int | float]
"""What a message says beside its tensors, by name."""
Take = Callable[[int, Mapping[str, Tensor]], None]
"""Takes in what a node sent."""
Check = Callable[[Mapping[str, Tensor]], None]
"""Raises WireError for tensors that no honest site sends."""

_KINDS: dict[Kind, str] = {
    "hello": "query.hello",
    "consent": "query.consent",
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
        refused: those that refuse the task.
    """

    replies: Mapping[int, Reply]
    missing: Mapping[int, str]
    bytes_down: Mapping[int, int]
    broke: frozenset[int] = frozenset()
    refused: frozenset[int] = frozenset()


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


@dataclass(frozen=True)
class Exchange:
    """Messages that go out together, and what a reply to each may hold.

    Attributes:
        kind: of the messages.
        messages: one a node.
        shapes: allowed tensors of a node's reply.
        check: raises WireError for tensors that no honest site sends, however right their form is.
        take: is given each node's checked tensors as they come, which are then not kept.
        charges: what a node can have been charged in this run.
    """

    kind: Kind
    messages: Sequence[Message]
    shapes: Callable[[int], Shapes] = lambda _: {}
    check: Check = lambda _: None
    take: Take | None = None
    charges: Callable[[int], Charges] = lambda _: NO_CHARGES

    def read(self, replies: Iterable[Message]) -> Outcome:
        """Sort out who answered by the rules, and who did not and why.

        A reply that breaks a rule costs its sender its answer, and nobody else anything. So does one that the server
        can't handle for whatever reason: that may be the server's own fault, so its whole traceback is printed.

        Args:
            replies: as they come, from `receive` or from Flower's own loop. They are matched by the message they
                answer: an error's own source is not to be trusted. None is counted twice.
        """
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in self.messages}
        answers: dict[int, Reply] = {}
        missing = dict.fromkeys(nodes.values(), "did not answer in time")
        broke: set[int] = set()
        refused: set[int] = set()
        for message in replies:
            node = nodes.get(message.metadata.reply_to_message_id)
            if node is None or node in answers or not _is_from(message, node):
                continue
            try:
                answers[node] = self._read_one(node, message)
                missing.pop(node, None)
            except WireError as error:
                missing[node] = str(error)
                if isinstance(error, Refused):
                    refused.add(node)
                elif not isinstance(error, Declined):
                    broke.add(node)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # libraries in Rust raise panics that are no Exception
                missing[node] = f"sent something that the server can't handle ({type(error).__name__}, see its log)"
                broke.add(node)
                report(node, self.kind)
        sent = {one.metadata.dst_node_id: one.content.array_records["tensors"].count_bytes() for one in self.messages}
        return Outcome(answers, missing, sent, frozenset(broke - set(answers)), frozenset(refused - set(answers)))

    def _read_one(self, node: int, message: Message) -> Reply:
        reply = read_reply(message, Expected(self.kind, self.shapes(node), self.charges(node), len(self.messages)))
        self.check(reply.tensors)
        if self.take is None:
            return reply
        self.take(node, reply.tensors)
        return replace(reply, tensors={})


def receive(grid: Grid, messages: Sequence[Message], timeout: float) -> Iterator[Message]:
    """Send messages; the replies then come one by one, until all are there or the time is up.

    Each reply is asked for by itself: Flower decodes what it pulls, and one that can't be decoded would take those
    pulled with it along. Such a reply, and one of a node that Flower knows no more, comes as an error of ours.

    Args:
        grid: the link to the sites.
        messages: one a node.
        timeout: seconds to wait.
    """
    sent = list(zip(grid.push_messages(messages), messages, strict=True))
    gone = [Message(Error(LEFT, ""), reply_to=message) for identity, message in sent if not identity]
    return chain(gone, _pull(grid, {identity: message for identity, message in sent if identity}, timeout))


def _pull(grid: Grid, waiting: dict[str, Message], timeout: float) -> Iterator[Message]:
    start, pause = time.monotonic(), _FIRST_POLL_S
    while waiting:
        before = time.monotonic()
        for identity, message in sorted(waiting.items()):
            for reply in _pull_one(grid, identity, message):
                if _is_from(reply, message.metadata.dst_node_id):
                    waiting.pop(identity, None)
                yield reply
        if not waiting or time.monotonic() >= start + timeout:
            return
        # each question costs the SuperLink an HTTP request and a query: no more time goes into asking than into waiting
        time.sleep(max(pause, time.monotonic() - before))
        pause = min(pause * 1.2, _LAST_POLL_S)


def _pull_one(grid: Grid, identity: str, message: Message) -> list[Message]:
    """The replies to one message; an error of ours where Flower can't decode what came."""
    try:
        found = grid.pull_messages([identity])
        return [reply for reply in found if reply.metadata.reply_to_message_id == identity]
    except (OSError, HTTPError):
        raise  # the link to the SuperLink, no site's fault
    except Exception:
        report(message.metadata.dst_node_id, "the last message")
        return [Message(Error(UNREADABLE, ""), reply_to=message)]


def _is_from(message: Message, node: int) -> bool:
    """Whether a reply is the node's own, or an error in its place."""
    return message.has_error() or message.metadata.src_node_id == node


def report(node: int, kind: str) -> None:
    """Print the traceback of what a node's reply did to the server; an error may quote the reply, so printable text."""
    text = traceback.format_exc()[-_LONGEST_REPORT:]
    shown = "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
    print(f"the reply of node {node} to {kind} can't be handled:\n{shown}", flush=True)


_LONGEST_REPORT = 20_000  # characters
_FIRST_POLL_S = 0.2
_LAST_POLL_S = 2.0
