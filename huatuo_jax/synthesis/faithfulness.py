"""Compares a polished text with the original: numbers, drugs, negations and diagnoses.

A language model that polishes a doctor's words may drop a dose, swap a drug or reverse advice. The
check compares what rules can read in both texts: numbers with their units (Chinese and Arabic
ones alike), names of drugs and diseases, and whether a clause is negated. What the original
has must be there, doses in their order, and no number, drug or disease may be new. It reads
Chinese, and of English the numbers, drugs and negations. Two drugs that change places are not seen.
"""

import functools
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rapidfuzz import fuzz

DriftKind = Literal[
    "number lost",
    "number added",
    "number moved",
    "drug lost",
    "drug added",
    "negation lost",
    "negation added",
    "diagnosis lost",
    "diagnosis added",
]


class Drift(NamedTuple):
    """A difference in content, and what differs."""

    kind: DriftKind
    detail: str


class Quantity(NamedTuple):
    """A number and its unit, empty where it has none that is known."""

    value: float
    unit: str

    def __str__(self) -> str:
        """Returns both as text."""
        return f"{self.value:g}{self.unit}"


def differences(original: str, polished: str) -> list[Drift]:
    """Returns what the polished text lost or added; none where it is faithful."""
    one, other = _plain(original), _plain(polished)
    return [
        *_number_drifts(one, other),
        *_drug_drifts(one, other),
        *_diagnosis_drifts(one, other),
        *_negation_drifts(one, other),
    ]


# Numbers.

_UNITS = {
    "mg": "mg|毫克",
    "g": "g|克",
    "ug": "ug|μg|µg|mcg|微克",
    "kg": "kg|千克|公斤",
    "斤": "斤",
    "ml": "ml|毫升",
    "l": "l|升",
    "单位": "万单位|单位|iu|u",
    "mmol": "mmol/l|mmol|毫摩尔",
    "umol": "umol/l|μmol/l|umol",
    "mmhg": "mmhg|毫米汞柱",
    "cm": "cm|厘米|公分",
    "mm": "mm|毫米",
    "米": "米",
    "%": "%|％",
    "度": "摄氏度|℃|°c|度",
    "片": "片|tablets?|pills?",
    "粒": "粒|颗|capsules?",
    "支": "支",
    "瓶": "瓶",
    "袋": "袋|包",
    "丸": "丸",
    "滴": "滴|drops?",
    "勺": "勺|匙",
    "杯": "杯",
    "针": "针|剂",
    "副": "副|付",
    "次": "次|遍|times?",
    "顿": "顿|餐",
    "天": "天|日|days?",
    "周": "周|星期|礼拜|weeks?",
    "月": "个月|月|months?",
    "年": "年|years?",
    "岁": "周岁|岁",
    "小时": "个小时|小时|钟头|h|hours?",
    "分钟": "分钟|分|minutes?",
    "秒": "秒|seconds?",
    "点": "点钟|点",
    "级": "级",
    "期": "期",
    "倍": "倍",
    "个": "个",
}
_DOSES = frozenset("mg g ug ml 单位 片 粒 支 瓶 袋 丸 滴 勺 针 副".split())
_UNIT = "|".join(
    f"(?P<u{place}>{words})(?![a-z])" if re.search("[a-z]", words) else f"(?P<u{place}>{words})"
    for place, words in enumerate(_UNITS.values())
)
_UNIT_NAMES = tuple(_UNITS)
_CHINESE_VALUE = dict(
    zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True)
)
_DIGITS = r"\d+(?:\.\d+)?"
_HAN_NUMBER = "[零〇一二两三四五六七八九十百半]+"
_QUANTITY = re.compile(
    rf"(?P<low>{_DIGITS}|{_HAN_NUMBER})\s*(?:(?:-|~|—|至|到|或)\s*(?P<high>{_DIGITS}|{_HAN_NUMBER})\s*)?"
    rf"(?:{_UNIT})"
)
_BARE = re.compile(rf"(?<![\d.a-z]){_DIGITS}(?![\d.]*[a-z]*\d)")
# Marks of a list, which a polished text may number.
_LIST_MARK = re.compile(r"(?:^|(?<=[\n。;:!?]))(?:\s*[(]?\d{1,2}(?:[.、)](?!\d)|\s*、))+")
_ORDINAL = re.compile(
    rf"第\s*(?:{_DIGITS}|{_HAN_NUMBER})\s*(?:个|点|次|步|天|周|期|级|位|种|针|代|类)?"
)
_ENGLISH_NUMBERS = {
    name: str(value)
    for value, name in enumerate(
        "one two three four five six seven eight nine ten".split(), start=1
    )
}
_ENGLISH = re.compile(
    rf"\b({'|'.join(_ENGLISH_NUMBERS)})\b(?=[ -](?:{_UNITS['片']}|{_UNITS['粒']}"
    r"|drops?|times?|days?|weeks?|months?|years?|hours?|minutes?))"
)
_LATIN_TIMES = (("qd", 1), ("bid", 2), ("tid", 3), ("qid", 4), ("twice", 2), ("once", 1))
# 一 is a number in a dose and behind 每; else mostly a word (一般, 一天比一天).
_COUNTED_BEFORE = re.compile(r"[每隔]\s*$")


