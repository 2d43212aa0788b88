"""Distilled conversations: one model plays patient and doctor over a case with its diagnosis.

After HuatuoGPT (arXiv 2305.15075, section 3.1): the patient sees the case, starts vaguely and ends
with 再见; the doctor sees the diagnosis, too, and must ask before naming it. Each turn is checked
when it is said and asked for again where it is faulty; a dialogue whose turn stays faulty, often
for what was said before, or that ends without advice or the diagnosis, is begun anew, and in the
end left out with its reason. The checks are patterns of Chinese and English consultations; a
dialogue is in the language of its case.
"""

import dataclasses
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huatuo_jax.clinic.files import written_cases
from huatuo_jax.clinic.world import Case as ClinicCase
from huatuo_jax.data.readers import read_cases
from huatuo_jax.data.records import Message, is_empty
from huatuo_jax.evaluation.consultations import (
    ConsultationSettings,
    ConsultationState,
    Language,
    PatientCase,
    Speaker,
    clinic_case,
    says_goodbye,
)
from huatuo_jax.evaluation.diagnosis_names import diagnoses_of, names_one
from huatuo_jax.evaluation.doctor_turns import questions_before_concluding
from huatuo_jax.evaluation.patient_faults import (
    find_faults,
    in_a_loop,
    mentions,
    plain,
    speaks_as_doctor,
)
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.synthesis import checks, templates
from huatuo_jax.synthesis.jobs import (
    Candidate,
    Job,
    Rejected,
    Request,
    Step,
    ask_again,
    jobs_of,
)

_LONGEST_NAME: Mapping[Language, int] = {"zh": 12, "en": 60}
"""Characters of a diagnosis that is nothing but a name."""
_FIRST_AT_MOST: Mapping[Language, int] = {"zh": 100, "en": 350}
"""Characters of a vague first message."""
_ROLE_NAMES = (
    r"(?:\*\*)?(?:患者|病人|医生|大夫|医师|patient|doctor|physician)(?:\*\*)?\s*[:：](?:\*\*)?"
)
_OWN_NAME = re.compile(rf"^\s*{_ROLE_NAMES}\s*", re.IGNORECASE)
_ANOTHER_NAME = re.compile(rf"(?:^|\n)\s*{_ROLE_NAMES}", re.IGNORECASE)
# What a patient says and a doctor does not.
_AS_PATIENT = re.compile(
    r"(?:谢谢|多谢|感谢)(?:您|你)?[,，]?(?:医生|大夫)|^(?:您好|你好)?[,，]?(?:医生|大夫)[,，!！您你我]"
    r"|我(?:最近|这几天|这两天|从昨天|昨晚|今天早上|已经|也|还|一直|总是)?[^。!?，,您你]{0,8}"
    r"(?:疼|痛|咳嗽|发烧|头晕|拉肚子|不舒服|难受|恶心)(?:得|了|已经|好几|[一二两三四五六七八九十\d]+[天周月])"
    r"|我(?:该|应该|要)(?:怎么办|吃什么药|挂什么科|看什么科)|请问医生"
    r"|\b(?:thanks|thank you)(?: so much| very much)?,? (?:doctor|doc|dr)\b"
    r"|^(?:(?:hi|hello|good \w+),? )?(?:doctor|doc)\b"
    r"|\bi(?:'ve| have) (?:been (?:having|feeling|experiencing|coughing|vomiting)"
    r"|had (?:a|an|this|these|some)? ?(?:\w+ ){0,2}(?:pain|headache|cough|fever|rash|nausea"
    r"|symptoms?))"
    r"|\bmy (?:chest|head|stomach|throat|back|knee|leg|arm|skin|symptoms?) (?:hurts?|aches?|has"
    r"|have|is|are|feels?)\b"
    r"|\bshould i (?:see|take|go|be worried|stop)|\bwhat (?:should|can) i (?:do|take)\b"
)
_PROMPT_LEAK = re.compile(
    r"真实诊断|病情资料|病例资料(?:显示|里|中)|(?:系统|提示词|设定)(?:提示|要求|里)|扮演|角色设定|作为患者|作为病人"
    r"|\btrue diagnosis|\bcase (?:file|notes?|description|records?)\b|\b(?:system prompt"
    r"|role[- ]?play\w*)\b|\bmy instructions\b|\bi(?:'m| am) (?:playing|pretending)\b"
)


