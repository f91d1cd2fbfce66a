"""One row per evaluated setting: made from its trajectories, shown as a table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields

from rich.console import Console
from rich.table import Table

from t3d.decoding.config import DecodingConfig
from t3d.evaluation.metrics import Speed, bootstrap, majority, pass_at_k, tokps, wilson
from t3d.trajectories.record import Trajectory

SECONDS, EXTRACTED, REASON = "decode_seconds", "extracted", "reason"  # keys of Trajectory.extra


@dataclass(frozen=True)
class EvalRow:
    """What one model did at one decode setting. Accuracies are fractions, None where nothing could be verified."""

    model: str
    objective: str | None
    block_size: int
    steps: int
    strategy: str
    knobs: dict  # what a strategy has instead of steps, e.g. {"threshold": .9, "floor": "one"}; empty without
    temperature: float
    seed: int
    num_problems: int
    num_verified: int  # those with a verdict; accuracy and its interval are over them
    samples: int
    accuracy: float | None  # mean over problems, and over a problem's samples
    ci95: tuple[float, float] | None  # Wilson; with several samples per problem: bootstrap over problems
    pass_at: dict[str, float]  # "1", "2", "4", ... up to `samples`; empty for one sample
    majority: float | None  # accuracy of the most frequent answer of each problem
    tokps: float | None  # nominal tokens per step; None for strategies with a knob
    tpf: float  # tokens per forward that predicts (denoises or verifies)
    tpf_all: float  # tokens per forward, prefill and commit included
    tps: float | None  # tokens per second of decoding
    nfe: float  # forwards per response, of all four kinds
    nfe_prefill: float
    nfe_denoise: float
    nfe_commit: float
    mean_length: float  # tokens per response, through the stop token
    truncated: float  # share of responses that did not stop by themselves
    wall_seconds: float  # decoding alone, over all attempts
    hardware: str = ""
    batch_size: int | None = None
    results: str = ""  # folder of the trajectories with verdicts, relative to the run
    extra: dict = field(default_factory=dict)
    nfe_verify: float = 0.0
    flight: str = ""  # what a forward computes where it is not one block after the other: "2 blocks", "look-ahead 1"
    flight_settings: dict = field(default_factory=dict)  # the settings of that
    other: dict = field(default_factory=dict)  # further settings that are not at their default, e.g. {"window": 2}

    def to_dict(self) -> dict:
        values = asdict(self)
        return values | {"ci95": list(self.ci95) if self.ci95 else None}


def summarise(
    trajectories: Iterable[Trajectory], config: DecodingConfig, model: str, blocks: int | None = None, **more
) -> EvalRow:
    """The row of one setting. `config` is resolved (block size and steps set); `more` goes into the row as they are.

    blocks: the model's own block size; another one is part of the setting's name.
    """
    knob = config.policy.speed()
    knobs = {knob.name: getattr(config, knob.name)} if knob else {}
    knobs |= {f.name: getattr(config, f.name) for f in fields(config.policy) if f.metadata["choices"]}
    knobs |= config.differing(f.name for f in fields(config.policy))
    own_blocks = blocks in (None, config.block_size)
    totals, seconds, truncated = Speed(), 0.0, 0
    problems: dict[str, list[tuple[bool | None, int | None]]] = {}  # (verdict, answer) of each sample
    for t in trajectories:
        totals.add(t)
        seconds += t.extra.get(SECONDS, 0.0)
        truncated += t.finish_reason == "length"
        answer = t.extra.get(EXTRACTED, t.text)  # may be a whole program: its hash tells it from others
        problems.setdefault(t.prompt_id, []).append((t.correct, None if answer is None else hash(answer)))
    count = max(1, totals.sequences)
    return EvalRow(
        model=model,
        objective=more.pop("objective", None),
        block_size=config.block_size,
        steps=config.steps,
        strategy=config.strategy,
        knobs=knobs,
        temperature=config.temperature,
        seed=config.seed,
        num_problems=len(problems),
        samples=max((len(group) for group in problems.values()), default=0),
        **_verdicts(problems),
        flight=config.flying.label,
        flight_settings={"flight": config.flight} | asdict(config.flying) if config.flying.label else {},
        other=config.differing(config.others()) | ({} if own_blocks else {"block_size": config.block_size}),
        tokps=None if knob or config.flying.label else tokps(config.block_size, config.steps),
        tpf=totals.tpf,
        tpf_all=totals.tpf_all,
        tps=totals.tokens / seconds if seconds > 0 else None,
        nfe=totals.nfe,
        nfe_prefill=totals.prefill / count,
        nfe_denoise=totals.denoise / count,
        nfe_commit=totals.commit / count,
        nfe_verify=totals.verify / count,
        mean_length=totals.tokens / count,
        truncated=truncated / count,
        wall_seconds=seconds,
        **more,
    )


def _verdicts(problems: dict[str, list[tuple[bool | None, int | None]]]) -> dict:
    """Accuracy and its relatives, over the problems that could be verified."""
    judged = [group for group in problems.values() if all(correct is not None for correct, _ in group)]
    if not judged:
        return {"num_verified": 0, "accuracy": None, "ci95": None, "pass_at": {}, "majority": None}
    right = [sum(correct for correct, _ in group) for group in judged]
    means = [r / len(group) for r, group in zip(right, judged, strict=True)]
    several = max(map(len, judged)) > 1
    ks = [2**i for i in range(min(map(len, judged)).bit_length())] if several else []

    def mean(values) -> float:
        return sum(values) / len(judged)

    return {
        "num_verified": len(judged),
        "accuracy": mean(means),
        "ci95": bootstrap(means) if several else wilson(sum(right), len(right)),
        "pass_at": {str(k): mean(pass_at_k(len(g), r, k) for r, g in zip(right, judged, strict=True)) for k in ks},
        "majority": mean(majority([a for _, a in g], [c for c, _ in g]) for g in judged) if several else None,
    }


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def setting(row: dict) -> str:
    """A row's decode setting in a few words: `2 steps`, `dynamic 0.9`."""
    more = [f"{name} {value}".replace("_", " ") for name, value in row.get("other", {}).items()]
    return ", ".join(part for part in (_policy(row), row.get("flight"), *more) if part)


