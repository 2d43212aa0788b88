"""Doctors' terse words, and a teacher that polishes them and spoils a known part."""

import json
import re

from tests.synthesis.made_texts import english
from tests.synthesis.scripted_polisher import altered_dose, faithful
from tests.synthesis.teacher_server import draw_for

DISEASES = "慢性胃炎 支气管炎 荨麻疹 偏头痛 颈椎病 高血压 糖尿病 湿疹".split()
DRUGS = "奥美拉唑 阿莫西林 氯雷他定 布洛芬 二甲双胍 氨氯地平 左氧氟沙星 头孢克洛".split()
AVOID = "吃辛辣食物 喝酒抽烟 剧烈运动 熬夜劳累 吃生冷食物 久坐不动".split()
FAULTS = {
    "dose": "unfaithful",
    "drug": "unfaithful",
    "new drug": "unfaithful",
    "negation": "unfaithful",
    "diagnosis": "unfaithful",
    "dropped": "unfaithful",
    "refusal": "refusal",
    "broken": "broken JSON",
    "language": "language",
    "turns": "number of turns",
}


def words(draw):
    """A doctor's terse words."""
    return (
        f"考虑{draw.choice(DISEASES)}，口服{draw.choice(DRUGS)}，一次{draw.choice('2345')}片，"
        f"一日{draw.choice('三四')}次，连用{draw.randrange(5, 15)}天，不要{draw.choice(AVOID)}，"
        f"一周后复查（{''.join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(8))}）。"
    )


def dialogues(count, *, exchanges):
    """Source rows; each has a number that its fault follows from."""
    for number in range(count):
        draw = draw_for("source", number)
        messages = []
        for turn in range(exchanges):
            tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(20))
            patient = f"编号{number}，第{turn + 1}问，最近不舒服，{tail}，怎么办？"
            messages.append({"role": "user", "content": patient})
            messages.append({"role": "assistant", "content": words(draw)})
        yield {"id": f"source-{number}", "messages": messages, "department": "内科"}


def write_source(path, count, *, exchanges):
    rows = [json.dumps(row, ensure_ascii=False) for row in dialogues(count, exchanges=exchanges)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def fault_of(number, *, single):
    draw = draw_for("polish", number)
    names = sorted(FAULTS.keys() - {"turns"} if single else FAULTS)
    return draw.choice(names) if draw.random() < 0.4 else None


def number_of(messages):
    """The number of the source row that a request is about."""
    return int(re.search(r"编号(\d+)，", messages[-1]["content"])[1])


def is_single(messages):
    return "医生的话共" not in messages[-1]["content"]


def polish(messages):
    """Replies to a request to polish."""
    return polished(messages, fault_of(number_of(messages), single=is_single(messages)))


def polished(messages, fault):
    """A reply with a fault, or none."""
    user, single = messages[-1]["content"], is_single(messages)
    draw = draw_for("polished", number_of(messages))
    if single:
        originals = [re.search(r"医生的回答：\n(.*?)\n\n要求", user, re.DOTALL)[1]]
    else:
        originals = re.findall(r"医生：(.*)", user.split("\n\n要求")[0])
    turns = [faithful(text, draw) for text in originals]
    if fault == "refusal":
        return "抱歉，我无法协助完成这个请求。"
    if fault == "turns":
        turns = turns[:-1]
    elif fault is not None and fault != "broken":
        turns[-1] = spoiled(originals[-1], fault, draw)
    found = {"answer": turns[0]} if single and turns else {"turns": turns}
    text = json.dumps(found, ensure_ascii=False)
    return text[: len(text) // 2] if fault == "broken" else text


def spoiled(text, fault, draw):
    if fault == "dose":
        return faithful(altered_dose(text, draw), draw)
    if fault == "drug":
        (drug,) = [one for one in DRUGS if one in text]
        other = draw.choice([one for one in DRUGS if one != drug])
        return faithful(text.replace(drug, other), draw)
    if fault == "new drug":
        return faithful(text, draw) + "也可以加用蒙脱石散。"
    if fault == "negation":
        return faithful(text, draw).replace("请不要", "可以").replace("不要", "可以")
    if fault == "diagnosis":
        return faithful(text, draw) + "同时要排除肺癌。"
    if fault == "dropped":
        return faithful(re.sub(r"连用\d+天，", "", text), draw)
    assert fault == "language"
    return english(draw)
