"""Make training data of the paper's four kinds, and open questions, by a teacher model."""

import dataclasses
from collections.abc import Mapping

from huatuo_jax.core.files import as_path
from huatuo_jax.synthesis.run import Synthesis, SynthesisKind, SynthesisSettings

_READ_BY: Mapping[str, tuple[SynthesisKind, ...]] = {
    "source": ("real_instruction", "real_conversation", "verifiable"),
    "cases": ("distilled_conversation",),
    "seeds": ("distilled_instruction",),
    "table": ("distilled_instruction",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(SynthesisSettings):
    """Make training data of the paper's four kinds, and open questions, by a teacher model.

    Attributes:
        kind: of the data.
        output: JSON Lines file of the rows; a run that was killed resumes there.
        dry_run: tell the number of requests, tokens and cost; nothing is sent or computed.
    """

    kind: SynthesisKind
    output: str
    dry_run: bool = False


def main(flags: Flags) -> None:
    """Makes the data, and says where rows and report are.

    Raises:
        ValueError: a file or flag is wrong, or the teacher cannot go on; what was made is written.
    """
    for name, kinds in _READ_BY.items():
        if getattr(flags, name) and flags.kind not in kinds:
            raise ValueError(
                f"--{name} is for {' and '.join(kinds)}; {flags.kind} reads no such file"
            )
    synthesis = Synthesis(flags.kind, flags, as_path(flags.output))
    if flags.dry_run:
        for line in synthesis.plan():
            print(line)
        print("nothing was sent or computed; rows that are left out cost more requests")
        return
    figures = synthesis.run()
    print(f"{figures['rows']} rows of {figures['candidates']} candidates: {flags.output}")
    print(f"report: {flags.output}.report.html, left out: {flags.output}.rejected.jsonl")
