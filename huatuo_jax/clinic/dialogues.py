"""Dialogues of the four kinds, and prompts with the real doctor's answer.

The kinds stand in the proportions of HuatuoGPT's data (arXiv 2305.15075, table 2).
"""

from collections.abc import Callable, Iterator

from huatuo_jax.clinic.doctors import DistilledDoctor, RealDoctor
from huatuo_jax.clinic.draws import Draws
from huatuo_jax.clinic.patient import Patient
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import Case, draw_case
from huatuo_jax.clinic.writing import Writer
from huatuo_jax.data.records import KINDS, Dialogue, Kind, Message, Prompt

SOURCE = "huatuo_jax clinic"
PAPER_COUNTS: dict[Kind, int] = {
    "distilled_instruction": 61_400,
    "real_instruction": 69_768,
    "distilled_conversation": 68_888,
    "real_conversation": 25_986,
}
VAGUE_SHARE = 0.25  # Of real instructions, which name one symptom only.
PERSON_SHARE = 0.7  # Of the other instructions, which tell age and sex.
ENDS_POLITELY = 0.6  # Of real conversations.
PROMPTS_OF_CONVERSATIONS = PAPER_COUNTS["real_conversation"] / (
    PAPER_COUNTS["real_instruction"] + PAPER_COUNTS["real_conversation"]
)

_LAST_TRY = 2_000


def counts_of_kinds(total: int) -> dict[Kind, int]:
    """How many dialogues of each kind there are among so many, by largest remainders."""
    whole = sum(PAPER_COUNTS.values())
    found = {kind: total * PAPER_COUNTS[kind] // whole for kind in KINDS}
    by_remainder = sorted(KINDS, key=lambda kind: -(total * PAPER_COUNTS[kind] % whole))
    for kind in by_remainder[: total - sum(found.values())]:
        found[kind] += 1
    return found


def dialogues(
    kind: Kind, count: int, *, seed: int, held_out: bool = False, diseases: int | None = None
) -> Iterator[Dialogue]:
    """Dialogues of one kind, no two of them alike; fewer are the first of more.

    Args:
        kind: one of `KINDS`.
        count: how many.
        seed: other dialogues for another one.
        held_out: other cases, and sentences that stand in no training text.
        diseases: patients have one of so many, the most common ones; None for all.
    """
    side = "held_out" if held_out else "training"
    for number, (case, messages) in enumerate(
        _different((side, kind, seed), count, _WRITERS[kind], diseases, held_out=held_out), start=1
    ):
        yield Dialogue(
            id=f"clinic_{side}_{kind}_{number:04d}",
            messages=tuple(messages),
            kind=kind,
            source=SOURCE,
            extra={"diagnosis": case.disease, "case": case.to_json()},
        )


def prompts(
    count: int, *, seed: int, held_out: bool = False, diseases: int | None = None
) -> Iterator[Prompt]:
    """What a model is to answer, with the real doctor's answer as the reference.

    As many are conversations before the diagnosis as among the paper's real dialogues, the others a
    patient's first message. Where the patient has not told enough, the reference is questions.

    Args:
        count: how many.
        seed: other prompts for another one.
        held_out: other cases, and sentences that stand in no training text.
        diseases: patients have one of so many, the most common ones; None for all.
    """
    side = "held_out_prompt" if held_out else "prompt"
    for number, (case, messages) in enumerate(
        _different((side, seed), count, _prompt, diseases, held_out=held_out), start=1
    ):
        yield Prompt(
            id=f"clinic_{side}_{number:04d}",
            messages=tuple(messages[:-1]),
            source=SOURCE,
            reference=messages[-1].content,
            diagnosis=case.disease,
            extra={"case": case.to_json()},
        )


def _different(
    key: tuple[object, ...],
    count: int,
    write: Callable[[Writer, Case], list[Message]],
    diseases: int | None,
    *,
    held_out: bool,
) -> Iterator[tuple[Case, list[Message]]]:
    """Cases with dialogues that differ before the last message; drawn again where they do not."""
    seen: set[str] = set()
    for number in range(1, count + 1):
        for attempt in range(_LAST_TRY):
            draws = Draws(*key, number, attempt)
            name = "-".join(map(str, (*key, number)))
            case = draw_case(draws, name, diseases=diseases)
            messages = write(Writer(draws, held_out=held_out), case)
            shown = "\n".join(message.content for message in messages[:-1])
            if messages and shown not in seen:
                break
        else:
            raise ValueError(f"the clinic has no {count} different dialogues of {key}")
        seen.add(shown)
        yield case, messages


def _question(writer: Writer, case: Case, *, vague_share: float) -> list[Message]:
    patient = Patient.written_by(writer, case)
    if writer.draws.chance(vague_share):
        return [Message("user", patient.open(tells_conditions=True))]
    person = writer.draws.chance(PERSON_SHARE)
    return [Message("user", patient.open_fully(2 + writer.draws.below(2), person=person))]


def _real_instruction(writer: Writer, case: Case) -> list[Message]:
    messages = _question(writer, case, vague_share=VAGUE_SHARE)
    return [*messages, Message("assistant", RealDoctor(writer, case).answer(heard(messages)))]


def _distilled_instruction(writer: Writer, case: Case) -> list[Message]:
    messages = _question(writer, case, vague_share=0.0)
    return [*messages, Message("assistant", DistilledDoctor(writer, case).answer(heard(messages)))]


def _real_conversation(writer: Writer, case: Case) -> list[Message]:
    messages, patient = _to_the_diagnosis(writer, case)
    if messages and writer.draws.chance(ENDS_POLITELY):
        messages += [
            Message("user", patient.goodbye()),
            Message("assistant", writer.say("real_bye")),
        ]
    return messages


def _to_the_diagnosis(writer: Writer, case: Case) -> tuple[list[Message], Patient]:
    """A real doctor's conversation up to the diagnosis; empty where there is nothing to ask."""
    patient, doctor = Patient.written_by(writer, case), RealDoctor(writer, case)
    messages: list[Message] = [Message("user", patient.open())]
    if not doctor.asks(heard(messages)):
        return [], patient
    while doctor.asks(observation := heard(messages)):
        question = doctor.answer(observation)
        messages += [Message("assistant", question), Message("user", patient.reply(question))]
    return [*messages, Message("assistant", doctor.answer(observation))], patient


def _distilled_conversation(writer: Writer, case: Case) -> list[Message]:
    patient, doctor = Patient.written_by(writer, case), DistilledDoctor(writer, case)
    messages: list[Message] = [Message("user", patient.open())]
    messages.append(Message("assistant", doctor.first_answer(heard(messages))))
    messages.append(Message("user", patient.add(2)))
    messages.append(Message("assistant", doctor.answer(heard(messages))))
    return [
        *messages,
        Message("user", patient.goodbye()),
        Message("assistant", writer.say("kind_bye")),
    ]


def _prompt(writer: Writer, case: Case) -> list[Message]:
    if writer.draws.chance(PROMPTS_OF_CONVERSATIONS):
        return _to_the_diagnosis(writer, case)[0]
    return _real_instruction(writer, case)


_WRITERS: dict[Kind, Callable[[Writer, Case], list[Message]]] = {
    "distilled_instruction": _distilled_instruction,
    "real_instruction": _real_instruction,
    "distilled_conversation": _distilled_conversation,
    "real_conversation": _real_conversation,
}
