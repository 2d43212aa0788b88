"""Lexical figures, against NLTK, rapidfuzz and plain loops, on made-up and on real texts."""

import json
import math
import warnings

import numpy as np
import pytest

from huatuo_jax.evaluation.lexical import (
    BLEU,
    METRICS,
    PUBLISHED,
    LexicalSettings,
    Pair,
    conventions,
    conventions_table,
    distance,
    pair_values,
    ratios,
    score,
    tokens_of,
)
from huatuo_jax.evaluation.reference_answers import read_huatuo26m

WEIGHTS = [(1.0,), (0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.25, 0.25, 0.25, 0.25)]
SHARES = {"percent": False}


@pytest.fixture(scope="module")
def nltk():
    """The reference implementations of BLEU and GLEU."""
    from nltk.translate import bleu_score, gleu_score

    return bleu_score, gleu_score


@pytest.fixture(scope="module")
def real_pairs(shared_data):
    """Each answer of a doctor as a response to the next question, against that one's answer."""
    found = read_huatuo26m(shared_data / "5_gen_benchmark" / "huatuo26M_test.json")[:61]
    return [
        Pair(two.id, one.references[0], two.references)
        for one, two in zip(found, found[1:], strict=False)
    ]


@pytest.fixture(scope="module")
def huatuogpt_pairs(shared_data):
    """HuatuoGPT-13B's first reply on each case of CMB-Clin, and the case's first answer there."""
    cases = json.loads((shared_data / "5_gen_benchmark" / "CMB-Clin_test-qa.json").read_text())
    answers = {str(case["id"]): case["QA_pairs"][0]["answer"] for case in cases}
    file = shared_data / "3_distilled" / "disc_dialogues" / "huatuo-chat_cmb-clin.json"
    dialogues = {row["id"]: row["conversation"] for row in json.loads(file.read_text())}
    return [Pair(key, dialogues[key][1]["content"], (answers[key],)) for key in dialogues]


def one(response, *references, **settings):
    return pair_values(Pair("p", response, references), LexicalSettings(**SHARES | settings))


# By hand, by loops over lists.


def loop_bleu(response, reference, order):
    logs = 0.0
    for n in range(1, order + 1):
        ours = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        theirs = [tuple(reference[i : i + n]) for i in range(len(reference) - n + 1)]
        matches, left = 0, list(theirs)
        for gram in ours:
            if gram in left:
                left.remove(gram)
                matches += 1
        logs += math.log((matches or 0.1) / max(1, len(ours))) / order
    short = len(response) <= len(reference)
    return math.exp(logs) * (math.exp(1 - len(reference) / len(response)) if short else 1.0)


def loop_rouge(response, reference, n):
    ours = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
    left = [tuple(reference[i : i + n]) for i in range(len(reference) - n + 1)]
    total, matches = len(ours) + len(left), 0
    for gram in ours:
        if gram in left:
            left.remove(gram)
            matches += 1
    return 2 * matches / total


def loop_rouge_l(response, reference):
    best = [[0] * (len(reference) + 1) for _ in range(len(response) + 1)]
    for i, a in enumerate(response, start=1):
        for j, b in enumerate(reference, start=1):
            best[i][j] = best[i - 1][j - 1] + 1 if a == b else max(best[i - 1][j], best[i][j - 1])
    return 2 * best[-1][-1] / (len(response) + len(reference))


def loop_distinct(response, n):
    seen = []
    for i in range(len(response) - n + 1):
        if response[i : i + n] not in seen:
            seen.append(response[i : i + n])
    return len(seen) / (len(response) - n + 1)


@pytest.mark.parametrize("tokenizer", ["characters", "jieba"])
def test_every_metric_is_that_of_a_plain_loop_on_real_answers(real_pairs, tokenizer):
    settings = LexicalSettings(tokenizer=tokenizer, percent=False)
    for pair in real_pairs[:12]:
        response = tokens_of(pair.response, settings)
        reference = tokens_of(pair.references[0], settings)
        found = pair_values(pair, settings)
        for order, name in enumerate(BLEU, start=1):
            assert found[name] == pytest.approx(loop_bleu(response, reference, order), rel=1e-12)
        assert found["ROUGE-1"] == pytest.approx(loop_rouge(response, reference, 1), rel=1e-12)
        assert found["ROUGE-2"] == pytest.approx(loop_rouge(response, reference, 2), rel=1e-12)
        assert found["ROUGE-L"] == pytest.approx(loop_rouge_l(response, reference), rel=1e-12)
        assert found["Distinct-1"] == pytest.approx(loop_distinct(response, 1), rel=1e-12)
        assert found["Distinct-2"] == pytest.approx(loop_distinct(response, 2), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0, 1, 2, 3, 4, 5, 7])
