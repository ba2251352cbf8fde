"""Settings of learning from the tokenized model that a byte model was made around."""

from dataclasses import dataclass

from bltjax.config.checks import MOST_ROW, between, not_negative, positive, shown


@dataclass(frozen=True)
class TeacherConfig:
    """The tokenized model whose layers are the global transformer, which is frozen meanwhile."""

    # that model, which `bltjax byteify` made the byte model of: a directory of Hugging Face's or a
    # GGUF file; empty: there is no teacher
    source: str = ""
    tokenizer: str = ""  # its `tokenizer.json`, or a directory with one; empty: that of `source`
    # weight of the distance of patches to the embeddings of their tokens, where both are the same
    # bytes; 0: none
    align: float = 0.1
    # weight of the distance of the likelihoods of tokens to the teacher's; 0: none
    distill: float = 1.0
    temperature: float = 5.0  # likelihoods are compared to the power of 1 over it
    # share of the steps, the first ones, in which the decoder reads the teacher's states of the
    # last token in the place of those of patches, and the encoder learns from `align` alone
    feed: float = 0.0
    # tokens of a row at most, further ones teach nothing; 0: follows from `row_bytes` and the mean
    # token
    row_tokens: int = 0

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = not_negative(self, name, "align", "distill", "feed")
        found += not_negative(self, name, "row_tokens", most=MOST_ROW)
        found += positive(self, name, "temperature")
        found += between(self, name, "feed", 0, 1)
        if self.tokenizer and not self.source:
            found.append(
                f"{name}.tokenizer={shown(self.tokenizer)} changes nothing without a teacher: give "
                f"{name}.source too, or leave it out"
            )
        if self.source and self.feed and not self.align:
            found.append(
                f"{name}.align=0 with {name}.feed={self.feed} would leave the encoder without "
                "anything to learn from: give a weight above 0, or feed=0"
            )
        return found
