"""What cannot be pushed ends in one clear line, before anything is uploaded where that can be."""

import json
import re
import traceback
import types

import huggingface_hub
import pytest

from huatuo_jax.hf.weight_files import open_tensor_source
from huatuo_jax.hub.account import reason_of
from huatuo_jax.hub.push import push
from huatuo_jax.hub.uploads import PushConfig
from huatuo_jax.recipe.recipe import Journal
from tests.hub import stub
from tests.hub.stub import Refused
from tests.hub.test_push import TOKEN, config, start

QUOTA = "Private repository storage limit reached, please upgrade your plan"


def refusal(cfg, told=lambda _: None):
    """The message of what is refused: one line, without the token."""
    with pytest.raises(ValueError) as caught:
        push(cfg, told)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message
    trace = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in trace and "httpx" not in trace
    return message


def writes(hub):
    return [
        one
        for one in hub.asked("^(POST|PUT)")
        if not one.endswith(("/api/validate-yaml", "/objects/verify"))
    ]


@pytest.fixture
def quick(monkeypatch):
    """The library's waits between tries take no time."""
    clock = types.SimpleNamespace(sleep=lambda _: None, time=lambda: 0.0, monotonic=lambda: 0.0)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)


def test_without_a_token_nothing_is_asked(run, hub):
    message = refusal(config(run, hub, token=None))
    assert message.startswith("no token: give --token or HF_TOKEN, or log in with `hf auth login`")
    assert not hub.requests


@pytest.mark.parametrize(
    ("changes", "fields", "expected"),
    [
        ({"role": "read"}, {}, "the token of 'doctor' may only read; make one with the right"),
        (
            {"role": "fineGrained", "fineGrained": {"scoped": []}},
            {},
            "the fine-grained token of 'doctor' lacks the permission to write to 'doctor/demo'",
        ),
        (
            {"role": "write"},
            {"repo": "nurse/demo"},
            "repo='nurse/demo' is somebody else's: the token of 'doctor' may write to doctor, "
            "clinic; --create_pr proposes a change to another's",
        ),
        ({"role": "write"}, {"repo": "museum/demo"}, "repo='museum/demo' is somebody else's"),
        (
            {"role": "write"},
            {"repo": "nurse/demo", "create_pr": True},
            "repo='nurse/demo': there is no such model repository, and it cannot be made in "
            "somebody else's name",
        ),
    ],
)
def test_a_token_that_may_not_write_is_told_first(run, hub, changes, fields, expected):
    hub.accounts[TOKEN] = stub.WHOAMI | {"auth": {"accessToken": changes}}
    assert refusal(config(run, hub, **fields)).startswith(expected)
    assert not writes(hub)


def test_a_fine_grained_token_may_write_where_it_says_so(run, hub):
    scope = {"entity": {"type": "model", "name": "doctor/demo"}, "permissions": ["repo.write"]}
    role = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    hub.accounts[TOKEN] = stub.WHOAMI | {"auth": {"accessToken": role}}
    push(config(run, hub, what=("policy",)), lambda _: None)
    assert "lacks the permission to write to 'doctor/demo-reward-model'" in refusal(
        config(run, hub)
    )


