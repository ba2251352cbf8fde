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
    # which bytes of a block are masked: `"random"`, each with a probability t, as published, or
    # `"prefix"`, all after its first ones, of which there are 1 to K - 1: what drafts that are
    # verified meet
    masks: str = "random"
    # what has a probability, or a prefix, of its own: each `"block"`, or each `"row"`
    t_per: str = "block"
    # blocks of a row; where more patches start, those that have one are drawn. 0: as many as
    # `row_patches`
    row_blocks: int = 0

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = not_negative(self, name, "weight")
        found += between(self, name, "t_min", 0.001, 1)
        found += one_of(self, name, "masks", ("random", "prefix"))
        if self.masks == "prefix" and self.t_min != (usual := DiffusionConfig().t_min):
            found.append(
                f'{name}.t_min={self.t_min} changes nothing: masks="prefix" draw no probability, '
                f"leave it {usual}"
            )
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
