"""Rebuilt tokenizers give SentencePiece's ids, exports load unchanged, spare ids are spare."""

import builtins
import io
import json
import random

import pytest
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2

from huatuo_jax.hf.tokenizer import TOKENIZER_FILES, load_tokenizer, save_tokenizer, spare_token_id
from tests.tiny import byte_level_tokenizer

CORPUS = [
    "医生您好，我最近三天一直咳嗽，晚上睡不好，需要做什么检查？",
    "您好，咳嗽三天伴有发热38.5度，建议先查血常规和胸片，再决定用药。",
    "孩子今年7岁，身高120厘米，体重23公斤，饭后肚子疼，怎么办呢？",
    "先观察大便情况，清淡饮食，多喝温水；如果疼痛加重，请及时到医院就诊。",
    "The patient reports chest pain after climbing 3 flights of stairs.",
    "Take one tablet twice a day, and come back if the fever does not go down.",
    "高血压患者每天食盐不超过5克，血压控制在140/90以下，定期复查肾功能。",
    "谢谢医生--我会按时吃药的->下周再来复查。    四个空格   三个空格",
    "www.example.org aaaa aaaaaaa ---- ---> =-=-=-= 哈哈哈哈哈哈 banana",
]
TEXTS = [
    *CORPUS,
    *["", " ", "  ", "a", " a", "  a  b   c ", "血压 140 / 90", "\n", "\n\n 咳嗽\n", "\t\t药\t"],
    *["，。！？：；（）《》", "Ａ１２３", "😀👩\u200d👩\u200d👧", "龘𠮷𪚥鱻", "\u200b零宽"],
    *["\u3000全角空格", "a\u0000b", "1\r\n\r\n2"],
    *["▁", "▁▁a", "<0x0A>", "x<0x0A>", "<sep>", "<sep>咳嗽<sep><sep>\n7", "<se", "<ctl>", "-->-->"],
    *["aaaaa", "aaaaaaaaaaaaa", "-----", "-->>--", "wwwww.wwwwww", "007 38.50", "。。。。。。。"],
]
IDENTITY = {"normalization_rule_name": "identity"}
KEEP_SPACES = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
SETTINGS = {
    "baichuan": IDENTITY | KEEP_SPACES | {"add_dummy_prefix": False, "split_digits": True},
    "llama": IDENTITY | KEEP_SPACES,
    "extra spaces removed": IDENTITY,
    "one long word": IDENTITY | KEEP_SPACES | {"split_by_whitespace": False},
    "user symbols": IDENTITY
    | KEEP_SPACES
    | {"user_defined_symbols": ["<sep>", "\n", "7", "，", "-->"], "control_symbols": ["<ctl>"]},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nmt_nfkc, spaces kept": {"normalization_rule_name": "nmt_nfkc"} | KEEP_SPACES,
    "no byte fallback": IDENTITY | KEEP_SPACES | {"byte_fallback": False},
}


def train(**settings):
    options = {"byte_fallback": True, "vocab_size": 640, "model_type": "bpe", "minloglevel": 2}
    options |= {"hard_vocab_limit": False, "character_coverage": 1.0} | settings
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, **options
    )
    return model.getvalue()


@pytest.fixture
def baichuan(tmp_path):
    """A folder as Baichuan-7B's hub page has it, without the remote code that it names."""
    folder = tmp_path / "baichuan"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train(**SETTINGS["baichuan"]))
    (folder / "config.json").write_text('{"model_type": "baichuan"}')
    token = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": True}
    config = {
        "tokenizer_class": "BaiChuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 4096,
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "unk_token": token | {"content": "<unk>"},
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bare_folder(tmp_path, model):
    folder = tmp_path / "bare"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


def byte_level(tmp_path, *, template=None, **special):
    """A byte-level tokenizer as Qwen's and LLaMA-3's are, with the given special tokens."""
    fast = byte_level_tokenizer(CORPUS, vocab_size=400, **special)
    fast.chat_template = template
    folder = tmp_path / "byte_level"
    fast.save_pretrained(folder)
    return folder


def random_texts(*, num, seed):
    rng = random.Random(seed)
    alphabet = [*"ab->=w.7， \n\t▁哈药😀龘", "  ", "aa", "医生", "<sep>", "an", "<0x41>", "the"]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 16))) for _ in range(num)]


