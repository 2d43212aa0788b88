"""The sentences of this world: templates for everything that is said, and the words to fill them.

Of the templates for one thing, one is kept for held-out texts, chosen anew by the fillers: a
disease that training texts name in seven ways is named in the eighth in held-out texts only. So by
construction no sentence of a held-out text with a term of the tables appears in a training text.
`counted_sentences` gives these, so that it can be measured. Sentences without such a term (a
greeting, a goodbye, "多久了？", "不客气。") are the same on both sides and are not counted, and
neither is the bare call for emergency care ("马上去急诊").
"""

from collections.abc import Iterable, Sequence

from huatuo_jax.clinic import symptoms as care
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.reading import find_terms, normal, sentences
from huatuo_jax.clinic.symptoms import SYMPTOMS
from huatuo_jax.clinic.world import Draws, number

# The share of uses of the usual word for a thing, rather than a synonym.
USUAL = 0.9

# Ways to say each thing, each one sentence. Placeholders are filled in order.
TEMPLATES: dict[str, tuple[str, ...]] = {
    # The patient. Fillers: who (孩子 or nothing), symptoms, age, sex, since. Symptoms are between
    # punctuation, so that a tokenizer trained on the texts finds the same pieces in all of them.
    "vague": (  # who, symptom
        "医生，{}{}，怎么办？",
        "您好，{}{}，要紧吗？",
        "{}{}，是怎么回事？",
        "想问一下，{}{}，严重吗？",
        "医生好，{}{}，请帮忙看看。",
        "你好，{}{}，需要去医院吗？",
    ),
    "since": (  # who, first symptom, other symptoms, since
        "医生，{}{}、{}，{}了，怎么办？",
        "{}{}、{}，{}了，是什么病？",
        "你好，{}{}、{}，已经{}了，怎么治？",
        "您好，{}{}、{}，{}了，要紧吗？",
        "想问一下，{}{}、{}，大概{}了，怎么回事？",
    ),
    "full": (  # who, age, sex, first symptom, other symptoms, since
        "{}{}岁，{}，{}、{}，{}了，怎么办？",
        "医生，{}{}岁，{}，{}、{}，{}了，是什么病？",
        "您好，{}{}岁，{}，{}、{}，有{}了，怎么治？",
        "你好，{}{}岁，{}，{}、{}，大概{}了，要紧吗？",
        "想问一下，{}{}岁，{}，{}、{}，{}了，怎么回事？",
    ),
    "condition": (  # who, condition
        "另外，{}{}。",
        "对了，{}{}。",
        "说一下，{}{}。",
        "补充一点，{}{}。",
        "{}{}，用药要注意吗？",
    ),
    "yes": ("有，{}。", "有{}。", "是的，{}。", "{}，有的。", "嗯，{}。", "{}，是这样。"),
    "no": (
        "没有{}。",
        "不，没有{}。",
        "{}没有。",
        "{}倒没有。",
        "没发现{}。",
        "没有{}的情况。",
    ),
    "more": (  # who, symptoms, since
        "{}还有，{}，{}了，怎么办？",
        "{}另外，{}，{}了，严重吗？",
        "{}也有，{}，差不多{}了，要查什么？",
        "补充一下，{}{}，{}了，该怎么治？",
        "还有就是，{}{}，有{}了，吃什么药？",
    ),
    "one_more": ("还有{}。", "另外，{}。", "再有就是{}。", "也{}。", "还{}。"),
    "duration": ("{}了。", "有{}了。", "大概{}。", "差不多{}。"),
    "person": ("{}岁，{}。", "今年{}岁，{}。"),
    "healthy": ("没有过敏，也没有别的病。", "不过敏，没有慢性病。", "这些都没有。"),
    "unsure": ("这个说不清楚。", "这个我不知道。"),
    "nothing_more": ("没有别的不舒服了。", "别的没有了。"),
    "lost": ("医生，我没听明白，该怎么办？", "能再说清楚一点吗？"),
    "thanks": (
        "好的，谢谢医生，再见。",
        "明白了，谢谢您，再见。",
        "知道了，多谢，再见。",
        "好，我去看看，再见。",
    ),
    # The real doctor.
    "ask": ("有没有{}？", "有{}吗？", "{}有没有？", "是不是{}？", "{}，有吗？", "还有{}吗？"),
    "ask_duration": ("多久了？", "几天了？", "什么时候开始的？"),
    "ask_person": ("多大年纪，男的女的？", "几岁，男的女的？"),
    "ask_more": ("还有什么不舒服？", "还有哪里不舒服？", "还有别的症状吗？"),
    "ask_conditions": ("有没有过敏或别的病？", "药物过敏吗，有别的病吗？"),
    "conclude": (
        "考虑{}。",
        "这是{}。",
        "{}。",
        "应该是{}。",
        "看着像{}。",
        "诊断{}。",
        "多半是{}。",
        "符合{}。",
    ),
    "conclude_from": (  # symptoms, disease
        "{}，考虑{}。",
        "{}，这是{}。",
        "{}，应该是{}。",
        "{}，像{}。",
        "{}，多半是{}。",
        "{}，符合{}。",
    ),
    "visit": (  # department, test
        "挂{}，查{}。",
        "去{}做{}。",
        "{}看，先做{}。",
        "到{}，做个{}。",
        "{}就诊，要做{}。",
    ),
    "advise": (
        "{}，{}。",
        "平时{}，{}。",
        "注意{}、{}。",
        "回去{}，{}。",
        "记得{}，{}。",
    ),
    "prescribe": (
        "可以用{}。",
        "药用{}。",
        "开点{}。",
        "{}按说明书用。",
        "先用{}。",
        "用{}就行。",
    ),
    "replace": (  # forbidden drug, drug
        "不能用{}，改用{}。",
        "别用{}，可以用{}。",
        "{}不能用，换成{}。",
        "禁用{}，换用{}。",
    ),
    "forbid": ("不能用{}，药再定。", "别用{}。", "{}不能用，先不吃药。", "禁用{}，用药听医生的。"),
    "no_drug": ("先不用药。", "用药看过再定。"),
    "urgent": (  # symptoms, disease
        "{}，考虑{}，马上去急诊。",
        "{}，怕是{}，现在就去急诊。",
        "{}，像{}，立刻去急诊，别等。",
        "{}，应该是{}，赶紧打120。",
        "{}，多半是{}，赶快去急诊。",
    ),
    "urgent_test": (
        "急诊查{}，{}。",
        "记得{1}，到了做{0}。",
        "要做{}，路上{}。",
        "{1}，等着做{0}。",
    ),
    "real_bye": ("不客气。", "好的，加重再来。", "嗯，再见。"),
    # The distilled doctor.
    "greet": (
        "您好，很理解您的心情。",
        "您好，感谢您的咨询。",
        "您好，请不要太担心。",
        "您好，很高兴为您解答。",
    ),
    "guess": (
        "根据您的描述，可能是{}。",
        "从您说的情况来看，很可能是{}。",
        "您的情况可能与{}有关。",
        "初步考虑可能是{}。",
        "这些表现比较像{}。",
        "结合症状，怀疑是{}。",
        "综合来看，{}的可能性较大。",
    ),
    "guess_from": (  # symptoms, disease
        "您说的{}，可能是{}。",
        "从{}来看，很可能是{}。",
        "您有{}，可能与{}有关。",
        "根据{}，初步考虑可能是{}。",
        "结合{}，怀疑是{}。",
        "{}，综合来看，{}的可能性较大。",
    ),
    "guess_two": (  # symptom, two diseases
        "{}，可能是{}，也可能是{}。",
        "{}，常见的原因有{}和{}。",
        "您说的{}，可能与{}或{}有关。",
        "说到{}，{}、{}都可能有这样的表现。",
        "关于{}，需要考虑{}或者{}。",
    ),
    "explain": (
        "通常是{}造成的。",
        "多数和{}有关。",
        "常见的原因是{}。",
        "它的原因一般是{}。",
    ),
    "guided_visit": (  # department, test
        "建议您到{}做{}，以明确诊断。",
        "请您到{}就诊，完善{}。",
        "可以先去{}，请医生安排{}。",
        "最好在{}完成{}，听医生解释结果。",
        "{}的医生会给您做{}。",
    ),
    "guided_advice": (
        "日常请您{}，{}。",
        "生活中建议{}，{}。",
        "护理上应当{}，同时{}。",
        "平时可以{}，并且{}。",
        "恢复期间{}，也请{}。",
    ),
    "guided_drug": (
        "可以在医生指导下使用{}。",
        "必要时可遵医嘱用{}。",
        "药物方面可以选择{}。",
        "常用的药物有{}，请遵医嘱。",
        "可考虑使用{}，请看好说明书。",
    ),
    "guided_no_drug": ("药物请听医生的安排。", "请不要自己吃药，听医生安排。"),
    "guided_urgent": (
        "情况可能比较急，请马上去急诊或打120。",
        "为了安全，请您立即去急诊或打120。",
    ),
    "watch": (
        "如果出现{}，请马上去急诊。",
        "一旦{}，请立刻就医。",
        "若有{}，请尽快去医院。",
        "要是{}，请马上打120。",
        "如有{}，请及时去急诊。",
    ),
    "wish": ("祝您早日康复！", "希望您尽快好起来！", "如有疑问，欢迎随时咨询！"),
    "kind_bye": (
        "不客气，祝您早日康复，再见！",
        "不客气，请注意休息，有不适及时就诊，再见！",
        "很高兴能帮到您，祝您健康，再见！",
    ),
}
# Fillers outside the tables of `reading.TERMS` that belong to a disease all the same.
_PHRASES = tuple(
    sorted({normal(phrase) for row in DISEASES.values() for phrase in (row.cause, row.watch)})
)


