"""What README and docs/results/comparison.md say of the figures in sentences: each as it stands there, and
what must hold of the figures for it to be true.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qemu_shim.study.compare.schema import Comparison, DesignFigures
from tests.tidy.source import ROOT

PAGE = ROOT / "docs" / "results" / "comparison.md"
README = ROOT / "README.md"
MOVED_BY_KVM = ("migration", "hotplug-storm")  # dirty logging, a slot's removal
FROM_THE_START = ("boot-touch", "device-first", "ring-and-buffers", "dmatest")
BEGINS_WITH_THE_DEVICE = ("mirror", "notifier", "managed")


class Read:
    """A comparison as its readers ask it."""

    def __init__(self, comparison: Comparison) -> None:
        self.workloads = {it.workload: it for it in comparison.workloads}

    def at(self, workload: str) -> dict[str, DesignFigures]:
        return {it.design: it for it in self.workloads[workload].designs}

    def io(self, workload: str) -> dict[str, int]:
        return {name: it.faults.io for name, it in self.at(workload).items() if it.series.step}

    def first(self, workload: str) -> list[str]:
        return self.workloads[workload].order[0]

    def last(self, workload: str) -> list[str]:
        return self.workloads[workload].order[-1]


class Claim(NamedTuple):
    sentence: str
    holds: Callable[[Read], bool]
    where: tuple[Path, ...]


CLAIMS: list[Claim] = []


def claim(sentence: str, *where: Path) -> Callable[[Callable[[Read], bool]], Callable[[Read], bool]]:
    """`where` it stands: the page, if nothing is said."""

    def said(holds: Callable[[Read], bool]) -> Callable[[Read], bool]:
        CLAIMS.append(Claim(sentence, holds, where or (PAGE,)))
        return holds

    return said


# -- what saves IO page faults -----------------------------------------------------------------------------


@claim(
    "a note of KVM's (`notifier`) and a second root of KVM's (`managed`) save every IO page fault that the"
    " one table saves, in every workload but one"
)
@claim("with the device there from the start, a note of KVM's or a second root saves the same faults", README)
def only_late_attach_costs_the_others_more(read: Read) -> bool:
    more = [
        name
        for name in read.workloads
        if max(read.io(name)[it] for it in ("notifier", "managed")) > read.io(name)["shared"]
    ]
    return more == ["late-attach"]


@claim(
    "only the one table has what was touched before, and a table that begins with the device costs an IO page"
    " fault a page"
)
@claim(
    "Sharing KVM's table saves the IO page fault of each page that the CPU touched before the device came",
    README,
)
def late_attach_costs_a_fault_a_page(read: Read) -> bool:
    late, pages = read.io("late-attach"), read.workloads["late-attach"].params["pages"]
    return late["shared"] == 1 and {late[it] for it in BEGINS_WITH_THE_DEVICE} == {pages + 1}


# -- pinned ------------------------------------------------------------------------------------------------


@claim("Nothing ever faults, and any device will do")
def pinned_never_faults(read: Read) -> bool:
    return all(read.io(name).get("pinned", 0) == 0 for name in read.workloads)


@claim("it leads where most of that is used (`ring-and-buffers`, `hotplug-storm`)")
def pinned_leads_where_memory_is_used(read: Read) -> bool:
    return all(read.first(name) == ["pinned"] for name in ("ring-and-buffers", "hotplug-storm"))


@claim("is last where little is (`boot-touch`, `device-first`, `late-attach`, `dmatest`)")
def pinned_is_last_where_little_is(read: Read) -> bool:
    of_little = ("boot-touch", "device-first", "late-attach", "dmatest")
    return all(read.last(name) == ["pinned"] for name in of_little)


@claim("It refuses whatever takes memory away: ballooning, collapsing, more memory than the host has")
def pinned_refuses(read: Read) -> bool:
    refused = [name for name, it in read.workloads.items() if "pinned" in it.unranked]
    return refused == ["streaming", "balloon", "huge-pages", "overcommit"]


# -- mirror, notifier, managed -----------------------------------------------------------------------------


@claim("The device's first touch of each page faults, whatever the CPU did before")
def mirror_faults_on_each_page(read: Read) -> bool:
    """There the CPU uses every page as well, and has a table of its own too."""
    both_use_all = ("boot-touch", "device-first", "late-attach", "dmatest")
    return all(read.at(name)["mirror"].faults.cpu == read.io(name)["mirror"] for name in both_use_all)


@claim("in `balloon` it leads")
def mirror_leads_in_balloon(read: Read) -> bool:
    return read.first("balloon") == ["mirror"]


@claim("It is told of fewer changes than any other that does not pin, because it has less mapped")
def mirror_is_told_of_fewer_changes(read: Read) -> bool:
    return all(
        read.at(name)["mirror"].told.invalidation_waits < read.at(name)[it].told.invalidation_waits
        for name in ("streaming", "balloon", "overcommit")
        for it in ("notifier", "managed", "shared")
    )


@claim("That alone gives it the IO page faults of `managed` in every workload")
def notifier_faults_as_managed(read: Read) -> bool:
    return all(read.io(name)["notifier"] == read.io(name)["managed"] for name in read.workloads)


@claim("`managed`: with the device there from the start the IO page faults of `shared`")
def managed_faults_as_shared(read: Read) -> bool:
    return all(read.io(name)["managed"] == read.io(name)["shared"] for name in FROM_THE_START)


@claim("and none because of what KVM does to its own table: dirty logging, another slot's removal")
@claim("it costs a fault a page whenever KVM logs dirty pages or removes a slot", README)
@claim("It pays whenever KVM has business with its table")
def shared_faults_when_kvm_logs_or_removes(read: Read) -> bool:
    return all(read.io(name)["managed"] < read.io(name)["shared"] for name in MOVED_BY_KVM)


@claim("with a dirty log that names whatever the device may write, in every round")
def managed_reports_as_much_as_pinned(read: Read) -> bool:
    """Who pins reports the whole slot in each round."""
    of = read.at("migration")
    everything = of["pinned"].work.pages_reported
    return of["managed"].work.pages_reported == everything > of["managed"].work.pages_written


# -- shared ------------------------------------------------------------------------------------------------


@claim("`shared`: half the tables")
@claim("and half the tables", README)
def half_the_tables(read: Read) -> bool:
    return all(
        2 * read.at(name)["shared"].tables.bytes_max == read.at(name)["managed"].tables.bytes_max
        for name in read.workloads
    )


@claim("one fault a page whoever comes first and whenever the device came")
def one_fault_a_page(read: Read) -> bool:
    """Of CPU and device together as many as the mirror's device has alone, which asks for every page."""
    both_use_all = ("boot-touch", "device-first", "late-attach", "dmatest")
    return all(
        read.at(name)["shared"].faults.cpu + read.io(name)["shared"] == read.io(name)["mirror"]
        for name in both_use_all
    )


@claim("here alone a log of what the device wrote that names nothing else")
def the_exact_log(read: Read) -> bool:
    of = read.at("migration").items()
    exact = [name for name, it in of if it.work.pages_reported == it.work.pages_written]
    return exact == ["shared"] and not any(it.work.pages_missed for _, it in of)


@claim("a page written in a round of logging costs a fault again, the CPU's too")
def logging_costs_both_sides_faults(read: Read) -> bool:
    shared, managed = (read.at("migration")[name].faults for name in ("shared", "managed"))
    return shared.cpu > managed.cpu and shared.io > managed.io


@claim("the removal of any slot costs one for each page still in use")
def removal_costs_a_fault_a_page(read: Read) -> bool:
    params = read.workloads["hotplug-storm"].params
    of = read.at("hotplug-storm")
    more = sum(
        getattr(of["shared"].faults, side) - getattr(of["managed"].faults, side) for side in ("cpu", "io")
    )
    return more == 0 and read.io("hotplug-storm")["shared"] > params["kept"] * params["rounds"] // 2
