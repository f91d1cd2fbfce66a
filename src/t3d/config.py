"""The recipe: one YAML file of typed sections, plus `section.key=value` overrides from the command line.

A section is a dataclass: the module that uses it defines it, or this file where several do. This file composes them and
checks every key and type.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter
from transformers import TrainingArguments

from t3d.components import check_values, setting
from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig
from t3d.distill.config import General
from t3d.errors import T3DError, nearest
from t3d.evaluation import EvalConfig
from t3d.models.quantize import check_kind
from t3d.report.config import ReportConfig
from t3d.tasks import TaskConfig
from t3d.typed import PYDANTIC, taken, type_name

LONGEST, DEEPEST = 100_000, 50  # characters of a recipe, and how deeply its values are nested


@dataclass(frozen=True)
class ModelConfig:
    """The teacher, which is also where the student starts."""

    path: str | None = setting(None, "checkpoint folder or hub id; default: the embedded teacher")
    dtype: str | None = setting(None, "float32, bfloat16 or float16; default: the checkpoint's own")
    device: str | None = setting(None, "cpu, cuda, ...; default: cuda if there is one")
    quantize: str | None = setting(
        None, "int8 or int4: evaluation and calibration decode with weights of so few bits, as models of their own"
    )
    architecture: dict[str, Any] | None = setting(
        None,
        "start from random weights: settings of the model's config.json (hidden_size, ...); the tokenizer is then "
        "that of `path`, or the embedded task's",
    )

    def __post_init__(self):
        check_kind(self.quantize)

    @property
    def loading(self) -> dict:
        """Arguments of `load_model`, for a model that is to decode."""
        return {"dtype": self.dtype, "device": self.device, "quantize": self.quantize}

    @property
    def suffix(self) -> str:
        """What the names of evaluated models end with: quantised ones are others."""
        return f"-{self.quantize}" if self.quantize else ""


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine does at once; see `t3d.Engine`. The answers do not depend on it."""

    max_batch_size: int = setting(64, "sequences decoded at once", low=1)
    kv_cache_tokens: int | None = setting(None, "most tokens that the cache holds; default: by memory_share", low=1)
    memory_share: float = setting(0.5, "share of the free memory that the cache may take", above=0, high=1)
    page_size: int | None = setting(None, "tokens to a page of the cache; default: chosen", low=1)
    prefill_tokens: int = setting(1024, "most prompt tokens in one forward", low=1)
    fused: bool = setting(True, "store a finished block in the next block's first forward, not in one of its own")
    attention: str = setting("sdpa", "sdpa (portable), or flex (FlexAttention, for GPUs)", choices=("sdpa", "flex"))
    cuda_graphs: bool | None = setting(None, "replay steady decoding, with flex; default: on a GPU")
    prefix_cache: bool = setting(False, "compute only once what texts of a call have in common at the beginning")
    workers: int = setting(0, "Ray actors that decode, one GPU or a share of the CPUs each; 0: this process", low=0)
    address: str | None = setting(None, "Ray cluster to join; default: RAY_ADDRESS, else one on this machine")

    def __post_init__(self):
        check_values(self)

    @property
    def local(self) -> dict:
        """Arguments of an `Engine` in this process."""
        return {name: value for name, value in vars(self).items() if name not in ("workers", "address")}


