"""Field types of messages: the widths of kernel structs, checked when a message is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

U8 = Annotated[int, Field(ge=0, lt=1 << 8)]
U16 = Annotated[int, Field(ge=0, lt=1 << 16)]
U32 = Annotated[int, Field(ge=0, lt=1 << 32)]
U64 = Annotated[int, Field(ge=0, lt=1 << 64)]
S32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
