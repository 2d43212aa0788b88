"""Masks what tells who somebody is: names, phone and ID numbers, addresses, accounts.

Patterns of Chinese and English consultations, without a model. Full-width characters are read as
their usual forms. Names are masked where the text says that they are one: behind a label (姓名,
我叫, my name is), before sex or age, or with a title (李医生, Dr. Smith); a name in the middle of a
sentence is not found. Numbers of a dose, a laboratory value or a date are none of these.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

PersonalKind = Literal["name", "phone", "id_number", "address", "account"]
PERSONAL_KINDS: tuple[PersonalKind, ...] = get_args(PersonalKind)

_CHINESE_MASKS = {
    "name": "[姓名]",
    "phone": "[电话]",
    "id_number": "[证件号]",
    "address": "[地址]",
    "account": "[账号]",
}
_HAN = "\u4e00-\u9fff"

_SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡蒋余于杜叶程魏苏吕丁任"
    "沈姚卢姜崔钟谭陆汪范金石廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严武戴莫孔向汤"
    "温康施文牛樊葛邢安齐易乔伍庞颜倪庄聂章鲁岳翟殷詹申欧耿关兰焦俞左柳甘祝包宁尚符舒阮柯纪梅童凌毕单季裴"
    "霍涂成苗谷盛曲翁冉骆蓝路游辛靳管柴蒙鲍华喻祁蒲房滕屈饶解牟艾尤阳时穆农司卓古吉缪简车项连芦麦褚娄窦戚"
    "岑景党宫费卜冷晏席卫米柏宗瞿桂全佟应臧闵苟邬边卞姬师和仇栾隋商刁沙荣巫寇桑郎甄丛仲虞敖巩明佘池查麻苑"
)
_DOUBLE_SURNAMES = "欧阳|司马|上官|诸葛|东方|皇甫|尉迟|公孙|慕容|令狐|司徒|夏侯|端木"
# Words of medicine and of everyday language that begin with a surname.
_WORDS = (
    "高[血热烧温度龄压糖脂位危中考低]|黄[疸色体斑痰染褐]|白[血带色细癜内斑天痰睛蛋]|毛[病囊细]|麻[疹木醉烦]"
    "|谢谢|安[眠全静排慰]|康[复泰]|时[间常候]|方[法面便案]|常[见规常]|单[纯侧]|左[侧腿手脚眼耳肾肺右]|宫[颈外腔内]"
    "|石[头膏]|金[黄属]|马[上蹄]|周[围期末岁]|何[时种处]|许多|水|余下|全[身部]|应[该当按遵]|成[人年]|连续|温[度水]"
    "|胡[说乱子]|关[节于键]|包[皮块括]|解[释决答]|明[显天白确]|和|向|于|华[法佗]|文[章献]|万一|严[重格]|阳[性痿虚光]"
    "|农村|卫生|甘[油草]|艾[滋灸]|易[怒感]|宁可|雷[贝米尼]|罗红|夏[天季]|龙胆|牛[奶皮肉黄]|葛根|熊[去胆]|梅[毒花]"
    "|桂枝|莫[沙名]|吉[非他]|陆续|武汉|任何"
)
# Surnames that are too common as words to be one before a title: 当时医生, 全医院.
_WORDS_BEFORE_TITLE = (
    "(?<=谢)谢|[时应全和向于从水管路查师冷车古米沙边商景盛游简尤尚华包房费党席项连文江]"
    "|[黄汤田金平任明方常单左宫]"
)
# No given name has these.
_GIVEN = (
    rf"(?:(?![的了是在上下不有也都就还要会能可以这那个们么什没很请问说让被把给从到围便法面间候病症炎痛血压热烧"
    rf"糖脂今年岁男女我你您他她医师])[{_HAN}])"
)
_SURNAME = rf"(?!{_WORDS})(?:{_DOUBLE_SURNAMES}|[{_SURNAMES}])"
# Two given characters where a third word may follow, one where it must.
_END = rf"(?=[^{_HAN}]|$|[的是今年男女我你您他她岁在有患因住来])"
_FULL_NAME = rf"(?P<name>{_SURNAME}(?:{_GIVEN}{{1,2}}{_END}|{_GIVEN}{{2}}|{_GIVEN}))"
# In place of any character: 发黄医生 is nobody's name.
_BEFORE_TITLE = rf"(?:(?<=[谢问找给的是叫跟由让老见位请好和与])|(?<=[^{_HAN}])|^)"
_TITLE = r"(?:医生|大夫|医师|主任|教授|院长|护士长|护士|先生|女士|小姐|太太|阿姨|叔叔|大爷|大妈)"
_CAPITALS = r"[A-Z][a-z]+(?:[ -](?:[A-Z]\.|[A-Z][a-z]+)){0,2}"

# An address' own words have none of these.
_PLACE = (
    rf"(?:(?!家[住在]|和[他她我]|[我你他她去来到从在住的了是与有这那就把给让请问叫于])[{_HAN}])"
)
_NUMBER = r"[\d一二三四五六七八九十百零〇]+"
_CHINESE_DIGITS = "一二三四五六七八九零〇幺"
_DOOR = rf"(?:\s*{_NUMBER}(?:[-#]{_NUMBER})?(?:号楼|号院|号|弄|栋|幢|单元|楼|室|组|队|门|层))"

_RULES: tuple[tuple[PersonalKind, str, int], ...] = (
    ("account", r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}", 0),
    (
        "account",
        r"(?:QQ|扣扣|微信|we ?chat|weixin|(?<![a-z])[vw]x)(?:号码?|账号|id)?\s*[:为是]?\s*"
        r"(?P<value>[A-Za-z0-9][\w-]{4,19}(?<![_-]))",
        re.IGNORECASE | re.ASCII,
    ),
    (
        "id_number",
        r"(?<!\d)[1-9]\d{5}[ -]?(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[ -]?\d{3}"
        r"[\dXx](?![\dA-Za-z])",
        re.ASCII,
    ),
    (
        "id_number",
        r"身份证(?:号码?)?\s*[:为是]?\s*(?P<value>\d[\d -]{12,20}[\dXx])",
        re.ASCII,
    ),
    (
        "id_number",
        r"(?:护照|军官证|病历|住院|门诊|病案|就诊卡|医保卡?|社保卡?|诊疗卡)(?:号码?|编号|卡号)\s*[:为是]?\s*"
        r"(?P<value>[A-Za-z]{0,3}\d[\dA-Za-z-]{3,19})",
        re.ASCII,
    ),
    ("id_number", r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])", re.ASCII),
    (
        "id_number",
        r"\b(?:MRN|SSN|passport(?: no\.?| number)?)[:# ]*(?P<value>[A-Z]{0,2}\d{5,12})",
        2,
    ),
    (
        "phone",
        r"(?<![\d.])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}"
        r"(?!\d|\.\d|%|\s*(?:IU|U/|copies|拷贝|个|次|元))",
        re.ASCII,
    ),
    ("phone", r"(?<![\d.-])(?:400|800)-?\d{3}-?\d{4}(?!\d)", re.ASCII),
    (
        "phone",
        r"(?<![\d.-])(?:\(0\d{2,3}\)|0\d{2,3})[- ]?[2-9]\d{6,7}(?:[- ]\d{1,5})?(?!\d)",
        re.ASCII,
    ),
    (
        "phone",
        r"(?:电话|手机|联系方式|座机|热线|phone|tel|mobile|cell)(?:号码?| number)?\s*[:为是]*\s*"
        r"(?P<value>[+(]?\d[\d() -]{5,18}\d)",
        re.IGNORECASE | re.ASCII,
    ),
    (
        "phone",
        r"(?<![\d.-])(?:\+?1[- .])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])\d{3}[-.]\d{4}(?![\d-])",
        re.ASCII,
    ),
    (
        "phone",
        rf"(?<![{_CHINESE_DIGITS}])[一幺][三四五六七八九][{_CHINESE_DIGITS}]{{9}}",
        0,
    ),
    (
        "address",
        r"(?:家庭|通讯|联系|现|户籍|收货|详细)?(?:住址|地址)\s*[:为是]+\s*"
        r"(?P<value>[^,。;!?\n]{2,30}[省市区县镇乡村路街号栋室弄巷道楼][^,。;!?\n]{0,20})",
        0,
    ),
    (
        "address",
        rf"(?:{_PLACE}{{2,7}}?(?:省|自治区))?(?:{_PLACE}{{2,7}}?市)?(?:{_PLACE}{{1,6}}?[区县旗])?"
        rf"(?:{_PLACE}{{1,6}}?(?:镇|乡|街道))?{_PLACE}{{1,7}}?(?:路|街|大道|巷|胡同|弄堂|村|小区|花园|新村|家园)"
        rf"(?:{_PLACE}{{2,8}}?(?:小区|花园|新村|家园|公寓))?{_DOOR}+",
        0,
    ),
    (
        "address",
        rf"{_PLACE}{{2,7}}?(?:省|自治区|市){_PLACE}{{1,6}}?[市区县旗]{_PLACE}{{1,6}}?(?:镇|乡|村|街道|路|街)"
        rf"(?:{_PLACE}{{1,6}}?(?:村|组|屯|寨|小区))?",
        0,
    ),
    (
        "address",
        r"\b\d{1,5} (?:[NSEW]\.? )?(?:[A-Z][a-z]+ ){1,3}(?:Street|St|Avenue|Ave|Road|Rd|Lane|Ln"
        r"|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Way)\b(?:\.?,? (?:Apt|Unit|Suite|#)\.? ?\w+)?",
        0,
    ),
    (
        "name",
        rf"(?:姓名|联系人|收件人|(?<![因之])我叫|本人叫|我的名字(?:是|叫)|名字(?:是|叫)|签名|署名)\s*[:为是]?\s*{_FULL_NAME}",
        0,
    ),
    (
        "name",
        rf"(?:患者|病人|患儿|病患|产妇|家属)\s*[:是]?\s*{_FULL_NAME}(?=\s*[,(]?\s*(?:性别:?)?(?:[男女][,)。\s,]|\d+岁))",
        0,
    ),
    (
        "name",
        rf"{_BEFORE_TITLE}(?P<name>(?!(?:{_WORDS_BEFORE_TITLE}){_TITLE}){_SURNAME}{_GIVEN}{{0,2}})(?={_TITLE})",
        0,
    ),
    ("name", rf"\b(?:Dr|Mr|Mrs|Ms|Miss|Prof)\b\.? (?P<name>{_CAPITALS})", 0),
    (
        "name",
        rf"(?:[Mm]y name is|[Nn]ame:|[Pp]atient(?: name)?:|called) (?P<name>{_CAPITALS})",
        0,
    ),
    ("name", r"\b(?:I am|I'm|[Tt]his is) (?P<name>[A-Z][a-z]+ [A-Z][a-z]+)\b", 0),
)
_PATTERNS = tuple((kind, re.compile(pattern, flags)) for kind, pattern, flags in _RULES)


class Masked(NamedTuple):
    """A text without personal data, and what was masked, by kind."""

    text: str
    counts: Counter[PersonalKind]


class Found(NamedTuple):
    """A piece of personal data at `text[start:end]`."""

    kind: PersonalKind
    start: int
    end: int


def find_personal_data(text: str) -> list[Found]:
    """The personal data of a text, in its order, none overlapping another."""
    plain = _narrow(text)
    taken: list[Found] = []
    for kind, pattern in _PATTERNS:
        for start, end in _spans(pattern, plain):
            if all(end <= one.start or start >= one.end for one in taken):
                taken.append(Found(kind, start, end))
    return sorted(taken, key=lambda one: one.start)


def mask(text: str) -> Masked:
    """Replaces personal data by its kind in brackets, in the language of the text."""
    found = find_personal_data(text)
    in_chinese = re.search(f"[{_HAN}]", text) is not None
    parts, place = [], 0
    for kind, start, end in found:
        parts += [text[place:start], _CHINESE_MASKS[kind] if in_chinese else f"[{kind}]"]
        place = end
    return Masked("".join((*parts, text[place:])), Counter(one.kind for one in found))


def _spans(pattern: re.Pattern[str], plain: str) -> Iterator[tuple[int, int]]:
    """The places of a pattern's personal data: its group, or all of the match."""
    group = next(iter(pattern.groupindex), 0)
    for match in pattern.finditer(plain):
        yield match.span(group)


def _narrow(text: str) -> str:
    """The text with full-width forms as their usual ones, each in its place."""
    return "".join(
        normal if len(normal := unicodedata.normalize("NFKC", one)) == 1 else one for one in text
    )