def test_sentence_figures_are_the_means_of_nltk(real_pairs, nltk, smoothing):
    bleu, gleu = nltk
    method = getattr(bleu.SmoothingFunction(), f"method{smoothing}")
    found = score(
        real_pairs, LexicalSettings(average="sentence", smoothing=smoothing, percent=False)
    )
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Without smoothing NLTK warns of every pair.
        for pair in real_pairs:
            response, reference = list(pair.response), list(pair.references[0])
            response = [c for c in response if not c.isspace()]
            reference = [c for c in reference if not c.isspace()]
            theirs.append(
                bleu.sentence_bleu([reference], response, WEIGHTS, method)
                + [gleu.sentence_gleu([reference], response)]
            )
    for name, value in zip((*BLEU, "GLEU"), np.mean(theirs, axis=0), strict=True):
        assert found.figures[name].value == pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0, 1, 2, 3, 4])
def test_corpus_figures_are_those_of_nltk(real_pairs, nltk, smoothing):
    bleu, gleu = nltk
    settings = LexicalSettings(smoothing=smoothing, percent=False)
    references = [[tokens_of(text, settings) for text in pair.references] for pair in real_pairs]
    responses = [tokens_of(pair.response, settings) for pair in real_pairs]
    method = getattr(bleu.SmoothingFunction(), f"method{smoothing}")
    theirs = bleu.corpus_bleu(references, responses, WEIGHTS, method)
    theirs.append(gleu.corpus_gleu(references, responses))
    found = score(real_pairs, settings)
    for name, value in zip((*BLEU, "GLEU"), theirs, strict=True):
        assert found.figures[name].value == pytest.approx(value, rel=1e-12)


def test_corpus_intervals_are_those_of_nltk_on_resampled_pairs(real_pairs, nltk):
    bleu, gleu = nltk
    pairs = real_pairs[:9]
    settings = LexicalSettings(num_resamples=40, seed=5, percent=False)
    references = [[tokens_of(text, settings) for text in pair.references] for pair in pairs]
    responses = [tokens_of(pair.response, settings) for pair in pairs]
    times_RP = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=40)
    drawn = []
    for times_P in times_RP:
        places = np.repeat(np.arange(9), times_P)
        texts = [references[i] for i in places], [responses[i] for i in places]
        method = bleu.SmoothingFunction().method1
        drawn.append(bleu.corpus_bleu(*texts, WEIGHTS, method) + [gleu.corpus_gleu(*texts)])
    lows, highs = np.quantile(drawn, (0.025, 0.975), axis=0)
    found = score(pairs, settings).figures
    for place, name in enumerate((*BLEU, "GLEU")):
        assert found[name].low == pytest.approx(lows[place], rel=1e-12)
        assert found[name].high == pytest.approx(highs[place], rel=1e-12)
        assert found[name].low < found[name].high


def test_intervals_of_means_are_those_of_resampled_pairs(real_pairs):
    settings = LexicalSettings(num_resamples=50, seed=7, average="sentence", percent=False)
    found = score(real_pairs, settings).figures
    for metric in ("GLEU", "ROUGE-2", "Distinct-1"):
        values_P = np.array([pair_values(pair, settings)[metric] for pair in real_pairs])
        num = len(values_P)
        times_RP = np.random.default_rng(7).multinomial(num, np.full(num, 1 / num), size=50)
        low, high = np.quantile(times_RP @ values_P / num, (0.025, 0.975))
        assert (found[metric].low, found[metric].high) == pytest.approx((low, high), rel=1e-12)


