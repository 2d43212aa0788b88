"""A teacher that plays patient and doctor, and spoils a known part of the dialogues."""

import json
import re
import threading
from collections import Counter

from tests.synthesis.made_texts import COMPLAINTS
from tests.synthesis.teacher_server import draw_for

DISEASES = {
    "过敏性鼻炎": "耳鼻喉科",
    "慢性胃炎": "消化内科",
    "荨麻疹": "皮肤科",
    "支气管哮喘": "呼吸内科",
    "腰椎间盘突出症": "骨科",
    "缺铁性贫血": "血液科",
    "偏头痛": "神经内科",
    "痛风性关节炎": "风湿免疫科",
}
# Who is faulty, and what the runner should call it.
FAULTS = {
    "patient advises": "role flip",
    "patient names the disease": "diagnosis leak",
    "patient refuses": "refusal",
    "patient speaks English": "language",
    "patient repeats the doctor": "echo",
    "patient tells all at once": "not vague",
    "patient leaves early": "early goodbye",
    "doctor blurts it out": "diagnosis leak",
    "doctor complains": "role flip",
    "doctor refuses": "refusal",
    "doctor speaks English": "language",
    "doctor repeats the patient": "echo",
    "doctor quotes the prompt": "prompt leak",
    "doctor plays both": "role flip",
    "doctor never says it": "diagnosis never named",
    "nobody ends it": "no conclusion",
}
SHARE = 0.45


def cases(count, *, seed=0):
    """Cases in the form of HuatuoGPT's file; the planted fault of each is in its number."""
    names = list(DISEASES)
    found = []
    for number in range(count):
        draw = draw_for("case", seed, number)
        disease = draw.choice(names)
        tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(20))
        first, second = draw.sample(COMPLAINTS, 2)
        found.append(
            {
                "id": f"case-{seed}-{number}",
                "medical_case": (
                    f"编号{seed}-{number}。{draw.randrange(20, 80)}岁，{first}"
                    f"{draw.randrange(2, 30)}天，伴有{second}，{tail}，既往体健。"
                ),
                "doctor_diagnosis": disease,
                "Department": DISEASES[disease],
            }
        )
    return found


def write_cases(path, count, *, seed=0):
    path.write_text(json.dumps(cases(count, seed=seed), ensure_ascii=False), encoding="utf-8")
    return str(path)


def fault_of(case_text, *, share=SHARE):
    """The fault of the dialogue over a case; None for none."""
    draw = draw_for("fault", re.search(r"编号([\d-]+)", case_text)[1])
    return draw.choice(sorted(FAULTS)) if draw.random() < share else None


class ScriptedConsultations:
    """Replies to both roles; what it says follows from the case and the number of turns.

    Attributes:
        once: a faulty turn is right when it is asked for again.
    """

    def __init__(self, *, share=SHARE, once=False):
        self.share, self.once = share, once
        self.asked, self.lock = Counter(), threading.Lock()

    def __call__(self, messages):
        system, body = messages[0]["content"], json.dumps(messages, ensure_ascii=False)
        with self.lock:
            self.asked[body] += 1
            again = self.once and self.asked[body] > 1
        case = re.search(r"编号[^\n]*", system)[0]
        fault = None if again else fault_of(case, share=self.share)
        turns = [one["content"] for one in messages[1:] if one["content"]]
        draw = draw_for(case, len(turns))
        tail = "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(12))
        if "请你扮演一位在网上问诊的患者" in system:
            return self.patient(case, turns[1:], fault, draw, tail)
        disease = re.search(r"真实诊断：([^\n]*)", system)[1]
        return self.doctor(disease, turns, fault, draw, tail)

    def patient(self, case, turns, fault, draw, tail):
        if not turns:
            if fault == "patient tells all at once":
                return f"医生您好，{case}" * 4
            return f"医生您好，我{draw.choice(COMPLAINTS)}好几天了，{tail}，想咨询一下。"
        middle = len(turns) == 2
        if fault == "patient advises" and middle:
            return "建议您每天口服阿莫西林，一日三次，祝您早日康复。"
        if fault == "patient names the disease" and middle:
            return f"大概有一周了，{tail}，会不会是{self.disease_of(case)}？"
        if fault == "patient refuses" and middle:
            return "抱歉，作为一个人工智能语言模型，我不能扮演患者。"
        if fault == "patient speaks English" and middle:
            return "It started about a week ago and it is getting worse every single day."
        if fault == "patient repeats the doctor" and middle:
            return turns[-1]
        if fault == "patient leaves early" and middle:
            return "好的，谢谢医生，再见。"
        if len(turns) >= 6 and fault != "nobody ends it":
            return f"明白了，谢谢医生，{tail}，再见！"
        return f"大概{draw.randrange(2, 20)}天了，{tail}，晚上明显一些。"

    def disease_of(self, case):
        number = re.search(r"编号(\d+)-(\d+)", case)
        return cases(int(number[2]) + 1, seed=int(number[1]))[-1]["doctor_diagnosis"]

    def doctor(self, disease, turns, fault, draw, tail):
        if fault == "doctor blurts it out":
            return f"您好，这是{disease}，建议到医院检查，{tail}。"
        if fault == "doctor complains" and len(turns) == 3:
            return "谢谢医生，我最近头疼好几天了，我该吃什么药？"
        if fault == "doctor refuses" and len(turns) == 3:
            return "抱歉，我无法提供医疗建议，请咨询专业医生。"
        if fault == "doctor speaks English" and len(turns) == 3:
            return "How long have you had this problem, and does anything make it better?"
        if fault == "doctor repeats the patient" and len(turns) == 3:
            return turns[-1]
        if fault == "doctor quotes the prompt" and len(turns) == 3:
            return f"根据病情资料，您的真实诊断已经明确，{tail}。"
        if fault == "doctor plays both" and len(turns) == 3:
            return f"医生：请问疼了多久？\n患者：大概三天。\n医生：好的，{tail}。"
        if fault == "nobody ends it" or len(turns) < 5:
            return f"请问您{tail}的时候会加重吗？平时还有没有别的不适？"
        if fault == "doctor never says it":
            return f"问题不大，建议清淡饮食，注意休息，{tail}，一周后复查。"
        return f"综合来看考虑{disease}，建议到{DISEASES[disease]}做检查，注意休息，{tail}。"
