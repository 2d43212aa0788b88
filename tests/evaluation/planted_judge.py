"""A server that plays two models, a patient and a judge whose verdicts are planted."""

import hashlib
import json
import re
import threading

from huatuo_jax.judge.judgements import sha256
from tests.evaluation.scripted_server import ScriptedServer

NAMES = ("jia", "yi")
WIN, TIE = 0.5, 0.15  # Of the first model's responses.
FIRST_ALWAYS = 0.3  # The share of questions on which whatever is shown first is preferred.
LONGER_ALWAYS = 0.4  # The share of the other questions on which the longer response is preferred.
FAULTS = 0.2

_SHOWN = re.compile(r"<回答一 \w+>\n(.*?)\n</回答一", re.DOTALL)


def unit(*parts):
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def questions(count):
    """Rows of a file in the form of KUAKE-QIC."""
    intents = ("病情诊断", "治疗方案", "注意事项", "就医建议")
    return [
        {"id": f"q{n}", "label": intents[n % 4], "query": f"第{n}个问题：头痛怎么办？"}
        for n in range(count)
    ]


def response(name, question):
    """A model's response, which tells the judge whose it is."""
    padding = "，多喝水" * int(10 * unit("length", name, question))
    return f"<think>想一想</think>{name}的回答：多休息{padding}。（{question}）"


def length(name, question):
    return len(response(name, question))


def longer(question):
    """The name of the model with the longer response; None for equal lengths."""
    one, other = (length(name, question) for name in NAMES)
    return None if one == other else NAMES[0] if one > other else NAMES[1]


def better(question, first):
    """1 where the judge prefers the response shown first, 2 the second, 0 neither."""
    if unit("bias", question) < FIRST_ALWAYS:
        return 1
    drawn = unit("outcome", question)
    winner = NAMES[0] if drawn < WIN else None if drawn < WIN + TIE else NAMES[1]
    if unit("longer", question) < LONGER_ALWAYS:
        winner = longer(question) or winner
    return 0 if winner is None else 1 if winner == first else 2


def points(question):
    """The points that `jia` gets where it is shown first, and where it is shown second."""
    of = {1: 1.0, 2: 0.0, 0: 0.5}
    return of[better(question, NAMES[0])], 1.0 - of[better(question, NAMES[1])]


def request_hash(body):
    """The name of a request in the file of replies."""
    return sha256(json.dumps(body, ensure_ascii=False, sort_keys=True))


class Planted:
    """A script; a fault depends on the request and on how many replies to it there are.

    Attributes:
        seen: the number of replies by request; a test may take back those that were lost.
    """

    def __init__(self, *, faults=FAULTS):
        self.faults, self.seen, self.lock = faults, {}, threading.Lock()

    def reply(self, body, number):
        last = body["messages"][-1]["content"]
        if body["model"] in NAMES:
            return response(body["model"], last)
        with self.lock:
            asked = request_hash(body)
            again = self.seen[asked] = self.seen.get(asked, 0) + 1
        if unit("fault", last, again) < self.faults:
            return "两个都不错，难分高下。"
        shown = _SHOWN.search(last).group(1)
        question = re.search(r"（(第\d+个问题.*?)）", shown).group(1)
        first = NAMES[0] if shown.startswith(NAMES[0]) else NAMES[1]
        return json.dumps({"reason": "因为", "better": better(question, first)})


def serve(**options):
    return ScriptedServer(Planted(**options).reply)