@dataclass(frozen=True)
class RolloutConfig(DecodingConfig):
    """How the teacher answers the training prompts: a `DecodingConfig`."""

    temperature: float = setting(0.1, "0 is greedy", low=0)
    seed: int | None = setting(None, "base seed of the sequences' own; default: the recipe's")
    retries: int = setting(0, "ask prompts that no answer solved again, this many times each", low=0)
    retry_temperature: float = setting(1.0, "temperature of those answers; greedy ones are alike", above=0)
    save_every: int = setting(512, "store answers when this many have ended, or after 30 seconds", low=1)
    quantized: bool = setting(False, "let the teacher answer with the weights of `model.quantize`")
    source: str | None = setting(None, "folder of trajectories to take instead of decoding, e.g. of `t3d import`")

    def decoding(self, seed: int) -> DecodingConfig:
        """The decoding settings alone; `seed` is the recipe's."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(DecodingConfig)}
        return DecodingConfig(**values | {"seed": seed if self.seed is None else self.seed})


@dataclass
class Recipe:
    """A checked recipe. `train` keeps only what differs from `TrainingArguments`' defaults, and all of our own."""

    seed: int = setting(0, "seed of everything random")
    run_dir: str | None = setting(None, "folder of the run; default: runs/NAME for a recipe NAME.yaml")
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def objective(self) -> str:
        return self.train["objective"]

    def to_dict(self) -> dict:
        """Plain values, as in YAML."""
        plain = TypeAdapter(dict, config=PYDANTIC).dump_python(dataclasses.asdict(self), mode="json")
        return json.loads(json.dumps(plain))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def training_arguments(self, output_dir: Path | str) -> T3DConfig:
        """`T3DConfig` of the `train` section, with what the program itself decides."""
        cpu = self.model.device == "cpu" or (self.model.device is None and not torch.accelerator.is_available())
        owned = {"output_dir": str(output_dir), "seed": self.seed, "use_cpu": cpu}
        try:
            return T3DConfig(**self.train | owned)
        except (ValueError, ImportError, TypeError) as error:
            raise T3DError(f"train: {' '.join(str(error).split())}") from error


SECTIONS = {
    "model": ModelConfig,
    "task": TaskConfig,
    "engine": EngineConfig,
    "rollout": RolloutConfig,
    "train": T3DConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
}
OWNED = {  # fields of TrainingArguments that are not the recipe's to set, and what to do instead
    "output_dir": "set run_dir; checkpoints go to RUN/train",
    "seed": "set the recipe's own `seed`",
    "use_cpu": "set model.device",
    "resume_from_checkpoint": "a run continues by itself; --force starts it again",
    "save_only_model": "a run must be able to continue",
    "do_train": "use `t3d train`",
    "do_eval": "use `t3d eval`",
    "do_predict": "use `t3d eval`",
    "eval_strategy": "set train.eval_every",
    "eval_on_start": "set train.eval_every",
    "load_best_model_at_end": "set train.eval_every; keep_best is on by default",
    "remove_unused_columns": "a batch is made of trajectories, not of columns",
}
MOVED = {  # keys of earlier versions, and how to say it now
    ("eval", "steps"): "the grid: eval.grid=[{steps: [4, 2]}]",
    ("eval", "strategy"): "the grid: eval.grid=[{strategy: [sequential, random]}]",
    ("eval", "threshold"): "the grid: eval.grid=[{strategy: low_confidence_dynamic, threshold: [.8, .9]}]",
    ("eval", "floor"): "the grid: eval.grid=[{strategy: low_confidence_dynamic, floor: schedule}]",
    ("eval", "entropy_bound"): "the grid: eval.grid=[{strategy: entropy_bounded_eb, entropy_bound: [.2, .4]}]",
    ("eval", "factor"): "the grid: eval.grid=[{strategy: factor, factor: [1, 2]}]",
    ("eval", "risk"): "the grid: eval.grid=[{strategy: adaptive, risk: [.1, .2]}]",
    ("eval", "block_size"): "the grid: eval.grid=[{block_size: 8, steps: [8, 4]}]",
}


@dataclass(frozen=True)
class Key:
    """One key of a section: what it may be and what it means."""

    section: str  # "" at the top level
    name: str
    type: Any
    default: Any  # plain, as in YAML
    help: str
    own: bool = True  # False: inherited from transformers' TrainingArguments
    before: Any = None  # what versions without this key did, plain
    owners: tuple[str, ...] = ()  # the components whose setting it is; empty: of all

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    def check(self, value, source: str):
        """`value` (as in YAML) as the key's type; raises T3DError with one line that names key, type and value."""
        return taken(value, self.type, f"{source}: {self.dotted}")


