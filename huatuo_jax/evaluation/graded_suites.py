"""Evaluation suites whose responses a judge grades one by one: clinical and healthbench."""

from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.data.records import messages_to_json
from huatuo_jax.evaluation import clinical, healthbench
from huatuo_jax.evaluation.clinical import ClinicalCase, ClinicalConfig
from huatuo_jax.evaluation.healthbench import HealthBenchConfig, HealthBenchRow
from huatuo_jax.evaluation.session import Read, Session, failures, judged_text
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.reward_functions import rubric_grading


class ClinicalSuite:
    """CMB-Clin: a judge's scores of responses to questions about cases."""

    name = "clinical"

    def __init__(self, cases: Sequence[ClinicalCase], cfg: ClinicalConfig) -> None:
        """Takes the cases that were read."""
        self._cases, self._cfg = cases, cfg

    def test_texts(self) -> dict[str, str]:
        """The descriptions of the cases."""
        return {f"cmb_clin/{one.id}": one.description for one in self._cases}

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer the questions about all cases."""
        self._responses(session, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of each model."""
        result: dict[str, Any] = {"models": {}}
        records = []
        cases = session.limited(self._cases, self.name)
        for model in session.models:
            replies = self._responses(session, model)
            texts = {place: judged_text(reply) for place, reply in replies.items()}
            source = session.source(model)
            places = {
                f"{source}/{case.id}/{index + 1}": (case, index)
                for case in cases
                for index in range(len(case.questions))
            }
            requests = {
                name: tuple(
                    clinical.judge_messages(
                        case,
                        index,
                        texts[case.id, index],
                        history=self._cfg.history,
                        responses=self._before(texts, case, index),
                    )
                )
                for name, (case, index) in places.items()
            }
            verdicts = session.verdicts(self.name, requests, _clinical_scores)
            if session.dry:
                continue
            scores = {
                (case.id, index): verdicts[name].value.scores
                for name, (case, index) in places.items()
            }
            result["models"][model] = {
                **clinical.clinical_figures(cases, scores, self._cfg),
                "responses": failures({f"{c}/{i + 1}": one for (c, i), one in replies.items()}),
            }
            records += [
                {
                    "model": model,
                    "id": case.id,
                    "question": index + 1,
                    "prompt": self._prompt(texts, case, index),
                    "reference": case.questions[index].reference,
                    "reply": replies[case.id, index]._asdict(),
                    "response": texts[case.id, index],
                    "judge_prompt": list(requests[name]),
                    **verdicts[name].value._asdict(),
                    **verdicts[name].to_json(),
                }
                for name, (case, index) in places.items()
            ]
        if session.dry:
            return None
        session.write_records(self.name, records)
        return result

    def _before(
        self, texts: Mapping[tuple[str, int], str], case: ClinicalCase, index: int
    ) -> list[str]:
        """The model's own answers that a question's history holds."""
        if self._cfg.history == "reference":
            return []
        return [texts[case.id, number] for number in range(index)]

    def _prompt(
        self, texts: Mapping[tuple[str, int], str], case: ClinicalCase, index: int
    ) -> list[dict[str, str]]:
        own = self._before(texts, case, index)
        return clinical.prompt_messages(case, index, history=self._cfg.history, responses=own)

    def _responses(self, session: Session, model: str) -> dict[tuple[str, int], ChatReply]:
        """With own answers in the history the questions of a case are asked one after another."""
        cases = session.limited(self._cases, self.name)
        every = [(case, index) for case in cases for index in range(len(case.questions))]
        rounds = [every]
        if self._cfg.history == "model":
            longest = max(len(case.questions) for case in cases)
            rounds = [[place for place in every if place[1] == index] for index in range(longest)]
        found: dict[tuple[str, int], ChatReply] = {}
        texts: dict[tuple[str, int], str] = {}
        for asked in rounds:
            prompts = {
                f"{case.id}/{index + 1}": self._prompt(texts, case, index) for case, index in asked
            }
            replies = session.responses(self.name, model, prompts)
            for case, index in asked:
                reply = replies[f"{case.id}/{index + 1}"]
                found[case.id, index], texts[case.id, index] = reply, judged_text(reply)
        return {(case.id, index): found[case.id, index] for case, index in every}


