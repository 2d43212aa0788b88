"""Chat requests are answered once, whatever the server does and however often a run is started."""

import errno
import json

import pytest

from huatuo_jax.core.files import AppendedFile
from huatuo_jax.evaluation.asking import ReplyFile
from huatuo_jax.judge.chat import ChatModelConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import BudgetConfig
from tests.evaluation.scripted_server import KEY, Refuse, ScriptedServer


def requests(count=6, *, words="头痛怎么办"):
    return {f"q{n}": ({"role": "user", "content": f"{words}？{n}"},) for n in range(count)}


def file_of(folder, server, *, prices=None, **budget):
    cfg = ChatModelConfig(
        model="scripted",
        server=ServerConfig(
            base_url=server.url,
            budget=BudgetConfig(**budget),
            max_attempts=2,
            first_delay_s=0.01,
            max_delay_s=0.02,
        ),
        concurrency=3,
        prices=prices,
    )
    return ReplyFile(folder / "replies.jsonl", cfg, key=KEY)


def echo(body, number):
    return f"答：{body['messages'][-1]['content']}"


def test_each_request_has_its_own_reply_and_is_asked_once(tmp_path):
    with ScriptedServer(echo) as server:
        done = []
        found = file_of(tmp_path, server).ask(requests(), lambda *told: done.append(told))
        assert {name: reply.text for name, reply in found.items()} == {
            f"q{n}": f"答：头痛怎么办？{n}" for n in range(6)
        }
        assert done[-1] == (6, 6) and server.paid == 6
        assert file_of(tmp_path, server).ask(requests()) == found
        assert server.paid == 6
        body = server.requests[0]
        assert body["temperature"] == 0.0 and body["max_tokens"] == 1024


def test_a_changed_request_is_asked_anew_and_the_others_are_not(tmp_path):
    with ScriptedServer(echo) as server:
        file_of(tmp_path, server).ask(requests())
        changed = requests() | {"q3": ({"role": "user", "content": "咳嗽怎么办？"},)}
        found = file_of(tmp_path, server).ask(changed)
        assert found["q3"].text == "答：咳嗽怎么办？" and server.paid == 7


def test_a_request_that_failed_is_counted_and_asked_again_by_the_next_run(tmp_path):
    broken = {"q2"}

    def reply(body, number):
        if any(body["messages"][-1]["content"].endswith(name[1:]) for name in broken):
            raise Refuse(500, "the server had an error")
        return echo(body, number)

    with ScriptedServer(reply) as server:
        found = file_of(tmp_path, server).ask(requests())
        assert found["q2"].text is None and found["q2"].failure == "unanswered"
        assert "500" in found["q2"].error
        broken.clear()
        paid = server.paid
        assert file_of(tmp_path, server).ask(requests())["q2"].text == "答：头痛怎么办？2"
        assert server.paid == paid + 1


def test_without_money_the_run_stops_and_resumes(tmp_path):
    money = [4]

    def reply(body, number):
        if money[0] <= 0:
            raise Refuse(402, "insufficient balance")
        money[0] -= 1
        return echo(body, number)

    with ScriptedServer(reply) as server:
        with pytest.raises(ValueError, match=r"2 of 6 requests to 'scripted' have no reply yet"):
            file_of(tmp_path, server).ask(requests())
        money[0] = 100
        assert len(file_of(tmp_path, server).ask(requests())) == 6
        assert server.paid == 6


def test_a_budget_of_requests_holds_over_all_runs(tmp_path):
    with ScriptedServer(echo) as server:
        for _ in range(2):
            with pytest.raises(ValueError, match="max_requests"):
                file_of(tmp_path, server, max_requests=4).ask(requests())
        assert server.paid == 4


def test_what_a_kill_leaves_of_a_line_is_cut_off(tmp_path):
    with ScriptedServer(echo) as server:
        file_of(tmp_path, server).ask(requests(3))
        path = tmp_path / "replies.jsonl"
        path.write_bytes(path.read_bytes()[:-9])
        found = file_of(tmp_path, server).ask(requests(3))
        assert all(reply.text for reply in found.values()) and server.paid == 4
        assert [json.loads(line)["name"] for line in path.read_text("utf-8").splitlines()]


def test_a_disk_without_space_ends_the_run_with_its_own_error(tmp_path, monkeypatch):
    append = AppendedFile.append

    def until_full(file, rows):
        if (
            file.path.name == "replies.jsonl"
            and file.path.read_text(encoding="utf-8").count("\n") > 1
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, rows)

    with ScriptedServer(echo) as server:
        monkeypatch.setattr(AppendedFile, "append", until_full)
        with pytest.raises(OSError, match="No space left on device"):
            file_of(tmp_path, server).ask(requests())
        monkeypatch.undo()
        assert len(file_of(tmp_path, server).read(requests())) == 2


def test_the_key_is_in_no_file_even_where_the_server_says_it(tmp_path):
    with ScriptedServer(lambda body, number: f"your key is {KEY}") as server:
        found = file_of(tmp_path, server).ask(requests(1))
        assert KEY not in found["q0"].text
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_the_cost_is_told_before_anything_is_sent(tmp_path):
    prices = tmp_path / "prices.json"
    entry = {"input": 1.0, "cached_input": 1.0, "output": 2.0}
    prices.write_text(
        json.dumps(
            {
                "currency": "USD",
                "per_tokens": 1_000_000,
                "as_of": "2026-11",
                "models": {"scripted": entry},
            }
        ),
        "utf-8",
    )
    with ScriptedServer(echo) as server:
        file = file_of(tmp_path, server)
        assert file.estimate(requests()).cost is None
        assert str(file.estimate(requests())).endswith("no price is known")
        file.ask(requests(2))
        assert file.estimate(requests()).requests == 4
        with pytest.raises(ValueError, match="max_cost=1 needs a price"):
            file_of(tmp_path, server, max_cost=1.0).ask(requests())
        assert server.paid == 2