def test_a_token_that_the_hub_does_not_know_is_named_by_its_origin(run, hub, monkeypatch):
    hub.accounts.clear()
    expected = "the token of {} cannot be checked: the Hub does not accept the token"
    assert refusal(config(run, hub)).startswith(expected.format("--token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal(config(run, hub, token=None)).startswith(expected.format("HF_TOKEN"))


def no_export(run):
    (run / "export").rename(run / "elsewhere")


def interrupted(run):
    Journal(run).start("export", {}, {})


def begun_again(run):
    Journal(run).start("ppo", {}, {})


def no_release(run):
    (run / "export" / "release.json").unlink()


def no_shard(run):
    next((run / "export" / "policy").glob("*-00002-of-*.safetensors")).unlink()


def cut_shard(run):
    path = next((run / "export" / "policy").glob("*-00002-of-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])


def no_tokenizer(run):
    (run / "export" / "reward" / "tokenizer.json").unlink()


def no_card(run):
    (run / "export" / "reward" / "README.md").unlink()


def swapped(run):
    policy, reward = (run / "export" / part for part in ("policy", "reward"))
    policy.rename(run / "aside")
    reward.rename(policy)
    (run / "aside").rename(reward)


def broken_card(run):
    (run / "export" / "policy" / "README.md").write_text("---\na: [\n---\n", encoding="utf-8")


def headless_card(run):
    (run / "export" / "policy" / "README.md").write_text("# A policy\n", encoding="utf-8")


def secret_in_card(run):
    with (run / "export" / "policy" / "README.md").open("a") as file:
        file.write("\njudged by https://me:password@judge.example/v1\n")


def key_in_release(run):
    release = {"policy": "folder", "sentence": "sk-" + "proj1234" * 4}
    (run / "export" / "release.json").write_text(json.dumps(release), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (no_export, r"export: no such folder; it is made by the stage 'export' of the recipe"),
        (interrupted, r"run: the stage 'export' is not finished; run the recipe again"),
        (begun_again, r"run: the stage 'ppo' is not finished; run the recipe again"),
        (no_release, r"export: the export is not finished; run the recipe again"),
        (no_shard, r"export/policy: incomplete \(.*00002-of-.*: missing, though .* names it"),
        (cut_shard, r"export/policy: incomplete \(.*00002-of-.*: damaged or cut short"),
        (no_tokenizer, r"export/reward: incomplete, there is no tokenizer; "),
        (no_card, r"export/reward: incomplete, there is no README.md; "),
        (swapped, r"export/policy: not the policy, it has a score head; "),
        (broken_card, r"policy/README.md: what stands between its lines of --- is not valid: "),
        (
            headless_card,
            r"policy/README.md: must begin with fields in YAML between two lines of ---",
        ),
        (secret_in_card, r"policy/README.md:\d+: holds what looks like a key, or an address with"),
        (key_in_release, r"release.json:1: holds what looks like a key"),
    ],
)
def test_an_export_that_is_not_whole_is_told_before_the_token_is_used(run, hub, change, expected):
    change(run)
    message = refusal(config(run, hub))
    assert re.search(expected, message), message
    assert "password" not in message.replace("address with a password", "")
    assert "proj1234" not in message
    assert not hub.requests


def test_a_run_that_is_no_folder_is_named(hub, tmp_path):
    assert refusal(config(tmp_path / "none", hub)).endswith("none' is no folder")


def test_a_file_with_the_token_itself_is_not_uploaded(run, hub):
    token = "a-token-of-no-usual-form"
    hub.accounts[token] = stub.WHOAMI
    with (run / "export" / "policy" / "generation_config.json").open("w") as file:
        json.dump({"token": token}, file)
    message = refusal(config(run, hub, token=token))
    assert message.startswith("policy: generation_config.json holds the token of --token")
    assert token not in message and not hub.requests


def test_a_card_that_the_hub_refuses_ends_before_a_repository_is_made(run, hub):
    card = run / "export" / "reward" / "README.md"
    card.write_text("---\nbase_model: /home/me/base\n---\n", encoding="utf-8")
    message = refusal(config(run, hub))
    assert message == f'the Hub refuses {card}: "base_model" with value "/..." is not valid. ' + (
        "Use a model id"
    )
    assert not writes(hub) and not hub.repos


@pytest.mark.parametrize(
    ("at", "fault", "expected"),
    [
        (
            "POST .*/commit/",
            Refused(403, QUOTA),
            "policy: the upload to doctor/demo did not end: the storage quota of the account is "
            f"full (HTTP 403: {QUOTA})",
        ),
        (
            "POST .*objects/batch",
            Refused(413, "too much at once"),
            "policy: the upload to doctor/demo did not end: it is too large for the Hub, or the "
            "storage quota is full (HTTP 413: too much at once)",
        ),
        (
            "POST /api/repos/create",
            Refused(402, "Payment required"),
            "policy: doctor/demo cannot be made: the plan or storage quota of the account does not "
            "allow it (HTTP 402: Payment required)",
        ),
        (
            "PUT /storage",
            Refused(403, "signature expired"),
            "policy: the upload to doctor/demo did not end: the token may not do this (HTTP 403: "
            "signature expired)",
        ),
        (
            "GET /api/whoami-v2",
            Refused(429, "slow down", headers={"Retry-After": "60"}),
            "the token of --token cannot be checked: the Hub's rate limit is reached (HTTP 429); "
            "wait 60 s",
        ),
        (
            "POST .*/preupload/",
            Refused(429, "too many requests"),
            "policy: the upload to doctor/demo did not end: the Hub's rate limit is reached (HTTP "
            "429: too many requests); wait some minutes",
        ),
        (
            "PUT /storage",
            Refused(500, "disk trouble"),
            "policy: the upload to doctor/demo did not end: the Hub has failed (HTTP 500: disk "
            "trouble); wait a while",
        ),
        (
            "POST .*/commit/",
            Refused(412, "A commit has happened since"),
            "policy: the upload to doctor/demo did not end: the repository has changed meanwhile "
            "(HTTP 412: A commit has happened since)",
        ),
        (
            "GET /api/models/doctor/demo",
            Refused(500, "on fire"),
            "policy: doctor/demo cannot be looked at: the Hub has failed (HTTP 500: on fire); wait "
            "a while",
        ),
    ],
)
@pytest.mark.usefixtures("quick")
def test_what_the_hub_refuses_is_said_in_its_words(run, hub, at, fault, expected):
    hub.faults[at] = fault
    message = refusal(config(run, hub))
    assert (
        message.removesuffix("; pushed before that: nothing; run the same command again to resume")
        == expected
    )
    assert not hub.asked("/commit/") or fault.status in (403, 412)
    assert all(hub.files(repo) == {} for _, repo in hub.repos)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("client error (403 Forbidden)", "the token may not, or the quota is full (HTTP 403)"),
        ("client error (413 Payload Too Large)", "it is too large for the Hub, or the storage"),
        ("server error (502 Bad Gateway)", "the Hub has failed (HTTP 502); wait a while"),
    ],
)
def test_a_status_within_an_error_of_the_xet_client_is_told_by_its_meaning(status, expected):
    error = ConnectionError(f"Network error: Request error: HTTP status {status}, domain: http://x")
    assert reason_of(error, endpoint="http://x").startswith(expected)
    refused = reason_of(ConnectionError("Network error: refused"), endpoint="http://x")
    assert refused.startswith("http://x cannot be reached (ConnectionError: Network error: refused")


def test_large_files_that_the_hub_refuses_one_by_one_are_said_so(run, hub):
    size_error = {"code": 413, "message": "file too large for this plan"}
    answer = {"objects": [{"oid": "0" * 64, "size": 1, "error": size_error}]}
    hub.faults["objects/batch"] = Refused(200, body=answer)
    assert "file too large for this plan" in refusal(config(run, hub))


def test_a_part_that_fails_claims_nothing_and_says_what_was_pushed_before(run, hub):
    hub.faults["/commit/.*"] = Refused(403, QUOTA)
    hub.faults = {"demo-reward-model/commit/": Refused(403, QUOTA)}
    told = []
    message = refusal(config(run, hub), told.append)
    assert "pushed before that: policy to doctor/demo; run the same command again" in message
    assert not any(line.startswith("reward: pushed") for line in told)
    hub.faults.clear()
    assert [one.changed for one in push(config(run, hub), told.append)] == [False, True]


def test_a_hub_that_is_not_there_is_named(run, hub, monkeypatch):
    hub.close()
    message = refusal(config(run, hub))
    assert message.startswith(
        f"the token of --token cannot be checked: {hub.endpoint} cannot be reached (ConnectError"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so that nothing may be sent" in refusal(config(run, hub))


def test_a_server_that_is_no_hub_is_told(run, hub):
    hub.faults["whoami"] = Refused(200, body=b"<html>a portal</html>")
    assert f"{hub.endpoint} answers with something that is not JSON" in refusal(config(run, hub))
    hub.faults["whoami"] = Refused(200, body={"hello": "there"})
    assert f"{hub.endpoint} does not answer as a Hub does" in refusal(config(run, hub))


def test_a_hub_that_repeats_the_token_is_not_repeated(run, hub):
    for at in ("whoami", "validate-yaml", "GET /api/models", "repos/create", "objects/batch"):
        hub.faults = {at: Refused(403, f"not with Bearer {TOKEN} here")}
        assert "[token]" in refusal(config(run, hub)), at
    hub.faults = {"validate-yaml": Refused(400, body={"errors": [{"message": f"{TOKEN}?"}]})}
    assert "[token]?" in refusal(config(run, hub))
    password = hub.endpoint.replace("http://", "http://me:password@")
    hub.faults = {"whoami": Refused(500, "on fire")}
    assert "password" not in refusal(config(run, hub, endpoint=password))
    hub.close()
    assert "password" not in refusal(config(run, hub, endpoint=password))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"repo": ""}, "repo='' is no name: "),
        ({"repo": "a/b/c"}, "repo='a/b/c' is no name: "),
        ({"repo": "my model"}, "repo='my model' is no name: "),
        ({"repo": "x" * 90}, r"reward_repo='x+-reward-model' \(repo='x+'\) is no name: "),
        ({"repo": "a--b"}, "repo='a--b' is no name: "),
        ({"data_repo": "a b", "what": ("data",)}, "data_repo='a b' is no name: "),
        ({"what": ()}, "what='' must be some of policy, reward, data, each once"),
        ({"what": ("policy", "optimizer")}, "what='policy,optimizer' must be some of"),
        ({"what": ("data", "data")}, "what='data,data' must be some of"),
        ({"reward_repo": "demo"}, "reward_repo='demo' is repo too"),
        ({"revision": "a b"}, "revision='a b' is no name of a branch"),
        ({"revision": "refs/heads/x"}, "revision='refs/heads/x' is no name of a branch"),
        ({"revision": "x", "create_pr": True}, "revision='x' and create_pr exclude each other"),
        ({"commit_message": " "}, "commit_message is empty"),
        ({"data_license": "My own!"}, "data_license='My own!' must be the Hub's identifier"),
        ({"endpoint": "huggingface.co"}, "endpoint must be an address that begins with https://"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields, expected):
    with pytest.raises(ValueError, match=expected):
        PushConfig(**{"run": "x", "repo": "demo"} | fields)


@pytest.mark.slow
def test_the_command_ends_in_one_line_and_code_1(run, hub):
    hub.faults["whoami"] = Refused(403, f"no access for {TOKEN}")
    process, output = start(run, hub, "--token", TOKEN, token=None, debug=False)
    assert process.wait() == 1
    text = output.read_text(encoding="utf-8")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: the token of --token cannot be checked: the token may not do this (HTTP 403: no "
        "access for [token])"
    ]
    assert TOKEN not in text and "Traceback" not in text


def test_the_weights_of_the_fixture_are_in_several_files(run):
    tensors = open_tensor_source(run / "export" / "policy").tensors.values()
    assert len({tensor.path for tensor in tensors}) > 2
