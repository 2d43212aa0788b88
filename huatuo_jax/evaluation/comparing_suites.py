"""Evaluation suites that compare every two models: single_turn questions and multi_turn talks.

A judge behind a server, or the offline rubric, sees each two responses in both orders. multi_turn
first has each model consult with a patient, turn by turn over all open cases at once.
"""

import asyncio
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from huatuo_jax.clinic import world
from huatuo_jax.core.statistics import agreement_share, cohen_kappa
from huatuo_jax.data.records import is_empty, messages_to_json
from huatuo_jax.evaluation import consultations, human, human_ratings
from huatuo_jax.evaluation.consultations import (
    ConsultationSettings,
    ConsultationState,
    PatientCase,
    consultation_outcome,
)
from huatuo_jax.evaluation.pairwise import (
    Ballot,
    Contest,
    ContestOutcome,
    IntentQuestion,
    ballots,
    conversation_template,
    outcomes,
    pairwise_figures,
)
from huatuo_jax.evaluation.session import Read, ServerJudge, Session, failures, judged_text
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.judge.judgements import Judgement, JudgementFailed
from huatuo_jax.judge.offline import OfflineJudge
from huatuo_jax.judge.openai import JudgePrompt, read_judge_prompt

PatientName = Literal["clinic", "judge"]
PairJudge = ServerJudge | OfflineJudge

_ORDER_NAMES = ("one first", "other first")
HUMAN_FOLDER = "human"


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who compares responses.

    Attributes:
        first: whose verdicts are the figures; None where nobody judges.
        second: whose verdicts are compared with those; None for nobody.
    """

    first: PairJudge | None = None
    second: PairJudge | None = None


class SingleTurnSuite:
    """KUAKE-QIC: responses to patients' questions compared, by intent."""

    name = "single_turn"

    def __init__(
        self,
        questions: Sequence[IntentQuestion],
        judges: Judges,
        *,
        make_page: bool = False,
        ratings: Sequence[str] = (),
    ) -> None:
        """Takes the questions that were read.

        Args:
            questions: of the set.
            judges: who compares.
            make_page: write the blind page for doctors; needs two models.
            ratings: files of doctors who rated that page.
        """
        self._questions, self._judges = questions, judges
        self._make_page, self._ratings = make_page, tuple(ratings)

    def test_texts(self) -> dict[str, str]:
        """The questions."""
        return {f"kuake_qic/{one.id}": one.question for one in self._questions}

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer all questions."""
        self._responses(session, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of every two models."""
        questions = session.limited(self._questions, self.name)
        replies = {model: self._responses(session, model) for model in session.models}
        texts = {
            model: {name: judged_text(reply) for name, reply in found.items()}
            for model, found in replies.items()
        }
        comparing = Comparing(session, self.name, self._judges, read_judge_prompt("pairwise"))
        pairs: dict[tuple[str, str], list[Contest]] = {
            (one, other): [
                Contest(
                    prompt=question.prompt,
                    group=question.intent,
                    one=texts[one][question.id],
                    other=texts[other][question.id],
                )
                for question in questions
            ]
            for one, other in itertools.combinations(session.models, 2)
        }
        compared = {
            models: comparing.compare(models, contests) for models, contests in pairs.items()
        }
        if session.dry:
            return None
        session.write_records(
            self.name,
            [
                {
                    "model": model,
                    "id": one.id,
                    "intent": one.intent,
                    "prompt": _asked(one),
                    "reply": replies[model][one.id]._asdict(),
                    "response": texts[model][one.id],
                }
                for model in session.models
                for one in questions
            ],
        )
        comparing.write_records()
        result: dict[str, Any] = {
            "num": len(questions),
            "models": {
                model: {
                    "responses": failures(found),
                    "mean_characters": sum(map(len, texts[model].values())) / len(questions),
                }
                for model, found in replies.items()
            },
            "comparisons": [one for one in compared.values() if one is not None],
        }
        if self._make_page or self._ratings:
            result["human"] = self._human(session, pairs, comparing)
        return result

    def _responses(self, session: Session, model: str) -> dict[str, ChatReply]:
        questions = session.limited(self._questions, self.name)
        return session.responses(self.name, model, {one.id: _asked(one) for one in questions})

    def _human(
        self,
        session: Session,
        pairs: Mapping[tuple[str, str], Sequence[Contest]],
        comparing: "Comparing",
    ) -> dict[str, Any]:
        """The blind page, or what the doctors who rated it say."""
        ((models, contests),) = pairs.items()
        found = [
            human.HumanPair(
                id=one.id,
                messages=one.prompt.messages,
                systems=models,
                responses=(one.one, one.other),
            )
            for one in contests
        ]
        folder = session.output / HUMAN_FOLDER
        blind = _blind_set(found, human.HumanConfig(seed=session.seed), folder)
        result: dict[str, Any] = {
            "page": f"{HUMAN_FOLDER}/{human.PAGE_NAME}",
            "set": blind.hash,
            "num_items": len(blind.items),
        }
        if self._ratings:
            files = human_ratings.read_ratings(self._ratings, blind)
            judged = comparing.outcomes.get(models)
            known = None
            if judged is not None:
                known = {name: one for name, one in judged.items() if one is not None}
            result["ratings"] = human_ratings.human_figures(
                blind, files, judge=known, seed=session.seed
            )
        return result


