"""Text of data files: encodings detected by evidence, lines decoded strictly, values made JSON.

Encodings. Nearly any bytes decode as GB18030 (`Rücken` in Latin-1 gives `R點ken`), so successful
decoding proves little. UTF-8 is different: text in another encoding is practically never valid
UTF-8. So:

- a byte-order mark decides for UTF-8, UTF-16 or UTF-32;
- text that is valid UTF-8, except for few lines, is UTF-8;
- otherwise the file is GB18030 or Big5 if the decoded text is Chinese: a large share of its
  characters are among the commonest of the language, and they are not single ones inside words of
  Latin letters, as accented letters would appear;
- anything else is refused with the encodings that would decode it, for the user to choose from.

Lines end at a line feed, or at a carriage return in a file whose first line ends with one alone (as
old Macs wrote them), and nowhere else: U+2028, U+2029 and U+0085 may occur inside a JSON string.

Values. Records carry their source's other columns to every file that a stage writes, so a value
that JSON or UTF-8 cannot write is converted (or its row refused) when it is read:

- half a surrogate in a text or a key becomes U+FFFD, the replacement character;
- NaN (and pandas' NaT), which tables write for an absent number, becomes null;
- dates, times and timestamps become their ISO 8601 text, durations a number of seconds;
- a Decimal becomes a number if a float holds it exactly, else its digits as text;
- bytes become the text that they are in UTF-8; other bytes refuse the row;
- numpy scalars, arrays, tuples and sets become numbers and lists; UUIDs and paths their text;
- infinite numbers, other types, and values nested deeper than `MAX_DEPTH` refuse the row.
"""

import codecs
import datetime
import decimal
import itertools
import math
import numbers
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from huatuo_jax.core.files import open_binary
from huatuo_jax.data.records import shown

UTF8 = "utf-8"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # Begins with the mark of UTF-16.
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WITHOUT_ORDER = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "utf-8-sig": UTF8}
_CHINESE = ("gb18030", "big5hkscs")
_OTHERS = ("shift_jis", "euc_jp", "euc_kr", "cp1252", "cp1250", "cp1251", "latin-1")
_SINGLE_BYTE = ("cp1252", "cp1250", "cp1251", "latin-1")
_NAMES_SHOWN = 4
_WAY_OUT = "save it as UTF-8, or set --encoding=NAME (config.data: data_encoding)"
MAX_DEPTH = 100
HALF_CHARACTER = "half a character replaced by U+FFFD"
NOT_A_NUMBER = "NaN read as null"
TIME_TEXT = "time written as ISO 8601 text"
DURATION = "duration written as seconds"
DECIMAL = "Decimal written as a number, or as text where a float is not exact"
BYTES = "bytes read as UTF-8 text"
AS_TEXT = "identifier or path written as text"

_SAMPLE_BYTES = 1 << 20  # of lines that are not plain ASCII
_SEARCHED_BYTES = 64 << 20  # for such lines
# Text of another encoding of this many bytes is practically never valid UTF-8 by chance.
TELLING_BYTES = 24
# Some 60 % of the characters of Chinese text are in `_COMMON`; of Korean, Japanese or random bytes
# read as GB18030 fewer than 20 %.
_COMMON_SHARE = 0.3
_INSIDE_WORDS_SHARE = 0.2
_BLOCK = 1 << 20

