"""The flow, built again and again: only what is needed is done, and the gate decides what is stable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import State
from prefect.client.orchestration import get_client

from cascade.errors import BelowGate, InputError, IntegrityError, MachineFault
from cascade.family.aliases import alias_runs, read_alias
from cascade.family.index import read_index
from cascade.family.job import Job
from cascade.family.runner import Outcome
from cascade.recipe import Options, Recipe
from cascade.storage.artifacts import read_manifest
from cascade.storage.locations import open_location
from flows.family import build_family, run_as_task
from flows.operations import collect_garbage, evaluate_family, promote, rebuild_stage
from tests.e2e.conftest import Command, command
from tests.flows.seen import events, wait_for_events
from tests.tiny import make_corpus, make_parent
from tests.tiny_family import brief_tree, write_recipe
from tests.waiting import wait_until

__all__ = ["command"]

Json = dict[str, Any]


class Home:
    """A family on this machine, whose parent and corpus a test may change."""

    def __init__(self, folder: Path) -> None:
        self.parent = make_parent(folder / "parent")
        self.corpus = make_corpus(folder / "corpus.jsonl")
        self.store = str(folder / "store")
        self.options = Options(cache=str(folder / "cache"))
        self.place = open_location(self.store) / "tiny"

    def recipe(self, change: Callable[[Json], object] = lambda tree: None) -> Recipe:
        """The recipe, with a change."""
        tree = brief_tree(self.parent, self.corpus)
        change(tree)
        return Recipe.model_validate(tree)

    def build(self, change: Callable[[Json], object] = lambda tree: None) -> Json:
        """Build it in the flow."""
        return build_family(self.recipe(change), self.store, self.options)


def made(index: Json) -> list[str]:
    """The nodes that were not reused."""
    return [artifact["node"] for artifact in index["artifacts"] if not artifact["reused"]]


SMALL = ["small/importance", "small/pruned", "small/distilled", "small/evaluated"]
LARGE = [name.replace("small", "large") for name in SMALL]
TRUNK = ["parent/corpus", "parent/parent", "parent/signals", "parent/evaluated"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Home:
    """A family that is built; the tests of this file leave its children as they are."""
    home = Home(tmp_path_factory.mktemp("family"))
    index = home.build()
    assert made(index) == TRUNK + LARGE + SMALL
    assert told("cascade.family.promoted", index["run"])[0]["payload"]["alias"] == "stable"
    return home


def test_nothing_changed_and_every_node_is_reused_in_seconds(home: Home) -> None:
    before = alias_runs(home.place)
    started = time.monotonic()
    index = home.build()
    assert made(index) == []
    # Seconds, on a machine that is not busy; its children take minutes there otherwise.
    assert time.monotonic() - started < 120
    assert alias_runs(home.place) == {"latest": index["run"], "stable": index["run"]} != before
    # The same children are no promotion: an automation that builds after one would never end.
    assert told("cascade.family.completed", index["run"])
    assert not told("cascade.family.promoted", index["run"], none=True)


def test_another_limit_reuses_everything_and_one_that_is_not_kept_fails_the_run(home: Home) -> None:
    stable = alias_runs(home.place)["stable"]

    def limits(tree: Json) -> None:
        tree["stages"][0]["gate"] = {"top1_agreement": 0.0}
        tree["stages"][1]["gate"] = {"parameters": "10k", "kl_to_parent": 100}

    state: State[Any] = build_family(home.recipe(limits), home.store, home.options, return_state=True)
    index = read_index(home.place)
    assert made(index) == []
    assert [row["passed"] for row in index["gate"]] == [True, True, False]
    assert alias_runs(home.place) == {"latest": index["run"], "stable": stable}

    assert (state.type.value, state.name) == ("FAILED", "Failed")
    assert isinstance(state.result(raise_on_failure=False), BelowGate)
    message = str(state.message)
    assert f"small: parameters is {index['stages'][1]['parameters']:,}, at most 10,000" in message
    assert f"`stable` stays at {stable}" in message
    assert "cascade promote" in message

    rejected = told("cascade.stage.rejected", index["run"])
    assert [event["payload"]["stage"] for event in rejected] == ["small"]
    assert [row["figure"] for row in rejected[0]["payload"]["shortfalls"]] == ["parameters"]
    assert not told("cascade.family.promoted", index["run"], none=True)


def told(name: str, run: str, *, none: bool = False) -> list[Json]:
    """The events of a build, which the server stores a little after they were emitted.

    none: there should be none; what was emitted until now is waited for.
    """

    def found() -> list[Json]:
        return [
            event for event in events(client, {"event": {"name": [name]}}) if event["payload"]["run"] == run
        ]

    with get_client(sync_client=True) as client:
        if none:
            wait_for_events(client)
        else:
            assert wait_until(lambda: bool(found()))
        return found()


def test_the_command_line_says_what_fell_short_and_promotes_all_the_same(
    home: Home, command: Command, tmp_path: Path
) -> None:
    tree = brief_tree(home.parent, home.corpus)
    tree["stages"][1]["gate"] = {"parameters": "10k"}
    file = write_recipe(tmp_path / "tiny.yaml", tree)
    stable = alias_runs(home.place)["stable"]
    code, said = command("build", str(file), "--direct", "--store", home.store)
    assert code == 1
    # What was built is shown, and where it is, before what is wrong with it.
    assert f"small: {read_index(home.place)['stages'][1]['checkpoint']}" in said
    assert "error: the family is built and stored, but does not pass its gate" in said
    assert "small: parameters is" in said
    latest = alias_runs(home.place)["latest"]
    assert latest != stable
    code, said = command("show", home.place.uri)
    assert (code, said.splitlines()[-2:]) == (0, [f"latest: {latest}", f"stable: {stable}"])
    code, said = command("show", home.place.uri, "--json")
    assert json.loads(said)["aliases"] == {"latest": latest, "stable": stable}
    code, said = command("promote", home.place.uri)
    assert (code, said.splitlines()) == (0, [f"latest: {latest}", f"stable: {latest}"])
    code, said = command("promote", home.place.uri, "--run", "nobody")
    assert code == 2
    assert "no complete build of this name" in said


@pytest.mark.slow
def test_promotion_and_rollback_are_one_step_in_the_flow_and_on_the_command_line(
    home: Home, command: Command
) -> None:
    passed = home.build()["run"]

    def other(tree: Json) -> None:
        tree["stages"][1]["prune"]["ratio"] = 0.6
        tree["stages"][1]["gate"] = {"parameters": 1}

    with pytest.raises(BelowGate):
        home.build(other)
    index = read_index(home.place)
    assert {"small/pruned", "small/distilled"} <= set(made(index)) <= set(SMALL)
    assert alias_runs(home.place) == {"latest": index["run"], "stable": passed}

    assert promote(home.store, "tiny")["run"] == index["run"]
    assert told("cascade.family.promoted", index["run"])
    code, said = command("show", home.place.uri)
    assert code == 0
    assert f"stable: {index['run']}" in said
    code, said = command("promote", home.place.uri, "--rollback")
    assert (code, said.splitlines()) == (0, [f"latest: {index['run']}", f"stable: {passed}"])
    with pytest.raises(InputError, match="nothing to promote"):
        promote(home.store, "tony")


@pytest.mark.slow
def test_a_stage_is_made_again_from_what_is_there(home: Home) -> None:
    before = home.build()
    uri = before["stages"][1]["checkpoint"]
    first = read_manifest(open_location(uri))
    index = rebuild_stage(home.store, "tiny", "small", home.options)
    assert made(index) == SMALL
    assert index["stages"][1]["checkpoint"] == uri
    again = read_manifest(open_location(uri))
    assert first is not None
    assert again is not None
    assert (again.run, again.key) == (index["run"], first.key)
    assert again.files["model.safetensors"] == first.files["model.safetensors"]
    kept = home.place / "small" / "distilled" / ".replaced"
    (aside,) = kept.children()
    assert read_manifest(kept / aside) == first
    with pytest.raises(InputError, match="no such stage") as caught:
        rebuild_stage(home.store, "tiny", "tiny", home.options)
    assert caught.value.remedy == "give one of: large, small"


@pytest.mark.slow
def test_a_rebuild_that_was_cut_off_goes_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it does after an approval, too: whatever starts the flow again from its top."""
    home.build()

    def until_trained(job: Job) -> Outcome:
        if job.name == SMALL[2]:
            raise MachineFault("the worker is gone", where="here", remedy="none")
        return run_as_task(job)

    with monkeypatch.context() as patch:
        patch.setattr("flows.family.run_as_task", until_trained)
        with pytest.raises(MachineFault):
            rebuild_stage(home.store, "tiny", "small", home.options)
    assert made(rebuild_stage(home.store, "tiny", "small", home.options)) == SMALL[2:]


