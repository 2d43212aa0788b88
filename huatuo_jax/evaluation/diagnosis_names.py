"""Names of diseases in a doctor's texts, in Chinese and English: which there are, which is named.

A diagnosis is read by what names of diseases end in; a name that is ruled out is not named.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from huatuo_jax.evaluation.patient_faults import places_of, plain

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
_HAN = re.compile("[\u3400-\u9fff]")
_COURSE = re.compile(r"^(?:急性|慢性|急慢性|轻度|重度|多发性?)")

_ENGLISH_PIECES = re.compile(r"([^;,.()\n]+)(?:\(([A-Z]{2,8})\))?")
_ENGLISH_BETWEEN = re.compile(
    r"\b(?:and|or|with|without|due to|secondary to|caused by|complicated by|in|of the|versus|vs)\b"
)
_ENGLISH_BEFORE = re.compile(
    r"^\W*(?:\d+\W+)?(?:(?:final|working|provisional|likely|probable|possible|suspected)\s+)*"
    r"(?:diagnos[ei]s(?:\s+(?:is|of))?\W+)?",
    re.IGNORECASE,
)
_ENGLISH_ENDS = "|".join(
    (
        r"\w+(?:itis|osis|a?emia|oma|pathy|algia|uria|rrh(?:o?ea|age)|plegia|penia|iasis|roidism"
        r"|philia)",
        "disease|syndrome|disorder|infection|cancer|failure|insufficiency|deficiency|obstruction",
        "asthma|pneumonia|diabetes|mellitus|hypertension|hypotension|stroke|infarction|embolism"
        "|aneurysm",
        "attack|angina|arrhythmia|fibrillation|flutter|tachycardia|bradycardia|fracture|sprain"
        "|strain",
        "dislocation|tear|injury|concussion|hernia|ulcer|abscess|stones?|cyst|polyps?|hemorrhoids?"
        "|reflux",
        "migraine|headache|epilepsy|seizures?|dementia|depression|anxiety|insomnia|vertigo"
        "|neuropathy",
        "eczema|acne|urticaria|hives|shingles|rosacea|influenza|flu|cold|measles|chickenpox"
        "|malaria",
        "gout|lupus|glaucoma|cataracts?|constipation|diarrhea|pregnancy|miscarriage|allergy"
        "|poisoning",
    )
)
_ENGLISH_NAME = re.compile(
    rf"^(.*\b(?:{_ENGLISH_ENDS}))(?:\s+(?:type|stage|grade)\s+\w+)?$", re.IGNORECASE
)
_ENGLISH_COURSE = re.compile(
    r"^(?:(?:acute|chronic|subacute|mild|moderate|severe|recurrent|left|right|bilateral|early"
    r"|uncomplicated|community-acquired|essential|primary|type \w+)\s+)+",
    re.IGNORECASE,
)

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
    "myocardial infarction": ("heart attack",),
    "hypertension": ("high blood pressure",),
    "gastroesophageal reflux disease": ("gerd", "acid reflux"),
    "chronic obstructive pulmonary disease": ("copd",),
    "urinary tract infection": ("uti",),
    "diabetes mellitus": ("diabetes",),
    "diabetes": ("diabetes mellitus",),
    "influenza": ("flu",),
    "urticaria": ("hives",),
    "nephrolithiasis": ("kidney stone",),
    "cholelithiasis": ("gallstone",),
    "herpes zoster": ("shingles",),
    "atopic dermatitis": ("eczema",),
}
"""Other names of diseases that a consultation uses as often."""

# The two of English stand last; the texts are in small letters.
_DENIED_BEFORE = re.compile(
    r"(?<!不)(?<!不能)(?<!无法)(?:排除|不是|并非|不像|不考虑|没有|不支持|不符合|不属于)[^,，。;；]{0,6}$"
    r"|(?<!not )(?<!n't )\b(?:rul(?:e[sd]?|ing) out|exclud(?:e[sd]?|ing))\b[^,.;]{0,12}$"
    r"|(?:\b(?:not(?! (?:only|just))|rather than|instead of|no (?:signs?|evidence) of|without"
    r"|unlikely)|n't)\b(?! (?:rule|exclude))[^,.;]{0,12}$"
)
_DENIED_AFTER = re.compile(
    r"^[^,，。;；]{0,4}(?:可能性(?:不大|很小|较小|比较小|小|很低|低)|(?:已|已经|可以|可)排除|不支持)"
    r"|^[^,.;]{0,16}\b(?:unlikely|(?:less|not) likely|ruled out|excluded)\b"
)


def diagnoses_of(
    text: str, *, aliases: Mapping[str, Sequence[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The names of diseases in a doctor's diagnosis, each with its aliases.

    Read are the parts under 疾病诊断 or 病情摘要及初步印象, or the whole text without headings. A
    name without its course (急性, 慢性, acute, chronic) counts as the same. A text without Chinese
    characters is read as English.
    """
    if not _HAN.search(text):
        return _english_diagnoses(text, aliases or {})
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
        found[_with_aliases(names, aliases or {})] = None
    return tuple(found)


def _english_diagnoses(
    text: str, aliases: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Names are parts that end as one; the capitals in brackets after a name are another of it."""
    found: dict[tuple[str, ...], None] = {}
    for part, short in _ENGLISH_PIECES.findall(text):
        for piece in _ENGLISH_BETWEEN.split(part):
            match = _ENGLISH_NAME.match(_ENGLISH_BEFORE.sub("", piece).strip())
            if match is None:
                continue
            names = [match.group().lower(), match.group(1).lower()]
            names += [_ENGLISH_COURSE.sub("", name) for name in names]
            if short and part.endswith(piece):
                names.append(short)
            found[_with_aliases(names, aliases)] = None
    return tuple(found)


def _with_aliases(names: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    others = [
        other
        for known in (COMMON_ALIASES, aliases)
        for name in names
        for other in known.get(name, ())
    ]
    return tuple(dict.fromkeys((*names, *others)))


def names_one(text: str, names: Iterable[str]) -> bool:
    """Returns True if a doctor's text says one of the names, and not only to rule it out."""
    normal = plain(text)
    for name in names:
        for match in places_of(name, normal):
            before, after = normal[: match.start()], normal[match.end() :]
            if not _DENIED_BEFORE.search(before) and not _DENIED_AFTER.search(after):
                return True
    return False
