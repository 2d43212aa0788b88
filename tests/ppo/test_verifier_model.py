"""A classifier of two labels in Hugging Face format tells what is right, as in transformers."""

import pytest
import torch
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.clinic.files import TOKENIZER
from huatuo_jax.hf.tokenizer import load_tokenizer, save_tokenizer
from huatuo_jax.ppo.models import open_verifier
from huatuo_jax.reward_functions.graded import classified
from tests.hf.tiny_checkpoints import edit_config, scatter
from tests.tiny import one_device

TEXTS = ["咳嗽三天了。", "头痛，发烧，三天没有吃饭。", "好。"]


def save_classifier(folder, tokenizer, *, num_labels=2):
    """A model of random weights with its tokenizer, as transformers saves it."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
    )
    scatter(transformers.LlamaForSequenceClassification(config)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def classifier(tmp_path, tokenizer):
    save_classifier(tmp_path, tokenizer)
    return tmp_path


@pytest.mark.parametrize("end_is_padding", [False, True])
def test_its_probability_is_the_softmax_of_the_second_label(classifier, tokenizer, end_is_padding):
    if end_is_padding:
        edit_config(classifier, pad_token_id=tokenizer.eos_token_id)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    expected = []
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            expected.append(float(torch.softmax(model(ids).logits, dim=-1)[0, 1]))
    assert max(expected) - min(expected) > 0.1
    verifier = open_verifier(str(classifier)).open(ComputeConfig(), one_device())
    assert verifier.probabilities(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert verifier.probabilities([*TEXTS, "咳" * 600])[-1] is None


def test_it_rewards_by_its_threshold(classifier):
    verifier = open_verifier(str(classifier)).open(ComputeConfig(), one_device())
    given = {"verifier": verifier, "reference": ["感冒"] * 3, "form": "any"}
    low, high = (classified([None] * 3, TEXTS, threshold=one, **given) for one in (0.0, 1.0))
    assert low == [1.0] * 3 and high == [0.1] * 3


def test_a_classifier_of_three_labels_is_refused(tmp_path, tokenizer):
    save_classifier(tmp_path, tokenizer, num_labels=3)
    with pytest.raises(ValueError, match="has 1 or 2 labels, this has 3"):
        open_verifier(str(tmp_path))
