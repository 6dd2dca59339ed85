"""Which of the released code's behaviours a run follows (docs/defects.md)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Switches for the released code's behaviours; each is off unless it is asked for."""

    name: str
    lower_case_objects: bool = False  # defect 11
    controls_overlap: bool = False  # defect 6
    float16_sigma: bool = False  # defect 3
    released_tokens: bool = False  # defect 7
    nd_ratio_of_pk: bool = False  # defect 1
    unrounded_values: bool = False  # replacement values with more bits than machines agree on
    counter_first: bool = False  # CK where an answer names both objects, even if PK is the longer


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("corrected"),
        Protocol(
            "released",
            lower_case_objects=True,
            controls_overlap=True,
            float16_sigma=True,
            released_tokens=True,
            nd_ratio_of_pk=True,
            unrounded_values=True,
            counter_first=True,
        ),
    )
}
