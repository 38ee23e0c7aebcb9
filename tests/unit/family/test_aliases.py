"""The aliases `latest` and `stable`: what moves them, what does not, and the way back."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import BelowGate, CascadeError, InputError, IntegrityError
from cascade.family.aliases import (
    KEPT,
    LATEST,
    STABLE,
    alias_runs,
    held_line,
    promote,
    read_alias,
    require_gate,
    settle,
    stable_index,
)
from cascade.family.space import judge
from cascade.storage.artifacts import publish
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft


class Family:
    """A store with complete builds of one family, as `build` leaves them."""

    def __init__(self, store: Location, work: Path) -> None:
        self.store, self.work, self.count = store, work, 0
        self.place = store / "tiny"

    def build(self, run: str, child: str = "", loss: float = 2.5, **limits: float) -> dict[str, Any]:
        """A build whose one child is new, or that of another."""
        record = {"name": "small", "checkpoint": child or self.child(), "held_out_ce": loss}
        index = {
            "family": "tiny",
            "run": run,
            "parent": {"held_out_ce": 2.0, "tokens_per_second": 1.0},
            "recipe": {"stages": [{"name": "small", "gate": limits}]},
            "stages": [record],
            "artifacts": [{"node": "small/distilled", "uri": record["checkpoint"], "run": "run-0"}],
        }
        place = record["checkpoint"].removeprefix(f"{self.store}/")
        build = {"run": run, "finished": "then", "artifacts": [{"place": place}], "index": index}
        (self.place / "builds" / f"{run}.json").write_bytes(json.dumps(build).encode())
        return index

    def child(self) -> str:
        """The address of a checkpoint."""
        self.count += 1
        key = f"{self.count:012x}".ljust(64, "0")
        place = self.place / "small" / "distilled" / key[:12]
        draft = Draft(kind="distilled", key=key, family="tiny", stage="small", run="run-0")
        publish(self.work, place, draft)
        return place.uri

    def settled(self, run: str, **build: Any) -> tuple[str, ...]:
        """The aliases that a build moves."""
        return settle(self.build(run, **build), self.store).moved


@pytest.fixture(params=["folder", "s3"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    uri = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "weights").write_text("weights")
    return Family(open_location(uri), tmp_path / "work")


def test_a_build_without_limits_becomes_latest_and_stable(family: Family) -> None:
    assert alias_runs(family.place) == {}
    assert stable_index(family.place) is None
    index = family.build("one")
    assert settle(index, family.store).moved == (LATEST, STABLE)
    assert alias_runs(family.place) == {"latest": "one", "stable": "one"}
    alias = read_alias(family.place, STABLE)
    assert alias is not None
    assert alias["index"] == stable_index(family.place) == index
    assert alias["checkpoints"] == {"small": index["stages"][0]["checkpoint"]}


def test_a_gate_that_fails_leaves_stable_alone_and_says_what_fell_short(family: Family) -> None:
    family.settled("one")
    settled = settle(family.build("two", loss=2.75, loss_above_parent=0.5, loss_above_stable=1), family.store)
    assert settled.moved == (LATEST,)
    assert alias_runs(family.place) == {"latest": "two", "stable": "one"}
    with pytest.raises(BelowGate) as caught:
        require_gate(settled, family.store)
    text = str(caught.value)
    assert "small: loss_above_parent is 0.75, at most 0.5" in text
    assert "loss_above_stable" not in text
    assert "`stable` stays at one" in text
    assert f"cascade promote {family.place}" in text
    assert (caught.value.exit_code, caught.value.retryable) == (1, False)


def test_stable_is_what_the_next_build_is_compared_with(family: Family) -> None:
    assert family.settled("one", loss=2.5, loss_above_stable=0.125) == (LATEST, STABLE)
    assert family.settled("two", loss=2.6, loss_above_stable=0.125) == (LATEST, STABLE)
    # 0.25 above the first, which is not stable any more, and less above the second.
    assert family.settled("three", loss=2.7, loss_above_stable=0.125) == (LATEST, STABLE)
    assert family.settled("four", loss=2.9, loss_above_stable=0.125) == (LATEST,)


def test_promotion_by_hand_goes_to_latest_or_to_a_run_whatever_the_gate_says(family: Family) -> None:
    for run in ("one", "two", "three"):
        family.settled(run, loss_above_parent=0.125)
    assert alias_runs(family.place) == {"latest": "three"}
    assert promote(family.place)["run"] == "three"
    assert promote(family.place, "one")["run"] == "one"
    assert alias_runs(family.place) == {"latest": "three", "stable": "one"}


def test_a_rollback_goes_back_step_by_step_until_there_is_no_way(family: Family) -> None:
    for run in ("one", "two", "three"):
        family.settled(run)
    assert promote(family.place, rollback=True)["run"] == "two"
    assert promote(family.place, rollback=True)["run"] == "one"
    with pytest.raises(InputError, match="no way back") as caught:
        promote(family.place, rollback=True)
    assert caught.value.value == "one"
    assert alias_runs(family.place) == {"latest": "three", "stable": "one"}


def test_what_was_rolled_back_stays_away_until_its_children_change_or_a_person_wants_it(
    family: Family,
) -> None:
    child = family.child()
    family.settled("one")
    family.settled("two", child=child)
    promote(family.place, rollback=True)
    held = settle(family.build("three", child=child), family.store)
    assert (held.moved, held.held, held.shortfalls) == ((LATEST,), True, {})
    assert held_line(held, family.store).endswith(f"; cascade promote {family.place} does it")
    assert alias_runs(family.place) == {"latest": "three", "stable": "one"}
    assert promote(family.place, "three")["run"] == "three"
    promote(family.place, rollback=True)
    other = settle(family.build("four"), family.store)
    assert (other.moved, held_line(other, family.store)) == ((LATEST, STABLE), "")


def test_what_was_rolled_back_stays_away_after_other_builds_too(family: Family) -> None:
    first, second = family.child(), family.child()
    family.settled("one", child=first)
    family.settled("two", child=second)
    promote(family.place, rollback=True)
    assert family.settled("three", child=first) == (LATEST, STABLE)
    assert family.settled("four") == (LATEST, STABLE)
    assert settle(family.build("five", child=second), family.store).held


def test_a_build_that_changed_no_child_is_no_earlier_target(family: Family) -> None:
    child = family.child()
    family.settled("one")
    for run in ("two", "three"):
        family.settled(run, child=child)
    assert promote(family.place, rollback=True)["run"] == "one"


def test_earlier_targets_are_few(family: Family) -> None:
    for number in range(KEPT + 3):
        family.settled(f"run-{number}")
    alias = read_alias(family.place, STABLE)
    assert alias is not None
    assert [one["run"] for one in alias["previous"]] == [f"run-{KEPT + 1 - number}" for number in range(KEPT)]


def test_a_run_that_is_unknown_unfinished_or_gone_is_refused(family: Family) -> None:
    with pytest.raises(InputError, match="nothing to promote"):
        promote(family.place)
    family.settled("one")
    (family.place / "builds" / "cut-off.json").write_bytes(b'{"run": "cut-off", "index": null}')
    for run in ("cut-off", "never", "../one", "one.json"):
        with pytest.raises(InputError, match="no complete build") as caught:
            promote(family.place, run)
        assert caught.value.remedy == "give one of: one"
    with pytest.raises(InputError, match="goes to where"):
        promote(family.place, "one", rollback=True)
    index = family.build("two")
    open_location(index["stages"][0]["checkpoint"]).delete_tree()
    with pytest.raises(InputError, match="not in the store any more") as caught:
        promote(family.place, "two")
    assert caught.value.where == index["stages"][0]["checkpoint"]


def test_a_wrong_address_is_refused_and_nothing_is_written_there(family: Family) -> None:
    for rollback in (False, True):
        with pytest.raises(InputError):
            promote(family.store / "tinny", rollback=rollback)
    assert not (family.store / "tinny").listing()


def test_what_is_being_removed_is_not_promoted(family: Family) -> None:
    index = family.build("one")
    collecting = family.store / "shared" / "collecting" / "now"
    place = index["stages"][0]["checkpoint"].removeprefix(f"{family.store}/")
    collecting.write_bytes(json.dumps([place]).encode())
    with pytest.raises(CascadeError, match="is removing"):
        promote(family.place, "one")
    assert read_alias(family.place, STABLE) is None
    settle(family.build("two"), family.store)
    with pytest.raises(CascadeError, match="is removing"):
        promote(family.place, "one")
    assert alias_runs(family.place) == {"latest": "two", "stable": "two"}
    collecting.delete_tree()
    assert promote(family.place, "one")["run"] == "one"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "one"}', '{"run": 1, "index": {"stages": []}}'])
def test_a_damaged_alias_is_named_and_moves_nowhere(family: Family, text: str) -> None:
    family.settled("one")
    place = family.place / "aliases" / "stable.json"
    place.write_bytes(text.encode())
    with pytest.raises(IntegrityError, match="this alias is damaged") as caught:
        settle(family.build("two"), family.store)
    assert caught.value.where == place.uri
    assert alias_runs_of_latest(family) == "one"


def alias_runs_of_latest(family: Family) -> str:
    alias = read_alias(family.place, LATEST)
    assert alias is not None
    return str(alias["run"])


def test_builds_that_end_at_once_move_the_aliases_one_after_the_other(family: Family) -> None:
    indexes = [family.build(f"run-{number}") for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: settle(index, family.store), indexes))
    alias = read_alias(family.place, STABLE)
    assert alias is not None
    named = {alias["run"], *(one["run"] for one in alias["previous"])}
    assert named == {index["run"] for index in indexes}


def test_gc_keeps_what_an_alias_names_and_its_earlier_targets_but_not_all_of_their_makers(
    family: Family,
) -> None:
    # Runs in the order of their names, as real ones are: S3 tells times by the second only.
    lost = family.child()
    maker = {"run": "run-0", "finished": "then"}
    maker["artifacts"] = [{"place": lost.removeprefix(f"{family.store}/")}]
    (family.place / "builds" / "run-0.json").write_bytes(json.dumps(maker).encode())
    kept = [family.build(run)["stages"][0]["checkpoint"] for run in ("run-1", "run-2")]
    for run, child in zip(("run-1", "run-2"), kept, strict=True):
        settle(family.build(run, child=child), family.store)
    # What was rolled back is none, once `latest` has moved on for long enough.
    refused = family.build("run-3")["stages"][0]["checkpoint"]
    settle(family.build("run-3", child=refused), family.store)
    promote(family.place, rollback=True)
    for number in range(4, 5 + KEPT):
        family.settled(f"run-{number}", loss=9.0, loss_above_parent=1.0)
    # Nothing is in the window: all of it was written long ago.
    found = judge(family.store, 30.0, time.time() + 100 * 24 * 3600)
    waste = {(family.store / thing.place).uri for thing in found.waste}
    assert {lost, refused} <= waste
    assert not waste & set(kept)
