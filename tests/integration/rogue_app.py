"""A hostile site for the tests: runs the approved app, then puts garbage in place of its reply to a training message.

Used as `flwr-clientapp`; the kind of garbage changes with the round, so that one run shows all kinds.
"""

from __future__ import annotations

import sys

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

KINDS = ("not finite", "wrong shape", "wrong name", "wrong dtype", "huge")


def spoil(message: Message) -> None:
    """Replace the tensors of a reply."""
    round_number = int(message.metadata.group_id.removeprefix("round-"))
    kind = KINDS[(round_number - 1) % len(KINDS)]
    tensors = {name: array.numpy() for name, array in message.content.array_records["tensors"].items()}
    first = sorted(tensors)[0]
    if kind == "not finite":
        tensors[first] = np.full_like(tensors[first], np.nan)
    elif kind == "wrong shape":
        tensors[first] = np.zeros((3, 3, 3), np.float32)
    elif kind == "wrong name":
        tensors["../../etc/passwd"] = tensors.pop(first)
    elif kind == "wrong dtype":
        tensors[first] = tensors[first].astype(np.float64)
    else:
        tensors = {name: np.full_like(value, 1e30) for name, value in tensors.items()}
    message.content["tensors"] = ArrayRecord({name: Array(value) for name, value in tensors.items()})


def main() -> None:
    push = run_clientapp.push_message

    def spoiled(client: object, message: Message, context: object) -> None:
        if message.has_content() and message.metadata.group_id.startswith("round-"):
            spoil(message)
        push(client, message, context)

    run_clientapp.push_message = spoiled
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


if __name__ == "__main__":
    main()
