import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run, so that a red test is news. To look for new ones: pytest --hypothesis-profile=explore
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("same")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads would only be in each other's way
    torch.set_num_threads(1)


# What a small model of a family needs beside the settings that all have.
PARTICULAR = {
    "sdar_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "llada2_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
    "block_gemma3": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
}


def make_model(
    block_size=4,
    vocab_size=64,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    seed=0,
    tie=False,
    family="sdar",
    **settings,
):
    """A small model with random weights, sharp enough that its decisions are far from ties. Mask token: the last id."""
    from t3d.models import FAMILIES

    settings = PARTICULAR.get(family, {}) | settings
    settings = {"max_position_embeddings": 512, "intermediate_size": 2 * hidden, "eos_token_id": 1} | settings
    config = FAMILIES[family].config_class(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        block_size=block_size,
        mask_token_id=vocab_size - 1,
        pad_token_id=0,
        bos_token_id=None,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](config)
        for weight in model.parameters():
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=2.0 / weight.shape[-1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data files of ../shared/data")
    return folder


def pytest_terminal_summary(terminalreporter):
    """Say what was not tested here, kind by kind, and what it needs."""
    found = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        whole_file = isinstance(report, pytest.CollectReport)
        found[report.longrepr[2].removeprefix("Skipped: "), "file" if whole_file else "test"] += 1
    lines = [f"{n} {what}{'s' * (n > 1)}: {reason}" for (reason, what), n in sorted(found.items())]
    if not os.environ.get("T3D_ALL"):
        lines.append("most of the long lists of problems and programs: T3D_ALL=1 takes all")
    if not torch.cuda.is_available():
        lines.append("CUDA: no GPU here; benchmarks/gpu has the checks for one")
    terminalreporter.section("not tested here", sep="-")
    terminalreporter.write_line("\n".join(lines))