def _asked(question: IntentQuestion) -> list[dict[str, str]]:
    return messages_to_json(question.prompt.messages)


def _blind_set(
    pairs: Sequence[human.HumanPair], cfg: human.HumanConfig, folder: pathlib.Path
) -> human.BlindSet:
    """The set of the folder, written where there is none.

    Raises:
        ValueError: the folder holds a set of other responses, which raters may be at work on.
    """
    blind = human.make_blind_set(pairs, cfg)
    key = folder / human.KEY_NAME
    if not key.exists():
        human.write_human_set(blind, folder)
    elif human.read_human_set(key).hash != blind.hash:
        raise ValueError(
            f"{folder} holds a page of other responses, whose ratings would no longer fit; give"
            " another --output, or move it away"
        )
    return blind


class Comparing:
    """Has every two models' responses judged, and keeps the verdicts for the records."""

    def __init__(self, session: Session, suite: str, judges: Judges, template: JudgePrompt) -> None:
        """Asks nothing yet.

        Args:
            session: the evaluation.
            suite: name of the suite.
            judges: who compares.
            template: of the judge's prompt.
        """
        self._session, self._suite = session, suite
        self._judges, self._template = judges, template
        self.outcomes: dict[tuple[str, str], dict[str, ContestOutcome | None]] = {}
        self._records: list[dict[str, Any]] = []

    def compare(
        self, models: tuple[str, str], contests: Sequence[Contest]
    ) -> dict[str, Any] | None:
        """The figures of two models; None where nobody judges, and in a dry run."""
        if self._judges.first is None or not contests:
            return None
        judgements = self._judgements(models, contests, self._judges.first)
        second = None
        if self._judges.second is not None:
            second = self._judgements(models, contests, self._judges.second)
        if self._session.dry:
            return None
        seed = self._session.seed
        self.outcomes[models] = outcomes(contests, judgements)
        return {
            "models": list(models),
            "figures": pairwise_figures(contests, judgements, seed=seed).to_json(),
            "second_judge": None
            if second is None
            else {
                "figures": pairwise_figures(contests, second, seed=seed).to_json(),
                "agreement": self._agreement(models, contests, second),
            },
        }

    def write_records(self) -> None:
        """Writes every verdict, failed ones too, with its raw replies."""
        self._session.write_records(f"{self._suite}_verdicts", self._records)

    def _agreement(
        self, models: tuple[str, str], contests: Sequence[Contest], second: Sequence[Judgement]
    ) -> dict[str, Any]:
        """Cohen's kappa of the judges' outcomes, equal responses left out."""
        ones, others = self.outcomes[models], outcomes(contests, second)
        names = [
            one.id
            for one in contests
            if not one.same and ones[one.id] is not None and others[one.id] is not None
        ]
        labels, second_labels = [ones[name] for name in names], [others[name] for name in names]
        return {
            "kappa": cohen_kappa(labels, second_labels),
            "agreement": agreement_share(labels, second_labels),
            "num_contests": len(names),
        }

    def _judgements(
        self, models: tuple[str, str], contests: Sequence[Contest], judge: PairJudge
    ) -> list[Judgement]:
        settings = dict(judge.settings() if isinstance(judge, ServerJudge) else judge.settings)
        named: dict[str, Ballot] = {}
        one, other = map(self._session.source, models)
        for ballot in ballots(
            contests, judge=judge.name, settings=settings, template=self._template
        ):
            order = _ORDER_NAMES[ballot.question.answers[0]]
            named[f"{one} against {other}/{ballot.question.prompt.id}/{order}"] = ballot
        if isinstance(judge, OfflineJudge):
            found = {} if self._session.dry else _offline(named, judge)
            replies: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
        else:
            requests = {name: ballot.messages for name, ballot in named.items()}

            def read(name: str, reply: ChatReply) -> Read[Judgement]:
                judgement = _judgement(named[name], reply)
                return Read(value=judgement, missing=int(judgement.failed))

            verdicts = self._session.verdicts(self._suite, requests, read, judge=judge)
            found = {name: one.value for name, one in verdicts.items()}
            replies = {name: one.to_json()["replies"] for name, one in verdicts.items()}
        self._records += [
            {
                "models": list(models),
                "judge": judge.name,
                "id": named[name].question.prompt.id,
                "order": list(named[name].question.answers),
                "judge_prompt": list(named[name].messages),
                "replies": replies[name],
                "p_first": judgement.p_first,
                "reason": judgement.reason,
                "error": judgement.error,
            }
            for name, judgement in found.items()
        ]
        return list(found.values())


