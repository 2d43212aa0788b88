"""Finds the options that a reply to an exam question mentions, by label or by text.

The letters in CT, B超 and 维生素A, the article A and 37 °C are no mentions of options. Mentions
that are listed together (A、C和D) form a group, which is judged as one.
"""

import bisect
import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import NamedTuple

OPENING = "(\\[{<【「『《\"'“‘"
_SEEN = 40  # Characters on each side of a letter that tell whether it is a label.
CLOSING = ")\\]}>】」』》\"'”’"

_THINKING_TAGS = "think|thinking|thought|reasoning"
_THOUGHT = re.compile(rf"<({_THINKING_TAGS})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THOUGHT_ENDS = re.compile(rf"</(?:{_THINKING_TAGS})>", re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(rf"<(?:{_THINKING_TAGS})>", re.IGNORECASE)
_FINAL_PART = re.compile(
    r"^[ \t]*#{1,4}[ \t]*(?:final response|最终回复|最终回答)[ \t]*[:：]?[ \t]*$"
    r"|<\|channel\|>final<\|message\|>",
    re.MULTILINE | re.IGNORECASE,
)
_THINKING_PART = re.compile(
    r"^[ \t]*#{1,4}[ \t]*(?:thinking|思考)[ \t]*[:：]?[ \t]*$|<\|channel\|>analysis<\|message\|>",
    re.MULTILINE | re.IGNORECASE,
)
_ANSWER_PART = re.compile(
    r"^[ \t]*#{1,4}[ \t]*"
    r"(?:(?:final[ \t]+)?(?:answer|response)|conclusion|(?:最终)?(?:答案|回答)|结论)",
    re.MULTILINE | re.IGNORECASE,
)

_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL | re.MULTILINE), by)
    for pattern, by in (
        (r"\r\n?", "\n"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\nanswer: \1\n"),
        (r"<answer>(.*?)</answer>", r"\nanswer: \1\n"),
        (r"\\[()\[\]]|\$", " "),
        (r"<br\s*/?>", "\n"),
        (r"</?(?:b|i|u|em|strong|p|span|div|code)\b[^<>]*>", ""),
        (r"~~[^~\n]+~~", ""),  # Struck out.
        (r"^[ \t]*####[ \t]+(?=\S{1,12}[ \t]*$)", "answer: "),
        (r"^[ \t]*(?:#+|>+)[ \t]*", ""),
        (r"\*+|`+|_{2,}", ""),
    )
)

# The characters of the statements that are looked for; MedQA's Taiwan part has traditional ones.
_SIMPLIFIED = str.maketrans(
    "選項確錯誤應該當對為題擇結論總於則屬說敘並無後終個麼嗎會與參標準認編號維環細類區級鏈線帶組體試驗點"
    "剔餘稱從據經幾數們這樣絕單雙內關現實問請檢診斷慮況僅須顯斷綜",
    "选项确错误应该当对为题择结论总于则属说叙并无后终个么吗会与参标准认编号维环细类区级链线带组体试验点"
    "剔余称从据经几数们这样绝单双内关现实问请检诊断虑况仅须显断综",
)

# A letter behind or before one of these is part of a word: 维生素A, hepatitis B, B超, D-dimer.
_WORD_BEFORE = re.compile(
    r"(?:维生素|维他命|血型|肝炎|素|酶|蛋白|抗原|抗体|因子|补体|球菌|受体|疫苗|病毒|嘌呤|维)\s?$"
    r"|\b(?:vitamins?|hepatitis|group|type|subtype|factor|class|grade|stage|protein|coenzyme|"
    r"influenza|immunoglobulin|cyclosporine?|amphotericin|polymyxin|mitomycin|cytochrome|complement|"
    r"h(?:a)?emoglobin|apolipoprotein|child-pugh|category|phase|figure|table|cohort|lipid|toxin|"
    r"h(?:a)?emophilia|botulinum|strain|zone|plan|panel|lead|point)\s+$",
    re.IGNORECASE,
)
_WORD_BEHIND = re.compile(
    r"[-‐–]?(?:型|超|细胞|族|肽|链|区|段|期|级|类|淋巴|环|峰|波|线|受体|蛋白|病毒|群|组|带|抗原|抗体|二聚|反应蛋白|"
    r"流感|血|角|点|株|酶|酸|胶|粒|试验|纤维|淋)"
    r"|[-‐–'’][A-Za-z0-9\u4e00-\u9fff]|\.[a-z0-9]"
    r"|\s+(?:cells?|lymphocytes?|fib(?:er|re)s?|difficile|dimers?|virus|waves?|antigens?|reactive|"
    r"peptide|sections?|symptoms|complex|chains?|strains?|coli)\b",
)
# `A beta blocker` has an article, `A because ...` a label.
_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|and|or|because|since|as|for|are|but|would|should|could|seems|can|cannot|has|"
    r"due|matches|fits|describes|represents|does|will|may|might|must|isn't|instead|over|rather|"
    r"not|with)\b)[a-z0-9]"
)
_SPECIES = re.compile(r"\.\s[a-z]{3,}")  # E. coli
_SAID_BEFORE = re.compile(
    r"(?:答案[是为:]?|选项?|\b(?:answer|option|choice)(?:\s+is)?)\s*$", re.IGNORECASE
)
_BEFORE_LOWER_CASE = re.compile(
    r"(?:答案|选|选择|answer|option|choice|choose|select|pick)[\s:是为]*(?:is\s*)?$", re.IGNORECASE
)
_AFTER_LOWER_CASE = re.compile(r"\s*(?:$|[.,;:!。、\n])")