def differences(tokenizer, processor, texts):
    """Texts whose ids, or whose text decoded from the ids, are not SentencePiece's."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    expected = processor.encode(texts)
    return [
        text
        for text, one, other in zip(texts, ids, expected, strict=True)
        if one != other
        or (processor.unk_id() not in one and tokenizer.decode(one) != processor.decode(one))
    ]


@pytest.mark.parametrize("setting", SETTINGS)
def test_rebuilt_tokenizer_gives_the_ids_and_the_text_of_sentencepiece(setting, tmp_path):
    model = train(**SETTINGS[setting])
    tokenizer = load_tokenizer(bare_folder(tmp_path, model))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = TEXTS + random_texts(num=3000, seed=0)
    assert differences(tokenizer, processor, texts) == []
    assert len(tokenizer) == processor.get_piece_size()


def test_special_tokens_in_text_become_their_ids_and_the_rest_is_encoded_piecewise(baichuan):
    tokenizer = load_tokenizer(baichuan)
    processor = sentencepiece.SentencePieceProcessor(str(baichuan / "tokenizer.model"))
    expected = [*processor.encode("您好。"), 2, 1, *processor.encode(" 咳嗽")]
    assert tokenizer.encode("您好。</s><s> 咳嗽", add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == "您好。</s><s> 咳嗽"
    assert tokenizer.decode(expected, skip_special_tokens=True) == "您好。 咳嗽"


def test_combining_mark_after_a_mapped_character_is_the_known_difference(tmp_path):
    model = train(**SETTINGS["nmt_nfkc"])
    tokenizer = load_tokenizer(bare_folder(tmp_path, model))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = ["Ａ", "e\u0301", "か\u3099", "1\r\n2", "①②ﬁ", "Ａ\u0300"]
    assert differences(tokenizer, processor, texts) == ["Ａ\u0300"]


def with_pieces(model, scores):
    """The model with more pieces, as a hand-edited vocabulary has them."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    old = {piece.piece: piece for piece in proto.pieces}
    for text, score in scores.items():
        piece = old[text] if text in old else proto.pieces.add(piece=text)
        piece.score = score
    return proto.SerializeToString()


def test_overlapping_pieces_of_one_score_merge_from_the_left(tmp_path):
    scores = {"--": -1.0, "->": -2.0, "-->": 0.0, "---": 0.0, "aa": 0.0, "aaa": -9.0}
    scores |= {"疼咳": -5.0, "药疼": -5.0}  # the right one has the lower id
    model = with_pieces(train(**SETTINGS["baichuan"]), scores)
    tokenizer = load_tokenizer(bare_folder(tmp_path, model))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(1)
    texts = ["".join(rng.choices(of, k=rng.randint(2, 30))) for of in ("->", "a", "药疼咳") * 300]
    assert differences(tokenizer, processor, texts) == []


def test_pieces_of_one_score_that_overlap_both_ways_are_refused(tmp_path):
    model = with_pieces(train(**SETTINGS["baichuan"]), {"-=": 0.0, "=-": 0.0})
    with pytest.raises(ValueError, match="overlapping pieces of score -?0.0"):
        load_tokenizer(bare_folder(tmp_path, model))


def test_baichuan_export_loads_as_llama_without_remote_code(baichuan, tmp_path):
    target = tmp_path / "export"
    save_tokenizer(baichuan, target)
    (target / "config.json").write_text('{"model_type": "llama", "vocab_size": 640}')
    loaded = transformers.AutoTokenizer.from_pretrained(target)
    original = load_tokenizer(baichuan)
    processor = sentencepiece.SentencePieceProcessor(str(baichuan / "tokenizer.model"))
    assert differences(loaded, processor, TEXTS + random_texts(num=500, seed=2)) == []
    assert loaded.special_tokens_map == original.special_tokens_map
    assert loaded.encode("咳嗽") == processor.encode("咳嗽")  # no start token by itself
    assert loaded.model_max_length == 4096 and loaded.pad_token is None
    assert (target / "tokenizer.model").read_bytes() == (baichuan / "tokenizer.model").read_bytes()
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config
    assert str(tmp_path) not in (target / "tokenizer_config.json").read_text()
    again = tmp_path / "again"
    save_tokenizer(load_tokenizer(target), again)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (again / name).read_bytes() == (target / name).read_bytes()


