"""What arrives on the Hub, end to end against a stub of it on the loopback."""

import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import warnings

import huggingface_hub
import jax
import numpy as np
import pytest
import transformers

from huatuo_jax.checkpoint import models
from huatuo_jax.hf.weight_files import open_tensor_source
from huatuo_jax.hub import uploads
from huatuo_jax.hub.account import find_token, kept_secret
from huatuo_jax.hub.push import push
from huatuo_jax.hub.uploads import PushConfig
from huatuo_jax.recipe import config as recipe_config
from huatuo_jax.recipe import export
from huatuo_jax.recipe import prompts as recipe_prompts
from tests.hub import runs, stub

ROOT = pathlib.Path(__file__).parents[2]
TOKEN = stub.WRITE_TOKEN


def config(run, hub, **fields):
    fields = {"repo": "demo", "token": TOKEN, "endpoint": hub.endpoint} | fields
    return PushConfig(run=str(run), **fields)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def released(run, part):
    """What is to be uploaded of an export without litter."""
    files = contents(run / "export" / part)
    if part == "policy":
        files["release.json"] = (run / "export" / "release.json").read_bytes()
    return files


def download(hub, repo, tmp_path):
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            repo, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache"
        )
    )


def start(run, hub, *flags, token=TOKEN, debug=True):
    """The command itself, in a process of its own that may reach the stub, and its output."""
    environment = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HOME=str(run.parent / "home"),
        HF_DEBUG=str(int(debug)),
    )
    if token is not None:
        environment["HF_TOKEN"] = token
    output = run.parent / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "launch/push.py", f"--run={run}", "--repo=demo", *flags],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, output


def test_what_arrives_is_the_export_bit_for_bit_and_loads(run, hub, tmp_path):
    told = []
    pushed = push(config(run, hub), told.append)
    assert [(one.part, one.repo, one.changed) for one in pushed] == [
        ("policy", "doctor/demo", True),
        ("reward", "doctor/demo-reward-model", True),
    ]
    assert told[-1].startswith("reward: pushed 5 files, ")
    for part, repo in (("policy", "doctor/demo"), ("reward", "doctor/demo-reward-model")):
        assert hub.repos["model", repo].private
        assert hub.files(repo) == released(run, part)
        folder = download(hub, repo, tmp_path)
        arrived = contents(folder)
        del arrived[".gitattributes"]
        assert arrived == released(run, part)
        exported = run / "export" / part
        ours, theirs = (models.load_params(models.find_model(one)) for one in (exported, folder))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        classes = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
        loaded = classes[part == "reward"].from_pretrained(folder).state_dict()
        for name, tensor in open_tensor_source(exported).tensors.items():
            np.testing.assert_array_equal(loaded[name].numpy(), tensor.read())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("头痛").input_ids, skip_special_tokens=True) == "头痛"


