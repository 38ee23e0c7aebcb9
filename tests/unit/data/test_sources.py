"""Every kind of source gives its documents, and every bad one an error that names it and the way out."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest

from cascade.data import embedded, files
from cascade.data.sources import Source, documents, fingerprint
from cascade.errors import InputError, StorageFault
from cascade.storage.locations import open_location

TEXTS = ["The first document.", "Der zweite, mit Umlaut: \u00e4.", "The third\n\nhas two paragraphs."]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder; one path breaks off early."""

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    def do_GET(self) -> None:
        """A file, or a truncated answer."""
        if not self.path.startswith("/broken"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only this")


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path | str, **options: str) -> list[str]:
    return list(documents(Source(str(path), **options)))


def refused(path: Path | str, **options: str) -> InputError:
    """The error of a source; its fields are checked by the caller."""
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert caught.value.remedy
    assert caught.value.where
    return caught.value


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server on this machine that serves `tmp_path`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_jsonl_json_parquet_and_their_packed_forms_hold_the_same_documents(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(parquet)
    for path in (plain, packed, array, parquet, plain.as_uri()):
        assert read(path) == TEXTS, path


def test_a_field_of_another_name_is_read_and_blank_or_null_rows_are_not_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"body": "One."}, {"body": None}, {"other": 1}, {"body": "  \n"}, {"body": "Two."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read(path, field="body") == ["One.", "Two."]


def test_a_text_file_is_one_document_unless_it_is_large(tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("One.\n\nStill one.\n", encoding="utf-8")
    assert read(small) == ["One.\n\nStill one.\n"]
    blocks, lines = tmp_path / "blocks.txt", tmp_path / "lines.txt"
    blocks.write_text(("word " * 400 + "end.\n\n") * 60, encoding="utf-8")
    lines.write_text(("word " * 400 + "end.\n") * 60, encoding="utf-8")
    for path, largest in ((blocks, 11_000), (lines, 19_000)):
        found = read(path)
        assert "".join(found) == path.read_text(encoding="utf-8")
        assert all(8_000 <= len(text) <= largest and text.rstrip().endswith("end.") for text in found[:-1])
        assert len(found) > 5


def test_a_folder_or_a_glob_is_all_its_files_of_known_formats(tmp_path: Path) -> None:
    folder = tmp_path / "books [old]"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ["From a."])
    write_jsonl(folder / "deep" / "b.jsonl", ["From b."])
    (folder / "c.txt").write_text("From c.", encoding="utf-8")
    (folder / "empty.jsonl").touch()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "d.txt").write_text("Hidden.", encoding="utf-8")
    (folder / "README.md").write_text("Not taken.", encoding="utf-8")
    assert read(folder) == ["From a.", "From b.", "From c."]
    assert read(str(tmp_path / "*" / "*.txt")) == ["From c."]


