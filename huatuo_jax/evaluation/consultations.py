"""Consultations of a model with a simulated patient over Med-dialog's cases, turn by turn.

A language model plays the patient from the case's description, or the clinic's patient does. A
consultation is a frozen value: who speaks next, the messages to send to that model, and whether it
is over all follow from the turns so far, so it is resumed from its record. Both published ways to
end are here: the patient says 再见 (HuatuoGPT), or a fixed number of exchanges (HuatuoGPT-II).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from huatuo_jax.clinic import world
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.core.statistics import Interval, interval_of
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import Message, Prompt, is_empty, messages_to_json, shown
from huatuo_jax.evaluation.pairwise import Contest
from huatuo_jax.evaluation.patient_faults import (
    FAULT_KINDS,
    Fault,
    FaultRules,
    find_faults,
    in_a_loop,
    mentions,
    plain,
)
from huatuo_jax.evaluation.reference_answers import Path

Ending = Literal["goodbye", "exchanges"]
End = Literal["goodbye", "exchanges", "cap", "loop"]
Speaker = Literal["user", "assistant"]

# The names of a case's fields in HuatuoGPT's file, and in that of HuatuoGPT-II.
_FIELDS = (
    ("medical_case", "doctor_diagnosis", "Department"),
    ("Description", "Diagnosis and suggestions", "Doctor faculty"),
)
_HEADING = re.compile(r"^[ \t]*([^\s:：]{2,12})[:：][ \t]*$", re.MULTILINE)
_DIAGNOSIS_HEADINGS = ("疾病诊断", "病情摘要及初步印象")

_BETWEEN = re.compile(
    r"[;；,，、。.？?！!()（）\s]|待查|待诊|造成|引起|导致|侵犯|[和及伴或](?=[^\s]{2})"
)
_BEFORE_NAME = re.compile(
    r"^.*(?:考虑|诊断为?|提示|判断[:：]?|符合|目前是|有\d+个)|^\d+岁|^(?:左侧|右侧|双侧|原发性的?)"
)
# A diagnosis ends in one of these; what follows it ("可能", "术后") is no part of the name. Some
# are symptoms that doctors write as diagnoses; 头晕, 乏力 and 咳嗽 are too common in any talk.
_ENDS_OF_NAMES = (
    "病变|病|症|证|炎|癌|瘤|痛|疹|痔|癣|疣|痣|疖|疮|痫|疝|瘘|瘫痪|瘫|痛经|哮喘|综合征|障碍|感染",
    "息肉|结节|增生|不良|狭窄|结石|囊肿|肉芽肿|脓肿|血肿|水肿|气肿|甲状腺肿|脓疱|占位|曲张|扩张|硬化|纤维化",
    "肿大|肥大|萎缩|坏死|坏疽|糜烂|溃疡|穿孔|破裂|梗阻|阻滞|闭锁|畸形|缺损|粘连|钙化|脱垂|脱位|脱离|滑脱|突出",
    "膨出|扭转|套叠|嵌顿|反流|内翻|外翻|栓系|包茎|隐睾|多囊肾|多囊肝|多囊卵巢|巨结肠|肛裂|唇裂|腭裂|骨刺",
    "损伤|挫伤|扭伤|拉伤|烧伤|烫伤|冻伤|咬伤|外伤|劳损|撕裂|劈裂|骨折|震荡|中毒|中暑|过敏|休克|昏迷|晕厥|眩晕",
    "梗塞|梗死|栓塞|血栓|缺血|出血|血尿|便血|紫癜|贫血|高血压|低血压|卒中|中风|失常|早搏|颤动|房颤|室颤",
    "扑动|过速|过缓|衰竭|不全|积液|积水|积血|腹水|气胸|血胸|尘肺|结核|脂肪肝|酒精肝|[甲乙丙丁戊]肝|三阳|黄疸",
    "减退|亢进|甲减|甲亢|紊乱|失调|不调|缺乏|高血糖|低血糖|高血脂|高尿酸|痛风|疏松|尿崩|脱水",
    "流感|感冒|上感|水痘|猩红热|出血热|登革热|霍乱|伤寒|痢疾|菌痢|疟疾|鼠疫|白喉|百日咳|破伤风|麻风|梅毒",
    "流产|早产|早剥|前置胎盘|宫外孕|异位妊娠|闭经|不孕|早泄|遗精|遗尿|失禁|潴留|腹泻|便秘|痉挛|震颤|衰弱",
    "抑郁|焦虑|失眠|痴呆|白内障|青光眼|沙眼|近视|远视|散光|弱视|斜视|耳聋|耳鸣|蛀牙|白癜风|脱发|斑秃|苔藓|鸡眼|异常",
)
# The longest first, as some begin with another (痛, 痛风).
_ENDS = sorted("|".join(_ENDS_OF_NAMES).split("|"), key=len, reverse=True)
_NAME = re.compile(rf".*(?:{'|'.join(_ENDS)})")
_NAME_CHARACTERS = (2, 12)
_COURSE = re.compile(r"^(?:急性|慢性|急慢性|轻度|重度|多发性?)")

COMMON_ALIASES: Mapping[str, tuple[str, ...]] = {
    "甲减": ("甲状腺功能减退", "甲状腺机能减退"),
    "甲状腺功能减退": ("甲减", "甲状腺机能减退"),
    "甲亢": ("甲状腺功能亢进", "甲状腺机能亢进"),
    "甲状腺功能亢进": ("甲亢", "甲状腺机能亢进"),
    "支气管哮喘": ("哮喘",),
    "脑梗塞": ("脑梗", "脑梗死", "缺血性脑卒中"),
    "心肌梗塞": ("心梗", "心肌梗死"),
    "前列腺增生": ("前列腺肥大",),
    "泌尿道感染": ("尿路感染", "泌尿系感染", "泌尿系统感染"),
    "汗疱湿疹": ("汗疱疹",),
    "混合痔": ("痔疮",),
    "勃起功能障碍": ("阳痿",),
    "焦虑障碍": ("焦虑症",),
    "双相抑郁": ("双相情感障碍", "双相障碍", "躁郁症"),
    "双相情感障碍": ("双相障碍", "躁郁症", "双相抑郁"),
    "神经官能症": ("神经症",),
    "蛀牙": ("龋齿", "龋病"),
    "月经失调": ("月经不调", "月经紊乱"),
    "月经紊乱": ("月经不调", "月经失调"),
    "上感": ("上呼吸道感染", "感冒"),
    "急性肠炎": ("急性胃肠炎", "肠胃炎"),
    "包皮炎": ("包皮龟头炎",),
    "血尿": ("尿血",),
}
"""Other names of diseases that a consultation uses as often."""

_GOODBYE = re.compile(r"(?:再见|拜拜)(?![面到过你您一好效轻])|再见[你您]?$")

PATIENT_OPENING = "您好，我是医生。请问您哪里不舒服？"
"""The line of the doctor that the model that plays the patient answers first."""
_PATIENT = """请你扮演一位在网上问诊的患者，和你说话的是医生。下面是你的情况：

