"""Tokenizers and the other files beside a model's weights: loaded without remote code, exported.

Baichuan's tokenizer is Python code around a SentencePiece BPE model. It is rebuilt here, from the
model alone, as a `tokenizers` pipeline that gives the same ids, because an export must load in
transformers and vLLM from its own files only.
"""

import copy
import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Collection
from typing import Any

import huggingface_hub
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from huatuo_jax.core.files import as_path, copy_file, local_copy, make_folder, staged_folder
from huatuo_jax.hf import sentencepiece_bpe
from huatuo_jax.hf.config import read_json, write_json
from huatuo_jax.hf.generation_config import CONFIG_FILE, GENERATION_CONFIG_FILE, set_stop_token_ids

# The files of a tokenizer; an export has those that exist.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
TEMPLATE_FILES = "additional_chat_templates/*.jinja"  # further templates, exported too
# As patterns. A family's own code is copied and never run.
_MODEL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, "*.py")
_TOKENIZER_FILES = (*TOKENIZER_FILES, TEMPLATE_FILES)
SIDE_FILES = (*_MODEL_FILES, *_TOKENIZER_FILES)

# Frequent characters, which no normalization changes.
_PROBE = "患者今天发热咳嗽三天了我想问医生应该吃什么药好不是有人大的一在来上个国到年月"
_SPACE_BYTE = "\u0120"  # of byte-level vocabularies, which write every text

_NEW_PAD_TOKEN = "<|reward_pad|>"
_BAICHUAN_CLASS = re.compile("baichuantokenizer", re.IGNORECASE)
_SPARE_NAME = re.compile("(?<![a-z])(pad|reserved|unused)(?![a-z])", re.IGNORECASE)


def load_tokenizer(source: str | pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder or a hub id, never running remote code.

    A Baichuan tokenizer (or a bare `tokenizer.model`) comes as a `PreTrainedTokenizerFast` with
    SentencePiece's ids; special tokens in the text become theirs, as in Baichuan's own class.

    Any other one is read as transformers reads it, which may build another pipeline from the files
    than `tokenizer.json` describes.

    Raises:
        ValueError: The folder holds no tokenizer, a file is broken, a package is missing, the
            tokenizer exists only as remote code, the hub id cannot be reached, or the class that
            transformers takes loses text that the files can write.
    """
    folder = local_folder(source)
    tokenizer = _read(folder)
    if lost := _lost_characters(tokenizer, folder):
        model_type = _read_json(folder / CONFIG_FILE).get("model_type")
        named = _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
        raise ValueError(
            f"{folder}: transformers reads this tokenizer as {type(tokenizer).__name__}, which "
            f"loses characters that the files have tokens for ({lost[:8]!r}); one of config.json's "
            f"model_type={model_type!r} and tokenizer_config.json's tokenizer_class={named!r}, "
            "which choose that class, does not suit the files"
        )
    return tokenizer


def _read(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Loads a folder's tokenizer, of whatever class transformers takes."""
    if not holds_tokenizer(folder):
        wanted = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
        raise ValueError(f"{folder}: no tokenizer in this folder; it should hold {wanted}")
    if _needs_rebuilding(folder):
        return _load_sentencepiece(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer.encode(_PROBE)
    except Exception as error:  # tokenizers and transformers raise plain Exceptions for bad files
        raise ValueError(
            f"{folder}: cannot load the tokenizer (remote code is never run): {_one_line(error)}"
        ) from error
    return tokenizer


def _lost_characters(tokenizer: transformers.PreTrainedTokenizerBase, folder: pathlib.Path) -> str:
    """Returns the characters of a text that the tokenizer loses and its folder's files do not."""
    if (folder / "tokenizer.json").is_file():
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        kept = file.decode(file.encode(_PROBE, add_special_tokens=False).ids)
    elif (folder / "tokenizer.model").is_file():
        try:
            processor, _ = sentencepiece_bpe.read_model(folder / "tokenizer.model")
            kept = processor.decode(processor.encode(_PROBE))
        except ValueError:  # Of another algorithm, whose text only the class knows.
            kept = ""
    elif (folder / "vocab.json").is_file():
        vocabulary = read_json(folder / "vocab.json")
        kept = _PROBE if _SPACE_BYTE in vocabulary else "".join(vocabulary)
    else:
        kept = (folder / "vocab.txt").read_text(encoding="utf-8")
    said = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False))
    return "".join(one for one in dict.fromkeys(_PROBE) if one in kept and one not in said)


