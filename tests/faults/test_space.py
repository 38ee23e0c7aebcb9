"""`cascade gc`: what goes and what stays, in a folder and in a real S3 server, killed at any point."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import CascadeError, InputError, IntegrityError
from cascade.family.builds import COLLECTING, require_not_collected
from cascade.family.places import Thing, What, named
from cascade.family.space import DAY, Judgement, judge, remove
from cascade.storage import artifacts
from cascade.storage.artifacts import problems, publish
from cascade.storage.listing import Entry
from cascade.storage.locations import Location, open_location
from cascade.storage.manifest import Draft
from tests.e2e.conftest import Command

OLD, YOUNG = 40.0, 3.0


class Store:
    """A store whose files are as old as a test says; what it says nothing of was written now."""

    def __init__(self, location: Location, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.location, self.work = location, work
        self.days: dict[str, float] = {}
        self.keys = 0
        original = Location.listing
        monkeypatch.setattr(
            Location, "listing", lambda place: [self.aged(entry) for entry in original(place)]
        )

    def aged(self, entry: Any) -> Any:
        """The entry as it would be if the place it belongs to were that old."""
        days = [days for place, days in self.days.items() if entry.path.startswith(place)]
        return type(entry)(entry.path, entry.size, time.time() - max(days, default=0.0) * DAY)

    def artifact(self, folder: str, days: float = OLD) -> str:
        """A finished artifact of 7 bytes and a manifest; its place."""
        self.keys += 1
        key = f"{self.keys:064x}"[::-1]
        place = f"{folder}/{key[:12]}"
        family, _, stage = folder.rpartition("/")[0].rpartition("/")
        draft = Draft(kind=folder.rpartition("/")[2], key=key, family=family or "tiny", stage=stage)
        publish(self.work, self.location / place, draft)
        self.days[place + "/"] = days
        return place

    def file(self, path: str, content: object = "state", days: float = OLD) -> str:
        """A file; text as it is, anything else as JSON."""
        text = content if isinstance(content, str) else json.dumps(content)
        (self.location / path).write_bytes(text.encode())
        self.days[path] = days
        return path

    def build(self, name: str, places: list[str], days: float = OLD, finished: bool = True) -> str:
        """A build's record: family and name as `tiny/one`."""
        family, run = name.split("/")
        record = {"run": run, "finished": "then" if finished else None}
        record |= {"artifacts": [{"place": place} for place in places]}
        return self.file(f"{family}/builds/{run}.json", record, days)

    def judged(self, days: float = 30.0) -> Judgement:
        """What `cascade gc` finds."""
        return judge(self.location, days, time.time())

    def waste(self, days: float = 30.0) -> set[str]:
        """The places that would go."""
        return {thing.place for thing in self.judged(days).waste}


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, and something to publish in it."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "weights").write_text("weights")
    uri = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")
    return Store(open_location(uri), work, monkeypatch)


def test_what_no_build_in_the_window_refers_to_goes(store: Store) -> None:
    before, after = store.artifact("tiny/a/distilled"), store.artifact("tiny/a/distilled")
    shared, lost = store.artifact("shared/signals"), store.artifact("shared/corpus")
    forgotten = store.build("tiny/first", [before, lost])
    store.build("tiny/second", [after, shared])
    store.file("tiny/family.json", {"artifacts": [{"uri": f"{store.location}/{after}"}]})
    assert store.waste() == {before, lost, forgotten}
    assert store.waste(days=OLD + 1) == set()


def test_a_record_in_the_window_keeps_what_was_made_long_before(store: Store) -> None:
    old = [store.artifact("tiny/a/distilled"), store.artifact("shared/corpus")]
    store.build("tiny/recent", old, days=YOUNG)
    store.build("tiny/latest", [], days=1.5)
    assert store.waste() == set()
    assert store.waste(days=2.0) == {*old, "tiny/builds/recent.json"}