{description}

请遵守：
1. 你是患者，不是医生：不给建议，不开药，不下诊断，不询问对方的症状，也不祝对方康复。
2. 开头只用一两句话说最主要的不适，以后医生问到什么再说什么；上面没有写到的，就说没有或者不清楚。
3. 上面没有写明的病名，在医生说出来之前不要说出来。
4. 用口语，每次不超过三句话；只写患者说的话，不写旁白、动作和角色名。
{ending}"""
_ENDINGS: Mapping[Ending, str] = {
    "goodbye": "5. 医生给出判断和建议、你也没有别的问题时，道谢并说“再见”；在那之前不要说。",
    "exchanges": "5. 不要结束对话，也不要只是道谢：医生答完以后，接着追问一个与病情有关的新问题。",
}

_SENTENCE = re.compile(r"[^。！？!?；;\n]+[。！？!?；;]*")
_ASKS = re.compile(
    r"[?？][\s”\"』)）]*$|(?:吗|么|呢)[。.\s]*$|^(?:请问|有没有|有无|是否)"
    r"|^(?:还)?请[您你]?(?:再|先|详细|具体)*(?:描述|告诉我|提供|说说|说一下|补充)"
)
_ANNOUNCES = re.compile(r"(?:需要|想|要|得)(?:先|再|进一步)?(?:了解|知道|问|请教)|为了")
_COURTESY = re.compile(
    r"(?:还有|有)(?:什么|其他|别的|任何|哪些).{0,8}(?:问题|疑问|帮|需要|咨询|想了解)|(?:可以|能)(?:帮|为)[您你]"
    r"|(?:听|看)?(?:明白|懂)了[吗么]|哪里不舒服|还需要.{0,6}(?:帮助|了解)"
)
_CONCLUDES = re.compile(
    r"考虑|可能|诊断|应该是|属于|患有|得了|引起|导致|建议|需要(?:做|去|进行)|可以(?:先|试着|适当)*(?:服用|吃|用|做|去)"
    r"|口服|服用|外用|治疗|手术|挂.{0,4}科|去医院"
)
_DENIED_BEFORE = re.compile(
    r"(?<!不)(?<!不能)(?<!无法)(?:排除|不是|并非|不像|不考虑|没有|不支持|不符合|不属于)[^,，。;；]{0,6}$"
)
_DENIED_AFTER = re.compile(
    r"^[^,，。;；]{0,4}(?:可能性(?:不大|很小|较小|比较小|小|很低|低)|(?:已|已经|可以|可)排除|不支持)"
)


@dataclass(frozen=True, kw_only=True)
class PatientCase:
    """A case that a patient is played from.

    Attributes:
        id: in its set.
        department: one of twenty.
        description: what the patient knows, as it stands in the set.
        diagnosis: what the real doctor wrote.
        diagnoses: each with all wordings that count as naming it; none where the doctor's text
            holds no name of a disease.
    """

    id: str
    department: str
    description: str
    diagnosis: str
    diagnoses: tuple[tuple[str, ...], ...]

    @property
    def to_be_found(self) -> tuple[tuple[str, ...], ...]:
        """The diagnoses that the patient does not know already, by any of their wordings."""
        return tuple(one for one in self.diagnoses if mentions(self.description, one) is None)


def read_med_dialog(
    path: Path, *, aliases: Mapping[str, Sequence[str]] | None = None
) -> list[PatientCase]:
    """The cases of HuatuoGPT's multi-turn evaluation, in its file's form or in HuatuoGPT-II's.

    Args:
        path: the file.
        aliases: other names of a disease, by a name that the doctors' texts use, beside
            `COMMON_ALIASES`.

    Raises:
        ValueError: no such file, a row of another form, or an id that is used twice.
    """
    found: dict[str, tuple[str, PatientCase]] = {}
    for row in read_rows(path):
        if isinstance(row, RowError):
            raise ValueError(str(row))
        place, value = f"{row.file}:{row.line}", row.value
        known = [names for names in _FIELDS if isinstance(value, dict) and names[0] in value]
        if not known:
            raise ValueError(f"{place}: there is neither {_FIELDS[0][0]} nor {_FIELDS[1][0]}")
        texts = []
        for name in ("id", *known[0]):
            text = str(value[name]) if name == "id" and name in value else value.get(name)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{place}: {name} is {shown(repr(text))}; it should be text")
            texts.append(text.strip())
        case_id, description, diagnosis, department = texts
        if case_id in found:
            raise ValueError(f"{place}: the id {case_id!r} is already used at {found[case_id][0]}")
        found[case_id] = (
            place,
            PatientCase(
                id=case_id,
                department=department,
                description=description,
                diagnosis=diagnosis,
                diagnoses=diagnoses_of(diagnosis, aliases=aliases),
            ),
        )
    if not found:
        raise ValueError(f"{path}: there are no rows")
    return [case for _, case in found.values()]


def diagnoses_of(
    text: str, *, aliases: Mapping[str, Sequence[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The names of diseases in a doctor's diagnosis, each with its aliases.

    Read are the parts under 疾病诊断 or 病情摘要及初步印象, or the whole text without headings. A
    name without its course (急性, 慢性) counts as the same.
    """
    parts = _HEADING.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    texts = [sections[name] for name in _DIAGNOSIS_HEADINGS if name in sections] or parts[:1]
    low, high = _NAME_CHARACTERS
    found: dict[tuple[str, ...], None] = {}
    for piece in _BETWEEN.split("\n".join(texts)):
        match = _NAME.match(_BEFORE_NAME.sub("", piece).strip())
        if match is None or not low <= len(match.group()) <= high:
            continue
        names = [match.group()]
        if len(without_course := _COURSE.sub("", names[0])) >= low:
            names.append(without_course)
        for known in (COMMON_ALIASES, aliases or {}):
            names += [alias for name in names[:2] if name in known for alias in known[name]]
        found[tuple(dict.fromkeys(names))] = None
    return tuple(found)


