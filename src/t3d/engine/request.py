"""What was asked for, and how far it has come."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from t3d import blocks
from t3d.blocks import block_start, whole_blocks
from t3d.decoding import constrained
from t3d.decoding.config import DecodingConfig
from t3d.decoding.constrained import Grammar
from t3d.decoding.flight import Block, Segment
from t3d.decoding.logprobs import Logprobs, logprobs
from t3d.decoding.policy import step_quotas
from t3d.errors import T3DError
from t3d.trajectories.record import NFE, Trajectory

if TYPE_CHECKING:
    from torch import Tensor

    from t3d.engine.guidance import Companion
    from t3d.engine.query import Query


@dataclass(frozen=True)
class Request:
    """One sequence to decode. `config` is resolved: block size, steps and stop ids are set."""

    index: int  # of the prompt in the caller's list
    sample: int
    prompt_ids: tuple[int, ...]
    config: DecodingConfig
    seed: int
    name: str | None = None  # of the prompt, for messages; default: its index
    negative_ids: tuple[int, ...] | None = None  # guidance's other prompt; default: the prompt with every token masked
    anchored: bool = False  # blocks are counted from the response's first token; see `t3d.blocks.origin`
    full: bool = False  # every token sees every other, masks through `max_tokens` included
    grammar: Grammar | None = None  # what its response keeps to
    logprobs: int | None = None  # how many alternatives to note beside each token's; None: note nothing

    @cached_property
    def origin(self) -> int:
        """Position of its first token."""
        return blocks.origin(len(self.prompt_ids), self.config.block_size, self.anchored)

    @cached_property
    def start(self) -> int:
        """Position of the response's first token."""
        return self.origin + len(self.prompt_ids)

    @cached_property
    def first_block(self) -> int:
        """Position of the first generated block, which the prompt's tail shares."""
        return block_start(self.start, self.config.block_size)

    @cached_property
    def end(self) -> int:
        """Where the positions that it can come to hold end: with its last block, or, anchored, inside it."""
        end = self.start + self.config.max_tokens
        return end if self.anchored else whole_blocks(end, self.config.block_size)

    @property
    def prompt_places(self) -> int:
        """Places of the prompt that are final from the beginning."""
        return 0 if self.full else self.first_block - self.origin

    @property
    def most_places(self) -> int:
        """Places of the cache it can come to need: those positions, and what its flight computes beside them."""
        config = self.config
        return self.length + config.flying.scratch_blocks(config.policy) * config.block_size

    @property
    def span(self) -> int:
        """Tokens of the blocks in which tokens see each other; of full attention a number above all positions."""
        return self.end if self.full else self.config.block_size

    @property
    def final_block(self) -> int:
        """The same of final tokens."""
        return 1 if self.config.flying.causal else self.span

    @property
    def guided(self) -> bool:
        """Whether it is decoded with a companion."""
        return self.config.guidance_scale > 0

    @property
    def companion_length(self) -> int:
        """Tokens of its companion's prompt."""
        return len(self.prompt_ids if self.negative_ids is None else self.negative_ids)

    @property
    def companion_origin(self) -> int:
        """Position of its companion's first token: the least at which the response lies in blocks as it does here."""
        return (self.start - self.companion_length) % self.config.block_size

    @property
    def length(self) -> int:
        """Positions that it can come to hold."""
        return self.end - self.origin

    @property
    def companion_most(self) -> int:
        """Positions that its companion can come to hold."""
        return self.end - self.start + self.companion_length

    @property
    def most_each(self) -> tuple[int, ...]:
        """The most places of the cache that it, and its companion, can come to need."""
        if not self.guided:
            return (self.most_places,)
        return self.most_places, self.most_places - len(self.prompt_ids) + self.companion_length

    def __str__(self) -> str:
        return self.prompt + (f" sample {self.sample}" if self.config.n > 1 else "")

    def not_numbers(self, position: int, step: int) -> T3DError:
        return T3DError(
            f"{self}: the model's logits are not numbers (NaN or inf) at position {position}, step {step}; "
            "look at its weights, or use a wider dtype"
        )

    @property
    def prompt(self) -> str:
        """What messages call it."""
        return f"prompt {self.index if self.name is None else repr(self.name)}"