# The commonest characters of Chinese, and of medical Chinese, simplified and traditional.
_COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过"
    "发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本"
    "前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很"
    "最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度"
    "门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电"
    "数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马"
    "科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万"
    "取拉格望觉术领共确传师观清今切院让识候带导争运男请您吗呢吧怎谢谁每另早晚食吃喝药医病疗症痛"
    "患诊治疾检查血压炎热烧咳嗽胃肠肝肾肺心脏皮肤骨细胞肿瘤癌糖尿腹泻恶呕吐头晕孕妇儿童周岁天次剂"
    "服片注射术后疼感染菌毒慢急般引建议注意休息需适当首先其次影响功严预防护"
    "這個們來為國說時會對過發後裡種經學當沒動還進實無長機從開關點業將兩間問題頭戰應體電話內師給歸"
    "變書條氣員總決義處數報讓認識車東門見親樣產醫藥療檢驗癥狀術臟腦腫與專診斷請麼嗎該務計記語論議"
    "講許試調護貴費買賣質輕轉辦農達遠運選錢錯鐵銀閉隊陽陰際難靜須顏願類風飯館馬麗黨齊熱單參強歲價"
    "優傷億備傾償勞勢協卻員響圍園圖團場塊壓壞夠奮婦媽孫寧寫寬審尋層屬島帶幫幾庫廠廣張彈徑徵慣懷據"
    "擇擊擔擴擺敗斷於構標樓樂檔權歡歷殺減測準濕營爭狀獨獎獲環異瘋癒癢發皺監盤確礎禮積穩競節簡約級"
    "納純紙細終組結絕統維網緊線練緩編緣續繼罰羅習聖聞聯聲聽腎腸膚膽臉臨舉舊艱華萬著蓋藝號虛蟲衛衝"
    "裝補製複規視覺覽觀觸訂訊討訓設訪證評詞詩詳誤誰課談謂謝譯讀讚負責貨賀賞賽軍軟載較輪適遲遷遺邊"
    "郵鄉醒釋錄鋼長閃閒閱阻陣陳陸階隨險隱雙雖雲頁頂項順頓預頻額顧顯飛飲飾養餐餘騎驚高髮鬆鬧魚鹽麥麵"
)
_PUNCTUATION = re.compile("[\u2010-\u2027\u3000-\u301f\uff01-\uff20\uff3b-\uff40\uff5b-\uff65]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_INSIDE_WORD = re.compile(r"(?<=[A-Za-z])[^\x00-\x7f](?=[A-Za-z])")


class _Sample(NamedTuple):
    """Lines that are not ASCII: their sizes in UTF-8 and otherwise, and those not in UTF-8."""

    utf8_bytes: int
    other_bytes: int
    others: list[bytes]
    first_fault: str


def checked_encoding(name: str | None) -> str | None:
    """Returns the codec's own name, or None where none is named.

    Raises:
        ValueError: Python has no codec of text of that name.
    """
    if name is None:
        return None
    try:
        found = codecs.lookup(name).name
        "a\n".encode(found).decode(found)  # Refused by codecs of bytes, such as base64.
    except (LookupError, UnicodeError, TypeError, ValueError):
        raise ValueError(
            f"encoding is {name!r}; it should be a text encoding that Python knows, such as utf-8,"
            " gb18030, big5, cp1252, or utf-16"
        ) from None
    return found


def choose_encoding(path: str | os.PathLike[str], encoding: str | None = None) -> str:
    """Returns Python's name of a text file's encoding, by the rules of the module.

    Args:
        path: the file; its byte-order mark and its first lines that are not ASCII are the evidence.
        encoding: given by the user and then used; None to detect it.

    Raises:
        ValueError: the evidence does not decide; the message names the possible encodings.
    """
    with open_binary(path) as file:
        start = file.read(4096)
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), None)
    if encoding is not None:
        given = str(checked_encoding(encoding))
        if given in _WITHOUT_ORDER:
            return marked if marked and marked.startswith(given[:6]) else _WITHOUT_ORDER[given]
        return given
    if marked is not None:
        return marked
    _refuse_wide_characters(path, start)
    sample = _sample(path)
    if sample.utf8_bytes >= sample.other_bytes:
        return UTF8
    shares = {name: _share_of_chinese(sample.others, name) for name in _CHINESE}
    best, second = sorted(shares, key=lambda name: -shares[name])
    if shares[best] >= _COMMON_SHARE and shares[best] > 1.5 * shares[second]:
        return best
    raise ValueError(
        f"{sample.first_fault}, and the evidence is not enough for another encoding (it could be"
        f" {', '.join(_possible(sample.others)) or 'none that is known'}); {_WAY_OUT}"
    )


def byte_order_mark(encoding: str) -> bytes:
    """Returns the mark that a file in this encoding may begin with."""
    return next((mark for mark, name in _BYTE_ORDER_MARKS if name == encoding), b"")


def undecodable(raw: bytes, encoding: str, offset: int) -> str | None:
    """Returns which byte of the file does not decode, or None."""
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        byte, place = raw[error.start], offset + error.start
        return f"not {encoding.upper()}: byte 0x{byte:02x} at offset {place} of the file"
    if not encoding.startswith("utf") and not raw.isascii() and _is_utf8_by_intent(raw):
        return f"UTF-8 text in a file that is otherwise {encoding.upper()}"
    return None


def _is_utf8_by_intent(raw: bytes) -> bool:
    try:
        raw.decode(UTF8)
    except UnicodeDecodeError:
        return False
    return sum(byte > 0x7F for byte in raw) >= TELLING_BYTES