def clinic_case(case: world.Case) -> PatientCase:
    """A case of the clinic, whose truth is known: the patient knows nothing of the disease."""
    return PatientCase(
        id=case.id,
        department=case.truth.department,
        description="",
        diagnosis=case.disease,
        diagnoses=(case.truth.words,),
    )


@dataclass(frozen=True, kw_only=True)
class ConsultationSettings:
    """The rules by which a consultation ends.

    Attributes:
        ending: "goodbye": the patient says 再见, at the latest after `max_exchanges`; "exchanges":
            after `max_exchanges`, whatever the patient says.
        max_exchanges: messages of the doctor. HuatuoGPT-II has 2; the cap of HuatuoGPT is unknown.
        stop_on_loop: end a consultation that repeats itself, as the rest tells nothing.
        rules: of what a loop is.
    """

    ending: Ending = "goodbye"
    max_exchanges: int = 8
    stop_on_loop: bool = True
    rules: FaultRules = field(default_factory=FaultRules)

    def __post_init__(self) -> None:
        """Validates the fields."""
        if self.ending not in get_args(Ending):
            raise ValueError(f"ending is {self.ending!r}; it should be goodbye or exchanges")
        if self.max_exchanges < 1:
            raise ValueError(f"max_exchanges is {self.max_exchanges}; it should be at least 1")


