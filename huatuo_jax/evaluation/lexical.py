"""Lexical metrics of Chinese responses against references: BLEU, GLEU, ROUGE and Distinct.

N-grams are of characters (white space left out) or of jieba's words. Published figures of one model
differ by many points with the convention alone, so every figure carries its `LexicalSettings`, and
`conventions` computes the same pairs under each.

Edge cases are defined: an empty response scores 0 against any reference; an empty reference
is left out, and a pair without any other has no value in BLEU, GLEU and ROUGE (it is counted, and
still has Distinct); of several references BLEU clips by the highest count and takes the closest
length, GLEU and ROUGE take the best one; a response shorter than n tokens has no Distinct-n.
"""

import functools
import importlib
import importlib.metadata
import itertools
import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Indel

from huatuo_jax.core.markdown import table
from huatuo_jax.core.statistics import NUM_RESAMPLES, bootstrap_mean, distinct_share

Floats = npt.NDArray[np.float64]
Grams = list[Counter[tuple[str, ...]]]
Tokenizer = Literal["characters", "jieba"]
Average = Literal["corpus", "sentence"]
RougeMeasure = Literal["f1", "recall", "precision"]

MAX_ORDER = 4
BLEU = tuple(f"BLEU-{n}" for n in range(1, MAX_ORDER + 1))
ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
DISTINCT = ("Distinct-1", "Distinct-2")
METRICS = (*BLEU, "GLEU", *ROUGE, *DISTINCT)
JIEBA_VERSION = "0.42.1"
"""Its dictionary decides what a word is."""

# NLTK's numbers of the methods of Chen and Cherry (2014). The sixth fails where no trigram matches.
# The fifth and the seventh look at one pair's texts, so they say nothing of a corpus.
_OF_A_SENTENCE = (0, 1, 2, 3, 4, 5, 7)
_OF_A_CORPUS = (0, 1, 2, 3, 4)
_BYTES_AT_ONCE = 1 << 26

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: dict(zip(METRICS, values, strict=True))
    for name, values in {
        "cMedQA2": (27.39, 14.38, 8.06, 4.55, 8.52, 29.26, 8.02, 15.46, 0.74, 0.93),
        "webMedQA": (24.85, 13.42, 7.72, 4.51, 7.50, 28.30, 7.72, 14.50, 0.73, 0.93),
        "Huatuo-26M": (27.42, 14.84, 8.54, 4.96, 8.01, 29.16, 8.29, 15.84, 0.74, 0.93),
    }.items()
}
"""HuatuoGPT's figures (arXiv 2305.15075), in percent but for Distinct."""

RATIOS = (
    ("BLEU-2", "BLEU-1"),
    ("BLEU-3", "BLEU-1"),
    ("BLEU-4", "BLEU-1"),
    ("GLEU", "BLEU-1"),
    ("ROUGE-2", "ROUGE-1"),
    ("ROUGE-L", "ROUGE-1"),
)
"""Pairs of metrics whose ratio depends on the convention more than on how good a model is."""


