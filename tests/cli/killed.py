"""Training runs that are killed: `python -m tests.cli.killed FOLDER ARGUMENTS...` writes FOLDER/0, FOLDER/1, ...

For each of `MOMENTS` a child is forked that runs `lorafold train ARGUMENTS` and is killed there with SIGKILL, so that
nothing is tidied up; the libraries are imported once for all of them.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from lorafold.cli.main import run
from lorafold.models import adapter_files
from lorafold.runs import folder, start
from lorafold.train import checkpoint

# what is there -> (owner of a function, its name, number of the call, whether the process dies before or after that
# call, steps of the checkpoints that are whole then), in runs of 6 steps with a checkpoint every 2, of which one is
# kept, and an evaluation after step 4
MOMENTS: dict[str, tuple[Any, str, int, str, list[int]]] = {
    "nothing was written": (start, "prepare", 1, "before", []),
    "no configuration": (folder, "write_text", 1, "before", []),
    "no step": (start, "train_steps", 1, "before", []),
    "step 1, no checkpoint": (folder.RunFolder, "metric", 2, "after", []),
    "adapter of the first checkpoint half-written": (adapter_files, "save_tensors", 1, "before", []),
    "step 3": (folder.RunFolder, "metric", 4, "after", [2]),
    "evaluated after step 4": (folder.RunFolder, "metric", 6, "after", [2]),
    "checkpoint 4 without its optimizer": (checkpoint, "save_tensors", 2, "before", [2]),
    "checkpoint 4 without its state": (checkpoint, "asdict", 2, "before", [2]),
    "checkpoint 4, and 2 is still there": (folder.RunFolder, "keep_checkpoints", 3, "before", [2, 4]),
    "checkpoint 4, and 2 half-deleted": (folder, "rmtree", 1, "before", [4]),
    "all steps": (folder.RunFolder, "metric", 8, "after", [4]),
    "all steps, last checkpoint written": (start, "save_checkpoint", 3, "after", [4, 6]),
    "adapter written": (start, "save_adapter", 1, "after", [6]),
    "no summary": (folder.RunFolder, "summary", 1, "before", [6]),
    "no report": (start, "write_report", 1, "before", [6]),
}


def arm(moment: str) -> None:
    """Let this process be killed at a moment."""
    owner, name, wanted, when, _ = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wanted and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def main(target: str, arguments: list[str]) -> int:
    """0 if each child was killed where it should be."""
    for number, moment in enumerate(MOMENTS):
        child = os.fork()
        if not child:
            arm(moment)
            os._exit(run(["train", *arguments, "--output-dir", f"{target}/{number}"]))
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            print(f"not killed: {moment}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
