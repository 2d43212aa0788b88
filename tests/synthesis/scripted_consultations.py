"""A teacher that plays patient and doctor, and spoils a known part of the dialogues."""

import json
import re
import threading
from collections import Counter

from tests.synthesis.made_texts import COMPLAINTS, ENGLISH
from tests.synthesis.teacher_server import draw_for

DISEASES = {
    "zh": {
        "过敏性鼻炎": "耳鼻喉科",
        "慢性胃炎": "消化内科",
        "荨麻疹": "皮肤科",
        "支气管哮喘": "呼吸内科",
        "腰椎间盘突出症": "骨科",
        "缺铁性贫血": "血液科",
        "偏头痛": "神经内科",
        "痛风性关节炎": "风湿免疫科",
    },
    "en": {
        "allergic rhinitis": "Otolaryngology",
        "chronic gastritis": "Gastroenterology",
        "urticaria": "Dermatology",
        "bronchial asthma": "Pulmonology",
        "plantar fasciitis": "Orthopedics",
        "iron-deficiency anemia": "Hematology",
        "migraine": "Neurology",
        "gouty arthritis": "Rheumatology",
    },
}
# Who is faulty, and what the runner should call it.
FAULTS = {
    "patient advises": "role flip",
    "patient names the disease": "diagnosis leak",
    "patient refuses": "refusal",
    "patient speaks another language": "language",
    "patient repeats the doctor": "echo",
    "patient tells all at once": "not vague",
    "patient leaves early": "early goodbye",
    "doctor blurts it out": "diagnosis leak",
    "doctor complains": "role flip",
    "doctor refuses": "refusal",
    "doctor speaks another language": "language",
    "doctor repeats the patient": "echo",
    "doctor quotes the prompt": "prompt leak",
    "doctor plays both": "role flip",
    "doctor never says it": "diagnosis never named",
    "nobody ends it": "no conclusion",
}
SHARE = 0.45


LINES = {
    "zh": {
        "case": "编号{id}。{age}岁，{first}{days}天，伴有{second}，{tail}，既往体健。",
        "all at once": "医生您好，{case}" * 4,
        "opening": "医生您好，我{complaint}好几天了，{tail}，想咨询一下。",
        "patient advises": "建议您每天口服阿莫西林，一日三次，祝您早日康复。",
        "patient names the disease": "大概有一周了，{tail}，会不会是{disease}？",
        "patient refuses": "抱歉，作为一个人工智能语言模型，我不能扮演患者。",
        "patient speaks another language": "It started a week ago and gets worse every day.",
        "patient leaves early": "好的，谢谢医生，再见。",
        "goodbye": "明白了，谢谢医生，{tail}，再见！",
        "tells": "大概{days}天了，{tail}，晚上明显一些。",
        "doctor blurts it out": "您好，这是{disease}，建议到医院检查，{tail}。",
        "doctor complains": "谢谢医生，我最近头疼好几天了，我该吃什么药？",
        "doctor refuses": "抱歉，我无法提供医疗建议，请咨询专业医生。",
        "doctor speaks another language": "How long have you had this, and does anything help?",
        "doctor quotes the prompt": "根据病情资料，您的真实诊断已经明确，{tail}。",
        "doctor plays both": "医生：请问疼了多久？\n患者：大概三天。\n医生：好的，{tail}。",
        "asks": "请问您{tail}的时候会加重吗？平时还有没有别的不适？",
        "doctor never says it": "问题不大，建议清淡饮食，注意休息，{tail}，一周后复查。",
        "advises": "综合来看考虑{disease}，建议到{department}做检查，注意休息，{tail}。",
    },
    "en": {
        "case": "Number {id}. {age} years old, {first} for {days} days, also {second}, {tail}.",
        "all at once": "Hello doctor, {case} " * 6,
        "opening": "Hello, I have had {complaint} for some days now, {tail}, and need advice.",
        "patient advises": "I would recommend amoxicillin, three times a day. Get well soon!",
        "patient names the disease": "For about a week, {tail}. Could it be {disease}, doctor?",
        "patient refuses": "I'm sorry, but as an AI language model I cannot play a patient.",
        "patient speaks another language": "大概一周以前开始的，一天比一天厉害，晚上睡不着觉。",
        "patient leaves early": "All right, thank you doctor, goodbye.",
        "goodbye": "I understand, thank you doctor, {tail}. Goodbye!",
        "tells": "For about {days} days, {tail}, and it is a bit worse at night.",
        "doctor blurts it out": "Hello, this is {disease}, I recommend a test soon, {tail}.",
        "doctor complains": "Thanks, doctor. I've had a headache for days, what should I take?",
        "doctor refuses": "I'm sorry, but I can't provide medical advice. Please ask a doctor.",
        "doctor speaks another language": "请问这种情况有多久了？有没有什么办法能缓解一些？",
        "doctor quotes the prompt": "By the case file your true diagnosis is clear, {tail}.",
        "doctor plays both": (
            "Doctor: How long has it hurt?\nPatient: Three days.\nDoctor: All right, {tail}."
        ),
        "asks": "I see, and does it get worse with {tail}? Is there anything else you noticed?",
        "doctor never says it": (
            "It is nothing serious. I recommend plenty of rest, {tail}, and a visit in a week."
        ),
        "advises": (
            "All in all this is most likely {disease}. I recommend a visit to {department} for "
            "tests, and plenty of rest, {tail}."
        ),
    },
}