@dataclass(frozen=True, kw_only=True)
class ConsultationState:
    """A consultation up to some turn.

    Attributes:
        case: the truth.
        settings: how it ends.
        messages: the patient's ("user") and the doctor's ("assistant") in turn, the patient first.
    """

    case: PatientCase
    settings: ConsultationSettings
    messages: tuple[Message, ...] = ()

    @property
    def exchanges(self) -> int:
        """The number of the doctor's messages, each of which completes an exchange."""
        return len(self.messages) // 2

    @property
    def end(self) -> End | None:
        """The reason that it is over; None while it is not."""
        settings, by_patient = self.settings, len(self.messages) % 2 == 1
        if settings.ending == "goodbye" and by_patient and self.exchanges:
            if says_goodbye(self.messages[-1].content):
                return "goodbye"
        if settings.stop_on_loop and in_a_loop(self.messages, settings.rules):
            return "loop"
        if not by_patient and self.exchanges >= settings.max_exchanges:
            return "cap" if settings.ending == "goodbye" else "exchanges"
        return None

    @property
    def speaker(self) -> Speaker | None:
        """The role that speaks next; None if it is over."""
        if self.end is not None:
            return None
        return "assistant" if len(self.messages) % 2 else "user"

    def add(self, text: str) -> "ConsultationState":
        """The consultation with the next speaker's message.

        Raises:
            ValueError: it is over.
        """
        speaker = self.speaker
        if speaker is None:
            raise ValueError(f"the consultation of case {self.case.id} is over ({self.end})")
        return dataclasses.replace(self, messages=(*self.messages, Message(speaker, text)))

    def doctor_messages(self) -> list[dict[str, str]]:
        """The messages for the model that is evaluated; its own template adds a system message."""
        return messages_to_json(self.messages)

    def patient_messages(self) -> list[dict[str, str]]:
        """The messages for the language model that plays the patient, whose turns are its own.

        The diagnosis is not in it.
        """
        system = _PATIENT.format(
            description=self.case.description, ending=_ENDINGS[self.settings.ending]
        )
        own = {"user": "assistant", "assistant": "user"}
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": PATIENT_OPENING},
            *({"role": own[one.role], "content": one.content} for one in self.messages),
        ]

    @property
    def transcript(self) -> str:
        """The turns as a judge or a doctor reads them."""
        who = {"user": "患者", "assistant": "医生"}
        return "\n".join(f"{who[one.role]}：{one.content.strip()}" for one in self.messages)

    def to_json(self) -> dict[str, Any]:
        """Case, settings, messages and end."""
        return {
            "case": asdict(self.case),
            "settings": asdict(self.settings),
            "messages": messages_to_json(self.messages),
            "end": self.end,
        }