@pytest.mark.parametrize(("again", "more"), [(rebuild_stage, ("small",)), (evaluate_family, ())])
def test_what_is_made_again_needs_an_index_that_says_what_is_there(
    prefect_server: str, tmp_path: Path, again: Callable[..., Json], more: tuple[str, ...]
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "family.json").write_text('{"family": "tiny", "stages": [{"name": "small"}]}')
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        again(str(tmp_path), "tiny", *more)
    assert caught.value.where == f"{tmp_path}/tiny/family.json"


@pytest.mark.slow
def test_the_newest_build_is_measured_again_and_judged_anew(home: Home) -> None:
    before = home.build()
    index = evaluate_family(home.store, "tiny", home.options)
    assert made(index) == ["parent/evaluated", "large/evaluated", "small/evaluated"]
    assert index["stages"][1]["held_out_ce"] == pytest.approx(before["stages"][1]["held_out_ce"])
    assert alias_runs(home.place) == {"latest": index["run"], "stable": index["run"]}


def test_clearing_up_is_a_dry_run_unless_asked(home: Home) -> None:
    lost = home.place / "small" / "distilled" / "0123456789ab" / "weights"
    lost.write_bytes(b"weights")
    path = lost.local_path
    assert path is not None
    os.utime(path, (0, 0))
    found = collect_garbage(home.store, 30, cache=home.options.cache)
    assert (found["things"], found["deleted"]) == (1, False)
    assert lost.exists()
    assert collect_garbage(home.store, 30, True, home.options.cache) == {**found, "deleted": True}
    assert not lost.exists()
    alias = read_alias(home.place, "stable")
    assert alias is not None
    assert all(read_manifest(open_location(uri)) for uri in alias["checkpoints"].values())


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (
            {"family": "Tiny"},
            {},
            ["the recipe is wrong", "family: lowercase letters", "'Tiny'", "parent: re"],
        ),
        (None, {"approval": "always"}, ["approval: one of 'never'", "'always'", "parameter `options`"]),
        (None, {"aproval": "never"}, ["aproval: unknown key; did you mean `approval`?"]),
        (None, {"approval": "each_stage"}, ["no deployment started", "each_stage", "options.approval"]),
    ],
)
def test_wrong_parameters_are_the_message_of_the_run(
    recipe: Json | None, options: Json, words: list[str], home: Home
) -> None:
    given: Any = home.recipe() if recipe is None else recipe
    started = time.monotonic()
    state: State[Any] = build_family(given, home.store, options, return_state=True)  # type: ignore[call-overload]
    assert time.monotonic() - started < 120
    assert state.name == "Failed"
    for word in (*words, "where: ", "way out: "):
        assert word in str(state.message)


