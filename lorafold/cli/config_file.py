"""`--config FILE.yaml`: options from a file, overridden by those on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lorafold.config import option_names
from lorafold.errors import ConfigError, bullet_list, nearest


def expand_config(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the options in the file that the command line does not give itself.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or has keys that are no options.
    """
    arguments, path = _take_config(arguments)
    if path is None:
        return arguments
    given = given_options(arguments)
    has_model = len(arguments) > 1 and not arguments[1].startswith("-")
    options: list[str] = []
    for key, value in _read(path).items():
        if key in given or value is None or (key == "model" and has_model):
            continue
        options += _as_options(key, value)
    return arguments + options


def with_adapter(arguments: list[str]) -> list[str]:
    """Of a run that begins from an adapter, method and rank as the adapter has them, where they are not given."""
    at = next((i for i, a in enumerate(arguments) if a.partition("=")[0] == "--from-adapter"), None)
    if at is None or arguments[0] != "train":
        return arguments
    _, equals, value = arguments[at].partition("=")
    value = value if equals else "".join(arguments[at + 1 : at + 2])
    from lorafold.runs.from_adapter import stated_options

    given = given_options(arguments)
    return arguments + [f"--{key}={said}" for key, said in stated_options(Path(value)).items() if key not in given]


def given_options(arguments: list[str]) -> set[str]:
    """Names of the options on a command line."""
    return {_key(a) for a in arguments if a.startswith("--")}


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    given = [a for a in arguments if a.partition("=")[0] == "--config"]
    if given and arguments[0] != "train":
        raise ConfigError("--config holds the options of a run: lorafold train takes it, the other commands do not")
    if len(given) > 1:
        raise ConfigError("--config is given twice; put all options into one file")
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:i] + arguments[i + 1 :], Path(argument.partition("=")[2])
        if argument == "--config":
            if i + 1 == len(arguments):
                raise ConfigError("--config needs the path of a YAML file")
            return arguments[:i] + arguments[i + 2 :], Path(arguments[i + 1])
    return arguments, None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must map option names to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = [f"unknown key {key!r}{nearest(key, option_names())}" for key in values if key not in option_names()]
    if values.get("target_modules") == []:
        unknown.append("target_modules is empty; all-linear adapts every linear layer but the head")
    if unknown:
        raise ConfigError(f"{path}:\n" + bullet_list(unknown))
    return values


def _as_options(key: str, value: Any) -> list[str]:
    option = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else "--no-" + option[2:]]
    if isinstance(value, list):
        return [f"{option}={item}" for item in value]
    if isinstance(value, dict):
        return [f"{option}={json.dumps(value)}"]
    return [f"{option}={value}"]


def _key(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