def says_goodbye(text: str) -> bool:
    """Returns True if a patient's message says goodbye, as "再见" does and "再见面" does not."""
    return _GOODBYE.search(text.strip().rstrip("。！!~～ ")) is not None


def clinic_turn(case: world.Case, consultation: ConsultationState, *, seed: int = 0) -> str:
    """The next message of the clinic's patient, which follows from the doctor's so far.

    Raises:
        ValueError: it is not the patient's turn.
    """
    if consultation.speaker != "user":
        raise ValueError(f"case {case.id}: it is not the patient's turn")
    patient = Patient(case, seed=seed, held_out=True)
    text = patient.open()
    for message in consultation.messages:
        if message.role == "assistant":
            text = patient.reply(message.content)
    return text


@dataclass(frozen=True, kw_only=True)
class ConsultationOutcome:
    """The outcome of one consultation.

    Attributes:
        id: of the case.
        department: of the case.
        end: why it is over; None where it is not.
        exchanges: messages of the doctor.
        diagnosis_named: the doctor named the diagnosis, and not to rule it out. None where the case
            has none to find: the doctor's text has no name, or the patient knows it already.
        named_at: in which of the doctor's messages first, from 1 on.
        questions: that the doctor asked before the first judgement or advice, courtesies left out.
        concluded: there was a judgement or advice.
        faults: see `patient_faults`.
    """

    id: str
    department: str
    end: End | None
    exchanges: int
    diagnosis_named: bool | None
    named_at: int | None
    questions: int
    concluded: bool
    faults: tuple[Fault, ...]

    @property
    def spoiled(self) -> bool:
        """True if the patient flipped roles, leaked the diagnosis or said nothing."""
        return any(fault.kind != "loop" and fault.speaker == "user" for fault in self.faults)


def consultation_outcome(consultation: ConsultationState) -> ConsultationOutcome:
    """Returns the outcome of a consultation."""
    case = consultation.case
    answers = [one.content for one in consultation.messages if one.role == "assistant"]
    wordings = [name for diagnosis in case.to_be_found for name in diagnosis]
    named = [place for place, text in enumerate(answers, 1) if names_one(text, wordings)]
    questions, concluded = questions_before_concluding(answers)
    return ConsultationOutcome(
        id=case.id,
        department=case.department,
        end=consultation.end,
        exchanges=consultation.exchanges,
        diagnosis_named=bool(named) if case.to_be_found else None,
        named_at=named[0] if named else None,
        questions=questions,
        concluded=concluded,
        faults=find_faults(
            consultation.messages,
            diagnoses=case.to_be_found,
            rules=consultation.settings.rules,
        ),
    )


def names_one(text: str, names: Iterable[str]) -> bool:
    """Returns True if a doctor's text says one of the names, and not only to rule it out."""
    normal = plain(text)
    for name in names:
        for match in re.finditer(re.escape(plain(name)), normal):
            before, after = normal[: match.start()], normal[match.end() :]
            if not _DENIED_BEFORE.search(before) and not _DENIED_AFTER.search(after):
                return True
    return False


def questions_before_concluding(answers: Iterable[str]) -> tuple[int, bool]:
    """Questions of a doctor up to the first sentence of judgement or advice, and whether it came.

    A question such as "可能是吃坏了吗？" is one; "还有其他问题吗？" is a courtesy and none.
    """
    questions = 0
    for text in answers:
        for match in _SENTENCE.finditer(text):
            sentence = match.group().strip()
            if _ASKS.search(sentence):
                questions += _COURTESY.search(sentence) is None
            elif _CONCLUDES.search(sentence) and not _ANNOUNCES.search(sentence):
                return questions, True
    return questions, False