_DECORATION_LEFT = re.compile(
    rf"(?:(?:选项|选择项|\b(?:options?|choices?|letters?))[ \t]*)?(?:[{OPENING}]+[ \t]*)?\Z",
    re.IGNORECASE,
)
_BEFORE_TEXT = re.compile(rf"(?:\b(?:an?|the)[ \t]+)?(?:[{OPENING}]+[ \t]*)?\Z", re.IGNORECASE)
_DECORATION_RIGHT = re.compile(rf"(?:[ \t]?[{CLOSING}]+)?(?:[ \t]*(?:选项|项(?!目)))?")
_BEFORE_OWN_TEXT = re.compile(rf"\s*[{CLOSING}]*(?:选项|项)?[.、:,。-]?\s*")
_BEFORE_BRACKETED_TEXT = re.compile(rf"[{OPENING}](?:即|i\.e\.,?\s*)?")
_TIGHT = re.compile(
    r"\s*(?:[、/&+]|,?\s*(?:和|与|及|以及|跟|或者?|\band\b|\bor\b))?\s*", re.IGNORECASE
)
_LOOSE = re.compile(r"[ \t]*[,;]?[ \t]*")
_OTHERWISE = re.compile(r"或|\bor\b", re.IGNORECASE)
_LISTED_LINE = re.compile(r"[ \t]*[.。;,]?[ \t]*\n\s*(?:[-•]|\d{1,2}[.)、])?[ \t]*")
_LIST_GOES_ON = re.compile(r"\s*(?:$|[,;、。.!?\n]|和|与|及|以及|等|and\b|or\b)")
LINE_ENDS = re.compile(r"[ \t]*[.。;,!]?[ \t]*(?:\n|$)")
_LINE_BEGINS = re.compile(r"(?:^|\n)[ \t]*(?:[-•]|\d{1,2}[.)、])?[ \t]*\Z")

_WORDS_FOR = {
    "yes": "是的|是|肯定",
    "no": "不是|否定|否",
    "maybe": "可能|也许|不确定|无法确定",
}


class Mention(NamedTuple):
    """One place where options are mentioned.

    Attributes:
        start: of the mention in the text, brackets and words such as 选项 included.
        end: behind it.
        labels: of the options.
        by_text: whether an option is mentioned by its text alone.
    """

    start: int
    end: int
    labels: frozenset[str]
    by_text: bool


class Group(NamedTuple):
    """Mentions that are listed together.

    Attributes:
        start: of the first one.
        end: behind the last one.
        labels: of all.
        by_text: whether all are by text.
        undecided: whether they are alternatives (A或B).
    """

    start: int
    end: int
    labels: frozenset[str]
    by_text: bool
    undecided: bool


def final_part(reply: str) -> str:
    """The reply without its thinking; empty where the thinking was cut off."""
    text = _THOUGHT.sub("", reply)
    ends = [match.end() for match in _THOUGHT_ENDS.finditer(text)]
    text = text[ends[-1] :] if ends else text
    finals = [match.end() for match in _FINAL_PART.finditer(text)]
    if finals:
        return text[finals[-1] :]
    unfinished = _THOUGHT_BEGINS.search(text)
    text = text[: unfinished.start()] if unfinished else text
    thinking = _THINKING_PART.search(text)
    if thinking is None:
        return text
    answer = _ANSWER_PART.search(text, thinking.end())
    return text[: thinking.start()] + (text[answer.start() :] if answer else "")


def plain_text(text: str) -> str:
    r"""NFKC, without invisible characters, markup and struck-out text; `\boxed{B}` as answer: B.

    Traditional characters of statements (選, 錯誤) become simplified ones.
    """
    text = unicodedata.normalize("NFKC", text).translate(_SIMPLIFIED)
    text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return text


