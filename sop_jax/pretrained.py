"""The network that a run has trained, for whatever comes after the training."""

import jax
import ml_collections
from etils import epath

from sop_jax import checkpoint, hosts
from sop_jax import config as config_lib
from sop_jax.mesh import make_mesh, replicated
from sop_jax.models import Model, Params, build


def load(
    workdir: epath.PathLike, step: int | None = None
) -> tuple[ml_collections.ConfigDict, Model, Params, int]:
    """Reads the teacher of a run.

    Args:
        workdir: of the run, local or remote (`gs://`).
        step: of which checkpoint; the newest by default.

    Returns:
        The run's config, the network, the teacher's parameters on every device there is, and the
        step that they are of.

    Raises:
        UserError: the folder is not of a run, has no such checkpoint, or it cannot be read.
    """
    config = config_lib.load(workdir)
    model = build(config, config.augment.global_size)
    everywhere = replicated(make_mesh())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    if step is None:
        # Of all processes the first decides: to another a newer one may be there already.
        step = hosts.agree(checkpoint.latest_step(workdir) or 0) or None
    teacher = checkpoint.restore_part(workdir, abstract, "teacher", step)
    assert step is not None  # without a checkpoint the line above has raised
    return config, model, teacher, step
