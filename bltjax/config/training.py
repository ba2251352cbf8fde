"""Settings of training: optimizer, batches, checkpoints, profile."""

from dataclasses import dataclass

from bltjax.config.checks import finite, not_negative, one_of, positive

SCHEDULES = ("cosine", "linear", "inv_sqrt", "wsd", "constant")
MOMENTS = ("float32", "bfloat16", "factored")
UPDATES = ("dense", "touched")
# Settings of an optimizer for parts that only a byte latent transformer has.
OF_BLT_PARTS = (
    "global_rate",
    "local_rate",
    "hash_rate",
    "decay_hash_tables",
    "hash_moments",
    "hash_updates",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule of the learning rate (model.md#optimizer)."""

    learning_rate: float = 4e-4  # the highest, at the end of the warm-up
    schedule: str = "cosine"  # after the warm-up: cosine, linear, inv_sqrt, wsd or constant
    warmup_steps: int = 2000  # steps in which the learning rate grows from 0, linearly
    min_ratio: float = 0.01  # last learning rate, as a share of the highest
    cycle_length: float = 1.0  # cosine: share of the steps after which the curve starts over
    cosine_theta: float = 1.0  # cosine: exponent that bends the curve; 1: a plain cosine
    decay_fraction: float = 0.1  # wsd: share of the steps at the end in which it falls
    exp_factor: float = 0.5  # inv_sqrt: exponent of the decay
    beta1: float = 0.9  # share of the old mean in the running mean of the gradient
    beta2: float = 0.95  # share of the old mean in the running mean of its square
    epsilon: float = 1e-8  # added to the root of the mean square
    weight_decay: float = 0.1  # share of a weight, times the learning rate, taken off in each step
    clip_norm: float = 1.0  # gradients with a larger norm are scaled down to this norm
    # Factors on learning_rate for parts of the model; 0 freezes the part and keeps no moments of
    # it. To turn a trained transformer into a byte model (paper 6.2), a global_rate near 0.1.
    global_rate: float = 1.0  # the global transformer
    local_rate: float = 1.0  # local encoder and decoder with their cross-attention
    hash_rate: float = 1.0  # the hash n-gram tables
    # Parts on which weight_decay acts; the published training has it act on all.
    decay_norms: bool = True  # scales of RMSNorm
    decay_embeddings: bool = True  # byte embeddings
    decay_hash_tables: bool = True  # hash n-gram tables
    # How the optimizer stores moments of the hash tables: float32, bfloat16, or "factored", which
    # keeps of the second moments one number for each row and each column, and no first moments.
    hash_moments: str = "float32"
    # Rows of the hash tables that a step updates: all of them ("dense"), or those that it reads
    # ("touched"), which get the updates that they missed when they are next read; on one device.
    hash_updates: str = "dense"

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "schedule", SCHEDULES)
        found += positive(self, name, "learning_rate", "clip_norm", "epsilon", "cycle_length")
        found += positive(self, name, "cosine_theta", "decay_fraction")
        found += not_negative(self, name, "warmup_steps", "weight_decay")
        found += not_negative(self, name, "global_rate", "local_rate", "hash_rate")
        if not 0 <= self.min_ratio <= 1:
            found.append(f"{name}.min_ratio={self.min_ratio} must lie between 0 and 1")
        if self.schedule == "wsd" and self.min_ratio <= 0:
            found.append(
                f"{name}.min_ratio={self.min_ratio} must be positive with "
                f"{name}.schedule={self.schedule!r}, which divides by it"
            )
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

    steps: int = 1000  # updates of the weights
    batch_size: int = 8  # rows of a batch, over all devices
    accumulation_steps: int = 1  # parts that a batch is cut into, one after the other, for memory
    row_bytes: int = 1024  # byte positions of a row; 0: as many as row_patches patches have
    row_patches: int = 0  # patches of a row; 0: as many as row_bytes bytes have
    optimizer: OptimizerConfig = OptimizerConfig()  # learning rate and all that goes with it
    z_loss: float = 0.0  # weight of the square of the log of the softmax's denominator; 0: none
    # An update is left out where a value is not finite, or is this many times its running mean.
    skip_loss_above: float = 0.0  # for the loss; 0: never
    skip_norm_above: float = 0.0  # for the norm of the gradient; 0: never
    log_every: int = 20  # steps between lines of metrics
    validate_every: int = 0  # steps between measurements of held-out rows, see evaluation; 0: none
    checkpoint_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints at multiples of this step are kept for good; 0: none
    seed: int = 42  # of the initial weights and of the order of documents

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "steps", "batch_size", "accumulation_steps")
        found += positive(self, name, "log_every", "checkpoint_every", "keep_checkpoints")
        found += not_negative(self, name, "z_loss", "keep_every", "validate_every")
        found += finite(self, name, "skip_loss_above", "skip_norm_above")
        if self.batch_size % max(self.accumulation_steps, 1):
            found.append(
                f"{name}.batch_size={self.batch_size} is not divisible by "
                f"{name}.accumulation_steps={self.accumulation_steps}: change one"
            )
        for limit in ("skip_loss_above", "skip_norm_above"):
            value = getattr(self, limit)
            if value != 0 and not value > 1:
                found.append(
                    f"{name}.{limit}={value} would leave out ordinary updates: give a number above "
                    "1, or 0 for none"
                )
        if self.keep_every % max(self.checkpoint_every, 1):
            found.append(
                f"{name}.keep_every={self.keep_every} is no multiple of "
                f"{name}.checkpoint_every={self.checkpoint_every}: nothing is saved there"
            )
        if self.row_bytes < 8 and not (self.row_bytes == 0 and self.row_patches):
            found.append(
                f"{name}.row_bytes={self.row_bytes} must be at least 8, or 0 where row_patches is "
                "given and chooses it"
            )
        if self.row_patches in (1, 2):
            found.append(
                f"{name}.row_patches={self.row_patches} is too few: a row needs 3, two for a first "
                "patch that continues and one for its end (0 chooses the number)"
            )
        if self.row_patches < 0 or 0 < self.row_bytes < self.row_patches:
            found.append(
                f"{name}.row_bytes={self.row_bytes} is below "
                f"{name}.row_patches={self.row_patches}: a row holds at most one patch "
                "per byte, lower row_patches (0 chooses it)"
            )
        return found + self.optimizer.problems(f"{name}.optimizer")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps for xprof or Perfetto, written to WORKDIR/STAGE/profile."""

    first_step: int | None = None  # first step of the trace; None: no trace
    num_steps: int = 3  # steps in the trace
    stage: str = "blt"  # model that is traced: entropy_model, blt or token_model

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = positive(self, name, "num_steps") + not_negative(self, name, "first_step")
        return found + one_of(self, name, "stage", ("entropy_model", "blt", "token_model"))