def _judgement(ballot: Ballot, reply: ChatReply) -> Judgement:
    if reply.text is not None:
        return ballot.judgement(reply.text, finish_reason=reply.finish_reason)
    failed = JudgementFailed(
        reply.error or "no reply", failure="refused" if reply.failure == "refused" else "unanswered"
    )
    return ballot.question.judgement(failed, paid=False)


def _offline(named: Mapping[str, Ballot], judge: OfflineJudge) -> dict[str, Judgement]:
    async def run() -> dict[str, Judgement]:
        return {
            name: one.question.judgement(await one.question.ask(judge), paid=False)
            for name, one in named.items()
        }

    return asyncio.run(run())


@dataclass
class _Talk:
    """A consultation that goes on.

    Attributes:
        state: the turns so far.
        stopped: why it cannot go on, although it is not over; None while it can.
        replies: raw replies in order.
    """

    state: ConsultationState
    stopped: str | None
    replies: list[dict[str, Any]]

    @property
    def speaker(self) -> consultations.Speaker | None:
        """Who speaks next; None where it is over or cannot go on."""
        return None if self.stopped else self.state.speaker

    def add(self, reply: ChatReply, *, by_patient: bool) -> None:
        """Takes the next turn; one without words ends the talk."""
        self.replies.append({"speaker": "user" if by_patient else "assistant", **reply._asdict()})
        who = "patient" if by_patient else "model"
        if reply.text is None:
            self.stopped = f"no reply of the {who}: {reply.failure}"
            return
        text = judged_text(reply)
        self.state = self.state.add(text)
        if is_empty(text):
            self.stopped = f"empty reply of the {who}"

    @property
    def broken(self) -> bool:
        """True where a reply never came, so that the consultation tells nothing."""
        return self.stopped is not None and self.stopped.startswith("no reply")


