"""Finds what spoils a consultation with a simulated patient: role flips, leaked diagnoses, loops.

A language model that plays the patient may begin to advise, prescribe and ask like the doctor, may
name the diagnosis before the doctor does, or may say the same again and again. The rules are
patterns of Chinese and English consultations and similarities of turns; they need no model.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rapidfuzz.distance import Indel

from huatuo_jax.data.records import Message, is_empty

FaultKind = Literal["role_flip", "leak", "loop", "empty"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)

_SYMPTOMS = (
    "发热|发烧|咳嗽|咳痰|恶心|呕吐|腹泻|便血|头晕|头痛|胸闷|心慌|气短|疼痛|出血|过敏史|过敏|其他(?:的)?(?:症状|不适)"
    "|别的(?:症状|不适)|伴随症状|家族史|病史|慢性病|高血压|糖尿病|吸烟|抽烟|喝酒|饮酒"
)
_START = r"(?:^|[,。;!?:\s])"
# What a doctor says to a patient and a patient says to nobody. Patients, too, write 您, 建议 and
# 祝您: "谢谢您的建议", "医生建议我", "祝您工作顺利".
_DOCTOR = (
    ("advice", r"(?:建议|推荐|提醒|奉劝)[您你](?!们|我)"),
    (
        "advice",
        rf"{_START}我?建议(?:先|尽快|及时|立即|尽早|适当|可以)*"
        r"(?:去|到|做|服用|口服|进行|使用|检查|复查|就诊|就医|多|少|避免|住院|手术|外用|挂)",
    ),
    (
        "advice",
        r"[您你](?:需要|应该|应当|可以|最好|必须|务必|不要|不用)(?:先|尽快|及时|立即|适当|多|少|再)*"
        r"(?:去|做|进行|注意|服用|口服|吃|喝|到医院|前往|就医|就诊|避免|保持|休息|使用|尝试|考虑|接受|按时"
        r"|检查|涂|担心)",
    ),
    (
        "advice",
        r"请[您你]?(?:尽快|及时|立即|务必|按时|遵医嘱|遵循|注意|避免|不要|放心|保持)",
    ),
    (
        "prescription",
        r"(?:口服|服用|外用|每次)[^。;!?\s]{0,16}(?:每日|每天|一日|一天)[一二两三四1-4](?:次|片|粒)",
    ),
    (
        "prescription",
        r"我(?:会|来|先|可以|将|这就)*[给为帮][您你](?:开|检查|诊断|看看|分析|解答|安排)",
    ),
    ("diagnosis", r"[您你]这?(?:可能|应该|很可能|大概)?是?(?:患有|患了|得了|得的是|患的是)"),
    (
        "diagnosis",
        r"根据[您你](?:的|所|提供的|描述的|目前的)*(?:描述|症状|情况|病情|叙述|检查|年龄|提供)",
    ),
    (
        "diagnosis",
        r"(?<![给把])[您你]的(?:症状|病情|身体|疼痛|血压|血糖|检查结果|描述|叙述|皮肤|年龄|病史|体温|不适|主诉)",
    ),
    (
        "question",
        rf"[您你](?:最近|平时|以前|之前|现在|目前|还|的)*(?:有没有|是否|有无)"
        rf"(?:有|出现|伴有|伴随|感到|感觉|觉得|做过|服用过|吃过)?.{{0,4}}(?:{_SYMPTOMS})",
    ),
    (
        "question",
        rf"{_START}(?:那|请问|另外|平时|最近)*(?:还)?(?:有没有|有无|是否有|是否伴有|是否出现)过?.{{0,2}}"
        rf"(?:{_SYMPTOMS})[^,。]{{0,6}}\?",
    ),
    (
        "question",
        r"[您你][^,。]{0,8}(?:多大年龄|多大岁数|多大了|几岁了|多久了|几天了|什么时候开始)"
        r"|(?:疼|痛|咳|烧|症状|病)[^,。]{0,4}(?:多久了|几天了|多长时间了)\?|什么时候开始的\?",
    ),
    ("courtesy", r"祝(?:愿)?[您你]?[^,。]{0,6}(?:康复|恢复健康)"),
    (
        "courtesy",
        r"[如若]果?[您你]?(?!我)还?有.{0,4}(?:其他|任何|别的|什么|疑问|问题|需要).{0,14}(?:随时|欢迎|请)"
        r"(?:再|随时)?.{0,6}(?:咨询我|提问|联系我|问我|告诉我|向我|告知|与我)",
    ),
    ("courtesy", r"(?:随时|欢迎)都?(?:可以)?再?(?:向我|问我|找我|联系我|提问)"),
    ("courtesy", r"不(?:用|必)?客气|不用谢"),
    (
        "identity",
        r"我(?:是|作为)(?:一名|一位|一个|[您你]的)?(?:专业的?|主治|智能|线上)*"
        r"(?:医生|大夫|医师|ai|人工智能|语言模型|助手|助理)(?!的)",
    ),
)
_ENGLISH_SYMPTOMS = (
    "symptoms?|fevers?|chills|cough|nausea|vomiting|diarrhea|dizziness|headaches?|pain|shortness of"
    "|bleeding|swelling|numbness|rash|allerg|medical (?:history|conditions?)|family history"
    "|medications?|smoke|drink alcohol"
)
_ENGLISH_DOCTOR = (
    ("advice", r"\bi(?:'d| would| do| strongly)? (?:recommend|advise|suggest|urge)\b"),
    (
        "advice",
        r"(?<!do )(?<!would )(?<!think )\byou (?:should|need to|must|ought to|(?:may|might) want to"
        r"|(?:can|could) try)(?: \w+){0,2}? (?:see|take|get|go|avoid|rest|drink|eat|stop|start"
        r"|schedule|make|try|keep|use|apply|consult|visit|call|monitor)\b",
    ),
    (
        "prescription",
        r"\b(?:take|apply|use)\b[^.;!?\n]{0,30}\b(?:once|twice|times) (?:a |per |each |every )?"
        r"da(?:y|ily)\b",
    ),
    (
        "prescription",
        r"\bi(?:'ll| will|'m going to| am going to|'d like to| would like to) "
        r"(?:prescribe|order|refer you|examine you|run some tests|write you)",
    ),
    (
        "diagnosis",
        r"\byou (?:probably|likely|most likely|may|might|could|appear to|seem to) "
        r"(?:have|be (?:suffering|experiencing))\b",
    ),
    (
        "diagnosis",
        r"\byour (?:symptoms?|condition|pain|blood pressure|test results|medical history|fever"
        r"|cough|rash|description)\b",
    ),
    (
        "question",
        r"\b(?:do you have|are you (?:having|experiencing|taking|allergic)|did you (?:notice|have)"
        r"|have you (?:ever )?(?:had|noticed|experienced|been)|do you)\b[^.?!]{0,30}"
        rf"\b(?:{_ENGLISH_SYMPTOMS})",
    ),
    (
        "question",
        r"\bhow long have you (?:had|been (?:having|feeling|experiencing|taking|coughing))"
        r"|\bhow old are you|\bwhen did (?:it|this|the \w+|your \w+|these symptoms) (?:start|begin)"
        r"|\bon a scale (?:of|from)",
    ),
    (
        "courtesy",
        r"\bget well soon|\bwish(?:ing)? you a (?:speedy|quick|full)|\bhope you (?:feel|get) better"
        r"|\byou(?:'re| are) (?:very |most )?welcome\b|\bfeel free to\b"
        r"|\b(?:don't|do not) hesitate to\b|\blet me know if you (?:have|need)"
        r"|\bhow (?:can|may) i help you|\bwhat brings you",
    ),
    (
        "identity",
        r"\bi(?:'m| am) (?:a|an|your) (?:\w+ )?(?:doctor|physician|ai)\b(?!')"
        r"|\bas your (?:doctor|physician)",
    ),
)
_DOCTOR_PATTERNS = tuple(
    (name, re.compile(pattern)) for name, pattern in (*_DOCTOR, *_ENGLISH_DOCTOR)
)
# In the same sentence before a prescription: the patient tells of what was taken or ordered.
_TOLD = re.compile(
    r"我|医生|大夫|一直|已经|吃了|在吃|\b(?:i|i'm|i've|me|my|we|he|she|they|was|been|to)\b"
)
_SENTENCE_END = re.compile(r"[。;!?\n]|\.(?=\s)")
_SILENT = re.compile(r"[\W_]+")
_EVIDENCE_CHARACTERS = 30
# A shorter turn ("好的", "no, nothing else") is said again in any consultation.
_TELLING_CHARACTERS = 8
_LETTERS_A_CHARACTER = 3  # A Chinese character tells as much as so many Latin letters.


@dataclass(frozen=True, kw_only=True)
class FaultRules:
    """The rule by which turns count as a loop.

    Attributes:
        similarity: from which on two turns are the same, by characters: 1 less insertions and
            deletions over both lengths, without marks and white space.
        repeats: so many turns of one speaker in a row, each a repetition of an earlier one, are a
            loop.
    """

    similarity: float = 0.9
    repeats: int = 2

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not 0.0 < self.similarity <= 1.0:
            raise ValueError(f"similarity is {self.similarity}; it should be above 0, at most 1")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; it should be at least 1")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault and where it is first seen.

    Attributes:
        kind: what is wrong. "leak" and "role_flip" are the patient's; a loop or an empty turn may
            be the doctor's.
        speaker: whose turn it is, "user" for the patient.
        turn: place of the message in the conversation, from 0 on.
        evidence: what was matched.
    """

    kind: FaultKind
    speaker: str
    turn: int
    evidence: str


