"""The command line: `lorafold COMMAND ...`.

Commands are loaded when they are called, so `lorafold --help` stays quick. A mistake of the user ends with one message
on standard error and exit code 2; Ctrl-C ends with 130.
Of the workers that torchrun has started the first speaks for all.
"""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError, Parameter

import lorafold
from lorafold.cli import adapters, demo, evaluate, export, fold, generate, preview, quantize, train, verify
from lorafold.cli.config_file import expand_config, given_options, with_adapter
from lorafold.config import gather_faults, workers_of
from lorafold.errors import LoraFoldError

app = App(
    name="lorafold",
    help="Fine-tune the quantized model that you deploy, and fold the result back into its own file, exactly.",
    version=lorafold.__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
)
app.command(train.train)
app.command(fold.fold)
app.command(verify.verify)
app.command(export.export)
app.command(generate.generate)
app.command(evaluate.evaluate, name="eval")
app.command(preview.preview)
app.command(quantize.quantize)
app.command(adapters.app)
app.command(demo.demo)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if arguments[:1] == ["--"]:  # torchrun takes `--r` for an option of its own unless this stands before it
        arguments = arguments[1:]
    try:
        with gather_faults():  # the groups of options are made one by one while the line is parsed
            line = expand_config(arguments)
            command, bound, ignored = app.parse_args(with_adapter(line), exit_on_error=False, print_error=False)
        told = {"given": given_options(line)} if "given" in ignored else {}
        result = command(*bound.args, **bound.kwargs, **told)
    except (LoraFoldError, CycloptsError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as in `lorafold preview ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a path longer than the system allows
        _complain(str(error))
        return 2
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    worker = workers_of(os.environ)
    if worker is None or worker.rank == 0:
        sys.stderr.write(f"lorafold: {text}\n")


def share_cores() -> None:
    """Let waiting threads sleep after a fifth of a millisecond, before OpenMP reads this as torch is loaded.

    GNU's OpenMP lets them spin some milliseconds, in which other programs cannot have the core: beside one that is
    busy, training took 1.7 times as long, two trainings side by side three times (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main() -> None:
    """Entry point of the `lorafold` command."""
    share_cores()
    sys.exit(run(sys.argv[1:]))