def test_start_token_flag_added_tokens_and_template_survive_the_export(baichuan, tmp_path):
    config = json.loads((baichuan / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": True, "chat_template": "{{ messages[0]['content'] }}"}
    (baichuan / "tokenizer_config.json").write_text(json.dumps(config))
    size = sentencepiece.SentencePieceProcessor(str(baichuan / "tokenizer.model")).vocab_size()
    (baichuan / "added_tokens.json").write_text(json.dumps({"<|user|>": size, "<|bot|>": size + 1}))
    save_tokenizer(load_tokenizer(baichuan), tmp_path / "export")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert loaded.encode("<|bot|><|user|>") == [1, size + 1, size]
    message = [{"role": "user", "content": "咳嗽"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "咳嗽"
    (baichuan / "added_tokens.json").write_text(json.dumps({"<|user|>": size + 5}))
    with pytest.raises(ValueError, match="added_tokens.json does not fit"):
        load_tokenizer(baichuan)


def test_export_of_an_ordinary_folder_is_its_files_byte_for_byte(tmp_path):
    source = byte_level(tmp_path, eos_token="<|end|>", template="{{ messages }}")
    (source / "special_tokens_map.json").write_text('{ "eos_token":   "<|end|>" }\n')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (source / "model.safetensors").write_bytes(b"weights")
    tokenizer = load_tokenizer(source)
    tokenizer("长一点的文本", truncation=True, max_length=4)  # leaves its settings in the pipeline
    for number, what in enumerate((source, str(source), tokenizer)):
        target = tmp_path / f"export{number}"
        save_tokenizer(what, target)
        written = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        expected = {name for name in TOKENIZER_FILES if (source / name).is_file()}
        assert written == expected | {"additional_chat_templates/tool.jinja"}
        for name in written:
            assert (target / name).read_bytes() == (source / name).read_bytes()


def test_tokenizer_changed_in_memory_is_written_as_it_stands(tmp_path):
    source = byte_level(tmp_path, eos_token="<|end|>")
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"pad_token": "<|reward_pad|>"})
    save_tokenizer(tokenizer, tmp_path / "export")
    loaded = load_tokenizer(tmp_path / "export")
    assert loaded.pad_token == "<|reward_pad|>" and load_tokenizer(source).pad_token is None


def test_folder_with_tokenizer_json_alone_loads(tmp_path):
    source = byte_level(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    assert load_tokenizer(source).decode(load_tokenizer(source).encode("血压😀")) == "血压😀"


def test_what_cannot_be_loaded_says_so_in_one_line(baichuan, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "tokenizer.model").write_bytes(b"")
    auto_map = {"auto_map": {"AutoTokenizer": ["code.OtherTokenizer", None]}}
    (remote / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (remote / "config.json").write_text('{"model_type": "other"}')
    cases = [
        (empty, "no tokenizer in this folder"),
        (damaged, "cannot load the tokenizer"),
        (remote, "remote code is never run"),
        ("nobody/no-such-model", "neither a local folder nor a hub id that can be reached"),
        (tmp_path / "missing", "neither a local folder nor a hub id that can be reached"),
        (bare_folder(tmp_path, b""), "not a SentencePiece model"),
    ]
    for source, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value)
    for model in (b"\x00broken", train(**SETTINGS["llama"])[:-7]):
        with pytest.raises(ValueError, match="not a SentencePiece model, or a damaged one"):
            load_tokenizer(bare_folder(tmp_path, model))
    with pytest.raises(ValueError, match="this model is not BPE"):
        load_tokenizer(bare_folder(tmp_path, train(model_type="unigram", vocab_size=450)))

    real_import = builtins.__import__

    def without_sentencepiece(name, *arguments, **options):
        if name == "sentencepiece":
            raise ModuleNotFoundError("No module named 'sentencepiece'", name=name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_sentencepiece)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        load_tokenizer(baichuan)


def test_spare_id_of_llama_and_mistral_is_the_unknown_token_that_bytes_keep_out(baichuan):
    tokenizer = load_tokenizer(baichuan)
    assert spare_token_id(tokenizer, 640) == 0
    assert all(0 not in ids for ids in tokenizer(random_texts(num=500, seed=3))["input_ids"])


def test_unknown_token_is_not_spare_without_byte_fallback(tmp_path):
    model = train(**SETTINGS["no byte fallback"])
    tokenizer = load_tokenizer(bare_folder(tmp_path, model))
    tokenizer.pad_token = "<unk>"
    assert tokenizer.unk_token_id in tokenizer.encode("龘")
    size = len(tokenizer)
    assert spare_token_id(tokenizer, size + 1) == size
    with pytest.raises(ValueError, match=f"at least {size + 1} embedding rows"):
        spare_token_id(tokenizer, size)


def test_spare_id_is_the_pad_token_unless_it_ends_text(tmp_path):
    bloom = byte_level(tmp_path, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    bloom = load_tokenizer(bloom)
    assert spare_token_id(bloom, len(bloom)) == bloom.pad_token_id
    end = "<|endoftext|>"
    turns = ["<|im_start|>", "<|im_end|>"]
    chat = byte_level(
        tmp_path, pad_token=end, eos_token="<|im_end|>", extra_special_tokens=turns[:1]
    )
    assert spare_token_id(load_tokenizer(chat), 500) == load_tokenizer(chat).pad_token_id
    base = load_tokenizer(
        byte_level(tmp_path, pad_token=end, eos_token=end, extra_special_tokens=turns)
    )
    assert spare_token_id(base, 500) == len(base)  # an unnamed row; turn markers are in prompts
    with pytest.raises(ValueError, match="no spare id for padding"):
        spare_token_id(base, len(base))
    assert base.add_special_tokens({"pad_token": "<|spare|>"}) == 1
    assert base.pad_token_id == spare_token_id(base, 500) == len(base) - 1


def test_spare_id_takes_a_reserved_token_that_no_template_writes(tmp_path):
    names = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|notepad|>"]
    tokenizer = load_tokenizer(
        byte_level(
            tmp_path,
            eos_token="<|end|>",
            extra_special_tokens=names,
            template="<|reserved_special_token_0|>{{ messages[0]['content'] }}",
        )
    )
    second = tokenizer.convert_tokens_to_ids(names[1])
    assert spare_token_id(tokenizer, 500) == second
    assert spare_token_id(tokenizer, 500, used_ids=[second]) == len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|right_pad_id|>"]})
    assert spare_token_id(tokenizer, 500) == tokenizer.convert_tokens_to_ids("<|right_pad_id|>")


def texts_of(shared_data):
    """A few thousand real strings of every file kind, lines and whole records alike."""
    texts = []
    for path in sorted(shared_data.rglob("*")):
        if path.suffix in {".csv", ".json", ".jsonl", ".txt"}:
            encoding = "gb18030" if path.name.startswith("toyhom") else "utf-8"
            lines = path.read_text(encoding=encoding).splitlines()
            texts += lines[:: max(1, len(lines) // 40)][:40]
            texts.append("\n".join(lines[:20]))
    return [text[:2000] for text in texts]


def test_real_baichuan_vocabulary_differs_on_no_real_text(shared_data):
    folder = shared_data / "tokenizers" / "baichuan_rebuilt"
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    texts = texts_of(shared_data)
    assert len(texts) > 2000
    assert differences(tokenizer, processor, texts + random_texts(num=2000, seed=4)) == []
    assert spare_token_id(tokenizer, 64000) == 0


@pytest.mark.parametrize("prefix", [pytest.param(False, marks=pytest.mark.slow), True])
def test_real_baichuan_vocabulary_with_user_symbols_differs_on_no_real_text(
    prefix, shared_data, tmp_path
):
    # Tags, digits and punctuation lead the vocabulary: pieces that training takes as symbols.
    path = shared_data / "tokenizers" / "baichuan_rebuilt" / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = prefix
    for piece in proto.pieces[3:393]:
        if piece.type == piece.NORMAL:
            piece.type = piece.USER_DEFINED
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = load_tokenizer(bare_folder(tmp_path, proto.SerializeToString()))
    texts = [*texts_of(shared_data)[::3], "<h2/>", "-->a<!---->", "```\n\n", "<reserved_7>"]
    assert differences(tokenizer, processor, texts) == []


def test_real_ordinary_tokenizers_load_and_have_spare_ids(shared_data):
    qwen = load_tokenizer(shared_data / "tokenizers" / "qwen2.5")
    assert spare_token_id(qwen, 152064) == qwen.pad_token_id == 151643
    qwen.eos_token = qwen.pad_token
    assert spare_token_id(qwen, 152064) == len(qwen)
    small = load_tokenizer(shared_data / "tokenizers" / "minimind_6400")
    assert small.decode(small.encode("血压😀", add_special_tokens=False)) == "血压😀"


def spaced_tokenizer(folder):
    """A tokenizer.json with SentencePiece's way of spaces and bytes, which Qwen2's class lacks."""
    (folder / "tokenizer.model").write_bytes(train(**SETTINGS["llama"]))
    load_tokenizer(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()


def sentencepiece_model(folder):
    (folder / "tokenizer.model").write_bytes(train(**SETTINGS["llama"]))


def byte_level_vocabulary(folder):
    byte_level_tokenizer(CORPUS, vocab_size=400).backend_tokenizer.model.save(str(folder))


def vocabulary_of_words(folder):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *sorted(set("".join(CORPUS)))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "model_type", "class_name", "loaded"),
    [
        (spaced_tokenizer, "qwen2", None, "Qwen2Tokenizer"),
        (spaced_tokenizer, "qwen2", "LlamaTokenizer", "Qwen2Tokenizer"),
        (spaced_tokenizer, None, "Qwen2Tokenizer", "Qwen2Tokenizer"),
        (spaced_tokenizer, "gpt2", None, "GPT2Tokenizer"),
        (sentencepiece_model, "qwen2", "LlamaTokenizer", "Qwen2Tokenizer"),
        (byte_level_vocabulary, "llama", "LlamaTokenizer", "LlamaTokenizer"),
        (byte_level_vocabulary, "gemma", None, "GemmaTokenizer"),
        (vocabulary_of_words, "qwen2", "BertTokenizer", "Qwen2Tokenizer"),
    ],
)
def test_a_tokenizer_whose_class_loses_text_of_its_files_is_refused(
    files, model_type, class_name, loaded, tmp_path
):
    files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    for part in (
        f"reads this tokenizer as {loaded}, which loses characters that the files have tokens for",
        f"model_type={model_type!r}",
        f"tokenizer_class={class_name!r}",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("files", "model_type", "class_name"),
    [
        (spaced_tokenizer, "llama", "LlamaTokenizer"),
        (spaced_tokenizer, "qwen3", "PreTrainedTokenizerFast"),
        (sentencepiece_model, "llama", "LlamaTokenizer"),
        (byte_level_vocabulary, "qwen2", None),
        (vocabulary_of_words, "bert", None),  # "今" and others are not in the vocabulary
    ],
)
def test_a_tokenizer_whose_class_suits_its_files_keeps_their_text(
    files, model_type, class_name, tmp_path
):
    files(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": class_name}))
    tokenizer = load_tokenizer(tmp_path)
    said = tokenizer.decode(tokenizer.encode("医生您好，咳嗽三天", add_special_tokens=False))
    assert "".join(said.split()) == "医生您好，咳嗽三天"


def test_a_tokenizer_that_cannot_encode_is_refused_with_one_line(tmp_path):
    byte_level(tmp_path)
    config = {"tokenizer_class": "BertTokenizer"}
    (tmp_path / "byte_level" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot load the tokenizer .*: WordPiece error: Missing"):
        load_tokenizer(tmp_path / "byte_level")
