"""Privacy events: one canonical text each, and nothing malformed gets in."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy.events import PrivacyEvent, gaussian, mechanism_counts, sampled_gaussian

CANONICAL = '{"count":50,"kind":"sampled_gaussian","label":"steps","noise_multiplier":2.5,"sampling_rate":0.1}'

events = st.one_of(
    st.builds(
        sampled_gaussian,
        st.floats(0.0, 1e9),
        st.floats(0.0, 1.0, exclude_min=True),
        count=st.integers(1, 10**7),
        label=st.text(st.characters(categories=["L", "N"]), max_size=20),
    ),
    st.builds(gaussian, st.floats(0.0, 1e9), count=st.integers(1, 10**7)),
)


def test_to_json_is_the_canonical_text() -> None:
    assert sampled_gaussian(2.5, 0.1, count=50, label="steps").to_json() == CANONICAL


@given(events)
def test_event_json_round_trip(event: PrivacyEvent) -> None:
    assert PrivacyEvent.from_json(event.to_json()) == event


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        CANONICAL + " ",
        CANONICAL.replace(",", ", "),
        CANONICAL.replace('"count":50', '"count":50.0'),
        CANONICAL.replace('"count":50', '"count":true'),
        CANONICAL.replace('"count":50', '"count":"50"'),
        CANONICAL.replace('"count":50', '"count":0'),
        CANONICAL.replace('"count":50', '"count":-1'),
        CANONICAL.replace('"count":50', '"count":50,"count":50'),
        CANONICAL.replace('"count":50,', ""),
        CANONICAL.replace('"count":50', '"count":50,"epsilon":1'),
        CANONICAL.replace("sampled_gaussian", "laplace"),
        CANONICAL.replace("sampled_gaussian", "gaussian"),
        CANONICAL.replace("2.5", "NaN"),
        CANONICAL.replace("2.5", "Infinity"),
        CANONICAL.replace("2.5", "-2.5"),
        CANONICAL.replace("2.5", "2.50"),
        CANONICAL.replace("2.5", '"2.5"'),
        CANONICAL.replace("0.1", "0.0"),
        CANONICAL.replace("0.1", "1.5"),
        CANONICAL.replace('"steps"', "null"),
        CANONICAL.replace('"steps"', '"a\\nb"'),
        CANONICAL.replace('"steps"', '"' + "a" * 201 + '"'),
        CANONICAL[:-1],
    ],
)
def test_from_json_refuses_what_to_json_would_not_write(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        PrivacyEvent.from_json(text)


@pytest.mark.parametrize("value", [None, 3, b"{}", {}])
def test_from_json_refuses_what_is_not_text(value: Any) -> None:
    with pytest.raises(ConfigError):
        PrivacyEvent.from_json(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "laplace"),
        ("kind", None),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("noise_multiplier", 1.1e9),
        ("noise_multiplier", 10**400),
        ("noise_multiplier", True),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.0000001),
        ("sampling_rate", math.nan),
        ("count", 0),
        ("count", 1.0),
        ("count", 10**7 + 1),
        ("label", None),
        ("label", "tab\t"),
    ],
)
def test_event_refuses_fields_out_of_range(field: str, value: Any) -> None:
    fields: dict[str, Any] = json.loads(CANONICAL)
    fields[field] = value
    with pytest.raises(ConfigError, match=field.replace("_", ".")):
        PrivacyEvent(**fields)


def test_event_is_frozen() -> None:
    with pytest.raises(AttributeError):
        gaussian(1.0).noise_multiplier = 2.0  # type: ignore[misc]


def test_equal_values_of_other_types_are_one_event_with_one_text() -> None:
    assert gaussian(3, label="x").to_json() == gaussian(3.0, label="x").to_json()
    assert gaussian(-0.0).to_json() == gaussian(0.0).to_json()


def test_mechanism_counts_adds_equal_mechanisms_and_takes_rate_one_for_gaussian() -> None:
    counted = mechanism_counts(
        [
            sampled_gaussian(2.0, 0.5, count=3),
            gaussian(1.0),
            sampled_gaussian(1.0, 1.0, count=4),
            gaussian(2.0),
        ]
    )
    assert counted == ((1.0, 1.0, 5), (2.0, 0.5, 3), (2.0, 1.0, 1))
    assert mechanism_counts([]) == ()
