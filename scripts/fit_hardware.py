"""Measures training steps on this machine, fits the cost model of `envs.hardware`, and says how well it predicts.

    python scripts/fit_hardware.py --quick                                       # under a minute
    python scripts/fit_hardware.py --output docs/results/hardware_cpu.json       # about two minutes on 2 cores

A third of the grid, drawn by a seed, is held out: errors are of those points, the model is fitted to the others. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from envs.hardware import HardwareModel, StepMeasurement, fit_hardware, measure_steps, relative_errors
from metalearn.errors import MetalearnError
from provenance import provenance

QUICK = {"entities": (1_000, 8_000, 32_000), "dims": (8, 16, 64), "batch_sizes": (64, 512, 2_048)}
FULL = {
    "entities": (1_000, 4_000, 16_000, 64_000),
    "dims": (8, 16, 32, 64),
    "batch_sizes": (64, 256, 1_024, 4_096),
}
PRECISIONS = ("float32", "bfloat16")
ROUNDS = 6


def split(measurements: list[StepMeasurement], seed: int) -> tuple[list[StepMeasurement], list[StepMeasurement]]:
    """Splits at random into two thirds to fit and one third to hold out."""
    order = np.random.default_rng(seed).permutation(len(measurements))
    cut = len(measurements) // 3
    return [measurements[index] for index in order[cut:]], [measurements[index] for index in order[:cut]]


def describe(model: HardwareModel, fitted: list[StepMeasurement], held_out: list[StepMeasurement]) -> dict[str, Any]:
    """Returns the figures."""
    seconds, memory = relative_errors(model, held_out)
    by_precision = {
        f"median_relative_error_{precision}": float(
            np.median(seconds[[row.workload.precision == precision for row in held_out]])
        )
        for precision in model.costs
    }
    return {
        "median_relative_error": float(np.median(seconds)),
        "p90_relative_error": float(np.quantile(seconds, 0.9)),
        **by_precision,
        "median_relative_error_memory": float(np.median(memory)),
        "held_out_points": len(held_out),
        "fitted_points": len(fitted),
    }


def write(path: Path, model: HardwareModel, figures: dict[str, Any], rows: list[StepMeasurement], seed: int) -> None:
    """Writes figures, coefficients, measurements, and where they are from."""
    record = {
        **figures,
        "costs": {precision: cost._asdict() for precision, cost in model.costs.items()},
        "power": model.power,
        "device": model.device,
        "provenance": provenance(threads=torch.get_num_threads(), seed=seed),
        "measurements": [{**row.workload._asdict(), "seconds": row.seconds, "memory": row.memory} for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller grid")
    parser.add_argument("--device", default="cpu", help="of torch")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--power", type=float, help="watts that the device draws in training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the points held out")
    parser.add_argument("--output", type=Path, help="where to write figures, coefficients and measurements")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    with tqdm(total=ROUNDS, desc="rounds", disable=not sys.stderr.isatty()) as progress:
        measurements = measure_steps(
            **(QUICK if arguments.quick else FULL),
            precisions=PRECISIONS,
            device=arguments.device,
            rounds=ROUNDS,
            seed=arguments.seed,
            on_round=lambda done: progress.update(done - progress.n),
        )
    fitted, held_out = split(measurements, arguments.seed)
    name = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else "cpu"
    model = fit_hardware(fitted, device=name, power=arguments.power)
    figures = describe(model, fitted, held_out)
    if arguments.output is not None:
        write(arguments.output, model, figures, measurements, arguments.seed)
    for precision, cost in model.costs.items():
        print(
            f"{name} {precision}: overhead {1e6 * cost.overhead:.0f} us, {1e9 * cost.seconds_per_byte:.3f} ns/byte, "
            f"{1e9 * cost.seconds_per_flop:.3f} ns/flop, {1e9 * cost.seconds_per_sample:.0f} ns/sample"
        )
    print(
        f"seconds of a step on {len(held_out)} points held out: median relative error "
        f"{100 * figures['median_relative_error']:.1f} %, 9 of 10 below {100 * figures['p90_relative_error']:.1f} %"
    )
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    try:
        main()
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
