import torch

from t3d.blocks import Layout


def logits(model, length=12, block_size=4, seed=0):
    """Block-causal logits of random tokens, `(length, vocab)`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 60, (1, length), generator=generator)
    zeros = torch.zeros(1, length, dtype=torch.long)
    layout = Layout(zeros, zeros, torch.arange(length)[None], block_size)
    with torch.no_grad():
        return model(ids, layout.boolean_mask(), layout.position).logits[0]
