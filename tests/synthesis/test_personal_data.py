"""Personal data is masked, and medical text is not."""

import csv
import json
from collections import Counter

import pytest

from huatuo_jax.synthesis.personal_data import PERSONAL_KINDS, find_personal_data, mask
from tests.synthesis import made_up_people


def measured(count):
    """Pieces to be masked, masked whole, and masks, by kind; and masks where nothing is."""
    wanted, right, masks, wrong = Counter(), Counter(), Counter(), []
    for text, kind, piece in made_up_people.made_up(count):
        found = find_personal_data(text)
        masks.update(one.kind for one in found)
        hit = False
        if kind is not None:
            wanted[kind] += 1
            start = text.index(piece)
            hit = any(
                one.kind == kind and one.start <= start and one.end >= start + len(piece)
                for one in found
            )
            right[kind] += hit
        wrong += [text] * (len(found) - hit)
    return wanted, right, masks, wrong


def test_recall_and_precision_on_made_up_people():
    wanted, right, masks, wrong = measured(4_000)
    recall = sum(right.values()) / sum(wanted.values())
    precision = sum(right.values()) / sum(masks.values())
    print(f"recall {recall:.4f}, precision {precision:.4f}")
    for kind in PERSONAL_KINDS:
        print(f"{kind}: recall {right[kind] / wanted[kind]:.4f} of {wanted[kind]}")
        assert right[kind] >= 0.97 * wanted[kind], kind
    assert recall >= 0.99
    assert precision >= 0.99, wrong[:5]


@pytest.mark.parametrize("text", made_up_people.CLEAN)
def test_medical_text_is_left_as_it_is(text):
    assert mask(text).text == text


def test_each_piece_is_replaced_by_its_kind_and_counted():
    masked = mask("我叫李明，电话13812345678，手机 １３９-8765-4321，身份证110101199003074610。")
    assert masked.text == "我叫[姓名]，电话[电话]，手机 [电话]，身份证[证件号]。"
    assert masked.counts == {"name": 1, "phone": 2, "id_number": 1}


def test_english_text_gets_english_masks():
    masked = mask("My name is John Smith, phone (415) 555-0123, I live at 12 Baker Street.")
    assert masked.text == "My name is [name], phone [phone], I live at [address]."


def test_masking_again_changes_nothing():
    for text, _, _ in made_up_people.made_up(300, seed=3):
        once = mask(text).text
        assert mask(once) == (once, {})


def test_real_consultations_lose_little_to_masks(shared_data):
    """They hold hardly any personal data: nearly all masks would be mistakes."""
    path = shared_data / "1_sft_single_real" / "toyhom_internal_medicine.csv"
    with path.open(encoding="gb18030", newline="") as file:
        texts = [" ".join(row) for row in csv.reader(file)]
    path = shared_data / "2_sft_multi_real" / "CMtMedQA_test.json"
    texts += [json.dumps(row, ensure_ascii=False) for row in json.loads(path.read_bytes())]
    masked = sum(bool(find_personal_data(text)) for text in texts)
    assert masked <= 0.005 * len(texts)