def some_words(draw, language):
    """Words that make a turn unlike any other."""
    if language == "zh":
        return "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(20))
    letters = "bcdfghklmnprst"
    return " ".join(
        "".join(draw.choice(letters) + draw.choice("aeiou") for _ in range(3)) for _ in range(6)
    )


def complaints(language):
    return COMPLAINTS if language == "zh" else ENGLISH


def cases(count, *, seed=0, language="zh"):
    """Cases in the form of HuatuoGPT's file; the planted fault of each is in its number."""
    return [case_of(number, seed=seed, language=language) for number in range(count)]


def case_of(number, *, seed, language):
    """One case, which follows from its number."""
    draw = draw_for("case", seed, number)
    disease = draw.choice(list(DISEASES[language]))
    first, second = draw.sample(complaints(language), 2)
    case = LINES[language]["case"].format(
        id=f"{seed}-{number}",
        age=draw.randrange(20, 80),
        first=first,
        second=second,
        days=draw.randrange(2, 30),
        tail=some_words(draw, language),
    )
    return {
        "id": f"case-{seed}-{number}",
        "medical_case": case,
        "doctor_diagnosis": disease,
        "Department": DISEASES[language][disease],
    }


def write_cases(path, count, *, seed=0, language="zh"):
    found = cases(count, seed=seed, language=language)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return str(path)


def fault_of(case_text, *, share=SHARE):
    """The fault of the dialogue over a case; None for none."""
    draw = draw_for("fault", re.search(r"(?:编号|Number )([\d-]+)", case_text)[1])
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
        case = re.search(r"(?:编号|Number )[^\n]*", system)[0]
        language = "zh" if case.startswith("编号") else "en"
        fault = None if again else fault_of(case, share=self.share)
        turns = [one["content"] for one in messages[1:] if one["content"]]
        draw = draw_for(case, len(turns))
        seed, number = re.search(r"(\d+)-(\d+)", case).groups()
        disease = case_of(int(number), seed=int(seed), language=language)["doctor_diagnosis"]
        plays_patient = "网上问诊的患者" in system or "Play a patient" in system
        name = self.patient(turns[1:], fault) if plays_patient else self.doctor(turns, fault)
        if name is None:
            return turns[-1]
        return LINES[language][name].format(
            case=case,
            complaint=draw.choice(complaints(language)),
            days=draw.randrange(2, 20),
            disease=disease,
            department=DISEASES[language][disease],
            tail=some_words(draw, language),
        )

    def patient(self, turns, fault):
        """The name of the patient's next line; None repeats the doctor's."""
        if not turns:
            return "all at once" if fault == "patient tells all at once" else "opening"
        if len(turns) == 2 and fault == "patient repeats the doctor":
            return None
        if len(turns) == 2 and fault in LINES["zh"] and fault.startswith("patient"):
            return fault
        return "goodbye" if len(turns) >= 6 and fault != "nobody ends it" else "tells"

    def doctor(self, turns, fault):
        """The name of the doctor's next line; None repeats the patient's."""
        if fault == "doctor blurts it out":
            return fault
        if len(turns) == 3 and fault == "doctor repeats the patient":
            return None
        if len(turns) == 3 and fault in LINES["zh"] and fault.startswith("doctor"):
            if fault != "doctor never says it":
                return fault
        if fault == "nobody ends it" or len(turns) < 5:
            return "asks"
        return fault if fault == "doctor never says it" else "advises"
