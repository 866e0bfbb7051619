"""Files of a folder: listed, read in ranges, told apart; and how a place is written."""

from __future__ import annotations

import io
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from memedit.files import File, LocalFiles, file_of, files_of, place_of, read_object
from tests.elsewhere import Elsewhere


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, a hidden one, and one in a folder of a folder."""
    folder = tmp_path / "place"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name, size in {"b.txt": 5, "a.bin": 10, ".hidden": 0, "sub/c": 1, "sub/deep/d": 2}.items():
        (folder / name).write_bytes(bytes(range(size)))
    return folder


class TestSizes:
    def test_of_the_folder_itself(self, folder: Path) -> None:
        assert LocalFiles(folder).sizes() == {".hidden": 0, "a.bin": 10, "b.txt": 5}

    def test_of_what_lies_below_too(self, folder: Path) -> None:
        found = LocalFiles(folder).sizes(deep=True)
        assert found == {".hidden": 0, "a.bin": 10, "b.txt": 5, "sub/c": 1, "sub/deep/d": 2}

    def test_sorted_whatever_the_file_system_says(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And without what has gone since."""
        seen = [(str(folder), ["sub"], ["b.txt", ".hidden", "gone", "a.bin"])]
        monkeypatch.setattr(os, "walk", lambda *_, **__: iter(seen))
        assert list(LocalFiles(folder).sizes()) == [".hidden", "a.bin", "b.txt"]

    def test_of_a_folder_in_it_with_the_whole_names(self, folder: Path) -> None:
        files = LocalFiles(folder)
        assert files.sizes("sub") == {"sub/c": 1}
        assert files.sizes("sub", deep=True) == {"sub/c": 1, "sub/deep/d": 2}
        assert files.sizes("empty", deep=True) == {}

    @pytest.mark.parametrize("name", ["absent", "a.bin", "a.bin/below"])
    def test_of_no_folder(self, folder: Path, name: str) -> None:
        assert LocalFiles(folder).sizes(name) == {}
        assert LocalFiles(folder / name).sizes(deep=True) == {}

    def test_a_link_counts_as_what_it_leads_to(self, folder: Path) -> None:
        """As the Hugging Face cache has them."""
        (folder / "empty" / "link").symlink_to(folder / "a.bin")
        (folder / "empty" / "broken").symlink_to(folder / "gone")
        assert LocalFiles(folder / "empty").sizes() == {"link": 10}
        assert LocalFiles(folder / "empty").size("broken") is None

    def test_a_folder_that_cannot_be_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: object) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", refuse)
        for deep in (False, True):
            with pytest.raises(InputError, match=r"place: cannot be read: Permission denied"):
                LocalFiles(folder).sizes(deep=deep)


def test_the_size_of_a_file(folder: Path) -> None:
    files = LocalFiles(folder)
    assert (files.size("a.bin"), files.size(".hidden"), files.size("sub/deep/d")) == (10, 0, 2)
    for name in ("absent", "sub", "", "a.bin/below"):
        assert files.size(name) is None


