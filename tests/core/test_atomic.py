import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from huatuo_jax.core.files import hash_of_files
from huatuo_jax.core.folders import is_unfinished, writing_directory


def files_of(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, text, **options):
    with writing_directory(target, **options) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text(text)
        (folder / "config.json").write_text(text)


def test_a_folder_appears_whole_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "runs" / "export"
    with writing_directory(target) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == target.parent
        assert is_unfinished(folder) and not is_unfinished(target)
        assert not target.exists()
    assert files_of(target) == {"a": "1"}
    assert names_in(target.parent) == ["export"]


def test_an_error_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    target = tmp_path / "export"
    with pytest.raises(KeyboardInterrupt), writing_directory(target) as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []
    write(target, "old")
    with pytest.raises(ZeroDivisionError), writing_directory(target, overwrite=True) as folder:
        (folder / "a").write_text("1")
        raise ZeroDivisionError
    assert names_in(tmp_path) == ["export"]
    assert (target / "config.json").read_text() == "old"


def test_a_folder_with_something_in_it_is_only_replaced_when_asked(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    write(target, "old")  # an empty folder may be filled
    with pytest.raises(FileExistsError, match="export is there and not empty"):
        write(target, "new")
    assert (target / "config.json").read_text() == "old"
    with writing_directory(target, overwrite=True) as folder:
        (folder / "only").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert files_of(target) == {"only": "new"}
    assert names_in(tmp_path) == ["export"]


def test_a_folder_filled_by_another_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "export"
    with pytest.raises(FileExistsError), writing_directory(target) as folder:
        (folder / "a").write_text("mine")
        write(target, "theirs")
    assert (target / "config.json").read_text() == "theirs"
    assert names_in(tmp_path) == ["export"]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "export"
    write(target, "old")
    replace = os.replace

    def failing(source, destination):
        if pathlib.Path(destination) == target and "tmp" in os.fspath(source) and not failed:
            failed.append(source)
            raise OSError("no more")
        replace(source, destination)

    failed = []
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no more"):
        write(target, "new", overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["export"]


def test_a_file_in_the_way_and_a_temporary_name_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is a file"):
        write(tmp_path / "file", "new", overwrite=True)
    with pytest.raises(ValueError, match="named like an unfinished folder"):
        write(tmp_path / "a.tmp-0123abcd", "new")
    with pytest.raises(OSError):
        write(tmp_path / "file" / "below", "new")


def test_only_exact_temporary_names_are_unfinished():
    assert is_unfinished("/models/export.tmp-0123abcd")
    for name in ("export", "export.tmp", "export.tmp-0123abc", "export.tmp-0123abcde", "a.tmp-x"):
        assert not is_unfinished(f"/models/{name}")


KILLED = """
import os, sys, time

from huatuo_jax.core.folders import writing_directory

target, moment = sys.argv[1:]


def hang(now):
    if now == moment:
        print("ready", flush=True)
        time.sleep(60)


def watch(event, args):
    if event == "os.rename":
        hang("first rename" if os.fspath(args[0]) == target else "second rename")


sys.addaudithook(watch)
with writing_directory(target, overwrite=True) as folder:
    (folder / "config.json").write_text("new")
    hang("in the block")
"""


def kill_writer(target, moment):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, target, moment],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("moment", ["in the block", "first rename"])
def test_a_kill_keeps_the_old_folder_and_the_next_write_sweeps_up(tmp_path, moment):
    target = tmp_path / "export"
    write(target, "old")
    kill_writer(target, moment)
    assert (target / "config.json").read_text() == "old"
    leftovers = [path for path in tmp_path.iterdir() if path != target]
    assert len(leftovers) == 1 and is_unfinished(leftovers[0])
    write(target, "next", overwrite=True)
    assert names_in(tmp_path) == ["export"]
    assert (target / "config.json").read_text() == "next"


def test_a_kill_between_the_two_renames_keeps_both_folders_under_temporary_names(tmp_path):
    target = tmp_path / "export"
    write(target, "old")
    kill_writer(target, "second rename")
    assert not target.exists()
    kept = sorted((path / "config.json").read_text() for path in tmp_path.iterdir())
    assert kept == ["new", "old"] and all(map(is_unfinished, tmp_path.iterdir()))
    with writing_directory(target):
        assert len(names_in(tmp_path)) == 3  # nothing is swept before a whole target stands
    assert names_in(tmp_path) == ["export"]


def test_the_folder_of_a_writer_that_still_runs_is_left_alone(tmp_path):
    target = tmp_path / "export[1]*"
    with writing_directory(target) as outer:
        (outer / "a").write_text("outer")
        write(target, "inner")
        assert outer.is_dir()
        (outer / "b").write_text("still here")
        with pytest.raises(FileExistsError):
            write(target, "third")
        with pytest.raises(ZeroDivisionError), writing_directory(target, overwrite=True):
            raise ZeroDivisionError
        assert files_of(outer) == {"a": "outer", "b": "still here"}
        for path in (target / "below" / "file", target / "config.json"):
            path.unlink()
        (target / "below").rmdir()
    assert files_of(target) == {"a": "outer", "b": "still here"}


def test_the_hash_of_files_is_that_of_their_names_and_bytes_in_order(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_bytes(b"a")
    two.write_bytes(b"b\r\n")
    wanted = hashlib.sha256(b"one.py\0a" + b"two.py\0b\r\n").hexdigest()
    assert hash_of_files([one, two]) == wanted != hash_of_files([two, one])


def _modules_with(pattern):
    package = pathlib.Path(__file__).resolve().parents[2] / "huatuo_jax"
    return {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }


def test_folders_are_made_by_the_one_function_that_knows_addresses():
    assert _modules_with(r"\.mkdir\(|makedirs\(") == {"core/files.py", "core/folders.py"}


def test_paths_are_made_by_the_one_function_that_knows_addresses():
    """All others name files of the package, the system, or a temporary or the hub's folder."""
    assert _modules_with(r"pathlib\.Path\((?!__file__)") == {
        "checkpoint/convert.py",
        "checkpoint/models.py",
        "chat.py",
        "cli.py",
        "core/config.py",
        "core/files.py",
        "core/folders.py",
        "data/files.py",
        "data/inspection_report.py",
        "data/readers.py",
        "data/tokenizing.py",
        "evaluation/exam_sets.py",
        "generation/cache.py",
        "hf/tokenizer.py",
        "hub/push.py",
        "hub/uploads.py",
        "judge/spending.py",
        "recipe/model_cards.py",
        "recipe/prompts.py",
        "recipe/stages.py",
        "reward/stage.py",
        "reward_functions/functions.py",
        "training/initial_model.py",
    }
    # Python's own functions would make a folder named `gs:`, or look into one.
    beside = (
        r"(?<!def )(?<![\w.])open\(|os\.path\.(exists|isfile|isdir|abspath|realpath)|shutil\.copy"
    )
    assert _modules_with(beside) == {
        "core/addresses.py",
        "core/files.py",
        "hf/safetensors_files.py",
    }