@dataclass(frozen=True, kw_only=True)
class _Usual:
    """Turns of usual length, for the estimate of a dry run."""

    patient: Sequence[str]
    questions: Sequence[str]
    advice: str


_USUAL: Mapping[Language, _Usual] = {
    "zh": _Usual(
        patient=(
            "您好，我最近有点难受。",
            "大概三天了，吃过一次药。",
            "晚上重一些，没有治过。",
            "明白了，谢谢，再见。",
        ),
        questions=("请问疼痛是什么时候开始的？" * 2, "晚上会不会加重，以前治过没有？" * 2),
        advice="考虑{names}，建议先做检查，一周后复查。" * 8,
    ),
    "en": _Usual(
        patient=(
            "Hello doctor, I have not been feeling well lately.",
            "It started about three days ago. I took something for it once.",
            "It is worse at night, and nobody has treated it so far.",
            "I see, thank you very much. Goodbye!",
        ),
        questions=(
            "I am sorry to hear that. When did it start, and did anything bring it on?",
            "Is it worse at night? Have you been treated for something like it before?",
        ),
        advice="This may well be {names}. I recommend a few tests, and a visit in a week. " * 8,
    ),
}

TurnFault = tuple[str, str]
Said = Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class TeachingCase:
    """A case that a dialogue is made over.

    Attributes:
        case: description, diagnosis with its wordings, department.
        clinic: the clinic's own case, where it is one.
    """

    case: PatientCase
    clinic: ClinicCase | None = None


def read_teaching_cases(paths: Sequence[str]) -> list[TeachingCase]:
    """Reads cases of any form that the project's readers know.

    Raises:
        ValueError: a file cannot be read, or an id is used twice.
    """
    found: dict[str, TeachingCase] = {}
    for path in paths:
        for one in read_cases(path):
            if one.id in found:
                raise ValueError(f"{path}: the case {one.id!r} is there twice")
            diagnosis = one.doctor_diagnosis.strip()
            language: Language = "en" if checks.language(one.medical_case) == "en" else "zh"
            names = diagnoses_of(diagnosis)
            if not names and len(diagnosis) <= _LONGEST_NAME[language]:
                names = ((diagnosis,),)  # A name whose ending is not among the known ones.
            case = PatientCase(
                id=one.id,
                department=one.department or "",
                description=one.medical_case,
                diagnosis=one.doctor_diagnosis,
                diagnoses=names,
                language=language,
            )
            found[one.id] = TeachingCase(case=case)
    if not found:
        raise ValueError("cases: there are no cases")
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class TeachingCases:
    """A source of cases.

    Attributes:
        take: returns so many cases from a place on, or those that there are.
        identity: what the cases follow from.
        count: of all; None for no end.
        left_out: cases of the files that are in none of the languages.
    """

    take: Callable[[int, int], Sequence[TeachingCase]]
    identity: str
    count: int | None
    left_out: int = 0

    @staticmethod
    def of_files(paths: Sequence[str], *, languages: Sequence[str]) -> "TeachingCases":
        """Returns the cases of files that are in some languages; see `read_teaching_cases`."""
        every = read_teaching_cases(paths)
        cases = [one for one in every if one.case.language in languages]
        return TeachingCases(
            take=lambda first, count: cases[first : first + count],
            identity=sha256("\0".join(repr(one.case) for one in cases))[:16],
            count=len(cases),
            left_out=len(every) - len(cases),
        )

    @staticmethod
    def of_clinic(*, seed: int) -> "TeachingCases":
        """Returns cases of the clinic, whose truth is known; there is no end of them."""

        def take(first: int, count: int) -> list[TeachingCase]:
            found = []
            for one in written_cases(count, seed=seed, first=first + 1):
                own = ClinicCase.from_json(one.extra["case"])
                case = dataclasses.replace(clinic_case(own), description=one.medical_case)
                found.append(TeachingCase(case=case, clinic=own))
            return found

        return TeachingCases(take=take, identity=f"clinic, seed {seed}", count=None)


