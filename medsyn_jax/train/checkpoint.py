"""Checkpoints of a run, and the encoders that its best checkpoint holds."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers as policies

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError, reason
from medsyn_jax.core.files import full_disk_is_user_error
from medsyn_jax.train import state as states

PARTS = ("params", "stats", "opt")
# Weights of earlier versions, and their moments, that restored states leave out.
_UNREAD = re.compile(r"(.*/)?text/pooler/.*")


class Checkpoints:
    """The checkpoints of one run, under `directory`/<step>/{params, stats, opt, meta}.

    `meta` holds the step, the position of the data iterator and the state of early stopping. The
    latest two are kept, in case the last is damaged, and the one with the lowest score.

    Raises UserError if there is no directory to read from.
    """

    def __init__(self, directory: Path, read_only: bool = False):
        if read_only and not directory.is_dir():
            raise UserError(f"{directory}: no checkpoints there: train first")
        score: Callable[[Any], float] = lambda metrics: metrics["score"]  # noqa: E731
        best = policies.BestN(
            get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={part: ocp.StandardCheckpointHandler() for part in PARTS}
            | {"meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
                best_fn=score,
                best_mode="min",
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                save_root_metadata=False,
            ),
        )

    def latest(self) -> int | None:
        """The last saved step; None without checkpoints."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest score; the latest if none has a score."""
        best = self._manager.best_step()
        return self.latest() if best is None else best

    def save(self, state: states.State, meta: dict, score: float | None = None) -> None:
        """Copy the state to the host, and write it in the background."""
        step = int(state["step"])
        # Orbax has no empty items, such as the statistics of a model without any.
        parts: dict[str, Any] = {
            p: ocp.args.StandardSave(tree.named(state[p])) for p in PARTS if _leaves(state, p)
        }
        parts["meta"] = ocp.args.JsonSave({"step": step, **meta})
        with full_disk_is_user_error(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(**parts),
                metrics=None if score is None else {"score": score},
                force=True,
            )

    def meta(self, step: int) -> dict:
        """`meta` of the checkpoint of `step`, as it was saved."""
        return self._read(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The parts of `like` as saved at `step`, placed as `like` is, on whatever devices.

        like: "step" and any of PARTS, as arrays or ShapeDtypeStructs.
        """
        flat = {p: states.abstract(tree.named(like[p])) for p in PARTS if _leaves(like, p)}
        for part, saved in self._saved(step, tuple(flat)).items():
            flat[part] |= {name: leaf for name, leaf in saved.items() if _UNREAD.fullmatch(name)}
        leaves = self._read(step, {p: ocp.args.StandardRestore(x) for p, x in flat.items()})
        restored = {**like, **{p: tree.unnamed(leaves[p], like[p]) for p in flat}}
        if "step" in like:
            restored["step"] = states.replace(like["step"], step)
        return restored

    def restore_all(self, step: int, parts: tuple[str, ...]) -> list[dict[str, jax.Array]]:
        """Whole parts as flat dicts by name, in their saved shapes, on the first local device."""
        like = self._saved(step, parts)
        leaves = self._read(step, {p: ocp.args.StandardRestore(x) for p, x in like.items()})
        return [leaves.get(part, {}) for part in parts]

    def _saved(self, step: int, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """The saved shapes by part and name, placed on the first local device."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            metadata = self._manager.item_metadata(step)
            return {
                part: {
                    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
                    for name, leaf in metadata[part].items()
                }
                for part in parts
                if metadata[part] is not None
            }
        except Exception as e:
            raise self._damaged(step, e) from e

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # Orbax raises many kinds for a damaged folder
            raise self._damaged(step, e) from e
        return {
            item: {name: x for name, x in values.items() if not _UNREAD.fullmatch(name)}
            for item, values in saved.items()
        }

    def _damaged(self, step: int, e: Exception) -> UserError:
        reason = " ".join((str(e) or type(e).__name__).split())[:200]
        return UserError(
            f"checkpoint {self.directory / str(step)} is incomplete or does not fit ({reason}): "
            "move this folder away to go on from the one before it"
        )

    def wait(self) -> None:
        """Wait until everything is on disk; raises the errors of the background writer."""
        with full_disk_is_user_error(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Free the threads of Orbax."""
        self._manager.close()


def _leaves(state: dict[str, Any], part: str) -> bool:
    return bool(jax.tree.leaves(state.get(part)))


# Sections and fields of a pre-training config that all users of an encoder read, and fields that
# earlier versions lack, with the values that describe their runs.
_SECTIONS = ("image", "data", "augment")
_LATER: dict[str, dict[str, Any]] = {
    "image": {"kind": "resnet", "upsample": 0},
    "text": {"summed": 1},
    "heads": {"text": True, "local": False, "prototypes": 0},
}


def read_config(workdir: Path) -> dict[str, Any]:
    """The effective config of a pre-training run, with the fields that earlier versions lack.

    Raises UserError for the folder of anything else.
    """
    try:
        config = json.loads((workdir / "config.json").read_text())["config"]
        for section, fields in _LATER.items():
            if section in config:
                config[section] = fields | config[section]
        task = config.get("task", "pretrain")
        lacking = [name for name in _SECTIONS if not isinstance(config.get(name), dict)]
        why = f"its config has no section {lacking[0]}" if lacking else ""
        why = why if task == "pretrain" else f"its task is {task!r}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = f"{type(e).__name__} reading config.json"
    if why:
        raise UserError(
            f"{workdir}: not the workdir of a pre-training run ({why}): run "
            "`python -m medsyn_jax.main --config configs/convirt.py` first, or name another"
        )
    return config


@contextlib.contextmanager
def rebuilding(workdir: Path) -> Iterator[None]:
    """Raise UserError if the config of a run does not describe the model built in the block."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(
            f"{workdir / 'config.json'}: describes no model that can be built ({reason(e)}): "
            "restore the file that the run wrote"
        ) from e


def _opened(workdir: Path) -> tuple[Checkpoints, int]:
    """The checkpoints of a run and the step of the best; the caller closes them."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.best()
    if step is None:
        checkpoints.close()
        raise UserError(f"{checkpoints.directory}: holds no complete checkpoint: train first")
    return checkpoints, step


def check_run(workdir: Path) -> None:
    """Raise UserError unless the folder is a pre-training run with a checkpoint; quick."""
    read_config(workdir)
    _opened(workdir)[0].close()


def restore(
    workdir: Path, make_model: Callable[[nnx.Rngs], nnx.Module], part: str = ""
) -> tuple[Any, Any, Any, int]:
    """(structure, params, stats, step) of the best checkpoint of a run, on one device.

    make_model: builds the model of the run, or its part of that name, such as "image". Raises
    UserError if the checkpoint does not fit the model.
    """
    with rebuilding(workdir):
        structure, *shapes = states.shapes(make_model)
    checkpoints, step = _opened(workdir)
    try:
        saved = checkpoints.restore_all(step, ("params", "stats"))
    finally:
        checkpoints.close()
    prefix = f"{part}/" if part else ""
    try:
        params, stats = (
            tree.unnamed({k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}, x)
            for flat, x in zip(saved, shapes, strict=True)
        )
    except KeyError as e:
        encoders = f"{part} encoder does" if part else "encoders do"
        raise UserError(f"{workdir}: its {encoders} not fit its config: {e}") from None
    return structure, params, stats, step