def plain(text: str) -> str:
    """The text in NFKC, small letters and straight apostrophes, as the patterns are written."""
    return unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")


def find_faults(
    messages: Sequence[Message],
    *,
    diagnoses: Sequence[Collection[str]] = (),
    rules: FaultRules | None = None,
) -> tuple[Fault, ...]:
    """The faults of a consultation, the first of each kind and speaker, in the order of turns.

    Args:
        messages: the patient's have the role "user", the doctor's "assistant".
        diagnoses: that the patient does not know, each in all its wordings.
        rules: of loops.
    """
    rules = rules or FaultRules()
    found = [
        *_empty_turns(messages),
        *_role_flips(messages),
        *_leaks(messages, diagnoses),
        *_loops(messages, rules),
    ]
    first: dict[tuple[str, str], Fault] = {}
    for fault in sorted(found, key=lambda fault: fault.turn):
        first.setdefault((fault.kind, fault.speaker), fault)
    return tuple(first.values())


def in_a_loop(messages: Sequence[Message], rules: FaultRules) -> bool:
    """Returns True if the last message completes a loop."""
    return any(fault.turn == len(messages) - 1 for fault in _loops(messages, rules))


def speaks_as_doctor(text: str) -> tuple[str, str] | None:
    """Returns kind and text of what only a doctor says; None where a patient's text has none."""
    normal = plain(text)
    for name, pattern in _DOCTOR_PATTERNS:
        for match in pattern.finditer(normal):
            before = _SENTENCE_END.split(normal[: match.start()])[-1]
            if name == "prescription" and _TOLD.search(before):
                continue
            return name, match.group().strip()[:_EVIDENCE_CHARACTERS]
    return None


