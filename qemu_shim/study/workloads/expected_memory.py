"""What every page of a guest holds: written by CPU or device, looked at by either.

The bytes are the proof that both use the same memory whatever the design and the host did meanwhile.  A page
holds one word over and over.  Pages in a row that one call writes are written together, up to RUN of them by
one descriptor and with one word: as many as a device asks for in one page request group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qemu_shim.api import MIB, PAGE_SIZE, Context, Guest

RUN = 8
WORD_BYTES = 8
_BATCH = MIB // PAGE_SIZE  # pages of one message


class ExpectedMemory:
    """Of the pages that were written through it, or said to be zero.  Who reads something else has found a
    problem of the run.
    """

    def __init__(self, ctx: Context, guest: Guest) -> None:
        self.words: dict[int, int] = {}
        self._ctx = ctx
        self._guest = guest
        self._cpu_was_last = False

    def zeroed(self, gpas: Sequence[int]) -> None:
        """These read as zeroes now."""
        self.words.update(dict.fromkeys(gpas, 0))

    async def cpu_writes(self, gpas: Sequence[int]) -> None:
        for run in runs(gpas):
            self._choose(run)
        await self._after_the_cpu()
        self._cpu_was_last = True
        for at in range(0, len(gpas), _BATCH):
            some = gpas[at : at + _BATCH]
            await self._guest.cpus[0].access([(gpa, _page_of(self.words[gpa])) for gpa in some])

    async def device_writes(self, gpas: Sequence[int]) -> None:
        await self._after_the_cpu()
        for run in runs(gpas):
            self._choose(run)
            await self._guest.fill(run[0], len(run) * PAGE_SIZE, self.words[run[0]])

    async def cpu_reads(self, gpas: Sequence[int]) -> None:
        await self._after_the_cpu()
        self._cpu_was_last = True
        for at in range(0, len(gpas), _BATCH):
            some = gpas[at : at + _BATCH]
            found = await self._guest.cpus[0].access([(gpa, PAGE_SIZE) for gpa in some])
            for gpa, data in zip(some, found, strict=True):
                self._ctx.expect(
                    data == _page_of(self.words[gpa]),
                    f"the CPU does not read {self.words[gpa]:#x} at gpa {gpa:#x} but {data[:8].hex()}",
                )

    async def device_reads(self, gpas: Sequence[int]) -> None:
        """By comparing with what must be there."""
        await self._after_the_cpu()
        for run in runs(gpas, self.words):
            word = self.words[run[0]]
            equal = await self._guest.holds(run[0], len(run) * PAGE_SIZE, word)
            self._ctx.expect(equal, f"the device does not read {word:#x} at gpa {run[0]:#x}")

    async def _after_the_cpu(self) -> None:
        """What others are told of its faults has arrived, or counts would depend on who is faster."""
        if self._cpu_was_last:
            await self._ctx.quiet()
        self._cpu_was_last = False

    def _choose(self, run: Sequence[int]) -> None:
        self.words.update(dict.fromkeys(run, self._ctx.chance.getrandbits(8 * WORD_BYTES)))


def _page_of(word: int) -> bytes:
    return word.to_bytes(WORD_BYTES, "little") * (PAGE_SIZE // WORD_BYTES)


def runs(gpas: Sequence[int], words: dict[int, int] | None = None) -> Iterator[list[int]]:
    """Pages in a row, up to RUN of them; of one word, if `words` are given."""
    run: list[int] = []
    for gpa in gpas:
        follows = run and gpa == run[-1] + PAGE_SIZE and len(run) < RUN
        if follows and (words is None or words[gpa] == words[run[0]]):
            run.append(gpa)
            continue
        if run:
            yield run
        run = [gpa]
    if run:
        yield run
