import pytest

from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.text import checked_encoding, choose_encoding, read_lines

CHINESE = "您好，我最近三天一直头痛，伴有轻微恶心。请问应该怎么办？建议先多休息，多喝水。"
TRADITIONAL = "您好，我最近三天一直頭痛，伴有輕微噁心。請問應該怎麼辦？建議先多休息，多喝水。"
OTHERS = {
    "cp1252": [
        "Rückenschmerzen seit drei Wochen, Übelkeit und Schwindel. Was könnte das sein?",
        "Me duele el estómago desde el año pasado; también tengo náuseas y más síntomas.",
        "J’ai mal à la tête depuis trois jours, je suis très fatiguée. Ça ne va pas.",
        "Não consigo dormir há três dias, dor de cabeça e tonturas; coração acelerado.",
        "Jag har ont i ryggen på höger sida och känner mig trött. Åker till läkaren på måndag.",
        "Rücken",
        "5 µg pro Tag",
        "Es kostet 5 €",
    ],
    "cp1250": ["Mám bolesti hlavy už tři dny, je mi špatně. Co mám dělat, pane doktore?"],
    "cp1251": ["Здравствуйте, у меня болит голова уже три дня, температура высокая."],
    "koi8-r": ["Здравствуйте, у меня болит голова уже три дня, температура высокая."],
    "cp1253": ["Καλημέρα, έχω πονοκέφαλο εδώ και τρεις μέρες. Τι πρέπει να κάνω;"],
    "euc_kr": ["안녕하세요, 삼 일 전부터 머리가 아프고 열이 납니다. 병원에 가서 진료를 받으세요."],
    "shift_jis": ["三日前から頭が痛くて、熱があります。水をたくさん飲んで休んでください。"],
    "euc_jp": ["三日前から頭が痛くて、熱があります。水をたくさん飲んで休んでください。"],
    "tis-620": ["สวัสดีครับ ผมปวดหัวมาสามวันแล้ว ควรทำอย่างไร"],
}
CASES = [(encoding, text) for encoding, texts in OTHERS.items() for text in texts]


def written(tmp_path, text, encoding):
    path = tmp_path / "talk.tsv"
    path.write_bytes(f"question\tanswer\n{text}\t{text}\n".encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        (CHINESE, "gbk", "gb18030"),
        (TRADITIONAL, "gbk", "gb18030"),
        ("肾结石怎么治", "gbk", "gb18030"),
        ("CT检查，B超，血压120/80", "gbk", "gb18030"),
        (TRADITIONAL, "big5", "big5hkscs"),
        ("胃痛", "big5", "big5hkscs"),
        (CHINESE, "utf-16", "utf-16-le"),
        (CHINESE, "utf-32", "utf-32-le"),
        *((text, "utf-8", "utf-8") for _, text in CASES),
    ],
)
def test_an_encoding_is_taken_where_the_evidence_is_enough(tmp_path, text, encoding, told):
    path = written(tmp_path, text, encoding)
    assert choose_encoding(path) == told
    lines = list(read_lines(path))
    assert "".join(line.text for line in lines).split("\n")[0] == "question\tanswer"
    assert text in lines[1].text and not any(line.fault for line in lines)


@pytest.mark.parametrize(("encoding", "text"), CASES)
def test_text_of_other_languages_is_never_read_as_chinese(tmp_path, encoding, text):
    path = written(tmp_path, text, encoding)
    with pytest.raises(
        ValueError, match=r"talk\.tsv:2: not UTF-8: byte 0x.. at offset \d+"
    ) as said:
        read_dialogues(path)
    assert "--encoding=NAME" in str(said.value) and "\n" not in str(said.value)
    if encoding in ("cp1252", "euc_kr"):
        assert encoding in str(said.value)
    (dialogue,) = read_dialogues(path, encoding=encoding)
    assert [message.content for message in dialogue.messages] == [text] * 2


def test_utf16_is_read_by_its_mark_line_by_line_and_asked_for_without_one(tmp_path):
    # A character whose second byte is a line feed, and one whose first is.
    text = (
        '{"question": "头痛\u0a0d\u0d0a", "answer": "好"}\n{"question": "咳嗽", "answer": "好"}\n'
    )
    path = tmp_path / "talk.jsonl"
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        path.write_bytes(mark + text.encode(encoding))
        dialogues = list(read_dialogues(path))
        assert [one.messages[0].content for one in dialogues] == ["头痛\u0a0d\u0d0a", "咳嗽"]
    path.write_bytes(text.encode("utf-16-le"))
    with pytest.raises(ValueError, match="utf-16-le without a byte-order mark.*--encoding"):
        read_dialogues(path)
    assert len(list(read_dialogues(path, encoding="utf-16-le"))) == 2
    assert len(list(read_dialogues(path, encoding="utf-16"))) == 2


def test_late_lines_of_a_long_plain_file_are_evidence_too(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_bytes(b"plain text\n" * 500_000 + CHINESE.encode("gbk") + b"\n")
    assert choose_encoding(path) == "gb18030"


def test_a_utf8_file_with_one_wrong_byte_stays_utf8_with_one_fault(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_bytes(CHINESE.encode() + b"\xff" + CHINESE.encode())
    assert choose_encoding(path) == "utf-8"
    (line,) = read_lines(path)
    assert line.fault == f"not UTF-8: byte 0xff at offset {len(CHINESE.encode())} of the file"


@pytest.mark.parametrize("name", ["klingon", "base64", "rot13", "hex", "undefined", ""])
def test_an_encoding_that_is_none_of_text_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"encoding is '{name}'; it should be a text encoding"):
        checked_encoding(name)
    with pytest.raises(ValueError, match="encoding is"):
        read_dialogues(tmp_path, encoding=name)


def test_the_users_word_is_taken(tmp_path):
    path = written(tmp_path, "Rücken", "cp1252")
    assert choose_encoding(path, "Latin-1") == "iso8859-1"
    (dialogue,) = read_dialogues(path, encoding="latin-1")
    assert dialogue.messages[0].content == "Rücken"
    path = written(tmp_path, CHINESE, "gbk")
    assert choose_encoding(path, "utf8") == "utf-8"


def test_the_real_chinese_file_reads_as_gb18030(shared_data):
    path = shared_data / "1_sft_single_real" / "toyhom_internal_medicine.csv"
    assert choose_encoding(path) == "gb18030"