def tells_enough(text: str) -> bool:
    """Returns True if a turn is so long that it is not said again by chance."""
    letters = sum(one.isascii() for one in text)
    return len(text) - letters + letters / _LETTERS_A_CHARACTER >= _TELLING_CHARACTERS


def mentions(text: str, names: Collection[str]) -> str | None:
    """The first of the names that stands in a text."""
    normal = plain(text)
    return next((name for name in names if any(places_of(name, normal))), None)


def places_of(name: str, text: str) -> Iterator[re.Match[str]]:
    """Finds a name in a text that is `plain`; a Latin one as whole words, or in the plural."""
    wanted = plain(name)
    before = r"(?<![a-z0-9])" if re.match("[a-z0-9]", wanted) else ""
    after = r"(?:e?s)?(?![a-z0-9])" if re.search("[a-z0-9]$", wanted) else ""
    return re.finditer(before + re.escape(wanted) + after, text)


def _empty_turns(messages: Sequence[Message]) -> Iterator[Fault]:
    for turn, message in enumerate(messages):
        if is_empty(message.content):
            yield Fault(kind="empty", speaker=message.role, turn=turn, evidence="")


def _role_flips(messages: Sequence[Message]) -> Iterator[Fault]:
    for turn, message in enumerate(messages):
        if message.role == "user" and (found := speaks_as_doctor(message.content)) is not None:
            kind, text = found
            yield Fault(kind="role_flip", speaker="user", turn=turn, evidence=f"{kind}: {text}")


def _leaks(messages: Sequence[Message], diagnoses: Sequence[Collection[str]]) -> Iterator[Fault]:
    """Diagnoses that the patient names before the doctor does."""
    unnamed = list(diagnoses)
    for turn, message in enumerate(messages):
        said = [names for names in unnamed if mentions(message.content, names) is not None]
        if message.role == "user" and said:
            evidence = mentions(message.content, said[0])
            yield Fault(kind="leak", speaker="user", turn=turn, evidence=evidence or "")
        unnamed = [names for names in unnamed if names not in said]


def _loops(messages: Sequence[Message], rules: FaultRules) -> Iterator[Fault]:
    """The turn that makes the loop: the last of so many repetitions of one speaker in a row."""
    texts = [_SILENT.sub("", plain(message.content)) for message in messages]
    for speaker in ("user", "assistant"):
        turns = [turn for turn, message in enumerate(messages) if message.role == speaker]
        in_a_row = 0
        for place, turn in enumerate(turns):
            before = turns[:place]
            in_a_row = in_a_row + 1 if _repeats(texts, turn, before, rules.similarity) else 0
            if in_a_row == rules.repeats:
                evidence = messages[turn].content.strip()[:_EVIDENCE_CHARACTERS]
                yield Fault(kind="loop", speaker=speaker, turn=turn, evidence=evidence)


def _repeats(texts: Sequence[str], turn: int, before: Sequence[int], similarity: float) -> bool:
    """Returns True if a turn says what the same speaker has said before.

    A short one does so only where it also follows the same turn of the other speaker: "没有" may be
    the answer to many questions, and "谢谢" after "不客气" once more to none.
    """
    if tells_enough(texts[turn]):
        return any(_same(texts[turn], texts[other], similarity) for other in before)
    return any(
        other > 0
        and _same(texts[turn], texts[other], similarity)
        and _same(texts[turn - 1], texts[other - 1], similarity)
        for other in before
    )


def _same(one: str, other: str, similarity: float) -> bool:
    return bool(Indel.normalized_similarity(one, other) >= similarity)
