"""The same seed gives the same bytes, with the standard library alone, on any Python."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import huatuo_jax
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.files import (
    EXAMS,
    SETTINGS_FILE,
    ClinicConfig,
    ClinicSizes,
    clinic_records,
    prepare_clinic,
    write_clinic,
)
from huatuo_jax.data.readers import read_comparisons, read_dialogues
from huatuo_jax.data.records import KINDS

SIZES = {
    "dialogues": 120,
    "held_out_dialogues": 40,
    "prompts": 40,
    "held_out_prompts": 20,
    "cases": 20,
    "exams": 24,
    "pairs": 6,
}
# Of all files of seed 0 in these sizes. It changes with the tables and the grammar, and then
# training data does, too.
DIGEST = "92190c462b0b8b37682a88719cbf5358546c247d5a55b79fee4c4708031a4b61"
PROGRAM = f"""
import hashlib, pathlib, sys
from huatuo_jax.clinic import judge, patient, planted
from huatuo_jax.clinic.files import ClinicSizes, write_clinic
paths = write_clinic(sys.argv[1], seed=0, sizes=ClinicSizes(**{SIZES!r}))
digest = hashlib.sha256()
for name in sorted(paths):
    digest.update(name.encode() + paths[name].read_bytes())
print(digest.hexdigest())
"""
ROOT = pathlib.Path(huatuo_jax.__file__).resolve().parents[1]


def digest_of(python, folder, *flags):
    done = subprocess.run(
        [python, *flags, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}", folder],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_bytes_are_known_and_need_the_standard_library_only(tmp_path):
    assert digest_of(sys.executable, tmp_path, "-I", "-S") == DIGEST


@pytest.mark.parametrize("python", ["python3.12", "python3.13", "python3.14"])
def test_other_versions_of_python_give_the_same_bytes(python, tmp_path):
    there = shutil.which(python)
    if there is None or subprocess.run([there, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{python} is not there")
    assert digest_of(there, tmp_path) == DIGEST


def test_another_seed_gives_another_clinic(tmp_path):
    sizes = ClinicSizes(**SIZES)
    one, two = (write_clinic(tmp_path / str(seed), seed=seed, sizes=sizes) for seed in (0, 1))
    assert all(one[name].read_bytes() != two[name].read_bytes() for name in one)


def test_every_file_has_the_rows_asked_for_and_is_read_by_the_projects_readers(tmp_path):
    paths = write_clinic(tmp_path, sizes=ClinicSizes(**SIZES))
    counts = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items()
    }
    assert sum(counts[f"{kind}.jsonl"] for kind in KINDS) == SIZES["dialogues"]
    assert sum(counts[f"held_out_{kind}.jsonl"] for kind in KINDS) == SIZES["held_out_dialogues"]
    assert counts["prompts.jsonl"] == 40 and counts["held_out_prompts.jsonl"] == 20
    assert counts["cases.jsonl"] == 20 and counts["exams.jsonl"] == 24
    for difference in ("truth", "manner", "length"):
        pairs = list(read_comparisons(paths[f"pairs_{difference}.jsonl"]))
        assert [pair.extra["differs_in"] for pair in pairs] == [difference] * SIZES["pairs"]
    ids = [
        json.loads(line)["id"]
        for path in paths.values()
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(set(ids)) == len(ids)
    for kind in KINDS:
        rows = list(read_dialogues(paths[f"{kind}.jsonl"], kind=kind, source="clinic"))
        assert len(rows) == counts[f"{kind}.jsonl"]
        assert all(row.extra["diagnosis"] for row in rows)


def test_the_hash_is_that_of_what_was_written(tmp_path):
    paths = write_clinic(tmp_path, seed=0, sizes=ClinicSizes(**SIZES))
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(name.encode() + paths[name].read_bytes())
    assert digest.hexdigest() == DIGEST


def test_less_than_none_is_refused():
    with pytest.raises(ValueError, match="prompts is -1; it should be 0 or more"):
        ClinicSizes(prompts=-1)


TINY = ClinicSizes(
    dialogues=24, held_out_dialogues=12, prompts=6, held_out_prompts=4, cases=2, exams=2, pairs=2
)


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_clinic_that_stands_is_found_and_not_written_again(tmp_path):
    cfg = ClinicConfig(seed=1, sizes=TINY)
    prepare_clinic(tmp_path / "clinic", cfg, in_use=False)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "clinic").iterdir()}
    prepare_clinic(tmp_path / "clinic", cfg, in_use=True)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_clinic_takes_the_place_of_one_that_nothing_was_made_of(tmp_path):
    prepare_clinic(tmp_path / "one", ClinicConfig(seed=1, sizes=TINY), in_use=False)
    prepare_clinic(tmp_path / "one", ClinicConfig(seed=2, sizes=TINY), in_use=False)
    prepare_clinic(tmp_path / "two", ClinicConfig(seed=2, sizes=TINY), in_use=False)
    assert bytes_in(tmp_path / "one") == bytes_in(tmp_path / "two")


def test_another_clinic_than_the_one_in_use_is_refused_by_what_differs(tmp_path):
    folder = tmp_path / "clinic"
    prepare_clinic(folder, ClinicConfig(seed=1, sizes=TINY), in_use=False)
    before = bytes_in(folder)
    with pytest.raises(ValueError, match="another clinic .*seed: 1 before, 2 now") as error:
        prepare_clinic(folder, ClinicConfig(seed=2, sizes=TINY), in_use=True)
    assert "\n" not in str(error.value) and bytes_in(folder) == before


def test_files_that_were_cut_or_changed_are_mended_or_refused(tmp_path):
    cfg, folder = ClinicConfig(sizes=TINY), tmp_path / "clinic"
    prepare_clinic(folder, cfg, in_use=False)
    before = bytes_in(folder)
    (folder / SETTINGS_FILE).unlink()  # As a write that was killed leaves it.
    (folder / "exams.jsonl").unlink()
    prepare_clinic(folder, cfg, in_use=False)
    assert bytes_in(folder) == before
    (folder / "exams.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="another clinic"):
        prepare_clinic(folder, cfg, in_use=True)


def test_code_that_changed_and_writes_the_same_bytes_is_no_other_clinic(tmp_path):
    cfg, folder = ClinicConfig(sizes=TINY), tmp_path / "clinic"
    prepare_clinic(folder, cfg, in_use=False)
    before = bytes_in(folder)
    settings = json.loads(before[SETTINGS_FILE]) | {"code": "of another version"}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    prepare_clinic(folder, cfg, in_use=True)
    assert bytes_in(folder) == before


def test_patients_have_the_most_common_diseases_where_a_clinic_has_few():
    sizes = ClinicSizes(**SIZES | {"diseases": 5})
    weights = sorted((row.weight for row in DISEASES.values()), reverse=True)
    found = set()
    for name, rows in clinic_records(seed=0, sizes=sizes).items():
        for row in rows:
            if name != EXAMS:
                record = row.to_json()
                found.add(record.get("diagnosis") or record["doctor_diagnosis"])
    assert len(found) == 5
    assert min(DISEASES[name].weight for name in found) >= weights[4]


@pytest.mark.parametrize("number", [0, len(DISEASES) + 1])
def test_more_diseases_than_the_table_has_are_refused(number):
    with pytest.raises(ValueError, match=f"diseases is {number}; it should be 1 to"):
        ClinicSizes(diseases=number)
