"""The judge's scores follow the truth, and a planted bias comes back from its verdicts."""

import itertools
import math
import statistics

import pytest

from huatuo_jax.clinic.dialogues import DistilledDoctor, prompts
from huatuo_jax.clinic.findings import find
from huatuo_jax.clinic.judge import CRITERIA, SCALE, ClinicJudge, distilled_manner
from huatuo_jax.clinic.planted import planted_answers
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import Case, Draws
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge import judgements, report
from huatuo_jax.judge.questions import PairKey, Verdicts

PROMPTS = list(prompts(120, seed=9))


def prompt(*turns, diagnosis):
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    return Prompt(id="p", messages=messages, source="test", diagnosis=diagnosis)


ULCER = prompt("我胃疼，饭后疼、反酸水，3周了，男，45岁，是什么病？", diagnosis="胃溃疡")
GOOD = "考虑胃溃疡。挂消化内科，查胃镜。可以用奥美拉唑。按时吃饭，少吃辛辣。"


def overall(answer, asked=ULCER, **fields):
    return ClinicJudge(**fields).scores(asked, answer)["overall"]


def distilled(asked):
    case = Case.from_json(asked.extra["case"])
    writer = Writer(Draws("distilled", asked.id), held_out=False)
    return DistilledDoctor(writer, case).answer(heard(asked.messages))


