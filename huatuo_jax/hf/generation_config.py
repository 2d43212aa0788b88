"""Stop ids and sampling settings in a model folder's configs, read and written."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from huatuo_jax.hf.config import read_json, write_json

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_FIELD = "eos_token_id"
_TOKEN_FIELDS = ("bos_token_id", _FIELD, "pad_token_id")
# Fields of a generation config (and of a model's config) that do not affect the answers.
_NOT_OF_ANSWERS = frozenset(
    """_from_model_config output_attentions output_hidden_states return_dict_in_generate
    transformers_version use_cache""".split()
)


def stop_token_ids(
    folder: pathlib.Path | None,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    of_template: Sequence[int],
    vocab_size: int,
) -> tuple[int, ...]:
    """Returns the ids that end a model's answers, in training and in generation.

    They are the chat template's, the tokenizer's EOS, and those of the model's folder:
    `eos_token_id` of its `generation_config.json` or, as in transformers, of its `config.json` if
    there is no such file.

    Args:
        folder: the model's, of either form; None for fresh weights.
        tokenizer: the model's.
        of_template: the chat template's own, the end of a turn first.
        vocab_size: of the model.

    Raises:
        ValueError: an id lies outside of the vocabulary, or the folder's field holds no ids.
    """
    found = [(int(one), "the chat template's end of turn") for one in of_template]
    if tokenizer.eos_token_id is not None:
        found.append((int(tokenizer.eos_token_id), "the tokenizer's EOS"))
    if folder is not None:
        path = _file_of_ids(folder)
        found += [(one, f"{path}: {_FIELD}") for one in ids_in(path)]
    for token_id, place in found:
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{place} is {token_id}, and the model's vocabulary is 0 to {vocab_size - 1}"
            )
    return tuple(dict.fromkeys(token_id for token_id, _ in found))


def set_stop_token_ids(
    folder: pathlib.Path,
    stop_ids: Sequence[int],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    vocab_size: int,
) -> None:
    """Writes the stop ids into a folder's configs, for transformers and vLLM.

    `generation_config.json` is made if it is missing, `config.json` only changed. Besides the stop
    ids they get BOS, and the pad id: the tokenizer's, else the one they had, else the first stop
    id, which transformers pads with.

    Args:
        folder: of a model.
        stop_ids: at least one, the template's own first.
        tokenizer: the model's.
        vocab_size: of the model; a pad id beyond it is not written.
    """
    for name in (CONFIG_FILE, GENERATION_CONFIG_FILE):
        path = folder / name
        if name == CONFIG_FILE and not path.is_file():
            continue
        config = read_json(path) if path.is_file() else {}
        # With this field transformers would replace the file by one made from config.json.
        config.pop("_from_model_config", None)
        config |= _token_fields(config, stop_ids, tokenizer, vocab_size)
        write_json(path, config)


def set_sampling(
    folder: pathlib.Path,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    vocab_size: int,
) -> None:
    """Writes the default sampling settings, in place of the source's.

    In `generation_config.json` the ids stay, and fields that transformers does not know, which a
    family's own code may read. All other fields that affect the answers (penalties, beams, forced
    tokens) are removed, there and in `config.json`, as they belong to the source.

    Args:
        folder: of a model.
        temperature: 0 for the best token.
        top_p: 1 for all tokens.
        top_k: 0 for all tokens, written as the size of the vocabulary: SGLang refuses 0 and
            transformers -1, and without the field transformers takes 50.
        max_new_tokens: of an answer at most.
        vocab_size: of the model.
    """
    known = set(transformers.GenerationConfig().to_dict()) - {*_TOKEN_FIELDS, *_NOT_OF_ANSWERS}
    for name in (CONFIG_FILE, GENERATION_CONFIG_FILE):
        path = folder / name
        given = read_json(path) if path.is_file() else {}
        kept = {field: value for field, value in given.items() if field not in known}
        if name == GENERATION_CONFIG_FILE:
            kept |= {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
            if temperature > 0:
                kept |= {"temperature": temperature, "top_p": top_p, "top_k": top_k or vocab_size}
        if kept != given:
            write_json(path, kept)


def token_fields_of(folder: pathlib.Path | None) -> dict[str, Any]:
    """Returns BOS, stop ids and pad of `generation_config.json`, for a new config.json.

    Missing ones are null, since a config class of transformers has ids of its own; empty if there
    is no such file.
    """
    if folder is None or not (folder / GENERATION_CONFIG_FILE).is_file():
        return {}
    config = read_json(folder / GENERATION_CONFIG_FILE)
    return {name: config.get(name) for name in _TOKEN_FIELDS}


def _token_fields(
    config: Mapping[str, Any],
    stop_ids: Sequence[int],
    tokenizer: transformers.PreTrainedTokenizerBase,
    vocab_size: int,
) -> dict[str, Any]:
    fields: dict[str, Any] = {_FIELD: stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)}
    if tokenizer.bos_token_id is not None:
        fields["bos_token_id"] = tokenizer.bos_token_id
    candidates = (tokenizer.pad_token_id, config.get("pad_token_id"), stop_ids[0])
    fields["pad_token_id"] = next(
        one for one in candidates if one is not None and 0 <= one < vocab_size
    )
    return fields


def _file_of_ids(folder: pathlib.Path) -> pathlib.Path:
    path = folder / GENERATION_CONFIG_FILE
    return path if path.is_file() else folder / CONFIG_FILE


def ids_in(path: pathlib.Path) -> list[int]:
    """Returns the stop ids of a config; none if there is no such file or field.

    Raises:
        ValueError: the field holds something else.
    """
    if not path.is_file():
        return []
    value = read_json(path).get(_FIELD)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise ValueError(f"{path}: {_FIELD}={value!r} must be an id or a list of ids")
    return ids