def save_tokenizer(
    tokenizer_or_source: transformers.PreTrainedTokenizerBase | str | os.PathLike[str],
    target: str | pathlib.Path,
) -> None:
    """Writes a tokenizer into an export folder, as unchanged files wherever that is possible.

    A folder or hub id, and a tokenizer that still equals the folder it was loaded from, are copied
    byte for byte. A tokenizer changed in memory is written as it is, a Baichuan tokenizer in the
    form that loads without remote code, with its original `tokenizer.model`.

    Raises:
        ValueError: As `load_tokenizer`.
    """
    target = as_path(target)
    make_folder(target)
    tokenizer: transformers.PreTrainedTokenizerBase
    if isinstance(tokenizer_or_source, str | os.PathLike):
        folder = local_folder(tokenizer_or_source)
        tokenizer = load_tokenizer(folder)  # also checks the folder before copying
        copied = not _needs_rebuilding(folder)
    else:
        tokenizer = tokenizer_or_source
        folder = pathlib.Path(tokenizer.name_or_path)
        copied = bool(tokenizer.name_or_path) and holds_tokenizer(folder)
        copied = copied and not _needs_rebuilding(folder) and equals_files(tokenizer, folder)
    if copied:
        copy_files(folder, target, _TOKENIZER_FILES)
        return
    save_loaded(tokenizer, target)
    copy_files(folder, target, ("tokenizer.model",))


def save_loaded(
    tokenizer: transformers.PreTrainedTokenizerBase, target: str | pathlib.Path
) -> None:
    """Writes a tokenizer as it is in memory, under a class that transformers 4 knows too."""
    with staged_folder(target) as folder:
        tokenizer.save_pretrained(folder)
        if tokenizer.is_fast and type(tokenizer).__name__ == "TokenizersBackend":
            # transformers 4, which many vLLM releases use, knows this class by its old name only.
            path = folder / "tokenizer_config.json"
            config = _read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            write_json(path, config)


def with_special_tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, tokens: Collection[str]
) -> transformers.PreTrainedTokenizerBase:
    """Makes tokens of a tokenizer's vocabulary special; returns it unchanged without any.

    Raises:
        ValueError: a token that it does not have.
    """
    if not tokens:
        return tokenizer
    known = tokenizer.get_vocab()
    if missing := sorted(set(tokens) - known.keys()):
        raise ValueError(f"tokenizer: has no token {missing[0]!r}")
    changed = copy.deepcopy(tokenizer)
    added = [AddedToken(text, normalized=False, special=True) for text in tokens]
    changed.add_tokens(added, special_tokens=True)
    assert {text: changed.convert_tokens_to_ids(text) for text in tokens} == {
        text: known[text] for text in tokens
    }
    return changed


