"""`scripts/on_gpu.py` needs JAX, Flax, Optax, PyTorch and transformers alone."""

import subprocess
import sys
from pathlib import Path

# An environment that lacks what scripts/programs.py replaces; then each program at toy size.
PROGRAM = """
import sys
from importlib.machinery import PathFinder

ABSENT = set()

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
import flax.nnx, optax, transformers
ABSENT |= {"jaxtyping", "ml_collections", "grain", "tensorflow_datasets", "array_record", "PIL"}
ABSENT |= {"pydicom", "pylibjpeg", "tensorboardX", "absl", "rich", "orbax", "safetensors"}
for name in [name for name in sys.modules if name.partition(".")[0] in ABSENT]:
    del sys.modules[name]

import jax
from scripts import on_gpu, programs

assert set(programs.ABSENT) == ABSENT
made = [programs.guided_step(1, True), programs.image(1, True, True), programs.local(4, True)]
made += [programs.method(name, True) for name in on_gpu.METHODS]
for program in made:
    jax.eval_shape(program.f, *program.args)
print(len(made))
"""


def test_the_programs_need_no_other_package():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert process.stdout.strip() == "6", process.stderr[-2000:]
