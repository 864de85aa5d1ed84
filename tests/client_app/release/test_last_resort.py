"""A step that fails on the records is answered as if there were none: alike in all that a server sees, and charged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client_app.answers import training as work
from client_app.release.last_resort import LOGGED
from common.methods.base import StepInput
from tests.harness import Exchanged, Federation, Killed, words_of


class PanicException(BaseException):
    """As libraries in Rust raise them: no Exception."""


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, fails: Callable[[StepInput], bool]) -> None:
    """Let the first site's step fail for certain input."""
    original = work.get_method

    def broken(name: str) -> Any:
        method = original(name)

        def step(context: Any, given: StepInput) -> Any:
            if given.site_index == 0 and fails(given):
                raise error
            return method.client_step(context, given)

        return replace(method, client_step=step)

    monkeypatch.setattr(work, "get_method", broken)


def seen_of(sent: Exchanged) -> tuple[Any, ...]:
    """What a server sees of a reply but for random numbers: its words, tensors, shapes, types and size."""
    arrays = sent.message.content.array_records.get("tensors", {})
    shapes = sorted((name, tuple(array.shape), array.dtype) for name, array in arrays.items())
    return sorted(words_of(sent.message)), shapes, len(sent.wire)


@pytest.mark.parametrize("error", [RuntimeError("row 17"), MemoryError(), PanicException("row 17")])
def test_step_that_fails_on_records_is_answered_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing(monkeypatch, error, lambda given: len(given.data.labels) > 0)
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=2)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * 2
    for one, other in zip(federation.sent("site-1", "train"), federation.sent("site-2", "train"), strict=True):
        assert seen_of(one) == seen_of(other)
    (run,), (honest,) = (list(site.runs().values()) for site in federation.sites)
    assert run.charged == honest.charged
    assert federation.sites[0].log().count(LOGGED) == 2
    assert LOGGED not in federation.sites[1].log()
    assert "row 17" not in "".join(str(sent.message.content) for sent in federation.sent())


def test_step_that_fails_without_records_too_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is public then: it is the same at every site."""
    failing(monkeypatch, RuntimeError("always"), lambda given: True)
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=1)
    assert summary["rounds_taken_part"] == [["site-2"]]


def test_end_of_the_process_is_no_failure_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, Killed(), lambda given: len(given.data.labels) > 0)
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=1)
    assert summary["rounds_taken_part"] == [["site-2"]]
    assert LOGGED not in federation.sites[0].log()


def test_sums_that_cannot_be_sent_are_answered_with_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step returns is packed under the same cover: else a sum that is not finite would be an answer itself."""
    original = work.client_step

    def broken(place: Any, method: Any, context: Any, given: StepInput) -> Any:
        after, uploads = original(place, method, context, given)
        if given.site_index == 0 and len(given.data.labels) > 0:
            uploads = {name: value / 0.0 for name, value in uploads.items()}
        return after, uploads

    monkeypatch.setattr(work, "client_step", broken)
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=1)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]]
    assert [seen_of(one) for one in federation.sent("site-1", "train")] == [
        seen_of(other) for other in federation.sent("site-2", "train")
    ]
    assert LOGGED in federation.sites[0].log()
