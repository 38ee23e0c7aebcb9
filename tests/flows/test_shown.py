"""What a real server, and whoever browses the store, got of a build: cards, events, a readable log."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import Artifact
from prefect.settings import PREFECT_UI_URL

from cascade.family.audit import audit
from cascade.family.repair import repair
from cascade.recipe import Options, Recipe
from cascade.recipe_files import load_recipe
from cascade.storage.locations import open_location
from flows.family import build_family
from tests.flows.seen import artifacts, events_of, log_lines, wait_for_events
from tests.tiny_family import tiny_tree
from tests.waiting import wait_until

FAMILY = "shown"


class Shown(NamedTuple):
    """Of one flow run: the index, its artifacts, and its log lines."""

    index: dict[str, Any]
    artifacts: dict[str, Artifact]
    lines: list[str]


class Built(NamedTuple):
    """A family that was built twice through the flow; the second time everything was there."""

    recipe: Recipe
    store: Path
    first: Shown
    again: Shown
    events: list[dict[str, Any]]


def shown(*arguments: object) -> Shown:
    """Run the flow; wait for its last line, which the server gets in the background."""
    build: Callable[..., Any] = build_family
    state = build(*arguments, return_state=True)
    # Not before: the server closes what is idle while the family is built.
    with get_client(sync_client=True) as client:
        return shown_of(client, state)


def shown_of(client: SyncPrefectClient, state: State[Any]) -> Shown:
    """What the server has of a run that has ended."""
    run = UUID(str(state.state_details.flow_run_id))
    # Tasks say that they finished, too.
    ends = ["make it again", "Finished in s"]
    assert wait_until(lambda: [line[:13] for line in log_lines(client, run)[-2:]] == ends)
    found = artifacts(client, run)
    keys = [str(artifact.key) for artifact in found]
    assert len(keys) == len(set(keys))
    return Shown(state.result(), dict(zip(keys, found, strict=True)), log_lines(client, run))


@pytest.fixture(scope="module")
def built(
    prefect_server: str, tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Built:
    folder = tmp_path_factory.mktemp("shown")
    tree = tiny_tree(tiny_parent, tiny_corpus) | {"family": FAMILY}
    tree["stages"] = tree["stages"][1:]
    # A path that a shell would split.
    recipe, store = Recipe.model_validate(tree), folder / "the store"
    options = Options(cache=str(folder / "cache"))
    first = shown(recipe, str(store), options)
    again = shown(recipe, str(store), options)
    with get_client(sync_client=True) as client:
        assert wait_until(lambda: len(events_of(client, FAMILY)) >= 6)
        # Whatever is too many, too.
        wait_for_events(client)
        return Built(recipe, store, first, again, events_of(client, FAMILY))


def test_the_cards_are_shown_and_stored(built: Built) -> None:
    cards = {key: artifact for key, artifact in built.first.artifacts.items() if artifact.type == "markdown"}
    assert set(cards) == {"shown-small", "shown-family"}
    stage = built.first.index["stages"][0]
    for key, path in (("shown-small", "small/card.md"), ("shown-family", "card.md")):
        inside, beside = str(cards[key].data), (built.store / FAMILY / path).read_text()
        assert stage["checkpoint"] in inside
        # The same text, but that one has its pictures inside and the other beside it.
        assert inside.count("](data:image/svg+xml;base64,") == 1
        (picture,) = re.findall(r"^!\[.*\]\((\w+\.svg)\)$", beside, re.M)
        assert (built.store / FAMILY / path).with_name(picture).read_text().startswith("<svg ")
        assert re.sub(r"\(data:[^)]*\)", f"({picture})", inside).replace("| made |", "| reused |") == (
            beside.replace(built.again.index["run"], built.first.index["run"])
        )


def test_a_build_that_finds_everything_shows_every_card_once_more(built: Built) -> None:
    assert all(artifact["reused"] for artifact in built.again.index["artifacts"])
    assert set(built.again.artifacts) == {"shown-small", "shown-family"}
    assert "| reused |" in str(built.again.artifacts["shown-family"].data)


def test_the_log_is_short_and_ends_with_where_to_look_and_what_to_type(built: Built) -> None:
    place = f"{built.store}/{FAMILY}"
    for found in (built.first, built.again):
        ours = [line for line in found.lines if line.startswith(("the family is at", "its card", "make it"))]
        card = found.artifacts["shown-family"].id
        assert ours == [
            f"the family is at {place}; show it with: cascade show '{place}'",
            f"its card: {PREFECT_UI_URL.value()}/v2/artifacts/artifact/{card} and {place}/card.md",
            f"make it again, or go on with it: cascade build '{place}/recipe.yaml' --store '{built.store}'",
        ]
        assert found.lines.index(ours[-1]) == len(found.lines) - 2
    # 8 nodes: a few lines each, whatever their length.
    assert len(built.first.lines) < 80
    assert len(built.again.lines) < 30


def test_the_command_in_the_log_makes_the_same_family(built: Built) -> None:
    assert load_recipe(str(built.store / FAMILY / "recipe.yaml")) == built.recipe


def test_a_recipe_is_read_from_a_bucket_too(built: Built, s3: str) -> None:
    place = open_location(s3) / "recipe.yaml"
    place.write_bytes((built.store / FAMILY / "recipe.yaml").read_bytes())
    assert load_recipe(place.uri) == built.recipe


def test_events_tell_what_was_made_and_what_was_there(built: Built) -> None:
    told = [(event["event"], event["payload"]["run"]) for event in built.events]
    first, again = built.first.index["run"], built.again.index["run"]
    assert told == [
        ("cascade.stage.started", first),
        ("cascade.stage.completed", first),
        ("cascade.family.completed", first),
        ("cascade.family.promoted", first),
        ("cascade.stage.reused", again),
        ("cascade.family.completed", again),
    ]
    completed = built.events[1]
    stage = built.first.index["stages"][0]
    for name in ("checkpoint", "parameters", "held_out_ce", "kl_to_parent", "tokens_trained"):
        assert completed["payload"][name] == stage[name]
    assert completed["payload"]["store"] == str(built.store)
    related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in completed["related"]}
    assert related["cascade-family"] == f"cascade.family.{FAMILY}"
    assert related["flow-run"].startswith("prefect.flow-run.")


def test_verify_and_repair_leave_cards_alone(built: Built) -> None:
    place = open_location(str(built.store))
    before = {path: (built.store / path).read_bytes() for path in place.walk()}
    assert audit(place).problems == []
    assert repair(place).moved == []
    assert {path: (built.store / path).read_bytes() for path in place.walk()} == before
