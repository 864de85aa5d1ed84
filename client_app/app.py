"""The ClientApp: handlers only. Whatever goes wrong, the server learns a code and a reference, never a text with data.

The text of an error, with its traceback, goes to the site's own log under that reference.
"""

from __future__ import annotations

import json
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.answers.scores import answer_evaluate
from client_app.answers.secure_sum import answer_check, answer_keys, answer_masked, answer_shares, answer_unmask
from client_app.answers.training import answer_consent, answer_statistics, answer_train
from client_app.place import Place, find_place
from client_app.policy.asked import read_words, read_work
from client_app.records import read_facts
from client_app.release.egress import check_reply
from client_app.release.schedule import reply_seconds, wait_for_turn
from client_app.site_log import write_log
from client_app.task import Answer, Work
from common.config.run import RunConfig
from common.errors import FedHypeVAEError, PolicyRefusal
from common.wire.allow_list import Kind

ANSWERS: Mapping[Kind, Callable[[Place, Work], Answer]] = {
    "consent": answer_consent,
    "statistics": answer_statistics,
    "secagg_keys": answer_keys,
    "secagg_shares": answer_shares,
    "secagg_check": answer_check,
    "secagg_masked": answer_masked,
    "secagg_unmask": answer_unmask,
}
"""What a site answers to a query within a run; `hello`, training and evaluation have Flower's own forms."""

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say what the site's file holds: encoder, class set, canary; no counts. No record is read."""

    def reply() -> RecordDict:
        words = read_words("hello", message)
        config = RunConfig.from_flat({key.replace("_", "-"): value for key, value in words.items()})
        place = find_place(context.node_config, config)
        metadata = read_facts(place.records, place.cache_dir, place.policy.unit)
        facts = {
            "site": place.name,
            "position": place.position,
            "identity": json.dumps(metadata.identity.to_json()),
            "canary": metadata.canary,
            "public": place.policy.data_is_public,
            "task": metadata.task,
        }
        return RecordDict({"words": ConfigRecord(facts)})

    return _guarded("hello", message, context, reply)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Release one round's noised sums."""
    return _answered("train", answer_train, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score heads on the site's test split; public data only."""

    def reply() -> RecordDict:
        return RecordDict({"scores": MetricRecord(dict(answer_evaluate(*_read("evaluate", message, context))))})

    return _guarded("evaluate", message, context, reply)


def _read(kind: Kind, message: Message, context: Context) -> tuple[Place, Work]:
    """The site and its task; the policy is loaded, no record is."""
    work = read_work(kind, message)
    return find_place(context.node_config, work.context.config), work


def _answered(kind: Kind, answer: Callable[[Place, Work], Answer], message: Message, context: Context) -> Message:
    """The reply to a task of a run: what the site answers, as Flower's records."""

    def reply() -> RecordDict:
        given = answer(*_read(kind, message, context))
        content = RecordDict({"words": ConfigRecord(dict(given.words))})
        if given.tensors:
            content["tensors"] = ArrayRecord(dict(given.tensors))
        return content

    return _guarded(kind, message, context, reply)


for _kind, _answer in ANSWERS.items():
    app.query(_kind)(partial(_answered, _kind, _answer))


def _guarded(kind: Kind, message: Message, context: Context, reply: Callable[[], RecordDict]) -> Message:
    """Run a handler and check what it wants to send; an error becomes a code and a reference.

    Whatever a handler raises stays here: Flower would send its text to the server. Only the end of the process itself
    goes on. What depends on records leaves on the site's schedule, an error in its place likewise.
    """
    arrived, step = time.monotonic(), 0.0
    try:
        step = reply_seconds(context.node_config, kind)
        content = reply()
        check_reply(kind, content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries in Rust raise panics that are no Exception
        reference = secrets.token_hex(4)
        # the log's own failure, such as a console that can't print a letter, must not become the answer
        with suppress(Exception):
            _log(context, reference)
        code = error.code if isinstance(error, FedHypeVAEError) else "failure"
        if isinstance(error, PolicyRefusal):
            code = f"{code}:{error.rule}"
        content = RecordDict({"words": ConfigRecord({"error": code, "reference": reference})})
    wait_for_turn(arrived, step)
    return Message(content, reply_to=message)


def _log(context: Context, reference: str) -> None:
    """Write the whole error to the site's own log."""
    folder = context.node_config.get("data-dir")
    write_log(None if folder is None else Path(str(folder)), f"reference {reference}\n{traceback.format_exc()}")
