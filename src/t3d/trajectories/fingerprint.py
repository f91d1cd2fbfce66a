"""Short hashes that tell one model or tokenizer from another, so that what they made is not taken for each other's."""

import hashlib
import json

from t3d.errors import T3DError

SAMPLES = 256  # values of each weight that are looked at


def model_fingerprint(model) -> str:
    """Hash of the architecture and of `SAMPLES` values, evenly spaced, of every weight: training changes it."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu().numpy()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer) -> str | None:
    """Hash of the vocabulary and the chat template; None for None."""
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps([vocabulary, template]).encode()).hexdigest()[:16]


def check_tokenizer(metadata: dict, tokenizer) -> None:
    """Raises T3DError if trajectories with this metadata were made with another tokenizer, where it says with which."""
    made_with = metadata.get("tokenizer_fingerprint")
    if made_with is not None and tokenizer is not None and made_with != tokenizer_fingerprint(tokenizer):
        raise T3DError(
            "the trajectories were made with a different tokenizer from the model's; roll out again with this model"
        )
