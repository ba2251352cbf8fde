"""Settings of low-rank adapters."""

from dataclasses import dataclass

from bltjax.config.checks import MOST_WIDTH, between, not_negative, positive, shown


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of matrices, which learn in their place (LoRA, Hu et al., 2021)."""

    rank: int = 0  # rank of an adapter; 0: there are none
    alpha: float = 16.0  # an adapter is scaled by `alpha / rank`
    dropout: float = 0.0  # share of an adapter's inputs that a training step leaves out, below 1
    # names of the matrices that have adapters, with the wildcards of file names
    targets: tuple[str, ...] = ("global_transformer.layers.*.attention.w[qkvo].weight",)

    @property
    def scale(self) -> float:
        """Factor of an adapter's product."""
        return self.alpha / self.rank

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = not_negative(self, name, "rank", "dropout", most=MOST_WIDTH)
        found += positive(self, name, "alpha")
        found += between(self, name, "dropout", 0, 0.99)
        if self.rank and not self.targets:
            found.append(f"{name}.targets={shown(self.targets)} names no matrix: give a pattern")
        return found