def _clinical_scores(name: str, reply: ChatReply) -> Read[clinical.ClinicalScores]:
    if reply.text is None:
        found = clinical.ClinicalScores(None, reply.error or reply.failure)
    else:
        found = clinical.parse_scores(reply.text)
    return Read(value=found, missing=int(found.scores is None))


class HealthBenchSuite:
    """HealthBench: a judge's verdicts on rubrics with signed points."""

    name = "healthbench"

    def __init__(self, rows: Sequence[HealthBenchRow], cfg: HealthBenchConfig) -> None:
        """Takes the rows that were read."""
        self._rows, self._cfg = rows, cfg

    def test_texts(self) -> dict[str, str]:
        """The conversations."""
        return {
            f"healthbench/{row.prompt_id}": "\n".join(one.content for one in row.messages)
            for row in self._rows
        }

    def answer(self, session: Session, model: str) -> None:
        """Has a model answer all conversations."""
        self._responses(session, model)

    def run(self, session: Session) -> dict[str, Any] | None:
        """Returns the figures of each model."""
        result: dict[str, Any] = {"models": {}}
        records = []
        rows = session.limited(self._rows, self.name)
        for model in session.models:
            replies = self._responses(session, model)
            texts = {name: judged_text(reply) for name, reply in replies.items()}
            source = session.source(model)
            requests, read_as = {}, {}
            for row in rows:
                text, start = texts[row.prompt_id], f"{source}/{row.prompt_id}"
                if self._cfg.calls == "row":
                    requests[start] = tuple(rubric_grading.row_messages(row, text))
                    read_as[start] = len(row.criteria)
                    continue
                for index in range(len(row.criteria)):
                    name = f"{start}/{index + 1}"
                    requests[name] = tuple(rubric_grading.criterion_messages(row, text, index))
                    read_as[name] = 1

            def read(
                name: str, reply: ChatReply, read_as: Mapping[str, int] = read_as
            ) -> Read[list[rubric_grading.Verdict]]:
                return _criteria_met(reply, read_as[name], self._cfg.calls)

            found = session.verdicts(self.name, requests, read)
            if session.dry:
                continue
            verdicts: dict[str, list[rubric_grading.Verdict]] = {}
            for row in rows:
                start = f"{source}/{row.prompt_id}"
                names = [start]
                if self._cfg.calls == "criterion":
                    names = [f"{start}/{index + 1}" for index in range(len(row.criteria))]
                verdicts[row.prompt_id] = [one for name in names for one in found[name].value]
                records.append(
                    {
                        "model": model,
                        "id": row.prompt_id,
                        "prompt": messages_to_json(row.messages),
                        "reply": replies[row.prompt_id]._asdict(),
                        "response": texts[row.prompt_id],
                        "criteria": [
                            {"criterion": criterion.text, "points": criterion.points}
                            | one._asdict()
                            for criterion, one in zip(
                                row.criteria, verdicts[row.prompt_id], strict=True
                            )
                        ],
                        "judge_prompts": [list(requests[name]) for name in names],
                        "judge_replies": [found[name].to_json()["replies"] for name in names],
                    }
                )
            met = {name: [one.met for one in given] for name, given in verdicts.items()}
            result["models"][model] = {
                **healthbench.healthbench_figures(rows, met, texts, self._cfg),
                "responses": failures(replies),
            }
        if session.dry:
            return None
        session.write_records(self.name, records)
        return result

    def _responses(self, session: Session, model: str) -> dict[str, ChatReply]:
        rows = session.limited(self._rows, self.name)
        prompts = {row.prompt_id: messages_to_json(row.messages) for row in rows}
        return session.responses(self.name, model, prompts)


def _criteria_met(
    reply: ChatReply, count: int, calls: rubric_grading.Calls
) -> Read[list[rubric_grading.Verdict]]:
    if reply.text is None:
        found = [rubric_grading.Verdict(None, error=reply.error or reply.failure)] * count
    elif calls == "row":
        found = rubric_grading.parse_row_verdicts(reply.text, count)
    else:
        found = [rubric_grading.parse_verdict(reply.text)]
    return Read(value=found, missing=sum(one.met is None for one in found))
