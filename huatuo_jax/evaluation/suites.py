"""Evaluation suites that ask no judge: lexical, exams, and the clinic's truth.

A suite has the models answer, writes a record of each item, and returns figures as JSON.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from huatuo_jax.clinic import dialogues
from huatuo_jax.clinic.judge import ClinicJudge, score
from huatuo_jax.core.statistics import Interval, Values, interval_of, mean_difference
from huatuo_jax.data.records import Prompt, messages_to_json
from huatuo_jax.evaluation import exam_answers, lexical
from huatuo_jax.evaluation.exam_prompts import (
    PUBLISHED_FORMS,
    LikelihoodPrompt,
    PromptForm,
    chat_messages,
    default_form,
    likelihood_prompt,
)
from huatuo_jax.evaluation.exam_questions import ExamSet, Question, draw_examples
from huatuo_jax.evaluation.exam_scores import Answer, choose_by_likelihood, score_exam
from huatuo_jax.evaluation.lexical import LexicalSettings, Pair
from huatuo_jax.evaluation.reference_answers import ReferenceQuestion
from huatuo_jax.evaluation.session import Session, failures, judged_text
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.judge.offline import TRUTHS, TruthJudge

By = Literal["likelihood", "generation"]
BYS: tuple[By, ...] = get_args(By)

_FIRST_EXAMPLES = ("cmmlu", "ceval", "mmlu")
"""Sets whose first examples of a class are taken, in the order of the file."""
_EXCLUSIONS_SHOWN = 20


class LexicalSuite:
    """BLEU, GLEU, ROUGE and Distinct on sets with reference answers."""

    name = "lexical"

    def __init__(
        self,
        sets: Mapping[str, Sequence[ReferenceQuestion]],
        settings: LexicalSettings,
        *,
        conventions: bool,
    ) -> None:
        """Takes the sets that were read.

        Args:
            sets: by name.
            settings: the convention of the figures.
            conventions: whether the figures are computed under all conventions, too.
        """
        self._sets, self._settings, self._conventions = sets, settings, conventions

    def test_texts(self) -> dict[str, str]:
        """The questions with their first reference."""
        return {
            f"{name}/{one.id}": "\n".join((one.question, *one.references[:1]))
            for name, found in self._sets.items()
            for one in found
        }

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer the questions of all sets."""
        for name in self._sets:
            self._responses(session, name, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of each set and model."""
        result: dict[str, Any] = {"convention": str(self._settings), "sets": {}}
        records = []
        for name in self._sets:
            by_model: dict[str, Any] = {}
            questions = self._chosen(session, name)
            for model in session.models:
                replies = self._responses(session, name, model)
                if session.dry:
                    continue
                pairs = [
                    Pair(one.id, judged_text(replies[one.id]), one.references) for one in questions
                ]
                by_model[model] = lexical.score(pairs, self._settings).to_json()
                by_model[model]["responses"] = failures(replies)
                if self._conventions:
                    by_model[model]["conventions"] = [
                        {
                            "convention": str(one.settings),
                            "values": dict(one.values),
                            "corpus_distinct": one.corpus_distinct,
                            "ratios": one.ratios(),
                        }
                        for one in lexical.conventions(pairs, self._settings)
                    ]
                records += [
                    {
                        "set": name,
                        "model": model,
                        "id": pair.id,
                        "prompt": _question_prompt(one),
                        "references": list(pair.references),
                        "reply": replies[pair.id]._asdict(),
                        "response": pair.response,
                        "values": lexical.pair_values(pair, self._settings),
                    }
                    for one, pair in zip(questions, pairs, strict=True)
                ]
            result["sets"][name] = {"num": len(questions), "models": by_model}
        if session.dry:
            return None
        session.write_records(self.name, records)
        return result

    def _chosen(self, session: Session, name: str) -> list[ReferenceQuestion]:
        return session.limited(self._sets[name], name)

    def _responses(self, session: Session, name: str, model: str) -> dict[str, ChatReply]:
        prompts = {one.id: _question_prompt(one) for one in self._chosen(session, name)}
        return session.responses(f"{self.name}/{name}", model, prompts)


def _question_prompt(one: ReferenceQuestion) -> list[dict[str, str]]:
    return [{"role": "user", "content": one.question}]


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """Settings of the exams.

    Attributes:
        by: `generation` reads the answer from a response; `likelihood` takes the answer that is
            likeliest behind the plain question, which saved models alone have.
        form: of the prompts: `default`, or one of the published ones by name.
        num_examples: worked questions before each one (few-shot).
        seed: of the draw of the examples.
    """

    by: tuple[By, ...] = ("generation",)
    form: str = "default"
    num_examples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not self.by or set(self.by) - set(BYS) or len(set(self.by)) < len(self.by):
            raise ValueError(f"by is {','.join(self.by)!r}; it should be {' or '.join(BYS)}, once")
        if self.form != "default" and self.form not in PUBLISHED_FORMS:
            forms = ", ".join(PUBLISHED_FORMS)
            raise ValueError(f"form is {self.form!r}; it should be default, or one of {forms}")
        if self.num_examples < 0:
            raise ValueError(f"num_examples={self.num_examples} must be at least 0")

    def form_of(self, question: Question) -> PromptForm:
        """The form of a question's prompt."""
        return default_form(question) if self.form == "default" else PUBLISHED_FORMS[self.form]


class ExamSuite:
    """Accuracy on multiple-choice exams, by generation and by likelihood."""

    name = "exams"

    def __init__(
        self,
        sets: Mapping[str, ExamSet],
        examples: Mapping[str, Sequence[Question]],
        cfg: ExamConfig,
    ) -> None:
        """Takes the sets that were read, and builds every prompt once to see that it can be.

        Args:
            sets: by name.
            examples: questions to draw worked examples from, by set.
            cfg: the settings.

        Raises:
            ValueError: a set without examples where some are wanted, a class with too few, or a
                question that lacks what the form needs.
        """
        self._sets, self._examples, self._cfg = sets, examples, cfg
        for name, found in sets.items():
            if cfg.num_examples and name not in examples:
                raise ValueError(
                    f"num_examples={cfg.num_examples}, and there are no examples for {name}: a"
                    " set of folders has them in dev, any other one in a file of examples"
                )
            for question in found.questions:
                self._messages(name, question)

    def test_texts(self) -> dict[str, str]:
        """The questions without their options."""
        return {
            f"{name}/{one.id}": one.text
            for name, found in self._sets.items()
            for one in found.questions
        }

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer the questions of all sets."""
        for name, by in itertools.product(self._sets, self._cfg.by):
            self._answers(session, name, model, by)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of each set, model and way of answering."""
        result: dict[str, Any] = {"settings": asdict(self._cfg), "sets": {}}
        records = []
        for name, found in self._sets.items():
            questions = self._chosen(session, name)
            by_model: dict[str, Any] = {}
            for model, by in itertools.product(session.models, self._cfg.by):
                answers, rows = self._answers(session, name, model, by)
                if session.dry:
                    continue
                by_model.setdefault(model, {})[by] = {
                    **score_exam(questions, answers).to_json(),
                    "num_too_long": sum(bool(row.get("too_long")) for row in rows),
                }
                records += rows
            result["sets"][name] = {
                "num": len(questions),
                "num_rows": found.num_rows,
                "num_empty_options": found.num_empty_options,
                "excluded": found.reasons(),
                "first_excluded": [one._asdict() for one in found.excluded[:_EXCLUSIONS_SHOWN]],
                "models": by_model,
            }
        if session.dry:
            return None
        session.write_records(self.name, records)
        return result

    def _chosen(self, session: Session, name: str) -> list[Question]:
        return session.limited(self._sets[name].questions, name)

    def _answers(
        self, session: Session, name: str, model: str, by: By
    ) -> tuple[list[Answer], list[dict[str, Any]]]:
        """The answers to a set's questions, and their records."""
        questions = self._chosen(session, name)
        common = {"set": name, "model": model, "by": by}
        suite = f"{self.name}/{name}/{by}"
        answers: list[Answer] = []
        rows = []
        if by == "generation":
            prompts = {one.id: self._messages(name, one) for one in questions}
            replies = session.responses(suite, model, prompts)
            for one in questions:
                reply = replies[one.id]
                answer = (
                    None
                    if reply.text is None
                    else exam_answers.extract_answer(
                        reply.text, one.options, several=one.kind == "multiple"
                    )
                )
                answers.append(answer)
                rows.append(
                    _exam_row(common, one, answer)
                    | {"prompt": prompts[one.id], "reply": reply._asdict()}
                    | {"too_long": reply.failure == "too long"}
                )
            return answers, rows
        asked = {one.id: self._likelihood(name, one) for one in questions}
        found = session.log_probs(
            suite, model, {key: (one.context, one.continuations) for key, one in asked.items()}
        )
        for question in questions:
            values, prompt = found[question.id], asked[question.id]
            chosen = None if values is None else choose_by_likelihood(values, prompt.answers)
            answers.append(None if chosen is None else chosen.answer)
            rows.append(
                _exam_row(common, question, answers[-1])
                | {
                    "prompt": prompt.context,
                    "continuations": list(prompt.continuations),
                    "log_probs": None if values is None else list(values),
                    "gap": None if chosen is None else chosen.gap,
                    "too_long": values is None,
                }
            )
        return answers, rows

    def _drawn(self, name: str, question: Question) -> list[Question]:
        if not self._cfg.num_examples:
            return []
        return draw_examples(
            question,
            self._examples[name],
            num_examples=self._cfg.num_examples,
            seed=None if name in _FIRST_EXAMPLES else self._cfg.seed,
        )

    def _messages(self, name: str, question: Question) -> list[dict[str, str]]:
        form = self._cfg.form_of(question)
        return chat_messages(question, form, examples=self._drawn(name, question))

    def _likelihood(self, name: str, question: Question) -> LikelihoodPrompt:
        form = self._cfg.form_of(question)
        return likelihood_prompt(question, form, examples=self._drawn(name, question))


def _exam_row(common: Mapping[str, Any], question: Question, answer: Answer) -> dict[str, Any]:
    return {
        **common,
        "id": question.id,
        "key": sorted(question.answer),
        "extracted": None if answer is None else sorted(answer),
        "right": answer == question.answer,
    }


class ClinicSuite:
    """The clinic's held-out prompts, whose truth is known: no judge is asked."""

    name = "clinic"

    def __init__(self, count: int, *, seed: int) -> None:
        """Writes the prompts.

        Args:
            count: prompts.
            seed: of the cases; other ones for another seed.
        """
        self._prompts: list[Prompt] = list(dialogues.prompts(count, seed=seed, held_out=True))
        self._seed = seed

    def test_texts(self) -> dict[str, str]:
        """Nothing: the cases are drawn anew by their seed."""
        return {}

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer all prompts."""
        self._responses(session, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of each model, and the differences of every two."""
        judge = TruthJudge()
        measured: dict[str, dict[str, Values]] = {}
        result: dict[str, Any] = {"judge": judge.name, "seed": self._seed, "models": {}}
        records = []
        prompts = session.limited(self._prompts, self.name)
        for model in session.models:
            replies = self._responses(session, model)
            if session.dry:
                continue
            values: dict[str, dict[str, float | None]] = {}
            for prompt in prompts:
                text = judged_text(replies[prompt.id])
                values[prompt.id] = _truths(judge, prompt, text)
                records.append(
                    {
                        "model": model,
                        "id": prompt.id,
                        "prompt": messages_to_json(prompt.messages),
                        "diagnosis": prompt.diagnosis,
                        "reply": replies[prompt.id]._asdict(),
                        "response": text,
                        "values": values[prompt.id],
                        "reason": ClinicJudge().reason(prompt, text),
                    }
                )
            names = list(next(iter(values.values())))
            measured[model] = {
                name: {key: [found[name]] for key, found in values.items()} for name in names
            }
            result["models"][model] = {
                "figures": {
                    name: _interval([found[name] for found in values.values()], session.seed)
                    for name in names
                },
                "responses": failures(replies),
            }
        if session.dry:
            return None
        result["num"] = len(prompts)
        result["differences"] = [
            {
                "models": [one, other],
                "figures": {
                    name: _json(mean_difference(found, measured[other][name], seed=session.seed))
                    for name, found in measured[one].items()
                },
            }
            for one, other in itertools.combinations(session.models, 2)
        ]
        session.write_records(self.name, records)
        return result

    def _responses(self, session: Session, model: str) -> dict[str, ChatReply]:
        prompts = session.limited(self._prompts, self.name)
        asked = {one.id: messages_to_json(one.messages) for one in prompts}
        return session.responses(self.name, model, asked)


def _truths(judge: TruthJudge, prompt: Prompt, text: str) -> dict[str, float | None]:
    """Returns the truth about a response: shares (0 to 1) and the exact judge's scores (1 to 5)."""
    found = ClinicJudge().findings(prompt, text)
    shares = {f"diagnosis_{name}": 0.0 for name in ("right", "plausible", "wrong", "absent")}
    shares[f"diagnosis_{found.diagnosis}"] = 1.0
    truths = judge.truths(prompt, text)
    assert set(truths) == set(TRUTHS)
    scores = score(found)
    return {
        **shares,
        "diagnosis_right_where_clear": truths["diagnosis_right"],
        "asks_when_needed": truths["asks_when_needed"],
        "contraindicated": truths["contraindicated"],
        "red_flag_missed": truths["red_flag_missed"],
        "informative": scores["informative"],
        "overall": scores["overall"],
    }


def _interval(values: Sequence[float | None], seed: int) -> dict[str, float | int] | None:
    return _json(interval_of([value for value in values if value is not None], seed=seed))


def _json(found: Interval | None) -> dict[str, float | int] | None:
    return None if found is None else found.to_json()