def quantities(text: str) -> Counter[Quantity]:
    """Returns the numbers of a text with their units, and how often each is there."""
    with_unit, bare = _numbers(text)
    return Counter([*with_unit, *bare])


def _numbers(text: str) -> tuple[list[Quantity], list[Quantity]]:
    """Returns the numbers with a known unit in their order, and then the others."""
    plain = _LIST_MARK.sub(" ", _plain(text))
    plain = _ORDINAL.sub(" ", plain)
    plain = _ENGLISH.sub(lambda found: _ENGLISH_NUMBERS[found[1]], plain)
    for word, times in _LATIN_TIMES:
        plain = re.sub(rf"(?<![a-z]){word}(?![a-z])", f" {times}次 ", plain)
    found: list[Quantity] = []
    rest = []
    place = 0
    for match in _QUANTITY.finditer(plain):
        unit = next(_UNIT_NAMES[number] for number in range(len(_UNITS)) if match[f"u{number}"])
        values = [*_values(match["low"]), *(_values(match["high"]) if match["high"] else ())]
        if values == [1.0] and match["low"] == "一" and unit not in _DOSES:
            if not _COUNTED_BEFORE.search(plain[: match.start()]):
                continue
        found += [Quantity(value, unit) for value in values]
        rest.append(plain[place : match.start()])
        place = match.end()
    rest.append(plain[place:])
    bare = [Quantity(float(number), "") for number in _BARE.findall(" ".join(rest))]
    return found, bare


def _values(text: str) -> list[float]:
    """Returns the value of a number; two of one such as 两三 (two or three)."""
    if text[0].isdigit():
        return [float(text)]
    if "半" in text:
        whole = text.replace("半", "")
        return [0.5 + (_values(whole)[0] if whole else 0.0)]
    if not {"十", "百"} & set(text):
        return [float(_CHINESE_VALUE[one]) for one in text]
    total, current = 0, 0
    for one in text:
        if one in _CHINESE_VALUE:
            current = _CHINESE_VALUE[one]
        else:
            total += (current or 1) * (10 if one == "十" else 100)
            current = 0
    return [float(total + current)]


def _number_drifts(one: str, other: str) -> Iterator[Drift]:
    before, after = quantities(one), quantities(other)
    for quantity, count in before.items():
        if after[quantity] < count:
            yield Drift("number lost", str(quantity))
    for quantity in after.keys() - before.keys():
        yield Drift("number added", str(quantity))
    if after >= before:
        moved = _out_of_order(_doses(one), _doses(other))
        if moved is not None:
            yield Drift("number moved", str(moved))


def _doses(plain: str) -> list[Quantity]:
    """Returns what says how much and how often, in its order."""
    return [one for one in _numbers(plain)[0] if one.unit in _DOSES or one.unit == "次"]


def _out_of_order(before: Sequence[Quantity], after: Sequence[Quantity]) -> Quantity | None:
    """Returns the first of these that does not follow its predecessors in the later text."""
    rest = iter(after)
    return next((one for one in before if one not in rest), None)


# Drugs.

