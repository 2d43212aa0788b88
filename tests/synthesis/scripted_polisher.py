"""Polishes doctors' words by rules that keep what they say, and spoils some on request."""

import re

GREETINGS = (
    "您好，感谢您的咨询。",
    "您好，很高兴为您解答。",
    "您好，您的情况我已经了解了。",
    "Thank you for your question. ",
)
WISHES = (
    "希望我的回答对您有所帮助，祝您早日康复。",
    "如果还有疑问，欢迎随时咨询，祝您健康。",
    "请您放心，有任何变化及时就诊。",
    " I hope this helps.",
)
DIGITS = dict(zip("一两二三四五六七八九", (1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
HAN = {1: "一", 2: "两", 3: "三", 4: "四", 5: "五", 6: "六", 7: "七", 8: "八", 9: "九"}
# Of these a polisher writes the number in the other way.
COUNTED = "次|片|粒|支|袋|毫克|毫升|小时|周|个月"
DOSE = re.compile(
    r"(?<![\d.a-zA-Z第])(\d+(?:\.\d+)?)\s*(?=(?:mg|毫克|克|g|ml|毫升|片|粒|次|天|周|个月|小时|年|岁|%|度|℃|支|袋|针|滴"
    r"|单位|万单位|mmol|mmHg|分钟))"
)
HAN_DOSE = re.compile(
    r"(?<![一二两三四五六七八九十百半几第])([两二三四五六七八九])(?=(?:片|粒|次|天|周|个月|小时|支|袋|毫克|毫升|年|滴|针))"
)
LATIN = re.compile(r"[a-zA-Z]")


def faithful(text, draw):
    """The same content in other words and other marks."""
    english = len(LATIN.findall(text)) > len(text) / 2
    polished = text.strip()
    if not english:
        polished = polished.replace("你", "您").replace("建议您您", "建议您")
        if draw.random() < 0.4:
            polished = polished.replace("毫克", "mg").replace("毫升", "ml")
        if draw.random() < 0.4:
            polished = re.sub(
                rf"(?<![一二两三四五六七八九十百半几\d.第多])([两三四五六七八九])(?={COUNTED})",
                lambda found: str(DIGITS[found[1]]),
                polished,
            )
        elif draw.random() < 0.4:
            polished = re.sub(
                rf"(?<![\d.\-~～/至到第])([2-9])(?={COUNTED})",
                lambda found: HAN[int(found[1])],
                polished,
            )
        polished = re.sub("(?<!能)不能(?!够)", "不可以", polished)
        polished = re.sub("(?<![要请])不要", "请不要", polished)
        if draw.random() < 0.5:
            polished = polished.replace("口服", "可以口服")
        if draw.random() < 0.5:
            polished = polished.replace("，建议", "。建议")
        if draw.random() < 0.3:
            polished = polished.translate(
                str.maketrans({",": "，", "?": "？", "!": "！", ";": "；"})
            )
    if draw.random() < 0.3:
        sentences = [one for one in re.split(r"(?<=[。！？])", polished) if one.strip()]
        if len(sentences) > 2:
            polished = "\n".join(f"{number}. {one}" for number, one in enumerate(sentences, 1))
    last = -1 if english else draw.randrange(3)
    return f"{GREETINGS[last]}{polished}{WISHES[last]}"


def altered_dose(text, draw):
    """The text with one dose changed, or None where it has none."""
    places = [("arabic", found) for found in DOSE.finditer(text)]
    places += [("han", found) for found in HAN_DOSE.finditer(text)]
    if not places:
        return None
    how, found = draw.choice(places)
    if how == "han":
        new = HAN[DIGITS[found[1]] % 9 + 1]
        new = "二" if new == "一" else new
        if DIGITS[new] == DIGITS[found[1]]:
            new = "五"
    else:
        value = float(found[1])
        new = f"{value * draw.choice((2, 3, 10)):g}" if value else "3"
    return f"{text[: found.start(1)]}{new}{text[found.end(1) :]}"