def test_of_builds_that_ended_in_one_second_the_later_one_is_the_newest(store: Store) -> None:
    earlier, later = store.artifact("tiny/a/distilled"), store.artifact("tiny/a/distilled")
    forgotten = store.build("tiny/run-1", [earlier])
    store.build("tiny/run-2", [later])
    found = store.judged()
    # As S3 may tell it, and in an order that helps nobody.
    listing = [Entry(entry.path, entry.size, found.now - OLD * DAY) for entry in reversed(found.listing)]
    waste = Judgement(found.store, found.days, found.now, listing).waste
    assert {thing.place for thing in waste} == {earlier, forgotten}


def test_the_newest_finished_build_of_every_family_stays(store: Store) -> None:
    tiny, other, left = (store.artifact(f"{name}/a/pruned") for name in ("tiny", "other", "tiny"))
    store.build("tiny/finished", [tiny])
    store.build("other/finished", [other], days=300)
    store.build("tiny/left", [left], days=OLD - 1, finished=False)
    assert store.waste() == {left, "tiny/builds/left.json"}


def test_what_an_alias_points_to_stays_by_build_or_by_address(store: Store) -> None:
    by_run, by_uri, newest = (store.artifact("tiny/a/distilled") for _ in range(3))
    store.build("tiny/stable-one", [by_run], days=300)
    store.build("tiny/newest", [newest])
    store.file("tiny/aliases/stable.json", {"build": {"run": "stable-one"}}, days=300)
    store.file("tiny/aliases/mine.json", {"children": [f"s3://elsewhere/{by_uri}/"]}, days=300)
    assert store.waste(days=0) == set()


@pytest.mark.parametrize("content", ["{", "[]", '{"run": "unknown"}'])
@pytest.mark.parametrize("path", ["tiny/aliases/stable.json", "tiny/family.json"])
def test_nothing_goes_while_an_alias_or_an_index_is_not_understood(
    store: Store, content: str, path: str
) -> None:
    store.artifact("tiny/a/distilled")
    store.file(path, content)
    with pytest.raises(IntegrityError, match="nothing is removed") as caught:
        store.waste()
    assert path in caught.value.where
    assert caught.value.remedy


def test_nothing_goes_while_the_record_of_a_build_is_damaged(store: Store) -> None:
    store.artifact("tiny/a/distilled")
    store.file("tiny/builds/one.json", "{")
    with pytest.raises(IntegrityError, match="nothing is removed"):
        store.waste()


def test_what_a_recipe_names_as_parent_teacher_or_student_stays(store: Store) -> None:
    """One family's child may be another one's parent."""
    places = [store.artifact("tiny/a/distilled") for _ in range(3)]
    parent, teacher, student = (f"{store.location}/{place}" for place in places)
    recipe = {
        "parent": parent,
        "teacher": {"models": [{"path": teacher}]},
        "stages": [{"checkpoint": student}],
    }
    store.file("other/builds/one.json", {"finished": "then", "recipe": recipe, "artifacts": []})
    assert store.waste() == set()


def test_a_running_build_keeps_what_it_reuses_and_its_training_state(store: Store) -> None:
    reused = store.artifact("tiny/a/pruned")
    key = "d" * 12
    store.build("tiny/running", [reused, f"tiny/a/distilled/{key}"], finished=False)
    state = store.file(f"tiny/a/training/{key}/step-00000008/tensors.safetensors", days=0.5)
    assert store.waste(days=0) == set()
    store.days[state] = OLD
    assert store.waste(days=0) == {reused, f"tiny/a/training/{key}", "tiny/builds/running.json"}


def test_what_was_written_in_the_last_day_stays_whatever_the_window(store: Store) -> None:
    store.artifact("tiny/a/distilled", days=0.9)
    store.file("tiny/a/training/eeeeeeeeeeee/step-00000001/record.json", days=0.9)
    store.file("shared/corpus/ffffffffffff/part", days=0.9)
    assert store.waste(days=0) == set()


