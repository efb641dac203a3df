"""What a daemon lists has an end, and says how much it left out."""

from __future__ import annotations

from protocol.uapi.message import MAX_TOLD, as_told


def test_a_check_tells_of_as_much_as_an_answer_holds() -> None:
    broken = [f"I16: {number}" for number in range(MAX_TOLD + 2)]
    assert as_told(broken[:MAX_TOLD]) == broken[:MAX_TOLD]
    assert as_told(broken[: MAX_TOLD + 1]) == [*broken[:MAX_TOLD], "and 1 more"]
    assert as_told(broken)[-1] == "and 2 more"
