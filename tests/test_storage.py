"""Files written whole, locks, and cached files that are checked before they are believed."""

import errno
import hashlib
import subprocess
import sys
import threading

import pytest

from hire import storage


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_digest_is_that_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert storage.digest(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with storage.replacing(path) as [scratch]:
        scratch.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]
    with pytest.raises(KeyError), storage.replacing(path) as [scratch]:
        scratch.write_text("two")
        raise KeyError("x")
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left"),
        OSError("No space left"),
        OSError(errno.EFBIG, "large", "a.txt"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")
    if error.filename:
        error.filename = str(path)
    with pytest.raises(OSError) as output, storage.replacing(path) as [scratch]:
        scratch.write_text("part")
        raise error
    assert (
        str(path) in str(output.value)
        and "\n" not in str(output.value)
        and len(str(output.value)) > len(str(path)) + 20
    )
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_errors_that_are_not_the_disks_pass_unchanged(tmp_path):
    for error in (
        ConnectionError("npm"),
        FileNotFoundError(errno.ENOENT, "none", "/else"),
        PermissionError(errno.EACCES, "no", "/else"),
    ):
        with pytest.raises(type(error)) as output, storage.replacing(tmp_path / "a"):
            raise error
        assert output.value is error


def test_what_a_killed_writer_left_is_removed_and_a_live_ones_scratch_is_not(tmp_path):
    left = tmp_path / ".a.bin.4194304-0a1b2c3d.scratch"
    left.mkdir()
    (left / "a.bin").write_bytes(b"half")
    (tmp_path / ".a.bin.lock").touch()
    (tmp_path / ".gone.lock").touch()
    with storage.replacing(tmp_path / "b.bin") as [scratch]:
        scratch.write_bytes(b"b")
        storage.tidy(tmp_path)
        assert scratch.exists() and not left.exists()
    assert names(tmp_path) == ["b.bin"]


def test_a_lock_has_one_owner(tmp_path):
    with storage.locked(tmp_path / "a"):
        with pytest.raises(TimeoutError, match=str(tmp_path / "a")):
            with storage.locked(tmp_path / "a", wait=False):
                pass
    with storage.locked(tmp_path / "a", wait=False):
        pass
    assert not names(tmp_path)


COUNT = """
import importlib.util, pathlib, sys
# The module alone: the package takes seconds to import.
spec = importlib.util.spec_from_file_location("storage", sys.argv[1])
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
path = pathlib.Path(sys.argv[2])
def count_up():
    for _ in range(30):
        with storage.replacing(path) as [scratch]:
            scratch.write_text(str(int(path.read_text() if path.exists() else 0) + 1))
"""


def test_two_processes_and_two_threads_lose_no_change(tmp_path):
    path = tmp_path / "count"
    command = [sys.executable, "-c", COUNT + "count_up()", storage.__file__, str(path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    space = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", storage.__file__, str(path)])
        exec(COUNT, space)
    threads = [threading.Thread(target=space["count_up"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert path.read_text() == "120" and names(tmp_path) == ["count"]


@pytest.fixture
def entry(tmp_path):
    """Two files in a cache, a function that reads them, and how often they were made."""
    paths, made = [tmp_path / "a.bin", tmp_path / "b.bin"], []

    def make(parts):
        made.append(1)
        for part in parts:
            part.write_bytes(part.name.encode() * 10)
        return dict(precision="F32", shape=(1, 2))

    def read():
        metadata = storage.cached(paths, make)
        assert metadata == dict(precision="F32", shape=[1, 2])
        assert [path.read_bytes() for path in paths] == [path.name.encode() * 10 for path in paths]
        assert names(tmp_path) == ["a.bin", "a.bin.sha256.json", "b.bin"]

    return tmp_path, read, made


def test_cached_files_are_made_once(entry):
    folder, read, made = entry
    read(), read()
    assert len(made) == 1


def test_every_flipped_bit_and_every_cut_of_a_cached_entry_makes_it_again(entry, capsys):
    folder, read, made = entry
    read()
    for name in ("a.bin", "b.bin", "a.bin.sha256.json"):
        whole, expected = (folder / name).read_bytes(), len(made)
        for place in range(0, len(whole), 29):
            for damaged in (
                whole[:place],
                whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            ):
                (folder / name).write_bytes(damaged)
                read()
                expected += 1
                lines = capsys.readouterr().out.splitlines()
                assert len(made) == expected and len(lines) == 1 and "a.bin" in lines[0]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 300,
        b"[]",
        b"null",
        b"[" * 100000,
        b"\xff\xfe",
        b'{"covers": {"metadata": 1, "files": 2}}',
    ],
)
def test_a_sidecar_of_anything_else_makes_the_entry_again(entry, text):
    folder, read, made = entry
    read()
    (folder / "a.bin.sha256.json").write_bytes(text)
    read()
    (folder / "a.bin.sha256.json").unlink()
    read()
    (folder / "b.bin").unlink()
    (folder / "b.bin").mkdir()
    read()
    assert len(made) == 4


def test_a_file_of_known_digest_is_made_again_when_damaged(tmp_path, capsys):
    path, sha256 = tmp_path / "a.bin", hashlib.sha256(b"abc").hexdigest()
    for damaged in (None, b"", b"abd", b"abcc"):
        if damaged is not None:
            path.write_bytes(damaged)
        storage.cached_known(path, sha256, lambda scratch: scratch.write_bytes(b"abc"))
        assert path.read_bytes() == b"abc" and names(tmp_path) == ["a.bin"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    storage.cached_known(path, sha256, lambda scratch: 1 / 0)
    with pytest.raises(ValueError, match="other.bin"):
        storage.cached_known(
            tmp_path / "other.bin", sha256, lambda scratch: scratch.write_bytes(b"x")
        )
    assert names(tmp_path) == ["a.bin"]
