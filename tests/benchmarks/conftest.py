"""What a recorded run says of its machine: the device and the versions, no names."""

import importlib.metadata
import os
import statistics
import time

import jax

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "jaxcompress")


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info.get("cpu", {}).get("brand_raw", machine_info.get("machine"))
    machine_info.clear()
    machine_info.update(
        device=str(jax.devices()[0].device_kind),
        processor=cpu,
        cores=os.cpu_count(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for each in output_json["benchmarks"]:
        each["stats"].pop("data", None)
    info = output_json.get("commit_info", {})
    output_json["commit_info"] = {k: info.get(k) for k in ("id", "time", "dirty")}


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def paired(calls: dict, rounds: int, turns: int = 1) -> dict[str, list[float]]:
    """Times of several calls, taken in turn, after one warm-up: for each round a sum of `turns`.

    A shared machine changes its speed from second to second; short turns meet it alike.
    """
    for call in calls.values():
        seconds(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        spent = dict.fromkeys(calls, 0.0)
        for i in range(turns):
            names = list(calls) if (r + i) % 2 == 0 else list(calls)[::-1]
            for name in names:
                spent[name] += seconds(calls[name])
        for name, total in spent.items():
            times[name].append(total)
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