def _policy(row: dict) -> str:
    steps = f"{row['steps']} step" + ("s" if row["steps"] != 1 else "")
    name = row["strategy"].removeprefix("low_confidence_")
    values = " ".join(f"{value:g}" for value in row.get("knobs", {}).values() if isinstance(value, float | int))
    if not values:
        return steps if name == "static" else f"{name} {steps}"
    return f"{name} {values}" + (f", {steps}" if row["knobs"].get("floor") == "schedule" else "")


def row_name(row: dict) -> str:
    """A row in a few words, unlike any other of the same evaluation: `student, 2 steps`."""
    sampled = f", T={row['temperature']:g}, seed {row['seed']}" if row["temperature"] else ""
    return f"{row['model']}, {setting(row)}{sampled}"


# title, justification, text of a row; both the terminal and the Markdown table are made of these
COLUMNS = (
    ("model", "left", lambda r: r["model"]),
    ("setting", "left", setting),
    ("accuracy %", "right", lambda r: percent(r["accuracy"])),
    ("95%", "left", lambda r: f"{percent(r['ci95'][0])}–{percent(r['ci95'][1])}" if r["ci95"] else "–"),
    ("TokPS", "right", lambda r: "–" if r["tokps"] is None else f"{r['tokps']:g}"),
    ("TPF", "right", lambda r: f"{r['tpf']:.2f}"),
    ("TPF all", "right", lambda r: f"{r['tpf_all']:.2f}"),
    ("TPS", "right", lambda r: "–" if r["tps"] is None else f"{r['tps']:.0f}"),
    ("NFE", "right", lambda r: f"{r['nfe']:.1f}"),
    ("length", "right", lambda r: f"{r['mean_length']:.1f}"),
    ("cut %", "right", lambda r: percent(r["truncated"])),
    ("n", "right", lambda r: str(r["num_problems"])),
    ("T", "right", lambda r: f"{r['temperature']:g}"),
    ("seed", "right", lambda r: str(r["seed"])),
    ("objective", "left", lambda r: r["objective"] or "–"),
)


ALWAYS = ("model", "setting", "accuracy %", "95%", "TPF")  # columns that the terminal never leaves out


def columns(rows: list[dict]) -> tuple:
    """`COLUMNS`, pass@k and majority where there are several samples, and every number in `extra` (text quality)."""
    ks = dict.fromkeys(k for row in rows for k in row["pass_at"])
    names = dict.fromkeys(
        name for row in rows for name, value in row["extra"].items() if isinstance(value, int | float)
    )
    more = [(f"pass@{k} %", "right", lambda r, k=k: percent(r["pass_at"].get(k))) for k in ks]
    more += [("majority %", "right", lambda r: percent(r["majority"]))] if ks else []

    def number(row: dict, name: str) -> str:
        return f"{row['extra'][name]:.4g}" if name in row["extra"] else "–"

    more += [(name.replace("_", " "), "right", lambda r, name=name: number(r, name)) for name in names]
    return (*COLUMNS, *more)


def print_table(rows: Iterable[EvalRow], console: Console) -> None:
    """Print the rows, in a narrow terminal without the columns that matter least; summary.json has them all.

    What only some evaluations have (pass@k, text quality) is a table of its own.
    """
    rows, skip = list(rows), []
    for name in (None, *(name for name, *_ in reversed(COLUMNS) if name not in ALWAYS)):
        skip.append(name)
        unbounded = console.options.update(width=10**6)
        main = table(rows, shown=[column for column in COLUMNS if column[0] not in skip])
        if console.measure(main, options=unbounded).maximum <= console.width:
            break
    console.print(main)
    more = columns([row.to_dict() for row in rows])[len(COLUMNS) :]
    if more:
        console.print(table(rows, shown=[*COLUMNS[:2], *more]))


def table(rows: Iterable[EvalRow], title: str | None = None, shown: Iterable[tuple] | None = None) -> Table:
    """The rows for the terminal, in the columns `shown` (default: all). What all rows share stands below."""
    values = [row.to_dict() for row in rows]
    shown = columns(values) if shown is None else list(shown)
    texts = {name: {text(row) for row in values} for name, _, text in shown}
    same = {name: found for name, found in texts.items() if len(found) == 1 and name not in ALWAYS}
    shown = [column for column in shown if column[0] not in same]
    caption = ", ".join(f"{name} {text}" for name, found in same.items() for text in found)
    grid = Table(title=title, title_justify="left", caption=caption, caption_justify="left", header_style="bold")
    for name, justify, _ in shown:
        grid.add_column(name, justify=justify, no_wrap=name in ALWAYS)
    previous = None
    for row in values:
        if previous not in (None, row["model"]):
            grid.add_section()
        previous = row["model"]
        grid.add_row(*(text(row) for _, _, text in shown))
    return grid
