"""Settings of training the decoder to fill in blocks of unknown bytes."""

import dataclasses
from dataclasses import dataclass

from bltjax.config.checks import MOST_ROW, between, not_negative, one_of


@dataclass(frozen=True)
class DiffusionConfig:
    """Masked blocks beside the next bytes, where `blt.diffusion_block` is above 0 (BLT-D, 2026)."""

    # weight of the mean loss of masked bytes beside that of next bytes; the published 1 costs small
    # models 6% of their bits per byte; 0: no blocks are read
    weight: float = 0.1
    # bytes are masked with a probability between this and 1, and their loss is divided by it: near
    # 0 a few bytes would weigh as much as all others
    t_min: float = 0.1
    t_per: str = "block"  # what has a probability of its own: each `"block"`, or each `"row"`
    # blocks of a row; where more patches start, those that have one are drawn. 0: as many as
    # `row_patches`
    row_blocks: int = 0

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = not_negative(self, name, "weight")
        found += between(self, name, "t_min", 0.001, 1)
        found += one_of(self, name, "t_per", ("block", "row"))
        return found + not_negative(self, name, "row_blocks", most=MOST_ROW)

    def without_blocks(self, name: str, why: str) -> list[str]:
        """Returns the settings that change nothing where no blocks are learned, a line each."""
        default = DiffusionConfig()
        return [
            f"{name}.{field.name}={value!r} changes nothing: {why}, or leave it {usual!r}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != (usual := getattr(default, field.name))
        ]