def _refuse_wide_characters(path: str | os.PathLike[str], start: bytes) -> None:
    """Refuses UTF-16 without a mark, which is valid UTF-8 full of NULs if mostly ASCII."""
    for name, zeros in (("utf-16-le", start[1::2]), ("utf-16-be", start[::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.3 * len(zeros):
            raise ValueError(
                f"{path}:1: every second byte is 0, as in {name} without a byte-order mark;"
                f" {_WAY_OUT}"
            )


def _sample(path: str | os.PathLike[str]) -> _Sample:
    utf8_bytes = other_bytes = offset = 0
    others: list[bytes] = []
    first_fault = ""
    with open_binary(path) as file:
        number = 0
        for line in file:
            for raw in line.splitlines(keepends=True):  # Of bytes: at \n, \r and \r\n alone.
                number += 1
                if not raw.isascii():
                    if _is_mostly_utf8(raw):
                        utf8_bytes += len(raw)
                    else:
                        first_fault = first_fault or f"{path}:{number}: {_fault(raw, offset)}"
                        other_bytes += len(raw)
                        others.append(raw)
                offset += len(raw)
            if utf8_bytes + other_bytes > _SAMPLE_BYTES or offset > _SEARCHED_BYTES:
                break
    return _Sample(utf8_bytes, other_bytes, others, first_fault)


def _fault(raw: bytes, offset: int) -> str:
    fault = undecodable(raw, UTF8, offset)
    assert fault is not None
    return fault


def _is_mostly_utf8(raw: bytes) -> bool:
    """Returns whether it is UTF-8 but for few bytes (a row that is reported as a fault)."""
    try:
        raw.decode(UTF8)
    except UnicodeDecodeError:
        decoded = _NOT_ASCII.findall(raw.decode(UTF8, "replace"))
        return decoded.count("\ufffd") < 0.2 * len(decoded)
    return True


def _share_of_chinese(lines: Sequence[bytes], encoding: str) -> float:
    """Returns the share of common Chinese characters among all but ASCII and punctuation.

    0 if most of the lines do not decode, or if many characters are inside words of Latin letters.
    """
    text, num_bytes = _decoded(lines, encoding)
    characters = _PUNCTUATION.sub("", "".join(_NOT_ASCII.findall(text)))
    inside = len(_INSIDE_WORD.findall(text))
    if not characters or num_bytes * 2 < sum(map(len, lines)):
        return 0.0
    if inside > _INSIDE_WORDS_SHARE * len(characters):
        return 0.0
    return sum(character in _COMMON for character in characters) / len(characters)


def _decoded(lines: Iterable[bytes], encoding: str) -> tuple[str, int]:
    """Returns the lines that decode as one text, and their number of bytes."""
    parts, num_bytes = [], 0
    for raw in lines:
        try:
            parts.append(raw.decode(encoding))
        except UnicodeDecodeError:
            continue
        num_bytes += len(raw)
    return "\n".join(parts), num_bytes


def _possible(lines: Sequence[bytes]) -> list[str]:
    """Returns the encodings that nearly all of the lines decode in, the likelier ones first."""
    total = sum(map(len, lines))
    possible = [name for name in (*_CHINESE, *_OTHERS) if _decoded(lines, name)[1] >= 0.95 * total]
    high = [len(run) for raw in lines for run in re.findall(rb"[\x80-\xff]+", raw)]
    if sum(size == 1 for size in high) * 2 > len(high):  # Accents inside words of Latin letters.
        possible.sort(key=lambda name: name not in _SINGLE_BYTE)
    return list(itertools.islice(possible, _NAMES_SHOWN))


class Line(NamedTuple):
    """One decoded line; `fault` names bytes that did not decode, and the row is an error."""

    number: int
    text: str
    fault: str | None


def read_lines(path: pathlib.Path, encoding: str | None = None) -> Iterator[Line]:
    """Yields the lines of a text file with their line ends, decoded strictly one by one.

    Args:
        path: the file.
        encoding: its encoding; None to detect it (`choose_encoding`).

    Raises:
        ValueError: the encoding is not recognized.
    """
    encoding = choose_encoding(path, encoding)
    mark = byte_order_mark(encoding)
    offset = 0
    with open_binary(path) as file:
        for number, raw in enumerate(_raw_lines(file, encoding), start=1):
            size = len(raw)
            if number == 1:
                raw = raw.removeprefix(mark)
            fault = undecodable(raw, encoding, offset + size - len(raw))
            # A line with a fault is never used as text; replacement keeps a CSV in step.
            yield Line(number, raw.decode(encoding, "replace" if fault else "strict"), fault)
            offset += size


def _raw_lines(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Yields the bytes of each line, its end included."""
    feed, carriage = "\n".encode(encoding), "\r".encode(encoding)
    start = file.read(_BLOCK)
    file.seek(0)
    first_feed, first_carriage = _find(start, feed, 0), _find(start, carriage, 0)
    behind = first_carriage  # After all carriage returns there: some programs write two.
    while behind >= 0 and start.startswith(carriage, behind):
        behind += len(carriage)
    end = feed if first_carriage < 0 or 0 <= first_feed <= behind else carriage
    if end == b"\n":
        yield from file
        return
    held = b""
    while block := file.read(_BLOCK):
        held += block
        begin = 0
        while (found := _find(held, end, begin)) >= 0:
            yield held[begin : found + len(end)]
            begin = found + len(end)
        held = held[begin:]
    if held:
        yield held


def _find(whole: bytes, end: bytes, begin: int) -> int:
    """Finds the next line end at a multiple of its own width (UTF-16 has two bytes)."""
    found = whole.find(end, begin)
    while found >= 0 and found % len(end) != begin % len(end):
        found = whole.find(end, found + 1)
    return found


class NotJson(ValueError):
    """A value that JSON cannot represent; the text names it and its place."""


class Converted(NamedTuple):
    """A value of JSON's own types, and the conversions made, by column and rule."""

    value: Any
    notes: tuple[str, ...]


def json_value(value: object) -> Converted:
    """Converts a value to JSON's types; notes of an object's fields begin with their names.

    Raises:
        NotJson: something in it cannot be converted.
    """
    notes: dict[str, None] = {}
    try:
        if not isinstance(value, Mapping):
            return Converted(_Walk("", notes).convert(value, 0), tuple(notes))
        whole: dict[str, Any] = {}
        for key, field in value.items():
            name = _Walk("a field's name", notes).key(key)
            if name in whole:
                raise NotJson(f"two fields are named {shown(name)} as text")
            whole[name] = _Walk(shown(name), notes).convert(field, 1)
    except RecursionError:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels") from None
    return Converted(whole, tuple(notes))


class _Walk:
    """Converts one column's value; notes each conversion."""

    def __init__(self, column: str, notes: dict[str, None]) -> None:
        self._column = column
        self._notes = notes

    def convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, bool | int) and type(value) in (bool, int):
            return value
        if depth > MAX_DEPTH:
            raise NotJson(self._at(f"nested deeper than {MAX_DEPTH} levels"))
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if isinstance(value, list | tuple):
            return [self.convert(item, depth + 1) for item in value]
        if isinstance(value, Set):
            return [self.convert(item, depth + 1) for item in sorted(value, key=repr)]
        if isinstance(value, np.ndarray):
            return self.convert(value.tolist(), depth + 1)
        return self._scalar(value, depth)

    def key(self, key: object) -> str:
        if isinstance(key, str | bytes | bool | int | float | None | datetime.date | uuid.UUID):
            converted = self.convert(key, 0)
            return converted if isinstance(converted, str) else str(key)
        raise NotJson(self._at(f"a field's name is {type(key).__name__}, not text"))

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        for key, field in value.items():
            name = self.key(key)
            if name in whole:
                raise NotJson(self._at(f"two fields are named {shown(name)} as text"))
            whole[name] = self.convert(field, depth + 1)
        return whole

    def _scalar(self, value: Any, depth: int) -> Any:
        if isinstance(value, datetime.timedelta | np.timedelta64):
            return self._duration(value)
        if isinstance(value, np.datetime64):
            return self._noted(TIME_TEXT, str(value)) if value == value else self._absent()
        if isinstance(value, np.generic):
            return self.convert(value.item(), depth + 1)
        if isinstance(value, decimal.Decimal):
            return self._decimal(value)
        if isinstance(value, datetime.date | datetime.time):
            # NaT of pandas is a datetime that differs from itself.
            return self._noted(TIME_TEXT, value.isoformat()) if value == value else self._absent()
        if isinstance(value, bytes | bytearray | memoryview):
            return self._bytes(bytes(value))
        if isinstance(value, uuid.UUID | os.PathLike):
            return self._noted(AS_TEXT, self._text(str(value)))
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return self._float(float(value))
        raise NotJson(self._at(f"holds a {type(value).__name__}, which JSON cannot write"))

    def _text(self, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            return self._noted(HALF_CHARACTER, whole)
        return str(value)

    def _float(self, value: float) -> float | None:
        if math.isnan(value):
            return self._absent()
        if math.isinf(value):
            raise NotJson(self._at("holds an infinite number, which JSON cannot write"))
        return value

    def _duration(self, value: Any) -> float | None:
        if not value == value:  # NaT
            return self._absent()
        if isinstance(value, np.timedelta64):
            value = value.astype("timedelta64[us]").item()
        return self._noted(DURATION, value.total_seconds())

    def _decimal(self, value: decimal.Decimal) -> int | float | str | None:
        if value.is_nan():
            return self._absent()
        if value.is_infinite():
            return self._float(float(value))
        number = float(value)
        exact = math.isfinite(number) and decimal.Decimal(repr(number)) == value
        return self._noted(DECIMAL, number if exact else str(value))

    def _bytes(self, value: bytes) -> str:
        try:
            return self._noted(BYTES, value.decode())
        except UnicodeDecodeError:
            raise NotJson(self._at("holds bytes that are not UTF-8 text")) from None

    def _absent(self) -> Any:
        return self._noted(NOT_A_NUMBER, None)

    def _noted(self, rule: str, value: Any) -> Any:
        self._notes[self._at(rule)] = None
        return value

    def _at(self, what: str) -> str:
        return f"{self._column}: {what}" if self._column else what
