"""Where a released model comes from: base model, data on the Hub, licence, languages."""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from huatuo_jax.checkpoint import models
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.markdown import inline
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.initial_model import ModelConfig

_READ_OF_EACH = 200
_LEAST_SHARE = 0.05
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_OTHER_EAST_ASIAN = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile("[A-Za-z]+")
_COMMON_ENGLISH = frozenset(
    """a an and are as at be but by can do does for from had has have he how i if in is it my not of
    on or she should so that the there they this to was we what when which who why will with you
    your""".split()
)


class License(NamedTuple):
    """A licence as a card's metadata says it; all None where it is unknown.

    Attributes:
        id: of the Hub's list, or `other`.
        name: of a licence that is `other`.
        link: to its text.
        told_by: whose word it is, for a reader.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    told_by: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What both cards of a release say of where it comes from.

    Attributes:
        base_model: a Hub id; None for a model that has none.
        base: the base model in words, Markdown.
        license: of the release.
        languages: ISO codes, the most frequent first; () where they are not known.
        datasets: the Hub ids of the data.
        is_clinic: whether the data is the made-up clinic's.
    """

    base_model: str | None
    base: str
    license: License
    languages: tuple[str, ...]
    datasets: tuple[str, ...]
    is_clinic: bool

    def of_model(self, model: ModelConfig, *, license: str | None, has_data: bool) -> "Origin":
        """The same of what has begun with another model.

        Args:
            model: that one.
            license: that the config gives.
            has_data: it has seen the run's data.
        """
        return dataclasses.replace(
            self,
            base_model=hub_id(model.directory),
            base=base_in_words(model),
            license=find_license(model.directory, license),
            datasets=self.datasets if has_data else (),
            is_clinic=self.is_clinic and has_data,
        )


def find_origin(
    model: ModelConfig,
    sources: Sequence[SourceConfig],
    prompts: Sequence[pathlib.Path],
    *,
    license: str | None,
    languages: tuple[str, ...],
    is_clinic: bool,
) -> Origin:
    """What the cards of a run say of where its models come from.

    Args:
        model: that training began with.
        sources: of the dialogues.
        prompts: files of prompts.
        license: that the config gives; None for the base model's.
        languages: that the config gives; () tells them by dialogues and prompts.
        is_clinic: whether the data is the made-up clinic's.

    Raises:
        OSError: a file cannot be read.
    """
    named = [hub_id(path) for source in sources for path in source.paths]
    return Origin(
        base_model=hub_id(model.directory),
        base=base_in_words(model),
        license=find_license(model.directory, license),
        languages=languages or languages_of(texts_of(sources, prompts)),
        datasets=tuple(dict.fromkeys(name for name in named if name is not None)),
        is_clinic=is_clinic,
    )


def hub_id(source: str | None) -> str | None:
    """A model's or data set's name where it is one of the Hub; None for a place on this machine."""
    if source is None or os.path.exists(source) or source.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def base_in_words(model: ModelConfig) -> str:
    """Which model training began with, without a path of this machine; Markdown."""
    if (name := hub_id(model.directory)) is not None:
        return f"[{inline(name)}](https://huggingface.co/{name})"
    if model.directory is not None:
        name = pathlib.Path(model.directory).resolve().name
        return f"a model from a folder, {inline(name)}, which is none of the Hub by that name"
    if model.preset is not None:
        return f"none: fresh weights in the architecture `{model.preset}`"
    assert model.backbone is not None
    cfg = model.backbone
    return (
        f"none: fresh weights, {cfg.family}, {cfg.num_layers} layers, width {cfg.hidden_size}, "
        f"vocabulary {cfg.vocab_size}"
    )


def find_license(source: str | None, given: str | None) -> License:
    """The licence that the config gives, else that of the base model's own card.

    Args:
        source: the base model's folder or Hub id; None for fresh weights.
        given: `export.license`.
    """
    if given is not None:
        return License(given, None, None, "the config of the run")
    name = hub_id(source)
    if source is None:
        return License()
    path = models.find_folder(source) / models.CARD_FILE
    if not path.is_file():
        return License()
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # Whatever a YAML reader raises of somebody else's file: it says nothing.
        return License()
    found, title, link = (data.get(one) for one in ("license", "license_name", "license_link"))
    if not isinstance(found, str):
        return License()
    if link is not None and "://" not in str(link):
        link = None if name is None else f"https://huggingface.co/{name}/blob/main/{link}"
    return License(found, title, link, "the base model's card")


def languages_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Chinese (`zh`) and English (`en`) where at least one text in twenty is in it.

    Detected by the script, and English by its most frequent words; no other is detected.
    """
    counts = {"zh": 0, "en": 0}
    total = 0
    for text in texts:
        total += 1
        words = _WORD.findall(text.lower())
        num_han = len(_HAN.findall(text))
        num_common = sum(word in _COMMON_ENGLISH for word in words)
        if num_han > len(words):
            counts["zh"] += 20 * len(_OTHER_EAST_ASIAN.findall(text)) < num_han
        else:
            counts["en"] += bool(words) and 5 * num_common >= len(words)
    found = sorted(counts, key=lambda name: -counts[name])
    return tuple(name for name in found if total and counts[name] >= _LEAST_SHARE * total)


def texts_of(
    sources: Sequence[SourceConfig], prompts: Sequence[pathlib.Path], *, limit: int = _READ_OF_EACH
) -> Iterable[str]:
    """Some dialogues of each file, and some prompts, each as one text.

    Args:
        sources: of the dialogues; names on the Hub are not looked up.
        prompts: files of prompts; those that are not there are left out.
        limit: so many of each file at most.
    """
    for source in sources:
        for path in filter(os.path.exists, source.paths):
            for one in itertools.islice(read_dialogues(path, **source.reading()), limit):
                yield "\n".join(message.content for message in one.messages)
    for file in filter(os.path.exists, prompts):
        for prompt in itertools.islice(read_prompts(file), limit):
            yield "\n".join(message.content for message in prompt.messages)
