"""Puts the results of a GPU into the tables of docs/performance.md, between its markers.

    python benchmarks/gpu/report.py DIR [--page FILE]

What has no result in DIR's files says "not measured"; what failed says so with its error.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import correct  # noqa: E402
import decode  # noqa: E402
import real  # noqa: E402
import text_quality  # noqa: E402
import train  # noqa: E402

from t3d.evaluation.rows import percent  # noqa: E402

BEGIN, END = "<!-- benchmarks/gpu/report.py writes from here -->", "<!-- to here -->"
MISSING = "not measured"
PHASES = ("correct", "decode", "train", "real")


def read(folder: Path, phase: str) -> dict:
    path = folder / f"{phase}.json"
    if not path.exists():
        return {"calls": {}, "cells": {}}
    found = json.loads(path.read_text())
    if found["rehearsed"]:
        raise SystemExit(f"{path} is of a rehearsal, which measures nothing")
    return found


def page(found: dict[str, dict]) -> str:
    """The tables, from the files of the phases by name."""
    parts = [provenance(found)]
    heads = {
        "correct": "**Correct.**",
        "decode": "**Decoding.** Tokens per second in steady decoding, prompts of 256 tokens, 256 new ones, bf16.",
        "train": "**Training.** SDAR-1.7B's shape in bf16, one packed row per step.",
        "real": "**A real model.** SmolLM2-135M by the recipes of [real-model.md](real-model.md) in the sizes of "
        "`benchmarks/gpu/real.py`, bf16; answers 256 at a time, with a 95% interval of the accuracy.",
    }
    tables = {
        "correct": correctness,
        "decode": lambda cells: [decoding(cells), *profile(cells)],
        "train": training,
        "real": real_model,
    }
    for phase, head in heads.items():
        if cells := found[phase]["cells"]:  # else the list above has said it
            parts += [head, *tables[phase](cells)]
    return "\n\n".join(parts)


def provenance(found: dict[str, dict]) -> str:
    lines = []
    for phase, results in found.items():
        calls = results["calls"].values()
        told = {
            f"{c.get('device')}, driver {c.get('driver')}, torch {c['torch']}, transformers {c['transformers']}, "
            f"{c['date'][:10]}, revision {c.get('revision')}"
            for c in calls
        }
        lines.append(f"- `{phase}`: {'; '.join(sorted(told)) or MISSING}")
    return "\n".join(lines)


def correctness(cells: dict) -> list[str]:
    def tokens(cell: dict) -> str:
        return f"{cell['equal']} of {cell['of']} equal" + (f" ({cell['first']})" if "first" in cell else "")

    def bf16(cell: dict) -> str:
        rates = [f"{value['per_1000_tokens']:.2g}" for name, value in cell.items() if name.startswith("batch")]
        return " and ".join(rates)

    kinds, models = list(correct.ATTENTION), ("embedded", "0.2b")
    rows = [
        [f"{model}, {scenario}", *(said(cells, f"tokens {model} {scenario} {kind}", tokens) for kind in kinds)]
        for model in models
        for scenario in correct.SCENARIOS
    ]
    training = [
        [
            name,
            said(cells, f"training {name}", lambda c: f"{c['loss']:.1e}"),
            value(cells, f"training {name}", "gradient", ".1e"),
            f"{limit:g}",
        ]
        for name, (_, limit) in correct.TRAINING.items()
    ]
    changes = [[model, *(said(cells, f"bf16 {model} {kind}", bf16) for kind in kinds)] for model in models]
    return [
        table(["answers in float32 beside the CPU's", *kinds], rows),
        table(["training beside the CPU's: relative difference of", "losses", "gradients", "limit"], training),
        table(["bf16: changed tokens per 1,000, in batches of 8 and 32 instead of 1", *kinds], changes),
    ]


def decoding(cells: dict) -> str:
    rows = []
    for shape in decode.SHAPES:
        for batch in decode.BATCHES:
            for steps in decode.STEPS:
                rows.append(decoding_row(cells, shape, batch, steps))
    head = "shape|batch|steps|autoregressive|plain|sdpa|flex|graphs|best / autoregressive|of memory|of matrix units"
    return table([*head.split("|"), "kernels per step", "host, ms per step"], rows)


def decoding_row(cells: dict, shape: str, batch: int, steps: int) -> list[str]:
    engine = {kind: decode.engine_cell(shape, batch, steps, kind) for kind in ("sdpa", "flex", "graphs")}
    autoregressive, rate = decode.autoregressive_cell(shape, batch), "tokens_per_second"
    plain = value(cells, decode.plain_cell(shape, steps), rate, ",.0f", MISSING) if batch == 1 else ""
    done = [name for name in engine.values() if rate in cells.get(name, ())]
    best = max(done, key=lambda name: cells[name][rate], default="")
    ratio = ""
    if best and rate in cells.get(autoregressive, ()):
        ratio = f"{cells[best][rate] / cells[autoregressive][rate]:.2f}"
    return [
        f"SDAR-{shape.upper()}",
        str(batch),
        str(steps),
        *(value(cells, name, rate, ",.0f", MISSING) for name in [autoregressive]),
        plain,
        *(value(cells, name, rate, ",.0f", MISSING) for name in engine.values()),
        ratio,
        value(cells, best, "memory_share", ".0%"),
        value(cells, best, "matrix_share", ".0%"),
        value(cells, best, "kernels", ",.0f"),
        value(cells, best, "host_ms", ".2f"),
    ]


def profile(cells: dict) -> list[str]:
    """The kernels of the cell that is furthest from what the machine gives."""
    traced = {name: cell for name, cell in cells.items() if cell.get("longest")}
    if not traced:
        return [f"Kernels of the slowest: {MISSING}."]
    worst = min(traced, key=lambda name: max(traced[name]["memory_share"], traced[name]["matrix_share"]))
    rows = [[f"`{name}`", f"{count:.0f}", f"{ms:.3f}"] for name, count, ms in traced[worst]["longest"]]
    return [f"The cell furthest from its bound, {worst}:", table(["kernel", "per step", "ms per step"], rows)]


def training(cells: dict) -> list[str]:
    rows = [
        [
            name,
            value(cells, name, "tokens_per_second", ",.0f", MISSING),
            value(cells, name, "mfu", ".0%"),
            value(cells, name, "step_seconds", ".2f"),
            value(cells, name, "peak_gb", ".1f"),
            value(cells, name, "plan_gb", ".1f"),
        ]
        for name in train.CASES
    ]
    return [table(["row", "tokens/s", "MFU", "seconds per step", "peak, GB", "`t3d plan`, GB"], rows)]


def real_model(cells: dict) -> list[str]:
    source = said(cells, "convert", lambda cell: f"from {cell['source']}")
    answers = said(
        cells,
        "rollout",
        lambda c: f"{c['answers']:,} answers, {c['correct']:.1%} correct, {c['rollout_seconds']:.0f} s",
    )
    made = [
        [
            name,
            value(cells, name, "steps", ",d", MISSING),
            value(cells, name, "train_seconds", ".0f"),
            value(cells, name, "tokens_per_second", ",.0f"),
            said(cells, name, lambda cell: "{:.3g} to {:.3g}".format(*cell["loss"])),
            value(cells, name, "memory_gb", ".1f"),
        ]
        for name in real.MODELS
    ]
    rows = [
        [model, str(steps), *judged(cells, "word_problems", model, steps), *judged(cells, "gsm8k", model, steps)]
        for model in real.MODELS
        for steps in real.STEPS
    ]
    head = ["model", "steps per block"]
    for task in ("word problems", "GSM8K"):
        head += [f"{task}, %", "n", "TPF", "tokens/s"]
    quality = said(cells, "text", text_quality.table)
    return [
        f"The model: {source}. Rollout: {answers}.",
        table(["trained", "steps", "seconds", "tokens/s", "loss", "peak, GB"], made),
        table(head, rows),
        quality if "rows" in cells.get("text", ()) else f"Text quality: {quality}.",
    ]


def judged(cells: dict, task: str, model: str, steps: int) -> list[str]:
    """Accuracy with its interval, n, TPF and tokens per second."""
    name = f"{task} {model}"
    row = cells.get(name, {}).get(f"{steps} steps")
    if row is None:
        return [said(cells, name, str), "", "", ""]
    accuracy, interval = percent(row["accuracy"]), " to ".join(map(percent, row["ci95"]))
    return [f"{accuracy} ({interval})", str(row["num_verified"]), f"{row['tpf']:.2f}", f"{row['tps']:,.0f}"]


def said(cells: dict, name: str, text) -> str:
    cell = cells.get(name)
    if cell is None:
        return MISSING
    return f"failed: {cell['error'][:80]}".replace("|", "/") if "error" in cell else text(cell)


def value(cells: dict, name: str, key: str, form: str, missing: str = "") -> str:
    """A number of a cell; `missing` if there is none."""
    if "error" in cells.get(name, ()):
        return said(cells, name, str) if missing else ""
    found = cells.get(name, {}).get(key)
    return missing if found is None else format(found, form)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where run.py wrote its files")
    parser.add_argument("--page", type=Path, default=HERE.parents[1] / "docs" / "performance.md")
    options = parser.parse_args()
    text = options.page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{options.page} has no markers {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    tables = page({phase: read(options.folder, phase) for phase in PHASES})
    options.page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
