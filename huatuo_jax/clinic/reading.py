"""Reads what patients and doctors write: terms of the tables, and the stance towards each.

It does not look for the sentences of the grammar but for terms, longest first, and for the cues
around each ("不是", "可以排除", "要排除", "可能", "不能用", "如果"), so that answers of any model
can be read. Full width and half width, and capitals, make no difference.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.symptoms import ADVICE, CONDITIONS, DEPARTMENTS, DRUGS, SYMPTOMS, TESTS
from huatuo_jax.clinic.world import Observation
from huatuo_jax.data.records import Message

TERMS: dict[str, dict[str, tuple[str, ...]]] = {
    "disease": {name: row.words for name, row in DISEASES.items()},
    "symptom": {name: row.words for name, row in SYMPTOMS.items()},
    "test": TESTS,
    "department": DEPARTMENTS,
    "advice": ADVICE,
    "drug": {name: row.words for name, row in DRUGS.items()},
    "condition": CONDITIONS,
}
EMERGENCY_CALL = (
    r"急诊|120|急救|(?:马上|立刻|立即|赶紧|赶快|现在就)[^,。;!?]{0,6}(?:医院|就医|就诊|看医生)"
)

_SENTENCE = re.compile(r"[^。!?;…~\n]*[。!?;…~]*\n?")
_ITEM = re.compile(r"^\s*(?:[-*•·]|\(?\d{1,2}[.、)])\s*")
_MASK = "\x00"

_IF = re.compile(r"如果|假如|要是|一旦|倘若|万一|若|如有|如出现|出现[^,]{0,20}(?:时|的话|后)")
# Before a disease, the last of these in its clause decides the stance.
_BEFORE_DISEASE = (
    (
        "hedged",
        "不排除|不能排除|没有排除|难以排除|可能|可能是|可能为|怀疑是|大概是|也许是|也许|或许|怀疑|大概|估计|疑似|倾向|像是|像",
    ),
    ("other", "要排除|需排除|需要排除|应排除|先排除|以排除|为了排除|鉴别|区别|筛查"),
    (
        "denied",
        "可以排除|不是|并非|不像|不太像|不大像|不考虑|不会是|排除|没有|没得|不属于|不支持|未见|不符合|不至于"
        "|不可能是|不太可能是|不大可能是|不怀疑|不一定是|不可能|不太可能|不大可能",
    ),
    ("past", "病史|得过|患过|以前有|曾|有过"),
    ("other", "预防|避免|防止|以免|引发|导致|并发|发展成|变成|转为|诱发|区分"),
    ("claimed", "而是|考虑|应该是|就是|这是|诊断|得了|属于|是|符合|多见于|有关"),
)
_AFTER_DISEASE = (
    (
        "denied",
        "可能性不大|可能性都不大|可能性也不大|可能性并不大|可能性很小|可能性都很小|可能性小|可能性都小"
        "|可能性较小|可能性比较小|可能性低|可能性很低|可能不大|不太可能|不大可能|不可能"
        "|不像|可以排除|已排除|已经排除|排除了|可排除|除外|不支持|不符合|不考虑",
    ),
    ("hedged", "待排|不排除|不能排除|不除外|可能性大|可能性较大|可能性很大|可能大|可能"),
    ("past", "病史|史"),
    ("other", "鉴别|区别|区分"),
)
_SECONDARY = re.compile(r"其次|也可能|也要考虑|也不排除|不排除|不能排除|也像|少数|另外考虑")
_BEFORE_ORDER = (
    (
        "denied",
        "不能|不要|别|不可以|不可|禁用|禁止|禁忌|避免|停用|停掉|慎用|不宜|不建议|不推荐|不应|不该"
        "|不用|不必|无需|不需要|没必要|勿|不做|不吃|不适合|不考虑",
    ),
    ("claimed", "可以|可用|改用|换成|换用|建议|推荐|选用|需要|特别|别的|分别"),
)
_AFTER_ORDER = (
    (
        "denied",
        "不能|禁用|慎用|不宜|不要|别|不可|不适合|不合适|不建议|不推荐|不用|不必|没必要|不需要|停",
    ),
)
_ASKS = re.compile(
    r"(?:^|,)(?:请问|那|那么|您|你|另外)*(?:有没有|是不是|有无|会不会)|(?:吗|呢|没有|多久了?|多长时间了?|几天了?|几岁了?|多大(?:年纪|岁数)?了?"
    r"|什么时候开始的?|哪里不舒服|怎么不舒服)$"
)
_POLITE = re.compile(
    r"有(?:什么|任何|其他|别的|其它)*.{0,4}(?:问题|疑问|需要|帮)|(?:明白|清楚|懂|好|可以|行)了?吗"
    r"|能帮"
)
_ASKED = {
    "duration": r"多久|几天|多长时间|什么时候|何时",
    "age": r"多大|几岁|年龄|年纪|岁数",
    "sex": r"男的|女的|性别|男还是女",
    "conditions": r"过敏|怀孕|别的病|其他病|其它病|病史|慢性病|什么药|胃出血|肾功能|肝功能",
    "more": r"还有(?:什么|哪些|别的|其他)|别的症状|哪里不舒服|怎么不舒服|什么症状|哪些症状|具体说",
}
_DENIAL = re.compile(r"没有|没|不|无|未")
_DURATION = re.compile(r"(\d+|半|[一二两三四五六七八九十]+)个?多?(小时|天|日|周|星期|礼拜|月|年)")
_AGE = re.compile(r"(\d{1,3})\s*岁")
_SEX = re.compile(r"[男女]")


@dataclass(frozen=True)
class Mention:
    """A term of the tables in a text.

    Attributes:
        kind: a key of `TERMS`.
        name: the table's name.
        start: its first character in the sentence.
        end: the character after its last.
        stance: "claimed", "hedged", "denied", "past", or "other" (in a condition, a cause, a
            difference, or to be ruled out).
        secondary: named after a better one ("其次", "也可能").
    """

    kind: str
    name: str
    start: int
    end: int
    stance: str = "claimed"
    secondary: bool = False


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the terms in it.

    Attributes:
        text: normalised, without the number of a list item, with its mark at the end.
        mentions: in the order of the text.
        question: asks the patient something, more than an offer to answer questions.
    """

    text: str
    mentions: tuple[Mention, ...]
    question: bool

    def names(self, kind: str) -> tuple[str, ...]:
        """Returns the names of this kind, in the order of the text."""
        return tuple(mention.name for mention in self.mentions if mention.kind == kind)


