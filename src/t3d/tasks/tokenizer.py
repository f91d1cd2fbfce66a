"""The word-level tokenizer of the embedded task: a word carries its leading space, digits stand alone."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, STOP, START, MASK, UNK = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|MASK|>", "<unk>"

# Every character falls into exactly one match, so joining the tokens gives the text back.
PIECES = r"user\n|assistant\n| ?\\boxed\{| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _pre_tokenizer():
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(PIECES), behavior="isolated")


def pieces(text: str) -> list[str]:
    """`text` cut into the strings that are the vocabulary's entries; they join to `text`."""
    return [piece for piece, _ in _pre_tokenizer().pre_tokenize_str(text)]


def word_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer whose vocabulary is the special tokens, then the sorted pieces of `texts`.

    `decode(encode(text)) == text` for every text made of those pieces; anything else becomes `<unk>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = sorted({piece for text in texts for piece in pieces(text)} | {"user\n", "assistant\n", "\n"})
    specials = [PAD, STOP, START, MASK, UNK]
    vocabulary = {token: i for i, token in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        mask_token=MASK,
        unk_token=UNK,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
    )
