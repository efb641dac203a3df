"""The small stories: a device's access beside one thing that the host, the VMM or a vCPU does.

Each round ends with what must be true whatever came first (the bytes that are read are those of a state
there was) and leaves the memory as it found it, so that another may follow in the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.stories.areas import AREAS
from simulator.stories.at_once import AT_ONCE
from simulator.stories.contents import CONTENTS
from simulator.stories.devices import DEVICES
from simulator.stories.host import HOST
from simulator.stories.importers import IMPORTED
from simulator.stories.logs import LOGS
from simulator.stories.machines import MACHINES
from simulator.stories.mappings import MAPPINGS
from simulator.stories.medley import MEDLEY
from simulator.stories.neighbours import NEIGHBOURS
from simulator.stories.objects import OBJECTS
from simulator.stories.pins import PINS
from simulator.stories.private import PRIVATE
from simulator.stories.requests import REQUESTS
from simulator.stories.slots import SLOTS
from simulator.stories.story import SmallStory
from simulator.stories.units import OTHER_MAKES

_ALL = (
    *(*AT_ONCE, *HOST, *SLOTS, *LOGS, *PINS, *DEVICES, *REQUESTS, *PRIVATE, *MACHINES, *OTHER_MAKES),
    *(*OBJECTS, *IMPORTED, *NEIGHBOURS, *MAPPINGS, *AREAS, *CONTENTS, *MEDLEY),
)
STORIES: Mapping[str, SmallStory] = {story.name: story for story in _ALL}
