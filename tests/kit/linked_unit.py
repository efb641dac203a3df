"""A remapping unit and its driver, both of them the product's cores, over the same memory in one process."""

from __future__ import annotations

from collections.abc import Callable

from device_sim.core.dmar import RemappingUnit
from device_sim.core.physmem import PhysicalMemory
from device_sim.core.unit_registers import Events, RegisterPages
from iommufdd.core.counts import UnitCounts
from iommufdd.core.intel_iommu import QUEUE_BYTES, IntelIommu, UnitMemory
from iommufdd.core.translation_tables import TranslationTables
from iommufdd.core.unit_registers import UnitRegisters
from protocol.flow import Flows
from protocol.hostmem import Window, WindowKind
from protocol.hw.register_page import RegisterPage
from protocol.hw.vtd_regs import REGISTER_PAGE
from protocol.pt.mem import TableWriter
from protocol.units import GIB, PAGE_SIZE, Hpa

STRUCTURES_AT, QUEUES_AT = Hpa(1024 * GIB), Hpa(2048 * GIB)
PAGES = 64


class LinkedUnit:
    """Up when made; kicks and events that are due arrive in the order `pick` chooses."""

    def __init__(
        self,
        flows: Flows,
        unit: RemappingUnit,
        memory: PhysicalMemory,
        pick: Callable[[list[str]], str] = lambda due: due[0],
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.flows = flows
        self.unit = unit
        self.counts = UnitCounts()
        self.page_requests: list[tuple[bytes, bool]] = []
        self.faults: list[bytes] = []
        self.ended: list[int] = []  # functions whose bus mastering was taken from them
        self.due: dict[str, None] = {}  # kicks and events that did not arrive yet
        self._pick = pick
        structures, queues = bytearray(PAGES * PAGE_SIZE), bytearray(QUEUE_BYTES)
        for kind, base, backing in (
            (WindowKind.TABLES, STRUCTURES_AT, structures),
            (WindowKind.QUEUES, QUEUES_AT, queues),
        ):
            memory.add(Window(kind, base, len(backing), memoryview(backing)), lambda: None)
        shown, taken, stored = (RegisterPage(memoryview(bytearray(REGISTER_PAGE))) for _ in range(3))
        free = iter(range(STRUCTURES_AT + PAGE_SIZE, STRUCTURES_AT + len(structures), PAGE_SIZE))
        writer = TableWriter(STRUCTURES_AT, memoryview(structures))
        self.driver = IntelIommu(
            0,
            unit.cap,
            unit.ecap,
            UnitRegisters(shown, taken, stored, fence, self._raise("kick")),
            UnitMemory(
                TranslationTables(writer, lambda: Hpa(next(free))),
                STRUCTURES_AT,
                memoryview(structures)[:PAGE_SIZE],
                QUEUES_AT,
                memoryview(queues).toreadonly(),
            ),
            self.counts,
            lambda _, entries, overflow: self.page_requests.append((entries, overflow)),
            self.faults.extend,
            self._end_dma,
        )
        unit.connect(
            RegisterPages(shown, taken, stored),
            Events(self._raise("fault"), self._raise("page_request"), self._raise("completion")),
        )
        self._arrive = {
            "kick": unit.kick,
            "fault": self.driver.on_fault,
            "page_request": self.driver.on_page_request,
            "completion": self.driver.on_completion,
        }
        up = flows.start(self.driver.bring_up())
        self.settle()
        up.result()

    async def _end_dma(self, rid: int) -> None:
        self.ended.append(rid)

    def _raise(self, what: str) -> Callable[[], None]:
        return lambda: self.due.setdefault(what)

    def arrive(self) -> None:
        """One kick or event."""
        what = self._pick(list(self.due))
        del self.due[what]
        self._arrive[what]()

    def deliver(self) -> None:
        """All of them, and what they bring about in unit and driver; flows that became ready wait."""
        while self.due:
            self.arrive()

    def settle(self) -> None:
        """Until nothing is under way.  Not to be called by a flow."""
        while self.due:
            self.deliver()
            self.flows.run_ready()