class OptionFinder:
    """Finds the mentions of one question's options."""

    def __init__(self, options: Mapping[str, str]) -> None:
        """Prepares the patterns.

        Args:
            options: text by label; labels are single letters, or words such as yes and no.
        """
        assert len(options) > 1
        self.labels = tuple(options)
        self.by_words = any(len(label) > 1 for label in options)
        if self.by_words:
            words = "|".join(map(re.escape, options))
            self._words = re.compile(
                rf"(?<![A-Za-z0-9-])(?:{words})(?![A-Za-z0-9-])", re.IGNORECASE
            )
            return
        self._letters = _letter_pattern("".join(options))
        texts = {label: plain_text(text).strip(" \t\n.。;,") for label, text in options.items()}
        texts = {label: text for label, text in texts.items() if text}
        # Genotypes such as AaBb and AABb differ by case alone.
        lowered = {_compared(text, fold=True) for text in texts.values()}
        self._fold = len(lowered) == len({_compared(text, fold=False) for text in texts.values()})
        flags = re.IGNORECASE if self._fold else 0
        self._labels_of: dict[str, list[str]] = {}
        for label, text in texts.items():
            self._labels_of.setdefault(_compared(text, fold=self._fold), []).append(label)
        # The longest text first, so that 急性阑尾炎 is not read as 阑尾炎.
        ordered = sorted(texts.values(), key=len, reverse=True)
        own = "|".join(_spaced(text) for text in ordered)
        self._own_text = re.compile(own or r"(?!)", flags)
        telling = [
            _bounded(text)
            for text in ordered
            if len(self._labels_of[_compared(text, fold=self._fold)]) == 1
            and not re.fullmatch("[A-Ja-j]", text)
        ]
        self._any_text = re.compile("|".join(telling) or r"(?!)", flags)

    def groups(self, text: str) -> list[Group]:
        """All mentions in a plain text, in order, grouped where they are listed."""
        mentions = self._word_mentions(text) if self.by_words else self._mentions(text)
        return _grouped(mentions, text)

    def _word_mentions(self, text: str) -> list[Mention]:
        label_of = {label.lower(): label for label in self.labels}
        found = [
            Mention(m.start(), m.end(), frozenset({label_of[m.group().lower()]}), False)
            for m in self._words.finditer(text)
        ]
        for label, words in _WORDS_FOR.items():
            if label in label_of:
                alone = rf"(?:^|[:\n]|答案[是为]|结论[是为])\s*({words})的?(?=[\s,。.;!]|$)"
                found += [
                    Mention(m.start(1), m.end(), frozenset({label_of[label]}), False)
                    for m in re.finditer(alone, text)
                ]
        return sorted(found)

    def _mentions(self, text: str) -> list[Mention]:
        spelled = list(self._text_mentions(text))
        letters = list(self._letter_mentions(text, spelled))
        ends = [mention.end for mention in letters]
        found = []
        for mention in spelled:
            # `肺炎(B)` is one mention, of B.
            place = bisect.bisect_right(ends, mention.start)
            if place == len(letters) or letters[place].start > mention.end + 1:
                found.append(mention)
            elif mention.start < letters[place].start:
                letters[place] = letters[place]._replace(start=mention.start)
        return sorted([*found, *letters])

    def _text_mentions(self, text: str) -> Iterator[Mention]:
        for match in self._any_text.finditer(text):
            labels = self._labels_of.get(_compared(match.group(), fold=self._fold))
            if not labels:  # Case folding differs, as of the two small sigmas.
                continue
            left = _BEFORE_TEXT.search(text, _near(match.start()), match.start())
            assert left is not None
            right = _DECORATION_RIGHT.match(text, match.end())
            assert right is not None
            yield Mention(left.start(), right.end(), frozenset(labels), True)

    def _letter_mentions(self, text: str, spelled: list[Mention]) -> Iterator[Mention]:
        behind_text = 0
        whole = {place: one for one in spelled for place in range(one.start, one.end)}
        for match in self._letters.finditer(text):
            if match.start() < behind_text:
                continue
            run = match.group().upper()
            labels = self._range(match) if match.group(1) else frozenset(run)
            if match.group(1) is None and len(labels) < len(run):
                continue
            own_text = self._own(run, text, match.end())
            spelled_here = whole.get(match.start())
            inside = spelled_here and not own_text
            if inside or not (own_text or _is_label(text, match)):
                continue
            left = _DECORATION_LEFT.search(text, _near(match.start()), match.start())
            assert left is not None
            right = _DECORATION_RIGHT.match(text, own_text.end() if own_text else match.end())
            assert right is not None
            behind_text = right.end() if own_text else 0
            yield Mention(left.start(), right.end(), labels, False)

    def _own(self, label: str, text: str, place: int) -> re.Match[str] | None:
        """The option's text, where it stands behind its label."""
        between = _BEFORE_OWN_TEXT.match(text, place)
        assert between is not None
        bracket = _BEFORE_BRACKETED_TEXT.match(text, between.end())
        for begin in (between.end(), bracket.end() if bracket else between.end()):
            found = self._own_text.match(text, begin)
            key = _compared(found.group(), fold=self._fold) if found else ""
            if label in self._labels_of.get(key, ()):
                return found
        return None

    def _range(self, match: re.Match[str]) -> frozenset[str]:
        first, last = (self.labels.index(match.group(place)) for place in (1, 2))
        return frozenset(self.labels[first : last + 1] or match.group(1, 2))


