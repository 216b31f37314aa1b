"""What a training run is at a step, and its checkpoints."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from apr_jax.models.decoder import Decoder
from apr_jax.models.params import build_decoder, check_finite, named_params

POSITION = ("step", "chunk", "offset")


@dataclasses.dataclass
class TrainState:
    """Parameters and optimizer state (donated to each step), and where in the data the run is.

    Attributes:
      step: updates made.
      chunk, offset: the next step's data: chunk of the store, step within it.
    """

    params: Any
    opt_state: Any
    step: int = 0
    chunk: int = 0
    offset: int = 0


class Checkpoints:
    """Checkpoints of a run, by step. One appears whole or not at all; the newest `keep` stay."""

    def __init__(self, directory: str | os.PathLike, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

    def save(self, graphdef: Any, state: TrainState) -> None:
        """Writes a checkpoint, unless this step has one.

        Raises:
          ValueError: a parameter is not finite; those before stay.
        """
        if state.step in self._manager.all_steps():
            return
        params = named_params(nnx.merge(graphdef, state.params))
        check_finite(params)
        tree = {
            "params": params,
            "optimizer": {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
            "position": {name: np.asarray(getattr(state, name)) for name in POSITION},
        }
        self._manager.save(state.step, args=ocp.args.StandardSave(tree))
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, graphdef: Any, state: TrainState, step: int | None = None) -> TrainState:
        """The newest checkpoint's state (or that of `step`), in the structure of `state`.

        Raises:
          ValueError: there is none.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"no checkpoint in {self._manager.directory}")
        leaves, treedef = jax.tree.flatten(state.opt_state)
        target = {
            "params": named_params(nnx.merge(graphdef, state.params)),
            "optimizer": {str(i): leaf for i, leaf in enumerate(leaves)},
            "position": {name: np.zeros((), np.int64) for name in POSITION},
        }
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        optimizer = [tree["optimizer"][str(i)] for i in range(len(leaves))]
        position = {name: int(value) for name, value in tree["position"].items()}
        return TrainState(
            nnx.split(_with_params(graphdef, state.params, tree["params"]))[1],
            jax.tree.unflatten(treedef, optimizer),
            **position,
        )

    def close(self) -> None:
        self._manager.close()


def _with_params(graphdef: Any, params: Any, values: dict[str, jax.Array]) -> Decoder:
    decoder = nnx.merge(graphdef, params)
    return build_decoder(decoder.config, decoder.dtype, values.__getitem__)
