"""What carries named adapters, whatever these sit on."""

from __future__ import annotations

from torch import nn


class Holder(nn.Module):
    """Named adapters, and which of them take part.

    Attributes:
        adapters: by name.
        wanted: names of those that take part on the whole model, in the order in which they were made active. Not all
            of them need be here: a switch writes one value, and looks up nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.wanted: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters here that take part."""
        held = self.adapters._modules
        return tuple([name for name in self.wanted if name in held])
