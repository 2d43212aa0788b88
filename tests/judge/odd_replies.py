"""A grammar of what real servers reply, whose every sentence knows what it says.

Each reply holds its number in its reason (`#7#`), so that a line of a labels file is known by the
reply that it came from.
"""

import asyncio
import dataclasses
import json
import math
import random

import httpx2

from tests.judge.planted_server import CRITERIA

# What a reply's text may hold inside its own strings.
ODD_WORDS = [
    "说明",
    '他说 "better": 1，又说 {"better": 2}',
    "</think>",
    "<think>",
    "```",
    "```json\n{}\n```",
    "半\ud83d个",
    "行\u2028段\u2029\x85",
    "\u001b[31m\x00",
    "😀" * 20,
    '\\"reason\\": \\u0031',
]
FINISHED = ["stop", None, "", "eos_token", "end_turn", "STOP", "stop_sequence", "COMPLETE", 7, []]
CUT = ["length", "max_tokens", "MAX_TOKENS", "model_length", "content_filter", "SAFETY", "error"]
RETRY_AFTER = [
    "1",
    "0.2",
    "-5",
    "soon",
    "nan",
    "1e400",
    "",
    "Thu, 01 Jan 1970 00:00:99999999999999999999 GMT",
    "Mon, 99 Jan 2020 00:00:00 GMT",
    "99999999999999999999999 Jan 2020 00:00:00",
    "1764341234",
    "Fri, 31 Dec 9999 23:59:59 -2359",
]
FLAGGED = [
    (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain"}}),
    (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error"}}),
    (400, {"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 4096}}),
    (400, {"error": {"message": "", "code": "content_filter", "innererror": {"x": [None]}}}),
    (400, {"object": "error", "message": "This model's maximum context length is 9 tokens"}),
    (400, {"error": {"message": "\ud83d\u001b 系统检测到输入可能包含敏感内容", "code": "1301"}}),
    (403, {"error": {"message": "x", "code": 403, "metadata": {"flagged_input": "头疼"}}}),
    (413, b"<html><h1>413</h1></html>"),
    (422, {"detail": [{"loc": ["body", 0], "msg": "prompt is too long", "input": "x" * 999}]}),
    (200, {"base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}}),
]
UNCLEAR = [(400, {"error": {"message": "No."}}), (418, b""), (422, {"detail": None}), (302, b"")]
BUSY = [
    (429, {"error": {"message": "Rate limit reached"}}),
    (500, b""),
    (502, b"<html>Bad gateway</html>"),
    (503, {"error": "overloaded"}),
    (504, b"\xff\xfe"),
    (529, {"type": "error", "error": {"type": "overloaded_error"}}),
    (408, {"error": [[[]]]}),
    (599, {"detail": {"a": {"b": {"c": {"d": {"e": {"f": {"g": "h"}}}}}}}}),
    (200, {"error": {"code": 502, "message": "Provider returned error"}}),
    (200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}, "choices": None}),
]
# What every question meets, at any time; and what it meets only where none was answered before.
ENDS = [
    (401, {"error": {"message": "Incorrect API key"}}),
    (402, b""),
    (402, {"error": {"message": "Insufficient Balance"}}),
    (429, {"error": {"code": "insufficient_quota", "type": "insufficient_quota"}}),
    (403, {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None}),
    (400, {"error": {"message": "Your credit balance is too low to access the API."}}),
    (400, {"error": {"message": "Model Not Exist"}}),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
]
EARLY_ENDS = [
    (404, {"detail": "Not Found"}),
    (400, {"error": {"message": "'temperature' is not supported", "param": "temperature"}}),
    (400, {"error": {"message": "response_format: json_schema is unavailable"}}),
]
NO_BODIES = [
    b"",
    b"null",
    b"[]",
    b"7",
    b"<html>Sign in</html>",
    b'{"choices": [{"message": {"content": "{\\"bett',
    b"[" * 30_000,
    b'data: {"choices": []}\n\ndata: [DONE]\n\n',
    b"\xff\xfe{\x00}\x00",
    b'{"choices": null, "usage": null}',
    b'{"choices": []}',
    b'{"choices": [null]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": {"0": 1}, "usage": []}',
    b'{"choices": [{"message": {"content": {"better": 1}}}]}',
    b'{"choices": [{"message": {"content": NaN}}], "usage": {"prompt_tokens": Infinity}}',
    b"{}",
]
BROKEN = [
    httpx2.ReadTimeout("late"),
    httpx2.ConnectError("refused"),
    httpx2.ReadError("cut"),
    httpx2.RemoteProtocolError("no HTTP"),
    OverflowError("int too large to convert"),
    KeyError("x"),
    RecursionError(),
]


@dataclasses.dataclass
class Said:
    """What one reply said.

    Attributes:
        kind: of the reply.
        verdict: scores, a probability of the first, or None where it says neither.
        delivered: it has a text that the client can read, and so has its line in the labels.
        usage: prompt and output tokens, where the server told them.
    """

    kind: str
    verdict: object = None
    delivered: bool = False
    usage: tuple[int, int] | None = None


class OddServer:
    """Replies by the grammar; one reply is a function of the seed and the request's number.

    Args:
        lot: decides about the whole server.
        ends_at: from this request on everybody is told that there is no more.
        odd: the share of replies that are not plain.
    """

    def __init__(self, lot, *, ends_at, odd):
        self.seed, self.ends_at, self.odd = lot.random(), ends_at, odd
        self.end = lot.choice(ENDS + (EARLY_ENDS if ends_at == 0 else []))
        self.said: list[Said] = []

    def reply(self, number, texts, body):
        """A response, an error of the transport, or one that comes too late."""
        lot = random.Random(f"{self.seed} {number}")
        said = Said("plain")
        self.said.append(said)
        assert len(self.said) == number + 1
        if self.ends_at is not None and number >= self.ends_at:
            said.kind = "end"
            return response(lot, *self.end)
        if lot.random() > self.odd:
            return self.completion(lot, said, number, texts, body, plain=True)
        said.kind = lot.choices(
            ["completion", "flagged", "unclear", "busy", "no body", "broken", "late"],
            [12, 2, 0.3, 3, 2, 2, 0.5],
        )[0]
        if said.kind == "broken":
            raise lot.choice(BROKEN)
        if said.kind == "late":
            return late()
        if said.kind == "no body":
            return response(lot, 200, lot.choice(NO_BODIES))
        if said.kind == "completion":
            return self.completion(lot, said, number, texts, body, plain=False)
        return response(
            lot, *lot.choice({"flagged": FLAGGED, "unclear": UNCLEAR, "busy": BUSY}[said.kind])
        )

    def completion(self, lot, said, number, texts, body, *, plain):
        words = f"#{number}# {'说明' if plain else lot.choice(ODD_WORDS)}"
        if len(texts) == 2:
            value = lot.choice([0, 1, 2])
            row = {"reason": words, "better": value}
            verdict = {0: 0.5, 1: 1.0, 2: 0.0}[value]
        else:
            verdict = {name: float(lot.randint(1, 5)) for name in CRITERIA}
            row = {n: {"reason": words, "score": int(score)} for n, score in verdict.items()}
        text = json.dumps(row, ensure_ascii=lot.random() < 0.5, indent=lot.choice([None, 2]))
        finish, broken = "stop", False
        whole = text
        if not plain:
            finish = lot.choice(FINISHED)
            broken = lot.random() < 0.3
            whole = unreadable(lot, row, text) if broken else dressed(lot, row, text)
            if lot.random() < 0.05:
                finish, broken = lot.choice(CUT), True
        said.delivered = True
        said.verdict = None if broken else verdict
        message = {"role": "assistant", "content": whole}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if body.get("logprobs"):
            self.add_log_probs(lot, said, choice, whole, row, odd=not plain)
        found = {"id": "x", "choices": [choice], **usage(lot, said, plain)}
        if not plain:
            decorate(lot, found, choice, message, whole)
        return response(lot, 200, found, plain=plain)

    def add_log_probs(self, lot, said, choice, whole, row, *, odd):
        """Tokens of single characters; half of the servers leave the thoughts' verdicts in."""
        if odd and lot.random() < 0.2:
            choice["logprobs"] = lot.choice([None, {}, {"content": []}, {"content": [7]}, 7])
            said.verdict = None
            return
        data = whole.encode("utf-8", "surrogatepass")
        content = [{"token": chr(one), "bytes": [one], "logprob": -0.01} for one in data]
        key = b'"better": '
        place = data.rfind(key) + len(key)
        value = row["better"]
        masses = {name: 0.05 for name in "012"} | {str(value): 0.9}
        if odd and lot.random() < 0.2:  # The server's numbers contradict its words.
            masses = {name: 0.01 for name in "012"} | {str({1: 2}.get(value, 1)): 0.98}
            said.verdict = None
        alternatives = [{"token": name, "logprob": math.log(p)} for name, p in masses.items()]
        if odd:
            alternatives += [None, {"token": "7", "logprob": None}, {"token": None}, {"logprob": 1}]
            for one in content[: place - 1]:
                one |= lot.choice([{}, {"top_logprobs": None}, {"logprob": None}])
        content[place] |= {"top_logprobs": alternatives}
        choice["logprobs"] = {"content": content}
        if said.verdict is not None:
            total = sum(masses.values())
            said.verdict = (masses["1"] + masses["0"] / 2) / total


async def late():
    await asyncio.sleep(500.0)
    return httpx2.Response(200)


def response(lot, status, body, *, plain=False):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if not plain:
        headers["content-type"] = lot.choice(
            ["application/json", "application/json; charset=utf-8", "text/html", "text/plain", "x"]
        )
        if lot.random() < 0.1:
            content = b"\xef\xbb\xbf" + content
        if status == 429 or lot.random() < 0.2:
            headers["retry-after"] = lot.choice(RETRY_AFTER)
            headers["retry-after-ms"] = lot.choice(["250", "soon", "nan", "-1", "1e400", ""])
    return httpx2.Response(status, headers=headers, content=content)


def draft_of(lot, row):
    """Another verdict, or the same one, as thoughts may hold it."""
    other = json.loads(json.dumps(row))
    if "better" in other:
        other["better"] = (other["better"] + lot.randrange(3)) % 3
    else:
        other["overall"]["score"] = other["overall"]["score"] % 5 + 1
    return json.dumps(other)


def dressed(lot, row, text):
    """The text in one of the ways in which models hand it over; it says the same."""
    draft = draft_of(lot, row)
    answer = lot.choice(
        [
            text,
            f"\n{text}\n ",
            f"\ufeff{text}",
            f"```json\n{text}\n```",
            f"```JSON\n{text}\n```\n",
            f"```json {text}```",
            f"```\r\n{text}\r\n```",
            f"我的评价如下：\n```json\n{text}\n```",
        ]
    )
    return lot.choice(
        [
            answer,
            answer,
            f"<think>先想：{draft}</think>\n{answer}",
            f"先想：{draft}\n</think>\n\n{answer}",
            f"<think>\n```json\n{draft}\n```\n</think>{answer}",
            f"```json\n{draft}\n``` 不对。</think>{answer}",
            f"◁think▷{draft}◁/think▷{answer}",
            f"<unused94>thought {draft}<unused95>{answer}",
            f"## Thinking\n\n{draft}\n\n## Final Response\n\n{answer}",
        ]
    )


def unreadable(lot, row, text):
    """A text that says nothing that was asked for, though it holds much of it."""
    number = text[text.index("#") : text.index("#", text.index("#") + 1) + 1]
    name = next(iter(row))
    last = row["better"] if "better" in row else row["overall"]["score"]
    wrong = lot.choice([str(last), last + 10, -1, last + 0.0, True, None, [last], {}])
    other = {**row, "better": wrong} if "better" in row else {**row, "overall": wrong}
    return lot.choice(
        [
            f"{number} 第一条回答更好一些。",
            text[: text.index(number) + len(number) + lot.randint(0, 3)],
            text[:-1],
            json.dumps(other),
            json.dumps({**row, "extra": 1}),
            json.dumps({key: value for key, value in row.items() if key != name}) + number,
            f"[{text}]",
            f"{text}{text}",
            f"{text} 以上。",
            f"```json\n{text}\n``` 以上。",
            f"答案是 {text}",
            f"<think>先想 {text}",
            f"<think>先想 ```json\n{text}\n```",
            f"<think>{text}</think>",
            text.replace("{", '{"overall": NaN, ', 1),
            text.replace("{", "{" + json.dumps(name) + ": 1, ", 1),
        ]
    )


def usage(lot, said, plain):
    """The usage, and what of it can be believed."""
    prompt, output = lot.randint(5, 50), lot.randint(5, 50)
    good = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    said.usage = prompt, output
    if plain:
        return {"usage": good}
    thoughts = output + lot.randint(1, 500)
    kind = lot.randrange(7)
    if kind == 0:
        return {"usage": good}
    if kind == 1:
        said.usage = prompt, output + thoughts
        return {"usage": good | {"total_tokens": prompt + output + thoughts}}
    if kind == 2:
        said.usage = prompt, output + thoughts
        return {"usage": good | {"completion_tokens_details": {"reasoning_tokens": thoughts}}}
    if kind == 3:
        return {"usage": good | {"prompt_tokens": float(prompt), "total_tokens": None}}
    if kind == 4:
        details = lot.choice([None, 7, [], {"cached_tokens": None}, {"cached_tokens": "x"}])
        return {"usage": good | {"prompt_tokens_details": details, "total_tokens": "many"}}
    said.usage = None
    wrong = lot.choice([None, -1, True, "5", 1e400, 10**300, 10**12, [], float("nan"), 2.5])
    return lot.choice(
        [{}, {"usage": None}, {"usage": 7}, {"usage": []}, {"usage": {"prompt_tokens": wrong}}]
    )


def decorate(lot, found, choice, message, whole):
    """Fields of other servers, which say nothing."""
    for row, fields in (
        (found, {"error": None, "base_resp": {"status_code": 0}, "code": 0, "model": 7}),
        (found, {"error": "", "object": None, "created": "now", "success": True, "detail": None}),
        (choice, {"error": None, "stop_reason": 7, "index": None, "delta": {}}),
        (message, {"refusal": None, "reasoning_content": '{"better": 1}', "tool_calls": []}),
        (message, {"refusal": "", "role": None, "audio": 7, "annotations": {}}),
    ):
        if lot.random() < 0.3:
            row |= fields
    if lot.random() < 0.1:
        found["choices"].append({"message": {"content": '{"reason": "x", "better": 0}'}})
    if lot.random() < 0.2 and "logprobs" not in choice:
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": '{"better": 1}'}]}
        half = len(whole) // 2
        parts = [{"type": "text", "text": part} for part in (whole[:half], whole[half:])]
        message["content"] = [thinking, *parts]
