"""Settings of a whole run: its stages, and a group of settings for each of its parts."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.checks import MOST, MOST_BYTES, MOST_ROW, not_negative, one_of, positive, shown
from bltjax.config.data import DataConfig
from bltjax.config.model import BLTConfig, EntropyModelConfig, TokenModelConfig
from bltjax.config.patching import PatchingConfig
from bltjax.config.training import (
    OF_BLT_PARTS,
    OF_HASH_TABLES,
    OptimizerConfig,
    ProfileConfig,
    TrainingConfig,
)

PATTERNS = ("letters", "marks")  # of tokenizers
STAGES = ("entropy_model", "entropies", "blt", "evaluate", "sample")  # default: a BLT
ALL_STAGES = (*STAGES, "token_model")
TRAINING = dict(  # of stages that train a model: the name of their settings
    entropy_model="entropy_training", blt="blt_training", token_model="token_training"
)
MOST_TOLD = 20  # problems of a config in one message


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of the token model."""

    path: str = ""  # a `tokenizer.json` of another run; empty: it is trained
    # bytes of training documents, in a seeded order, that it is trained on
    train_bytes: int = 20_000_000
    # what words are made of, before pairs are merged: `"letters"`, as in the paper's tokenizer, or
    # `"marks"`: letters and combining marks, so that vowel signs do not cut words
    pattern: str = "letters"

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "train_bytes", most=MOST_BYTES)
        found += one_of(self, name, "pattern", PATTERNS)
        if self.path and self.pattern != "letters":
            found.append(
                f"{name}.pattern={self.pattern!r} changes nothing: the tokenizer of {name}.path="
                f"{shown(self.path)} brings its own, leave it 'letters'"
            )
        return found


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one axis may be -1: all that are left."""

    data: int = -1  # rows of a batch are split over it; on several TPU slices it spans them
    fsdp: int = 1  # rows of a batch, weights, gradients and moments are split over it
    tensor: int = 1  # heads and feed-forward units are split over it

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        sizes = self.data, self.fsdp, self.tensor
        if sizes.count(-1) > 1 or any(s != -1 and not 1 <= s <= MOST for s in sizes):
            return [f"{name}={sizes}: axes must lie between 1 and {MOST}, only one may be -1"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation and the samples at the end of a run."""

    batch_size: int = 8  # rows of an evaluation batch, over all devices
    max_bytes: int = 100_000_000  # bytes of held-out documents, approximately
    # held-out rows that `validate_every` measures, an even share of each source
    validation_rows: int = 64
    # held-out rows that the use of patches is measured on, an even share of each source; 0: none
    patch_use_rows: int = 64
    # fit n-gram models on the training bytes, for comparison; switch it off for large corpora,
    # whose counts do not fit in memory
    baselines: bool = True
    prompt: str = "def "  # beginning of the sample
    sample_bytes: int = 200  # bytes of the sample
    temperature: float = 0.7  # of the sample; 0: the most probable byte each time
    # text whose patches are shown
    sentence: str = "Patches are short where text is hard and long where it is easy."

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "max_bytes", most=MOST_BYTES)
        found += positive(self, name, "batch_size", "validation_rows")
        found += not_negative(self, name, "temperature", "patch_use_rows")
        return found + positive(self, name, "sample_bytes", most=MOST_ROW)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Raises ValueError that lists every problem."""

    # what this run does, in order; one or more of `entropy_model`, `entropies`, `blt`, `evaluate`,
    # `sample` and `token_model`
    stages: tuple[str, ...] = STAGES
    # a directory with weights in any format, or `demo`, that models start from; their shapes and
    # where patches start come from there; empty: they start from random numbers
    start_from: str = ""
    data: DataConfig = DataConfig()  # the corpus
    patching: PatchingConfig = PatchingConfig()  # where patches start
    entropy_model: EntropyModelConfig = EntropyModelConfig()  # shape of the entropy model
    entropy_training: TrainingConfig = TrainingConfig()  # training of the entropy model
    blt: BLTConfig = BLTConfig()  # shape of the BLT
    blt_training: TrainingConfig = TrainingConfig()  # training of the BLT
    tokenizer: TokenizerConfig = TokenizerConfig()  # tokenizer of the token baseline
    token_model: TokenModelConfig = TokenModelConfig()  # shape of the token baseline
    # training of the token baseline; its `row_bytes` counts tokens
    token_training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()  # what is measured and shown at the end
    mesh: MeshConfig = MeshConfig()  # devices along each mesh axis
    profile: ProfileConfig = ProfileConfig()  # a trace of some training steps

    def __post_init__(self):
        groups = [
            f.name for f in dataclasses.fields(self) if f.name not in ("stages", "start_from")
        ]
        found = [p for group in groups for p in getattr(self, group).problems(group)]
        once = set(self.stages)
        if not once or len(once) < len(self.stages) or not once <= set(ALL_STAGES):
            found.append(
                f"stages={shown(self.stages)} must be one or more of {ALL_STAGES}, each once"
            )
        found += self._profile_problems()
        found += self._teacher_problems()
        found += self._diffusion_problems()
        found += self._patchless_problems("entropy_training", self.entropy_model, "entropy model")
        found += self._patchless_problems("token_training", self.token_model, "token model")
        if found:
            more = [f"and {len(found) - MOST_TOLD} more"] * (len(found) > MOST_TOLD)
            raise ValueError("; ".join([*found[:MOST_TOLD], *more]))

    def _patchless_problems(self, name: str, model: EntropyModelConfig, called: str) -> list[str]:
        """Returns settings that would change nothing, for a model without patches."""
        training, found = getattr(self, name), []
        for setting in OF_BLT_PARTS + OF_HASH_TABLES * (not model.hash.sizes):
            value, default = (getattr(o, setting) for o in (training.optimizer, OptimizerConfig()))
            if value != default:
                found.append(
                    f"{name}.optimizer.{setting}={value!r} changes nothing: the {called} has no "
                    f"such part, leave it {default!r}"
                )
        if training.teacher.source:
            found.append(
                f"{name}.teacher.source={shown(training.teacher.source)}: the {called} has no "
                "layers of a teacher, leave it empty"
            )
        found += training.diffusion.without_blocks(
            f"{name}.diffusion",
            f"only a BLT fills in blocks, give it for the BLT, not the {called}",
        )
        if training.row_bytes == 0 < training.row_patches:
            found.append(f"{name}.row_bytes=0 must be at least 8: its rows have no patches")
        return found

    def _teacher_problems(self) -> list[str]:
        """Returns what a teacher misses: layers in common, which learn not even by adapters."""
        name, source = "blt_training.teacher.source", self.blt_training.teacher.source
        if not source:
            return []
        if not self.start_from:
            return [
                f"{name}={shown(source)} without start_from: its layers are those of a model that "
                "bltjax byteify made of it, give that directory"
            ]
        if self.blt.lora.rank:
            return [
                f"{name}={shown(source)} with blt.lora.rank={self.blt.lora.rank}: adapters would "
                "change the layers that are the teacher's, leave one out"
            ]
        return []

    def _diffusion_problems(self) -> list[str]:
        """Returns what keeps blocks from being learned: no blocks, or parts that do not learn."""
        diffusion, block = self.blt_training.diffusion, self.blt.diffusion_block
        weight = f"blt_training.diffusion.weight={diffusion.weight}"
        if not block:
            why = "blt.diffusion_block=0, give the bytes of a block, 4 for example"
            # A model that the run starts from may have blocks.
            unused = diffusion.without_blocks("blt_training.diffusion", why)
            return [] if self.start_from else unused
        if not diffusion.weight:
            return []
        with_blocks = f"with blt.diffusion_block={block} and {weight}"
        remedy = "set blt_training.diffusion.weight=0, or leave it out"
        others = {
            f"blt.lora.rank={self.blt.lora.rank}": (self.blt.lora.rank, "adapters alone learn"),
            f"blt_training.teacher.source={shown(self.blt_training.teacher.source)}": (
                self.blt_training.teacher.source,
                "a teacher has no lesson of blocks",
            ),
            "blt_training.optimizer.local_rate=0": (
                not self.blt_training.optimizer.local_rate,
                "the decoder does not learn",
            ),
            "blt_training.diffusion.masks='prefix'": (
                diffusion.masks == "prefix" and block == 1,
                "a block of one byte has none to mask",
            ),
        }
        return [
            f"{setting} {with_blocks}: {why}, {remedy}"
            for setting, (is_set, why) in others.items()
            if is_set
        ]

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
