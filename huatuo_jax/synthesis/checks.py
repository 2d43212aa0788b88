"""Checks of a teacher's texts: refusals, language, echoes, and what a text model cannot do."""

import re

from rapidfuzz.distance import Indel

from huatuo_jax.evaluation.patient_faults import plain, tells_enough
from huatuo_jax.synthesis.near_duplicates import comparable

# A model speaks of itself in place of its role.
_IDENTITY = re.compile(
    r"(?:作为|我(?:只)?是)(?:一个|一名|一款|一种)?(?:ai|人工智能|大?型?语言模型|聊天机器人|虚拟助手)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?: am|'m) (?:just |only )?an? (?:ai\b|artificial intelligence|(?:large )?language model)"
)
# Only in the first words: a doctor, too, writes 我无法判断 in the middle of an answer.
_DECLINES = re.compile(
    r"(?:抱歉|对不起|很遗憾|不好意思)[^。!?\n]{0,12}(?:无法|不能|没办法|不便|不可以)[^。!?\n]{0,6}"
    r"(?:回答|提供|协助|满足|完成|继续|扮演|帮助|处理|生成|讨论|参与|给出|执行)"
    r"|^我?(?:无法|不能|没办法)(?:回答|提供|协助|满足|完成|继续|扮演|处理|生成|讨论|参与|执行)"
    r"|\b(?:i'm sorry|i am sorry|sorry|apologies|i apologi[sz]e)\b[^.!?\n]{0,30}"
    r"\b(?:can't|cannot|can not|unable|won't|not able)\b"
    r"|^i (?:can't|cannot|can not|won't|am unable to|am not able to|'m unable to|'m not able to) "
    r"(?:help|assist|provide|answer|comply|continue|fulfil|do that|discuss|participate|generate"
    r"|complete)"
)
_FIRST_WORDS = 80

_CANNOT = re.compile(
    r"图片|图像|照片|截图|图表|附图|下图|上图|如图|画(?:一|出|个|张)|绘制|视频|音频|录音|语音|链接|网址|附件|上传|下载"
    r"|打印|扫描件|上网(?:搜|查)|搜索引擎|访问网(?:站|页)|播放"
    r"|\b(?:images?|photos?|photographs?|screenshots?|videos?|audio|urls?|hyperlinks?|webpages?)\b"
    r"|(?<!clinical )\bpictures?\b|\b(?:attached|upload|download|attachments?)\b"
    r"|\bdraw (?:a|an|the) (?:picture|diagram|chart|graph|figure|map)\b|\bplot (?:a|an|the)\b"
    r"|\b(?:search|browse) (?:the )?(?:web|internet)\b"
)
_HAN = re.compile("[\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
_HAN_A_WORD = 1.5
_FEWEST_WORDS = 3


def refusal(text: str) -> str | None:
    """The words by which a model declines or speaks of itself as a model; None where it does not.

    Patterns: what is politely refused as a doctor ("这个药我不能给您开") is none.
    """
    normal = plain(text).strip()
    found = _IDENTITY.search(normal) or _DECLINES.search(normal[:_FIRST_WORDS])
    return None if found is None else found.group()


def language(text: str) -> str | None:
    """`zh` or `en`, whichever has more words; None for a text of too few."""
    han = len(_HAN.findall(text)) / _HAN_A_WORD
    latin = len(_LATIN_WORD.findall(text))
    if han + latin < _FEWEST_WORDS:
        return None
    return "zh" if han >= latin else "en"


def switches_language(text: str, expected: str) -> bool:
    """Returns True if a text is in another language than expected."""
    return language(text) not in (None, expected)


def needs_more_than_text(text: str) -> str | None:
    """The words by which an instruction asks for what a text model cannot read or make."""
    found = _CANNOT.search(plain(text))
    return None if found is None else found.group()


def echoes(text: str, other: str, *, similarity: float = 0.9) -> bool:
    """Returns True if a text says again what another says, or little beside it.

    Args:
        text: the later one.
        other: the earlier one.
        similarity: ROUGE-L F of characters from which on they are the same.
    """
    one, before = comparable(text), comparable(other)
    if not (tells_enough(one) and tells_enough(before)):
        return False
    if Indel.normalized_similarity(one, before) >= similarity:
        return True
    return one.startswith(before) and not tells_enough(one.removeprefix(before))


def length_words(text: str) -> float:
    """The length in words: Latin ones, and a word for each 1.5 Chinese characters."""
    return len(_HAN.findall(text)) / _HAN_A_WORD + len(re.findall(r"[A-Za-z0-9]+", text))
