# SPDX-License-Identifier: Apache-2.0
"""What a run cost the climate: its wall time times a power and a carbon intensity that are assumed, and said to be."""

import re
from dataclasses import dataclass
from typing import Any


# Lannelongue et al., Green Algorithms, 2021, doi.org/10.1002/advs.202100707: of processors that it has no entry for.
CORE_WATTS, GPU_WATTS = 12.0, 200.0
GREEN_ALGORITHMS = "[Green Algorithms](https://doi.org/10.1002/advs.202100707)"
# The most that a board takes, by its maker's data sheet; the first fragment of the name that fits counts.
BOARD_WATTS = {
    "H100 PCIe": 350.0, "H100 NVL": 400.0, "H100": 700.0, "H200 NVL": 600.0, "H200": 700.0, "A100-SXM": 400.0,
    "A100": 300.0, "V100": 300.0, "L40S": 350.0, "L4": 72.0, "T4": 70.0, "RTX 4090": 450.0, "RTX 3090": 350.0,
}  # fmt: skip
# Of the year 2024, the mean over the world, with all greenhouse gases.
CARBON_INTENSITY = 473.0
EMBER = "[Ember](https://ember-energy.org/latest-insights/global-electricity-review-2025/)"


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        seconds: of training with its evaluations.
        watts: that were drawn meanwhile, and in words `power` where that is from.
        grams_per_kwh: of CO2 equivalent for electricity, and in words `grid` where that is from.
        watt_hours, grams: what comes of it.
    """

    seconds: float
    watts: float
    power: str
    grams_per_kwh: float
    grid: str
    watt_hours: float
    grams: float


def estimate(record: dict[str, Any], watts: float | None = None, grams_per_kwh: float | None = None) -> Estimate:
    """
    Of the run that a record is about.

    Args:
        record: with `wall_time_seconds`, `hardware` and `training`, as training writes it. Those of its `earlier` runs
            that were on the same hardware count, too.
        watts: of all processors together; None to assume it by their names.
        grams_per_kwh: of CO2 equivalent; None for the mean of the world.
    """
    power, grid = "stated by whoever trained it", "stated by whoever trained it"
    if watts is None:
        watts, power = _assumed_power(record["hardware"], record["training"].get("processes", 1))
    if grams_per_kwh is None:
        grams_per_kwh, grid = CARBON_INTENSITY, f"the world's mean of the year 2024: {EMBER}"
    seconds = record["wall_time_seconds"] + sum(run["wall_time_seconds"] for run in same_hardware(record))
    watt_hours = seconds / 3600 * watts
    return Estimate(seconds, watts, power, grams_per_kwh, grid, watt_hours, watt_hours / 1000 * grams_per_kwh)


def same_hardware(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The earlier runs that were on the hardware of the last."""
    return [run for run in record.get("earlier", []) if run["hardware"] == record["hardware"]]


def _assumed_power(hardware: str, processes: int) -> tuple[float, str]:
    """`hardware` is of one machine: "2 x NVIDIA A100-SXM4-80GB" or "CPU, 8 cores, ...". Several may have taken part."""
    if found := re.match(r"CPU, (\d+) cores", hardware):
        return CORE_WATTS * int(found[1]), f"{CORE_WATTS:g} W for each of {found[1]} cores: {GREEN_ALGORITHMS}"
    found = re.match(r"(\d+) x (.+)", hardware)
    boards = max(int(found[1]) if found else 1, processes)
    watts = next((watts for part, watts in BOARD_WATTS.items() if part in hardware), None)
    source = GREEN_ALGORITHMS if watts is None else "the board's limit by its data sheet"
    watts = watts or GPU_WATTS
    return watts * boards, f"{watts:g} W for each of {boards} accelerators: {source}"