@dataclass(frozen=True, kw_only=True)
class ConversationMaker:
    """Makes distilled conversations, one over each case.

    Attributes:
        cases: in their order.
        max_exchanges: messages of the doctor, at most.
        attempts: requests for one turn, at most, where those that came were faulty; and dialogues
            over one case, where a turn of those before stayed faulty, or they ended without advice
            or the diagnosis.
        fixed: who says the same again after the same messages, and so is asked for a turn once.
        seed: part of the rows' ids.
        batch_size: dialogues that are taken together.
    """

    cases: TeachingCases
    max_exchanges: int = 8
    attempts: int = 3
    fixed: frozenset[Speaker] = frozenset()
    seed: int = 0
    batch_size: int = 64
    kind: str = field(default="distilled_conversation", init=False)

    @property
    def num_candidates(self) -> int | None:
        """One for each case."""
        return self.cases.count

    def settings(self) -> dict[str, Any]:
        """Prompts, cases and the turn cap."""
        return {
            "prompts": templates.digest("doctor"),
            "cases": self.cases.identity,
            "max_exchanges": self.max_exchanges,
            "attempts": self.attempts,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def batch(self, number: int, kept: Sequence[Candidate]) -> list[tuple[str, Job]]:
        """Returns the dialogues over the next cases."""
        first = number * self.batch_size
        cases = self.cases.take(first, self.batch_size)
        return jobs_of(cases, self._job, first=first, name=f"{self.kind}-{self.seed}")

    def assumed(self, request: Request) -> str:
        """Returns a turn of usual length; the doctor asks twice, then advises."""
        said = len(request.material["messages"])
        usual = _USUAL[request.material["language"]]
        if request.task == "doctor":
            names = ", ".join(request.material["names"])
            return usual.questions[said // 2] if said < 4 else usual.advice.format(names=names)
        return usual.patient[min(said // 2, len(usual.patient) - 1)]

    def _job(self, place: int, one: TeachingCase) -> Job:
        name = f"{self.seed}-{place}"
        settings = ConsultationSettings(max_exchanges=self.max_exchanges)
        for number in range(1, self.attempts + 1):
            state = ConsultationState(case=one.case, settings=settings)
            labels = {
                "department": one.case.department or "unknown",
                "language": one.case.language,
                "dialogues over its case": str(number),
            }
            try:
                while (speaker := state.speaker) is not None:
                    attempts = 1 if speaker in self.fixed else self.attempts
                    text = yield from _turn(speaker, name, number, one, state, attempts=attempts)
                    state = state.add(text)
                return [_finished(one, state, labels)]
            except Rejected as rejected:
                rejection = rejected.after(state.transcript, labels)
                spoke = {one.role for one in state.messages} | ({speaker} if speaker else set())
                # Begun anew, it would be the same, or begin with the same request.
                if spoke <= self.fixed or (rejected.final and not state.messages):
                    break
        return [rejection]


def _turn(
    speaker: Speaker,
    name: str,
    number: int,
    one: TeachingCase,
    state: ConsultationState,
    *,
    attempts: int,
) -> Generator[Step, list[Any], str]:
    """Asks for the next turn until one has no fault; raises Rejected if none has."""
    is_patient = speaker == "user"
    task: Literal["patient", "doctor"] = "patient" if is_patient else "doctor"
    fault_of = patient_fault if is_patient else doctor_fault
    request = Request(
        step=f"{number}-{task}-{len(state.messages):02d}",
        task=task,
        messages=state.patient_messages() if is_patient else doctor_messages(state),
        plain=state.doctor_messages(),
        material={
            "key": name,
            "case": one.clinic,
            "language": one.case.language,
            "names": _wordings(state),
            "messages": state.messages,
        },
    )

    def accept(_: int, reply: str) -> str:
        text = _OWN_NAME.sub("", reply).strip()
        fault = fault_of(text, state)
        if fault is not None:
            raise Rejected(fault[0], f"{task}: {fault[1]}", text)
        return text

    (text,) = yield from ask_again([request], accept, attempts=attempts)
    return text


def doctor_messages(state: ConsultationState) -> list[dict[str, str]]:
    """Returns the messages for the model that plays the doctor, who knows the diagnosis."""
    case = state.case
    values = {"case": case.description, "diagnosis": case.diagnosis}
    (prompt,) = templates.fill("doctor", case.language, values)
    return [{"role": "system", "content": prompt["content"]}, *state.doctor_messages()]


def patient_fault(text: str, state: ConsultationState) -> TurnFault | None:
    """Returns the reason why a patient's turn is faulty, and what was found; None if it is not."""
    fault = _common_fault(text, state, "user")
    if fault is not None:
        return fault
    if not state.messages:
        if len(text) > _FIRST_AT_MOST[state.case.language]:
            return "not vague", f"the first message has {len(text)} characters"
        if says_goodbye(text):
            return "early goodbye", text[-20:]
    as_doctor = speaks_as_doctor(text)
    if as_doctor is not None:
        return "role flip", f"{as_doctor[0]}: {as_doctor[1]}"
    whole = (*state.messages, Message("user", text))
    for found in find_faults(whole, diagnoses=state.case.to_be_found, rules=state.settings.rules):
        if found.kind == "leak" and found.turn == len(whole) - 1:
            return "diagnosis leak", found.evidence
    if says_goodbye(text) and state.messages and not _concluded(state):
        return "early goodbye", text[-20:]
    return None


def doctor_fault(text: str, state: ConsultationState) -> TurnFault | None:
    """Returns the reason why a doctor's turn is faulty, and what was found; None if it is not."""
    fault = _common_fault(text, state, "assistant")
    if fault is not None:
        return fault
    as_patient = _AS_PATIENT.search(plain(text))
    if as_patient is not None:
        return "role flip", as_patient.group()
    leak = _PROMPT_LEAK.search(plain(text))
    if leak is not None:
        return "prompt leak", leak.group()
    wordings = _wordings(state)
    if names_one(text, wordings) and not _has_asked(state.messages):
        return "diagnosis leak", mentions(text, wordings) or ""
    return None


def _common_fault(text: str, state: ConsultationState, speaker: str) -> TurnFault | None:
    if is_empty(text):
        return "empty reply", ""
    refused = checks.refusal(text)
    if refused is not None:
        return "refusal", refused
    if checks.switches_language(text, state.case.language):
        return "language", str(checks.language(text))
    if _ANOTHER_NAME.search(text):
        return "role flip", "writes the other's turn, too"
    if state.messages and checks.echoes(text, state.messages[-1].content):
        return "echo", "repeats the other's last message"
    own = [one.content for one in state.messages if one.role == speaker]
    if own and checks.echoes(text, own[-1]):
        return "echo", "repeats the own last message"
    role: Literal["user", "assistant"] = "user" if speaker == "user" else "assistant"
    if in_a_loop((*state.messages, Message(role, text)), state.settings.rules):
        return "loop", "goes round in circles"
    return None


def _has_asked(messages: Said) -> bool:
    """Returns True if the doctor asked something in an earlier message."""
    answers = (one.content for one in messages if one.role == "assistant")
    return any(questions_before_concluding([one])[0] for one in answers)


def _finished(one: TeachingCase, state: ConsultationState, labels: Mapping[str, str]) -> Candidate:
    """Returns the row of a dialogue that is over, without a last message of the patient.

    Raises:
        Rejected: the doctor gave neither judgement nor advice, or never named the diagnosis.
    """
    if not _concluded(state):
        raise Rejected("no conclusion", f"ended by {state.end}")
    wordings, answers = _wordings(state), _answers(state)
    if wordings and not any(names_one(text, wordings) for text in answers):
        raise Rejected("diagnosis never named", ", ".join(wordings))
    messages = state.messages
    if messages[-1].role == "user":
        messages = messages[:-1]
    return Candidate(
        messages=messages,
        prompt="\n".join(one.content for one in messages if one.role == "user"),
        labels={**labels, "ended by": str(state.end), "exchanges": str(state.exchanges)},
        extra={
            "diagnosis": state.case.diagnosis,
            "case_id": one.case.id,
            "questions": questions_before_concluding(answers)[0],
        },
    )


def _answers(state: ConsultationState) -> list[str]:
    return [one.content for one in state.messages if one.role == "assistant"]


def _wordings(state: ConsultationState) -> list[str]:
    """All names of the diagnoses that the patient does not know."""
    return [name for names in state.case.to_be_found for name in names]


def _concluded(state: ConsultationState) -> bool:
    """Returns True if the doctor gave a judgement or advice, or named the diagnosis."""
    answers, wordings = _answers(state), _wordings(state)
    named = any(names_one(text, wordings) for text in answers)
    return named or questions_before_concluding(answers)[1]
