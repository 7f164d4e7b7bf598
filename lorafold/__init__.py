"""LoraFold: fine-tune the quantized model that you deploy."""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # loaded when asked for, so that `import lorafold` stays light
    "AdapterSpec": "lorafold.config",
    "adapt": "lorafold.adapters.adapt",
    "merged": "lorafold.adapters.adapt",
    "unmerged": "lorafold.adapters.adapt",
    "unload": "lorafold.adapters.adapt",
    "adapter_names": "lorafold.adapters.adapted",
    "set_active": "lorafold.adapters.adapted",
    "delete_adapter": "lorafold.adapters.adapted",
    "adapters_by_row": "lorafold.adapters.rows",
    "load": "lorafold.models.load",
    "load_adapter": "lorafold.models.adapter_files",
    "save_adapter": "lorafold.models.adapter_files",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lorafold' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
