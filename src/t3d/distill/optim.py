"""Muon for matrices with AdamW for the rest, as one optimizer that transformers' Trainer can drive."""

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` on the hidden matrices, `torch.optim.AdamW` on embeddings, head, norms and biases.

    Muon's updates are scaled to AdamW's size (`match_rms_adamw`), so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.95), eps: float = 1e-8):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        chosen = set(map(id, matrices))
        rest = [p for _, p in named if id(p) not in chosen]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=betas, eps=eps),
        ]
        # The groups are the parts' own dicts, so a learning-rate schedule reaches them.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts], "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
