"""From documents to blocks of tokens."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .data import Documents


VOCABULARY = 512
LENGTH = 128  # tokens in a training block
END = "<|end|>"  # opens every document, which also ends the one before


def train_tokenizer(documents: Documents, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with single digits as tokens, in the form `transformers` wants."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [*map(chr, range(ord("!"), ord("~") + 1)), *"ĠĊĉ"]  # ASCII; ByteLevel writes space, \n and \t so
    # In characters. Arithmetic and translation need few tokens, and with more would take all of them.
    limits = {"text": 1_000_000, "code": 1_000_000, "math": 10_000, "lang": 150_000}
    tokenizer.train_from_iterator(
        ["\n".join(map("".join, documents[domain]))[:limit] for domain, limit in limits.items()],
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_blocks(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, desc: str, length: int = LENGTH
) -> dict[str, torch.Tensor]:
    """Each domain's documents one after another, cut into blocks: int64 (blocks, 2, length), tokens and labels.

    The label of a prompt's token is -100, which the loss leaves out: there is nothing to learn from drawn numbers.
    `desc` is the label of the progress bars.
    """
    blocks = {}
    for domain, pairs in documents.items():
        tokens: list[int] = []
        labels: list[int] = []
        for start in tqdm(range(0, len(pairs), 256), desc=f"{desc} {domain}"):
            prompts, answers = zip(*pairs[start : start + 256])
            asked = tokenizer(list(prompts))["input_ids"]  # opened by END
            said = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
            for prompt, answer in zip(asked, said):
                tokens += prompt + answer
                labels += prompt[:1] + [-100] * (len(prompt) - 1) + answer
        whole = len(tokens) // length * length
        blocks[domain] = torch.tensor([tokens[:whole], labels[:whole]]).view(2, -1, length).transpose(0, 1)
    return blocks


def mix_blocks(blocks: dict[str, torch.Tensor], mix: dict[str, float], count: int) -> torch.Tensor:
    """About `count` blocks, the domains in the given shares; a domain with too few blocks is gone through again.

    Returns:
        int64 (N, 2, T), domain after domain: N differs from `count` by what rounding the shares makes of it.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for domain, share in mix.items():
        wanted, have = round(share * count), len(blocks[domain])
        passes = [torch.randperm(have, generator=generator) for _ in range(-(-wanted // have))]
        rows.append(blocks[domain][torch.cat(passes)[:wanted]])
    return torch.cat(rows)