@functools.lru_cache(maxsize=64)
def _letter_pattern(letters: str) -> re.Pattern[str]:
    """A range of labels, a run of them, or one in lower case; not inside a word."""
    return re.compile(
        rf"(?<![A-Za-z0-9°\u0370-\u03ff])(?<![A-Za-z0-9][-'&])(?<![a-z]\.)"
        rf"(?:([{letters}])(?:-|\s*[~至到]\s*)([{letters}])|[{letters}]+|[{letters.lower()}])"
        rf"(?![A-Za-z0-9\u0370-\u03ff])"
    )


def _compared(text: str, *, fold: bool) -> str:
    text = "".join(text.split())
    return text.lower() if fold else text


def _spaced(text: str) -> str:
    """A pattern of a text that any white space may separate."""
    return r"\s*".join(map(re.escape, text.split()))


def _bounded(text: str) -> str:
    """A pattern of a text that is not inside a word or number."""
    pattern = _spaced(text)
    if text[0].isascii() and text[0].isalnum():
        pattern = rf"(?<![A-Za-z0-9.]){pattern}"
    elif len(text) == 1:
        pattern = rf"(?<![\u4e00-\u9fff](?<![是为选]))(?<![A-Za-z0-9]){pattern}"
    if text[-1].isascii() and text[-1].isalnum():
        pattern = rf"{pattern}(?![A-Za-z0-9]|\.\d)"
    elif len(text) == 1:
        pattern = rf"{pattern}(?![\u4e00-\u9fffA-Za-z0-9])"
    return pattern


def line_begins(text: str, place: int) -> bool:
    """Tells whether only a list sign is in front of a place on its line."""
    return bool(_LINE_BEGINS.search(text, _near(place), place))


def _near(place: int) -> int:
    return max(0, place - _SEEN)


def _is_label(text: str, match: re.Match[str]) -> bool:
    letters = match.group()
    left = text[_near(match.start()) : match.start()]
    right = text[match.end() : match.end() + _SEEN]
    bracketed = left[-1:] in set("([【") and right[:1] in set(")]】")
    if bracketed:
        return True
    if letters.islower():
        alone = match.start() == len(left) and not left.strip()
        said = alone or _BEFORE_LOWER_CASE.search(left)
        return bool(said and _AFTER_LOWER_CASE.match(right))
    if _WORD_BEFORE.search(left) or _WORD_BEHIND.match(right):
        return False
    if _SAID_BEFORE.search(left):
        return True
    return not (_SPECIES.match(right) or (letters in {"A", "I"} and _ARTICLE.match(right)))


def _grouped(mentions: list[Mention], text: str) -> list[Group]:
    """Joins mentions that only list signs separate."""
    tight: list[Group] = []
    for mention in mentions:
        group = Group(mention.start, mention.end, mention.labels, mention.by_text, False)
        between = text[tight[-1].end : group.start] if tight else None
        if between is not None and _TIGHT.fullmatch(between) and _is_list_sign(between):
            tight[-1] = _joined(tight[-1], group, between)
        else:
            tight.append(group)
    # 「选B,A错误」 is no list of B and A: A goes on with a word of its own.
    closed = [bool(_LIST_GOES_ON.match(text, group.end)) for group in tight]
    for place in range(len(tight) - 2, -1, -1):
        spaced = _LOOSE.fullmatch(text, tight[place].end, tight[place + 1].start)
        closed[place] = closed[place] or bool(spaced and closed[place + 1])
    groups: list[Group] = []
    lines = False
    for group, is_closed in zip(tight, closed, strict=True):
        between = text[groups[-1].end : group.start] if groups else None
        if between and _LOOSE.fullmatch(between):
            if is_closed:
                groups[-1] = _joined(groups[-1], group, between)
                continue
        elif between is not None and _LISTED_LINE.fullmatch(between):
            begins = lines or line_begins(text, groups[-1].start)
            if begins and LINE_ENDS.match(text, group.end):
                groups[-1] = _joined(groups[-1], group, between)
                lines = True
                continue
        lines = False
        groups.append(group)
    return groups


def _is_list_sign(between: str) -> bool:
    return not between or bool(between.strip())


def _joined(left: Group, right: Group, between: str) -> Group:
    return Group(
        left.start,
        right.end,
        left.labels | right.labels,
        left.by_text and right.by_text,
        left.undecided or bool(_OTHERWISE.search(between)),
    )