class TestRead:
    def test_fills_the_memory_that_is_given(self, folder: Path) -> None:
        memory = bytearray(b"-" * 8)
        LocalFiles(folder).read_into("a.bin", 3, memoryview(memory)[2:6])
        assert memory == b"--\x03\x04\x05\x06--"
        LocalFiles(folder).read_into("a.bin", 10, memoryview(memory)[:0])
        assert memory[:2] == b"--"

    def test_goes_on_until_all_is_there(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel may give less than it is asked for."""

        class Slow(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                return super().readinto(memoryview(buffer)[:3])

        monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
        assert LocalFiles(folder).read("a.bin", 1) == bytes(range(1, 10))

    @pytest.mark.parametrize(("start", "size"), [(0, 11), (9, 2), (10, 1), (1000, 1)])
    def test_a_file_that_is_shorter(self, folder: Path, start: int, size: int) -> None:
        with pytest.raises(InputError, match=r"place/a\.bin: .*shorter"):
            LocalFiles(folder).read_into("a.bin", start, memoryview(bytearray(size)))
        with pytest.raises(InputError, match=r"place/a\.bin: .*shorter"):
            LocalFiles(folder).read("a.bin", start, size)

    @pytest.mark.parametrize("place", [LocalFiles, Elsewhere])
    def test_a_part_or_the_whole(self, folder: Path, place: type[LocalFiles]) -> None:
        files, whole = place(folder), bytes(range(10))
        assert files.read("a.bin") == whole
        assert files.read("a.bin", 4) == whole[4:]
        assert files.read("a.bin", 4, 3) == whole[4:7]
        assert files.read("a.bin", 10) == files.read("a.bin", 99) == b""
        found = files.read("a.bin")
        found[0] = 255  # it is the caller's
        assert files.read("a.bin") == whole

    def test_a_file_from_any_position(self, folder: Path) -> None:
        with LocalFiles(folder).open("a.bin") as file:
            file.seek(-3, os.SEEK_END)
            assert file.read() == b"\x07\x08\x09"
            file.seek(1)
            assert file.read(2) == b"\x01\x02"

    @pytest.mark.parametrize(("name", "says"), [("absent", "no such file"), ("sub", "directory")])
    def test_what_is_no_file(self, folder: Path, name: str, says: str) -> None:
        files = LocalFiles(folder)
        attempts: list[Callable[[], object]] = [
            lambda: files.open(name),
            lambda: files.read_into(name, 0, memoryview(bytearray(1))),
            lambda: files.read(name, 0, 1),
        ]
        for attempt in attempts:
            with pytest.raises(InputError, match=f"(?i){says}") as caught:
                attempt()
            assert str(caught.value.source) == str(folder / name)
        with pytest.raises(InputError, match="no such file"):
            files.read(name)


class TestFingerprint:
    def test_stays_while_the_content_does(self, folder: Path) -> None:
        files = LocalFiles(folder)
        before = files.fingerprint("a.bin")
        (folder / "a.bin").read_bytes()
        (folder / "b.txt").write_text("another")
        assert files.fingerprint("a.bin") == before
        assert LocalFiles(folder / "sub" / "..").fingerprint("a.bin") == before

    def test_changes_with_the_content(self, folder: Path) -> None:
        """In size, time, or because another file was put in its place."""
        path, files = folder / "a.bin", LocalFiles(folder)
        seen = [files.fingerprint("a.bin")]
        path.write_bytes(b"longer than it was")
        seen.append(files.fingerprint("a.bin"))
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        seen.append(files.fingerprint("a.bin"))
        status = path.stat()
        (folder / "new").write_bytes(b"longer than it is!")
        os.utime(folder / "new", ns=(1, status.st_mtime_ns))
        (folder / "new").replace(path)
        seen.append(files.fingerprint("a.bin"))
        assert (path.stat().st_mtime_ns, path.stat().st_size) == (
            status.st_mtime_ns,
            status.st_size,
        )
        assert len({tuple(each) for each in seen}) == 4

    def test_has_the_place_in_it(self, folder: Path) -> None:
        files = LocalFiles(folder)
        os.link(folder / "a.bin", folder / "same")
        (folder / "link").symlink_to("a.bin")
        assert files.fingerprint("same")[0] != files.fingerprint("a.bin")[0]
        assert files.fingerprint("link") == files.fingerprint("a.bin")

    def test_a_change_may_hide_for_a_moment(self, folder: Path) -> None:
        files = LocalFiles(folder)
        assert not files.settled("a.bin")
        os.utime(folder / "a.bin", (time.time(), time.time() - 60))
        assert files.settled("a.bin")


def test_a_folder_is_here_and_has_no_checksums_of_its_own(folder: Path) -> None:
    files = LocalFiles(folder)
    assert files.here == files.folder(["a.bin"]) == folder
    assert files.location == str(folder)
    assert files.checksum("a.bin") is None


def test_files_of_a_path_or_of_files(folder: Path) -> None:
    assert files_of(folder) == LocalFiles(folder)
    files = Elsewhere(folder)
    assert files_of(files) is files


class TestFile:
    def test_is_written_as_it_is_found(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert str(file_of(folder / "a.bin")) == str(folder / "a.bin")
        assert str(File(LocalFiles(folder), "sub/c")) == f"{folder}/sub/c"
        assert str(File(Elsewhere(folder), "a.bin")) == "far://place/a.bin"
        assert str(file_of(Path("/a"))) == "/a"
        monkeypatch.chdir(folder)
        assert str(file_of(Path("a.bin"))) == "a.bin"
        assert str(file_of(Path("sub/c"))) == "sub/c"
        assert place_of(LocalFiles(Path(".")), "sub/c") == "sub/c"

    @pytest.mark.parametrize(
        ("name", "suffix"),
        [("x.JSONL", ".jsonl"), ("a.b/x", ""), ("x.tar.gz", ".gz"), (".hidden", ""), ("x.", ".")],
    )
    def test_suffix(self, name: str, suffix: str) -> None:
        assert File(LocalFiles(Path("/p")), name).suffix == suffix

    def test_reads_and_opens(self, folder: Path) -> None:
        file = file_of(folder / "a.bin")
        assert file.read() == bytes(range(10))
        with file.open() as content:
            assert content.read() == bytes(range(10))

    def test_can_be_sent_and_compared(self, folder: Path) -> None:
        file = file_of(folder / "a.bin")
        sent = pickle.loads(pickle.dumps(file))
        assert sent == file and hash(sent) == hash(file) and sent.read() == file.read()
        assert file != file_of(folder / "b.txt")

    def test_an_error_about_it_can_be_sent(self, folder: Path) -> None:
        error = InputError("is wrong", source=file_of(folder / "a.bin"), row=3, field="x")
        sent = pickle.loads(pickle.dumps(error))
        assert str(sent) == str(error) == f"{folder}/a.bin:3 [x]: is wrong"
        assert sent.source == error.source


class TestReadObject:
    @pytest.mark.parametrize("place", [LocalFiles, Elsewhere])
    def test_what_is_there(self, folder: Path, place: type[LocalFiles]) -> None:
        (folder / "o.json").write_text('{"a": [1, "é"]}', encoding="utf-8")
        assert read_object(File(place(folder), "o.json"), "o") == {"a": [1, "é"]}

    def test_nothing_there(self, folder: Path) -> None:
        with pytest.raises(InputError) as caught:
            read_object(File(Elsewhere(folder), "o.json"), "a place has its object")
        assert str(caught.value) == "far://place: no o.json: a place has its object"

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "not JSON"),
            (b"{", "not JSON"),
            (b"\xff{}", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"[1]", "not a JSON object"),
            (b"null", "not a JSON object"),
        ],
    )
    def test_something_else(self, folder: Path, content: bytes, says: str) -> None:
        (folder / "o.json").write_bytes(content)
        with pytest.raises(InputError, match=says) as caught:
            read_object(file_of(folder / "o.json"), "o")
        assert str(caught.value.source) == str(folder / "o.json")
