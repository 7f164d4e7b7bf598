"""How a prompt is written where the model's chat template is not used: one .jinja file per template.

A template sees `instruction`, `input` and `system` (the last two may be empty) and writes everything up to the place
where the answer begins. To add one, put a file into the folder `templates`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafold.errors import ConfigError, nearest

FOLDER = Path(__file__).parent / "templates"
# name -> file
TEMPLATES: dict[str, Path] = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
CHAT = "chat"  # the tokenizer's own chat template
AUTO = "auto"


def render_prompt(name: str, instruction: str, input: str = "", system: str = "") -> str:
    """Text that asks for an answer, up to where the answer begins.

    Args:
        name: one of `TEMPLATES`.
        instruction: what is asked.
        input: what it applies to; may be empty.
        system: words to the model about its part; may be empty.

    Raises:
        ConfigError: the template does not exist, or cannot be rendered.
    """
    check_template(name)
    try:
        return _load(name).render(instruction=instruction, input=input, system=system)
    except TemplateError as error:
        raise ConfigError(f"{TEMPLATES[name]}: the template cannot be rendered: {error}") from error


def check_template(name: str) -> None:
    """Refuse a name that is no template.

    Raises:
        ConfigError: names the nearest known template and lists all.
    """
    known = [AUTO, CHAT, *TEMPLATES]
    if name not in known:
        raise ConfigError(f"there is no template {name!r}{nearest(name, known)}; there are: {', '.join(known)}")


@cache
def _load(name: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATES[name].read_text(encoding="utf-8"))
