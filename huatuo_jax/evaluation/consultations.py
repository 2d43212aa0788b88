"""Consultations of a model with a simulated patient over Med-dialog's cases, turn by turn.

A language model plays the patient from the case's description, or the clinic's patient does. A
consultation is a frozen value: who speaks next, the messages to send to that model, and whether it
is over all follow from the turns so far, so it is resumed from its record. Both published ways to
end are here: the patient says 再见 (HuatuoGPT), or a fixed number of exchanges (HuatuoGPT-II).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from huatuo_jax.clinic import world
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.core.statistics import Interval, interval_of
from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.data.records import Message, Prompt, is_empty, messages_to_json, shown
from huatuo_jax.evaluation.diagnosis_names import diagnoses_of, names_one
from huatuo_jax.evaluation.doctor_turns import questions_before_concluding
from huatuo_jax.evaluation.pairwise import Contest
from huatuo_jax.evaluation.patient_faults import (
    FAULT_KINDS,
    Fault,
    FaultRules,
    find_faults,
    in_a_loop,
    mentions,
)
from huatuo_jax.evaluation.reference_answers import Path

Ending = Literal["goodbye", "exchanges"]
End = Literal["goodbye", "exchanges", "cap", "loop"]
Speaker = Literal["user", "assistant"]
Language = Literal["zh", "en"]

# The names of a case's fields in HuatuoGPT's file, and in that of HuatuoGPT-II.
_FIELDS = (
    ("medical_case", "doctor_diagnosis", "Department"),
    ("Description", "Diagnosis and suggestions", "Doctor faculty"),
)
_GOODBYE = re.compile(
    r"(?:再见|拜拜)(?![面到过你您一好效轻])|再见[你您]?$|\b(?:good[ -]?bye|bye(?:[ -]bye)?)\b",
    re.IGNORECASE,
)

PATIENT_OPENINGS: Mapping[Language, str] = {
    "zh": "您好，我是医生。请问您哪里不舒服？",
    "en": "Hello, I am the doctor. What brings you here today?",
}
"""The line of the doctor that the model that plays the patient answers first."""
_PATIENT: Mapping[Language, str] = {
    "zh": """请你扮演一位在网上问诊的患者，和你说话的是医生。下面是你的情况：

{description}

请遵守：
1. 你是患者，不是医生：不给建议，不开药，不下诊断，不询问对方的症状，也不祝对方康复。
2. 开头只用一两句话说最主要的不适，以后医生问到什么再说什么；上面没有写到的，就说没有或者不清楚。
3. 上面没有写明的病名，在医生说出来之前不要说出来。
4. 用口语，每次不超过三句话；只写患者说的话，不写旁白、动作和角色名。
{ending}""",
    "en": """Play a patient who consults a doctor online; whoever talks to you is the doctor. This \
is your situation:

{description}

Rules:
1. You are the patient, not the doctor: do not advise, prescribe or diagnose, do not ask for the \
other's symptoms, and do not wish the other a good recovery.
2. Begin with your main complaint in one or two sentences, and tell more only when the doctor asks \
for it; what is not written above you do not have or do not know.
3. Do not name a disease that is not written above before the doctor has named it.
4. Speak English, as people talk, at most three sentences at a time; write only what the patient \
says, no narration, no actions and no names of roles.
{ending}""",
}
_ENDINGS: Mapping[Language, Mapping[Ending, str]] = {
    "zh": {
        "goodbye": "5. 医生给出判断和建议、你也没有别的问题时，道谢并说“再见”；在那之前不要说。",
        "exchanges": (
            "5. 不要结束对话，也不要只是道谢：医生答完以后，接着追问一个与病情有关的新问题。"
        ),
    },
    "en": {
        "goodbye": (
            "5. When the doctor has given a judgement and advice and you have no more questions, "
            'give thanks and say "Goodbye"; do not say it before.'
        ),
        "exchanges": (
            "5. Do not end the conversation or only give thanks: when the doctor has answered, ask "
            "a new question about your illness."
        ),
    },
}
_SPEAKERS: Mapping[Language, Mapping[str, str]] = {
    "zh": {"user": "患者：", "assistant": "医生："},
    "en": {"user": "Patient: ", "assistant": "Doctor: "},
}


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
        language: of the description, in which the consultation is held.
    """

    id: str
    department: str
    description: str
    diagnosis: str
    diagnoses: tuple[tuple[str, ...], ...]
    language: Language = "zh"

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
        language = self.case.language
        system = _PATIENT[language].format(
            description=self.case.description, ending=_ENDINGS[language][self.settings.ending]
        )
        own = {"user": "assistant", "assistant": "user"}
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": PATIENT_OPENINGS[language]},
            *({"role": own[one.role], "content": one.content} for one in self.messages),
        ]

    @property
    def transcript(self) -> str:
        """The turns as a judge or a doctor reads them."""
        who = _SPEAKERS[self.case.language]
        return "\n".join(f"{who[one.role]}{one.content.strip()}" for one in self.messages)

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
    return _GOODBYE.search(text.strip().rstrip("。！!~～. ")) is not None


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
