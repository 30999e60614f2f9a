"""Compare ConVIRT, GLoRIA and MGCA with the same encoders, data and steps, over several seeds.

    python -m scripts.compare_methods --workdir runs/methods --seeds 3

Runs pre-training, classification and grounding of each method and seed as a user would, one after
another, each in its own workdir; a run that has a results.json is not repeated. Prints a Markdown
table: each figure is the mean over the seeds, with the lowest and the highest.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

METHODS = ("convirt", "gloria", "mgca")
WAYS = ("image_to_text", "text_to_image")
FRACTIONS = ("1%", "10%", "100%")
PLACES = ("pointing", "contrast_to_noise", "dice")
BESIDE = ("chance", "prior", "ceiling")


def once(config: str, workdir: Path, *overrides: str) -> dict[str, dict]:
    """The figures of a run; the run is started unless it is done."""
    if not (workdir / "results.json").exists():
        command = [sys.executable, "-m", "medsyn_jax.main", "--config", f"configs/{config}.py"]
        subprocess.run([*command, "--workdir", str(workdir), *overrides], check=True)
    return json.loads((workdir / "results.json").read_text())["metrics"]


def figures(root: Path, method: str, seed: int) -> dict[str, float]:
    """Figures of one method and seed by row; recall@1 is the mean of both directions."""
    encoder = root / f"{method}-{seed}"
    encoder_flag = f"--config.encoder.workdir={encoder}"
    pretrain = once(method, encoder, f"--config.seed={seed}")
    classify = once("classify", root / f"classify-{method}-{seed}", encoder_flag)
    ground = once("ground", root / f"ground-{method}-{seed}", encoder_flag)
    values = {}
    for kind in ("", "local/", "mixed/"):
        keys = [f"test/{kind}{way}/recall@1" for way in WAYS]
        if keys[0] in pretrain:
            values[f"{kind}recall@1"] = statistics.mean(pretrain[k]["value"] for k in keys)
    for share in FRACTIONS:
        if entry := classify.get(f"pretrained/linear-convex/test/{share}/auroc/mean"):
            values[f"AUROC {share}"] = entry["value"]
    for name in PLACES:
        entry = ground[f"test/mean/{name}"]
        values[name] = entry["value"]
        values |= {f"{name}, {k}": entry[k] for k in BESIDE if k in entry}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results = {
        method: [figures(args.workdir, method, seed) for seed in range(args.seeds)]
        for method in METHODS
    }
    print("| |" + "".join(f" {method} |" for method in METHODS))
    print("|---" * (len(METHODS) + 1) + "|")
    for name in dict.fromkeys(k for runs in results.values() for k in runs[0]):
        cells = []
        for runs in results.values():
            values = [run[name] for run in runs if run.get(name) is not None]
            numbers = [f"{f(values):.3f}" for f in (statistics.mean, min, max) if values]
            mean, low, high = numbers or [""] * 3
            cells.append(mean if low == high else f"{mean} ({low} to {high})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
