"""What every benchmark shares: timed child processes, spread, ratios, and the record of a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# Old settings for old OpenBLAS builds, found on some machines, slow a current numpy.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}


class Finished(NamedTuple):
    """A child process that has ended well."""

    stdout: str
    wall_seconds: float  # start to exit
    peak_mb: float


def run(command: list[str]) -> Finished:
    """Run a child process to its end; raise if it fails."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, env=ENVIRONMENT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} exited with {child.returncode}")
        return Finished(out.read(), wall, usage.ru_maxrss / 1024)


def truenorm_train(
    *options: str, seed: int, goal: float, program: tuple[str, ...] = ("-m", "truenorm")
) -> dict[str, Any]:
    """One whole ``truenorm train`` as a row like those the peers print."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *program, "train", "--quiet", "--json", *options]
        done = run([*command, "--seed", str(seed), "--run-dir", f"{folder}/run"])
        metrics = Path(folder, "run", "metrics.csv").read_text().splitlines()
    result = json.loads(done.stdout)
    names = metrics[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in metrics[1:]]
    passed = [float(r["seconds"]) for r in rows if float(r["valid_accuracy"]) > goal]
    return {
        "fit_seconds": result["fit_seconds"],
        "epochs": result["epochs"],
        "seconds_per_epoch": result["fit_seconds"] / result["epochs"],
        "test_accuracy": result["test_accuracy"],
        "val_accuracy": result["val_accuracy"],
        "val_loss": result["val_loss"],
        "seconds_to_goal": passed[0] if passed else None,
        "process_seconds": done.wall_seconds,
        "peak_mb": done.peak_mb,
    }


def peer(name: str, seed: int) -> dict[str, Any]:
    """One run of a peer's script."""
    done = run([sys.executable, str(HERE / "peers" / f"{name}.py"), str(seed)])
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**row, "process_seconds": done.wall_seconds, "peak_mb": done.peak_mb}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def mean_and_sd(values: list[float]) -> str:
    """Mean and standard deviation, as percentages."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} +- {100 * sd:.2f} %"


def provenance(command: str) -> dict[str, Any]:
    """Machine, versions, commit and command."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter([platform.processor()]),
        "unknown",
    )
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("truenorm", "torch", "numpy", "scikit-learn", "skorch")
    return {
        "command": command,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def save(name: str, text: str, record: dict[str, Any]) -> None:
    """Print a result and keep it as text and as JSON in bench/results/."""
    RESULTS.mkdir(exist_ok=True)
    about = record["provenance"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    header = (
        f"`{about['command']}` on {about['date']}, commit {about['commit']}; {about['cpu']}, "
        f"{about['cores']} cores; Python {about['python']}, {versions}.\n\n"
    )
    (RESULTS / f"{name}.md").write_text(header + text)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(header + text)
