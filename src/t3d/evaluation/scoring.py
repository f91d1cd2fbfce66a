"""How likely a text is under a model: any causal one of transformers, or a block-diffusion one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t3d.blocks import CLEAN, Layout, block_start, check_blocks, geometry, origin, whole_blocks
from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model
from t3d.models.load import require_tokenizer


@dataclass
class Scorer:
    """A model with its tokenizer, to give texts their perplexity.

    orders: for a block-diffusion model, 0 for the likelihood of writing each block from left to right, one token at a
    time; else the mean over this many random orders, which bounds the log-likelihood of a random order from below.
    """

    model: Any
    tokenizer: Any
    orders: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.diffusion:
            check_blocks(self.model.config, "the scorer")

    @property
    def diffusion(self) -> bool:
        return getattr(self.model.config, "model_type", None) in FAMILIES

    def perplexity(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> float:
        """exp of the mean negative log-likelihood per token of `texts`, each after its context; NaN without tokens.

        Perplexities of models with different tokenizers do not compare.
        """
        nats, tokens = 0.0, 0
        for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
            before, ids = self._encode(context), self._encode(text)
            logp = self.log_likelihood(before, ids)
            nats, tokens = nats - sum(logp), tokens + len(logp)
        return math.exp(nats / tokens) if tokens else math.nan

    def log_likelihood(self, context: list[int], ids: list[int]) -> list[float]:
        """Natural log-likelihood of each of `ids` after `context`; one fewer where a causal model has no first one.

        Raises:
            T3DError: if they do not fit the model's context.
        """
        if not ids:
            return []
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(context) + len(ids) + 1 > limit:
            raise T3DError(f"a text of {len(context) + len(ids)} tokens does not fit the scorer's context of {limit}")
        with torch.inference_mode():
            if not self.diffusion:
                first = self._begin()
                context = context if context[:1] == first else first + context  # chat templates may begin with it
                return causal_log_likelihood(self.model, context, ids)
            draws = [
                block_log_likelihood(self.model, context, ids, self.seed + i if self.orders else None)
                for i in range(max(1, self.orders))
            ]
        return [sum(column) / len(draws) for column in zip(*draws, strict=True)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _begin(self) -> list[int]:
        """What stands before the first token, so that it has a probability too."""
        first = self.tokenizer.bos_token_id
        return [] if first is None else [first]


def load_scorer(name: str, device: str | None = None, orders: int = 0, seed: int = 0) -> Scorer:
    """The checkpoint `name` (folder or hub id) as a scorer: block-diffusion if it is one, else causal."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        family = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if family not in FAMILIES:
            model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False).to(device or "cpu")
            return Scorer(model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise T3DError(f"cannot load the scorer {name}: {str(error).splitlines()[0]}") from error
    model, tokenizer = load_model(name, device=device)
    require_tokenizer(tokenizer, name)
    return Scorer(model, tokenizer, orders, seed)


def causal_log_likelihood(model, context: list[int], ids: list[int]) -> list[float]:
    """log p of each of `ids` given all before it; the very first token of an empty context has none."""
    tokens = torch.tensor([context + ids], device=model.device)
    logits = model(input_ids=tokens).logits[0].float()  # (length, vocab)
    logp = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return logp[max(0, len(context) - 1) :].tolist()


def block_log_likelihood(model, context: list[int], ids: list[int], seed: int | None = None) -> list[float]:
    """log p of each of `ids` when every block is written one token at a time, in a random order, or left to right.

    The chain rule over one order, so the likelihoods of all responses of a length sum to 1. One forward: row `r` holds
    the clean tokens and a copy of the blocks in which those written before the r-th are visible.
    """
    block, mask_id = model.config.block_size, model.config.mask_token_id
    begin = origin(len(context), block, geometry(model.config)["anchored"])
    first, length = begin + len(context), begin + len(context) + len(ids)  # positions, as all of these
    start, end = block_start(first, block), whole_blocks(length, block)
    turn = _turns(first, length, start, end, block, seed)  # (end - start,); -1 given, `block` not asked for
    clean = torch.tensor(context + ids + [mask_id] * (end - length))  # (end - begin,)
    rounds = torch.arange(block)[:, None]  # row r asks for the tokens whose turn is r
    noisy = torch.where(turn < rounds, clean[start - begin :], mask_id)
    tokens = torch.cat([clean.expand(block, -1), noisy], 1)  # (block, end - begin + end - start)
    position = torch.cat([torch.arange(begin, end), torch.arange(start, end)]).expand(block, -1)
    copy = torch.full_like(position, CLEAN)
    copy[:, end - begin :] = 1
    layout = Layout(rounds.expand_as(position), copy, position.contiguous(), block)  # a document per row
    asked = (turn == rounds).nonzero()  # (len(ids), 2): row, place
    select = asked[:, 0] * tokens.shape[1] + end - begin + asked[:, 1]
    device = model.device
    moved = Layout(*(getattr(layout, name).to(device) for name in ("document", "copy", "position")), block)
    logits = model(
        input_ids=tokens.to(device),
        attention_mask=moved.attention_mask(model.config._attn_implementation),
        position_ids=moved.position,
        select=moved.predictors(select.to(device), model.config.logits_shift),
    ).float()  # (len(ids), vocab)
    logits[:, mask_id] = -torch.inf  # no decoder ever writes it
    target = clean[start - begin + asked[:, 1]].to(device)
    logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0].cpu()
    return logp[asked[:, 1].argsort()].tolist()


def _turns(first: int, length: int, start: int, end: int, block: int, seed: int | None) -> Tensor:
    """When each position of `start .. end` is written inside its block: 0, 1, ...; -1 before `first`."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    turn = torch.full((end - start,), block)
    turn[: first - start] = -1
    for begin in range(start, end, block):
        low, high = max(begin, first), min(begin + block, length)
        size = high - low
        order = torch.arange(size) if generator is None else torch.randperm(size, generator=generator)
        turn[low - start : high - start] = order
    return turn
