"""Files appear whole or not at all."""

import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from mslt.files import canonical_json, sha256_file, sha256_text, whole_file, whole_folder, write_json, write_text


def test_written_file_holds_the_text_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one\n")
    write_text(tmp_path / "a.txt", "zwei — 二\n")
    assert (tmp_path / "a.txt").read_text() == "zwei — 二\n"
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": [1, 2.5, None]}
    assert text.endswith("}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_file_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        inode = temporary.stat().st_ino
    assert path.read_text() == "new"
    assert path.stat().st_ino == inode, "renamed, not copied"


def test_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    write_text(tmp_path / "a.txt", "text")
    assert calls == ["fsync", "replace", "fsync"], "the file, its name, the folder"


def test_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")

    def fail() -> None:
        with whole_folder(path) as temporary:
            (temporary / "new").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")
    with whole_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep/new").write_text("new")
        assert [entry.name for entry in path.iterdir()] == ["old"]
    assert [entry.relative_to(path).as_posix() for entry in path.rglob("*")] == ["deep", "deep/new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_writer_leaves_nothing_of_that_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    child = os.fork()
    if child == 0:
        with (whole_file if kind == "file" else whole_folder)(path) as temporary:
            (temporary if kind == "file" else temporary / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not path.exists()
    assert all(entry.name.startswith(".out.") for entry in tmp_path.iterdir())


def test_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == sha256_text("abc") == hashlib.sha256(b"abc").hexdigest()


def test_equal_values_have_one_canonical_text() -> None:
    assert canonical_json({"b": 1, "a": [1, {"d": None, "c": 0.1}]}) == '{"a":[1,{"c":0.1,"d":null}],"b":1}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("before")
    monkeypatch.setattr("mslt.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; make room and run the same command again: .*a\.txt"):
        write_text(tmp_path / "a.txt", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"
