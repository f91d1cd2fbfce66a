"""What was asked for, and how far it has come."""

from dataclasses import dataclass, field

import numpy as np

from t3d.decoding.config import DecodingConfig
from t3d.trajectories.record import NFE, Trajectory


@dataclass(frozen=True)
class Request:
    """One sequence to decode. `config` is resolved: block size, steps and stop ids are set."""

    index: int  # of the prompt in the caller's list
    sample: int
    prompt_ids: tuple[int, ...]
    config: DecodingConfig
    seed: int
    name: str | None = None  # of the prompt, for messages; default: its index

    @property
    def prompt_blocks_end(self) -> int:
        """Where the prompt's full blocks end; its tail shares the first generated block."""
        return len(self.prompt_ids) // self.config.block_size * self.config.block_size

    @property
    def most_tokens(self) -> int:
        """Positions this sequence can come to hold, through the end of its last block."""
        block = self.config.block_size
        return -(-(len(self.prompt_ids) + self.config.max_tokens) // block) * block

    def __str__(self) -> str:
        return self.prompt + (f" sample {self.sample}" if self.config.n > 1 else "")

    @property
    def prompt(self) -> str:
        """What messages call it."""
        return f"prompt {self.index if self.name is None else repr(self.name)}"


@dataclass
class Span:
    """Consecutive blocks of one sequence in one forward: positions `start .. end`, each block seeing all up to its end.

    Prefill, commit and denoise are the same work; `denoise` says whether the last block is the one in flight.
    """

    sequence: "Sequence"
    start: int
    end: int
    denoise: bool

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(eq=False)
class Sequence:
    """A request and its state. Positions before `base` are final; the block in flight begins at `base`."""

    request: Request
    mask_id: int
    watched: bool = False  # every denoising step is told, not only whole blocks
    tokens: np.ndarray = field(init=False)  # int64 (most_tokens,): prompt, finished blocks, block in flight, masks
    step_map: np.ndarray = field(init=False)  # int64 (most_tokens,)
    confidence: np.ndarray = field(init=False)  # float32 (most_tokens,)
    base: int = field(init=False)
    cached: int = 0  # positions whose keys and values in the cache are final
    step: int = 0  # of the block in flight
    ended: bool = False
    pages: list[int] = field(default_factory=list)
    prefill: int = 0
    denoise: int = 0
    commit: int = 0
    preemptions: int = 0

    def __post_init__(self):
        size = self.request.most_tokens
        self.tokens = np.full(size, self.mask_id, dtype=np.int64)
        self.tokens[: len(self.request.prompt_ids)] = self.request.prompt_ids
        self.step_map = np.zeros(size, dtype=np.int64)
        self.confidence = np.zeros(size, dtype=np.float32)
        self.base = self.request.prompt_blocks_end

    @property
    def block_end(self) -> int:
        return self.base + self.request.config.block_size

    def masked(self) -> np.ndarray:
        """bool (block_size,): positions of the block in flight still to be decided. No token is ever the mask's id."""
        return self.tokens[self.base : self.block_end] == self.mask_id

    def advance(self, span: Span) -> None:
        """Account for a forward: what it wrote to the cache is final except for the block in flight."""
        if span.denoise:
            self.denoise += 1
        elif span.start < self.request.prompt_blocks_end:
            self.prefill += 1
        else:
            self.commit += 1
        self.cached = self.base if span.denoise else span.end

    def end(self, first: int, tokenizer) -> tuple[int, str] | None:
        """(length, finish reason) if the sequence ends with its newest block, `first .. base`; None if it goes on.

        A stop token counts, a stop string's tokens too; what comes after `max_tokens` does not.
        """
        prompt, most = len(self.request.prompt_ids), self.request.config.max_tokens
        new = self.tokens[prompt : self.base].tolist()
        stops = [n for n in range(first - prompt, min(len(new), most)) if new[n] in self.request.config.stop_ids]
        lengths = [stops[0] + 1] if stops else []
        for string in self.request.config.stop:
            near = max(0, first - prompt - 4 * len(string))  # a token has a byte at least, a character four at most
            if string in tokenizer.decode(new[near:most]) and string in tokenizer.decode(new[:most]):
                # nothing before this block held it, so it ends inside this block
                ends = range(first - prompt + 1, min(len(new), most) + 1)
                lengths += [next((n for n in ends if string in tokenizer.decode(new[:n])), ends[-1])]
        if lengths:
            return min(lengths), "stop"
        return (most, "length") if len(new) >= most else None

    def trajectory(self, length: int, finish_reason: str, text: str | None) -> Trajectory:
        first, last = len(self.request.prompt_ids), self.base
        return Trajectory(
            prompt_ids=list(self.request.prompt_ids),
            response_ids=self.tokens[first:last].tolist(),
            step_map=self.step_map[first:last].tolist(),
            confidence=self.confidence[first:last].tolist(),
            length=length,
            finish_reason=finish_reason,
            nfe=NFE(self.prefill, self.denoise, self.commit),
            block_size=self.request.config.block_size,
            seed=self.request.seed,
            text=text,
            sample=self.request.sample,
        )