def normal(text: str) -> str:
    """Returns the text in half width and lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def read(text: str) -> tuple[Sentence, ...]:
    """Reads a doctor's text into sentences, each with its terms and their stances."""
    return tuple(_read_sentence(sentence) for sentence in sentences(text))


def sentences(text: str) -> Iterator[str]:
    """Yields the normalised, non-empty sentences of a text, without item numbers and blanks."""
    for match in _SENTENCE.finditer(normal(text)):
        sentence = _ITEM.sub("", match.group()).strip()
        if sentence:
            yield sentence


def find_terms(text: str) -> tuple[Mention, ...]:
    """Finds the terms in a normalised text, longest first, without overlaps."""
    pattern, names = _lexicon()
    return tuple(
        Mention(*names[match.group()], match.start(), match.end())
        for match in pattern.finditer(text)
    )


def calls_emergency(text: str) -> bool:
    """Returns True if a doctor's text sends the patient to emergency care now."""
    for sentence in sentences(text):
        for match in re.finditer(EMERGENCY_CALL, sentence):
            before = sentence[: match.start()]
            clause = re.split(",", before)[-1]
            if not _IF.search(before) and not re.search(r"不用|不必|无需|不需要|没必要|别", clause):
                return True
    return False


@dataclass(frozen=True)
class Asked:
    """The questions of a doctor's text.

    Attributes:
        symptoms: names, in the order of the text.
        topics: keys of duration, age, sex, conditions, more.
        anything: there is a question, whether or not it was understood.
    """

    symptoms: tuple[str, ...]
    topics: frozenset[str]
    anything: bool


def asked(text: str) -> Asked:
    """Reads the questions of a doctor's text."""
    questions = [sentence for sentence in read(text) if sentence.question]
    symptoms = [name for sentence in questions for name in sentence.names("symptom")]
    topics = {
        topic
        for topic, pattern in _ASKED.items()
        for sentence in questions
        if re.search(pattern, _masked(sentence.text, _symptoms_of(sentence)))
    }
    return Asked(tuple(dict.fromkeys(symptoms)), frozenset(topics), bool(questions))


def heard(messages: Iterable[Message | tuple[str, str]]) -> Observation:
    """Reads what a patient has told in a dialogue.

    Args:
        messages: role and text of each; texts of the patient have the role "user".
    """
    return _heard(tuple((message[0], message[1]) for message in messages))


@functools.lru_cache(maxsize=20_000)
def _heard(messages: tuple[tuple[str, str], ...]) -> Observation:
    found = Observation()
    questions = Asked((), frozenset(), False)
    for role, text in messages:
        if role == "assistant":
            questions = asked(text)
        elif role == "user":
            found = _hear(found, text, questions)
    return found


def _hear(before: Observation, text: str, questions: Asked) -> Observation:
    found = before
    plain = normal(text)
    mentions = find_terms(plain)
    told = [mention for mention in mentions if mention.kind == "symptom"]
    for clause_start, clause_end in _clauses(plain):
        here = [m for m in told if clause_start <= m.start < clause_end]
        masked = _masked(plain, mentions)[clause_start:clause_end]
        denies = _DENIAL.search(masked) is not None
        for mention in here:
            found = _with_symptom(found, mention.name, denies, questions)
        for mention in mentions:
            if mention.kind == "condition" and clause_start <= mention.start < clause_end:
                if not denies:
                    found = replace(found, conditions=found.conditions | {mention.name})
    rest = _masked(plain, told)
    age, sex, lasts = _AGE.search(rest), _SEX.search(rest), _DURATION.search(rest)
    if age and found.age is None:
        found = replace(found, age=int(age.group(1)))
    if "孩子" in plain or found.child is None:
        # A parent mentions the child at once.
        found = replace(found, child="孩子" in plain)
    if sex and found.sex is None:
        found = replace(found, sex=sex.group())
    if lasts and found.lasts is None:
        found = replace(found, lasts=_lasts(lasts.group(1), lasts.group(2), lasts.group()))
    return found


