import random

import pytest

from huatuo_jax.data.text import choose_encoding, read_lines

SENTENCES = [
    "患者：您好，我最近三天一直头痛，伴有轻微恶心。",
    "医生：请问体温多少？有没有量过血压？",
    "患者：三十七度八，血压没有量。",
    "医生：建议先多休息，多喝水，如果高烧不退请到医院就诊。",
]


def written(tmp_path, data):
    path = tmp_path / "talk.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("encoding", "told"),
    [("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("gb18030", "gb18030"), ("gbk", "gb18030")],
)
def test_encodings_are_told_apart_and_decoded(tmp_path, encoding, told):
    path = written(tmp_path, "\r\n".join(SENTENCES).encode(encoding))
    assert choose_encoding(path) == told
    lines = list(read_lines(path))
    assert [line.text.rstrip("\r\n") for line in lines] == SENTENCES
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert all(line.fault is None for line in lines)


def test_rare_characters_of_four_bytes_survive_gb18030(tmp_path):
    path = written(tmp_path, ("药名：𫄧䶮\n" + SENTENCES[0]).encode("gb18030"))
    assert next(iter(read_lines(path))).text == "药名：𫄧䶮\n"


def test_plain_ascii_is_utf8(tmp_path):
    assert choose_encoding(written(tmp_path, b"cough\n")) == "utf-8"


@pytest.mark.parametrize(("main", "stray"), [("utf-8", "gb18030"), ("gb18030", "utf-8")])
def test_a_line_in_another_encoding_is_a_fault_and_the_others_read(tmp_path, main, stray):
    encoded = [sentence.encode(main) for sentence in SENTENCES]
    encoded[2] = SENTENCES[2].encode(stray)
    lines = list(read_lines(written(tmp_path, b"\n".join(encoded))))
    assert [bool(line.fault) for line in lines] == [False, False, True, False]
    assert [lines[i].text.rstrip("\n") for i in (0, 1, 3)] == [SENTENCES[i] for i in (0, 1, 3)]


def test_utf8_that_would_decode_as_gb18030_nonsense_is_noticed(tmp_path):
    stray = "头痛咳嗽发烧恶心乏力".encode()
    assert "头痛" not in stray.decode("gb18030")
    data = b"\n".join([*(sentence.encode("gb18030") for sentence in SENTENCES), stray])
    faults = [line.fault for line in read_lines(written(tmp_path, data))]
    assert faults == [None] * 4 + ["UTF-8 text in a file that is otherwise GB18030"]


def test_a_fault_names_the_byte_and_its_offset_in_the_file(tmp_path):
    good = (SENTENCES[0] + "\n").encode()
    data = b"\xef\xbb\xbf" + good + "头".encode() + b"\xff" + SENTENCES[1].encode() + b"\n" + good
    faults = [line.fault for line in read_lines(written(tmp_path, data)) if line.fault]
    place = data.index(b"\xff")
    assert faults == [f"not UTF-8: byte 0xff at offset {place} of the file"]


def test_a_file_in_no_encoding_for_certain_gives_file_line_and_offset(tmp_path):
    generator = random.Random(0)
    noise = bytes(generator.randrange(128, 256) for _ in range(4000))
    path = written(tmp_path, b"plain\n" + noise)
    with pytest.raises(
        ValueError, match=r"talk\.txt:2: not UTF-8: byte 0x.. at offset \d+ .*--enc"
    ):
        choose_encoding(path)
