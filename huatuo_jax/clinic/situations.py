"""What kind of prompt it is, whatever is answered: clear, to be asked about first, or dangerous."""

from typing import Literal, get_args

from huatuo_jax.clinic.care import DRUGS, X_RAYS
from huatuo_jax.clinic.doctors import allowed_drugs
from huatuo_jax.clinic.findings import truth_of
from huatuo_jax.clinic.reading import heard
from huatuo_jax.clinic.world import posterior
from huatuo_jax.data.records import Prompt

Situation = Literal["clear", "ask", "danger"]
SITUATIONS: tuple[Situation, ...] = get_args(Situation)


def situation(prompt: Prompt) -> Situation:
    """The situation of a prompt.

    Returns:
        "danger": after what the patient told, emergency care is needed, or a drug of the disease
        must not be given; "ask": questions come first; "clear": neither.

    Raises:
        ValueError: the prompt's diagnosis is none of this world's.
    """
    observation, disease = heard(prompt.messages), truth_of(prompt)
    belief = posterior(observation)
    if belief.emergency:
        return "danger"
    if belief.should_ask:
        return "ask"
    forbidden = len(allowed_drugs(disease, observation)) < len(disease.drugs)
    return "danger" if forbidden else "clear"


def conditions_against(prompt: Prompt, order: str) -> tuple[str, ...]:
    """The patient's conditions for which a drug or test must not be ordered, as `care` names them.

    Empty for a drug that is not for the patient's age, and for what may be ordered.
    """
    told = heard(prompt.messages).conditions
    if order in DRUGS:
        return tuple(name for name in DRUGS[order].not_with if name in told)
    return ("怀孕",) if order in X_RAYS and "怀孕" in told else ()
