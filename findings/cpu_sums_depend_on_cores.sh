#!/usr/bin/env bash
# XLA compiles a sum on the CPU for the number of threads that it has: the cores of the machine, of
# the process's affinity, or of the environment variable NPROC, which no page of JAX names.
# One would guess: the same jitted program, jaxlib and processor model give the same bits.
# What happens: a sum and a mean of squares have other last bits with one thread than with two or
# more, and the gradient of a convolution has others with 1, 2 and 4. A matrix product always agrees,
# as do two runs with the same number.
# Why it matters: a training that is resumed in a job of another number of cores is not the unbroken
# one bit for bit, and studies that run one process a core (NPROC=1) differ from a single run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/sums.py" <<'PYTHON'
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np

a, b = jax.random.normal(jax.random.key(0), (2000, 3000)), jnp.ones((3000, 50)) / 7
images, kernel = a[:32].reshape(2, 48, 100, 10), a[:9, :80].reshape(3, 3, 10, 8)


def energy(kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return (out**2).sum()


programs = {
    "sum": (jnp.sum, a),
    "mean of squares": (lambda x: (x**2).mean(0), a),
    "product": (lambda x: x @ b, a),
    "gradient of a convolution": (jax.grad(energy), kernel),
}
for name, (program, x) in programs.items():
    value = np.asarray(jax.jit(program)(x))
    print(f"{name}: {hashlib.sha256(value.tobytes()).hexdigest()[:8]}")
PYTHON
run() { env JAX_PLATFORMS=cpu "$@" "$folder/venv/bin/python" "$folder/sums.py" 2>/dev/null; }
"$folder/venv/bin/python" -c 'from importlib.metadata import version as v; print("jaxlib", v("jaxlib"))'
for threads in 1 2 4; do
  run NPROC="$threads" > "$folder/$threads"
  run NPROC="$threads" | cmp - "$folder/$threads"
done
paste -d' ' "$folder/1" <(cut -d: -f2 "$folder/2") <(cut -d: -f2 "$folder/4")
differing() { diff "$folder/$1" "$folder/$2" | grep '^<' | cut -d: -f1 | sed 's/< //' | paste -sd,; }
echo "1 and 2 threads differ in: $(differing 1 2)"
echo "2 and 4 threads differ in: $(differing 2 4)"
[ "$(differing 1 2)" = "sum,mean of squares,gradient of a convolution" ]
[ "$(differing 2 4)" = "gradient of a convolution" ]
run taskset -c 0 | cmp - "$folder/1"
echo "one core of the affinity is one thread"
