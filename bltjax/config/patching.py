"""Settings of patching."""

from dataclasses import dataclass

from bltjax.config.checks import MOST_ROW, between, finite, positive


@dataclass(frozen=True)
class PatchingConfig:
    """Settings of the patching rule. See model.md#rules."""

    rule: str = "entropy"  # name of the patching rule; the table of rules has them all
    # rules by entropy: the threshold is calibrated to this mean patch, in bytes; None: `threshold`
    # is used as it is. Must be None for `global_monotonic`, which has two thresholds
    target_patch_bytes: float | None = 4.5
    # entropy threshold in nats; the default is that of the released models
    threshold: float = 1.335442066192627
    # nats; the second threshold of `global_monotonic`: how far entropy must rise
    threshold_add: float = 0.0
    patch_size: int = 4  # bytes of a patch under the rule `static`
    # longer patches are split every so many bytes, from their left end; None: never
    max_patch_length: int | None = None
    # a patch starts after each of the bytes 0xF8 to 0xFB, which begin and end the turns of a
    # conversation
    turns: bool = False
    # the context of the entropy model ends at each newline (paper, section 4.4)
    reset_at_newlines: bool = False
    # `global_monotonic` never starts a patch at position 3, as the published code does
    published_skip_at_3: bool = False
    # entropies and threshold are rounded to bfloat16, as in the published demo
    bf16_compat: bool = False
    # a frozen entropy model inside the training step finds the patches; see Data
    in_step: bool = False

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group.

        Patching knows the rules: `check_rule` of `bltjax/patching/boundaries.py` checks the name.
        """
        found = positive(self, name, "patch_size", "max_patch_length", most=MOST_ROW)
        found += finite(self, name, "threshold", "threshold_add")
        return found + between(self, name, "target_patch_bytes", 1, MOST_ROW)
