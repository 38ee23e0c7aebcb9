"""What a build shows in Prefect, and what its tasks retry."""

from __future__ import annotations

import logging
from typing import Any, cast

import httpx
import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Failed

from cascade.console import race_columns, race_rows
from cascade.errors import CascadeError, InputError, IntegrityError, Interrupted, MachineFault, StorageFault
from flows import publish
from flows.publish import family_card, markdown_table, publish_index
from flows.tasks import run_node, worth_retrying

INDEX: dict[str, Any] = {
    "family": "tiny",
    "parent": {"parameters": 1000, "held_out_ce": 2.5, "tokens_per_second": 100.0},
    "stages": [
        {
            "name": "small",
            "checkpoint": "s3://bucket/tiny/small/distilled/0123456789ab",
            "parameters": 500,
            "pruned_held_out_ce": 4.0,
            "held_out_ce": 3.0,
            "kl_to_parent": 0.4,
            "top1_agreement": 0.755,
            "tokens_per_second": 150.0,
            "tokens_trained": 4096,
            "seconds": 12.0,
            "reused": True,
        }
    ],
}


SIZES = {"layers": 3, "hidden": 64, "ffn": 96, "kv_groups": 2, "heads_per_group": 2, "experts": 0}
RACE = [
    {"architecture": SIZES, "parameters": 500, "curve": [{"tokens": 64, "ce": 4.5, "kl": 1.0}], "won": False},
    {
        "architecture": SIZES | {"layers": 2},
        "parameters": 510,
        "curve": [{"tokens": 64, "ce": 4.25, "kl": 1.0}, {"tokens": 128, "ce": 4.0, "kl": 0.9}],
        "won": True,
    },
]


def test_a_race_is_a_table_with_a_column_for_every_leg() -> None:
    stage = INDEX["stages"][0] | {"race": RACE}
    assert race_columns(stage) == ["shape", "parameters", "CE at 64 tokens", "CE at 128 tokens", "outcome"]
    assert race_rows(stage) == [
        ["2 layers, hidden 64, FFN 96, 4 heads in 2 groups", "510", "4.250", "4.000", "won"],
        ["3 layers, hidden 64, FFN 96, 4 heads in 2 groups", "500", "4.500", "", "out after 64 tokens"],
    ]
    lines = markdown_table(race_columns(stage), race_rows(stage)).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StorageFault("x"), True),
        (MachineFault("x"), True),
        (Interrupted("x"), True),
        (InputError("x"), False),
        (IntegrityError("x"), False),
        (CascadeError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_only_faults_of_storage_and_machines_are_retried(error: Exception, again: bool) -> None:
    state = Failed(data=error)
    assert worth_retrying(run_node, cast(TaskRun, None), state) is again


def test_the_family_card_is_a_markdown_table_with_the_uris_as_code() -> None:
    lines = family_card(INDEX).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "| small | 500 | 4.000 | 3.000 | 0.400 | 75.5 % | 150 | 4,096 | 12 | reused |" in table
    assert "- small: `s3://bucket/tiny/small/distilled/0123456789ab`" in lines


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("connection refused"), httpx.ReadTimeout("slow"), ObjectNotFound(OSError())]
)
def test_a_family_that_cannot_be_shown_is_one_warning(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(publish, "create_table_artifact", fail)
    monkeypatch.setattr(publish, "create_markdown_artifact", fail)
    monkeypatch.setattr(publish, "get_run_logger", lambda: logging.getLogger("test"))
    publish_index(INDEX)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the work goes on" in record.message
    assert type(error).__name__ in record.message
