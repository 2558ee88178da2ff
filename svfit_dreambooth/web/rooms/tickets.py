"""An order that is painted or waits for its turn."""

import threading
from collections.abc import Callable
from typing import Any

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.web.rooms.orders import AS_TRAINED, Cell, Order, Told, check


class Ticket:
    """An order that is painted or waits.  As an event it says whether there is nothing to wait for any more."""

    def __init__(self, order: Order, tell: Callable[[Told], None], cancelled: threading.Event, person: str):
        """Reads the adapters.  Raises SVFitError for an order that cannot be painted, whoever paints."""
        from svfit_dreambooth.adapter.file import read_adapter

        check(order)
        self.order, self.cancelled, self.person, self._tell = order, cancelled, person, tell
        self.adapters = [(path, read_adapter(path)) for path, _ in order.adapters]
        self.left = [(cell, i) for cell in order.cells for i in range(order.num_images)]
        self.total = len(self.left)
        self.alone = order.begin is not None or order.scheduler is not None  # it cannot share a batch
        self.base, self.typed = order.base, True
        if self.base == AS_TRAINED:
            self.base, self.typed = (self.adapters[0][1].base_model, False) if self.adapters else (DEFAULT_BASE, True)

    def is_set(self) -> bool:
        return self.cancelled.is_set() or not self.left

    def tell(self, kind: str, **more: Any) -> None:
        """Tells whoever ordered, of the picture that comes next."""
        cell = self.left[0][0] if self.left else Cell()
        self._tell(Told(kind, number=self.total - len(self.left), pictures=self.total, cell=cell, **more))

    def done(self, picture: Any) -> None:
        """The next picture is painted."""
        self.tell("picture", picture=picture)
        self.left.pop(0)
