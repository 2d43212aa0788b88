"""A teacher that writes instructions and answers, of which a known part has a known fault."""

import json
import re
import threading

from tests.synthesis.made_texts import chinese, chinese_answer, english
from tests.synthesis.teacher_server import draw_for

WHOLE_FAULTS = {"broken JSON": 0.03, "refusal": 0.03}
ITEM_FAULTS = {
    "near duplicate": 0.10,
    "needs more than text": 0.05,
    "language": 0.05,
    "length": 0.03,
    "broken JSON": 0.02,
}
ANSWER_FAULTS = {"refusal": 0.06, "echo": 0.04, "language": 0.04, "cut off": 0.03}
REFUSALS = (
    "很抱歉，我无法回答这个问题。",
    "作为一个人工智能语言模型，我不能提供医疗建议。",
    "对不起，我不能协助完成这个请求。",
    "我无法提供这方面的信息，请咨询专业人士。",
)


def drawn(draw, faults):
    lot = draw.random()
    for name, share in faults.items():
        if lot < share:
            return name
        lot -= share
    return None


class ScriptedInstructions:
    """Writes instructions and answers to requests in Chinese.

    Attributes:
        planted: by the text of an instruction or answer that was sent, its fault; None for none.
        whole: replies that are no instructions at all, with their faults.
    """

    def __init__(self, *, faulty=True):
        self.faulty, self.planted, self.whole = faulty, {}, {}
        self.answers, self.lock = {}, threading.Lock()

    def __call__(self, messages):
        user = messages[-1]["content"]
        wanted = re.search(r"请编写 (\d+) 条", user)
        with self.lock:
            if wanted is not None:
                return self.instructions(user, int(wanted[1]))
            return self.answer(user)

    def instructions(self, user, count):
        draw = draw_for("instructions", user)
        whole = drawn(draw, WHOLE_FAULTS) if self.faulty else None
        if whole == "broken JSON":
            text = '{"items": [{"instruction": "' + chinese(draw)
            self.whole[text] = whole
            return text
        if whole == "refusal":
            text = draw.choice(REFUSALS)
            self.whole[user] = whole
            return text
        examples = [json.loads(line) for line in user.splitlines() if line.startswith('{"ins')]
        items = []
        for _ in range(count):
            fault, fitting = drawn(draw, ITEM_FAULTS) if self.faulty else None, []
            if fault == "broken JSON":
                marker = chinese(draw)
                items.append({"instruction": marker, "input": 3})
                self.planted[marker] = fault
                continue
            material = f"材料：{chinese_answer(draw)}"
            if fault == "near duplicate":
                # Of those that stand without material where the setting asks for some.
                fitting = [one for one in examples if one["input"] or len(one["instruction"]) > 40]
                example = draw.choice(fitting or [{"instruction": chinese(draw), "input": ""}])
                text, material = self.nearly(example["instruction"]), example["input"]
            else:
                text = self.item(draw, fault)
                if fault == "language":
                    material = english(draw)
            items.append({"instruction": text, "input": material})
            self.planted[text] = fault if fault != "near duplicate" or fitting else None
        return json.dumps({"items": items}, ensure_ascii=False)

    def nearly(self, text):
        return f"{text[:5]}{text[6:]}。"

    def item(self, draw, fault):
        text = chinese(draw)
        return {
            "needs more than text": f"请看附件里的图片，{text}",
            "language": english(draw),
            "length": f"{text[:2]}{chr(draw.randrange(0x4E00, 0x9F00))}呢",
        }.get(fault, text)

    def answer(self, user):
        draw = draw_for("answer", user)
        fault = drawn(draw, ANSWER_FAULTS) if self.faulty else None
        self.answers[user] = fault
        text = chinese_answer(draw)
        if fault == "cut off":
            return text[:20], "length"
        return {"refusal": draw.choice(REFUSALS), "echo": user, "language": english(draw)}.get(
            fault, text
        )