_FORMS = (
    "缓释片|肠溶片|分散片|咀嚼片|泡腾片|软胶囊|胶囊|颗粒|口服液|注射液|软膏|乳膏|滴眼液|滴耳液|冲剂|糖浆|喷雾剂|喷剂"
    "|栓剂|凝胶|合剂|洗剂|贴膏|气雾剂|粉针"
)
_STEMS = (
    r"头孢[\u4e00-\u9fff]|[\u4e00-\u9fff](?:西林|沙星|霉素|他汀|地平|普利|沙坦|洛尔"
    r"|拉唑|替丁|康唑|昔布|格列净|格列汀|双胍|单抗|膦酸钠)"
)
_ENGLISH_STEMS = (
    r"[a-z]{3,}(?:cillin|mycin|floxacin|statin|pril|sartan|olol|prazole|tidine|dipine|azole|cycline|gliptin"
    r"|gliflozin|mab|vir|caine|oxetine)"
)
_FORM = re.compile(rf"[\u4e00-\u9fffa-z]{{2,5}}?(?:{_FORMS})")
_STEM = re.compile(rf"{_STEMS}|\b{_ENGLISH_STEMS}\b")
_SAME_FORM = {"胶囊", "颗粒", "冲剂", "软膏", "乳膏", "凝胶", "糖浆", "口服液"}


@functools.cache
def _known_drugs() -> re.Pattern[str]:
    words = pathlib.Path(__file__).with_name("drugs.txt").read_text(encoding="utf-8").split()
    by_length = sorted(words, key=lambda word: -len(word))
    return re.compile(
        "|".join(rf"\b{word}\b" if word.isascii() else re.escape(word) for word in by_length)
    )


def drugs(text: str) -> frozenset[str]:
    """Returns the drugs that a text names: known names, stems such as 西林, and forms."""
    plain = _plain(text)
    known = set(_known_drugs().findall(plain))
    stems = {found.group() for found in _STEM.finditer(plain)}
    return frozenset(known | stems)


def _forms(plain: str) -> Counter[str]:
    """Returns the forms of medicine that are named, such as 胶囊, and how often."""
    return Counter(re.findall(_FORMS, plain))


# Older names of a substance, which a polisher may write as the one in use.
_OLD_NAMES = {
    "扑热息痛": "对乙酰氨基酚",
    "消炎痛": "吲哚美辛",
    "心痛定": "硝苯地平",
    "氟哌酸": "诺氟沙星",
    "灭滴灵": "甲硝唑",
    "病毒唑": "利巴韦林",
    "强的松": "泼尼松",
    "扑尔敏": "氯苯那敏",
    "胃复安": "甲氧氯普胺",
}
_OLD_NAME = re.compile("|".join(_OLD_NAMES))


def _drug_drifts(one: str, other: str) -> Iterator[Drift]:
    one, other = (_OLD_NAME.sub(lambda found: _OLD_NAMES[found[0]], text) for text in (one, other))
    for name in sorted(drugs(one)):
        if name not in other:
            yield Drift("drug lost", name)
    for name in sorted(drugs(other)):
        if name not in one:
            yield Drift("drug added", name)
    before, after = _forms(one), _forms(other)
    for name in sorted(after.keys() - before.keys()):
        yield Drift("drug added", name)


# Diagnoses.

_WHOLE_NAMES = (
    "高血压 糖尿病 甲亢 甲减 哮喘 中风 白血病 癫痫 痛风 冠心病 心脏病 结核 乙肝 丙肝 甲肝 感冒"
    " 艾滋病 脑瘫 自闭症 白内障 青光眼 肺气肿 抑郁症 焦虑症 尿毒症 败血症 贫血 痔疮"
    " 内痔 外痔 混合痔"
).split()
# Of another name the end, with the character before it: 胃炎 of 慢性胃炎.
_ENDS = (
    "炎|癌|瘤|疹|疣|癣|疮|综合征|结石|息肉|囊肿|结节|增生|肥大|溃疡|硬化|骨折|梗死|梗塞|衰竭|积液|肾病|肺病|胃病"
    "|肝病|妇科病|性病|疱疹|脱垂"
)
_DISEASE = re.compile(rf"{'|'.join(_WHOLE_NAMES)}|[\u4e00-\u9fff](?:{_ENDS})")
# A rash is a finding: 皮疹 and 红疹 are one.
_NO_DISEASE = re.compile(
    r"[消抗防止发有无的]炎|发炎|消炎|抗癌|防癌|抗结核|炎炎|[皮红丘斑起出发长]疹"
)


