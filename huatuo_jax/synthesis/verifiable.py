"""Open questions with one checkable answer out of exam questions, as HuatuoGPT-o1 trains on.

After HuatuoGPT-o1 (arXiv 2412.18925, section 2.1): the teacher rewrites a multiple-choice question
as an open one; a question that needs its options, or whose answer is not unique, is left out. Here
rules look first at what cannot be asked openly, then the teacher answers the open question without
knowing the answer, several times: where the answers disagree, the question is ambiguous.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz import fuzz

from huatuo_jax.data.readers import read_exams
from huatuo_jax.data.records import ExamQuestion, Message, is_empty, messages_to_json
from huatuo_jax.evaluation import exam_sets
from huatuo_jax.evaluation.exam_files import EXAMS, read_exam_sets
from huatuo_jax.evaluation.exam_questions import Question
from huatuo_jax.evaluation.patient_faults import plain
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.synthesis import checks, templates
from huatuo_jax.synthesis.faithfulness import quantities
from huatuo_jax.synthesis.jobs import (
    Candidate,
    Job,
    Rejected,
    Request,
    ask,
    jobs_of,
    object_of,
    text_of,
)

KIND = "verifiable"
_SETS = tuple(name for name in EXAMS if name != "pubmedqa")

# Of an open question these have no one answer, or none without the options.
_NEEDS_OPTIONS = re.compile(
    r"下列|下面(?:哪|的|各)|以下|以上|上述(?:哪|选项|各)|除外|不包括|不正确|错误的是|不属于|不是(?:$|\s*[(（。?？])|不宜|选项"
    r"|哪[一几]?[项种个组].{0,6}(?:不|错|除外)|正确的是\s*[(（]?\s*[)）]?[。?？]?$|说法|叙述|描述"
    r"|\bfollowing\b|\bexcept\b|\bnot true\b|\ball of the\b|\bnone of the\b|\boptions?\b"
    r"|\babove\b|\bwhich of these\b"
)
# Whatever is not among the options is right as well: which one is not, which statement is true.
_NO_OPEN_FORM = re.compile(
    r"除外|不包括|不正确|错误|不属于|不是|不宜|不符合|没有|不应|不能|不会|不需|无关|说法|叙述|描述|表述|正确的是"
    r"|\bexcept\b|\bnot\b|\bleast\b|\bfalse\b|\bstatements?\b|\bincorrect\b"
)
_OF_ALL = re.compile(r"以上(?:都|均|皆|全)|都是|均是|全部|all of the above|none of the above|both")
_LONGEST_ANSWER = 40  # Characters of Chinese, or of Latin letters three times as many.
_SAME = 85.0  # Share in percent from which on two short answers are the same.
_BRACKETS = re.compile(r"[(（][^)）]*[)）]|[\s。.,，;；:：、\"'“”‘’]")


@dataclass(frozen=True, kw_only=True)
class VerifiableMaker:
    """Makes open questions, one of each exam question.

    Attributes:
        questions: in their order.
        num_answers: times that the teacher answers without knowing the answer.
        seed: part of the rows' ids.
        batch_size: questions that are taken together.
    """

    questions: Sequence[ExamQuestion]
    num_answers: int = 2
    seed: int = 0
    batch_size: int = 64
    kind: str = field(default=KIND, init=False)

    @property
    def num_candidates(self) -> int:
        """One for each question."""
        return len(self.questions)

    def settings(self) -> dict[str, Any]:
        """Prompts, questions and the number of answers."""
        return {
            "prompts": templates.digest("question", "verify"),
            "questions": sha256("\0".join(repr(one) for one in self.questions))[:16],
            "num_answers": self.num_answers,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def batch(self, number: int, kept: Sequence[Candidate]) -> list[tuple[str, Job]]:
        """Returns the next questions."""
        first = number * self.batch_size
        return jobs_of(
            self.questions[first : first + self.batch_size],
            lambda _, one: self._job(one),
            first=first,
            name=f"{KIND}-{self.seed}",
        )

    def assumed(self, request: Request) -> str:
        """Returns an open question, or the right answer to it."""
        answer = str(request.material["answer"])
        if request.task == "verify":
            return json.dumps({"unique": True, "answer": answer}, ensure_ascii=False)
        found = {"usable": True, "question": request.material["question"], "answer": answer}
        return json.dumps(found, ensure_ascii=False)

    def _job(self, one: ExamQuestion) -> Job:
        language = checks.language(one.question) or "zh"
        subject = one.extra.get("subject")
        labels = {
            "language": language,
            "taken from": one.source,
            "subject": subject if isinstance(subject, str) and subject else "unknown",
        }
        try:
            answer = _checkable(one)
            question, answer = yield from _opened(one, answer, language)
            yield from _verified(question, answer, language, self.num_answers)
        except Rejected as rejected:
            return [rejected.after(one.question, labels)]
        message = Message("user", question)
        row = {"messages": messages_to_json([message]), "reference": answer}
        extra = {"question_id": one.id, "exam_question": one.question}
        return [
            Candidate(
                messages=(message, Message("assistant", answer)),
                prompt=question,
                labels=labels,
                extra=extra,
                row=row,
            )
        ]


def read_exam_questions(sources: Sequence[str]) -> list[ExamQuestion]:
    """Reads exam questions: a path in the project's own form, or `SET:PATH` of a published set.

    Args:
        sources: such as `exams.jsonl`, `cmexam:test.csv` or `apollo:zh_cmexam.jsonl`; the sets are
            those of the evaluation whose options have letters.

    Raises:
        ValueError: a file cannot be read, or there are no questions.
    """
    found: list[ExamQuestion] = []
    for source in sources:
        name, _, path = source.partition(":")
        if name == "apollo":
            found += map(_of_set, exam_sets.read_apollo(path).questions)
        elif name in _SETS:
            found += map(_of_set, read_exam_sets({name: path})[name].questions)
        else:
            found += read_exams(source)
    if not found:
        raise ValueError("source: there are no exam questions")
    return found


def _of_set(one: Question) -> ExamQuestion:
    return ExamQuestion(
        id=one.id,
        question=one.text,
        options=one.options,
        answer="".join(sorted(one.answer)),
        source=one.exam,
        extra={"subject": one.subject},
    )


def _checkable(one: ExamQuestion) -> str:
    """Returns the text of the one right option, where an open question can ask for it.

    Raises:
        Rejected: by rules, before anything is paid for.
    """
    if len(one.answer) != 1:
        raise Rejected("several answers", one.answer, one.question)
    answer = one.options[one.answer].strip()
    wide = len(answer) if checks.language(answer) != "en" else len(answer) / 3
    if is_empty(answer) or wide > _LONGEST_ANSWER:
        raise Rejected("answer too long", f"{len(answer)} characters", answer)
    if _OF_ALL.search(plain(answer)):
        raise Rejected("needs its options", answer, answer)
    found = _NO_OPEN_FORM.search(_last_sentence(plain(one.question)))
    if found is not None:
        raise Rejected("needs its options", found.group(), answer)
    return answer


def _last_sentence(question: str) -> str:
    """Returns what is asked, without the case before it."""
    return re.split(r"[。;\n]|\.\s", question.strip().rstrip("。.?？:： \t()（）"))[-1]


def _opened(one: ExamQuestion, answer: str, language: str) -> Any:
    """Asks for the open question; returns it with its answer."""
    options = "\n".join(f"{label}. {text}" for label, text in one.options.items())
    values = {"question": one.question, "options": options, "answer": answer}
    text = yield from ask(
        Request(
            step="question",
            task="question",
            messages=templates.fill("question", language, values),
            material={"question": one.question, "answer": answer},
        )
    )
    found = object_of(text)
    if found.get("usable") is False:
        raise Rejected("needs its options", "the teacher finds no open question", text)
    question, stated = found.get("question"), found.get("answer")
    if not isinstance(question, str) or not isinstance(stated, str) or is_empty(question):
        raise Rejected("broken JSON", "question or answer is missing", text)
    question, stated = question.strip(), stated.strip()
    if not same_answer(stated, answer):
        raise Rejected("answer changed", f"{stated}, not {answer}", question)
    needs = _NEEDS_OPTIONS.search(plain(question))
    if needs is not None:
        raise Rejected("needs its options", needs.group(), question)
    if _core(answer) in _core(question):
        raise Rejected("answer in the question", answer, question)
    if checks.switches_language(question, language):
        raise Rejected("language", f"{checks.language(question)}, not {language}", question)
    lost = quantities(one.question) - quantities(question)
    if lost:
        raise Rejected("facts lost", ", ".join(map(str, lost)), question)
    return question, answer


def _verified(question: str, answer: str, language: str, num_answers: int) -> Any:
    """Has the teacher answer blindly; raises Rejected where it is ambiguous."""
    if not num_answers:
        return
    replies = yield [
        Request(
            step=f"verify-{number}",
            task="verify",
            messages=templates.fill("verify", language, {"question": question}),
            material={"answer": answer},
        )
        for number in range(num_answers)
    ]
    given: Counter[str] = Counter()
    for reply in replies:
        found = object_of(text_of(reply))
        if found.get("unique") is False:
            raise Rejected("ambiguous", "the teacher finds several answers", question)
        stated = found.get("answer")
        if not isinstance(stated, str):
            raise Rejected("broken JSON", "the answer is missing", question)
        given[stated.strip()] += 1
    if not any(same_answer(one, answer) for one in given):
        first = next(iter(given))
        agreed = all(same_answer(one, first) for one in given)
        reason = "answered otherwise" if agreed else "ambiguous"
        raise Rejected(reason, f"answered {'; '.join(given)}, not {answer}", question)


def same_answer(one: str, other: str) -> bool:
    """Returns True if two short answers are the same but for marks, brackets and a word or two.

    One may hold the other, where it is not much longer; numbers have to be the same.
    """
    first, second = _core(one), _core(other)
    if not first or not second:
        return False
    if quantities(one).keys() != quantities(other).keys():
        return False
    if fuzz.ratio(first, second) >= _SAME:
        return True
    short, long = sorted((first, second), key=len)
    return len(short) >= 2 and short in long and len(long) <= 2 * len(short) + 4


def _core(text: str) -> str:
    return _BRACKETS.sub("", plain(text))
