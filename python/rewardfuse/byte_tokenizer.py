"""A tokenizer with one token a byte, made on the spot: for demos, tests and models trained from scratch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a tokenizer of 259 tokens: ids 0 to 255 are the bytes of the UTF-8 text, then pad, bos and eos.

    Texts are encoded as ``bos, bytes…, eos``. It needs no download, never meets an unknown character, and is saved and
    loaded like any other ``transformers`` tokenizer.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("Hé")["input_ids"]
    [257, 72, 195, 169, 258]
    >>> tokenizer.decode([72, 195, 169])
    'Hé'
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _byte_characters() -> list[str]:
    """The printable character that the ByteLevel pre-tokenizer writes for each byte (Radford et al. 2019, GPT-2).

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
