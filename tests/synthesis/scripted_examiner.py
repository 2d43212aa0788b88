"""Exam questions, and a teacher that makes open ones of them and spoils a known part."""

import json
import re

from tests.synthesis.made_texts import english
from tests.synthesis.teacher_server import draw_for

DISEASES = (
    "急性阑尾炎 支气管哮喘 缺铁性贫血 甲状腺功能亢进 肾病综合征 过敏性鼻炎 带状疱疹 痛风".split()
)
FAULTS = {
    "changed": "answer changed",
    "given away": "answer in the question",
    "keeps options": "needs its options",
    "unusable": "needs its options",
    "drops a fact": "facts lost",
    "broken": "broken JSON",
    "language": "language",
    "several": "ambiguous",
    "two answers": "ambiguous",
    "another answer": "answered otherwise",
}
RULES = {
    "wrong one": "needs its options",
    "statement": "needs its options",
    "all of them": "needs its options",
    "two letters": "several answers",
    "long": "answer too long",
}


def exams(count):
    """Questions, each with what is wrong with it by rules; None for nothing."""
    for number in range(count):
        draw = draw_for("exam", number)
        options = draw.sample(DISEASES, 4)
        rule = draw.choice(sorted(RULES)) if draw.random() < 0.25 else None
        tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(16))
        age, days = draw.randrange(20, 80), draw.randrange(2, 30)
        case = f"编号{number}号患者，{age}岁，病程{days}天，{tail}。"
        asked = {
            "wrong one": "下列哪项诊断可以除外",
            "statement": "下列说法正确的是",
        }.get(rule, "下列哪项是最可能的诊断")
        if rule == "all of them":
            options[0] = "以上都是"
        if rule == "long":
            options[0] = "需要考虑的诊断" * 8
        row = {
            "id": f"exam-{number}",
            "question": f"{case}{asked}？",
            "options": dict(zip("ABCD", options, strict=True)),
            "answer": "AB" if rule == "two letters" else "A",
            "source": "made up",
        }
        yield row, rule


def fault_of(number):
    draw = draw_for("examiner", number)
    return draw.choice(sorted(FAULTS)) if draw.random() < 0.4 else None


def examine(messages):
    """Replies to both tasks."""
    user = messages[-1]["content"]
    number = int(re.search(r"编号(\d+)号", user)[1])
    fault, draw = fault_of(number), draw_for("examined", user)
    (row, _) = next(one for one in exams(number + 1) if one[0]["id"] == f"exam-{number}")
    answer, case = row["options"]["A"], row["question"].split("下列")[0]
    other = row["options"]["B"]
    if "请直接回答" in user:
        found = {"unique": fault != "several", "answer": f"{answer}。"}
        if fault == "another answer":
            found["answer"] = other
        if fault == "two answers":
            # Of both attempts the text is the same: two answers in one.
            found = {"unique": False, "answer": f"{answer}或{other}"}
        return json.dumps(found, ensure_ascii=False)
    question, usable = f"{case}最可能的诊断是什么？", True
    if fault == "changed":
        answer = other
    elif fault == "given away":
        question = f"{case}考虑{answer}，最可能的诊断是什么？"
    elif fault == "keeps options":
        question = f"{case}下列哪项是最可能的诊断？"
    elif fault == "drops a fact":
        question = re.sub(r"病程\d+天，", "", question)
    elif fault == "language":
        ages = re.findall(r"\d+", question)
        question = f"{english(draw)} {' '.join(ages)}岁 {' '.join(ages)}天"
        question = f"{question} {re.search('编号.*?天', case)[0]}"
    usable = fault != "unusable"
    text = json.dumps(
        {"usable": usable, "question": question, "answer": answer}, ensure_ascii=False
    )
    return text[:-8] if fault == "broken" else text