@cache
def keys(section: str = "") -> dict[str, Key]:
    """The keys of a section by name, the method's own before those inherited from TrainingArguments."""
    owner = SECTIONS[section] if section else Recipe
    hints = get_type_hints(owner)
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)} if section == "train" else set()
    found = []
    for f in dataclasses.fields(owner):
        if not f.init or (section == "train" and f.name in OWNED) or (not section and f.name in SECTIONS):
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        default = plain(None if default is dataclasses.MISSING else default)
        own = f.name not in inherited or f.name in General.__annotations__
        text = " ".join(str(f.metadata.get("help", "")).split())
        before = f.metadata.get("before", default)
        owners = tuple(owner.owners(f.name)) if hasattr(owner, "owners") else ()
        found.append(Key(section, f.name, hints[f.name], default, text, own, before, owners))
    return {key.name: key for key in sorted(found, key=lambda key: (key.name in inherited, not key.own))}


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in the YAML file `path` with `section.key=value` overrides, every key and type checked.

    Raises:
        T3DError: one line: a missing or malformed file, an unknown section or key, or a value of the wrong type.
    """
    parts = [(str(path), read_yaml(Path(path))), *((f"override {text!r}", _override(text)) for text in overrides)]
    given, sources = {}, {}  # dotted key -> its value as written, and where it was last set
    for source, part in parts:
        found = dict(_flat(part, source))
        for name, value in found.items():
            if isinstance(value, dict | list) and "${" not in str(value):  # OmegaConf merges no mapping into a list
                section, _, key = name.rpartition(".")
                keys(section)[key].check(value, source)
        given |= found
        sources |= dict.fromkeys(found, source)
    for name in (name for name, value in given.items() if value == "???"):
        raise T3DError(f"{path}: {name} is left open (???); add {name}=VALUE to the command")
    try:
        merged = OmegaConf.merge(_defaults(), *(part for _, part in parts))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise T3DError(f"{path}: {where}{str(error).splitlines()[0]}") from error

    def check(section: str, found: dict) -> dict:
        table = keys(section)
        return {
            name: table[name].check(value, sources.get(table[name].dotted, str(path))) for name, value in found.items()
        }

    built = check("", {name: value for name, value in values.items() if name not in SECTIONS})
    built["run_dir"] = built["run_dir"] or str(Path("runs") / Path(path).stem)
    for section, owner in SECTIONS.items():
        checked = check(section, values[section])
        try:
            built[section] = checked if section == "train" else owner(**checked)
        except T3DError as error:
            prefix = "" if str(error).startswith(f"{section}.") else f"{section}: "
            raise T3DError(f"{path}: {prefix}{error}") from error
    return Recipe(**built)


@cache
def _defaults() -> DictConfig:
    """All keys at their defaults; made once, since it takes longer than all else about a recipe."""
    found = {name: {k.name: k.default for k in keys(name).values() if k.own} for name in SECTIONS}
    return OmegaConf.create(found | {key.name: key.default for key in keys().values()})


def plain(value):
    """As YAML and JSON have it."""
    return TypeAdapter(Any).dump_python(value, mode="json")


def read_yaml(path: Path) -> dict:
    """A YAML file with a mapping at its top, interpolations as written; T3DError with one line if it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        _check_size(path, text)
        config = OmegaConf.create(text)
    except OSError as error:
        raise T3DError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise T3DError(f"{path} is not a recipe: not a text file") from error
    except yaml.YAMLError as error:
        raise T3DError(f"{path}{_yaml_message(error)}") from error
    except (ValueError, RecursionError) as error:  # a date that is none, sections without end
        raise T3DError(f"{path} is not a recipe: {str(error).splitlines()[0]}") from error
    except (OmegaConfBaseException, AssertionError) as error:  # it asserts that the text is a mapping or a list
        raise T3DError(f"{path} is not a recipe: {str(error) or 'expected sections of keys'}") from error
    if not isinstance(config, DictConfig) or not config:
        raise T3DError(f"{path} is not a recipe: expected sections of keys ({', '.join(SECTIONS)})")
    return _plain(config)


