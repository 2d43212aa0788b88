"""Reads a doctor's turns, in Chinese and English: questions, judgement and advice.

On 122 sentences of real Chinese doctors that were labelled by hand after the patterns were written
(a test names them), those that judge or advise are found with a precision of .95 and a recall of
.78. What is not found are mostly drugs and remedies without a verb.
"""

import re
from collections.abc import Iterable

from huatuo_jax.evaluation.patient_faults import plain

# A full stop inside a number or an address ends no sentence.
_SENTENCE = re.compile(r"(?:[^。!?;\n.]|\.(?!\s|$))+[。!?;.]*")
_ASKS = re.compile(
    r"\?[\s”\"』)]*$|(?:吗|么|呢)[。.\s]*$|请问|^(?:有没有|有无|是否)"
    r"|(?:多久|多长时间|几天|几次|多少|怎么样|什么(?:药物?|颜色|时候|症状)|哪里|哪些)了?[。.\s]*$"
    r"|^(?:还)?请[您你]?(?:再|先|详细|具体)*(?:描述|告诉我|提供|说说|说一下|补充)"
    r"|^(?:and |also,? |first,? )?(?:please (?:tell|describe|share|let me know)"
    r"|(?:can|could|would) you (?:please )?(?:tell|describe|share)|tell me)\b"
)
# Says that questions or advice will come, and a sentence that recommends something does more.
_ANNOUNCES = re.compile(
    r"^(?!.*建议(?:[您你先再做去到尽]|带|进行|检查))"
    r"(?!.*\b(?:i|we|i'd|would) (?:recommend|suggest|advise))"
    r"(?=.*(?:(?:需要|想|要|得)(?:先|再|进一步)?(?:了解|知道|问|请教)|(?:通过|问).{0,4}问题|为了"
    r"|(?:会|将|才能|可以|以便)[^,。]{0,8}(?:给|提供|[做作]出|说明)[^,。]{0,8}(?:建议|判断|诊断)"
    r"|希望.{0,8}(?:帮|建议)|祝[您你]|(?:问题|疑问|咨询).{0,20}随时|随时.{0,12}(?:咨询|提问|问我|回复)"
    r"|\b(?:need|want|like|have) to (?:know|ask|understand|learn|gather|get|find)"
    r"|\b(?:some|a few|more|any|other) (?:\w+ )?questions\b"
    r"|\bi(?:'ll| will) (?:ask|try|do my best)))"
)
_COURTESY = re.compile(
    r"(?:还有|有)(?:什么|其他|别的|任何|哪些).{0,8}(?:问题|疑问|帮|需要|咨询|想了解)|(?:可以|能)(?:帮|为)[您你]"
    r"|(?:听|看)?(?:明白|懂)了[吗么]|哪里不舒服|还需要.{0,6}(?:帮助|了解)"
    r"|\b(?:any|other|more|further) (?:\w+ )?(?:questions|concerns)\b|\bhow (?:can|may) i help"
    r"|\banything else (?:i can|you(?:'d| would) like|you want|you need)|\bwhat brings you"
    r"|\bmake sense|\bdo you understand|\bis that (?:clear|okay|ok|alright)"
)
_CONCLUDES = re.compile(
    # Judgement.
    r"考虑|可能|诊断|应该是|多半|大概率|十有八九|估计|怀疑|疑似|怕是|恐怕|这是"
    r"|[^不好头]像[^,。]{1,8}[炎病症癌瘤石疹疮]|提示|符合|属于|患有|得了|引起|引发|导致|造成|偏[高低]"
    r"|没什么?大?(?:事|问题|碍)|(?:问题|影响)不大|(?:不用|无需|不必|别)(?:过于|过多|太)?担[心忧]|治好|自愈"
    # Tests, visits, treatment.
    r"|建议|最好|应(?:该|当)?(?:先|尽快|及时)?(?:去|做|查|进行|注意|避免|休息|服|吃|用|就)"
    r"|需要?(?:做|去|进行|吃|用|注意|控制|预防|在医生)|要(?:吃|去|做|注意|多|少|预防|保持|避免)"
    r"|可以.{0,8}(?:服|吃|喝|用|做|去|试|换|看|观察|涂|敷|选|进行|筛查)"
    r"|口服|服用|外[用涂]|涂抹|注射|敷|坐浴|治疗|手术|就[诊医]|复[查诊]|随访|化验|查一下|挂.{0,4}科|急诊"
    r"|[去到](?:医院|[^,。]{1,5}科)|做[^,。]{1,8}(?:检查|超|镜|图|ct)"
    r"|看(?:中医|医生|.{1,4}科)|吃(?:点|些|一点|.{0,4}药)|[用停吃]药(?!物?史)"
    r"|\d ?(?:mg|g|ml|毫克|克|毫升|片|粒)|一[日天]\d?[一二两三]?次"
    # Ways of life.
    r"|注意(?!事项)|避免|防止|忌|清淡|保持|不[要能宜可](?!咨)|少(?:吃|喝|量)|多(?:喝|吃|饮|休息|运动)|试着|试试|试一试|尝试"
    # English.
    r"|\b(?:consistent with|suggest\w*|indicat\w+|likely|probably|diagnos\w+|appears? to be|due to"
    r"|points? to|caused by|i(?:'m| am)? (?:think|believe|suspect\w*)|nothing serious"
    r"|recommend\w*|advis\w+|prescri\w+|should|treat(?:ment|ed|able)?|therapy|surgery|take \d|avoid"
    r"|follow[- ]up|emergency|specialist|see (?:a|an|your) |make an appointment|antibiotics?"
    r"|plenty of|over-the-counter|you can |try to |seek |watch for|drink |important to|helpful to)"
)


def questions_before_concluding(answers: Iterable[str]) -> tuple[int, bool]:
    """Questions of a doctor up to the first sentence of judgement or advice, and whether it came.

    A question such as "可能是吃坏了吗？" is one; "还有其他问题吗？" is a courtesy and none.
    """
    questions = 0
    for text in answers:
        for match in _SENTENCE.finditer(plain(text)):
            sentence = match.group().strip()
            if _ASKS.search(sentence):
                questions += _COURTESY.search(sentence) is None
            elif _CONCLUDES.search(sentence) and not _ANNOUNCES.search(sentence):
                return questions, True
    return questions, False
