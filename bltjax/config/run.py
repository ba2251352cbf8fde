"""Settings of a whole run: its stages, and a group of settings for each of its parts."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.checks import not_negative, positive
from bltjax.config.data import DataConfig
from bltjax.config.model import BLTConfig, EntropyModelConfig, TokenModelConfig
from bltjax.config.patching import PatchingConfig
from bltjax.config.training import OF_BLT_PARTS, OptimizerConfig, ProfileConfig, TrainingConfig

STAGES = ("entropy_model", "entropies", "blt", "evaluate", "sample")  # default: a BLT
ALL_STAGES = (*STAGES, "token_model")
TRAINING = dict(  # of stages that train a model: the name of their settings
    entropy_model="entropy_training", blt="blt_training", token_model="token_training"
)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of the token model."""

    path: str = ""  # tokenizer.json of another run; empty: a tokenizer is trained
    train_bytes: int = 20_000_000  # bytes of training documents that it is trained on

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        return positive(self, name)


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one axis may be -1: all that are left."""

    data: int = -1  # devices with a copy of the weights and rows of their own
    fsdp: int = 1  # devices that share the weights and have rows of their own
    tensor: int = 1  # devices that share the heads and hidden widths of the same rows

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            return [f"{name}={sizes}: axes must be at least 1, and only one may be -1"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation and the samples at the end of a run."""

    batch_size: int = 8  # rows of a batch
    max_bytes: int = 100_000_000  # about how much held-out text is scored
    validation_rows: int = 64  # held-out rows that validate_every measures, a share of each source
    baselines: bool = True  # compare with n-gram models fitted on the training bytes, and with xz
    prompt: str = "def "  # the sample goes on from it
    sample_bytes: int = 200  # length of the sample, at most
    temperature: float = 0.7  # of the sample; 0: the most probable byte each time
    sentence: str = "Patches are short where text is hard and long where it is easy."  # cut up

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        names = "batch_size", "max_bytes", "sample_bytes", "validation_rows"
        return positive(self, name, *names) + not_negative(self, name, "temperature")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Raises ValueError that lists every problem."""

    stages: tuple[str, ...] = STAGES  # stages to go through, of ALL_STAGES
    data: DataConfig = DataConfig()  # the corpus
    patching: PatchingConfig = PatchingConfig()  # where patches start
    entropy_model: EntropyModelConfig = EntropyModelConfig()  # shape of the entropy model
    entropy_training: TrainingConfig = TrainingConfig()  # training of the entropy model
    blt: BLTConfig = BLTConfig()  # shape of the byte latent transformer
    blt_training: TrainingConfig = TrainingConfig()  # training of the byte latent transformer
    tokenizer: TokenizerConfig = TokenizerConfig()  # tokenizer of the token model
    token_model: TokenModelConfig = TokenModelConfig()  # shape of the token model
    token_training: TrainingConfig = TrainingConfig()  # its training; row_bytes counts tokens
    evaluation: EvaluationConfig = EvaluationConfig()  # measurements at the end
    mesh: MeshConfig = MeshConfig()  # how devices share the work
    profile: ProfileConfig = ProfileConfig()  # a trace of some training steps

    def __post_init__(self):
        groups = [f.name for f in dataclasses.fields(self) if f.name != "stages"]
        found = [p for group in groups for p in getattr(self, group).problems(group)]
        unknown = [s for s in self.stages if s not in ALL_STAGES]
        if unknown or not self.stages:
            found.append(f"stages={self.stages} must be one or more of {ALL_STAGES}")
        found += self._profile_problems()
        found += self._patchless_problems("entropy_training", "entropy model")
        found += self._patchless_problems("token_training", "token model")
        if found:
            raise ValueError("; ".join(found))

    def _patchless_problems(self, name: str, model: str) -> list[str]:
        """Returns settings that would change nothing, for a model without patches."""
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
        """Returns the settings (model, training) of stage entropy_model, blt or token_model."""
        return getattr(self, stage), getattr(self, TRAINING[stage])