def _check_size(path: Path, text: str) -> None:
    """OmegaConf's parser is slow, and much slower for what is nested deeply: that is refused before it begins."""
    if len(text) > LONGEST:
        raise T3DError(f"{path} is not a recipe: it is longer than {LONGEST:,} characters")
    depth = 0
    with suppress(yaml.YAMLError):  # the other parser says what is wrong
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise T3DError(f"{path} is not a recipe: its values are nested more than {DEEPEST} deep")


def _override(text: str) -> dict:
    name, equals, _ = text.partition("=")
    if not equals or not name.strip():
        raise T3DError(f"cannot understand {text!r}: write overrides as section.key=value")
    try:
        return _plain(OmegaConf.from_dotlist([text]))
    except yaml.YAMLError as error:
        raise T3DError(f"override {text!r}{_yaml_message(error, line=False)}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise T3DError(f"override {text!r}: {str(error).splitlines()[0]}") from error


def _plain(config: DictConfig) -> dict:
    """As a dict, interpolations as written; a section with nothing in it (`rollout:`) is left out."""
    values = OmegaConf.to_container(config)
    return {name: value for name, value in values.items() if value is not None or name not in SECTIONS}


def _yaml_message(error: yaml.YAMLError, line: bool = True) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if line and mark else ""
    return f"{where}: not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"


def _flat(values: dict, source: str) -> Iterator[tuple[str, Any]]:
    """The dotted keys of `values` and their values, if every section and key is known."""
    for name, value in values.items():
        if name in keys():
            yield name, value
        elif name not in SECTIONS:
            dotted = [f"{s}.{name}" for s in SECTIONS if name in keys(s)]
            hint = f" (did you mean {dotted[0]!r}?)" if dotted else nearest(str(name), [*keys(), *SECTIONS])
            what = "section" if isinstance(value, dict) else "key"
            raise T3DError(f"{source}: unknown {what} {name!r}{hint}; sections are {', '.join(SECTIONS)}")
        elif not isinstance(value, dict):
            raise T3DError(f"{source}: {name} is a section: write its keys below it, or {name}.key=value")
        else:
            for key in value:
                if name == "train" and key in OWNED:
                    raise T3DError(f"{source}: train.{key} cannot be set here: {OWNED[key]}")
                if (name, key) in MOVED:
                    raise T3DError(f"{source}: {name}.{key} is now in {MOVED[name, key]}")
                if key not in keys(name):
                    hint = nearest(str(key), keys(name)).replace(" '", f" '{name}.")
                    raise T3DError(f"{source}: unknown key '{name}.{key}'{hint}; `t3d config` lists all")
                yield f"{name}.{key}", value[key]


def describe(everything: bool = False) -> str:
    """All keys as a commented recipe of the defaults; `everything`: also what `train` inherits from transformers."""
    lines = ["# section.key=value on the command line replaces a value of the recipe."]
    for section in ("", *SECTIONS):
        if section:
            about = "How to distil; `t3d config --all` adds what transformers' TrainingArguments has"
            text = about if section == "train" else SECTIONS[section].__doc__.splitlines()[0]
            lines += ["", f"# {text}", f"{section}:"]
        indent = "  " if section else ""
        for key in keys(section).values():
            if key.own or everything:
                mine = f"{', '.join(key.owners)}: " if key.owners else ""
                comment = f"{type_name(key.type)}: {mine}{key.help}"
                lines += textwrap.wrap(comment, 116, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
                value = yaml.safe_dump(key.default, default_flow_style=True, width=10**6).splitlines()[0]
                lines.append(f"{indent}{key.name}: {value}")
    return "\n".join(lines) + "\n"
