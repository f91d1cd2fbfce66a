"""The record that flows through the whole pipeline: what one decode produced, and in which order."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from t3d.blocks import origin
from t3d.errors import T3DError

if TYPE_CHECKING:
    from t3d.decoding.logprobs import Logprobs

FINISH_REASONS = ("stop", "length")
MESSAGES = "messages"  # key of Trajectory.extra: the chat that the prompt was made of, where it was one
CONTEXT = "context"  # another: the passages retrieved for the question, each with `source` and `text`


@dataclass(frozen=True)
class NFE:
    """Forward passes that one sequence took part in. One that denoises counts as `denoise`, whatever else it does."""

    prefill: int = 0  # forwards that only read prompt tokens
    denoise: int = 0  # forwards that predicted tokens of a block
    commit: int = 0  # forwards that only wrote a finished block to the cache
    verify: int = 0  # forwards that checked a draft, predicting its tokens from left to right

    @property
    def predicting(self) -> int:
        """Those that predict tokens."""
        return self.denoise + self.verify

    @property
    def total(self) -> int:
        return self.prefill + self.predicting + self.commit


@dataclass
class Trajectory:
    """One decoded response with the order in which its tokens were committed.

    `response_ids`, `step_map` and `confidence` cover every generated position through the end of the last block, so
    that any state can be rebuilt: the prompt's tail in the first block and the response are a multiple of `block_size`,
    but where blocks are anchored, whose last one may be short. `length` says how many of them are the answer: through
    the first stop token, or `max_tokens`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    step_map: list[int]  # denoising step (0-based, inside its block) at which each token was last committed
    confidence: list[float]  # of each token when it was last committed
    length: int  # tokens that count, through the first stop token
    finish_reason: str  # "stop" | "length"
    nfe: NFE
    block_size: int
    anchored: bool = False  # blocks are counted from the response's first token, else from the prompt's
    canvas: int = 0  # of full attention, tokens of the response that all others saw, masks included; 0: block-causal
    revisions: list[int] | None = None  # how often each place was rewritten or masked again; None: nowhere
    seed: int = 0  # the sequence's own seed
    text: str | None = None  # decoded response_ids[:length], special tokens skipped; None without a tokenizer
    prompt_id: str = ""  # the problem this answers; resume works by (prompt_id, sample)
    sample: int = 0  # 0 .. n-1 when a prompt is decoded n times
    question: str | None = None
    answer: str | None = None  # the reference answer, if the task has one
    correct: bool | None = None  # the verifier's verdict; None where there is nothing to verify
    logprobs: "Logprobs | None" = None  # of response_ids, if asked for; not stored
    extra: dict = field(default_factory=dict)  # small JSON-able values a caller wants kept

    @property
    def origin(self) -> int:
        """Position of the prompt's first token, see `t3d.blocks.origin`."""
        return origin(len(self.prompt_ids), self.block_size, self.anchored)

    @property
    def tail(self) -> int:
        """Tokens of the prompt that lie in the first generated block."""
        return (self.origin + len(self.prompt_ids)) % self.block_size


def validate(trajectory: Trajectory) -> Trajectory:
    """The same trajectory, if it keeps the invariants that rebuilding states relies on.

    Raises:
        T3DError: naming the trajectory and the first invariant it breaks.
    """
    t = trajectory
    where = f"trajectory {t.prompt_id!r} (sample {t.sample})"

    def check(ok: bool, message: str):
        if not ok:
            raise T3DError(f"{where}: {message}")

    n = len(t.response_ids)
    check(
        len(t.step_map) == n == len(t.confidence),
        f"response_ids, step_map and confidence differ in length ({n}, {len(t.step_map)}, {len(t.confidence)})",
    )
    check(t.block_size >= 1, f"block_size must be at least 1, got {t.block_size}")
    check(
        t.anchored or (t.tail + n) % t.block_size == 0,
        f"prompt and response have {len(t.prompt_ids)} + {n} tokens, not a multiple of block_size "
        f"{t.block_size}; keep the whole last block",
    )
    check(1 <= t.length <= n, f"length must lie in 1..{n}, got {t.length}")
    check(
        t.finish_reason in FINISH_REASONS,
        f"finish_reason must be 'stop' or 'length', got {t.finish_reason!r}",
    )
    check(min(t.prompt_ids, default=0) >= 0 and min(t.response_ids) >= 0, "token ids must not be negative")
    check(
        t.revisions is None or len(t.revisions) == n,
        f"revisions has {len(t.revisions or ())} entries, response_ids {n}",
    )
    check(min(t.revisions or (0,)) >= 0, "revisions must not be negative")
    low, high = min(t.step_map), max(t.step_map)
    check(
        low >= 0 and (high < t.block_size or any(t.revisions or ())),
        f"steps count from 0 inside each block of {t.block_size}, got {low}..{high}",
    )
    # NaN stands for "not recorded" and passes: no comparison with it is true.
    check(not any(c < 0 or c > 1 for c in t.confidence), "confidences must lie in 0..1")
    check(min(t.nfe.prefill, t.nfe.denoise, t.nfe.commit, t.nfe.verify) >= 0, "forwards must not be negative")
    return t
