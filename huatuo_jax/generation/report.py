"""What an engine did: how busy its slots were, what was compiled, how fast it went."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineReport:
    """Counts since the engine was made, or since its `reset_report`.

    Attributes:
        prompt_tokens: run through the model; once for all answers of a request.
        generated_tokens: sampled, those behind a stop string included.
        seconds: spent in the engine's rounds, compilation included.
        rounds: calls of the decode program.
        queued_slot_steps: slots times decode steps, while answers were waiting for a slot.
        queued_busy_slot_steps: those of them that gave a token.
        compilations: programs compiled, by kind, since the engine was made.
        max_compilations: how many there can be at most, whatever the requests.
    """

    prompt_tokens: int
    generated_tokens: int
    seconds: float
    rounds: int
    queued_slot_steps: int
    queued_busy_slot_steps: int
    compilations: Mapping[str, int]
    max_compilations: int

    @property
    def occupancy(self) -> float:
        """Share of slots that were busy until the queue was empty; 1 where nothing ever waited."""
        if not self.queued_slot_steps:
            return 1.0
        return self.queued_busy_slot_steps / self.queued_slot_steps

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.generated_tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens_per_s:.1f} tokens/s), slots {self.occupancy:.0%} busy while requests "
            f"waited, {sum(self.compilations.values())} of at most {self.max_compilations} "
            "programs compiled"
        )