def test_a_training_state_goes_once_its_artifact_is_there_or_nobody_wants_it(store: Store) -> None:
    done = store.artifact("tiny/a/distilled")
    signals = store.artifact("shared/signals")
    store.build("tiny/one", [done, signals, "tiny/b/distilled/cccccccccccc"], days=YOUNG)
    useless = [
        f"tiny/a/training/{done[-12:]}",
        f"shared/training/{signals[-12:]}",
        "tiny/b/training/dddddddddddd",
    ]
    for state in (*useless, "tiny/b/training/cccccccccccc"):
        store.file(f"{state}/step-00000001/tensors.safetensors")
    assert store.waste() == set(useless)


def test_an_upload_that_was_broken_off_goes_and_what_a_kept_build_may_go_on_with_stays(store: Store) -> None:
    store.file("shared/corpus/aaaaaaaaaaaa/part", days=OLD)
    store.file("tiny/a/pruned/bbbbbbbbbbbb/part", days=OLD)
    store.build("tiny/one", ["tiny/a/pruned/bbbbbbbbbbbb"])
    assert store.waste() == {"shared/corpus/aaaaaaaaaaaa"}
    assert [thing.what for thing in store.judged().waste] == [What.UNFINISHED]


def test_what_killed_processes_left_goes_after_a_day_but_nothing_that_was_set_aside(store: Store) -> None:
    kept = store.artifact("tiny/a/distilled")
    store.build("tiny/one", [kept])
    left = [
        "tiny/a/distilled/.aaaaaaaaaaaa.incoming",
        "tiny/.family.json.0123456789ab",
        f"tiny/.probe-{'0' * 32}",
    ]
    store.file(f"{left[0]}/weights", days=2)
    store.file(left[1], days=2)
    store.file(left[2], days=2)
    store.file("tiny/a/.bbbbbbbbbbbb.incoming/weights", days=0.5)
    store.file(".damaged/tiny/a/distilled/cccccccccccc/weights", days=300)
    store.file("tiny/a/pruned/.damaged/dddddddddddd/manifest.json", days=300)
    assert store.waste() == set(left)
    assert {thing.place for thing in store.judged().damaged} == {".damaged", "tiny/a/pruned/.damaged"}


def test_what_a_rebuild_replaced_goes_with_time(store: Store) -> None:
    kept = store.artifact("tiny/a/distilled")
    store.build("tiny/one", [kept])
    old, new = (f"tiny/a/distilled/.replaced/2026-{day}-{'c' * 12}" for day in (1, 2))
    store.file(f"{old}/manifest.json", days=300)
    store.file(f"{new}/manifest.json", days=10)
    assert store.waste() == {old}


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "tiny/notes/a/b/c.txt",
        "tiny/a/distilled/readme.txt",
        "tiny/a/distilled/not-a-key-at-all/weights",
        "tiny/.git/objects/ab/cdef",
        "tiny/a/.publishing.lock",
        "tiny-pilot/pilot.json",
        "tiny-pilot/policy-1/a/distilled/aaaaaaaaaaaa/manifest.json",
        "tiny-pilot/policy-1/parent/parent/aaaaaaaaaaaa/manifest.json",
        "tiny-pilot/policy-1/a/training/aaaaaaaaaaaa/step-00000001/record.json",
        "tiny-pilot/shared/corpus/aaaaaaaaaaaa/manifest.json",
        "tiny-pilot/shared/training/aaaaaaaaaaaa/shard",
    ],
)
def test_what_is_not_the_stores_own_is_never_touched(store: Store, path: str) -> None:
    """A person's files, and a pilot, which is a store within the store."""
    store.file(path, days=3000)
    assert store.waste(days=0) == set()