def test_rouge_l_of_characters_is_rapidfuzz_indel_similarity(real_pairs):
    from rapidfuzz.distance import Indel

    for pair in real_pairs:
        plain = ["".join(text.split()) for text in (pair.response, pair.references[0])]
        found = one(pair.response, *pair.references)["ROUGE-L"]
        assert found == pytest.approx(Indel.normalized_similarity(*plain), abs=1e-15)


def test_identical_chinese_is_perfect_and_two_drugs_are_not_the_same():
    # A tokenizer that keeps Latin letters and digits alone says 0 and 1 here.
    same = one("感冒要多喝水，注意休息。", "感冒要多喝水，注意休息。")
    assert [same[name] for name in METRICS[:8]] == [1.0] * 8
    other = one("每天吃2片阿司匹林", "每天吃2片头孢")
    assert all(0.0 < other[name] < 1.0 for name in ("BLEU-1", "GLEU", "ROUGE-1", "ROUGE-L"))


def test_an_empty_response_is_worth_nothing_and_has_no_distinct_value():
    for empty in ("", " \n\u3000"):
        found = one(empty, "多喝水")
        assert [found[name] for name in METRICS[:8]] == [0.0] * 8
        assert found["Distinct-1"] is None and found["Distinct-2"] is None
    pairs = [Pair("a", "", ("多喝水",)), Pair("b", "多喝水", ("多喝水",))]
    found = score(pairs, LexicalSettings(average="sentence", percent=False))
    assert found.empty_responses == ("a",)
    assert found.figures["ROUGE-1"].value == 0.5 and found.figures["ROUGE-1"].num_pairs == 2
    assert found.figures["Distinct-1"].value == 1.0 and found.figures["Distinct-1"].num_pairs == 1


@pytest.mark.parametrize("average", ["corpus", "sentence"])
def test_a_pair_without_a_reference_has_no_value_and_moves_no_figure(average):
    settings = LexicalSettings(average=average)
    whole = [Pair("a", "多喝水", ("多喝热水",)), Pair("b", "去医院", ("去医院看看",))]
    extra = [Pair("c", "好好休息", ("", " ")), Pair("d", "", ()), Pair("e", "好", ("好", ""))]
    assert pair_values(extra[0], settings)["BLEU-1"] is None
    assert pair_values(extra[2], settings)["ROUGE-1"] == 100.0, "the empty reference is left out"
    found, without = score([*whole, *extra[:2]], settings), score(whole, settings)
    assert found.without_reference == ("c", "d")
    for name in METRICS[:8]:
        assert found.figures[name].value == without.figures[name].value
        assert found.figures[name].num_pairs == 2
    nothing = score(extra[:1], settings).figures["BLEU-4"]
    assert nothing.value is None and nothing.num_pairs == 0 and "no value" in str(nothing)


def test_of_several_references_bleu_clips_by_all_and_the_others_take_the_best(nltk):
    bleu, gleu = nltk
    response, references = "多喝水多休息", ("住院", "多喝水", "多休息，少熬夜")
    found = one(response, *references)
    split = [list(text) for text in references]
    theirs = bleu.sentence_bleu(split, list(response), WEIGHTS, bleu.SmoothingFunction().method1)
    assert [found[name] for name in BLEU] == pytest.approx(theirs)
    assert found["GLEU"] == pytest.approx(gleu.sentence_gleu(split, list(response)))
    alone = [one(response, text) for text in references]
    for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert found[name] == max(values[name] for values in alone)


def test_responses_shorter_than_an_order_have_figures_in_every_convention():
    pairs = [Pair("a", "好", ("好的",)), Pair("b", "不行", ("行",)), Pair("c", "吃药吗", ("喝",))]
    for convention in conventions(pairs):
        for metric, value in convention.values.items():
            assert value is not None and math.isfinite(value), (convention.settings, metric)


def test_without_smoothing_an_order_that_never_matches_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = one("多喝水吧", "少喝水呀", smoothing=0)
    assert found["BLEU-2"] > 0 and found["BLEU-3"] == 0.0 and found["BLEU-4"] == 0.0


def test_full_width_forms_are_the_same_with_nfkc_alone():
    assert one("１４０／９０", "140/90")["ROUGE-1"] == 0.0
    assert one("１４０／９０", "140/90", nfkc=True)["ROUGE-1"] == 1.0