class MultiTurnSuite:
    """Consultations with a simulated patient, their outcomes, and whole talks compared."""

    name = "multi_turn"

    def __init__(
        self,
        cases: Sequence[PatientCase],
        settings: ConsultationSettings,
        judges: Judges,
        *,
        clinic_cases: Mapping[str, world.Case] | None = None,
    ) -> None:
        """Takes the cases that were read or drawn.

        Args:
            cases: to consult on.
            settings: how consultations end.
            judges: who compares whole talks.
            clinic_cases: by id, where the clinic's patient speaks; None where the judge's model
                plays the patient.
        """
        self._cases, self._settings, self._judges = cases, settings, judges
        self._clinic_cases = clinic_cases

    def test_texts(self) -> dict[str, str]:
        """The descriptions of the cases."""
        return {f"med_dialog/{one.id}": one.description for one in self._cases if one.description}

    def answer(self, session: Session, model: str) -> None:
        """Has a model consult on all cases."""
        self._consult(session, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns outcomes of each model and the figures of every two."""
        talks = {model: self._consult(session, model) for model in session.models}
        comparing = Comparing(session, self.name, self._judges, conversation_template())
        compared = []
        for one, other in itertools.combinations(session.models, 2):
            whole = [
                name
                for name in talks[one]
                if not talks[one][name].broken and not talks[other][name].broken
            ]
            contests = consultations.conversation_contests(
                [talks[one][name].state for name in whole],
                [talks[other][name].state for name in whole],
            )
            compared.append(comparing.compare((one, other), contests))
        if session.dry:
            return None
        session.write_records(
            self.name,
            [
                {
                    "model": model,
                    "id": name,
                    **talk.state.to_json(),
                    "stopped": talk.stopped,
                    "outcome": _outcome_json(talk),
                    "replies": talk.replies,
                }
                for model, found in talks.items()
                for name, talk in found.items()
            ],
        )
        comparing.write_records()
        return {
            "num": len(session.limited(self._cases, self.name)),
            "patient": "judge" if self._clinic_cases is None else "clinic",
            "settings": asdict(self._settings),
            "models": {model: self._figures(found, session) for model, found in talks.items()},
            "comparisons": [one for one in compared if one is not None],
        }

    def _figures(self, talks: Mapping[str, _Talk], session: Session) -> dict[str, Any]:
        found = [consultation_outcome(one.state) for one in talks.values() if not one.broken]
        return {
            "outcomes": consultations.consultation_figures(found, seed=session.seed).to_json(),
            "without_spoiled": consultations.consultation_figures(
                found, spoiled=False, seed=session.seed
            ).to_json(),
            "departments": {
                name: one.to_json()
                for name, one in consultations.figures_by_department(
                    found, seed=session.seed
                ).items()
            },
            "stopped": {name: one.stopped for name, one in talks.items() if one.stopped},
            "left_out": [name for name, one in talks.items() if one.broken],
        }

    def _consult(self, session: Session, model: str) -> dict[str, _Talk]:
        """All talks of a model, one round of turns at a time; resumed from the replies kept."""
        cases = session.limited(self._cases, self.name)
        talks = {
            one.id: _Talk(ConsultationState(case=one, settings=self._settings), None, [])
            for one in cases
        }
        for number in itertools.count():
            speaker: consultations.Speaker = "assistant" if number % 2 else "user"
            open_ones = {name: one for name, one in talks.items() if one.speaker == speaker}
            if not open_ones:
                return talks
            turn = number // 2 + 1
            if speaker == "user":
                said = self._patient(session, model, open_ones, turn)
            else:
                prompts = {
                    f"{name}/{turn}": one.state.doctor_messages() for name, one in open_ones.items()
                }
                replies = session.responses(self.name, model, prompts)
                said = {name: replies[f"{name}/{turn}"] for name in open_ones}
            for name, one in open_ones.items():
                one.add(said[name], by_patient=speaker == "user")
        raise AssertionError("unreachable")

    def _patient(
        self, session: Session, model: str, talks: Mapping[str, _Talk], turn: int
    ) -> dict[str, ChatReply]:
        """The patients' next turns; the first one is the same before every model."""
        if self._clinic_cases is not None:
            return {
                name: ChatReply(
                    consultations.clinic_turn(
                        self._clinic_cases[name], one.state, seed=session.seed
                    )
                )
                for name, one in talks.items()
            }
        before = "opening" if turn == 1 else session.source(model)
        requests = {
            f"{before}/{name}/{turn}": tuple(one.state.patient_messages())
            for name, one in talks.items()
        }
        replies = session.patient_turns(f"{self.name}/patient", requests)
        return {name: replies[f"{before}/{name}/{turn}"] for name in talks}


def _outcome_json(talk: _Talk) -> dict[str, Any] | None:
    if talk.broken:
        return None
    found = consultation_outcome(talk.state)
    return {**asdict(found), "spoiled": found.spoiled}


def draw_clinic_cases(count: int, *, seed: int) -> dict[str, world.Case]:
    """Held-out cases of the clinic by id, for its patient."""
    found = {}
    for number in range(1, count + 1):
        name = f"clinic_consultation_{seed}_{number:04d}"
        draws = world.Draws("held_out_consultation", seed, number)
        found[name] = world.draw_case(draws, name)
    return found
