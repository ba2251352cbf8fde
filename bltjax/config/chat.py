"""Settings of conversations."""

from dataclasses import dataclass

from bltjax.config.checks import one_of

TEMPLATES = ("bytes", "text")
ROLES = ("system", "user", "assistant")
# Bytes that no UTF-8 holds, so that no content can be taken for one.
TURN_BYTES = dict(system=b"\xf8", user=b"\xf9", assistant=b"\xfa", end=b"\xfb")


@dataclass(frozen=True)
class ChatConfig:
    """Turns of conversations that become documents (finetuning.md#conversations)."""

    # `"bytes"`: a turn begins with the byte 0xF8 (system), 0xF9 (user) or 0xFA (assistant), and
    # ends with 0xFB; no UTF-8 holds these. `"text"`: with the texts below
    template: str = "bytes"
    system: str = "<<system>>\n"  # what begins a turn of the system, in the template `text`
    user: str = "<<user>>\n"  # the same of the user
    assistant: str = "<<assistant>>\n"  # the same of the assistant
    end: str = "<<end>>\n"  # what ends a turn

    def delimiter(self, name: str) -> bytes:
        """Returns the bytes that begin a turn of a role, or of "end", which end every turn."""
        return TURN_BYTES[name] if self.template == "bytes" else getattr(self, name).encode()

    def problems(self, name: str) -> list[str]:
        """Returns what is wrong with the settings, a line each; name: of the group."""
        found = one_of(self, name, "template", TEMPLATES)
        texts = [getattr(self, part) for part in TURN_BYTES]
        if not all(texts):
            found.append(f"{name}: none of {', '.join(TURN_BYTES)} may be empty")
        clashes = any(a in b for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j)
        if all(texts) and clashes:
            found.append(
                f"{name}: one of {', '.join(map(repr, texts))} is a part of another: turns could "
                "not be told apart"
            )
        return found
