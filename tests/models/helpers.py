import pytest
import torch

from t3d.blocks import Layout
from t3d.models import FAMILIES
from tests.conftest import make_model

# Every family with every shift of its logits: a new family is in all tests of these.
VARIANTS = [
    pytest.param(family, shift, id=f"{family}-shift" if shift else family)
    for family, model in FAMILIES.items()
    for shift in model.config_class.shifts
]
CONVERTED = [v for v in VARIANTS if FAMILIES[v.values[0]].autoregressive is not None]


def make_variant(family, shift, **settings):
    return make_model(family=family, **({"logits_shift": shift} if shift else {}), **settings)


def plain_class(family):
    """transformers' own class, of which the family's is one."""
    return next(c for c in FAMILIES[family].__mro__ if c.__module__.startswith("transformers.models."))


def logits(model, length=12, block_size=4, seed=0):
    """Block-causal logits of random tokens, `(length, vocab)`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 60, (1, length), generator=generator)
    zeros = torch.zeros(1, length, dtype=torch.long)
    layout = Layout(zeros, zeros, torch.arange(length)[None], block_size)
    with torch.no_grad():
        return model(ids, layout.boolean_mask(), layout.position).logits[0]
