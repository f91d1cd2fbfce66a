"""The text of each token, so that a response can be shown token by token."""

from t3d.trajectories.record import Trajectory

PIECES = "pieces"  # key of Trajectory.extra


class Pieces:
    """Cuts texts into their tokens: `"".join(pieces(ids)) == tokenizer.decode(ids)`, special tokens included.

    A character whose bytes are spread over several tokens belongs to the last of them; the others get "".
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def __call__(self, ids: list[int]) -> list[str]:
        for token in set(ids) - self._alone.keys():
            self._alone[token] = self._decode([token])
        alone = [self._alone[token] for token in ids]
        # most often tokens are whole characters and mean the same everywhere
        return alone if "".join(alone) == self._decode(ids) else self._in_context(ids)

    def of(self, trajectory: Trajectory) -> list[str]:
        """Texts of the generated tokens, before them those of the prompt's tail in the first generated block."""
        tail = trajectory.tail
        return self(trajectory.prompt_ids[len(trajectory.prompt_ids) - tail :] + trajectory.response_ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _in_context(self, ids: list[int]) -> list[str]:
        texts, before, whole = [], 0, 0  # ids[before:whole] are the last ones whose text was complete
        for end in range(1, len(ids) + 1):
            known = len(self._decode(ids[before:whole]))
            text = self._decode(ids[before:end])[known:]
            if end < len(ids) and (not text or text.endswith("\ufffd")):
                texts.append("")
            else:
                texts.append(text)
                before, whole = whole, end
        return texts
