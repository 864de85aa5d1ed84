"""The dataset card in all its forms, and text from elsewhere that stays text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from common.publishing.bundle import load_bundle
from common.publishing.parquet import Written
from deploy.release.describe import Facts, card, croissant, front_matter, plain

SHARED = {
    "colluders_assumed": 1,
    "dropouts_borne": 2,
    "in_words": "A site's own share remains.",
    "epsilon_of_own_share": 4.5,
}


@pytest.fixture
def facts(released: Any) -> Facts:
    statement = json.loads((released.bundle / "privacy_statement.json").read_text())
    return Facts(
        bundle=load_bundle(released.bundle),
        data=Written(60, (20, 20, 20), 1000, "0" * 64),
        statement=statement,
        audits=[statement["audit"]],
        why_none="",
        not_private_because=(),
        name="Embeddings",
        license="cc-by-4.0",
        signed_by="aaaa",
        date="2026-01-01",
    )


def test_card_of_a_private_set_promises(facts: Facts) -> None:
    text, sites = card(facts), facts.statement["sites"]
    largest = max(site["epsilon"] for site in sites.values())
    assert f"({largest:.3f}, 1e-05)-differential privacy" in text
    assert f"| site-1 | {sites['site-1']['epsilon']:.4f} | 1e-05 | 3 |" in text
    assert "NOT PRIVATE" not in text
    assert "encoder `made-up`" in text
    assert "own share" not in text


def test_card_of_a_set_that_is_not_private_promises_nothing(facts: Facts) -> None:
    text = card(replace(facts, not_private_because=["because"]))
    assert "**NOT PRIVATE.**" in text
    assert "-differential privacy, for adding" not in text
    assert "No row is a record" not in text


def test_card_says_why_classes_are_uneven(facts: Facts) -> None:
    assert "uneven" not in card(facts)
    assert "so the classes are uneven" in card(replace(facts, data=Written(60, (40, 15, 5), 1000, "0" * 64)))


def test_card_names_the_assumptions_of_secure_aggregation(facts: Facts) -> None:
    text = card(replace(facts, statement={**facts.statement, "secure_aggregation": SHARED}))
    assert "at most 1 colluding sites and 2 missing ones" in text
    assert "A site's own share remains. Here: 4.500." in text


def test_card_without_encoder_and_audit_says_so(facts: Facts) -> None:
    text = card(replace(facts, bundle=replace(facts.bundle, encoder=None), audits=[], why_none="no training"))
    assert "did not note its encoder" in text
    assert "- none: no training." in text


def test_plain_takes_the_meaning_out_of_text() -> None:
    assert plain("a|b\n# <script> [x](y) `z` *w*") == r"a\|b \# \<script\> \[x\](y) \`z\` \*w\*"


@pytest.mark.parametrize(
    ("rows", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (11_000, "10K<n<100K"), (10**6, "1M<n<10M"), (10**7, "10M<n<100M")],
)
def test_front_matter_sizes(facts: Facts, rows: int, size: str) -> None:
    assert front_matter(replace(facts, data=replace(facts.data, rows=rows)))["size_categories"] == [size]


def test_croissant_name_is_an_identifier(facts: Facts) -> None:
    assert croissant(replace(facts, name="CT: four/hospitals"))["name"] == "CT-four-hospitals"
    assert croissant(replace(facts, name="…"))["name"] == "synthetic-embeddings"