class Writer:
    """Writes sentences in the words of this world, for training texts or for held-out ones."""

    def __init__(self, draws: Draws, *, held_out: bool) -> None:
        """Sets the fields.

        Args:
            draws: of templates and words.
            held_out: use the kept templates only.
        """
        self.draws, self.held_out = draws, held_out

    def say(self, what: str, *fillers: str) -> str:
        """Writes a sentence.

        Args:
            what: a key of `TEMPLATES`.
            fillers: for the placeholders of the template, in order.
        """
        templates = TEMPLATES[what]
        if not fillers:
            return self.draws.choice(templates)
        kept = number("|".join((what, *fillers))) % len(templates)
        if self.held_out:
            return templates[kept].format(*fillers)
        return self.draws.choice(templates[:kept] + templates[kept + 1 :]).format(*fillers)

    def _word(self, words: Sequence[str]) -> str:
        """Draws one of the words, mostly the first, the table's; the others are synonyms."""
        return (
            words[0]
            if len(words) == 1 or self.draws.chance(USUAL)
            else self.draws.choice(words[1:])
        )

    def disease(self, name: str) -> str:
        """Draws one of a disease's names."""
        return self._word(DISEASES[name].words)

    def symptom(self, name: str) -> str:
        """Draws one of a symptom's wordings."""
        return self._word(SYMPTOMS[name].words)

    def symptoms(self, names: Sequence[str]) -> str:
        """Writes several symptoms as one list."""
        return "、".join(self.symptom(name) for name in names)

    def test(self, name: str) -> str:
        """Draws one of a test's names."""
        return self._word(care.TESTS[name])

    def department(self, name: str) -> str:
        """Draws one of a department's names."""
        return self._word(care.DEPARTMENTS[name])

    def advice(self, name: str) -> str:
        """Draws one of the wordings of a piece of advice."""
        return self._word(care.ADVICE[name])

    def drug(self, name: str) -> str:
        """Draws one of a drug's names."""
        return self._word(care.DRUGS[name].words)

    def condition(self, name: str) -> str:
        """Draws one of the wordings of a condition."""
        return self._word(care.CONDITIONS[name])


def counted_sentences(texts: Iterable[str]) -> set[str]:
    """Returns the normalised sentences with a term of the tables, without item numbers."""
    found = set()
    for text in texts:
        for sentence in sentences(text):
            bare = sentence.rstrip("。!?;…~ ")
            terms = {m.name for m in find_terms(bare)} - {care.EMERGENCY}
            if terms or any(phrase in bare for phrase in _PHRASES):
                found.add(bare)
    return found
