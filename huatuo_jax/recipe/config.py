"""The configs of the recipe and of single training stages: one section a stage."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.clinic.files import ClinicConfig
from huatuo_jax.clinic.planted import Difference
from huatuo_jax.core.config import WORKDIR_MARK, operational, placed_in
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.readers import source_names
from huatuo_jax.data.records import Kind
from huatuo_jax.dpo import STAGE as DPO
from huatuo_jax.dpo import DpoConfig, run_dpo
from huatuo_jax.evaluation.answers import EvaluationConfig
from huatuo_jax.evaluation.opening import ModelChoice, short_names
from huatuo_jax.evaluation.release import CANDIDATES, Candidate
from huatuo_jax.evaluation.suite_settings import SuiteSettings
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.offline import OfflineName
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.preferences.from_judgements import ComparisonConfig
from huatuo_jax.preferences.label import spending_path
from huatuo_jax.recipe.synthesis import SynthesisConfig
from huatuo_jax.reward import stage as reward
from huatuo_jax.reward.config import ProbeConfig, RewardConfig
from huatuo_jax.sft import CLINIC_FOLDER, SftConfig, run_sft
from huatuo_jax.sft import STAGE as SFT
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.initial_model import ComputeSection

LABELS_FILE = "labels.jsonl"
HELD_OUT_FILE = "held_out_prompts.jsonl"
JUDGED_FILE = "judged_prompts.jsonl"
SUITES_FLAG = "--config.suites."
"""Before the names of the suites' fields in messages."""

RELEASED: Literal["released"] = "released"
"""The value of `export.policy` that lets the evaluation decide."""

STAGES = (
    "synthesis",
    "sft",
    "answers",
    "labels",
    "reward",
    "ppo",
    "evaluation",
    "suites",
    "export",
    "report",
)
"""All stages; `synthesis` runs where any kind is named, `suites` where any suite is."""

