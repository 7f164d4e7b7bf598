"""The templates' words, and what every template must do."""

from __future__ import annotations

import pytest

from lorafold.data import templates
from lorafold.data.templates import TEMPLATES, check_template, render_prompt
from lorafold.errors import ConfigError

# from train.py of github.com/tatsu-lab/stanford_alpaca
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def test_alpaca_is_stanfords_text_and_a_line_break() -> None:
    values = {"instruction": "Sort {{ these }} <b>&", "input": "b, a\n"}
    assert render_prompt("alpaca", **values) == ALPACA_WITH_INPUT.format(**values) + "\n"
    assert render_prompt("alpaca", values["instruction"]) == ALPACA_WITHOUT_INPUT.format(**values) + "\n"


def test_plain_separates_and_raw_does_not() -> None:
    assert render_prompt("plain", "Do") == "Do\n"
    assert render_prompt("plain", "Do: ") == "Do: "
    assert render_prompt("plain", "Do\n") == "Do\n"
    assert render_prompt("plain", "Do", "this", "kindly") == "kindly\n\nDo\n\nthis\n"
    assert render_prompt("plain", "") == "\n"
    assert render_prompt("raw", "Do") == "Do"
    assert render_prompt("raw", "Do", "this", "kindly") == "kindly\n\nDo\n\nthis"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_shows_everything_it_is_given_once_and_in_order(name: str) -> None:
    text = render_prompt(name, "<instruction>", "<input>", "<system>")
    assert [text.count(part) for part in ("<system>", "<instruction>", "<input>")] == [1, 1, 1]
    assert text.index("<system>") < text.index("<instruction>") < text.index("<input>")


def test_all_files_of_the_folder_are_templates() -> None:
    assert {"alpaca", "plain", "raw"} <= set(TEMPLATES) == {path.stem for path in templates.FOLDER.iterdir()}


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no template 'alpacca' \(did you mean 'alpaca'\?\); there are: auto, chat,"):
        check_template("alpacca")


@pytest.mark.parametrize("source", ["{{ unknown }}", "{% if %}", "{{ ''.__class__.__mro__ }}"])
def test_template_that_cannot_be_rendered_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(TEMPLATES, f"broken {source}", tmp_path / "broken.jinja")
    (tmp_path / "broken.jinja").write_text(source)
    with pytest.raises(ConfigError, match=r"broken\.jinja: the template cannot be rendered"):
        render_prompt(f"broken {source}", "x")
