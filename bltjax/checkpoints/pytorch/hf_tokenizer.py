"""Tokenizer files for `AutoTokenizer` of transformers; ids are bytes + 4, nothing is trained.

`tokenizer.json` is a BPE model without merges: each byte is a token. Its name there is the letter
that stands for the byte in byte-level BPE (GPT-2); the four special ids and the turns of a chat,
bytes that no UTF-8 has, have names of their own.
"""

from bltjax.config.chat import TURN_BYTES, ChatConfig
from bltjax.vocabulary import BOS_ID, BPE_ID, BYTE_OFFSET, EOS_ID, PAD_ID

SPECIAL = {PAD_ID: "<|pad|>", BOS_ID: "<|bos|>", EOS_ID: "<|eos|>", BPE_ID: "<|bpe|>"}
TURNS = {name: f"<|{name}|>" for name in TURN_BYTES}


def files(chat: ChatConfig | None) -> dict[str, dict]:
    """Returns the content of the files, by name; chat: how turns look, if the model knows them."""
    by_bytes = chat is not None and chat.template == "bytes"
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token=SPECIAL[PAD_ID],
        bos_token=SPECIAL[BOS_ID],
        eos_token=SPECIAL[EOS_ID],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # such a name in a text is text
        model_max_length=10**9,
    )
    if chat is not None:
        names = TURNS if by_bytes else {name: chat.delimiter(name).decode() for name in TURNS}
        config["chat_template"] = _template(names)
    return {"tokenizer.json": _tokenizer(by_bytes), "tokenizer_config.json": config}


def _tokenizer(with_turns: bool) -> dict:
    names = {i + BYTE_OFFSET: letter for i, letter in enumerate(letters())}
    turns = {byte[0] + BYTE_OFFSET: TURNS[name] for name, byte in TURN_BYTES.items()}
    names |= SPECIAL | (turns if with_turns else {})
    added = [_added(i, name, special=True) for i, name in SPECIAL.items()]
    added += [_added(i, name, special=False) for i, name in turns.items() if with_turns]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    bos, text = SPECIAL[BOS_ID], {"Sequence": dict(id="A", type_id=0)}
    begin = {"SpecialToken": dict(id=bos, type_id=0)}
    after = {"Sequence": dict(id="B", type_id=1)}
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=dict(
            type="TemplateProcessing",
            single=[begin, text],
            pair=[begin, text, after],
            special_tokens={bos: dict(id=bos, ids=[BOS_ID], tokens=[bos])},
        ),
        decoder=byte_level,
        model=dict(
            type="BPE",
            dropout=None,
            unk_token=None,
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=False,
            vocab={name: i for i, name in sorted(names.items())},
            merges=[],
        ),
    )


def letters() -> list[str]:
    """Returns the letters that stand for the bytes 0 to 255 in byte-level BPE."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + others.index(byte)) for byte in range(256)]


def _added(i: int, name: str, special: bool) -> dict:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=i, content=name, special=special, **flags)


def _template(names: dict[str, str]) -> str:
    """Returns the template of a chat in Jinja."""
    opening = " + ".join(
        f"({_quoted(names[role])} if message['role'] == '{role}' else '')"
        for role in ("system", "user", "assistant")
    )
    return (
        "{% for message in messages %}{{ "
        f"{opening} + message['content'] + {_quoted(names['end'])}"
        " }}{% endfor %}{% if add_generation_prompt %}{{ "
        f"{_quoted(names['assistant'])}"
        " }}{% endif %}"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