@dataclass(frozen=True, kw_only=True)
class LexicalSettings:
    """The convention that a figure is computed under.

    Attributes:
        tokenizer: "characters", all but white space, or "jieba", its words in exact mode.
        nfkc: bring texts to Unicode's form NFKC first, so that full-width `１４０` is `140`.
        average: of BLEU and GLEU: "corpus" sums the counts of all pairs, as both are defined,
            "sentence" takes the mean of the pairs' values. ROUGE and Distinct are always means.
        smoothing: number of NLTK's smoothing method of BLEU; 0 for none. 5 and 7 need "sentence".
        rouge: the measure of ROUGE.
        percent: show BLEU, GLEU and ROUGE times 100; Distinct is always a share.
        num_resamples: of the bootstrap over pairs, for the 95 % intervals.
        seed: of the bootstrap.
    """

    tokenizer: Tokenizer = "characters"
    nfkc: bool = False
    average: Average = "corpus"
    smoothing: int = 1
    rouge: RougeMeasure = "f1"
    percent: bool = True
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name, allowed in (
            ("tokenizer", get_args(Tokenizer)),
            ("average", get_args(Average)),
            ("rouge", get_args(RougeMeasure)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it should be one of {', '.join(allowed)}"
                )
        methods = _OF_A_CORPUS if self.average == "corpus" else _OF_A_SENTENCE
        if self.smoothing not in methods:
            raise ValueError(
                f"smoothing is {self.smoothing!r}; with average={self.average!r} it should be one"
                f" of NLTK's methods {', '.join(map(str, methods))}"
            )
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples is {self.num_resamples}; it should be at least 1")

    def __str__(self) -> str:
        """The convention in one line, as it is printed with each figure."""
        words = f"jieba {JIEBA_VERSION}" if self.tokenizer == "jieba" else "characters"
        return (
            f"{words}, NFKC {'on' if self.nfkc else 'off'}, {self.average} BLEU and GLEU,"
            f" smoothing {self.smoothing}, ROUGE {self.rouge},"
            f" {'percent' if self.percent else 'shares'}"
        )

    def scale(self, metric: str) -> float:
        """The factor that a metric is shown with."""
        return 100.0 if self.percent and metric not in DISTINCT else 1.0


class Pair(NamedTuple):
    """One response and the references that it is compared with."""

    id: str
    response: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One metric over all pairs that have a value, with its 95 % interval and its convention.

    Attributes:
        metric: its name, one of `METRICS`.
        value: None where no pair has a value.
        low: lower end of the interval over resampled pairs.
        high: upper end.
        num_pairs: over how many pairs.
        settings: the convention.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    num_pairs: int
    settings: LexicalSettings

    def __str__(self) -> str:
        """The figure, its interval and its convention."""
        if self.value is None:
            return f"{self.metric} has no value over {self.num_pairs} pairs ({self.settings})"
        digits = 2 if self.settings.scale(self.metric) == 100.0 else 4
        value, low, high = (f"{x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{self.metric} {value} ({low} to {high}) over {self.num_pairs} ({self.settings})"

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LexicalScores:
    """The figures of a set of pairs.

    Attributes:
        figures: by metric, in the order of `METRICS`.
        num_pairs: all pairs.
        empty_responses: ids of pairs whose response has no token.
        without_reference: ids of pairs that have no reference with a token.
        settings: the convention.
    """

    figures: Mapping[str, Figure]
    num_pairs: int
    empty_responses: tuple[str, ...]
    without_reference: tuple[str, ...]
    settings: LexicalSettings

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def tokens_of(text: str, settings: LexicalSettings) -> list[str]:
    """The tokens of a text; none where it is empty or white space.

    Raises:
        ValueError: jieba is not installed, or in another version than `JIEBA_VERSION`.
    """
    if settings.nfkc:
        text = unicodedata.normalize("NFKC", text)
    if settings.tokenizer == "characters":
        return [one for one in text if not one.isspace()]
    return [word for word in _jieba_words()(text) if word.strip()]


@functools.cache
def _jieba_words() -> Callable[[str], list[str]]:
    jieba = _library("jieba")
    version = importlib.metadata.version("jieba")
    if version != JIEBA_VERSION:
        raise ValueError(f"jieba is {version}; its words are defined for jieba=={JIEBA_VERSION}")
    jieba.setLogLevel(logging.WARNING)
    # One of our own: words that others add to jieba's shared one would change the figures.
    words: Callable[[str], list[str]] = jieba.Tokenizer().lcut
    return words


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the lexical metrics need {error.name}: pip install 'huatuo_jax[evaluation]'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """The counts of one pair that the metrics are made of.

    Attributes:
        response: its tokens.
        references: tokens of each reference that has any.
        bleu: clipped matches of orders 1 to 4, n-grams of the response of orders 1 to 4, its
            length, the closest reference's length. None without references.
        gleu: matches and the larger count of n-grams of orders 1 to 4, of the best reference.
        rouge: by measure, ROUGE-1, -2 and -L of the best reference.
        distinct: share of distinct n-grams of orders 1 and 2; None where there are none.
    """

    response: list[str] = field(repr=False)
    references: list[list[str]] = field(repr=False)
    bleu: tuple[int, ...] | None
    gleu: tuple[int, int] | None
    rouge: Mapping[str, tuple[float, float, float]] | None
    distinct: tuple[float | None, ...]


def _ngrams(tokens: Sequence[str]) -> Grams:
    """The n-grams of orders 1 to 4, counted."""
    return [
        Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


def _count(pair: Pair, settings: LexicalSettings) -> _Counted:
    response = tokens_of(pair.response, settings)
    given = (tokens_of(text, settings) for text in pair.references)
    references = [tokens for tokens in given if tokens]
    grams, others = _ngrams(response), [_ngrams(tokens) for tokens in references]
    return _Counted(
        response=response,
        references=references,
        bleu=_bleu_counts(response, references, grams, others) if references else None,
        gleu=_gleu_counts(grams, others) if references else None,
        rouge=_rouge(response, references, grams, others) if references else None,
        distinct=tuple(distinct_share(response, n + 1) for n in range(len(DISTINCT))),
    )


def _bleu_counts(
    response: list[str], references: list[list[str]], grams: Grams, others: list[Grams]
) -> tuple[int, ...]:
    matches = []
    for n, found in enumerate(grams):
        most = functools.reduce(lambda one, two: one | two, (other[n] for other in others))
        matches.append((found & most).total())
    length = len(response)
    closest = min(map(len, references), key=lambda size: (abs(size - length), size))
    # NLTK counts one n-gram where a response is too short for any.
    return (*matches, *(max(1, found.total()) for found in grams), length, closest)


def _gleu_counts(grams: Grams, others: list[Grams]) -> tuple[int, int]:
    ours = sum(found.total() for found in grams)
    counts = []
    for other in others:
        matches = sum((mine & theirs).total() for mine, theirs in zip(grams, other, strict=True))
        counts.append((matches, max(ours, sum(theirs.total() for theirs in other))))
    return max(counts, key=lambda count: count[0] / count[1])


def _rouge(
    response: list[str], references: list[list[str]], grams: Grams, others: list[Grams]
) -> dict[str, tuple[float, float, float]]:
    """ROUGE-1, -2 and -L (Lin 2004) by measure, the best reference for each."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in get_args(RougeMeasure)}
    for tokens, other in zip(references, others, strict=True):
        # The longest common subsequence is half of what an edit by insertions and deletions keeps.
        counts = [
            ((mine & theirs).total(), mine.total(), theirs.total())
            for mine, theirs in zip(grams[:2], other[:2], strict=True)
        ]
        counts.append((Indel.similarity(response, tokens) // 2, len(response), len(tokens)))
        found["f1"].append(tuple(_share(2 * common, ours + all_) for common, ours, all_ in counts))
        found["recall"].append(tuple(_share(common, all_) for common, _, all_ in counts))
        found["precision"].append(tuple(_share(common, ours) for common, ours, _ in counts))
    best = {}
    for name, values in found.items():
        one, two, longest = (max(column) for column in zip(*values, strict=True))
        best[name] = (one, two, longest)
    return best


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _bleu(
    counts: Sequence[float], smoothing: int, response: list[str], references: list[list[str]]
) -> list[float]:
    """BLEU-1 to -4 of the counts of one pair, or of the sums of many (Papineni et al. 2002)."""
    nltk = _library("nltk.translate.bleu_score")
    whole = [int(count) for count in counts]
    matches, totals, (length, closest) = whole[:4], whole[4:8], whole[8:]
    if matches[0] == 0:
        return [0.0] * MAX_ORDER
    shares: list[Any] = [
        nltk.Fraction(match, total, _normalize=False)
        for match, total in zip(matches, totals, strict=True)
    ]
    if smoothing:
        method = getattr(nltk.SmoothingFunction(), f"method{smoothing}")
        shares = method(shares, references=references, hypothesis=response, hyp_len=length)
    penalty = nltk.brevity_penalty(closest, length)
    found = []
    for order in range(1, MAX_ORDER + 1):
        used = shares[:order]
        if smoothing == 0 and not all(used):
            found.append(0.0)  # NLTK warns and gives 1e-78.
        else:
            # With smoothing NLTK passes over what is 0 all the same (responses of one token).
            logs = math.fsum(math.log(share) / order for share in used if share > 0)
            found.append(penalty * math.exp(logs))
    return found


def pair_values(pair: Pair, settings: LexicalSettings) -> dict[str, float | None]:
    """One pair's own value of each metric; None where it has none (see the module's docstring).

    BLEU and GLEU are those of the sentence.
    """
    return _pair_values(_count(pair, settings), settings)


def _pair_values(counted: _Counted, settings: LexicalSettings) -> dict[str, float | None]:
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    if counted.bleu is not None and counted.gleu is not None and counted.rouge is not None:
        bleu = _bleu(counted.bleu, settings.smoothing, counted.response, counted.references)
        found.update(zip(BLEU, bleu, strict=True))
        found["GLEU"] = counted.gleu[0] / counted.gleu[1]
        found.update(zip(ROUGE, counted.rouge[settings.rouge], strict=True))
    found.update(zip(DISTINCT, counted.distinct, strict=True))
    return {
        metric: None if value is None else value * settings.scale(metric)
        for metric, value in found.items()
    }


def score(pairs: Sequence[Pair], settings: LexicalSettings | None = None) -> LexicalScores:
    """All metrics of a set of pairs, each with the interval of a bootstrap over pairs.

    Raises:
        ValueError: there are no pairs, two pairs have one id, or a library is missing.
    """
    settings = settings or LexicalSettings()
    _check_pairs(pairs)
    return _score([_count(pair, settings) for pair in pairs], pairs, settings)


def _score(
    counted: Sequence[_Counted], pairs: Sequence[Pair], settings: LexicalSettings
) -> LexicalScores:
    values = [_pair_values(one, settings) for one in counted]
    corpus = _corpus_figures(counted, settings) if settings.average == "corpus" else {}
    figures = {}
    for metric in METRICS:
        known = [one[metric] for one in values if one[metric] is not None]
        value, low, high = corpus[metric] if metric in corpus else _mean(known, settings)
        figures[metric] = Figure(
            metric=metric,
            value=value,
            low=low,
            high=high,
            num_pairs=len(known),
            settings=settings,
        )
    return LexicalScores(
        figures=figures,
        num_pairs=len(pairs),
        empty_responses=tuple(
            pair.id for pair, one in zip(pairs, counted, strict=True) if not one.response
        ),
        without_reference=tuple(
            pair.id for pair, one in zip(pairs, counted, strict=True) if not one.references
        ),
        settings=settings,
    )


def _check_pairs(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("pairs: the lexical metrics need at least one")
    for name, count in Counter(pair.id for pair in pairs).items():
        if count > 1:
            raise ValueError(f"pairs: {count} pairs have the id {name!r}; each should have its own")


def _mean(
    known: Sequence[float | None], settings: LexicalSettings
) -> tuple[float | None, float | None, float | None]:
    """The mean and its interval; None where there are no values."""
    if not known:
        return None, None, None
    values_P: Floats = np.asarray(known, np.float64)
    found = bootstrap_mean(
        values_P,
        np.arange(len(values_P)),
        seed=settings.seed,
        num_resamples=settings.num_resamples,
    )
    return found.value, found.low, found.high


def _corpus_figures(
    counted: Sequence[_Counted], settings: LexicalSettings
) -> dict[str, tuple[float, float, float]]:
    """Corpus BLEU and GLEU and their intervals, from sums of counts of resampled pairs."""
    counts_PF = _counts(counted)
    if not len(counts_PF):
        return {}
    found = _corpus_values(counts_PF.sum(axis=0), settings)
    drawn = [_corpus_values(sums_F, settings) for sums_F in _resampled_sums(counts_PF, settings)]
    lows, highs = np.quantile(np.asarray(drawn), (0.025, 0.975), axis=0).tolist()
    return dict(zip((*BLEU, "GLEU"), zip(found, lows, highs, strict=True), strict=True))


def _counts(counted: Sequence[_Counted]) -> Floats:
    """The counts of BLEU and GLEU of each pair that has a reference."""
    rows = [(*one.bleu, *one.gleu) for one in counted if one.bleu and one.gleu]
    return np.asarray(rows, np.float64)


def _corpus_values(sums_F: Floats, settings: LexicalSettings) -> list[float]:
    *bleu, matches, total = sums_F.tolist()
    values = [*_bleu(bleu, settings.smoothing, [], []), _share(matches, total)]
    return [value * settings.scale("BLEU-1") for value in values]


def _resampled_sums(counts_PF: Floats, settings: LexicalSettings) -> Iterator[Floats]:
    """The sums of the counts over as many pairs, drawn with replacement."""
    num_pairs = len(counts_PF)
    draw = np.random.default_rng(settings.seed)
    at_once = max(1, _BYTES_AT_ONCE // (8 * num_pairs))
    for first in range(0, settings.num_resamples, at_once):
        size = min(at_once, settings.num_resamples - first)
        times_RP = draw.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=size)
        yield from times_RP @ counts_PF


@dataclass(frozen=True, kw_only=True)
class Convention:
    """The figures of a set of pairs under one convention.

    Attributes:
        settings: the convention.
        values: by metric; None where no pair has a value.
        corpus_distinct: Distinct-1 and -2 over the n-grams of all responses together, which falls
            with the number of responses.
    """

    settings: LexicalSettings
    values: Mapping[str, float | None]
    corpus_distinct: tuple[float, float]

    def ratios(self) -> dict[str, float | None]:
        """The ratios of `RATIOS`, which nearly cancel how good a model is."""
        return ratios(self.values)


def conventions(pairs: Sequence[Pair], base: LexicalSettings | None = None) -> list[Convention]:
    """The figures of the same pairs under each convention, the base's first.

    Characters or jieba, NFKC on or off, corpus or mean of sentences with each smoothing method, and
    ROUGE's recall and precision beside F1.

    Raises:
        ValueError: as `score`.
    """
    base = base or LexicalSettings()
    _check_pairs(pairs)
    found = {}
    for tokenizer, nfkc in itertools.product(get_args(Tokenizer), (base.nfkc, not base.nfkc)):
        texts = replace(base, tokenizer=tokenizer, nfkc=nfkc)
        counted = [_count(pair, texts) for pair in pairs]
        distinct = _corpus_distinct(pairs, texts)
        for settings in _variants(texts):
            values = _point_values(counted, settings)
            found[settings] = Convention(settings=settings, values=values, corpus_distinct=distinct)
    return [found.pop(base), *found.values()]


def _variants(base: LexicalSettings) -> Iterator[LexicalSettings]:
    """The base first, then the ways to average and smooth BLEU, then the measures of ROUGE."""
    ways: list[tuple[Average, int]] = [("corpus", base.smoothing if base.smoothing < 5 else 1)]
    ways += [("sentence", method) for method in _OF_A_SENTENCE]
    seen = {base: None}
    seen.update((replace(base, average=a, smoothing=m), None) for a, m in ways)
    seen.update((replace(base, rouge=measure), None) for measure in get_args(RougeMeasure))
    return iter(seen)


def _point_values(
    counted: Sequence[_Counted], settings: LexicalSettings
) -> dict[str, float | None]:
    """The figures without their intervals."""
    values = [_pair_values(one, settings) for one in counted]
    found: dict[str, float | None] = {}
    for metric in METRICS:
        known = [one[metric] for one in values if one[metric] is not None]
        found[metric] = float(np.mean(np.asarray(known, np.float64))) if known else None
    counts_PF = _counts(counted)
    if settings.average == "corpus" and len(counts_PF):
        corpus = _corpus_values(counts_PF.sum(axis=0), settings)
        found.update(zip((*BLEU, "GLEU"), corpus, strict=True))
    return found


def _corpus_distinct(pairs: Sequence[Pair], settings: LexicalSettings) -> tuple[float, float]:
    every: list[Counter[tuple[str, ...]]] = [Counter() for _ in DISTINCT]
    for pair in pairs:
        grams = _ngrams(tokens_of(pair.response, settings))
        for total, found in zip(every, grams, strict=False):
            total.update(found)
    one, two = (_share(len(total), total.total()) for total in every)
    return one, two


def ratios(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The ratios of `RATIOS` by name, as `BLEU-4/BLEU-1`; None where one has no value."""
    found = {}
    for part, whole in RATIOS:
        one, other = values[part], values[whole]
        found[f"{part}/{whole}"] = one / other if one is not None and other else None
    return found


def distance(convention: Convention, published: Mapping[str, float]) -> float | None:
    """The distance of a convention's ratios to published ones: root mean square of log ratios.

    None where one of them is 0 or has no value.
    """
    ours, theirs = convention.ratios(), ratios(published)
    logs = []
    for name, value in ours.items():
        other = theirs[name]
        if not value or not other:
            return None
        logs.append(math.log(value / other))
    return math.sqrt(math.fsum(log * log for log in logs) / len(logs))


def conventions_table(
    found: Sequence[Convention], published: Mapping[str, float] | None = None
) -> str:
    """The conventions as a Markdown table; with published figures also the distance to them."""
    head = ["convention", *METRICS, "Distinct over all", *ratios(dict.fromkeys(METRICS))]
    head += ["distance"] if published is not None else []
    rows = []
    if published is not None:
        cells = [f"{published[metric]:.2f}" for metric in METRICS]
        rows.append(["published", *cells, "", *_cells(ratios(published).values(), 3), ""])
    for one in found:
        cells = _cells((one.values[metric] for metric in METRICS), 2 if one.settings.percent else 4)
        overall = " / ".join(_cells(one.corpus_distinct, 2))
        row = [str(one.settings), *cells, overall, *_cells(one.ratios().values(), 3)]
        rows.append(row if published is None else [*row, *_cells([distance(one, published)], 3)])
    return table(head, rows)


def _cells(values: Any, digits: int) -> list[str]:
    return ["–" if value is None else f"{value:.{digits}f}" for value in values]
