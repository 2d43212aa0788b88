"""Extracts the chosen options from a model's reply to an exam question.

The reply is read without its thinking, in NFKC and without markup. Every mention of an option is
judged by the words around it:

- stated as the answer: 答案是B, "the answer is (B)", 故选B, B at the start or alone on a line;
- stated in passing: 最可能的诊断是B;
- called right or wrong: B正确, "A is incorrect";
- denied (答案不是A), asked (答案是A吗?), supposed (若选A), or none of these.

The last answer that is stated wins. Where there is none, statements in passing, judgements and
option texts count, in this order. A reply that states nothing gives None, which a scorer counts as
wrong.
"""

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from huatuo_jax.evaluation.exam_mentions import (
    CLOSING,
    LINE_ENDS,
    OPENING,
    Group,
    OptionFinder,
    final_part,
    line_begins,
    plain_text,
)

_SEEN = 100  # Characters on each side of a mention that its statement is looked for in.


class _Said(IntEnum):
    """The kinds of statement about a group of options, the strongest last."""

    NOTHING = 0
    IGNORED = 1
    WRONG = 2
    TEXT_IN_PASSING = 3
    RIGHT = 4
    IN_PASSING = 5
    ANSWER = 6


class _Statement(NamedTuple):
    group: Group
    said: _Said


def _pattern(*parts: str) -> re.Pattern[str]:
    return re.compile("|".join(parts), re.IGNORECASE)


_CLAUSE = r"[^,。;!?.\n]"
_NOT_ZH = "不可能|不应该?|不会|不能|并不|绝不|并非|绝非|不|非"
_FILL_ZH = (
    "应该|应当|应|就|才|便|只能|只|很可能|最可能|可能|必须|显然|当然|确定|无疑|最终|最后|的|选项|序号|"
    "字母|代码|是|为|选择|选|有|包括|包含|即|编号|分别|本题|我认为|依次"
)
_ANSWER_WORDS_ZH = r"(?:答案|正确(?:的)?选项|最佳(?:的)?选项|正确项|(?:^|\n)\s*答)"
_FILL_EN = (
    r"therefore|thus|hence|then|most|likely|probably|clearly|indeed|definitely|simply|just|is|are|"
    r"was|would|should|must|will|has|to|can|only|be|options?|choices?|letters?|both|also|the|i|think|"
    r"believe|choose|select|here|given|following|correct|one|an?"
)
_NOT_EN = r"not|never|neither|cannot|\w+n't"
_ANSWER_WORDS_EN = (
    r"(?<![A-Za-z])(?:answers?|ans|(?:correct|right|best|final|appropriate|suitable)[\s_]+"
    r"(?:option|choice|response|one|selection|letter|decision)s?|conclusion|my\s+(?:choice|pick))"
    r"(?:\s+(?:to|for|of|in)\b[^.,;:!?\n]{0,60}?)?"
)
_ANSWER_LEFT = _pattern(
    rf"{_ANSWER_WORDS_ZH}(?:{_FILL_ZH}|[:\s])*$",
    rf"{_ANSWER_WORDS_EN}(?:[\"'\s:_]+(?:{_FILL_EN})\b)*[\"'\s:]*$",
    r"[\"'](?:choice|option|prediction|选项|选择)$",
    r"(?:更正|纠正|修正|改正|改选|改)(?:答案)?(?:为|成|是|选)*$",
    r"\b(?:correction|i mean)$",
)
_NOT_ANSWER_LEFT = _pattern(
    rf"{_ANSWER_WORDS_ZH}(?:{_FILL_ZH})*(?:{_NOT_ZH})(?:{_FILL_ZH})*$",
    rf"{_ANSWER_WORDS_EN}(?:\s+(?:{_FILL_EN}))*\s+(?:{_NOT_EN})(?:\s+(?:{_FILL_EN}))*$",
)
_CHOICE_LEFT = _pattern(
    r"(?<![备候筛入人任多单待])(?:选择|选取|选定|选|勾选)(?:的是|的为|了)?$",
    r"\b(?:choose|chose|choosing|select|selected|selecting|pick|picked|go(?:ing)? with|went with|"
    r"opt(?:ed)? for|settle on)(?:\s+(?:options?|choices?|letter|answers?|both))*$",
    r"(?:而是|应该是|应该为|应当是|应是|应为)$",
    r"\bbut(?:\s+(?:rather|is|instead))*$",
)
_NOT_CHOICE_LEFT = _pattern(
    rf"(?:{_NOT_ZH}|别|勿|莫|未|没)(?:应|能|会|宜|可以|可|要|该|予|考虑|再)?(?:选择|选)$",
    rf"(?:{_NOT_EN}|avoid|rather than|instead of)\s+(?:\w+\s+){{0,2}}?(?:choose|choosing|select|"
    r"selecting|pick|picking|go with)(?:\s+(?:option|choice))?$",
    r"(?:排除|除外|除了|除|剔除|否定|不考虑|而非|而不是|不是|并非|不包括|不属于|不为)$",
    r"\b(?:exclud(?:e|ing|es)|except|eliminat(?:e|ing)|rul(?:e|ed|es|ing) out|not|rather than|"
    r"instead of|neither|nor|unlike|than)(?:\s+(?:options?|choices?))?$",
)
_SUPPOSED_LEFT = _pattern(
    rf"(?:若(?!干)|如果|假如|假设|倘若){_CLAUSE}*$",
    rf"(?:误|错|漏|易|同学|考生|学生|有人|的人|多数人|不少人){_CLAUSE}{{0,6}}选(?:择|了)?$",
    rf"\b(?:if|whether|suppose)\b{_CLAUSE}*$",
    rf"\b(?:some|many|students?|might|tempted|people|could){_CLAUSE}*\b(?:choose|select|pick)$",
)
_SO_LEFT = _pattern(
    r"(?:所以|因此|综上所述|综上|故|因而|于是|总之|由此可知|可知),?$",
    r"\b(?:therefore|thus|hence|so|in conclusion|in summary|finally|overall|actually|sorry)"
    r",?(?:\s+(?:it|this|that|must|would|should|be|is|the))*$",
)
_COPULA_LEFT = _pattern(
    r"(?:是|为|即|属于|考虑|的有|包括|首选|应选|选用|选择)$", r"\b(?:is|are|be|was|with|it's)$"
)
_NOT_COPULA_LEFT = _pattern(rf"(?:{_NOT_ZH})(?:是|为|即|属于|考虑|包括|首选|选用)$")