Run = Callable[[Any, str | os.PathLike[str]], dict[str, Any]]
STAGE_RUNS: Mapping[str, Run] = {
    SFT: run_sft,
    reward.STAGE: reward.run_reward,
    DPO: run_dpo,
    ppo.STAGE: ppo.run_ppo,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The prompts: of files, or made of the dialogues, each up to the doctor's longest answer.

    Attributes:
        files: of prompts to learn from, separated by commas; None makes them of the dialogues that
            fine-tuning trains on, or takes those of the run's clinic.
        held_out_files: of held-out prompts; None makes them of the dialogues that fine-tuning holds
            out, or takes those of the run's clinic. A prompt in files on both sides is refused.
        kinds: dialogues of these kinds are taken, and those that tell no kind.
        limit: the most prompts to learn from, chosen by their content; None for all.
        held_out_limit: the most held-out prompts.
    """

    files: str | None = operational(None)  # Their content decides.
    held_out_files: str | None = operational(None)
    kinds: tuple[Kind, ...] = ("real_instruction", "real_conversation")
    limit: int | None = None
    held_out_limit: int | None = 200

    def __post_init__(self) -> None:
        """Validates the limits."""
        for name in ("limit", "held_out_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """The answers that are judged.

    Attributes:
        model: that generates; the SFT stage's model by default.
        prompts: file of prompts; by default those made of the dialogues.
        max_left_out_share: share of the prompts that may be left out as too long for the model.
        num_samples: answers to each prompt.
        sampling: of the answers.
        seed: of the answers.
        chunk_size: prompts whose answers are written together.
        slots: answers decoded at once; None for up to 64.
        mesh: division of the devices; `tensor` leaves weights in their place while answers are
            decoded, `fsdp` gathers them for every token.
    """

    model: str = operational("{workdir}/sft/model")
    prompts: str = operational("{workdir}/prompts.jsonl")
    max_left_out_share: float = operational(0.1)
    num_samples: int = 4
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    chunk_size: int = operational(256)
    slots: int | None = operational(None)
    mesh: MeshConfig = operational(MeshConfig())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """The questions to the judge, and the comparisons of its verdicts.

    Attributes:
        answers: the answers file.
        label: the questions to the judge.
        comparison: the policies by which verdicts become comparisons.
    """

    answers: str = operational("{workdir}/answers.jsonl")
    label: LabelConfig = LabelConfig()
    comparison: ComparisonConfig = ComparisonConfig()

    def __post_init__(self) -> None:
        """Refuses a protocol that makes no comparisons."""
        if self.label.protocol == "both":
            raise ValueError("label.protocol='both' makes no comparisons; take score or pairwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The release in Hugging Face format.

    Attributes:
        policy: exported to `export/policy`: `released` for what the evaluation decides; `base`,
            `sft`, `best_of_n` or `ppo` for that model of the evaluation, whatever it decides; or
            a model folder. Best-of-n is the SFT model, with the reward model that chooses.
        reward: reward model's folder, to `export/reward`.
        dtype: of the weights; None keeps the stored one.
        license: of the models, for their cards, such as `apache-2.0`; None for that of the base
            model's own card, and unknown where it has none.
        languages: of the models, for their cards, such as `zh`; () tells Chinese and English by
            the data.
        card_samples: held-out prompts that the policy's card shows with their answers. They are
            words of the data: 0 for none.
    """

    policy: str = operational(RELEASED)
    reward: str = operational("{workdir}/reward/model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    license: str | None = None
    languages: tuple[str, ...] = ()
    card_samples: int = 3

    def __post_init__(self) -> None:
        """Validates the fields that the model cards show."""
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license={self.license!r} must be a licence's name on the Hub, such as apache-2.0"
            )
        for language in self.languages:
            if not re.fullmatch("[a-z]{2,3}", language):
                raise ValueError(f"languages: {language!r} must be an ISO 639 code, such as zh")
        if self.card_samples < 0:
            raise ValueError(f"card_samples={self.card_samples!r} must be 0 or more")

    @property
    def choice(self) -> Candidate | Literal["released", "folder"]:
        """Returns the name that `policy` is; `folder` for a folder."""
        names: tuple[Candidate | Literal["released"], ...] = (RELEASED, *CANDIDATES)
        return next((name for name in names if name == self.policy), "folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuitesConfig(SuiteSettings):
    """The evaluation by suites, as of `huatuo evaluate`; without a suite there is no such stage.

    The judge is one of its own: one that has also labelled would judge what it has taught.

    Attributes:
        models: base, sft or ppo for that model of the run; others by folder, Hub id or openai:NAME.
    """

    models: tuple[str, ...] = ("base", "sft", "ppo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report.

    Attributes:
        title: its heading.
        num_prompts: prompts whose answers are shown side by side.
    """

    title: str = "HuatuoGPT recipe"
    num_prompts: int = 8


def clinic_probes() -> tuple[ProbeConfig, ...]:
    """Returns the probes that the clinic writes: pairs that differ in one thing."""
    kinds: tuple[tuple[Difference, str, bool], ...] = (
        ("truth", "true", False),
        ("manner", "friendlier", True),
        ("length", "longer", True),
    )
    return tuple(
        ProbeConfig(
            name=name,
            paths=(f"{WORKDIR_MARK}/{CLINIC_FOLDER}/{clinic_files.pairs_file(name)}",),
            chosen=chosen,
            neutral=neutral,
        )
        for name, chosen, neutral in kinds
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlaifConfig:
    """The recipe. `{workdir}` in a path stands for the run's folder.

    Attributes:
        recipe: identifies a config of this class.
        base_model: the model that fine-tuning starts from, instead of the card's: a Hub id, a
            folder in Hugging Face format or of ours, or a preset's name. Template and settings
            follow from it, see `huatuo_jax.recipe.base_model`; fields given beside it replace them.
        trained: `weights` or `adapters` of the base model; None decides by its size.
        template: chat template of all stages, by name; None for that of each stage.
        max_length: tokens of a dialogue in all stages: rows of fine-tuning, prompt and response in
            the others; None for that of each stage.
        compute: of all training stages; None for that of each stage.
        mesh: of all training stages; None for that of each stage.
        stages: those to be run, in this order.
        data: files of dialogues of one's own, separated by commas; None for `sft.data.sources`.
        data_encoding: of those files, such as cp1252; None tells it by evidence.
        clinic: written to `{workdir}/clinic` before anything is read there. Its
            prompts are the run's, unless `prompts` names files; its pairs that differ in one thing
            alone are probes of the reward model. None for none, and `data` leaves it out.
        synthesis: of more data, before anything is trained.
        judge: of the answers, and of PPO's where `ppo.config` has none of its own.
        prompts: to learn from, and held out.
        sft: supervised fine-tuning.
        answers: answers of its model, which are judged.
        labels: the judge's verdicts, and comparisons of them.
        reward: the reward model.
        ppo: the policy.
        evaluation: of base, SFT and PPO on held-out prompts.
        suites: the evaluation of these and other models on exams, questions and consultations.
        export: in Hugging Face format.
        report: `report.html`.
    """

    recipe: Literal["rlaif"] = "rlaif"
    base_model: str | None = operational(None)  # Its files decide.
    trained: Literal["weights", "adapters"] | None = operational(None)
    template: str | None = operational(None)  # Each of these decides through the stages' fields.
    max_length: int | None = operational(None)
    compute: ComputeSection | None = operational(None)
    mesh: MeshConfig | None = operational(None)
    stages: tuple[str, ...] = STAGES
    data: str | None = None
    data_encoding: str | None = None
    clinic: ClinicConfig | None = None
    synthesis: SynthesisConfig = SynthesisConfig()
    judge: JudgeConfig = JudgeConfig()
    prompts: PromptsConfig = PromptsConfig()
    sft: SftConfig
    answers: AnswersConfig = AnswersConfig()
    labels: LabelsConfig = LabelsConfig()
    reward: RewardConfig
    ppo: PpoConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    suites: SuitesConfig = SuitesConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()

    def __post_init__(self) -> None:
        """Validates the order of the stages, and that all of them use one template."""
        places = [STAGES.index(name) for name in self.stages if name in STAGES]
        if len(places) < len(self.stages) or places != sorted(set(places)):
            raise ValueError(f"stages={self.stages} must be some of {STAGES}, in this order")
        undecided = "export" in self.stages and "evaluation" not in self.stages
        if undecided and self.export.policy == RELEASED:
            raise ValueError(
                f"export.policy={RELEASED!r} is what the evaluation decides, and stages="
                f"{self.stages} has no 'evaluation': add it, or name {', '.join(CANDIDATES)} or a "
                "model folder"
            )
        chooser = self.evaluation.reward
        if self.export.choice in (RELEASED, "best_of_n") and self.export.reward != chooser:
            raise ValueError(
                f"export.reward={self.export.reward!r} must be evaluation.reward={chooser!r}: "
                "best-of-n is released with the reward model that chose its answers"
            )
        has_clinic = self.clinic is not None and self.data is None
        self.synthesis.check(self.judge, has_clinic=has_clinic)
        if self.sft.clinic not in (None, self.clinic):
            raise ValueError("sft.clinic must be None: in the recipe the clinic's field is clinic")
        template = self.sft.data.template
        for name, other in (
            ("reward.data.template", self.reward.data.template),
            ("ppo.data.template", self.ppo.data.template),
            ("evaluation.template", self.evaluation.template),
        ):
            if other != template:
                raise ValueError(
                    f"{name}={other!r} must be sft.data.template={template!r}: all stages have to "
                    "say a dialogue in the same way"
                )
        system, date = self.sft.data.default_system, self.sft.data.template_date
        for name, later, told in (
            ("reward.data.template_date", self.reward.data.template_date, date),
            ("ppo.data.template_date", self.ppo.data.template_date, date),
            ("reward.data.default_system", self.reward.data.default_system, system),
            ("ppo.data.default_system", self.ppo.data.default_system, system),
            ("evaluation.default_system", self.evaluation.default_system, system),
        ):
            if later not in (None, told):
                field = name.rpartition(".")[2]
                raise ValueError(
                    f"{name}={later!r} must be None or sft.data.{field}={told!r}, which the model "
                    "of the SFT stage is trained with"
                )

    @property
    def exported_policy(self) -> str | None:
        """Returns the folder of the exported policy; None where the evaluation decides."""
        choice = self.export.choice
        if choice == RELEASED:
            return None
        return self.export.policy if choice == "folder" else self.candidates[choice]

    @property
    def candidates(self) -> dict[Candidate, str]:
        """Maps each model that may be released to its folder; best-of-n has the weights of SFT."""
        assert self.evaluation.base is not None
        return {
            "base": self.evaluation.base,
            "sft": self.evaluation.sft,
            "best_of_n": self.evaluation.sft,
            "ppo": self.evaluation.ppo,
        }

    @property
    def suite_models(self) -> dict[str, ModelChoice]:
        """Maps the models of the suites by their names in tables.

        The run's models speak its template, as in the evaluation.
        """
        own = {name: place for name, place in self.candidates.items() if name != "best_of_n"}
        others = [one for one in self.suites.models if one not in own]
        names = dict(zip(others, short_names(others), strict=True)) if others else {}
        cfg = self.evaluation
        return {
            (one if one in own or names[one] in own else names[one]): (
                ModelChoice(own[one], cfg.template, cfg.default_system)
                if one in own
                else ModelChoice(one)
            )
            for one in self.suites.models
        }

    @property
    def base_as_it_is(self) -> str | None:
        """Returns the base model's directory if the evaluation can use it unchanged, else None.

        It can if the folder has the run's tokenizer and the run changes nothing of its template.
        """
        model, data = self.sft.model, self.sft.data
        changed = model.tokenizer is not None or model.ignore_config_fields
        told = data.template_date is not None or data.default_system is not None
        return None if changed or (told and data.template == "tokenizer") else model.directory

    def in_workdir(self, workdir: str | os.PathLike[str]) -> "RlaifConfig":
        """Returns the config with the run's folder in its paths, and its data or the clinic's.

        The evaluation has what it takes from other stages: the base model, PPO's temperature and
        rule of scores; PPO's judgings have the run's judge, who spends on one account. All stages
        have fine-tuning's system text.
        """
        cfg = self._with_data()._with_synthesis()
        cfg = placed_in(cfg, workdir)._with_system_text()._with_judging(workdir)
        base = cfg.evaluation.base or cfg.base_as_it_is or f"{workdir}/base/model"
        rule = cfg.evaluation.score or cfg.ppo.score.outside_training
        temperature = cfg.evaluation.temperature
        if temperature is None:
            temperature = cfg.ppo.rollout.temperature
        evaluation = dataclasses.replace(
            cfg.evaluation, base=base, score=rule, temperature=temperature
        )
        return dataclasses.replace(cfg, evaluation=evaluation)

    def with_offline_judge(self, name: OfflineName) -> "RlaifConfig":
        """Returns the config with an offline judge in place of "auto" and of None."""
        named = name if self.judge.offline == "auto" else self.judge.offline
        ppo, judging = self.ppo, self.ppo.judging
        if judging is not None and judging.judge is not None and judging.judge.offline == "auto":
            judge = dataclasses.replace(judging.judge, offline=named)
            judging = dataclasses.replace(judging, judge=judge)
            ppo = dataclasses.replace(ppo, judging=judging)
        return dataclasses.replace(
            self,
            judge=dataclasses.replace(self.judge, offline=named),
            ppo=ppo,
            evaluation=dataclasses.replace(self.evaluation, judge=self.evaluation.judge or named),
        )

    def num_judged_prompts(self, workdir: str | os.PathLike[str]) -> int | None:
        """Returns how many held-out prompts are set aside for PPO's judgings; None for the most.

        It is 0 where the judgings are off, or have prompts of their own.
        """
        judging = self.ppo.judging
        if judging is None or judging.prompts != f"{workdir}/{JUDGED_FILE}":
            return 0
        return judging.num_prompts

    def _with_data(self) -> "RlaifConfig":
        """Returns the config with the user's files and no clinic, or with the clinic's files."""
        if self.data is not None:
            paths = self.data.split(",")
            sources = tuple(
                SourceConfig(name=name, paths=(path,), encoding=self.data_encoding)
                for name, path in zip(source_names(paths), paths, strict=True)
            )
            data = dataclasses.replace(self.sft.data, sources=sources)
            sft = dataclasses.replace(self.sft, data=data, clinic=None)
            return dataclasses.replace(self, clinic=None, sft=sft)
        if self.clinic is None:
            return self
        folder = f"{WORKDIR_MARK}/{CLINIC_FOLDER}"
        held_out = f"{folder}/{clinic_files.HELD_OUT}{clinic_files.PROMPTS}"
        prompts = dataclasses.replace(
            self.prompts,
            files=self.prompts.files or f"{folder}/{clinic_files.PROMPTS}",
            held_out_files=self.prompts.held_out_files or held_out,
        )
        probes = clinic_probes() if self.clinic.sizes.pairs else ()
        reward = dataclasses.replace(self.reward, probes=(*self.reward.probes, *probes))
        return dataclasses.replace(
            self,
            prompts=prompts,
            reward=reward,
            sft=dataclasses.replace(self.sft, clinic=self.clinic),
        )

    def _with_synthesis(self) -> "RlaifConfig":
        """Returns the config with the rows of its synthesis among the dialogues to train on."""
        data = self.sft.data
        data = dataclasses.replace(data, sources=(*data.sources, *self.synthesis.sources()))
        return dataclasses.replace(self, sft=dataclasses.replace(self.sft, data=data))

    def _with_judging(self, workdir: str | os.PathLike[str]) -> "RlaifConfig":
        judging = self.ppo.judging
        if judging is None:
            return self
        judge, spending = judging.judge, judging.spending
        if judge is None:
            judge = self.judge
            spending = spending or spending_path(f"{workdir}/{LABELS_FILE}")
        prompts = judging.prompts or f"{workdir}/{JUDGED_FILE}"
        judging = dataclasses.replace(judging, judge=judge, prompts=prompts, spending=spending)
        return dataclasses.replace(self, ppo=dataclasses.replace(self.ppo, judging=judging))

    def _with_system_text(self) -> "RlaifConfig":
        system = self.sft.data.default_system
        data = {
            stage: dataclasses.replace(getattr(self, stage).data, default_system=system)
            for stage in ("reward", "ppo")
        }
        return dataclasses.replace(
            self,
            reward=dataclasses.replace(self.reward, data=data["reward"]),
            ppo=dataclasses.replace(self.ppo, data=data["ppo"]),
            evaluation=dataclasses.replace(self.evaluation, default_system=system),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Training stages that are run in this order; None leaves a stage out.

    Attributes:
        sft: supervised fine-tuning.
        reward: the reward model.
        dpo: direct preference optimisation.
        ppo: proximal policy optimisation.
        base_model: the model that the first stage starts from, instead of the card's: a Hub id, a
            folder in Hugging Face format or of ours, or a preset's name. Template and settings
            follow from it, see `huatuo_jax.recipe.base_model`; fields given beside it replace them.
        trained: `weights` or `adapters` of the base model; None decides by its size.
        data: files of one's own for the first stage, separated by commas: dialogues, comparisons,
            or prompts; None for the card's.
        template: chat template of all stages, by name; None for that of each stage.
        max_length: tokens of a dialogue in all stages: rows of fine-tuning, prompt and response in
            the others; None for that of each stage.
        compute: of all training stages; None for that of each stage.
        mesh: of all training stages; None for that of each stage.
    """

    base_model: str | None = operational(None)  # Its files decide.
    trained: Literal["weights", "adapters"] | None = operational(None)
    data: str | None = operational(None)
    template: str | None = operational(None)  # Each of these decides through the stages' fields.
    max_length: int | None = operational(None)
    compute: ComputeSection | None = operational(None)
    mesh: MeshConfig | None = operational(None)
    sft: SftConfig | None = None
    reward: RewardConfig | None = None
    dpo: DpoConfig | None = None
    ppo: PpoConfig | None = None

    def __post_init__(self) -> None:
        """Refuses a config without a stage."""
        if not self.stages:
            raise ValueError(f"no stage is given; there are {', '.join(STAGE_RUNS)}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Returns the names of the stages that are run, in order."""
        return tuple(name for name in STAGE_RUNS if getattr(self, name) is not None)
