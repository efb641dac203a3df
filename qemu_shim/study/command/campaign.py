"""`qemu-shim campaign`: run what is missing in the store, here or on a cluster, and sum up.

Exit status: 0 every point ran and no invariant was broken; 1 some did not, and which is said; 2 the command,
the plan or the store was wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qemu_shim.scenarios.files import is_file, path_of, scenario_of
from qemu_shim.scenarios.run import Run
from qemu_shim.study.campaign.cluster import ClusterFailed, run_on_cluster
from qemu_shim.study.campaign.code import code_version
from qemu_shim.study.campaign.plan import BadPlan, Plan, numbers, read_plan
from qemu_shim.study.campaign.point import Point
from qemu_shim.study.campaign.pool import all_cores, run_in_processes
from qemu_shim.study.campaign.progress import ProgressBar
from qemu_shim.study.campaign.runner import DaemonsRefused, Interrupted, check_options, until_interrupted
from qemu_shim.study.campaign.store import CAMPAIGN_FILE, Store, StoreRefused, planned
from qemu_shim.study.campaign.summary import as_text, summary
from qemu_shim.study.command.compare_options import param_dest
from qemu_shim.study.workloads.library import WORKLOADS
from qemu_shim.vmm.daemon_options import TRACED, given

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def campaign(options: argparse.Namespace) -> int:
    try:
        points = _asked(options)
        if options.dry_run:
            return _say(options, points)
        with Store(options.out, points, _code(options, points)) as store:
            return _campaign(options, store)
    except (BadPlan, StoreRefused, DaemonsRefused) as error:
        return _complain(WRONG, str(error))
    except OSError as error:
        return _complain(FAILED, str(error))


def _complain(status: int, why: str) -> int:
    print(f"qemu-shim: {why}", file=sys.stderr)
    return status


def _asked(options: argparse.Namespace) -> list[Point] | None:
    """None: nothing was said, so what the store was made for."""
    file = options.plan if options.plan is not None and is_file(options.plan) else None
    plan = Plan() if options.plan is None or file else _plan(options.plan)
    said: dict[str, Any] = {
        name: names for name in ("workloads", "designs") if (names := getattr(options, name))
    }
    if options.seeds is not None:
        said["seeds"] = numbers(options.seeds)
    params = dict(map(_param, options.params))
    if file:
        said["workloads"] = [file, *said.get("workloads", ())]
        texts = {name: getattr(options, param_dest(name)) for name in scenario_of(file).params}
        params |= {f"{file}.{name}": numbers(text) for name, text in texts.items() if text is not None}
    if params:
        said["params"] = {**plan.params, **params}
    if daemons := given(options):
        said["options"] = {**plan.options, **daemons}
    if options.plan is None and not said and (options.out / CAMPAIGN_FILE).exists():
        return None
    return replace(plan, **said).points()


def _plan(name: str) -> Plan:
    if name in WORKLOADS and not Path(name).exists():
        raise BadPlan(f"{name} is a workload, and there is no plan of that name: say --workloads {name}")
    return read_plan(Path(name))


def _code(options: argparse.Namespace, points: list[Point] | None) -> str:
    """The files of scenarios are code as well.  BadPlan: it is not on the workers of a cluster."""
    asked = planned(options.out) if points is None else points
    files = sorted({path_of(point.workload) for point in asked if is_file(point.workload)})
    if files and options.scheduler is not None:
        raise BadPlan(
            f"--scheduler: {files[0]} is not on the cluster's workers: run it here, or add it to the library"
        )
    return code_version(files)


def _param(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    return name, numbers(values)


def _say(options: argparse.Namespace, points: list[Point] | None) -> int:
    """What would be run now; nothing is made for it."""
    if (options.out / CAMPAIGN_FILE).exists():
        with Store(options.out, points, _code(options, points)) as store:
            points, total = store.missing(retry_failed=options.retry_failed), len(store.points)
    else:
        points = points or []
        total = len(points)
    if options.json:
        print(json.dumps({"points": total, "missing": [point.key for point in points]}))
        return OK
    for point in points:
        print(point.key)
    print(f"{len(points)} of {total} points would be run")
    return OK


def _campaign(options: argparse.Namespace, store: Store) -> int:
    missing = store.missing(retry_failed=options.retry_failed)
    where = f" --scheduler {options.scheduler}" if options.scheduler else ""
    resume = f"go on with: qemu-shim campaign --out {options.out}{where}"
    try:
        with ProgressBar(len(store.points) - len(missing), len(store.points)) as shown:

            def done(run: Run) -> None:
                store.add(run)
                shown(run)

            if missing:
                check_options(dict(missing[0].options))
                until_interrupted(_runner(options, missing, done))
    except Interrupted:
        left = len(store.missing())
        return _complain(INTERRUPTED, f"interrupted, {left} points are missing and nothing is left; {resume}")
    except (ClusterFailed, OSError) as error:
        return _complain(FAILED, f"{error}; {resume}")
    return _sum_up(options, [store.runs[point] for point in store.points])


def _runner(
    options: argparse.Namespace, points: Sequence[Point], done: Callable[[Run], None]
) -> Callable[[], Awaitable[None]]:
    if options.scheduler is not None:
        return lambda: run_on_cluster(points, options.scheduler, done)
    return lambda: run_in_processes(points, options.jobs or all_cores(), done)


def _sum_up(options: argparse.Namespace, runs: Sequence[Run]) -> int:
    document = summary(runs)
    print(json.dumps(document) if options.json else "\n".join(as_text(document)))
    for failed in document["failed"]:
        print(f"FAILED {failed['point']}: {'; '.join(failed['problems'])}", file=sys.stderr)
    if document["failed"]:
        alone = "qemu-shim compare WORKLOAD --designs DESIGN --seed N"
        print(f"to see more, play one alone, `{alone}`, with {TRACED}", file=sys.stderr)
    return FAILED if document["failed"] else OK