_JUDGED_ZH = (
    "都|均|也|则|却|是|的|说法|描述|叙述|表述|内容|明显|显然|肯定|为|属于|完全|全|本题|答案|选项|"
    "[二两三四五][项个]"
)
_VERB_EN = (
    r"(?:(?:is|are|was|were|would|can|could|may|must|should|be|seems?|appears?|to|both|all|also|"
    r"clearly|therefore|thus|indeed|definitely|the|most|only|best|more)\s+)"
)
_WRONG_RIGHT = _pattern(
    rf"\s*[:—-]*\s*(?:{_JUDGED_ZH})*(?:错|不对|不正确|不符|不选|有误|不成立|不恰当|不合适|不合理|不准确|"
    r"不妥|不宜|不能选|不应选|不是(?!\s*(?:选项)?[A-Ja-j])|不属于|(?:可以?|应|被)?排除|除外|×|✗|✘|❌)",
    rf"\s*[:—-]*\s*{_VERB_EN}*(?:incorrect|wrong|false|not\b(?!\s+[A-J]\b)|\w+n't\b|cannot\b|"
    r"inappropriate|unlikely|ruled out|excluded|eliminated|inaccurate|untrue|❌)",
)
_ANSWER_RIGHT = _pattern(
    rf"\s*(?:{_JUDGED_ZH}|正确|最佳|标准|参考|唯一|最)*(?<!错误)(?:答案|正解|正确选项)",
    rf"\s*{_VERB_EN}+(?:correct\s+|right\s+|appropriate\s+|likely\s+)?(?:answers?|options?|choices?)\b",
)
_RIGHT_RIGHT = _pattern(
    rf"\s*[:—-]*\s*(?:{_JUDGED_ZH}|最|唯一|才|就|更|较)*(?:正确|无误|符合|恰当|合适|合理|准确|成立|入选|可选|"
    r"√|✓|✔|✅|对(?=[,。;!?\s.、)A-J]|$|的))",
    rf"\s*[:—-]*\s*(?:{_VERB_EN}*(?:correct|right|true|accurate|appropriate|✓|✅)"
    r"|(?:is|are)\s+(?:the\s+)?(?:most\s+likely|best)\b)",
)
_ASKED_RIGHT = _pattern(r"\s*(?:吗|么)", r"\s*(?:呢)?\s*\?")
_ENDS = re.compile(r"\s*(?:$|[,。.;:!?\n)])")
_GIVES_REASON = re.compile(
    r"\s*(?:因为|是因为|由于|理由|解析|because\b|since\b|as\b|due\b|[—-])", re.I
)
_DECORATION = re.compile(rf"[\s:=|{OPENING}{CLOSING}—–>-]+$")

