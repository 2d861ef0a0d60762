"""A config tree with all features of a real one: protocols, optional groups, dicts, tuples of dataclasses, unions."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

from jaxtrain.errors import UserError


class OptimizerConfig(Protocol):
    learning_rate: float

    def build(self, axes: object) -> object: ...


class SourceConfig(Protocol):
    max_samples: int | None

    def resolve(self) -> object: ...


@dataclasses.dataclass(kw_only=True)
class AdamW:
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)

    def build(self, axes: object) -> object:
        return axes

    def check(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate={self.learning_rate} has to be above 0")


@dataclasses.dataclass(kw_only=True)
class Muon:
    learning_rate: float = 0.02
    momentum: float = 0.95
    fallback: AdamW = dataclasses.field(default_factory=AdamW)

    def build(self, axes: object) -> object:
        return axes


@dataclasses.dataclass(kw_only=True)
class MinScore:
    threshold: int = 3

    def __call__(self, document: dict) -> dict | None:
        return document


@dataclasses.dataclass(kw_only=True)
class HuggingFace:
    name: str = "HuggingFaceFW/fineweb-edu"
    data_files: tuple[str, ...] = ()
    token: str | None = None
    max_samples: int | None = None
    transforms: tuple[Callable[[dict], dict | None], ...] = ()

    def resolve(self) -> object:
        return self


@dataclasses.dataclass(kw_only=True)
class Data:
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    num_lanes: int = 64
    mode: Literal["stream", "cache"] = "stream"
    prefetch: int | None = 2
    shuffle: bool = True
    holdout: float = 0.0


@dataclasses.dataclass(kw_only=True)
class Stage:
    name: str = "main"
    seq_len: int = 1024
    tokens: int | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Evaluate:
    every_steps: int = 500
    split: str = "held out"


@dataclasses.dataclass(kw_only=True)
class Config:
    seed: int = 0
    total_tokens: int | None = None
    init_from: str | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamW)
    data: Data = dataclasses.field(default_factory=Data)
    stages: tuple[Stage, ...] = (Stage(),)
    evaluate: Evaluate | None = None
    grid: tuple[tuple[int, ...], ...] = ()
    columns: tuple[str, ...] = ("text",)
    threshold: int | float | str = 1
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        for stage in self.stages:
            unknown = stage.weights.keys() - self.data.sources.keys()
            if unknown:
                raise UserError(f"stage {stage.name} weighs {sorted(unknown)}, which is no source")


def example_config() -> Config:
    web = HuggingFace(transforms=(MinScore(),))
    return Config(
        optimizer=Muon(),
        data=Data(sources={"web": web, "my.books": HuggingFace(name="books")}),
        stages=(Stage(name="short", weights={"web": 1}), Stage(name="long", seq_len=4096, tokens=10**9)),
    )