def answers_of(asked):
    """A real and two distilled answers, one of them cut off."""
    text = distilled(asked)
    return [asked.reference, text, text[: len(text) // 2]]


def test_the_criteria_and_the_scale_are_those_of_the_protocol():
    assert CRITERIA == judgements.CRITERIA
    for asked in PROMPTS[:30]:
        for text in answers_of(asked):
            scores = ClinicJudge().scores(asked, text)
            assert tuple(sorted(scores)) == tuple(sorted(CRITERIA))
            assert all(SCALE[0] <= value <= SCALE[1] for value in scores.values())


@pytest.mark.parametrize(
    "worse",
    [
        GOOD.replace("胃溃疡", "肺炎"),
        GOOD.replace("胃溃疡", "胃食管反流"),
        GOOD.replace("考虑胃溃疡。", ""),
        GOOD.replace("考虑胃溃疡", "考虑胃溃疡、肺炎、感冒、流感"),
        GOOD.replace("考虑胃溃疡", "不是胃溃疡"),
        GOOD.replace("考虑胃溃疡", "可能是胃溃疡或肺炎"),
        GOOD.replace("胃镜", "心电图"),
        GOOD.replace("消化内科", "骨科"),
        GOOD.replace("奥美拉唑", "布洛芬"),
        GOOD.replace("可以用奥美拉唑。", ""),
        GOOD.replace("按时吃饭，少吃辛辣。", ""),
        GOOD + GOOD,
        GOOD[:-1],
        GOOD.replace("胃镜", "胃\ufffd\ufffd"),
        "有没有发烧？",
        "胃" * 60,
        "的是在了不和有大这主中人上为们地个用工时要",
        "好的好的好的好的好的好的",
        "您好，祝您早日康复！",
        "，，。。",
        "",
    ],
)
def test_each_fault_makes_an_answer_worse(worse):
    assert overall(worse) < overall(GOOD) - 0.05
    assert ClinicJudge().p_first(ULCER, GOOD, worse) > 0.5


def test_garbage_gets_next_to_nothing():
    lowest = SCALE[0]
    for text in ("", "   \n", "，，。。", "胃" * 60, "的是在了不和有大", "????", "\ufffd" * 20):
        assert overall(text) < lowest + 0.4, text


def test_naming_every_disease_is_never_right():
    everything = "考虑感冒、流感、肺炎、哮喘、胃溃疡、痔疮、偏头痛、高血压、糖尿病。"
    found = find(ULCER, everything)
    assert found.diagnosis == "wrong" and found.many_diagnoses


@pytest.mark.parametrize(
    "answer, diagnosis, hedged",
    [
        ("考虑胃溃疡。", "right", False),
        ("可能是胃溃疡。", "right", True),
        ("首先考虑胃溃疡，也可能是胃食管反流。", "right", True),
        ("可能是胃溃疡或胃食管反流。", "plausible", True),
        ("可能是胃食管反流，也可能是胃溃疡。", "plausible", True),
        ("考虑肺炎。", "wrong", False),
        ("不是胃溃疡。", "absent", False),
        ("要排除胃溃疡。", "absent", False),
        ("多喝水。", "absent", False),
    ],
)
def test_a_diagnosis_is_right_plausible_wrong_or_absent(answer, diagnosis, hedged):
    found = find(ULCER, answer)
    assert (found.diagnosis, found.hedged) == (diagnosis, hedged)


def test_another_disease_is_plausible_while_what_was_told_allows_it():
    vague = prompt("我胃疼，要紧吗？", diagnosis="胃溃疡")
    assert find(vague, "考虑十二指肠溃疡。").diagnosis == "plausible"
    assert find(vague, "考虑水痘。").diagnosis == "wrong"


def test_asking_is_right_where_it_is_ambiguous_and_only_there():
    vague = prompt("我胃疼，要紧吗？", diagnosis="胃溃疡")
    ask, guess = "饭后疼吗？空腹疼吗？", GOOD.replace("胃溃疡", "十二指肠溃疡")
    assert overall(ask, vague) > overall(guess, vague)
    assert overall(ask, ULCER) < overall(GOOD, ULCER)
    assert find(vague, ask).asks_when_needed and find(ULCER, "反酸吗？").asks_pointlessly
    assert find(vague, "您有胃疼吗？").useful_questions == 0


def test_a_drug_is_forbidden_only_to_the_patient_who_told_why():
    ask = "我腰痛，劳累后加重、歇一会就好，2周了，怎么治？"
    answer = "考虑腰肌劳损。挂骨科，查腰椎核磁。可以用布洛芬。热敷，别久坐。"
    for told, forbidden in (
        ("", ()),
        ("另外我怀孕了。", ("布洛芬",)),
        ("对了，我得过胃出血。", ("布洛芬",)),
        ("对了，我青霉素过敏。", ()),
    ):
        found = find(prompt(ask + told, diagnosis="腰肌劳损"), answer)
        assert found.contraindicated == forbidden
    safe = answer.replace("布洛芬", "对乙酰氨基酚").replace("可以用", "别用布洛芬，可以用")
    pregnant = prompt(ask + "另外我怀孕了。", diagnosis="腰肌劳损")
    assert find(pregnant, safe).contraindicated == ()
    assert overall(safe, pregnant) > overall(answer, pregnant) + 1


def test_a_pregnant_woman_does_not_get_x_rays():
    asked = "我30岁，女，发烧，还有咳嗽、痰是黄的，3天了，怎么治？"
    answer = "考虑肺炎。挂呼吸内科，查胸片。可以用阿莫西林。多休息，多喝水。"
    assert find(prompt(asked, diagnosis="肺炎"), answer).faults == ()
    pregnant = prompt(asked + "另外我怀孕了。", diagnosis="肺炎")
    assert find(pregnant, answer).contraindicated == ("胸片",)
    assert find(pregnant, answer.replace("胸片", "血常规")).faults == ()


def test_a_child_must_not_have_aspirin():
    child = prompt("孩子6岁，男孩，发烧，满身小水泡、身上痒，2天了，怎么治？", diagnosis="水痘")
    found = find(child, "考虑水痘。可以吃阿司匹林。")
    assert found.contraindicated == ("阿司匹林",) and "wrong_drug" in found.faults


def test_a_red_flag_needs_a_call_for_now():
    bleeding = prompt("我胃疼，饭后疼、大便发黑，3周了，怎么治？", diagnosis="胃溃疡")
    assert find(bleeding, GOOD).red_flag_missed
    assert find(bleeding, GOOD + "如果呕血，马上去急诊。").red_flag_missed
    assert not find(bleeding, GOOD + "马上去急诊。").red_flag_missed
    assert find(ULCER, GOOD + "马上去急诊。").false_alarm
    assert not find(ULCER, GOOD + "如果呕血，马上去急诊。").false_alarm


def test_a_right_and_friendly_answer_beats_a_right_and_a_friendly_one():
    blend = (
        "您好，请不要太担心。根据您的描述，可能是胃溃疡。\n1. 建议您到消化内科做胃镜。\n"
        "2. 日常请您按时吃饭，少吃辛辣。\n3. 可以在医生指导下使用奥美拉唑。\n祝您早日康复！"
    )
    wrong = blend.replace("胃溃疡", "肺炎").replace("消化内科", "呼吸内科").replace("胃镜", "胸片")
    assert overall(blend) > overall(GOOD) > overall(wrong)
    assert overall(blend) > SCALE[1] - 0.3


def test_the_patients_earlier_turns_count():
    asked = prompt(
        "我胃疼，要紧吗？",
        "饭后疼吗？反酸吗？空腹疼吗？",
        "有饭后疼。反酸，有的。没有空腹疼。",
        diagnosis="胃溃疡",
    )
    assert not find(asked, GOOD).should_ask
    assert find(asked, "空腹疼吗？").asks_pointlessly


def test_without_the_reference_the_most_probable_disease_is_taken_for_true():
    asked = prompt("我胃疼，饭后疼、反酸水，3周了，是什么病？", diagnosis="肺炎")
    assert find(asked, GOOD).diagnosis == "plausible"
    assert find(asked, GOOD, with_reference=False).diagnosis == "right"
    assert overall(GOOD, asked, with_reference=False) > overall(GOOD, asked)


def test_a_prompt_of_another_world_is_refused():
    for diagnosis in (None, "麻疹"):
        with pytest.raises(ValueError, match="needs one of the clinic's diseases"):
            find(prompt("我头痛", diagnosis=diagnosis), GOOD)


def test_the_same_question_gets_the_same_verdict_and_another_seed_another():
    noisy = ClinicJudge(noise=1.0)
    one = [noisy.p_first(asked, asked.reference, distilled(asked)) for asked in PROMPTS]
    two = [noisy.p_first(asked, asked.reference, distilled(asked)) for asked in PROMPTS]
    other = ClinicJudge(noise=1.0, seed=1)
    assert one == two
    assert one != [other.p_first(asked, asked.reference, distilled(asked)) for asked in PROMPTS]


def test_an_exact_judge_does_not_care_for_the_order():
    judge = ClinicJudge()
    for asked in PROMPTS:
        for one, two in itertools.combinations(answers_of(asked), 2):
            assert judge.p_first(asked, one, two) + judge.p_first(asked, two, one) == 1.0


@pytest.mark.parametrize("field, value", [("noise", -1.0), ("length_bias", math.nan)])
def test_a_field_that_is_no_amount_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ClinicJudge(**{field: value})


# Planted biases, measured from verdicts


def log_odds(p):
    return math.log(p / (1 - p))


def pairs():
    """Prompt and two of its answers each."""
    for asked in PROMPTS:
        for one, two in itertools.combinations(answers_of(asked), 2):
            yield asked, one, two


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_the_position_bias_comes_back_in_the_labels_report(noise):
    judge = ClinicJudge(position_bias=0.6, noise=noise)
    verdicts = {}
    for place, (asked, one, two) in enumerate(pairs()):
        verdicts[PairKey(asked.id, place, place + 1)] = Verdicts(
            (judge.p_first(asked, one, two),), (judge.p_first(asked, two, one),)
        )
    figure = report.position_bias(verdicts).log_odds
    tolerance = 3 * figure.standard_error if noise else 1e-6
    assert figure.value == pytest.approx(0.6, abs=tolerance)


def slope(features, outcomes):
    """Of the least-squares line through the origin, and its standard error."""
    squares = math.fsum(x * x for x in features)
    value = math.fsum(x * y for x, y in zip(features, outcomes, strict=True)) / squares
    rest = [y - value * x for x, y in zip(features, outcomes, strict=True)]
    return value, math.sqrt(math.fsum(r * r for r in rest) / (len(rest) - 1) / squares)


@pytest.mark.parametrize(
    "field, feature",
    [
        ("length_bias", lambda found: math.log2(1 + found.length)),
        ("self_preference", distilled_manner),
    ],
)
def test_length_bias_and_self_preference_come_back_from_verdicts(field, feature):
    biased, exact = ClinicJudge(**{field: 0.7}, noise=0.5), ClinicJudge()
    features, excess = [], []
    for asked, one, two in pairs():
        found = [find(asked, text) for text in (one, two)]
        features.append(feature(found[0]) - feature(found[1]))
        p_biased, p_exact = (judge.p_first(asked, one, two) for judge in (biased, exact))
        excess.append(log_odds(p_biased) - log_odds(p_exact))
    value, error = slope(features, excess)
    assert error < 0.2 and value == pytest.approx(0.7, abs=3 * error)


def test_noise_is_as_wide_as_the_field_says():
    noisy, exact = ClinicJudge(noise=0.9), ClinicJudge()
    rest = [log_odds(noisy.p_first(*pair)) - log_odds(exact.p_first(*pair)) for pair in pairs()]
    assert statistics.stdev(rest) == pytest.approx(0.9, rel=0.12)
    assert statistics.fmean(rest) == pytest.approx(0.0, abs=3 * 0.9 / math.sqrt(len(rest)))


def test_scores_lean_as_comparisons_do():
    judge = ClinicJudge(length_bias=0.3)
    for answer in itertools.islice(planted_answers(60, seed=4), 60):
        shift = judge.scores(answer.prompt, answer.text)["overall"]
        plain = ClinicJudge().scores(answer.prompt, answer.text)["overall"]
        assert shift >= plain