def test_what_goes_is_gone_and_what_stays_is_whole(store: Store) -> None:
    kept, lost = store.artifact("tiny/a/distilled"), store.artifact("tiny/a/distilled")
    store.file(f"{lost}-besides/file")
    store.build("tiny/one", [kept])
    removed: list[Thing] = []
    remove(store.judged(), removed.append)
    assert [(thing.place, thing.what) for thing in removed] == [(lost, What.ARTIFACT)]
    assert removed[0].bytes > 7
    assert problems(store.location / kept) == []
    assert not (store.location / lost).exists()
    assert (store.location / f"{lost}-besides/file").exists()
    assert (store.location / COLLECTING).children() == []
    assert store.waste() == set()


class Killed(BaseException):
    """SIGKILL, as far as the store can tell."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process dies before its so many-th deletion; nothing it has open is tidied up."""
    original, left = Location.delete_tree, [after]

    def delete(place: Location) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        original(place)

    monkeypatch.setattr(Location, "delete_tree", delete)


def test_killed_at_any_deletion_it_goes_on_the_next_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store.artifact("tiny/a/distilled")
    store.build("tiny/one", [kept])
    for after in range(5):
        lost = [store.artifact("tiny/a/pruned"), store.artifact("shared/signals")]
        store.build("tiny/zero", lost, days=300)
        with monkeypatch.context() as patched:
            dying(patched, after)
            with pytest.raises(Killed):
                remove(store.judged(), lambda thing: None)
        for place in lost:
            # Never a manifest without its files.
            assert (
                problems(store.location / place) == []
                or not (store.location / place / "manifest.json").exists()
            )
        remove(store.judged(), lambda thing: None)
        assert not any((store.location / place).exists() for place in (*lost, "tiny/builds/zero.json"))
        artifacts._verified.clear()
        assert problems(store.location / kept) == []


