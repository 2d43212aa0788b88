"""The clinic's judge: scores and verdicts that follow from the truth, with known biases on demand.

Without bias its verdict is a logistic function of the difference of the two overall scores. Each
bias adds an amount of log-odds, against which a measurement can be compared. Equal questions get
equal verdicts: noise is seeded by the texts. `huatuo_jax.judge.offline` makes it a judge of labels.
"""

import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from huatuo_jax.clinic.findings import Findings, find
from huatuo_jax.clinic.world import Draws
from huatuo_jax.core.files import hash_of_files
from huatuo_jax.data.records import Prompt

NAME = "clinic-truth-v1"
SCALE = (1.0, 5.0)
CRITERIA = ("informative", "coherent", "preferred", "accurate", "overall")
# Log-odds of a comparison for each point of difference in `overall`: one point is 88 to 12.
LOG_ODDS_PER_POINT = 2.0

OVERALL: Mapping[str, float] = {
    "informative": 0.2,
    "coherent": 0.15,
    "preferred": 0.15,
    "accurate": 0.5,
}
# The value of a diagnosis in a clear case, where questions come first, and beside such questions.
_CLEAR: Mapping[str, float] = {"right": 1.0, "plausible": 0.4, "wrong": 0.0, "absent": 0.1}
_UNCLEAR: Mapping[str, float] = {"right": 0.7, "plausible": 0.4, "wrong": 0.0, "absent": 0.1}
_ASKED: Mapping[str, float] = {"right": 1.0, "plausible": 0.8, "wrong": 0.1, "absent": 0.9}
# The weight of each kind of order in `informative`.
_ORDERS: Mapping[str, float] = {"test": 0.25, "department": 0.2, "advice": 0.3, "drug": 0.25}
_ENOUGH_ADVICE = 2
_ENOUGH_QUESTIONS = 2
_ENOUGH_FRIENDLY = 4
# The largest share of the scale that an answer with this fault can get.
_CEILINGS: Mapping[str, float] = {
    "wrong_diagnosis": 0.4,
    "many_diagnoses": 0.3,
    "contraindicated": 0.25,
    "red_flag_missed": 0.25,
    "false_alarm": 0.5,
    "says_nothing": 0.05,
    "broken_characters": 0.2,
    "repetitive": 0.3,
    "unfinished": 0.5,
    "no_diagnosis": 0.35,
}


