"""Settings of training: optimizer, batches, checkpoints, profile."""

from dataclasses import dataclass

from bltjax.config.checks import (
    MOST_ROW,
    MOST_SEED,
    TINY,
    between,
    finite,
    not_negative,
    one_of,
    positive,
    shown,
)
from bltjax.config.diffusion import DiffusionConfig
from bltjax.config.teacher import TeacherConfig

SCHEDULES = ("cosine", "linear", "inv_sqrt", "wsd", "constant")
MOMENTS = ("float32", "bfloat16", "factored")
MATRICES = ("adam", "muon")
UPDATES = ("dense", "touched")
# Settings of an optimizer for parts that not every model has: only a byte latent transformer has
# the first two, and a token model may have hash tables.
OF_BLT_PARTS = ("global_rate", "local_rate")
OF_HASH_TABLES = ("hash_rate", "decay_hash_tables", "hash_moments", "hash_updates")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule of the learning rate (model.md#optimizer)."""

    learning_rate: float = 4e-4  # peak learning rate
    # `"cosine"`, `"linear"`, `"inv_sqrt"`, `"wsd"` (warm-up, stable, decay) or `"constant"`, after
    # the warm-up
    schedule: str = "cosine"
    warmup_steps: int = 2000  # steps in which the rate rises linearly from 0
    min_ratio: float = 0.01  # last learning rate as a share of the peak; above 0 for `wsd`
    cycle_length: float = 1.0  # `cosine`: length of a cycle as a share of all steps
    cosine_theta: float = 1.0  # `cosine`: exponent of the progress through the cycle
    decay_fraction: float = 0.1  # `wsd`: share of the steps in which the rate decays
    exp_factor: float = 0.5  # `inv_sqrt`: exponent
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled weight decay
    # how the matrices of layers and projections learn: `"adam"`, as published; `"muon"`: by their
    # momentum made orthogonal, at rates and with decay as for Adam, and half of its moments. Byte
    # tables, hash tables, norms and the last matrix keep Adam
    matrices: str = "adam"
    clip_norm: float = 1.0  # gradients with a larger global norm are scaled down to it
    # times `learning_rate`, for the global transformer; 0 freezes it and holds no moments.
    # Byte-ifying a trained transformer (paper, section 6.2) wants about 0.1
    global_rate: float = 1.0
    # times `learning_rate`, for the local encoder and decoder with their cross-attention
    local_rate: float = 1.0
    hash_rate: float = 1.0  # times `learning_rate`, for the hash n-gram tables
    # whether weight decay acts on norms and biases; the published code decays everything
    decay_norms: bool = True
    decay_embeddings: bool = True  # whether weight decay acts on the byte tables
    decay_hash_tables: bool = True  # whether weight decay acts on the hash n-gram tables
    # moments of the hash tables: `"float32"`; `"bfloat16"`, with betas of at most 0.98;
    # `"factored"`: second moments as one number for each row and feature, no first moments
    hash_moments: str = "float32"
    # rows of the hash tables that a step updates: `"dense"`: all; `"touched"`: those that it reads,
    # on one device. What a skipped row missed is made up when it is next read
    hash_updates: str = "dense"

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "schedule", SCHEDULES)
        found += positive(self, name, "learning_rate", "clip_norm", "epsilon", "cycle_length")
        found += positive(self, name, "cosine_theta")
        found += between(self, name, "decay_fraction", TINY, 1)
        found += between(self, name, "min_ratio", 0, 1)
        found += not_negative(self, name, "warmup_steps", "weight_decay", "exp_factor")
        found += not_negative(self, name, "global_rate", "local_rate", "hash_rate")
        if not any((self.global_rate, self.local_rate, self.hash_rate)):
            found.append(
                f"{name}.global_rate, local_rate and hash_rate are all 0: nothing would learn, "
                "leave one above 0"
            )
        if self.schedule == "wsd" and self.min_ratio < TINY:
            found.append(
                f"{name}.min_ratio={self.min_ratio} must be positive with "
                f"{name}.schedule={self.schedule!r}, which divides by it"
            )
        found += one_of(self, name, "matrices", MATRICES)
        found += one_of(self, name, "hash_moments", MOMENTS)
        found += one_of(self, name, "hash_updates", UPDATES)
        for share in ("beta1", "beta2"):
            value = getattr(self, share)
            if not 0 <= value < 1:
                found.append(f"{name}.{share}={value} must lie in [0, 1)")
            if self.hash_moments == "bfloat16" and value > 0.98:
                found.append(
                    f"{name}.{share}={value} moves a moment by less than bfloat16 can tell: with "
                    f"{name}.hash_moments='bfloat16' choose at most 0.98, or 'factored'"
                )
        if self.hash_updates == "touched" and self.hash_moments == "factored":
            found.append(
                f"{name}.hash_moments='factored' holds moments of whole tables, which "
                f"{name}.hash_updates='touched' leaves alone: choose 'bfloat16', or 'dense' updates"
            )
        if self.hash_updates == "touched" and not self.beta1**2 < self.beta2:
            found.append(
                f"{name}.beta1={self.beta1} squared must be below {name}.beta2={self.beta2} with "
                f"{name}.hash_updates='touched', or idle rows move ever faster: lower beta1"
            )
        return found


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the training of one model."""

    steps: int = 1000  # optimizer updates
    batch_size: int = 8  # rows of a batch, over all devices
    # parts of a batch that go through the devices one after the other; divides `batch_size`
    accumulation_steps: int = 1
    # byte positions of a row; 0: follows from `row_patches` and the mean patch
    row_bytes: int = 1024
    # patch slots of a row, at least 3; 0: follows from `row_bytes` and the mean patch
    row_patches: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()  # optimizer and learning-rate schedule
    # the tokenized model that a byte-ified one learns from, with its global transformer frozen
    teacher: TeacherConfig = TeacherConfig()
    # masked blocks that the decoder learns to fill in, where `blt.diffusion_block` is above 0
    diffusion: DiffusionConfig = DiffusionConfig()
    z_loss: float = 0.0  # weight of the squared logarithm of the softmax's sum; 0: none
    # skip an update whose loss is above this many times its running mean, or not finite; 0: never,
    # otherwise above 1
    skip_loss_above: float = 0.0
    # skip an update whose gradient has a norm above this many times its running mean; 0: never,
    # otherwise above 1
    skip_norm_above: float = 0.0
    log_every: int = 20  # steps between lines of metrics; a line holds means over these steps
    # steps between measurements of a fixed sample of held-out rows (`evaluation.validation_rows`),
    # for the progress line, `metrics.jsonl` and TensorBoard; 0: none
    validate_every: int = 0
    # keep the parameters with the fewest held-out bits per byte, of those that `validate_every`
    # measures, beside the newest checkpoint; they are then what the run is evaluated, loaded and
    # converted with
    keep_best: bool = False
    # measurements of held-out rows in a row without a new best after which training ends; 0: it
    # goes through all `steps`
    patience: int = 0
    checkpoint_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    # checkpoints at multiples of this step are kept for good; a multiple of `checkpoint_every`; 0:
    # none
    keep_every: int = 0
    seed: int = 42  # seed of the initial weights

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "steps", "batch_size", "accumulation_steps")
        found += positive(self, name, "log_every", "checkpoint_every", "keep_checkpoints")
        found += not_negative(self, name, "row_bytes", "row_patches", most=MOST_ROW)
        found += not_negative(self, name, "z_loss", "keep_every", "validate_every", "patience")
        found += not_negative(self, name, "seed", most=MOST_SEED)
        found += finite(self, name, "skip_loss_above", "skip_norm_above")
        if self.batch_size % max(self.accumulation_steps, 1):
            found.append(
                f"{name}.batch_size={self.batch_size} is not divisible by "
                f"{name}.accumulation_steps={self.accumulation_steps}: change one"
            )
        for limit in ("skip_loss_above", "skip_norm_above"):
            value = getattr(self, limit)
            if value != 0 and value <= 1:
                found.append(
                    f"{name}.{limit}={value} would leave out ordinary updates: give a number above "
                    "1, or 0 for none"
                )
        for setting in ("keep_best", "patience"):
            if getattr(self, setting) and not self.validate_every:
                found.append(
                    f"{name}.{setting}={getattr(self, setting)} goes by held-out rows, which "
                    f"{name}.validate_every=0 never measures: give the steps between measurements"
                )
        if self.keep_every % max(self.checkpoint_every, 1):
            found.append(
                f"{name}.keep_every={self.keep_every} is no multiple of "
                f"{name}.checkpoint_every={self.checkpoint_every}: nothing is saved there"
            )
        if 0 <= self.row_bytes < 8 and not (self.row_bytes == 0 and self.row_patches):
            found.append(
                f"{name}.row_bytes={self.row_bytes} must be at least 8, or 0 where row_patches is "
                "given and chooses it"
            )
        if self.row_patches in (1, 2):
            found.append(
                f"{name}.row_patches={self.row_patches} is too few: a row needs 3, two for a first "
                "patch that continues and one for its end (0 chooses the number)"
            )
        if 0 < self.row_bytes < self.row_patches <= MOST_ROW:
            found.append(
                f"{name}.row_bytes={self.row_bytes} is below "
                f"{name}.row_patches={self.row_patches}: a row holds at most one patch "
                "per byte, lower row_patches (0 chooses it)"
            )
        if self.teacher.source and self.optimizer.global_rate:
            found.append(
                f"{name}.optimizer.global_rate={self.optimizer.global_rate} with "
                f"{name}.teacher.source={shown(self.teacher.source)}: the teacher's layers are the "
                "global transformer's, which stay only at rate 0; set it 0, or leave the teacher "
                "out"
            )
        found += self.teacher.problems(f"{name}.teacher")
        found += self.diffusion.problems(f"{name}.diffusion")
        return found + self.optimizer.problems(f"{name}.optimizer")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps for xprof or Perfetto, written to WORKDIR/STAGE/profile."""

    first_step: int | None = None  # first step of the trace; None: no trace
    num_steps: int = 3  # steps that are traced
    stage: str = "blt"  # `"entropy_model"`, `"blt"` or `"token_model"`

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "num_steps") + not_negative(self, name, "first_step")
        return found + one_of(self, name, "stage", ("entropy_model", "blt", "token_model"))