@dataclass(eq=False)
class Sequence:
    """A request and its state. Positions before `at` are final; what is in flight belongs to the flight."""

    request: Request
    mask_id: int
    watched: bool = False  # every denoising step is told, not only whole blocks
    tokens: np.ndarray = field(init=False)  # int64, by position: prompt, finished blocks, masks
    step_map: np.ndarray = field(init=False)  # int64
    confidence: np.ndarray = field(init=False)  # float32
    revisions: np.ndarray = field(init=False)  # int64
    origin: int = field(init=False)  # position of its first token
    at: int = field(init=False)
    weights: int = 0  # version of the weights it began with
    cached: int = 0  # places whose keys and values in the cache are final
    hit: int = 0  # of the prompt's, those that it did not compute
    kept: int = 0  # places of the cache that its next forward sees beyond its own, of an earlier one
    ended: bool = False
    failed: bool = False
    pages: list[int] = field(default_factory=list)
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    verify: int = 0
    preemptions: int = 0

    def __post_init__(self):
        size, self.origin = self.request.end, self.request.origin
        self.tokens = np.full(size, self.mask_id, dtype=np.int64)
        self.tokens[self.origin : self.request.start] = self.request.prompt_ids
        self.step_map = np.zeros(size, dtype=np.int64)
        self.confidence = np.zeros(size, dtype=np.float32)
        self.revisions = np.zeros(size, dtype=np.int64)
        top = self.request.logprobs
        self.logprobs = None if top is None else Logprobs.empty(size, top)
        self.at = self.request.first_block
        self._held, self._block = (
            0,
            -1,
        )  # with an approximate cache: places before the segment, and whose first step was
        self.policy = self.request.config.policy
        self.finished: list[Block] = []  # final, not yet told
        self.told: list[tuple[int, list[int], list[int], list[float]]] = []  # steps, if watched, not yet told
        self.sides: tuple[Sequence | Companion, ...] = (self,)  # what has pages of the cache
        run = constrained.run if self.request.grammar else self.request.config.flying.run
        self.turns = run(self)
        self.asked: list[Segment] = next(self.turns)

    @property
    def base(self) -> int:
        """Places before which the keys of all tokens can be final, or are taken for it."""
        return self._held if self.request.full else self.at - self.origin

    @property
    def places(self) -> int:
        """Places of the cache that its next forward needs."""
        return self.base + sum(map(len, self.asked))

    @property
    def most_places(self) -> int:
        return self.request.most_places

    @property
    def root(self) -> tuple[int, int, int]:
        """All that the keys of its final tokens depend on beside the tokens up to their blocks' end."""
        return self.weights, self.request.final_block, self.origin

    def read(self, start: int, end: int) -> np.ndarray:
        """Its final tokens at these places, int64."""
        return self.tokens[start + self.origin : end + self.origin]

    def new_block(self, start: int) -> Block:
        """The block at `start` as decoding begins it: the prompt's tail, if it lies there, and masks."""
        config = self.request.config
        tokens = self.tokens[start : start + config.block_size].copy()
        size = len(tokens)
        known = min(max(self.request.start - start, 0), size)
        fixed = np.zeros(size, dtype=bool)
        fixed[:known] = True
        quotas = step_quotas(config.schedule, size, size - known, config.steps)
        steps, revisions, unsure = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.float32)
        block = Block(start, self.mask_id, tokens, fixed, steps, unsure, revisions, quotas)
        block.skip()
        if self.request.logprobs is not None:
            block.logprobs = Logprobs.empty(size, self.request.logprobs)
        return block

    def canvas(self, segment: Segment) -> Segment:
        """The segment with all that its tokens see, where they see all there is.

        With an approximate cache that is so at a block's first step alone. Behind it the keys before the block, or all
        but the block's, remain what they were then: the prefix and dual caches of Fast-dLLM (arXiv 2505.22618).
        """
        if not self.request.full:
            return segment
        kind, first = self.request.config.approximate_cache, segment.start - self.origin
        again = kind != "none" and self._block == segment.start
        self._held, self.kept, self._block = first if again else 0, 0, segment.start
        for side in self.sides:
            side.cached = self._held
        if again:
            if kind == "dual":
                self.kept = self.request.length
                return segment
            ids, want = self.tokens[segment.start :].copy(), np.zeros(self.request.end - segment.start, dtype=bool)
            ids[: len(segment)], want[: len(segment)] = segment.ids, segment.want
            return Segment(segment.start, ids, want)
        ids = self.tokens[self.origin :].copy()
        want = np.zeros(len(ids), dtype=bool)
        mine = slice(segment.start - self.origin, segment.start - self.origin + len(segment))
        ids[mine], want[mine] = segment.ids, segment.want
        return Segment(self.origin, ids, want)

    def window(self, block: Block) -> np.ndarray:
        """bool (block_size,): the masks that may be committed now."""
        masked, width = block.masked(), self.request.config.window
        if width is None or not masked.any():
            return masked
        first = int(masked.argmax()) // width * width
        masked[first + width :] = False
        return masked

    def commit_at(
        self, block: Block, places: np.ndarray, tokens: np.ndarray, confidence: np.ndarray, logits: "Tensor"
    ) -> None:
        """A step of a flight that decides for itself. places: int64 (n,), masks of the block, n >= 1; tokens: int64
        (n,), never the mask's id; confidence: float32 (n,); logits: float32 (n, vocab), by which it decided."""
        block.tokens[places], block.confidence[places] = tokens, confidence
        if block.logprobs is not None:
            block.logprobs[places] = logprobs(logits, tokens, self.request.logprobs)
        self.record(block, places)

    def record(self, block: Block, places: np.ndarray, draft: bool = False) -> None:
        """A step has changed these places of the block, int64 (n,), n >= 1. draft: nobody is told."""
        block.step_map[places] = block.step
        if not draft:
            self.tell(block, places)
        block.step += 1
        block.skip()

    def reopen(self, block: Block, places: np.ndarray) -> None:
        """Mask places of the block again, int64 (n,), n >= 1, before its next step."""
        block.tokens[places], block.confidence[places] = self.mask_id, 0.0
        block.revisions[places] += 1
        self.tell(block, places)

    def tell(self, block: Block, places: np.ndarray) -> None:
        """Whoever watches hears what the places hold now."""
        if self.watched:
            places = np.sort(places)
            at = (block.start + places - self.request.start).tolist()
            self.told.append((block.step, at, block.tokens[places].tolist(), block.confidence[places].tolist()))

    def finish(self, block: Block) -> None:
        """The block at `at` is final."""
        mine = slice(block.start, block.end)
        self.tokens[mine], self.step_map[mine] = block.tokens, block.step_map
        self.confidence[mine], self.revisions[mine] = block.confidence, block.revisions
        if self.logprobs is not None:
            self.logprobs[mine] = block.logprobs
        self.at = block.end
        self.finished.append(block)

    def advance(self, query: "Query") -> None:
        """Account for a forward: what it wrote to the cache of final tokens is final."""
        if not self.preemptions:
            self.hit += max(0, min(query.start, self.request.prompt_places) - self.cached)
        self.count(query, query.start < self.request.prompt_places)
        self.cached = query.final

    def count(self, query: "Query", prefill: bool) -> None:
        """A forward more."""
        if query.verify:
            self.verify += 1
        elif query.denoise:
            self.denoise += 1
        elif prefill:
            self.prefill += 1
        else:
            self.commit += 1

    def end(self, first: int, last: int, tokenizer) -> tuple[int, str] | None:
        """(length, finish reason) if the sequence ends with its final block `first .. last`; None if it goes on.

        A stop token counts, a stop string's tokens too; what comes after `max_tokens` does not.
        """
        prompt, most = self.request.start, self.request.config.max_tokens
        block = self.tokens[first : min(last, prompt + most)].tolist()
        stops = [n for n, token in enumerate(block, first - prompt) if token in self.request.config.stop_ids]
        lengths = [stops[0] + 1] if stops else []
        new = self.tokens[prompt:last].tolist() if self.request.config.stop else []
        for string in self.request.config.stop:
            near = max(0, first - prompt - 4 * len(string))  # a token has a byte at least, a character four at most
            if string in tokenizer.decode(new[near:most]) and string in tokenizer.decode(new[:most]):
                # nothing before this block held it, so it ends inside this block
                ends = range(first - prompt + 1, min(len(new), most) + 1)
                lengths += [next((n for n in ends if string in tokenizer.decode(new[:n])), ends[-1])]
        if lengths:
            return min(lengths), "stop"
        return (most, "length") if last - prompt >= most else None

    def trajectory(self, last: int, length: int, finish_reason: str, text: str | None) -> Trajectory:
        """last: where the last block that is kept ends."""
        first = self.request.start
        revisions = self.revisions[first:last]
        return Trajectory(
            prompt_ids=list(self.request.prompt_ids),
            response_ids=self.tokens[first:last].tolist(),
            step_map=self.step_map[first:last].tolist(),
            confidence=self.confidence[first:last].tolist(),
            revisions=revisions.tolist() if revisions.any() else None,
            logprobs=None if self.logprobs is None else self.logprobs[first:last],
            length=length,
            finish_reason=finish_reason,
            nfe=NFE(self.prefill, self.denoise, self.commit, self.verify),
            block_size=self.request.config.block_size,
            anchored=self.request.anchored,
            canvas=self.request.config.max_tokens if self.request.full else 0,
            seed=self.request.seed,
            text=text,
            sample=self.request.sample,
        )