def diagnoses(text: str) -> frozenset[str]:
    """Returns the ends of the diseases' names in a text, such as 胃炎 of 慢性胃炎."""
    found = {match.group() for match in _DISEASE.finditer(_plain(text))}
    return frozenset(one for one in found if not _NO_DISEASE.search(one))


def _diagnosis_drifts(one: str, other: str) -> Iterator[Drift]:
    for name in sorted(diagnoses(one)):
        if name not in other:
            yield Drift("diagnosis lost", name)
    for name in sorted(diagnoses(other)):
        if name not in one:
            yield Drift("diagnosis added", name)


# Negations.

_NOT_NEGATED = re.compile(
    r"不仅|不但|不同|不断|不久|不少|不错|差不多|不客气|不管|不论|无论|不过|特别|区别|分别|别人|级别|性别|非常|除非|未来"
    r"|无非|莫名|不妨|不一定|要不|不适|不良|不足|不安|不孕|不育|不全|不畅|不振|不佳|不稳|不规则|不舒服|无力|无菌|不用谢"
    r"|不用客气|禁忌|不必客气|没关系|没问题|是不是|能不能|会不会|要不要|好不好|有没有|对不起|不好意思|忍不住|不知|不明"
    r"|不等|不止|不得不|不然|否则|不该|不均|不调|不停|不清|不当|不了解|没事|不再|不太|不怎么|莫大|非甾体|无痛|无创"
)
_NEGATION = re.compile(
    r"不|没|未|无|勿|别|禁|避免|忌|莫|\bnot\b|\bno\b|n't\b|\bnever\b|\bavoid|\bwithout\b|\bnor\b"
)
_CLAUSE = re.compile(r"[,。;!?\n、]+|\.(?!\d)")
_EMPTY = re.compile(r"[\s的了吗呢吧啊也就都还您你请我们可以建议需要应该应当注意]")
_FEW = 3  # Characters of a clause that is long enough to be found again.
_LIKE = 75.0  # Share in percent that is the same clause.
_NEAR = 12  # Characters around it in which the negation stands.


def _negation_drifts(one: str, other: str) -> Iterator[Drift]:
    for kind, text, against in (("lost", one, other), ("added", other, one)):
        for clause in _negated_clauses(text):
            where = _found_again(clause, against)
            # 不要久坐不动 has two: 可以久坐不动 still has one.
            if where is not None and _num_negations(where) < _num_negations(clause):
                yield Drift("negation lost" if kind == "lost" else "negation added", clause)


def _num_negations(text: str) -> int:
    return len(_NEGATION.findall(text))


def _negated_clauses(plain: str) -> Iterator[str]:
    for clause in _CLAUSE.split(_NOT_NEGATED.sub("", plain)):
        if _NEGATION.search(clause) and len(_content(clause)) >= _FEW:
            yield clause.strip()


def _found_again(clause: str, text: str) -> str | None:
    """Returns the part of a text that says what a clause says, negated or not; None if none does.

    The negation may have moved into the clause before: 千万不要、吃辛辣.
    """
    content = _content(clause)
    best, found = 0.0, None
    clauses = [part for part in _CLAUSE.split(_NOT_NEGATED.sub("", text)) if part.strip()]
    for place, part in enumerate(clauses):
        own = _content(part)
        if len(own) < _FEW:
            continue
        likeness = fuzz.ratio(content, own)
        if likeness > best:
            best = likeness
            found = " ".join(clauses[max(0, place - 1) : place + 1]) if place else part
    return found if best >= _LIKE else None


def _content(clause: str) -> str:
    """Returns a clause without negations and without words of courtesy."""
    return _EMPTY.sub("", _NEGATION.sub("", clause))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def worst(drifts: Sequence[Drift]) -> str:
    """Returns all differences in one line."""
    return "; ".join(f"{one.kind}: {one.detail}" for one in drifts)
