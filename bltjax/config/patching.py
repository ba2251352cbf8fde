"""Settings of patching."""

from dataclasses import dataclass

from bltjax.config.checks import finite, positive


@dataclass(frozen=True)
class PatchingConfig:
    """Settings of the patching rule. See model.md#rules."""

    rule: str = "entropy"  # a key of RULES in bltjax/patching/boundaries.py
    target_patch_bytes: float | None = 4.5  # entropy rules: calibrate the threshold to this mean
    threshold: float = 1.335442066192627  # nats; used where target_patch_bytes is None
    threshold_add: float = 0.0  # nats; the difference threshold of global_monotonic
    patch_size: int = 4  # static rule
    max_patch_length: int | None = None
    reset_at_newlines: bool = False  # the entropy model forgets at newlines (paper 4.4)
    published_skip_at_3: bool = False  # replicate "never a start at 3" (model.md#rules)
    bf16_compat: bool = False  # round as the published demo does (model.md#rounding)
    in_step: bool = False  # the training step finds patches, with a frozen entropy model

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group.

        Patching knows the rules: `check_rule` of `bltjax/patching/boundaries.py` checks the name.
        """
        found = positive(self, name, "patch_size")
        found += finite(self, name, "threshold", "threshold_add")
        if self.max_patch_length is not None and self.max_patch_length < 1:
            found.append(f"{name}.max_patch_length={self.max_patch_length} must be at least 1")
        if self.target_patch_bytes is not None and self.target_patch_bytes < 1:
            found.append(f"{name}.target_patch_bytes={self.target_patch_bytes} must be at least 1")
        return found
