"""Steps that do nothing but take time, in place of runs."""

import sys
from pathlib import Path

from vla_trqam.study.plan import Step

SCRIPT = """
import os, pathlib, signal, sys, time
folder, seconds, mode = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "calls.txt").open("a") as calls:
    calls.write(mode + "\\n")
if mode == "fails":
    print("error: the data is no data")
    sys.exit(2)
(folder / "config.yaml").write_text("begun")
(folder / "gpu.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "any"))
end = time.monotonic() + seconds
while time.monotonic() < end:
    if asked:
        (folder / "saved.txt").write_text("checkpoint")
        sys.exit(130)
    time.sleep(0.01)
(folder / "span.txt").write_text(f"{end - seconds} {time.monotonic()}")
(folder / "report.json").write_text("{}")
"""


def fake(folder: Path, name: str, seconds: float = 0.0, mode: str = "new", needs=()) -> Step:
    own = folder / name

    def command(how: str) -> tuple[str, ...]:
        return (sys.executable, "-S", "-c", SCRIPT, str(own), str(seconds), how)

    return Step(name, command(mode), own, own / "report.json", tuple(needs), command("resumed"))


def calls(folder: Path, name: str) -> list[str]:
    path = folder / name / "calls.txt"
    return path.read_text().split() if path.exists() else []


def span(folder: Path, name: str) -> tuple[float, float]:
    begin, end = (folder / name / "span.txt").read_text().split()
    return float(begin), float(end)