def with_splits_before(
    tokenizer: transformers.PreTrainedTokenizerBase, marks: Collection[str]
) -> transformers.PreTrainedTokenizerBase:
    """Returns a fast tokenizer in which no token reaches over the start of one of these texts."""
    changed = copy.deepcopy(tokenizer)
    backend = changed.backend_tokenizer
    texts = "|".join(re.escape(mark) for mark in marks)
    steps = [pre_tokenizers.Split(Regex(texts), behavior="merged_with_next")]
    if backend.pre_tokenizer is not None:
        steps.append(backend.pre_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return changed


def loads_beside(tokenizer: transformers.PreTrainedTokenizerBase, model_type: str) -> bool:
    """Returns whether a written tokenizer loads as the same one beside a model of a type.

    Some types (such as `llama` and `qwen2`) have a class that may rebuild its pipeline.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_loaded(tokenizer, folder)
        config = json.dumps({"model_type": model_type})
        (folder / "config.json").write_text(config, encoding="utf-8")
        return equals_files(tokenizer, folder)


def set_chat_template(folder: pathlib.Path, source: str) -> None:
    """Makes a Jinja source the one chat template of a folder's tokenizer.

    It is written to `chat_template.jinja` and replaces one in `tokenizer_config.json`. Further
    templates of the tokenizer are removed, as the model was not trained with them.
    """
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    if "chat_template" in config:
        config["chat_template"] = source
        write_json(path, config)
    for other in (folder / "chat_template.json", *folder.glob(TEMPLATE_FILES)):
        other.unlink(missing_ok=True)


def check_fits(
    tokenizer: transformers.PreTrainedTokenizerBase, vocab_size: int, *, name: str
) -> None:
    """Raises ValueError if a text may hold a token that the model has no embedding for.

    A tokenizer may have ids past the embedding as long as no text becomes them: special tokens that
    neither open nor end a sequence, such as an added pad token. A template's own tokens are checked
    by `ChatTemplate.check_fits`.

    Args:
        tokenizer: the tokenizer.
        vocab_size: number of embedding rows.
        name: of the tokenizer, for the message.
    """
    beyond = [one for one in tokenizer.get_vocab().items() if one[1] >= vocab_size]
    if not beyond:
        return
    special = {str(one) for one in tokenizer.added_tokens_decoder.values() if one.special}
    special.update(tokenizer.all_special_tokens)
    opening = {*_ids_of_roles(tokenizer), *tokenizer.encode(""), tokenizer.unk_token_id}
    for token, token_id in sorted(beyond, key=lambda one: one[1]):
        # A special token of one character is text to the chat templates.
        if token_id in opening or token not in special or len(token) < 2:
            raise ValueError(
                f"{name} has {len(tokenizer)} tokens, more than the model's vocab_size="
                f"{vocab_size}: {token!r} has id {token_id} and may occur in a text"
            )


def spare_token_id(
    tokenizer: transformers.PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    used_ids: Collection[int] = (),
) -> int:
    """Finds an id that no text encodes to, to serve as the pad id of an exported reward model.

    transformers' sequence classification reads the score at the last id that is not pad, so pad
    must not occur in any real sequence. In order of preference: the tokenizer's own pad token; a
    special token named pad, reserved or unused; the unknown token where byte fallback keeps it
    out of text; the first embedding row past the tokenizer (the id that the next added token
    gets). Left out are `used_ids` (other end-of-turn ids, say), the tokens that open, end or
    separate sequences, and those that a chat template writes. As with any special token, a text
    that spells out the token's own name still encodes to it.

    Raises:
        ValueError: There is no such id below `vocab_size`, the number of embedding rows.
    """
    taken = set(used_ids) | _ids_in_use(tokenizer)
    named = [
        ("pad" not in str(token).lower(), token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and _SPARE_NAME.search(str(token).replace("_", " "))
    ]
    candidates = [tokenizer.pad_token_id, *(token_id for _, token_id in sorted(named))]
    candidates.append(tokenizer.unk_token_id)
    if max(tokenizer.get_vocab().values()) < len(tokenizer):  # no holes among the ids
        candidates.append(len(tokenizer))
    for token_id in candidates:
        if token_id is not None and token_id < vocab_size and token_id not in taken:
            return token_id
    raise ValueError(
        f"vocab_size={vocab_size}: the tokenizer has no spare id for padding (its {len(tokenizer)} "
        f"ids may all occur in text); export with at least {len(tokenizer) + 1} embedding rows"
    )


def set_pad_token(folder: pathlib.Path, pad_token_id: int) -> None:
    """Makes an id the pad token of an exported tokenizer.

    Args:
        folder: The export, whose tokenizer files are rewritten if they name another one.
        pad_token_id: From `spare_token_id`.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id == pad_token_id:
        return
    if pad_token_id == len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD_TOKEN})
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    assert tokenizer.pad_token_id == pad_token_id
    save_tokenizer(tokenizer, folder)