def test_addresses_are_downloaded(tmp_path: Path, web: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read(f"http://{web}/a.jsonl") == TEXTS
    gone = refused(f"http://{web}/gone.jsonl")
    assert gone.what.endswith("HTTPError 404")
    assert gone.value == f"http://{web}/gone.jsonl"
    assert "not known" in refused(f"http://{web}/a.exe").what
    assert "cannot be downloaded" in refused("http://127.0.0.1:9/a.jsonl").what


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://host/a.jsonl?X-Amz-Signature=SECRET", "https://host/a.jsonl"),
        ("HTTPS://host/a.jsonl?token=SECRET", "HTTPS://host/a.jsonl"),
        ("http://me:SECRET@host/a.jsonl", "http://host/a.jsonl"),
        ("s3://KEY:SECRET@bucket/a.jsonl", "s3://bucket/a.jsonl"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(path: str, shown: str) -> None:
    error = refused(path)
    assert error.value == shown
    assert "SECRET" not in str(error)


def test_a_download_that_breaks_off_is_a_fault_and_not_a_shorter_corpus(web: str) -> None:
    with pytest.raises(StorageFault, match="broke off"):
        read(f"http://{web}/broken.txt")


def test_s3_objects_and_folders_are_read(s3: str, tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "From a."), ("deep/b.jsonl", "From b.")):
        local = write_jsonl(tmp_path / "x.jsonl", [text])
        (open_location(s3) / name).write_bytes(local.read_bytes())
    (open_location(s3) / "notes.md").write_bytes(b"Not taken.")
    assert read(s3) == ["From a.", "From b."]
    assert read(f"{s3}/deep/b.jsonl") == ["From b."]
    assert fingerprint(Source(f"{s3}/deep/b.jsonl")) == fingerprint(Source(str(local)))
    assert refused(f"{s3}/gone.jsonl").value == f"{s3}/gone.jsonl"
    assert "no corpus file" in refused(f"{s3}/nowhere").what


def test_the_fingerprint_is_the_content_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    same = write_jsonl(tmp_path / "x" / "b.jsonl", TEXTS)
    other = write_jsonl(tmp_path / "c.jsonl", TEXTS[:2])
    as_text = tmp_path / "a.txt"
    as_text.write_bytes(first.read_bytes())
    prints = [fingerprint(Source(str(path))) for path in (first, same, other, as_text)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert fingerprint(Source("embedded")) == embedded.fingerprint()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"text": "a"}\n\n{"text": }\n', 3),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2),
        (b'[{"text": "a"},\n {"text": "b" "c"}]', 2),
        (b'{"text": "a"}\n{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", 2),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', 2),
    ],
)
def test_broken_json_is_named_by_file_and_line(tmp_path: Path, content: bytes, line: int) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.jsonl"
    bad.write_bytes(content)
    error = refused(tmp_path)
    assert error.value == f"{bad}, line {line}"
    assert good.exists()
    assert "cannot be read" in error.what


def test_brackets_inside_strings_are_no_depth(tmp_path: Path) -> None:
    text = "[{" * 1000 + "\\" + '"[[{'
    assert read(write_jsonl(tmp_path / "a.jsonl", [text])) == [text]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a.jsonl.gz"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe not that \x00")
    assert refused(path).value == str(path)


def test_an_absent_field_lists_those_there_are(tmp_path: Path) -> None:
    error = refused(write_jsonl(tmp_path / "a.jsonl", TEXTS), field="body")
    assert (error.value, error.where) == ("body", str(tmp_path / "a.jsonl"))
    assert "id, text" in error.remedy


def test_a_field_that_is_not_text_is_refused(tmp_path: Path) -> None:
    assert refused(write_jsonl(tmp_path / "a.jsonl", TEXTS), field="id").value == "id (int64)"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("{tmp}/gone.jsonl", "no corpus file"),
        ("{tmp}/*.jsonl", "no corpus file"),
        ("{tmp}", "no corpus file"),
        ("{tmp}/notes.md", "not known"),
        ("ftp://host/a.jsonl", "not supported"),
        ("a/b/c", "neither a file nor"),
        ("", "neither a file nor"),
    ],
)
def test_a_path_with_nothing_to_read_is_refused(tmp_path: Path, path: str, what: str) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(InputError, match=what) as caught:
        read(path.format(tmp=tmp_path))
    assert caught.value.remedy


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": " "}\n'])
def test_a_source_without_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    assert "no text" in refused(path).what


@pytest.mark.parametrize("options", [{"split": "test"}, {"config": "en"}])
def test_files_have_no_splits_and_no_configurations(tmp_path: Path, options: dict[str, str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert refused(path, **options).value == next(iter(options.values()))
    with pytest.raises(InputError, match="only hub data sets"):
        fingerprint(Source("embedded", **options))


def test_formats_are_told_by_the_name() -> None:
    assert files.file_format("A.JSONL.GZ") == "json"
    assert files.file_format("a.gz") is None
    assert files.public("s3://bucket/a.txt") == "s3://bucket/a.txt"
