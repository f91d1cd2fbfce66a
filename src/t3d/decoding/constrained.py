"""Answers that keep to a grammar, such as JSON of a schema. The grammars are llguidance's, the extra `t3d[json]`.

Tokens of a step are drawn independently of each other, so a set of them anywhere in a block may leave no way to fill
what lies between. Here a step commits masks from left to right instead: each token is drawn among those that the
grammar takes after all before it, from the logits of one forward. What is committed is always a beginning of an answer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from t3d.decoding.flight import Block
from t3d.decoding.flights.multi_block import ask, row
from t3d.decoding.sampling import sample, uniform
from t3d.errors import T3DError

if TYPE_CHECKING:
    from torch import Tensor

    from t3d.engine.request import Sequence

# policies whose rule, from left to right, says how many a step commits; the second of each is that rule
BY_COUNT, BY_THRESHOLD = ("low_confidence_static", "sequential"), ("low_confidence_dynamic", "prefix")
# Nothing that a schema asks for is passed over. Between tokens of JSON there is a space at most, or a new line and its
# indentation: without a bound, a model in doubt writes white space until its tokens are used up.
_OPTIONS = {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": r" ?|\n {0,24}"}


@dataclass(frozen=True, eq=False)
class Grammar:
    """What an answer may be. tokenizer: llguidance's; text: a grammar in its format."""

    tokenizer: Any
    text: str

    @classmethod
    def of_schema(cls, schema: dict | bool, tokenizer) -> "Grammar":
        """JSON that a JSON schema allows. Raises T3DError, one line, for a schema that cannot be kept to."""
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
            wrong, said = LLMatcher.validate_grammar_with_warnings(text, tokenizer)
        except ValueError as error:
            wrong, said = True, [str(error)]
        if wrong:
            raise T3DError(f"the JSON schema cannot be kept to: {' '.join(said[0].split())}")
        return cls(tokenizer, text)


def grammar_tokenizer(tokenizer, vocabulary: int):
    """llguidance's form of a tokenizer, for a model with so many tokens. Takes a second; raises T3DError without it."""
    try:
        from llguidance.hf import from_tokenizer
    except ModuleNotFoundError as error:
        raise T3DError(f"answers in JSON need {error.name}; install it with: pip install 't3d[json]'") from error
    try:
        return from_tokenizer(tokenizer, n_vocab=vocabulary, slices=None)
    except ValueError as error:
        raise T3DError(f"no grammar works with this tokenizer: {' '.join(str(error).split())}") from error


def check(config) -> None:
    """Raises T3DError for settings that a grammar does not work with. config: a resolved `DecodingConfig`."""
    if config.strategy not in BY_COUNT + BY_THRESHOLD:
        able = ", ".join(BY_COUNT + BY_THRESHOLD)
        raise T3DError(f"response_format works with strategy {able}, not {config.strategy!r}")
    if config.flight != "multi_block" or config.blocks_in_flight > 1:
        raise T3DError("response_format works with one block after the other; leave flight and blocks_in_flight out")
    if config.window is not None:
        raise T3DError("response_format fills a block from left to right; leave window out")
    if not config.stop_ids:
        raise T3DError("response_format ends an answer with a stop token; leave ignore_eos and stop_ids out")


def run(sequence: "Sequence"):
    """As `Flight.run`: one block after the other, each filled from left to right."""
    walk = _Walk(sequence)
    block = sequence.new_block(sequence.at)
    while True:
        segments = ask([block], sequence)
        logits = yield segments
        index = row(block, segments).logits
        places = block.masked().nonzero()[0]
        walk.step(block, places, logits.rows(index[places]))
        if block.full():
            sequence.finish(block)
            if block.end == sequence.request.end:
                return
            block = sequence.new_block(block.end)


class _Walk:
    """Where an answer is in its grammar."""

    def __init__(self, sequence: "Sequence"):
        from llguidance import LLMatcher

        self.sequence, self.config = sequence, sequence.request.config
        grammar = sequence.request.grammar
        self.matcher = LLMatcher(grammar.tokenizer, grammar.text, log_level=0)
        self.ends = grammar.tokenizer.eos_tokens  # what it calls so; what ends a response, the settings say
        self.stops = [token for token in self.config.stop_ids if token < grammar.tokenizer.vocab_size]

    def allowed(self) -> np.ndarray:
        """bool (vocab,): the tokens that can come next. Raises T3DError if there are none."""
        found = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8) > 0
        found[self.ends] = False
        found[self.stops] = self.matcher.is_accepting()
        if self.matcher.is_error() or not found.any():
            said = " ".join((self.matcher.get_error() or "no token goes on from here").split())
            raise T3DError(f"{self.sequence.request}: the grammar cannot be kept to: {said[:200]}")
        return found

    def step(self, block: Block, places: np.ndarray, logits: "Tensor") -> None:
        """Commit the first of the places, and further ones by the strategy's rule. places: int64 (n,), the block's
        masks; logits: float32 (n, vocab)."""
        config = self.config
        by_count = config.strategy in BY_COUNT
        scheduled = by_count or (config.strategy == "low_confidence_dynamic" and config.floor == "schedule")
        fewest = max(1, block.quota()) if scheduled else 1
        tokens, confidence = [], []
        for place, values in zip(places, logits, strict=True):
            if by_count and len(tokens) == fewest:
                break
            allowed = torch.from_numpy(self.allowed()).to(logits.device)
            token, sure = self.draw(block, int(place), values[None].masked_fill(~allowed, -torch.inf))
            if len(tokens) >= fewest and sure <= config.threshold:
                break
            tokens.append(token)
            confidence.append(sure)
            if token in self.stops:  # what comes behind it does not count, and need not be decided
                rest = len(places) - len(tokens)
                tokens += [token] * rest
                confidence += logits[len(places) - rest :].softmax(-1)[:, token].tolist()
                break
            self.matcher.consume_token(token)
        done = len(tokens)
        self.sequence.commit_at(block, places[:done], np.array(tokens), np.array(confidence, np.float32), logits[:done])

    def draw(self, block: Block, place: int, logits: "Tensor") -> tuple[int, float]:
        """The token of a place, and its probability among those allowed. logits: float32 (1, vocab)."""
        config, request = self.config, self.sequence.request
        seed, position, step = (torch.tensor([x]) for x in (request.seed, block.start + place, block.step))
        token, confidence, *_ = sample(
            logits,
            torch.tensor([float(config.temperature)]),
            torch.tensor([config.top_k]),
            torch.tensor([float(config.top_p)]),
            uniform(seed, position, step, 0),
            torch.tensor([config.confidence == "sampling"]),
        )
        sure = float(confidence)
        if sure != sure:
            raise request.not_numbers(block.start + place, block.step)
        return int(token), sure