def _ids_in_use(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that any sequence may hold: delimiters, template tokens, unknown."""
    used = _ids_of_roles(tokenizer)
    used.update(tokenizer.encode(""))
    templates = tokenizer.chat_template or ""
    if isinstance(templates, dict):
        templates = "\n".join(templates.values())
    added = tokenizer.added_tokens_decoder
    used.update(token_id for token_id in added if str(added[token_id]) in templates)
    # Characters that no vocabulary holds: without bytes to fall back on they become unknown.
    used.update(tokenizer.encode("\U0010fffd \u0378", add_special_tokens=False))
    return used


def _ids_of_roles(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that open, end or separate sequences."""
    roles = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    roles += [tokenizer.sep_token_id, tokenizer.cls_token_id]
    return {token_id for token_id in roles if token_id is not None}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads an optional JSON object; a missing file is an empty one."""
    return read_json(path) if path.is_file() else {}


def local_folder(source: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder itself, or a local copy of the tokenizer files of a bucket or the hub.

    Raises:
        ValueError: it is neither a folder nor a hub id that can be reached.
    """
    patterns = [*TOKENIZER_FILES, TEMPLATE_FILES, "config.json"]
    if as_path(source).is_dir():
        return local_copy(source, patterns)
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: neither a local folder nor a hub id that can be reached from here "
            f"({type(error).__name__}); give the path of a downloaded model"
        ) from error


def holds_tokenizer(folder: pathlib.Path) -> bool:
    """Returns whether a folder has any file that a tokenizer can be loaded from."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def _needs_rebuilding(folder: pathlib.Path) -> bool:
    """Returns whether the tokenizer is Baichuan's remote code or SentencePiece without a class."""
    if not (folder / "tokenizer.model").is_file():
        return False
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    model_type = _read_json(folder / "config.json").get("model_type")
    classes = [tokenizer_config.get("tokenizer_class"), tokenizer_config.get("auto_map")]
    if _BAICHUAN_CLASS.search(json.dumps(classes)):
        return True
    unclaimed = model_type == "baichuan" or (model_type is None and not tokenizer_config)
    return unclaimed and not (folder / "tokenizer.json").is_file()