_ALL = _pattern(
    r"(?<!不)(?:以上|上述|所有|全部)(?:各)?(?:选项|各项|说法)?(?:都|全部?|均|皆)(?:是|选|对|正确|符合)",
    r"(?<!不)全选",
    r"\ball of the above\b",
    r"\ball (?:of )?(?:the )?(?:options|choices|answers) are (?:correct|right|true)",
)
_TAKEN_BACK = _pattern(
    r"(?:^|[。!?;\n…])[ \t]*(?:不对|更正|纠正|我错了)(?=\s*[,。:.!…、]|$)",
    r"(?:^|[.!?;\n…])[ \t]*(?:scratch that|correction)\b",
)
_THOUGHT_AGAIN = _pattern(
    r"(?:^|[。!?;\n…])[ \t]*(?:等等|等一下|重新考虑|重新分析)(?=\s*[,。:.!…、]|$|一下)",
    r"(?:^|[.!?;\n…])[ \t]*(?:no,? wait|wait|hold on|let me (?:reconsider|rethink|re-?evaluate))\b",
)
_NEXT_QUESTION = re.compile(
    r"^[ \t]*(?:问题|题目|问|question|q)[ \t]*\d*[ \t]*:|^以下是.{0,40}选择题",
    re.MULTILINE | re.IGNORECASE,
)


def extract_answer(
    reply: str, options: Mapping[str, str], *, several: bool
) -> frozenset[str] | None:
    """The labels that a reply chooses, in no order (D、B is BD), or None where it chooses none.

    Args:
        reply: as the model gave it, thinking included.
        options: the question's option texts by label: letters, or the words yes, no and maybe.
        several: whether more than one option may be chosen; if not, a reply that chooses two has
            not chosen.
    """
    text = plain_text(final_part(reply))
    finder = OptionFinder(options)
    for match in _NEXT_QUESTION.finditer(text):  # A base model goes on with a question of its own.
        before = _statements(text[: match.start()], finder, several=several)
        if any(one.said >= _Said.IN_PASSING for one in before):
            text = text[: match.start()]
            break
    return _chosen(_statements(text, finder, several=several), text, several=several)


def _chosen(statements: Sequence[_Statement], text: str, *, several: bool) -> frozenset[str] | None:
    """The labels of the last of the strongest statements."""
    taken_back = max((match.end() for match in _TAKEN_BACK.finditer(text)), default=0)
    again = max((match.end() for match in _THOUGHT_AGAIN.finditer(text)), default=0)
    statements = [one for one in statements if one.group.start >= taken_back]
    later = [one for one in statements if one.group.start >= again]
    if any(one.said >= _Said.TEXT_IN_PASSING for one in later):
        statements = later
    for said in (_Said.ANSWER, _Said.IN_PASSING):
        found = [one.group for one in statements if one.said == said]
        if found:
            return _labels(found[-1], several=several)
    judged: dict[str, bool] = {}
    for one in statements:
        if one.said in (_Said.RIGHT, _Said.WRONG):
            judged.update(dict.fromkeys(one.group.labels, one.said == _Said.RIGHT))
    right = frozenset(label for label, is_right in judged.items() if is_right)
    if right:
        return right if several or len(right) == 1 else None
    texts = [one.group for one in statements if one.said == _Said.TEXT_IN_PASSING]
    return _labels(texts[-1], several=several) if texts else None


def _labels(group: Group, *, several: bool) -> frozenset[str] | None:
    decided = not group.undecided and (several or len(group.labels) == 1)
    return group.labels if decided else None


