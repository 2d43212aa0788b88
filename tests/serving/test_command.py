"""The command: its flags, its names of models, a process that starts, answers and ends."""

import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import uvicorn

from huatuo_jax.core import command_line
from huatuo_jax.serving import command
from huatuo_jax.serving.command import Flags, main
from huatuo_jax.serving.models import named
from tests.api import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]

WRONG = {
    "--port=70000": "port=70000 must be at most 65535",
    "--slots=0": "slots=0 must be at least 1",
    "--max_waiting=0": "max_waiting=0 must be at least 1",
    "--api_key=": "api_key is empty",
    "--drain_seconds=-1": "drain_seconds=-1 must be at least 0",
}


@pytest.mark.parametrize(("flag", "told"), WRONG.items())
def test_a_wrong_flag_is_told_before_anything_is_loaded(flag, told, capsys):
    with pytest.raises(SystemExit):
        command_line.run(main, Flags, arguments=["--model=none", flag])
    assert told in capsys.readouterr().err


def test_models_have_the_names_that_tell_them_apart():
    assert named(["runs/demo/ppo/model"]) == {"model": "runs/demo/ppo/model"}
    sources = ["runs/demo/sft/model/", "runs/demo/ppo/model", "Qwen/Qwen3-0.6B", "mine=runs/x"]
    assert named(sources) == {
        "sft/model": "runs/demo/sft/model/",
        "ppo/model": "runs/demo/ppo/model",
        "Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "mine": "runs/x",
    }
    with pytest.raises(ValueError, match="two models are named 'a'; name one by NAME=DIR"):
        named(["a=x", "a=y"])
    with pytest.raises(ValueError, match="two models are named"):
        named(["runs/x", "runs/x/"])


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert named([str(folder)]) == {"lr=0.1": str(folder)}


def test_a_port_in_use_and_a_missing_model_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line.run(main, Flags, arguments=[f"--model={tmp_path / 'none'}", "--port=0"])
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and "none" in told


def ask_and_end(line, end):
    """Asks the server of that line for answers and ends it meanwhile: they come all the same."""
    address = re.search(r"policy at (http://127\.0\.0\.1:\d+/)", line)[1]
    body = {"model": "policy", "messages": [{"role": "user", "content": "头痛"}], "max_tokens": 180}
    body |= {"n": 6, "min_tokens": 180, "temperature": 1, "stream": True}

    def ask(key):
        request = urllib.request.Request(
            f"{address}v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        return urllib.request.urlopen(request)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask("wrong")
    answer = ask("right")
    first = answer.readline()
    assert first.startswith(b"data: ")
    rest = []
    reading = threading.Thread(target=lambda: rest.append(answer.read()))
    reading.start()
    end()
    reading.join()
    assert rest[0].endswith(b"data: [DONE]\n\n")
    assert rest[0].count(b'"finish_reason":"length"') == 6


def test_the_command_serves_until_it_is_told_to_end_and_finishes_what_is_under_way(
    tmp_path, monkeypatch, capsys, on_one_device
):
    folder = tiny.save(tmp_path / "policy", "lm")
    monkeypatch.setenv("HUATUO_API_KEY", "right")
    lines, failed = queue.SimpleQueue(), []

    def ask():
        try:
            ask_and_end(lines.get(timeout=60), lambda: os.kill(os.getpid(), signal.SIGTERM))
        except BaseException as error:
            failed.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "print", lines.put, raising=False)
    # It would close the streams of all handlers, pytest's own among them.
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda config: None)
    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(Flags(model=(str(folder),), port=0, slots=2))
    finally:
        asking.join()
        signal.signal(signal.SIGTERM, before)
    assert not failed, failed
    out, error = capsys.readouterr()
    assert out == "" and "头痛" not in error and "Traceback" not in error


@pytest.mark.slow
def test_a_process_serves_until_it_is_told_to_end_and_finishes_what_is_under_way(tmp_path):
    folder = tiny.save(tmp_path / "policy", "lm")
    started = subprocess.Popen(
        [sys.executable, "launch/serve.py", f"--model={folder}", "--port=0", "--slots=2"],
        cwd=ROOT,
        env=os.environ | {"HUATUO_API_KEY": "right", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ask_and_end(started.stdout.readline(), lambda: started.send_signal(signal.SIGTERM))
    out, error = started.communicate()
    assert started.returncode == 0 and out == ""
    assert "头痛" not in error and "Traceback" not in error