def equals_files(tokenizer: transformers.PreTrainedTokenizerBase, folder: pathlib.Path) -> bool:
    """Returns whether the tokenizer equals that of its folder."""

    def state(tokenizer: transformers.PreTrainedTokenizerBase) -> list[Any]:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
        pipeline |= {"padding": None, "truncation": None}  # left over from the last call
        added = {i: repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        sides = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
        roles = (tokenizer.special_tokens_map, tokenizer.chat_template)
        return [tokenizer.get_vocab(), pipeline, added, sides, roles]

    return state(tokenizer) == state(_read(folder))


def check_loads_as(
    tokenizer: transformers.PreTrainedTokenizerBase, folder: pathlib.Path, *, name: str
) -> None:
    """Raises ValueError if transformers would load a folder's tokenizer as another one.

    Beside a config.json of some model types (such as `qwen2`) it uses the class of that type,
    whatever `tokenizer_config.json` names.

    Args:
        tokenizer: the tokenizer that was written.
        folder: of the whole model.
        name: of the tokenizer, for the message.
    """
    if not equals_files(tokenizer, folder):
        model_type = _read_json(folder / "config.json").get("model_type")
        raise ValueError(
            f"{name}: this tokenizer is read as another one beside a model of type "
            f"{model_type!r}, whose own class transformers takes; choose a tokenizer of that type"
        )


def _load_sentencepiece(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    """Rebuilds a SentencePiece tokenizer with the special tokens and flags of its folder."""
    path = folder / "tokenizer.model"
    processor, proto = sentencepiece_bpe.read_model(path)
    config = _read_json(folder / "tokenizer_config.json")
    config |= _read_json(folder / "special_tokens_map.json")
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for role in ("bos", "eos", "unk", "pad"):
        piece_id = getattr(processor, f"{role}_id")()
        piece = processor.id_to_piece(piece_id) if piece_id >= 0 else None
        token = config.get(f"{role}_token", piece)
        text = token["content"] if isinstance(token, dict) else token  # older files hold a dict
        if text is not None:
            options[f"{role}_token"] = AddedToken(text, normalized=False, special=True)
    for flag in ("add_bos_token", "add_eos_token"):
        options[flag] = bool(config.get(flag, False))
    names = {"model_max_length", "padding_side", "chat_template"}
    options |= {name: config[name] for name in names.intersection(config)}
    if (folder / "chat_template.jinja").is_file():
        options["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    backend = sentencepiece_bpe.build(path, processor, proto)
    added = _read_json(folder / "added_tokens.json")
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(token_id)
    for text, token_id in sorted(added.items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        if backend.token_to_id(text) != token_id:
            raise ValueError(
                f"{folder}: added token {text!r} has id {token_id}, but the next free one is "
                f"{backend.token_to_id(text)}; added_tokens.json does not fit tokenizer.model"
            )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=str(folder), vocab_file=str(path), **options
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talk:
    """The tokenizer, chat template and stop ids to write beside a model's weights.

    Attributes:
        tokenizer: replaces the folder's; None keeps that.
        chat_template: Jinja, replaces the tokenizer's own; None keeps that.
        stop_token_ids: of an answer, for the configs; at least one.
        vocab_size: of the model.
    """

    tokenizer: transformers.PreTrainedTokenizerBase | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    vocab_size: int

    def write(self, folder: pathlib.Path) -> None:
        """Writes all of it into a folder that holds the tokenizer.

        Raises:
            ValueError: transformers would load the changed tokenizer as another one.
            OSError: a file cannot be read or written.
        """
        if self.tokenizer is not None:
            save_loaded(self.tokenizer, folder)
            check_loads_as(self.tokenizer, folder, name=str(folder))
        if self.chat_template is not None:
            set_chat_template(folder, self.chat_template)
        set_stop_token_ids(
            folder,
            self.stop_token_ids,
            load_tokenizer(folder),
            vocab_size=self.vocab_size,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideFiles:
    """The side files of a model and their sources.

    Attributes:
        model_folder: the source of the weights, and so of config, generation config and code. None
            for fresh weights, which have none.
        tokenizer_folder: the source of the tokenizer alone; None for `model_folder`.
        ignored_fields: fields of `config.json` that are left out.
        talk: replaces tokenizer, chat template and stop ids; None keeps those of the files.
    """

    model_folder: pathlib.Path | None = None
    tokenizer_folder: pathlib.Path | None = None
    ignored_fields: tuple[str, ...] = ()
    talk: Talk | None = None

    def write(self, target: pathlib.Path) -> None:
        """Writes them into a folder, unchanged unless a setting asks for a change.

        Raises:
            ValueError: a file is broken.
            OSError: a file cannot be read or written.
        """
        tokenizer_folder = self.tokenizer_folder or self.model_folder
        if self.model_folder is not None:
            copy_files(self.model_folder, target, _MODEL_FILES)
            drop_fields(target / CONFIG_FILE, self.ignored_fields)
        if tokenizer_folder is not None and tokenizer_folder == self.model_folder:
            copy_files(tokenizer_folder, target, _TOKENIZER_FILES)
        elif tokenizer_folder is not None:
            self._write_foreign_tokenizer(tokenizer_folder, target)
        if self.talk is not None:
            self.talk.write(target)

    def _write_foreign_tokenizer(self, folder: pathlib.Path, target: pathlib.Path) -> None:
        """Writes the tokenizer of another folder so that it loads as the same one here.

        The class of a tokenizer may be named only in its folder's config.json, which is not copied.
        """
        save_tokenizer(folder, target)
        wanted = load_tokenizer(folder)
        if equals_files(wanted, target):
            return
        for pattern in _TOKENIZER_FILES:
            for path in target.glob(pattern):
                path.unlink()
        save_loaded(wanted, target)
        check_loads_as(wanted, target, name=str(folder))


def copy_files(folder: pathlib.Path, target: pathlib.Path, patterns: tuple[str, ...]) -> None:
    """Copies the files of these patterns that a folder has, byte for byte."""
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        place = target / path.relative_to(folder)
        make_folder(place.parent)
        if path.resolve() != place.resolve():
            copy_file(path, place)


def drop_fields(path: pathlib.Path, names: tuple[str, ...]) -> None:
    """Removes fields from a JSON file; without them the file stays as it is."""
    if not names or not path.is_file():
        return
    config = read_json(path)
    kept = {name: value for name, value in config.items() if name not in names}
    if kept != config:
        write_json(path, kept)