def _statements(text: str, finder: OptionFinder, *, several: bool) -> list[_Statement]:
    groups = finder.groups(text)
    if several and not finder.by_words:
        covered = [range(group.start, group.end) for group in groups]
        groups += [
            Group(match.start(), match.end(), frozenset(finder.labels), False, False)
            for match in _ALL.finditer(text)
            if not any(match.start() in place for place in covered)
        ]
        groups.sort()
    listed = _lists_options(groups, text, finder)
    found = [
        _Statement(group, _judged(group, text, finder, several=several, listed=listed))
        for group in groups
    ]
    # 「A,C,D正确」 is said of all three.
    for place in range(len(found) - 1, 0, -1):
        one, before = found[place], found[place - 1]
        listed_with = re.fullmatch(r"\s*[,;]\s*", text[before.group.end : one.group.start])
        unsaid = before.said == _Said.NOTHING or not text[: before.group.start].strip()
        if one.said == _Said.RIGHT and unsaid and listed_with:
            found[place - 1] = before._replace(said=one.said)
    return found


def _lists_options(groups: Sequence[Group], text: str, finder: OptionFinder) -> bool:
    """Tells whether the reply goes through the options line by line from the first one on.

    An answer on a line of its own, with words about the next option below, is no such list.
    """
    lines = [group for group in groups if line_begins(text, group.start) and not group.by_text][:2]
    if [group.labels for group in lines] != [frozenset({label}) for label in finder.labels[:2]]:
        return False
    first, second = (bool(LINE_ENDS.match(text, group.end)) for group in lines)
    return not first or second


def _judged(group: Group, text: str, finder: OptionFinder, *, several: bool, listed: bool) -> _Said:
    """Classifies a group by the words around it."""
    raw_left = text[max(0, group.start - _SEEN) : group.start]
    right = text[group.end : group.end + _SEEN]
    left = _DECORATION.sub("", raw_left)
    same_line = "\n" not in raw_left[len(left) :]
    ends = bool(_ENDS.match(right) or not right)
    if finder.by_words and not (ends or _GIVES_REASON.match(right)):
        return _Said.NOTHING
    if _ASKED_RIGHT.match(right):
        return _Said.IGNORED
    if _WRONG_RIGHT.match(right) and not finder.by_words:
        return _Said.WRONG
    if _NOT_ANSWER_LEFT.search(left) or (same_line and _NOT_CHOICE_LEFT.search(left)):
        return _Said.WRONG
    if _SUPPOSED_LEFT.search(left):
        return _Said.IGNORED
    if _ANSWER_LEFT.search(left) or (_ANSWER_RIGHT.match(right) and not finder.by_words):
        return _Said.ANSWER
    if _is_all(group, text):
        return _Said.ANSWER
    stated = _stated(group, left if same_line else "", right, ends=ends)
    if stated != _Said.NOTHING:
        return stated
    return _alone(group, text, left, right, finder, several=several, listed=listed)


def _is_all(group: Group, text: str) -> bool:
    return bool(_ALL.fullmatch(text[group.start : group.end]))


def _stated(group: Group, left: str, right: str, *, ends: bool) -> _Said:
    """Classifies a group by the words on the same line."""
    copula = bool(_COPULA_LEFT.search(left) and not _NOT_COPULA_LEFT.search(left))
    if group.by_text:
        if _RIGHT_RIGHT.match(right):
            return _Said.RIGHT
        return _Said.TEXT_IN_PASSING if copula or _CHOICE_LEFT.search(left) else _Said.NOTHING
    if _CHOICE_LEFT.search(left) or (ends and _SO_LEFT.search(left)):
        return _Said.ANSWER
    if _RIGHT_RIGHT.match(right):
        return _Said.RIGHT
    return _Said.IN_PASSING if copula and ends else _Said.NOTHING


def _alone(
    group: Group,
    text: str,
    left: str,
    right: str,
    finder: OptionFinder,
    *,
    several: bool,
    listed: bool,
) -> _Said:
    """Classifies a group at the beginning of a reply, or alone on a line."""
    first = not left
    line = bool(line_begins(text, group.start) and LINE_ENDS.match(right))
    all_of_many = len(group.labels) == len(finder.labels) and "\n" in text[group.start : group.end]
    if all_of_many or (not several and len(group.labels) > 1 and line):
        return _Said.NOTHING  # The options were said again.
    if group.by_text:
        last = not text[group.end :].strip(" \n.。!")
        return _Said.IN_PASSING if line and (first or last) else _Said.NOTHING
    whole = text[group.start : group.end]
    reason = _ENDS.match(right) or _GIVES_REASON.match(right) or len(whole) > 8
    if first and reason and not listed:
        return _Said.ANSWER
    if line and not listed:
        return _Said.ANSWER
    concludes = whole[-1] in CLOSING and not text[group.end :].strip(" \n.。!")
    return _Said.IN_PASSING if concludes else _Said.NOTHING
