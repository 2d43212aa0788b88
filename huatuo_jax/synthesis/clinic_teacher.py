"""The clinic as a teacher: needs neither server nor weights, and writes of its own small world.

It reads no requests: it works from their material, which holds the clinic's cases. Its doctors are
those of the clinic's own data: the distilled one answers instructions, the real one consults.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.clinic.dialogues import DistilledDoctor, RealDoctor
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import Case, Draws, draw_case
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.asking import Cost
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.judge.spending import Totals
from huatuo_jax.synthesis.jobs import Request
from huatuo_jax.synthesis.tables import Entry, Setting, Table
from huatuo_jax.synthesis.teachers import Requests

_LAST_TRY = 4_000


def clinic_table() -> Table:
    """The departments that treat the clinic's diseases, and its one role and use case."""
    departments = dict.fromkeys(row.department for row in DISEASES.values())
    return Table(
        departments=tuple(Entry(zh=name, en=name) for name in departments),
        roles=(Entry(zh="患者或家长", en="a patient or a parent"),),
        use_cases=(Entry(zh="症状咨询", en="a question about symptoms"),),
    )


class ClinicTeacher:
    """The clinic's patients and doctors, the same for one seed."""

    def __init__(self, *, seed: int = 0) -> None:
        """Sets the seed of all texts."""
        self._seed = seed

    @property
    def name(self) -> str:
        """The clinic's name."""
        return "huatuo_jax clinic"

    def settings(self) -> dict[str, Any]:
        """The seed."""
        return {"teacher": "clinic", "seed": self._seed}

    def known(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns no replies, as none is kept: they are as fast to write as to read."""
        return {}

    def cost(self, batch: int, requests: Requests) -> Cost | None:
        """Returns None: nothing is paid."""
        return None

    def respond(self, batch: int, requests: Requests) -> dict[str, ChatReply]:
        """Returns a reply to each request; the attempt is part of its name."""
        return {name: ChatReply(self._text(name, one), "stop") for name, one in requests.items()}

    def release(self) -> None:
        """Does nothing: it takes no memory."""

    def totals(self) -> Totals | None:
        """Returns None: nothing is paid."""
        return None

    def _text(self, name: str, request: Request) -> str:
        writers = {
            "instruct": self._instructions,
            "answer": self._answer,
            "patient": self._patient,
            "doctor": self._doctor,
            "polish": self._polished,
            "question": self._question,
            "verify": self._verified,
        }
        return writers[request.task](name, request.material)

    def _writer(self, name: str) -> Writer:
        return Writer(Draws("synthesis", self._seed, name), held_out=False)

    def _instructions(self, name: str, material: Mapping[str, Any]) -> str:
        """A patient's first message for each setting, with the case that it is of."""
        items = []
        for place, setting in enumerate(material["settings"]):
            key = f"{name}-{place}"
            case = self._fitting(key, setting)
            patient = Patient.written_by(self._writer(key), case)
            count = 2 + self._writer(key).draws.below(len(case.symptoms) - 1)
            text = patient.open_fully(count, person=True)
            items.append({"instruction": text, "input": "", "case": case.to_json()})
        return json.dumps({"items": items}, ensure_ascii=False)

    def _fitting(self, key: str, setting: Setting) -> Case:
        """A case of a setting's department."""
        for attempt in range(_LAST_TRY):
            case = draw_case(Draws("synthesis", self._seed, key, attempt), key)
            if case.truth.department == setting.department.zh:
                return case
        raise AssertionError(f"no case of {setting.department.zh}")

    def _answer(self, name: str, material: Mapping[str, Any]) -> str:
        case = Case.from_json(material["case"])
        observation = heard([Message("user", str(material["instruction"]))])
        return DistilledDoctor(self._writer(name), case).answer(observation)

    def _patient(self, name: str, material: Mapping[str, Any]) -> str:
        # Of the job, not the request: a consultation is played anew up to each turn.
        return patient_turn(self._writer(material["key"]), material["case"], material["messages"])

    def _doctor(self, name: str, material: Mapping[str, Any]) -> str:
        writer = self._writer(f"doctor {material['key']}")
        return doctor_turn(writer, material["case"], material["messages"])

    def _polished(self, name: str, material: Mapping[str, Any]) -> str:
        """The doctor's words as they are, between a greeting and a wish."""
        writer = self._writer(name)
        turns = [f"{writer.say('greet')}{turn}{writer.say('wish')}" for turn in material["turns"]]
        single = material["kind"] == "real_instruction"
        return json.dumps({"answer": turns[0]} if single else {"turns": turns}, ensure_ascii=False)

    def _question(self, name: str, material: Mapping[str, Any]) -> str:
        """The exam's own question, where it is one of those that name no options."""
        found = {"usable": True, "question": material["question"], "answer": material["answer"]}
        return json.dumps(found, ensure_ascii=False)

    def _verified(self, name: str, material: Mapping[str, Any]) -> str:
        return json.dumps({"unique": True, "answer": material["answer"]}, ensure_ascii=False)


def doctor_turn(writer: Writer, case: Case, messages: Sequence[Message]) -> str:
    """The real doctor's next message after these, which end with the patient's."""
    doctor, text = RealDoctor(writer, case), ""
    for place, message in enumerate(messages, 1):
        if message.role == "user":
            text = doctor.answer(heard(messages[:place]))
    return text


def patient_turn(writer: Writer, case: Case, messages: Sequence[Message]) -> str:
    """The patient's next message after these; the first one of none."""
    patient = Patient.written_by(writer, case)
    text = patient.open()
    for message in messages:
        if message.role == "assistant":
            text = patient.reply(message.content)
    return text
