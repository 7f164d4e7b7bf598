"""A whole run: the groups of options together, as they stand in a run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lorafold.config.adapter import METHODS, AdapterSpec
from lorafold.config.checks import gather_faults, refuse
from lorafold.config.data import DataConfig
from lorafold.config.task import TaskConfig
from lorafold.config.training import TrainingConfig
from lorafold.errors import nearest


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what `config.yaml` in a run folder holds, flat.

    Attributes:
        model: `.gguf` file, transformers folder, hub id, or `smollm2`.
        output_dir: the run folder.
        data, adapter, training, task: the groups of options.
        from_adapter: folder of the adapter (or run) that training begins from, which says what the adapter is.
    """

    model: str
    output_dir: Path
    data: DataConfig
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    from_adapter: Path | None = None

    def resolved(self) -> RunConfig:
        """The same run with every default that depends on something else written out, and paths that hold anywhere."""
        data = replace(
            self.data,
            data=self.data.data.absolute(),
            eval_data=self.data.eval_data.absolute() if self.data.eval_data else None,
        )
        model = str(Path(self.model).absolute()) if Path(self.model).exists() else self.model
        scaled = "lora_alpha" in METHODS[self.adapter.method].options
        adapter = replace(self.adapter, lora_alpha=self.adapter.alpha) if scaled else self.adapter
        rate = self.training.learning_rate or self.adapter.default_learning_rate
        training = replace(self.training, learning_rate=rate)
        start = self.from_adapter.absolute() if self.from_adapter else None
        return replace(self, model=model, data=data, adapter=adapter, training=training, from_adapter=start)

    def to_dict(self) -> dict[str, Any]:
        """Flat mapping of plain values, ready for YAML."""
        flat: dict[str, Any] = {
            "model": self.model,
            "output_dir": str(self.output_dir),
            "from_adapter": self.from_adapter,
        }
        for group in (self.task, self.adapter, self.data, self.training):
            flat |= asdict(group)
        return {key: _plain(value) for key, value in flat.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown keys, each with the nearest known one, or values that are not allowed.
        """
        known = option_names()
        unknown = [f"unknown key {key!r}{nearest(key, known)}" for key in values if key not in known]
        refuse(unknown + [f"{key} is missing" for key in ("model", "output_dir", "data") if key not in values])
        values = {**values, "output_dir": Path(values["output_dir"]), "data": Path(values["data"])}
        for key in ("eval_data", "from_adapter"):
            if values.get(key):
                values[key] = Path(values[key])
        for key in (f.name for kind in _GROUPS.values() for f in fields(kind) if isinstance(f.default, tuple)):
            if key in values:
                values[key] = (values[key],) if isinstance(values[key], str | int) else tuple(values[key])
        with gather_faults():
            groups = {
                name: kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
                for name, kind in _GROUPS.items()
            }
        return cls(values["model"], values["output_dir"], **groups, from_adapter=values.get("from_adapter"))


_GROUPS: dict[str, Any] = {
    "task": TaskConfig,
    "adapter": AdapterSpec,
    "data": DataConfig,
    "training": TrainingConfig,
}


def option_names() -> list[str]:
    """Every key a configuration file may hold."""
    return ["model", "output_dir", "from_adapter", *(f.name for kind in _GROUPS.values() for f in fields(kind))]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
