"""Training curve of a run as an SVG: `python benchmarks/plot_curve.py runs/laptop curve.svg`.

Bits per byte of the logged training batches (thin) and their moving average (thick) against bytes
read, with the held-out result and the n-gram baselines of the run as levels.
"""

import json
import sys
from pathlib import Path

from bltjax.checkpoints.run_directory import RunDirectory

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 380, 52, 40, 14
RIGHT = 150  # room for the names of the levels
AVERAGED = 15  # logged steps


def main(workdir: str, target: str):
    directory = RunDirectory(Path(workdir))
    lines = [json.loads(line) for line in directory.metrics("blt").open()]
    result = json.loads(directory.result.read_text())
    seen = [sum(v for k, v in line.items() if k.startswith("bytes_seen/")) for line in lines]
    xs = [num_bytes / 1e6 for num_bytes in seen]
    ys = [line["bits_per_byte"] for line in lines]
    levels = {"held out": result["bits_per_byte"]}
    levels |= {k.replace("_", " "): v for k, v in result.get("baselines", {}).items()}
    Path(target).write_text(svg(xs, ys, {k: v for k, v in levels.items() if v < 3.2}))


def moving_average(ys):
    return [
        sum(ys[max(0, i - AVERAGED + 1) : i + 1]) / min(i + 1, AVERAGED) for i in range(len(ys))
    ]


def svg(xs, ys, levels) -> str:
    low, high = min([*ys, *levels.values()]) - 0.1, 3.2

    def at(x, y):
        across = LEFT + x / xs[-1] * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - min(y, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    def line(points, style):
        return f'<polyline points="{" ".join(points)}" fill="none" {style}/>'

    def text(x, y, words, style=""):
        across, down = at(x, y).split(",")
        return f'<text x="{across}" y="{down}" {style}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tick in [t / 2 for t in range(2, 7) if t / 2 > low]:
        parts.append(line([at(0, tick), at(xs[-1], tick)], 'stroke="#ddd"'))
        parts.append(text(0, tick, f"{tick:.1f}", 'dx="-8" dy="4" text-anchor="end"'))
    for tick in range(0, int(xs[-1]) + 1, max(1, int(xs[-1] / 6))):
        parts.append(text(tick, low, f"{tick} MB", 'dy="18" text-anchor="middle"'))
    for name, value in levels.items():
        colour = "#c33" if name == "held out" else "#888"
        parts.append(
            line([at(0, value), at(xs[-1], value)], f'stroke="{colour}" stroke-dasharray="4 3"')
        )
        parts.append(text(xs[-1], value, f"{name} {value:.3f}", f'dx="6" dy="4" fill="{colour}"'))
    parts.append(line(map(at, xs, ys), 'stroke="#9bd" stroke-width="1"'))
    parts.append(line(map(at, xs, moving_average(ys)), 'stroke="#15a" stroke-width="2"'))
    parts.append(text(0, high, "bits per byte, training batches", 'dx="4" dy="10"'))
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    main(*sys.argv[1:])
