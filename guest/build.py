"""Our modules, out of Debian's headers with the machine's compiler.

The headers are where they were unpacked, not where Debian installs them: kbuild is started from its own
Makefile rather than from the one that names that place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from guest.failure import GuestError
from guest.kernel import DebianKernel, module_name

SOURCES: Final = Path(__file__).parent / "modules"
_COMPILER: Final = re.compile(r"^CC\s*=.*?([\w.-]*gcc[\w.-]*)\s*$", re.MULTILINE)


def compiler(kernel: DebianKernel) -> str:
    """The one the kernel was built with, if the machine has it, else its gcc."""
    match = _COMPILER.search((kernel.headers / ".kernelvariables").read_text())
    names = [match[1], "gcc"] if match else ["gcc"]
    for name in names:
        if shutil.which(name):
            return name
    raise GuestError(
        f"no {' and no '.join(names)}: the guest's modules are compiled here (apt-get install gcc)"
    )


def built(kernel: DebianKernel, sources: Path = SOURCES) -> Mapping[str, bytes]:
    """Each module by name, without debug information, which has paths of this machine in it."""
    cc = compiler(kernel)
    if not shutil.which("make"):
        raise GuestError("no make: the guest's modules are compiled here (apt-get install make)")
    with tempfile.TemporaryDirectory(prefix="guest-modules-") as room:
        work = Path(room) / "modules"
        shutil.copytree(sources, work)
        command = [
            *("make", "-C", str(kernel.headers), "-f", str(kernel.common_headers / "Makefile")),
            *(f"M={work}", f"CC={cc}", "KCFLAGS=-Werror -g0", "modules"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shown = "\n  ".join((done.stderr or done.stdout).splitlines()[-15:])
            raise GuestError(f"the guest's modules do not compile for {kernel.version} with {cc}:\n  {shown}")
        return {module_name(path.name): path.read_bytes() for path in sorted(work.glob("*.ko"))}