@dataclass(frozen=True, kw_only=True)
class ClinicJudge:
    """A judge; with the default fields it is exact.

    Attributes:
        noise: standard deviation of the log-odds of a verdict, drawn for each question.
        length_bias: log-odds for an answer that is twice as long as the other.
        position_bias: log-odds for the answer shown first.
        self_preference: log-odds for an answer in the distilled manner over one without it:
            friendly, in numbered items and hedging, a third each.
        with_reference: knows the true disease; if False, it takes the most probable one for true.
        seed: of the noise.
    """

    noise: float = 0.0
    length_bias: float = 0.0
    position_bias: float = 0.0
    self_preference: float = 0.0
    with_reference: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Validates that the fields are finite and the noise is not negative."""
        for name in ("noise", "length_bias", "position_bias", "self_preference"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it should be a number")
        if self.noise < 0:
            raise ValueError(f"noise is {self.noise}; it should be 0 or more")

    @property
    def changes(self) -> tuple[str, ...]:
        """Returns the fields that differ from the exact judge's, as `length_bias=1.0`.

        A seed without noise has no effect.
        """
        return tuple(
            f"{field.name}={value!r}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
            and (field.name != "seed" or self.noise)
        )

    def settings(self) -> dict[str, object]:
        """Returns the name, the fields, and the hash of the tables and code that decide."""
        return {"judge": NAME, **asdict(self), "world": world_hash()}

    def findings(self, prompt: Prompt, answer: str) -> Findings:
        """Reads the facts of an answer; raises as `findings.find` does."""
        return find(prompt, answer, with_reference=self.with_reference)

    def scores(self, prompt: Prompt, answer: str) -> dict[str, float]:
        """Scores an answer on `SCALE` for each of `CRITERIA`, with biases that need no second one.

        A bias shifts `overall` by the amount that gives its log-odds in a comparison of two scores.

        Raises:
            ValueError: the prompt's diagnosis is not in this world's table.
        """
        found = self.findings(prompt, answer)
        scores = score(found)
        shift = self._leaning(found)
        if self.noise:
            shift += self.noise / math.sqrt(2.0) * self._chance("score", prompt, answer)
        lowest, highest = SCALE
        shifted = scores["overall"] + shift / LOG_ODDS_PER_POINT
        return {**scores, "overall": min(highest, max(lowest, shifted))}

    def p_first(self, prompt: Prompt, first: str, second: str) -> float:
        """Returns the probability that the first answer is the better one.

        Raises:
            ValueError: the prompt's diagnosis is not in this world's table.
        """
        log_odds = self.log_odds_first(prompt, first, second)
        better = 1.0 / (1.0 + math.exp(-abs(log_odds)))
        return better if log_odds >= 0 else 1.0 - better

    def log_odds_first(self, prompt: Prompt, first: str, second: str) -> float:
        """Returns the log-odds behind `p_first`: of the scores, and of each bias."""
        one, other = self.findings(prompt, first), self.findings(prompt, second)
        difference = score(one)["overall"] - score(other)["overall"]
        log_odds = LOG_ODDS_PER_POINT * difference + self._leaning(one) - self._leaning(other)
        log_odds += self.position_bias
        if self.noise:
            log_odds += self.noise * self._chance("compare", prompt, first, second)
        return log_odds

    def reason(self, prompt: Prompt, answer: str) -> str:
        """Returns the findings behind a score, in one line."""
        return describe(self.findings(prompt, answer))

    def _leaning(self, found: Findings) -> float:
        length = self.length_bias * math.log2(1 + found.length) if self.length_bias else 0.0
        return length + self.self_preference * distilled_manner(found)

    def _chance(self, *what: object) -> float:
        parts = (
            [message.content for message in part.messages] if isinstance(part, Prompt) else part
            for part in what
        )
        return Draws("judge", self.seed, *parts).gaussian()


def distilled_manner(found: Findings) -> float:
    """Returns how much of the distilled manner an answer has, from 0 to 1."""
    friendly = min(1.0, len(found.friendly) / _ENOUGH_FRIENDLY)
    return (friendly + found.structured + found.hedged) / 3


def score(found: Findings) -> dict[str, float]:
    """Returns the scores of an exact judge.

    Each criterion is a share of the scale. `overall` is their weighted mean, limited by the worst
    of the faults.
    """
    shares = {
        "informative": _informative(found),
        "coherent": _coherent(found),
        "preferred": _preferred(found),
        "accurate": _accurate(found),
    }
    whole = math.fsum(OVERALL[name] * share for name, share in shares.items())
    if found.length == 0:
        shares = dict.fromkeys(shares, 0.0)
        whole = 0.0
    ceilings = [_CEILINGS[fault] for fault in found.faults if fault in _CEILINGS]
    shares["overall"] = min([whole, *ceilings])
    lowest, highest = SCALE
    return {name: lowest + (highest - lowest) * share for name, share in shares.items()}


def describe(found: Findings) -> str:
    """Returns the findings in one line."""
    items = ", ".join(f"{item.name}{'' if item.right else ' (wrong)'}" for item in found.items)
    named = ", ".join(found.named) or "none"
    return (
        f"{NAME}: diagnosis {found.diagnosis} ({named}); orders {items or 'nothing'};"
        f" {found.useful_questions} useful questions; faults: {', '.join(found.faults) or 'none'}"
    )


def world_hash() -> str:
    """Returns a hash of the tables and of the code that judges by them."""
    names = ("diseases", "symptoms", "world", "reading", "findings", "judge")
    folder = pathlib.Path(__file__).parent
    return hash_of_files(folder / f"{name}.py" for name in names)


def _accurate(found: Findings) -> float:
    if found.asks_when_needed:
        value = _ASKED[found.diagnosis]
    elif found.should_ask:
        value = _UNCLEAR[found.diagnosis]
    else:
        value = _CLEAR[found.diagnosis]
    harmful = len(found.contraindicated) + found.red_flag_missed
    careless = len(found.wrong_items) + found.false_alarm
    return value * 0.3**harmful * 0.85**careless


def _informative(found: Findings) -> float:
    if found.asks_when_needed:
        return min(1.0, 0.4 + 0.6 * found.useful_questions / _ENOUGH_QUESTIONS)
    right = {kind: sum(item.right for item in found.items if item.kind == kind) for kind in _ORDERS}
    weights = dict(_ORDERS)
    if found.emergency:  # The call counts most, and a drug not at all.
        weights = {"test": 0.3, "department": 0.5, "advice": 0.2, "drug": 0.0}
        right["department"] = max(right["department"], int(found.urgent))
    enough = {**dict.fromkeys(_ORDERS, 1), "advice": _ENOUGH_ADVICE}
    return math.fsum(
        weight * min(1.0, right[kind] / enough[kind]) for kind, weight in weights.items()
    )


def _coherent(found: Findings) -> float:
    broken = (
        found.broken_characters,
        found.repetitive,
        found.unfinished,
        found.disordered,
        found.says_nothing,
        found.many_diagnoses,
    )
    return 0.4 ** sum(broken)


def _preferred(found: Findings) -> float:
    """Scores what patients like: friendliness and order; a question in a clear case costs."""
    friendly = min(1.0, len(found.friendly) / _ENOUGH_FRIENDLY)
    ordered = 1.0 if found.structured or found.asks_when_needed else 0.0
    value = 0.6 * friendly + 0.4 * ordered
    return value * (0.5 if found.asks_pointlessly else 1.0)