def test_large_files_go_in_parts_and_without_the_token(run, hub):
    push(config(run, hub, what=("policy",)), lambda _: None)
    parts = hub.asked(r"PUT /storage/\w+/\d+")
    sizes = [path.stat().st_size for path in (run / "export" / "policy").glob("*.safetensors")]
    assert len(sizes) > 2
    assert len(parts) == sum(-(-size // stub.CHUNK_BYTES) for size in sizes) > len(sizes)
    assert len(hub.asked("POST /doctor/demo.git/info/lfs/objects/verify")) == len(sizes)


def test_pushed_again_nothing_is_sent_and_nothing_is_committed(run, hub):
    push(config(run, hub), lambda _: None)
    uploaded, commits, told = list(hub.uploads), len(hub.asked("/commit/")), []
    again = push(config(run, hub), told.append)
    assert not any(one.changed for one in again)
    assert hub.uploads == uploaded and len(hub.asked("/commit/")) == commits
    assert told[-1].startswith("reward: nothing to push, all of it is there")
    (run / "export" / "policy" / "README.md").write_text(runs.CARD + "more\n", encoding="utf-8")
    assert [one.changed for one in push(config(run, hub), told.append)] == [True, False]
    assert hub.files("doctor/demo") == released(run, "policy")
    assert hub.uploads == uploaded


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_it_completes_without_a_second_upload(run, hub):
    hub.hold_after = 1
    process, output = start(run, hub)
    while not (hub.held.is_set() and hub.uploads):
        assert process.poll() is None, output.read_text(encoding="utf-8")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = hub.uploads
    assert not hub.asked("/commit/")
    hub.hold_after = None
    hub.released.set()
    process, output = start(run, hub)
    process.wait()
    text = output.read_text(encoding="utf-8")
    assert process.returncode == 0, text
    assert "policy: pushed" in text and "reward: pushed" in text
    assert hub.uploads.count(first) == 1 and len(set(hub.uploads)) == len(hub.uploads)
    assert hub.files("doctor/demo") == released(run, "policy")
    assert hub.files("doctor/demo-reward-model") == released(run, "reward")
    # The library was told to log every request, and still nobody learns the token.
    assert "authorization: <TOKEN>" in text and not files_with_token(run.parent)


def files_with_token(folder):
    return [
        path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_only_what_a_release_is_made_of_is_uploaded(run, hub, part):
    expected = released(run, part)
    litter = {path.relative_to(run).as_posix() for path in runs.write_litter(run)}
    push(config(run, hub), lambda _: None)
    assert hub.files("doctor/demo" if part == "policy" else "doctor/demo-reward-model") == expected
    told = []
    push(config(run, hub, dry_run=True), told.append)
    text = "\n".join(told)
    for name in litter:
        inside = name.removeprefix(f"export/{part}/")
        if inside != name:
            assert f"left out: {inside}: no " in text
    assert "left in the run: sft/: checkpoints with optimizer state" in text
    assert "left in the run: compiled/: compiled programs" in text
    assert "left in the run: labels.jsonl: data, which is pushed only where --what names it" in text


def test_a_dry_run_lists_all_and_makes_no_connection(run, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", None)  # Nothing could be opened.
    told = []
    cfg = config(run, hub, token=None, what=("policy", "reward", "data"), dry_run=True)
    assert push(cfg, told.append) == ()
    assert not hub.requests
    text = "\n".join(told)
    for part in ("policy", "reward"):
        for name, content in released(run, part).items():
            assert any(line.split()[:1] == [name] for line in told), name
            assert content
    assert "    # A policy" in told and "    # Prompts and AI feedback of a run" in told
    assert "to the private dataset repository demo-data of the token's owner, main: 4 files" in text
    assert told[-1] == "dry run: nothing was sent"


def test_visibility_is_private_unless_asked_otherwise(run, hub):
    push(config(run, hub, public=True, what=("policy",)), lambda _: None)
    assert not hub.repos["model", "doctor/demo"].private
    with pytest.raises(ValueError, match="'doctor/demo' is public already; give --public"):
        push(config(run, hub, what=("policy",)), lambda _: None)
    hub.add("doctor/demo-reward-model", private=True)
    with pytest.raises(ValueError, match="is private already, and --public does not change that"):
        push(config(run, hub, public=True, what=("reward",)), lambda _: None)


def test_an_organisation_takes_what_it_owns(run, hub):
    cfg = config(run, hub, repo="clinic/demo", reward_repo="clinic/judge")
    assert [one.repo for one in push(cfg, lambda _: None)] == ["clinic/demo", "clinic/judge"]


def test_a_branch_is_made_where_it_is_missing_and_said_so(run, hub):
    told = []
    cfg = config(run, hub, what=("policy",), revision="next")
    push(cfg, told.append)
    assert "policy: made the branch next of doctor/demo, from main" in told
    assert hub.files("doctor/demo", revision="next") == released(run, "policy")
    assert hub.files("doctor/demo") == {}
    told.clear()
    assert not push(cfg, told.append)[0].changed
    assert not any("made the branch" in line for line in told)
    with pytest.raises(ValueError, match="revision='v1' is a tag of doctor/demo"):
        push(config(run, hub, what=("policy",), revision="v1"), told.append)


def test_a_pull_request_is_opened_once_and_gone_on_with(run, hub):
    hub.add("museum/demo", private=False)
    told = []
    cfg = config(
        run, hub, repo="museum/demo", what=("policy",), create_pr=True, public=True,
        commit_message="A better policy",
    )  # fmt: skip
    (pushed,) = push(cfg, told.append)
    assert pushed.url == f"{hub.endpoint}/museum/demo/discussions/1"
    (request,) = hub.repos["model", "museum/demo"].requests
    assert request["title"] == "A better policy"
    assert hub.files("museum/demo") == {}
    assert hub.files("museum/demo", revision="refs/pr/1") == released(run, "policy")
    (run / "export" / "policy" / "README.md").write_text(runs.CARD + "more\n", encoding="utf-8")
    push(cfg, told.append)
    assert "policy: pull request 1 of museum/demo is open, going on" in told
    assert len(hub.repos["model", "museum/demo"].requests) == 1
    assert hub.files("museum/demo", revision="refs/pr/1") == released(run, "policy")


def test_the_token_is_of_the_argument_then_the_environment_then_the_login(monkeypatch):
    login = pathlib.Path(huggingface_hub.constants.HF_TOKEN_PATH)
    with pytest.raises(ValueError, match="no token: give --token or HF_TOKEN, or log in"):
        find_token(None)
    login.parent.mkdir()
    login.write_text("hf_of_the_login\n", encoding="utf-8")
    assert (find_token(None).value, find_token(None).origin) == (
        "hf_of_the_login",
        "the stored login",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    assert find_token(None).value == "hf_of_the_environment"
    assert find_token("hf_of_the_argument").value == "hf_of_the_argument"
    assert "hf_of" not in repr(find_token("hf_of_the_argument"))
    assert "hf_of" not in repr(PushConfig(run="x", repo="y", token="hf_of_the_argument"))
    for wrong in ("short", "hf_with a blank", "hf_with_\n_a_line", "hf_不是_ascii"):
        with pytest.raises(ValueError, match="the token of --token is none") as caught:
            find_token(wrong)
        assert wrong not in str(caught.value)


def speak():
    logging.getLogger("huggingface_hub.any").warning("sent %s", TOKEN)
    try:
        raise OSError(f"refused {TOKEN}")
    except OSError:
        logging.getLogger("elsewhere").exception("failed")
    warnings.warn(f"the token {TOKEN} is old", stacklevel=1)


def test_whoever_logs_or_warns_of_the_token_says_a_mask(capsys, caplog):
    with pytest.warns(UserWarning, match=r"the token \[token\] is old") as warned:
        with kept_secret(find_token(TOKEN)):
            speak()
    assert TOKEN not in "".join(str(one.message) for one in warned)
    assert "sent [token]" in caplog.text and "refused [token]" in caplog.text
    captured = capsys.readouterr()
    assert TOKEN not in caplog.text + captured.out + captured.err


def test_names_of_files_are_those_of_the_recipe():
    assert uploads.RELEASE_FILE == export.RELEASE_FILE
    assert uploads.CARD_FILE == export.CARD_FILE
    assert uploads.DATA_FILES[:2] == (recipe_prompts.TRAIN_FILE, recipe_config.LABELS_FILE)


def test_release_json_goes_with_the_policy(run, hub):
    push(config(run, hub), lambda _: None)
    assert json.loads(hub.files("doctor/demo")["release.json"])["policy"] == "folder"
    assert "release.json" not in hub.files("doctor/demo-reward-model")