def test_a_tree_from_a_form_is_built_like_the_recipe(home: Home) -> None:
    tree: Any = home.recipe().model_dump(mode="json")
    index = build_family(tree, home.store, home.options.model_dump(mode="json"))
    assert made(index) == []
    assert index["recipe"] == tree


def only_small(tree: Json) -> None:
    """A family of one child."""
    del tree["stages"][0]


@pytest.mark.slow
def test_what_depends_on_a_stage_or_on_the_text_is_made_and_nothing_else(
    tmp_path: Path, prefect_server: str
) -> None:
    home = Home(tmp_path)
    home.build(only_small)

    def softer(tree: Json) -> None:
        only_small(tree)
        tree["stages"][0]["distill"]["temperature"] = 2.0

    assert made(home.build(softer)) == SMALL[2:]
    make_corpus(home.corpus, seed=1)
    assert made(home.build(only_small)) == [name for name in TRUNK + SMALL if name != "parent/parent"]


@pytest.mark.slow
def test_another_parent_in_the_same_folder_makes_everything_anew_and_is_no_part_of_the_old_family(
    tmp_path: Path, prefect_server: str
) -> None:
    home = Home(tmp_path)
    before = home.build(only_small)
    make_parent(home.parent, seed=1)
    with pytest.raises(InputError, match="sources are not those of its newest build") as caught:
        rebuild_stage(home.store, "tiny", "small", home.options)
    assert "parent/parent" in str(caught.value.value)
    # Nothing was set aside for it.
    assert all(read_manifest(open_location(artifact["uri"])) for artifact in before["artifacts"])
    assert made(home.build(only_small)) == TRUNK + SMALL
