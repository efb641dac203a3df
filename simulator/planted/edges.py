"""Mistakes where programs meet a kernel, a client or a user: fds, names, hang-ups, what is said at the end;
and two of pages that several areas show.

Most were our own once.  No story of the simulator comes to these places: tests find them.
"""

from __future__ import annotations

from simulator.planted.plant import Edit, Plant

EDGES = (
    # -- fds and names -----------------------------------------------------------------------------------
    Plant(
        "a-link-that-is-gone-stays",
        "What was made of a link knows itself in circles, and its fds and memory outlive it.",
        "R28",
        [Edit("iommufdd.service.objects:IommufddApp._forget_former", "gc.collect()", "pass")],
        races=["R28"],
        simulated=False,
    ),
    Plant(
        "the-loop-of-a-host-stays",
        "A VMM that ends in an error keeps the epoll set and the eventfd of its loop.",
        "R13",
        [Edit("qemu_shim.vmm.machine:connect_host", "loop.close()", "pass")],
        races=["R13"],
        simulated=False,
    ),
    Plant(
        "R13-a-listener-leaves-its-name",
        "A door that cannot be watched leaves its name, which says that somebody serves there.",
        "R13",
        [
            Edit(
                "protocol.rpc.socket:Listener.__init__",
                "        undo.callback(self._kernel.unlisten, path)\n",
                "",
            )
        ],
        races=["R13"],
        simulated=False,
    ),
    Plant(
        "a-name-keeps-from-stopping",
        "A socket's name that cannot be taken away ends the stop of a daemon half way.",
        "I31",
        [Edit("protocol.kernel.linux:Linux.unlisten", "with suppress(OSError):", "if True:")],
        simulated=False,
    ),
    Plant(
        "the-number-of-a-file-that-is-gone",
        "The number of a file whose daemon hung up, another file's by now, is passed on.",
        "I14",
        [Edit("qemu_shim.vmm.file:File.dup", "if self.closed:", "if False:")],
        simulated=False,
    ),
    Plant(
        "fds-of-a-cut-message-stay",
        "Of a message with more fds than there was room for those that came are not closed.",
        "I14",
        [Edit("vfio_user.connection:ClientConnection._receive", "self._fds.close(fd)", "pass")],
        simulated=False,
    ),
    # -- who is to hear of it ----------------------------------------------------------------------------
    Plant(
        "turned-away-and-not-told",
        "A client that is turned away hears of it when a thread has closed its socket, and not at once.",
        "I31",
        [
            Edit(
                "vfio_user.connection:FunctionDoor.open",
                "_hang_up(self._loop, sock)",
                "self._loop.kernel.close_received(sock.detach())",
            )
        ],
        simulated=False,
    ),
    Plant(
        "the-spare-place-is-anybody-s",
        "The spare place of a full fd table is free while a peer is hung up on there: the next fd takes it.",
        "I31",
        [
            Edit(
                "protocol.rpc.socket:Listener._turns_away",
                "self._is_free = self._kernel.replace_received(self._spare, self._nothing)",
                "self._kernel.close_received(self._spare)\n    self._spare = None",
            )
        ],
        simulated=False,
    ),
    Plant(
        "an-errno-alone",
        "What the kernel refuses reaches a user as an errno, and nobody says what was asked or what to do.",
        "I31",
        [
            Edit(
                "protocol.kernel.asked:told",
                'f"{what}: {why}", {**TO_DO, **instead}.get(number)',
                "why, None",
            )
        ],
        simulated=False,
    ),
    Plant(
        "a-full-disk-is-a-traceback",
        "No room behind standard output ends in a traceback and not in a sentence.",
        "I31",
        [Edit("qemu_shim.cli:main", "except OSError as error:", "except ZeroDivisionError as error:")],
        simulated=False,
    ),
    Plant(
        "a-lost-device-goes-on",
        "A story that waits for the next copy to succeed goes on with a device that is lost.",
        "I31",
        [
            Edit(
                "qemu_shim.scenarios.series.unmap:_copy_all_the_time",
                'raise DmaFailed(f"copy of page {page} with the slot in place", record)',
                "pass",
            )
        ],
        simulated=False,
    ),
    # -- pages that several show --------------------------------------------------------------------------
    Plant(
        "pages-of-a-whole-huge-page",
        "Of a huge page all is mapped that an area has room for, what was pinned in other frames too.",
        "I28",
        [
            Edit(
                "iommufdd.core.pages:Pages.show",
                "[page.part(start, at) for page in found.pages]",
                "list(found.pages)",
            )
        ],
        simulated=False,  # no story has a copy of half of what becomes a huge page later
    ),
    Plant(
        "R28-shown-while-the-host-goes",
        "Pages of a KVM that went are mapped anew from a table that is not empty yet.",
        "R28",
        [Edit("iommufdd.core.source:Source.is_there", "and not self.host.is_gone", "and True")],
        races=["R28"],
        simulated=False,  # no story has a copy, or an HWPT, that comes while devices are taken off
    ),
)
