"""Options for the settings of a decode, made of `DecodingConfig`'s fields: a new policy's settings are among them."""

import inspect
from dataclasses import asdict, fields
from math import inf
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer
from typer.core import TyperCommand

_KEY = "t3d.decoding"


def decoding_options(*without: str) -> type[TyperCommand]:
    """Class for `app.command(cls=...)` that adds an option for each setting, but for those named.

    They are made when the command is used, since they take an import of torch. `settings_of` gives what the user chose.
    A setting that has the name of one of the command's own options gets none; `--set` reaches it.
    """

    class Command(TyperCommand):
        _made = None

        def get_params(self, ctx) -> list:
            own = super().get_params(ctx)
            if self._made is None:
                self._made = _options({*without, *(p.name for p in own)})
            return own + [param for params in self._made.values() for param in params]

        def invoke(self, ctx):
            made = [param.name for params in self._made.values() for param in params]
            ctx.meta[_KEY] = {name: ctx.params.pop(name) for name in made}
            return super().invoke(ctx)

        def format_options(self, ctx, formatter) -> None:
            own = super().get_params(ctx)
            parts = {
                "Arguments": [p for p in own if p.param_type_name == "argument"],
                "Options": [p for p in own if p.param_type_name == "option"],
            }
            self.get_params(ctx)
            for title, params in (parts | self._made).items():
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
    settings |= {name: value for name, value in context.meta[_KEY].items() if value not in (None, [], ())}
    settings |= parse_settings(texts or ())
    for name, known in (("strategy", POLICIES), ("flight", FLIGHTS)):
        if name in settings:
            check_name(name, settings[name], known)
    return settings


def _options(without: set[str]) -> dict[str, list]:
    """Options by the title they have in the help: general ones, then those of each policy and flight."""
    from t3d.decoding.config import DecodingConfig

    hints, parameters, titles = get_type_hints(DecodingConfig), [], {}
    general = "Decoding (default: what the checkpoint recommends)"
    for f in fields(DecodingConfig):
        if f.name in without:
            continue
        kind = next((k for k in get_args(hints[f.name]) if k not in (type(None), ...)), hints[f.name])
        if tuple in (getattr(k, "__origin__", k) for k in (hints[f.name], kind)):  # may be given several times
            kind = list[next(k for k in (*get_args(kind), kind) if k in (int, str))]
        option = Annotated[kind | None, typer.Option(help=_help(f), show_default=False)]
        parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
        owners = DecodingConfig.owners(f.name)
        titles[f.name] = f"Decoding with {', '.join(owners)}" if owners else general

    def command(**_):
        pass

    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    group = typer.Typer(add_completion=False, rich_markup_mode=None)
    group.command()(command)
    made: dict[str, list] = {general: []}
    for param in typer.main.get_command(group).params:
        if param.name in titles:
            made.setdefault(titles[param.name], []).append(param)
    return made


def _help(f) -> str:
    """What the setting does, and what it may be."""
    text, about = f.metadata["help"], f.metadata
    low, high = about.get("low", -inf), about.get("high", inf)
    if about.get("choices"):
        return text if all(c in text for c in about["choices"]) else f"{text}: {' or '.join(about['choices'])}"
    if high < inf:
        return f"{text} ({low:g}..{high:g})"
    return f"{text} (at least {low:g})" if low > -inf else text
