"""Settings of a run: its stages, and one group of settings for each of its parts."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.checks import positive
from bltjax.config.data import DataConfig
from bltjax.config.model import (
    BLTConfig,
    EntropyModelConfig,
    TokenModelConfig,
)
from bltjax.config.patching import PatchingConfig
from bltjax.config.training import OF_BLT_PARTS, OptimizerConfig, ProfileConfig, TrainingConfig

STAGES = ("entropy_model", "entropies", "blt", "evaluate", "sample")  # of a BLT
ALL_STAGES = (*STAGES, "token_model")
TRAINING = dict(  # of stages that train a model: the name of their settings
    entropy_model="entropy_training", blt="blt_training", token_model="token_training"
)


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the ids of the token model come from."""

    path: str = ""  # a tokenizer.json of another run; empty: it is trained
    train_bytes: int = 20_000_000  # of training documents, in a seeded order, that it is trained on

    def problems(self, name: str) -> list[str]:
        return positive(self, name, "train_bytes")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, it takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def problems(self, name: str) -> list[str]:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            return [f"{name}={sizes}: axes must be at least 1, and only one may be -1"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured and shown at the end of a run."""

    batch_size: int = 8
    max_bytes: int = 100_000_000  # of held-out documents, about
    baselines: bool = True  # fit n-gram models on the training bytes
    prompt: str = "def "
    sample_bytes: int = 200
    temperature: float = 0.7
    sentence: str = "Patches are short where text is hard and long where it is easy."

    def problems(self, name: str) -> list[str]:
        return positive(self, name, "batch_size", "max_bytes", "sample_bytes")


@dataclass(frozen=True)
class RunConfig:
    """A run: the stages it goes through and the settings of each."""

    stages: tuple[str, ...] = STAGES
    data: DataConfig = DataConfig()
    patching: PatchingConfig = PatchingConfig()
    entropy_model: EntropyModelConfig = EntropyModelConfig()
    entropy_training: TrainingConfig = TrainingConfig()
    blt: BLTConfig = BLTConfig()
    blt_training: TrainingConfig = TrainingConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    token_model: TokenModelConfig = TokenModelConfig()
    token_training: TrainingConfig = TrainingConfig()  # its row_bytes are tokens of a row
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        found = [
            p
            for f in dataclasses.fields(self)
            if f.name != "stages"
            for p in getattr(self, f.name).problems(f.name)
        ]
        unknown = [s for s in self.stages if s not in ALL_STAGES]
        if unknown or not self.stages:
            found.append(f"stages={self.stages} must be one or more of {ALL_STAGES}")
        found += self._profile_problems()
        found += self._patchless_problems("entropy_training", "entropy model")
        found += self._patchless_problems("token_training", "token model")
        if found:
            raise ValueError("; ".join(found))

    def _patchless_problems(self, name: str, model: str) -> list[str]:
        """Settings that would change nothing, of a model that is no BLT."""
        training, found = getattr(self, name), []
        for setting in OF_BLT_PARTS:
            value, default = (getattr(o, setting) for o in (training.optimizer, OptimizerConfig()))
            if value != default:
                found.append(
                    f"{name}.optimizer.{setting}={value!r} changes nothing: the {model} has no "
                    f"such part, leave it {default!r}"
                )
        if training.row_bytes == 0 < training.row_patches:
            found.append(f"{name}.row_bytes=0 must be at least 8: its rows have no patches")
        return found

    def _profile_problems(self) -> list[str]:
        first, stage = self.profile.first_step, self.profile.stage
        if first is None or self.profile.problems("profile"):
            return []
        if stage not in self.stages:
            return [f"profile.stage={stage!r} is none of stages={self.stages}: choose one of them"]
        _, training = self.trained(stage)
        if first >= training.steps:
            return [f"profile.first_step={first} is not below the {training.steps} of {stage}"]
        return []

    def trained(self, stage: str):
        """Returns (model, training), the settings of a stage that TRAINING names."""
        return getattr(self, stage), getattr(self, TRAINING[stage])