def test_jieba_gives_words_without_white_space():
    found = tokens_of("我 患有\n糖尿病", LexicalSettings(tokenizer="jieba"))
    assert found == ["我", "患有", "糖尿病"]


def test_another_jieba_is_refused(monkeypatch):
    from huatuo_jax.evaluation import lexical

    lexical._jieba_words.cache_clear()
    monkeypatch.setattr(lexical.importlib.metadata, "version", lambda name: "0.39")
    with pytest.raises(ValueError, match=r"jieba is 0\.39.*jieba==0\.42\.1"):
        tokens_of("糖尿病", LexicalSettings(tokenizer="jieba"))
    lexical._jieba_words.cache_clear()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer is 'words'; it should be one of characters, jieba"),
        ({"average": "micro"}, "average is 'micro'"),
        ({"rouge": "f2"}, "rouge is 'f2'"),
        ({"smoothing": 5}, "smoothing is 5; with average='corpus'.* 0, 1, 2, 3, 4$"),
        ({"smoothing": 6, "average": "sentence"}, "smoothing is 6"),
        ({"num_resamples": 0}, "num_resamples is 0"),
    ],
)
def test_a_convention_that_is_not_defined_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LexicalSettings(**fields)


def test_pairs_need_to_be_there_and_to_have_ids_of_their_own():
    with pytest.raises(ValueError, match="at least one"):
        score([])
    with pytest.raises(ValueError, match="2 pairs have the id 'a'"):
        score([Pair("a", "x", ("y",)), Pair("a", "z", ("y",)), Pair("b", "z", ("y",))])


def test_every_figure_says_its_convention():
    found = score([Pair("a", "多喝水", ("多喝热水",)), Pair("b", "休息", ("好好休息",))])
    text = str(found.figures["BLEU-2"])
    for part in ("BLEU-2", " to ", "over 2", "characters", "NFKC off", "corpus", "smoothing 1"):
        assert part in text
    assert json.loads(json.dumps(found.to_json()))["figures"]["GLEU"]["settings"]["nfkc"] is False


def test_the_base_convention_comes_first_and_its_row_is_what_score_gives(real_pairs):
    base = LexicalSettings(average="sentence", smoothing=2, nfkc=True)
    found = conventions(real_pairs[:8], base)
    assert found[0].settings == base
    assert len({one.settings for one in found}) == len(found) == 40
    for convention in found[::7]:
        figures = score(real_pairs[:8], convention.settings).figures
        assert convention.values == {name: figures[name].value for name in METRICS}


def test_huatuogpts_published_ratios_are_those_of_characters(huatuogpt_pairs):
    found = conventions(huatuogpt_pairs)
    for published in PUBLISHED.values():
        distances = {one.settings: distance(one, published) for one in found}
        ranked = sorted(distances, key=distances.get)
        assert ranked[0].tokenizer == "characters"
        closest = min(d for s, d in distances.items() if s.tokenizer == "jieba")
        assert distances[LexicalSettings()] < 0.1 < 0.25 < closest
    # Every ratio by itself, against those of the three sets.
    characters, jieba = (
        next(one for one in found if one.settings == LexicalSettings(tokenizer=name)).ratios()
        for name in ("characters", "jieba")
    )
    for name in ("BLEU-2/BLEU-1", "BLEU-4/BLEU-1", "ROUGE-2/ROUGE-1", "ROUGE-L/ROUGE-1"):
        for published in PUBLISHED.values():
            theirs = ratios(published)[name]
            assert abs(characters[name] / theirs - 1) < 0.2 < abs(jieba[name] / theirs - 1)
    # Distinct of the paper is no figure over all responses together.
    assert found[0].corpus_distinct[0] < 0.1 < 0.5 < found[0].values["Distinct-1"]


def test_the_table_shows_each_convention_with_its_distance_to_published_figures(real_pairs):
    found = conventions(real_pairs[:3])
    lines = conventions_table(found, PUBLISHED["cMedQA2"]).splitlines()
    assert len(lines) == 2 + 1 + len(found)
    assert len({line.count("|") for line in lines}) == 1
    assert "27.39" in lines[2] and "jieba 0.42.1" in lines[-1]
    assert "distance" not in conventions_table(found)
