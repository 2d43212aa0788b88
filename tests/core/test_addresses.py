"""Files in a bucket: whole objects, files that grow, folders with a marker, locks, and faults."""

import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from huatuo_jax.core import addresses, files, folders
from huatuo_jax.core.files import AppendedFile, as_path, read_rows
from tests.bucket_server import repeat_at_once

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(params=["gs", "s3", "memory"])
def place(request, bucket):
    """A folder in the bucket of a server of either kind, and in one of fsspec's own in memory."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    fsspec.filesystem("memory").store.clear()
    return as_path(f"{request.param}://bucket/run")


@pytest.fixture(autouse=True)
def no_bucket_has_answered(monkeypatch):
    monkeypatch.setattr(addresses, "_reached", set())


@pytest.fixture
def no_waiting(monkeypatch):
    """Requests are repeated at once."""
    repeat_at_once(monkeypatch.setattr)


@pytest.fixture
def short_lives(monkeypatch):
    """Locks are renewed often, and their owners counted dead soon."""
    monkeypatch.setattr(addresses, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(addresses, "DEAD_AFTER_S", 1.0)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def rows_of(path):
    return [row["n"] for row in read_rows(path, unfinished="skip")]


def test_an_address_has_the_methods_of_a_path_and_keeps_its_slashes(place):
    path = place / "sft" / "data.json"
    assert str(path) == os.fspath(path) == f"{place}/sft/data.json" and "://" in str(path)
    assert (path.name, path.stem, path.suffix, path.parent.parent) == (
        "data.json",
        "data",
        ".json",
        place,
    )
    assert not path.exists() and not place.is_dir()
    files.write_file(path, "é")
    assert path.is_file() and place.is_dir() and path.parent.is_dir() and not path.is_dir()
    assert path.read_text(encoding="utf-8") == "é" and path.stat().st_size == 2
    assert list(place.iterdir()) == [path.parent] and names(place) == ["sft", "sft/data.json"]
    assert pickle.loads(pickle.dumps(path)) == path == as_path(str(path)) == as_path(path)
    assert path.relative_to(place).parts == ("sft", "data.json") and path.is_relative_to(place)
    assert not path.is_relative_to(as_path("gs://other/run"))
    assert files.absolute(path) == path == path.resolve()


def test_what_pathlib_makes_of_an_address_is_taken_as_it_was_meant():
    assert str(as_path(pathlib.Path("memory://bucket/run"))) == "memory://bucket/run"
    assert as_path("runs/a:b/c") == pathlib.Path("runs/a:b/c")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("gs://nowhere/run", "gs://nowhere/run: there is no such bucket"),
        ("gs://", "names no bucket"),
        ("nosuch://bucket/run", "no scheme nosuch:// is known"),
        ("file:///run", "give the path alone"),
        ("https://host/run", "download the file"),
        ("cmexam:gs://nowhere/test.csv", "gs://nowhere/test.csv: there is no such bucket"),
        ("doctor=gs://nowhere/model", "gs://nowhere/model: there is no such bucket"),
        (pathlib.Path("gs://nowhere/run"), "there is no such bucket"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_with_its_field(bucket, address, told):
    with pytest.raises(ValueError, match="config.model: .*") as error:
        files.check_address(address, name="config.model")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_scheme_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'huatuo_jax\[s3\]'"):
        files.check_address("s3://bucket/run", name="workdir")


@pytest.mark.parametrize(
    ("status", "told"), [(403, "no right to do this there"), (401, "no valid login")]
)
def test_a_bucket_that_refuses_is_one_line(bucket, no_waiting, status, told):
    bucket.refuses = lambda method, path: status
    with pytest.raises(ValueError, match=told):
        files.check_address("gs://bucket/run", name="workdir")


def test_the_right_to_see_the_bucket_itself_is_not_needed(bucket):
    bucket.refuses = lambda method, path: 403 if path == "/storage/v1/b/bucket" else None
    files.check_address("gs://bucket/run", name="workdir")
    files.write_file(as_path("gs://bucket/run/a"), "1")
    files.check_address("gs://bucket/run", name="workdir")


def test_a_bucket_is_asked_once_for_all_addresses_of_a_config(bucket):
    for name in ("a", "b", "c"):
        files.check_address(f"gs://bucket/{name}", name="config.model")
    asked = [path for _, path, _ in bucket.requests]
    assert "/storage/v1/b/bucket/o/a" in asked and "/storage/v1/b/bucket/o/b" not in asked


def test_a_server_that_stays_away_is_one_line(bucket, no_waiting):
    bucket.refuses = lambda method, path: 503
    with pytest.raises(ValueError, match="workdir: .*the server does not answer as it should"):
        files.check_address("gs://bucket/run", name="workdir")


def test_an_object_appears_when_it_is_whole(place, monkeypatch):
    half = (5 * 2**20 if str(place).startswith("s3") else 2**18) // 2
    monkeypatch.setattr(addresses, "_WHOLE_BYTES", 2 * half)  # The least that a server takes.
    path, chunks = place / "whole", [bytes([n]) * half for n in range(9)]

    def seen(chunks):
        for chunk in chunks:
            assert not path.exists() or str(place).startswith("memory")
            yield chunk

    files.write_chunks(path, seen(chunks))
    assert path.read_bytes() == b"".join(chunks)
    with pytest.raises(ZeroDivisionError):
        files.write_chunks(place / "torn", (chunk if chunk[0] < 8 else 1 // 0 for chunk in chunks))
    assert names(place) == ["whole"]
    with files.open_binary(path) as file:
        file.seek(half - 1)
        assert file.read(2) == b"\0\1" and file.seek(-1, os.SEEK_END) and file.read() == b"\x08"
    kept = bytearray(4)
    assert files.read_into(path, 2 * half - 2, memoryview(kept)) == 0 and kept == b"\1\1\2\2"
    assert files.read_into(path, 9 * half - 1, memoryview(kept)) == 3


def test_rows_are_appended_cut_and_read_as_in_a_file(place):
    path = place / "metrics.jsonl"
    with AppendedFile(path, locked=True) as file:
        for n in range(5):
            file.append([{"n": n}])
            end = file.size()
            file.append([{"n": n + 0.5}])
            assert file.row_at(end) == {"n": n + 0.5}
        assert rows_of(path) == [n / 2 for n in range(10)]
        file.keep_while(lambda row: row["n"] < 3)
        file.append([{"n": 3}])
        file.sync()
        assert rows_of(path) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert path.read_bytes().count(b"\n") == 7, "one object after closing"
    with AppendedFile(path, locked=False) as file:
        file.cut(0)
        assert rows_of(path) == []
    with AppendedFile(path, locked=False) as file:
        file.append([{"n": 1}])
        file.remove()
    assert names(place) == ["metrics.jsonl.lock", "metrics.jsonl.lock/00000001"]


def test_a_last_line_without_an_end_is_cut(place):
    path = place / "from_elsewhere.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    with AppendedFile(path, locked=False) as file:
        file.cut_unfinished()
        file.append([{"n": 3}])
    assert rows_of(path) == [1, 3]


def test_many_parts_are_joined_and_those_that_are_covered_are_never_read(place, monkeypatch):
    monkeypatch.setattr(addresses, "_MOST_SMALL_PARTS", 4)
    path = place / "rows.jsonl"
    file = AppendedFile(path, locked=False)
    for n in range(12):
        file.append([{"n": n}])
        file.sync()
        assert len(list((place / "rows.jsonl.parts").iterdir())) < 4
    before = {one: one.read_bytes() for one in place.rglob("*") if one.is_file()}
    file.close()
    assert rows_of(path) == list(range(12)) and names(place) == ["rows.jsonl"]
    for one, data in before.items():  # As a kill between joining and removing leaves it.
        if one != path:
            one.write_bytes(data)
    assert rows_of(path) == list(range(12))
    with AppendedFile(path, locked=False) as again:
        again.keep_while(lambda row: row["n"] < 7)
        again.append([{"n": 7}])
    assert rows_of(path) == list(range(8))


def test_what_a_killed_process_had_appended_is_there(bucket):
    code = (
        "import os, signal\n"
        "from huatuo_jax.core.files import AppendedFile\n"
        "file = AppendedFile('gs://bucket/rows.jsonl', locked=True)\n"
        "for n in range(3):\n"
        "    file.append([{'n': n}])\n"
        "    file.sync()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    path = as_path("gs://bucket/rows.jsonl")
    assert rows_of(path) == [0, 1, 2]
    # Its process is known to be gone: nobody waits for a sign of life.
    with AppendedFile(path, locked=True) as file:
        assert [line.row["n"] for line in file.lines()] == [0, 1, 2]


def test_a_failed_upload_is_an_error_of_the_next_call(bucket, no_waiting):
    file = AppendedFile("gs://bucket/rows.jsonl", locked=False)
    bucket.refuses = lambda method, path: 403 if path.startswith("/upload") else None
    file.append([{"n": 1}])
    with pytest.raises(OSError, match="gs://bucket/rows.jsonl could not be written: no right"):
        file.sync()


def test_a_folder_is_unfinished_until_all_is_written(place):
    target = place / "model"
    with folders.writing_directory(target) as folder:
        files.write_file(folder / "a", "1")
        with files.staged_folder(folder / "tokenizer") as local:
            (local / "b").write_text("2")
        assert folders.is_unfinished(target)
    assert not folders.is_unfinished(target) and names(target) == ["a", "tokenizer", "tokenizer/b"]
    with pytest.raises(FileExistsError):
        folders.writing_directory(target).__enter__()
    with pytest.raises(ZeroDivisionError):
        with folders.writing_directory(target, overwrite=True) as folder:
            assert names(folder) == [".unfinished"], "the older one is gone"
            files.write_file(folder / "c", str(1 // 0))
    assert not target.exists()
    kept = folders.writing_directory(target)
    files.write_file(kept.__enter__() / "half", "1")  # As a kill leaves it.
    assert folders.is_unfinished(target)
    with folders.writing_directory(target) as folder:
        files.write_file(folder / "whole", "1")
    assert names(target) == ["whole"]
    kept.gen.close()


def test_the_objects_of_a_folder_are_removed_at_once(place, monkeypatch):
    for number in range(8):
        files.write_file(place / f"{number}", "")
    together, remove = threading.Barrier(8, timeout=60), addresses._remove
    monkeypatch.setattr(addresses, "_remove", lambda *one: (together.wait(), remove(*one)))
    files.remove_folder(place)
    assert not place.exists()


def test_a_local_copy_follows_the_files(place):
    files.write_file(place / "a.json", "1")
    files.write_file(place / "weights", "1")
    first = files.local_copy(place, ["*.json"])
    assert names(first) == ["a.json"] and files.local_copy(place, ["*.json"]) == first
    assert first.name == place.name
    files.write_file(place / "a.json", "22")
    assert (files.local_copy(place, ["*.json"]) / "a.json").read_text() == "22"


def test_a_second_run_is_refused_by_name(place, short_lives):
    with files.locked(place):
        with files.locked(place):  # Of the same run.
            pass
        told = rf"{place} is in use by another run: process {os.getpid()} on "
        with pytest.raises(ValueError, match=told):
            addresses.BucketLock(place)
    with files.locked(place):
        pass


def test_a_lock_without_a_sign_of_life_is_taken_over(place, short_lives, capsys):
    addresses.BucketLock(place).release()
    path = place.with_name("run.lock") / "00000001"
    held = json.loads(path.read_text(encoding="utf-8")) | {"host": "gone", "released": False}
    path.write_text(json.dumps(held | {"time_s": held["time_s"] + 3600}))  # Its clock is wrong.
    lock = addresses.BucketLock(place)
    assert "held by process" in capsys.readouterr().err
    assert names(place.with_name("run.lock")) == ["00000002"]
    lock.release()


def test_a_living_owner_whose_clock_is_slow_keeps_its_lock(place, short_lives, monkeypatch):
    clock = time.time
    monkeypatch.setattr(addresses.time, "time", lambda: clock() - 3600)
    with files.locked(place):
        held = json.loads((place.with_name("run.lock") / "00000001").read_text(encoding="utf-8"))
        assert addresses._patience_s(held) == 1.0
        monkeypatch.setattr(addresses, "_patience_s", lambda held: 0.2)  # As another's clock says.
        with pytest.raises(ValueError, match="in use by another run"):
            addresses.BucketLock(place)


def test_of_many_that_want_a_lock_one_has_it(place, short_lives):
    owners, refused, waited = [], [], []

    def try_it():
        try:
            owners.append(addresses.BucketLock(place))
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(6)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert (len(owners), len(refused)) == (1, 5)
    waiting = threading.Thread(
        target=lambda: waited.append(addresses.BucketLock(place, waits=True))
    )
    waiting.start()
    waiting.join(0.5)
    assert not waited
    owners[0].release()
    waiting.join()
    waited[0].release()


def test_an_owner_that_was_taken_for_dead_ends_its_process(bucket):
    code = (
        "import sys, time\n"
        "from huatuo_jax.core import addresses, files\n"
        "addresses.HEARTBEAT_S = 0.1\n"
        "with files.locked('gs://bucket/run'):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline() == "locked\n"
    files.write_file(as_path("gs://bucket/run.lock/00000002"), "{}")
    _, err = owner.communicate(timeout=30)
    assert owner.returncode == addresses.LOST_LOCK_EXIT_CODE
    assert err == "error: the lock of gs://bucket/run is lost: another run has taken it over\n"


def test_nothing_is_lost_or_doubled_where_the_server_fails_now_and_then(bucket, no_waiting):
    bucket.failing = 0.2
    place = as_path("gs://bucket/run")
    with files.locked(place), folders.writing_directory(place / "model") as folder:
        files.write_chunks(folder / "weights", [b"w" * 2**20])
        with AppendedFile(place / "rows.jsonl", locked=True) as file:
            for n in range(60):
                file.append([{"n": n}])
                if n % 2 == 0:
                    file.sync()
    assert rows_of(place / "rows.jsonl") == list(range(60)) and bucket.failures > 9
    assert names(place / "model") == ["weights"]