@dataclass(frozen=True, kw_only=True)
class ConsultationFigures:
    """Figures over consultations, each mean with its 95 % interval over cases.

    Attributes:
        consultations: how many.
        ends: how many ended for which reason.
        faults: how many have a fault, by kind and speaker, as `leak by user`.
        spoiled: how many the patient spoiled, by a role flip, a leak or an empty turn.
        diagnosis_named: share of the cases with a diagnosis to find.
        without_diagnosis: cases that have none to find.
        questions: before the first judgement or advice.
        exchanges: messages of the doctor.
        not_concluded: how many have neither judgement nor advice.
    """

    consultations: int
    ends: Mapping[str, int]
    faults: Mapping[str, int]
    spoiled: int
    diagnosis_named: Interval | None
    without_diagnosis: int
    questions: Interval | None
    exchanges: Interval | None
    not_concluded: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {
            name: value.to_json() if isinstance(value, Interval) else value
            for name, value in found.items()
        }


def consultation_figures(
    outcomes: Sequence[ConsultationOutcome], *, spoiled: bool = True, seed: int = 0
) -> ConsultationFigures:
    """The figures of some outcomes.

    Args:
        outcomes: one a case.
        spoiled: take those that the patient spoiled, too.
        seed: of the bootstrap.

    Raises:
        ValueError: two outcomes are of one case.
    """
    for name, count in Counter(one.id for one in outcomes).items():
        if count > 1:
            raise ValueError(f"outcomes: {count} are of case {name!r}; there should be one a case")
    taken = [one for one in outcomes if spoiled or not one.spoiled]
    known = [float(one.diagnosis_named) for one in taken if one.diagnosis_named is not None]
    faults = Counter((fault.kind, fault.speaker) for one in taken for fault in one.faults)
    return ConsultationFigures(
        consultations=len(taken),
        ends=dict(Counter(str(one.end or "not over") for one in taken)),
        faults={
            f"{kind} by {speaker}": faults[kind, speaker]
            for kind in FAULT_KINDS
            for speaker in ("user", "assistant")
            if faults[kind, speaker]
        },
        spoiled=sum(one.spoiled for one in taken),
        diagnosis_named=interval_of(known, seed=seed),
        without_diagnosis=len(taken) - len(known),
        questions=interval_of([float(one.questions) for one in taken], seed=seed),
        exchanges=interval_of([float(one.exchanges) for one in taken], seed=seed),
        not_concluded=sum(not one.concluded for one in taken),
    )


def figures_by_department(
    outcomes: Sequence[ConsultationOutcome], *, seed: int = 0
) -> dict[str, ConsultationFigures]:
    """The figures of each department, in the order of the outcomes."""
    return {
        name: consultation_figures([one for one in outcomes if one.department == name], seed=seed)
        for name in dict.fromkeys(one.department for one in outcomes)
    }


def conversation_contests(
    ones: Sequence[ConsultationState], others: Sequence[ConsultationState]
) -> list[Contest]:
    """Two models' whole consultations on the same cases, for `pairwise` to compare.

    The judge sees the patient's description and the real doctor's diagnosis.

    Raises:
        ValueError: the models did not consult on the same cases, each once.
    """
    by_case = {one.case.id: one for one in others}
    ids = [one.case.id for one in ones]
    if sorted(ids) != sorted(one.case.id for one in others) or len(set(ids)) < len(ids):
        lacking = sorted(set(ids) ^ set(by_case))
        what = f"only one model has case {lacking[0]!r}" if lacking else "a case is there twice"
        raise ValueError(f"consultations: {what}; each model needs the same cases, each once")
    contests = []
    for one in ones:
        case, other = one.case, by_case[one.case.id]
        opening = case.description
        if is_empty(opening):
            opening = next((message.content for message in one.messages), "")
        contests.append(
            Contest(
                prompt=Prompt(
                    id=case.id,
                    messages=(Message("user", opening),),
                    source="consultations",
                    diagnosis=case.diagnosis,
                ),
                group=case.department,
                one=one.transcript,
                other=other.transcript,
            )
        )
    return contests
