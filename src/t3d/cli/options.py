"""Options made of the fields of dataclasses of settings: a new setting, also a new policy's, is an option by itself."""

import inspect
from dataclasses import Field, asdict, fields
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from t3d.errors import either

_DECODING, _CONFIG = "t3d.decoding", "t3d.config"
GENERAL = "Decoding (default: what the checkpoint recommends)"


def decoding_options(*without: str, config: str | None = None) -> type[TyperCommand]:
    """Class for `app.command(cls=...)` that adds an option for each setting of a decode, but for those named.

    They are made when the command is used, since they take an import of torch. `settings_of` gives what the user chose.
    A setting that has the name of one of the command's other options gets none; `--set` reaches it.

    config: a dataclass, as `module:name`, whose fields with a help text become options, too; see `config_of`.
    """

    class Command(TyperCommand):
        _config = _decoding = None  # by the title that they have in the help

        def get_params(self, ctx) -> list:
            own = super().get_params(ctx)
            if self._decoding is None:
                self._config = _config_options(config) if config else {}
                taken = {*without, *(p.name for p in own + _all(self._config))}
                self._decoding = _decoding_options(taken)
            return own + _all(self._config) + _all(self._decoding)

        def invoke(self, ctx):
            for key, made in ((_CONFIG, self._config), (_DECODING, self._decoding)):
                chosen = {param.name: ctx.params.pop(param.name) for param in _all(made)}
                ctx.meta[key] = {name: value for name, value in chosen.items() if value not in (None, [], ())}
            return super().invoke(ctx)

        def format_options(self, ctx, formatter) -> None:
            own = super().get_params(ctx)
            parts = {kind: [p for p in own if p.param_type_name == kind] for kind in ("argument", "option")}
            self.get_params(ctx)
            shown = {"Arguments": parts["argument"], "Options": parts["option"]} | self._config | self._decoding
            for title, params in shown.items():
                if lines := [line for p in params if (line := p.get_help_record(ctx))]:
                    with formatter.section(title):
                        formatter.write_dl(lines)

    return Command


def settings_of(context: typer.Context, file: Path | None, texts: list[str] | None) -> dict:
    """Fields of `DecodingConfig`: those of a `--decoding` file, then the options given, then `--set`.

    Raises T3DError for what can be seen to be wrong before a model is loaded.
    """
    from t3d.components import check_name
    from t3d.decoding import load_decoding, parse_settings
    from t3d.decoding.flight import FLIGHTS
    from t3d.decoding.policy import POLICIES

    settings = {} if file is None else asdict(load_decoding(file))
    settings |= context.meta[_DECODING] | parse_settings(texts or ())
    for name, known in (("strategy", POLICIES), ("flight", FLIGHTS)):
        if name in settings:
            check_name(name, settings[name], known)
    return settings


def config_of(context: typer.Context) -> dict:
    """Fields of the dataclass that `decoding_options` was told of."""
    return context.meta[_CONFIG]


def _config_options(config: str) -> dict[str, list]:
    module, _, name = config.partition(":")
    owner = getattr(import_module(module), name)
    chosen = [f for f in fields(owner) if "help" in f.metadata]
    return {"Server": list(_options(owner, chosen, {f.name: f.default or None for f in chosen}).values())}


def _decoding_options(taken: set[str]) -> dict[str, list]:
    """General ones, then those of each policy and flight."""
    from t3d.decoding.config import DecodingConfig

    chosen = [f for f in fields(DecodingConfig) if f.name not in taken]
    made: dict[str, list] = {GENERAL: []}
    for name, option in _options(DecodingConfig, chosen, {}).items():
        owners = DecodingConfig.owners(name)
        made.setdefault(f"Decoding with {', '.join(owners)}" if owners else GENERAL, []).append(option)
    return made


def _options(owner: type, chosen: list[Field], defaults: dict) -> dict[str, typer.core.TyperOption]:
    """An option for each of an owner's fields; one without a default says only what the user chose."""
    hints, parameters = get_type_hints(owner), []
    for f in chosen:
        kind = next((k for k in get_args(hints[f.name]) if k not in (type(None), ...)), hints[f.name])
        if tuple in (getattr(k, "__origin__", k) for k in (hints[f.name], kind)):  # may be given several times
            kind = list[next(k for k in (*get_args(kind), kind) if k in (int, str))]
        default = defaults.get(f.name)
        option = Annotated[kind | None, typer.Option(help=_help(f), show_default=default is not None)]
        parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option))

    def command(**_):
        pass

    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    group = typer.Typer(add_completion=False, rich_markup_mode=None)
    group.command()(command)
    names = {f.name for f in chosen}
    return {param.name: param for param in typer.main.get_command(group).params if param.name in names}


def _all(made: dict[str, list]) -> list:
    return [param for params in made.values() for param in params]


def _help(f: Field) -> str:
    """What the setting does, and what it may be."""
    text, about = f.metadata["help"], f.metadata
    low, high = about["low"], about["high"]
    if about["choices"]:
        return text if all(c in text for c in about["choices"]) else f"{text}: {either(about['choices'])}"
    if high < inf:
        return f"{text} ({max(low, about['above']):g}..{high:g})"
    return f"{text} (at least {low:g})" if low > -inf else text
