"""The record that flows through the whole pipeline: what one decode produced, and in which order."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class NFE:
    """Forward passes one sequence took part in. A forward that denoises counts as `denoise`, whatever else it carries."""

    prefill: int = 0  # forwards that only read prompt tokens
    denoise: int = 0  # forwards that predicted tokens of a block
    commit: int = 0  # forwards that only wrote a finished block to the cache

    @property
    def total(self) -> int:
        return self.prefill + self.denoise + self.commit


@dataclass
class Trajectory:
    """One decoded response with the order in which its tokens were committed.

    `response_ids`, `step_map` and `confidence` cover every generated position through the end of the last block
    (`len(prompt_ids) + len(response_ids)` is a multiple of `block_size`), so that any state can be rebuilt; `length`
    says how many of them are the answer: through the first stop token, or `max_tokens`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    step_map: list[int]  # denoising step (0-based, inside its block) at which each token was committed
    confidence: list[float]  # of each token when it was committed
    length: int  # tokens that count, through the first stop token
    finish_reason: str  # "stop" | "length"
    nfe: NFE
    block_size: int
    seed: int = 0  # the sequence's own seed
    text: str | None = None  # decoded response_ids[:length], special tokens skipped; None without a tokenizer
    prompt_id: str = ""  # the problem this answers; resume works by (prompt_id, sample)
    sample: int = 0  # 0 .. n-1 when a prompt is decoded n times
    question: str | None = None
    answer: str | None = None  # the reference answer, if the task has one
    correct: bool | None = None  # the verifier's verdict; None where there is nothing to verify
    extra: dict = field(default_factory=dict)  # small JSON-able values a caller wants kept
