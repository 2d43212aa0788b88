"""The conversation in the terminal: commands, streaming, stops, faults, a real terminal."""

import contextlib
import io
import os
import pathlib
import pty
import select
import subprocess
import sys

import pytest
import rich.console

from huatuo_jax import chat, cli
from huatuo_jax.api.in_use import Delta
from huatuo_jax.api.models import load_reward_model
from huatuo_jax.data.records import Message
from tests.api import tiny
from tests.serving.scripted_chat import CUT, HOLD, Fail, Refuse, ScriptedChat

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Scripted:
    """A partner with written answers: each a list of pieces or errors to raise."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.asked, self.scored = list(answers), [], []

    def stream(self, messages):
        self.asked.append([(one.role, one.content) for one in messages])
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece if isinstance(piece, Delta) else Delta(piece)

    def score(self, messages, answer):
        self.scored.append(([one.content for one in messages], answer))
        return 1.25


class Talk:
    """A conversation whose output is text."""

    def __init__(self, partner, **options):
        self.out = io.StringIO()
        console = rich.console.Console(file=self.out, width=200)
        self.conversation = chat.Conversation(partner, console=console, **options)

    def say(self, line):
        """Returns what a line writes; None where it ends the conversation."""
        self.out.seek(0)
        self.out.truncate()
        return self.out.getvalue() if self.conversation.take(line) else None

    @property
    def turns(self):
        return [(one.role, one.content) for one in self.conversation.messages]


def test_a_conversation_keeps_its_turns_and_its_commands_change_it():
    partner = Scripted(["多喝", "水。"], ["睡觉。"], ["好。"], ["再见。"])
    talk = Talk(partner, system="你是医生")
    assert talk.say("头痛") == "多喝水。\n"
    assert talk.say("  还有呢 ") == "睡觉。\n"
    turns = [("user", "头痛"), ("assistant", "多喝水。"), ("user", "还有呢")]
    assert partner.asked[1] == [("system", "你是医生"), *turns]
    assert talk.say("/score") == "reward score 1.2500\n"
    assert partner.scored == [(["你是医生", "头痛", "多喝水。", "还有呢"], "睡觉。")]
    assert talk.say("/system") == "system: 你是医生\n"
    talk.say("/reset")
    assert talk.say("发烧") == "好。\n"
    assert partner.asked[2] == [("system", "你是医生"), ("user", "发烧")]
    talk.say("/system none")
    talk.say("谢谢")
    assert partner.asked[3] == [("user", "谢谢")]
    talk.say("/system 你是护士")
    assert talk.turns == [("system", "你是护士")]
    shown = talk.say("/help")
    assert all(f"/{name}" in shown for name in chat.COMMANDS)
    assert talk.say("") == talk.say("   ") == ""
    assert talk.say("/quit") is None


def test_a_stopped_answer_is_kept_and_one_without_text_is_left_out():
    partner = Scripted(["先", "喝水", KeyboardInterrupt()], [KeyboardInterrupt()], ["好。"])
    talk = Talk(partner)
    assert talk.say("头痛") == "先喝水\nstopped\n"
    kept = [("user", "头痛"), ("assistant", "先喝水")]
    assert talk.turns == kept
    assert talk.say("发烧") == "stopped\n"
    assert talk.turns == kept
    talk.say("牙痛")
    assert partner.asked[2] == [*kept, ("user", "牙痛")]


WRONG = {
    "/scor": "error: unknown command /scor; did you mean /score?\n",
    "/etc": "error: unknown command /etc; /help lists the commands\n",
    "/reset now": "error: /reset takes nothing after it\n",
    "/score": "error: there is no answer yet to score\n",
    "a\udce4": "error: the text is not valid UTF-8\n",
    "/system \udce4": "error: the text is not valid UTF-8\n",
}


@pytest.mark.parametrize(("line", "told"), WRONG.items(), ids=range(len(WRONG)))
def test_wrong_input_is_told_in_one_line(line, told):
    talk = Talk(Scripted())
    assert talk.say(line) == told
    assert talk.turns == []


def test_a_fault_is_one_line_and_what_was_written_stays():
    partner = Scripted(["half", chat.Unanswered("it\nis \x1b[31mgone")], [Delta("", "stop")])
    talk = Talk(partner)
    assert talk.say("a") == "half\nerror: it is \ufffd[31mgone\n"
    assert talk.turns == [("user", "a"), ("assistant", "half")]
    assert "empty answer" in talk.say("b")
    assert talk.turns == [("user", "a"), ("assistant", "half")]


def test_a_model_cannot_write_control_characters_or_markup_to_the_terminal():
    talk = Talk(Scripted(["\x1b]0;title\x07", "[red]x[/red] \u202e", Delta("", "length")]))
    shown = talk.say("a")
    assert shown.startswith("\ufffd]0;title\ufffd[red]x[/red] \ufffd\n")
    assert "length limit" in shown


@pytest.fixture(scope="module")
def models(tmp_path_factory, on_one_device):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "policy", "lm"), tiny.save(folder / "reward", "score", seed=2)


@pytest.fixture(scope="module")
def partner(models):
    policy, reward = map(str, models)
    flags = chat.Flags(model=policy, reward_model=reward, max_new_tokens=24, seed=3, temperature=1)
    return chat.find_partner(flags)


def test_a_model_of_this_machine_streams_the_answer_of_its_python_name(partner, models):
    question = (Message("user", tiny.QUESTION),)
    deltas = list(partner.stream(question))
    expected = partner._model.chat(question, seed=3, max_new_tokens=24, temperature=1.0)
    assert "".join(delta.text for delta in deltas) == expected
    assert len(deltas) > 2 and [one.finish_reason for one in deltas[:-1]] == [None] * (
        len(deltas) - 1
    )
    assert deltas[-1].finish_reason == "length"
    reward = load_reward_model(models[1])
    assert partner.score(question, expected) == pytest.approx(
        reward.score(question, expected, raw=True)
    )


def test_a_stopped_answer_of_this_machine_leaves_the_engine_ready(partner):
    question = (Message("user", tiny.QUESTION),)
    whole = "".join(delta.text for delta in partner.stream(question))
    with contextlib.closing(partner.stream(question)) as deltas:
        first = next(deltas).text
    assert whole.startswith(first) and first != whole
    assert "".join(delta.text for delta in partner.stream(question)) == whole
    with pytest.raises(chat.Unanswered, match="leave room for the answer.*drop_oldest_turns"):
        list(partner.stream((*question, Message("assistant", whole * 90), *question)))


def served(server, **flags):
    return chat.find_partner(chat.Flags(base_url=server.url, **flags))


def test_a_served_model_streams_scores_and_gets_the_settings(monkeypatch):
    key = "sk-of-the-test"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with ScriptedChat(
        lambda body, index: ["多喝", "水。"],
        models=("sft", "ppo"),
        reward="r",
        key="sk-of-the-test",
    ) as server:
        talk = Talk(served(server, model="ppo", max_new_tokens=9, top_k=5, seed=7), system="医生")
        assert talk.say("头痛") == "多喝水。\n"
        assert talk.say("/score") == "reward score 4.0000\n"
        plain = Talk(served(server))
        plain.say("头痛")
    body, other = server.asked
    assert body["messages"][0] == {"role": "system", "content": "医生"}
    assert {name: body[name] for name in ("model", "max_tokens", "top_k", "seed", "stream")} == {
        "model": "ppo",
        "max_tokens": 9,
        "top_k": 5,
        "seed": 7,
        "stream": True,
    }
    assert set(other) == {"model", "messages", "stream"} and other["model"] == "sft"
    assert server.classified[0]["responses"] == ["多喝水。"]


def test_faults_of_a_server_are_one_line_each_without_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")

    def answer(body, index):
        text = body["messages"][-1]["content"]
        if text == "refuse":
            raise Refuse(400, "the prompt has 9 tokens\ntoo many for sk-of-the-test")
        return {"inside": ["half", Fail("a decode failed")], "cut": ["half", CUT]}[text]

    with ScriptedChat(answer) as server:
        talk = Talk(served(server))
        for line, words in (
            ("refuse", "9 tokens too many"),
            ("inside", "a decode failed"),
            ("cut", "connection ended before"),
            ("/score", "no reward model; name one by --reward_model"),
        ):
            shown = talk.say(line)
            assert words in shown and "sk-of" not in shown
            assert shown.splitlines()[-1].startswith("error: ")
            assert len(shown.splitlines()) == (2 if line in ("inside", "cut") else 1)
    shown = talk.say("gone")
    assert shown.startswith("error: no connection to http://127.0.0.1") and shown.count("\n") == 1


def test_stopping_leaves_the_server(monkeypatch):
    with ScriptedChat(lambda body, index: ["先", HOLD]) as server:
        with contextlib.closing(served(server).stream((Message("user", "头痛"),))) as deltas:
            assert next(deltas).text == "先"
        server.left.wait()


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs the command with flags that are wrong; gives its one line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["huatuo", "chat", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (1, "", 1)
        return err

    return run


def test_wrong_flags_are_one_line(refused, tmp_path, models):
    assert "--model is missing" in refused()
    assert "is no model" in refused("--model=/nowhere")
    assert "this model scores" in refused(f"--model={models[1]}")
    assert "is no model" in refused(f"--model={models[0]}", "--reward_model=/nowhere")
    assert "seed=-1 must lie" in refused("--model=x", "--seed=-1")
    assert "system is empty" in refused("--model=x", "--system= ")
    assert "template: not with base_url" in refused("--base_url=http://x", "--template=chatml")
    assert str(tmp_path) in refused("--model=x", f"--history={tmp_path}")
    with ScriptedChat(lambda body, index: [], key="sk-right") as server:
        url = f"--base_url={server.url}"
        assert "status 401" in refused(url)
        server.key = None
        assert "model='ppo' is not at" in refused(url, "--model=ppo")
        server.models = ()
        assert "lists no models" in refused(url)
    assert "no connection to" in refused(url)


def program(server, *arguments):
    url = f"--base_url={server.url}"
    return [sys.executable, ROOT / "launch" / "chat.py", url, *arguments]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONUTF8": "1"}


@pytest.mark.slow
def test_a_pipe_gets_the_answers_alone():
    with ScriptedChat(lambda body, index: [f"答 {len(body['messages'])}"]) as server:
        done = subprocess.run(
            program(server),
            input="一\n\n二\n/wrong\n".encode(),
            env=environment(),
            capture_output=True,
        )
    assert done.stdout.decode() == (
        "答 1\n答 3\nerror: unknown command /wrong; /help lists the commands\n"
    )
    assert (done.returncode, done.stderr) == (0, b"")


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, command):
        self.own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            # So that Ctrl-C is for this program, also where the tests run in the background of a
            # shell, whose programs ignore it.
            ["env", "--default-signal=INT", "setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(),
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text):
        """Reads until a text is seen; gives all that came before and with it."""
        while text not in self.seen:
            try:
                found = os.read(self.own, 4096)
            except OSError:
                found = b""
            assert found, f"it ended after {self.seen!r}"
            self.seen += found.decode("utf-8", "replace")
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def type(self, text):
        os.write(self.own, text.encode())

    def interrupt(self, *, until):
        """Presses Ctrl-C until a text is seen, as Python may miss one just before it waits."""
        self.type("\x03")
        while until not in self.seen:
            if select.select([self.own], [], [], 5.0)[0]:
                found = os.read(self.own, 4096)
                self.seen += found.decode("utf-8", "replace")
            else:
                self.type("\x03")
        self.until(until)


def test_in_a_terminal_an_answer_is_stopped_and_lines_come_back(tmp_path):
    history = tmp_path / "history"
    with ScriptedChat(
        lambda body, index: ["先", HOLD] if body["messages"][-1]["content"] == "slow" else ["好。"]
    ) as server:
        terminal = Terminal(program(server, f"--history={history}"))
        terminal.until("> ")
        terminal.type("slow\r")
        terminal.until("先")  # Shown although the answer is not complete.
        terminal.interrupt(until="stopped")
        server.left.wait()
        terminal.until("> ")
        terminal.type("头痛\r")
        terminal.until("好。")
        terminal.until("> ")
        terminal.interrupt(until="Ctrl-D ends")
        terminal.until("> ")
        terminal.type("\x1b[A\r")  # The line before, again.
        terminal.until("好。")
        terminal.until("> ")
        terminal.type("\x04")
        terminal.process.wait()
        os.close(terminal.own)
    assert terminal.process.returncode == 0
    assert [body["messages"][-1]["content"] for body in server.asked] == ["slow", "头痛", "头痛"]
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "先"}
    assert "头痛" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0