def _with_symptom(found: Observation, name: str, denies: bool, questions: Asked) -> Observation:
    if name in found.known:
        return found
    if denies:
        return replace(found, denied=found.denied | {name})
    if name in questions.symptoms:
        return replace(found, confirmed=found.confirmed | {name})
    if found.opening is None:
        return replace(found, opening=name)
    return replace(found, volunteered=found.volunteered | {name})


def _lasts(count: str, unit: str, whole: str) -> str:
    if unit == "小时":
        return "hours"
    if unit in ("天", "日"):
        return "weeks" if count.isdigit() and int(count) >= 7 else "days"
    if unit in ("周", "星期", "礼拜") or whole.startswith("半个月"):
        return "weeks"
    return "months"


def _clauses(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match in re.finditer(r"[,。!?;\n]", text):
        yield start, match.end()
        start = match.end()
    yield start, len(text)


def _symptoms_of(sentence: Sentence) -> tuple[Mention, ...]:
    return tuple(mention for mention in sentence.mentions if mention.kind == "symptom")


def _masked(text: str, mentions: Sequence[Mention]) -> str:
    for mention in mentions:
        length = mention.end - mention.start
        text = text[: mention.start] + _MASK * length + text[mention.end :]
    return text


@functools.cache
def _lexicon() -> tuple[re.Pattern[str], Mapping[str, tuple[str, str]]]:
    names = {
        normal(word): (kind, name)
        for kind, table in TERMS.items()
        for name, words in table.items()
        for word in words
    }
    longest_first = sorted(names, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first))), names


def _read_sentence(text: str) -> Sentence:
    mentions = find_terms(text)
    masked = _masked(text, mentions)
    bare = text.rstrip("。!?;…~ \n")
    asks = "?" in text[len(bare) :] or _ASKS.search(bare) is not None
    offer = _POLITE.search(bare)
    # The part before an offer ("做个胃镜，好吗？") is a statement, not a question.
    asked_from = 0 if asks else len(text)
    if asks and offer:
        asked_from = bare.rfind(",", 0, offer.start()) + 1
    read_mentions = tuple(
        _read_mention(masked, mention, mention.start >= asked_from) for mention in mentions
    )
    return Sentence(text, read_mentions, asks and not offer)


def _read_mention(masked: str, mention: Mention, question: bool) -> Mention:
    """Returns the mention with its stance; terms are masked, so that only cues are read."""
    start = masked.rfind(",", 0, mention.start) + 1
    end = masked.find(",", mention.end)
    before = masked[start : mention.start]
    after = masked[mention.end : len(masked) if end < 0 else end]
    if mention.kind == "disease":
        if question or _IF.search(masked[: mention.start]):
            return replace(mention, stance="other")
        stance = _cue(before, _BEFORE_DISEASE, last=True) or "claimed"
        later = _cue(after, _AFTER_DISEASE, last=False)
        if later is not None and not (stance in ("denied", "other") or _claims_again(after)):
            stance = later
        return replace(mention, stance=stance, secondary=_SECONDARY.search(before) is not None)
    if mention.kind in ("drug", "test", "department", "advice"):
        if question:
            return replace(mention, stance="other")
        stance = _cue(before, _BEFORE_ORDER, last=True) or "claimed"
        if stance == "claimed" and mention.kind != "advice":
            stance = _cue(_up_to_next_term(after), _AFTER_ORDER, last=False) or stance
        return replace(mention, stance=stance)
    return mention


def _claims_again(after: str) -> bool:
    """Returns True if the clause turns to another disease before its cue ("肺炎而不像感冒")."""
    return re.search(r"而不|而非|而是|但", after) is not None


def _up_to_next_term(after: str) -> str:
    return after.split(_MASK, 1)[0]


def _cue(text: str, cues: Sequence[tuple[str, str]], *, last: bool) -> str | None:
    """Returns the stance of the first or last cue in a text; of overlapping cues the longest."""
    pattern, stances = _cue_pattern(tuple(cues))
    matches = [match.group() for match in pattern.finditer(text)]
    if not matches:
        return None
    return stances[matches[-1 if last else 0]]


@functools.cache
def _cue_pattern(cues: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], Mapping[str, str]]:
    stances = {word: stance for stance, words in reversed(cues) for word in words.split("|")}
    longest_first = sorted(stances, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first))), stances