def test_a_build_that_starts_in_the_middle_keeps_what_it_reuses(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records what it refers to after it was judged and before it was announced for removal."""
    reused, lost = store.artifact("tiny/a/pruned"), store.artifact("tiny/a/pruned")
    judged = store.judged()
    assert {reused, lost} == {thing.place for thing in judged.waste}
    store.build("tiny/starting", [reused], days=0, finished=False)
    removed: list[Thing] = []
    remove(judged, removed.append)
    assert [thing.place for thing in removed] == [lost]


def test_a_build_that_wants_what_is_being_removed_says_so_and_touches_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, other = store.artifact("tiny/a/pruned"), store.artifact("tiny/b/pruned", days=0)
    refused: list[CascadeError] = []

    def starts(thing: Thing) -> None:
        require_not_collected(store.location, {other})
        with pytest.raises(CascadeError, match="`cascade gc` is removing") as caught:
            require_not_collected(store.location, {lost, other})
        refused.append(caught.value)

    remove(store.judged(), starts)
    assert refused[0].value == lost
    assert COLLECTING in refused[0].where
    assert refused[0].remedy
    require_not_collected(store.location, {lost, other})


def test_an_announcement_that_a_killed_one_left_is_forgotten_after_an_hour(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = store.location / COLLECTING / "left.json"
    left.write_bytes(b'["tiny/a/pruned/aaaaaaaaaaaa"]')
    with pytest.raises(CascadeError):
        require_not_collected(store.location, {"tiny/a/pruned/aaaaaaaaaaaa"})
    monkeypatch.setattr(Location, "age", lambda place: 3601.0)
    require_not_collected(store.location, {"tiny/a/pruned/aaaaaaaaaaaa"})
    store.artifact("tiny/a/pruned")
    remove(store.judged(), lambda thing: None)
    assert not left.exists()


def test_a_family_is_refused_because_only_the_store_knows_what_is_shared(store: Store) -> None:
    place = store.artifact("tiny/a/pruned")
    store.build("tiny/one", [place])
    for uri in ("tiny", place):
        with pytest.raises(InputError, match="family or an artifact") as caught:
            judge(store.location / uri, 30, time.time())
        assert "folder above" in caught.value.remedy


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has put an artifact of another store into this one by a symbolic link."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "weights").write_text("weights")
    other = Store(open_location(str(tmp_path / "other")), work, monkeypatch)
    place = other.artifact("tiny/a/pruned")
    (tmp_path / "store/tiny/a").mkdir(parents=True)
    os.symlink(tmp_path / "other/tiny/a/pruned", tmp_path / "store/tiny/a/pruned")
    remove(judge(open_location(str(tmp_path / "store")), 0, time.time() + 300 * DAY), lambda thing: None)
    assert problems(other.location / place) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://bucket/prefix/tiny/a/pruned/0123456789ab", "tiny/a/pruned/0123456789ab"),
        ("/disk/shared/corpus/0123456789ab/", "shared/corpus/0123456789ab"),
        ("tiny/a/on_policy/0123456789ab", "tiny/a/on_policy/0123456789ab"),
        ("tiny/a/evaluated-long/0123456789ab", "tiny/a/evaluated-long/0123456789ab"),
        ("tiny/a/pruned/0123456789ab/model.safetensors", None),
        ("tiny/a/pruned/0123456789abc", None),
        ("x-shared/corpus/0123456789ab", None),
        ("shared/corpus", None),
    ],
)
def test_places_are_told_from_addresses(text: str, place: str | None) -> None:
    assert named({"a": [{"b": text}]}) == ({place} if place else set())


def test_the_command_says_what_would_go_and_with_delete_removes_it(store: Store, command: Command) -> None:
    kept, lost = store.artifact("tiny/a/distilled"), store.artifact("tiny/a/distilled")
    store.build("tiny/one", [kept])
    store.file("tiny/.damaged/weights", "0" * 1_500_000)
    uri = str(store.location)
    code, said = command("gc", uri)
    assert code == 0, said
    assert lost in said
    assert kept not in said
    assert "run it again with --delete" in said
    assert "stays: set aside as damaged" in said
    assert "1.5" in said
    assert problems(store.location / lost) == []
    code, said = command("gc", uri, "--delete")
    assert code == 0, said
    assert lost in said
    assert not (store.location / lost).exists()
    assert (store.location / "tiny/.damaged/weights").exists()
    code, said = command("gc", uri, "--delete")
    assert "0 things nobody needs" in said


def test_the_window_is_thirty_days_unless_said_otherwise(store: Store, command: Command) -> None:
    lost = store.artifact("tiny/a/distilled", days=29)
    assert lost not in command("gc", str(store.location))[1]
    assert lost in command("gc", str(store.location), "--keep-days", "28")[1]
    store.days[lost + "/"] = 31
    assert lost in command("gc", str(store.location))[1]


def test_cards_go_with_the_last_of_what_they_show(store: Store) -> None:
    kept, gone = store.artifact("tiny/a/distilled"), store.artifact("tiny/b/distilled")
    store.build("tiny/one", [kept])
    cards = [store.file(f"tiny/{path}") for path in ("a/card.md", "b/card.md", "b/loss.svg", "card.md")]
    # A store within the store: what looks like a stage there is a family.
    store.file("tiny-pilot/policy-1/card.md")
    store.file("tiny-pilot/policy-1/family.json", {"run": "somewhere"})
    # Not a card of ours.
    store.file("tiny/b/notes.md")
    assert store.waste() == {gone, cards[1], cards[2]}
    remove(store.judged(), lambda thing: None)
    left = store.location.walk()
    assert {cards[0], cards[3], "tiny-pilot/policy-1/card.md", "tiny/b/notes.md"} <= set(left)
    assert not {cards[1], cards[2]} & set(left)


def test_young_cards_stay(store: Store) -> None:
    store.file("tiny/a/card.md", days=YOUNG)
    assert store.waste() == set()
    assert store.waste(days=2.0) == {"tiny/a/card.md"}
