"""What there is to ask for: the models with their defaults, the strategies and the flights with their settings."""

import time
from dataclasses import fields
from math import isfinite

from fastapi import FastAPI

from t3d.decoding.flight import FLIGHTS
from t3d.decoding.policy import POLICIES, Policy
from t3d.serve import replies
from t3d.serve.errors import ApiError
from t3d.serve.model import Served


def find(models: dict[str, Served], name: str | None) -> Served:
    """The model of that name, else the first. Raises ApiError."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(
            404,
            f"The model {name!a} does not exist; there is {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    return models[name]


def catalogue(app: FastAPI, models: dict[str, Served]) -> None:
    """Add the routes that list models, strategies and flights."""
    started = int(time.time())

    def card(served: Served) -> dict:
        d, own = served.default, served.model.config.window
        ours = {"context": served.worker.longest}
        ours |= {f.name: getattr(d, f.name) for f in fields(d) if f.name not in ("n", "seed", "max_tokens")}
        ours |= {"block_size": d.block_size or own, "steps": d.steps or d.block_size or own}
        return {"id": served.name, "object": "model", "created": started, "owned_by": "t3d", "t3d": ours}

    @app.get("/v1/models", response_model=replies.Cards)
    async def list_models():
        """The models served; `t3d` has their defaults."""
        return {"object": "list", "data": [card(served) for served in models.values()]}

    @app.get("/v1/models/{name:path}", response_model=replies.Card)
    async def one_model(name: str):
        return card(find(models, name))

    @app.get("/v1/strategies", response_model=replies.Strategies, response_model_exclude_unset=True)
    async def strategies():
        """Unmasking strategies, each with the setting that trades its speed for quality."""
        return {"object": "list", "data": [{"id": name, "knob": knob(p)} | about(p) for name, p in POLICIES.items()]}

    @app.get("/v1/flights", response_model=replies.Flights, response_model_exclude_unset=True)
    async def flights():
        """What a forward can compute: one block after the other, several in flight, look-ahead, self-speculation."""
        return {"object": "list", "data": [{"id": name} | about(flight) for name, flight in FLIGHTS.items()]}


def about(owner: type) -> dict:
    """What a policy or flight does, and its settings: of each its type, default, bounds and choices."""
    settings = []
    for f in fields(owner):
        one = {"name": f.name, "type": type(f.default).__name__, "default": f.default, "help": f.metadata["help"]}
        one |= {key: f.metadata[key] for key in ("low", "high") if isfinite(f.metadata[key])}
        settings.append(one | ({"choices": f.metadata["choices"]} if f.metadata["choices"] else {}))
    return {"description": owner.__doc__.split("\n")[0], "settings": settings}


def knob(policy: type[Policy]) -> dict | None:
    """The setting that trades speed for quality."""
    f = policy.speed()
    return f and {"name": f.name, "slow": f.metadata["slow"], "fast": f.metadata["fast"]}
